"""One process of ALBEF's training step on several ranks."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from tests.parity.albef_model import Checkpoint, gradients, left_behind, rank_inputs, training_step

Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def one_rank(
    number: int, ranks: int, folder: str, path: Path, config: Mapping, inputs: Mapping, names: list[str]
) -> None:
    """Writes `<number>.pt` into `folder`: the values of this process's step, with what it leaves of `names`, and its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=ranks)
    checkpoint = Checkpoint(path, config)
    model = checkpoint.build(config)
    values, losses = training_step(model, config, rank_inputs(inputs, number))
    prefix = f"rank{number}."
    after = left_behind(checkpoint, model, names, prefix)
    values |= {name.removeprefix(prefix): value for name, value in after.items()}
    found = gradients(checkpoint, model, losses["loss_total"])
    torch.save((values, {name: value for name, value in found.items() if value is not None}), f"{folder}/{number}.pt")
    dist.destroy_process_group()


def on_ranks(path: Path, config: Mapping, inputs: Mapping[str, torch.Tensor], names: list[str]) -> list[Found]:
    """Values and gradients of each of `world_size` processes."""
    ranks = config["world_size"]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (ranks, folder, path, config, inputs, names), nprocs=ranks)
        return [torch.load(Path(folder) / f"{number}.pt", weights_only=True) for number in range(ranks)]
