"""The endless batches of one process, cut so that the number of processes does not change what a step sees."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_vlp.training.state import Progress


class BatchStream:
    """Batches for ever, from the place `progress` tells; hands each out and writes the new place there.

    Args:
        dataset: map-style. It, the sampler and the collator may have `set_epoch`.
        sampler: yields the index lists of the global batches of one epoch, the same on every process; has `set_epoch`,
            `state_dict(position)` and `load_state_dict`, after which the epoch goes on behind that position.
        collate: items -> dict of tensors [B, ...].
        rank, processes: this process takes the rank-th of `processes` equal parts of every global batch.
        workers: loader processes, restarted every epoch so that they know it.
        seed: of the workers; the loader draws nothing from torch's global generator, or resuming would shift it.
        channels_last: memory format of pictures [B, 3, H, W].
        epoch_ended: called with the number of each epoch that was used up.

    Raises:
        ValueError: the sampler's batches do not divide among the processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler[list[int]],
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        *,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        progress: Progress | None = None,
        epoch_ended: Callable[[int], None] = lambda epoch: None,
    ):
        if getattr(sampler, "batch_size", processes) % processes:
            raise ValueError(
                f"training.batch_size = {sampler.batch_size} does not divide into {processes} processes: "
                f"choose a multiple of {processes}"
            )
        self.dataset, self.sampler, self.collate = dataset, sampler, collate
        self.rank, self.processes, self.workers, self.seed = rank, processes, workers, seed
        self.device = torch.device(device)
        self.channels_last = channels_last
        self.progress, self.epoch_ended = progress or Progress(), epoch_ended

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, counted in batches handed out: loader processes run ahead of it."""
        return self.sampler.state_dict(self.progress.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; `progress` is set by whoever restores it."""
        self.sampler.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            for part in (self.dataset, self.sampler, self.collate):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(self.progress.epoch)
            handed_out = 0
            for batch in self._epoch(self.progress.epoch):
                self.progress.position += 1
                handed_out += 1
                yield self._placed(batch)
            if not handed_out and not self.progress.position:
                raise ValueError("an epoch holds no batch: fewer usable pairs than training.batch_size")
            self.epoch_ended(self.progress.epoch)
            self.progress.epoch, self.progress.position = self.progress.epoch + 1, 0

    def _epoch(self, epoch: int) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=[self._part(indices) for indices in self.sampler],
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed + epoch),
        )

    def _part(self, indices: list[int]) -> list[int]:
        size = len(indices) // self.processes
        return list(indices[self.rank * size : (self.rank + 1) * size])

    def _placed(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        placed = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        for key, value in placed.items():
            if self.channels_last and key.endswith("pixel_values") and value.ndim == 4:
                placed[key] = value.contiguous(memory_format=torch.channels_last)
        return placed
