"""Steps of the toy, a tiny CLIP, a tiny VSE-infinity and tiny ViLTs on any number of processes; rank 0 writes losses and weights."""

import sys

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import save_file

from examples.training.run import leave_queues_alone
from hf_vlp.distributed import gather_with_gradient, gather_without_gradient, rank, world_size
from hf_vlp.evaluation.encoding import evaluating
from hf_vlp.layers.normalization import keep_statistics
from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
from hf_vlp.momentum.queue import FeatureQueue
from hf_vlp.training.optim import training_mode
from hf_vlp.training.ramps import ramped
from hf_vlp.training.recipe import RampRecipe
from hf_vlp.training.state import Checkpoints, Progress, StateError
from hf_vlp.training.steps import choose_step
from hf_vlp.training.stream import BatchStream
from tests.contract.rows import (
    REGION,
    ROWS,
    Row,
    albef_config,
    grid_config,
    gru_config,
    pair_config,
    vilt_config,
    vse_config,
)
from tests.loop.toy import ToySampler, ToyTwoTower, parts, stream


def clip_steps(accelerator: Accelerator, objective: str, chunk: int | None) -> dict[str, torch.Tensor]:
    """Losses and weights of two steps; images 1 and 2 come twice, on different ranks of two."""
    torch.manual_seed(0)
    model = VlpClipForPreTraining(pair_config(contrastive_loss=objective)())

    def images(draw: torch.Generator) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(6, 3, 32, 32, generator=draw)}

    return pair_steps(accelerator, model, images, chunk, lr=0.1)


def vse_steps(accelerator: Accelerator, hardest: float, negatives: str, chunk: int | None) -> dict[str, torch.Tensor]:
    """The same of a model of regions; its batch norm uses stored statistics, those of a batch are each process's own."""
    torch.manual_seed(0)
    model = VlpVseForPreTraining(vse_config(gru_config, hardest_negatives=hardest, negatives=negatives)())

    def images(draw: torch.Generator) -> dict[str, torch.Tensor]:
        mask = (torch.arange(5) < torch.tensor([5, 2, 4, 3, 5, 1])[:, None]).long()
        return {"region_features": torch.randn(6, 5, REGION, generator=draw), "region_mask": mask}

    return pair_steps(accelerator, model, images, chunk, lr=0.02)


def pair_steps(accelerator: Accelerator, model, images, chunk: int | None, lr: float) -> dict[str, torch.Tensor]:
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    model.train()
    keep_statistics(model)
    draw, size, found = torch.Generator().manual_seed(1), 6 // world_size(), {}
    mine = slice(rank() * size, (rank() + 1) * size)
    for number in range(2):
        ids = torch.randint(3, 30, (6, 8), generator=draw)
        ids[:, -1] = 39
        whole = {"input_ids": ids, **images(draw)}
        whole["image_ids"] = torch.tensor([1, 2, 3, 1, 5, 2])
        losses = choose_step(chunk, 1)(accelerator, model, [{key: value[mine] for key, value in whole.items()}])
        found[f"loss{number}"] = accelerator.reduce(losses["loss"], reduction="mean").reshape(1)
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}


def frozen_steps(accelerator: Accelerator, chunk: int | None) -> dict[str, torch.Tensor]:
    """Four steps of a grid model whose CNN is frozen for two, with the loss coming up after them; which tensors had a gradient."""
    torch.manual_seed(0)
    inner = VlpVseForPreTraining(vse_config(gru_config, grid_config, hardest_negatives=0)())
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.02))
    accelerator.ddp_handler = None
    draw = torch.Generator().manual_seed(1)
    pairs = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=draw),
            "input_ids": torch.randint(3, 30, (5,), generator=draw),
        }
        for _ in range(12)
    ]
    batches = BatchStream(
        pairs, ToySampler(12, 6), torch.utils.data.default_collate, rank=rank(), processes=world_size()
    )
    ramps = {
        "frozen_stages": RampRecipe([0.0, 1.0, 1.5], [3.0, 2.0, 0.0]),
        "loss_factor": RampRecipe([0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 0.2, 1.0], shape="linear"),
        "hardest_negatives": RampRecipe([0.0, 2.0], [0.0, 0.5], shape="linear"),
    }
    step, drawn, found = ramped(choose_step(chunk, 1), ramps, inner, batches), iter(batches), {}
    training_mode(model)
    for number in range(4):
        losses = step(accelerator, model, [next(drawn)])
        found[f"loss{number}"] = accelerator.reduce(losses["loss"], reduction="mean").reshape(1)
        had = [parameter.grad is not None for name, parameter in inner.named_parameters() if "resnet" in name]
        found[f"gradients{number}"] = torch.tensor([sum(had), len(had)])
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: value.clone() for name, value in inner.state_dict().items()}


def aligned_steps(accelerator: Accelerator, row: Row) -> dict[str, torch.Tensor]:
    """What two steps of a model with a queue of features write into it, [N, ...] of all processes; rank 0 sends no buffer."""
    torch.manual_seed(0)
    inner = row.model_class(row.config())
    accelerator.ddp_handler = DistributedDataParallelKwargs()
    leave_queues_alone(accelerator, inner)
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.05))
    found = {"sends": torch.tensor([int(accelerator.ddp_handler.broadcast_buffers)])}
    accelerator.ddp_handler = None
    model.train()
    size = 4 // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    for number in range(2):
        batch = {key: value[mine] for key, value in row.batch(seed=number).items()}
        choose_step(None, 1)(accelerator, model, [batch])
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in inner.queue.state_dict().items():
        found[name] = gather_without_gradient(tensor[None].clone())
    return found


ALIGNED = next(row for row in ROWS if row.model.endswith("VlpAlbefForPreTraining"))
READ_BOTH = {row.name: row for row in ROWS if row.reads_both and "Model" not in row.model and not row.mixes_rows}
TERMS = {  # weights of the terms of pre-training that stand apart from those of the rows
    "mlm": {"itm_weight": 0, "wpa_weight": 0},
    "mim": {"mlm_weight": 0, "itm_weight": 0, "wpa_weight": 0, "mpp_weight": 1.0},
    "itm-wpa": {"mlm_weight": 0},
    "mlm-mim": {"itm_weight": 0, "wpa_weight": 0, "mpp_weight": 1.0},
    "mlm-itm": {"wpa_weight": 0},
    "itm-mim": {"mlm_weight": 0, "wpa_weight": 0, "mpp_weight": 1.0},
}


def stream_steps(accelerator: Accelerator, row: Row, config) -> dict[str, torch.Tensor]:
    """Losses and weights of two steps of a model that reads words and image together, no parameter of which may be left out."""
    torch.manual_seed(0)
    model = row.model_class._from_config(config)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    model.train()
    size, found = 4 // world_size(), {}
    mine = slice(rank() * size, (rank() + 1) * size)
    for number in range(2):
        whole = row.batch(seed=number)
        # a mean over what is masked is that of the whole batch where each process has as much of it
        for name in row.text_inputs.keys() & {"mlm_labels", "labels"}:
            whole[name] = whole["input_ids"].clone()
            whole[name][:, 3:] = -100
        if "mpp_mask" in whole:
            whole["mpp_mask"] = torch.zeros_like(whole["mpp_mask"])
            whole["mpp_mask"][:, :2] = 1
        own = {key: value[mine] for key, value in whole.items()}
        if "answer_rows" in own:  # an answer for each question of the process
            own["answer_rows"] = torch.arange(size)
        losses = choose_step(None, 1)(accelerator, model, [own])
        found[f"loss{number}"] = accelerator.reduce(losses["loss"], reduction="mean").reshape(1)
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}


def collapsed(negatives: str) -> dict[str, torch.Tensor]:
    """The loss of six pairs over all processes whose embeddings are all the same, and what the model says of it."""
    model = VlpVseForPreTraining(vse_config(gru_config, hardest_negatives=0.75, negatives=negatives)())
    same = torch.ones(6 // world_size(), 4)
    loss = gather_without_gradient(model.objective(same, same)[0].reshape(1)).mean()
    return {"loss": loss.reshape(1), "told": torch.tensor([model.collapsed_loss(6)])}


def statistics(accelerator: Accelerator, chunk: int | None) -> dict[str, torch.Tensor]:
    """[N, 8] the running means of all processes after three steps, and then in an evaluation."""
    model, optimizer, _ = parts(accelerator, ToyTwoTower(batch_norm=True))
    training_mode(model)
    drawn, step = iter(stream(accelerator, Progress())), choose_step(chunk, 1)
    for _ in range(3):
        step(accelerator, model, [next(drawn)])
        optimizer.step()
        optimizer.zero_grad()
    mean = accelerator.unwrap_model(model).norm.running_mean
    found = {"trained": gather_without_gradient(mean[None]).clone()}
    with evaluating(model, accelerator):
        found["evaluated"] = gather_without_gradient(mean[None]).clone()
    return found


def queue_steps(same_order: bool) -> dict[str, torch.Tensor]:
    """A queue of five after three batches of four pairs over all processes, the last without identities."""
    queue, size = FeatureQueue(5, 3), 4 // world_size()
    start = (rank() if same_order else world_size() - 1 - rank()) * size
    for number in range(3):
        pairs = torch.arange(12.0).reshape(3, 4)[number, start : start + size, None].expand(-1, 3).requires_grad_()
        queue.enqueue(pairs, -pairs, pairs[:, 0].long() if number < 2 else None)
    return queue.state_dict()


def main(output: str) -> None:
    accelerator = Accelerator(cpu=True)
    found = {}
    for name, chunk, batches_a_step in (("plain", None, 1), ("cached", 3, 1), ("accumulated", None, 2)):
        model, optimizer, scheduler = parts(accelerator, ToyTwoTower(), lr=0.05)
        batches = stream(accelerator, Progress())
        step, drawn = choose_step(chunk, 1), iter(batches)
        for number in range(4):
            losses = step(accelerator, model, [next(drawn) for _ in range(batches_a_step)])
            found[f"{name}.loss{number}"] = accelerator.reduce(losses["itc"], reduction="mean").reshape(1)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        inner = accelerator.unwrap_model(model)
        found |= {f"{name}.{key}": value.clone() for key, value in inner.state_dict().items()}

    for name, chunk in (("plain", None), ("cached", 2)):
        for objective in ("softmax", "sigmoid"):
            steps = clip_steps(accelerator, objective, chunk)
            found |= {f"clip-{objective}-{name}.{key}": value for key, value in steps.items()}
        for form, hardest, negatives in (("hardest", 1.0, "global"), ("mixed", 0.4, "global"), ("local", 1.0, "local")):
            steps = vse_steps(accelerator, hardest, negatives, chunk)
            found |= {f"vse-{form}-{name}.{key}": value for key, value in steps.items()}
        found |= {f"frozen-{name}.{key}": value for key, value in frozen_steps(accelerator, chunk).items()}
        found |= {f"statistics.{name}.{key}": value for key, value in statistics(accelerator, chunk).items()}

    for name, row in READ_BOTH.items():
        found |= {f"{name}.{key}": value for key, value in stream_steps(accelerator, row, row.config()).items()}
    everything = READ_BOTH["VlpViltForPreTraining-all"]
    for name, weights in TERMS.items():
        steps = stream_steps(accelerator, everything, vilt_config(**weights)())
        found |= {f"terms-{name}.{key}": value for key, value in steps.items()}

    weights = {"itc_weight": 0, "itm_weight": 0}  # pairs of different processes are not contrasted with each other
    steps = stream_steps(accelerator, ALIGNED, albef_config(**weights)())
    found |= {f"terms-words.{key}": value for key, value in steps.items()}
    found |= {f"aligned.{key}": value for key, value in aligned_steps(accelerator, ALIGNED).items()}

    for negatives in ("global", "local"):
        found |= {f"collapsed.{negatives}.{key}": value for key, value in collapsed(negatives).items()}

    for order in ("ranks", "reverse"):
        found |= {f"queue-{order}.{key}": value for key, value in queue_steps(order == "ranks").items()}

    # the gather by itself: row i of process r weighs (r + 1) in the sum that every process takes
    rows = torch.full((2, 3), float(rank() + 1), requires_grad=True)
    everything = gather_with_gradient(rows)
    weights = torch.arange(1.0, len(everything) + 1)[:, None]
    ((rank() + 1) * weights * everything).sum().backward()
    found["gathered"] = everything.detach().clone()
    found["gather_gradient"] = gather_without_gradient(rows.grad).clone()
    assert not gather_without_gradient(rows).requires_grad

    # a checkpoint of this many processes resumes, with each one's own random state
    torch.manual_seed(rank())
    checkpoints = Checkpoints(f"{output}.run", accelerator, model, optimizer, scheduler, batches)
    path = checkpoints.save()
    drawn = torch.rand(1)
    checkpoints.resume(path)
    assert torch.equal(torch.rand(1), drawn)
    if world_size() > 1:
        both = gather_without_gradient(drawn)
        assert both[0] != both[1]
        checkpoints.accelerator.state.num_processes = 1
        try:
            checkpoints.resume(path)
            raise AssertionError("a checkpoint of two processes resumed on one")
        except StateError as error:
            assert "written by 2 processes" in str(error)
        checkpoints.accelerator.state.num_processes = world_size()
    if accelerator.is_main_process:
        save_file({key: value.contiguous() for key, value in found.items()}, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
