"""Two steps of the toy model on however many processes it is launched; rank 0 writes losses and weights."""

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_vlp.distributed import gather_with_gradient, gather_without_gradient, rank, world_size
from hf_vlp.training.state import Checkpoints, Progress, StateError
from hf_vlp.training.steps import choose_step
from tests.loop.toy import ToyTwoTower, parts, stream


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
