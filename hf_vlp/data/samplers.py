"""Batches in which no image occurs twice: two captions of one image are no negatives of each other."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class UniqueImageBatchSampler(torch.utils.data.Sampler[list[int]]):
    """A batch sampler; rows of one image go to different batches. The order is a pure function of (seed, epoch).

    An epoch is as many full batches as the identities allow, always the same number: M batches of B rows exist if the
    sum over images of min(rows of the image, M) reaches M * B. Rows left over (other ones each epoch) follow in short
    batches unless `drop_last`; they too repeat no image. Splitting over processes is left to accelerate; use
    `drop_last=True` there, because its shards expect one short batch at most.

    Args:
        image_ids: [N] integer identity of every row's image.
        batch_size: rows in a batch.
        seed: of the order.
        drop_last: leave out the batches that are not full.

    Raises:
        ValueError: no rows, a batch size below 1, or fewer images than a batch with `drop_last`.
    """

    def __init__(self, image_ids: Sequence[int] | torch.Tensor, batch_size: int, seed: int = 0, drop_last: bool = True):
        ids = np.asarray(image_ids)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"image_ids must be one identity a row, at least one; the shape is {ids.shape}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch holds at least one row.")
        _, self._image_of_row, counts = np.unique(ids, return_inverse=True, return_counts=True)
        if drop_last and len(counts) < batch_size:
            raise ValueError(
                f"{len(counts)} different images cannot fill a batch of {batch_size} without repeating one. "
                f"Lower batch_size or set drop_last=False."
            )
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.epoch, self._position, self._start = 0, 0, 0
        self._full = _full_batches(counts, batch_size)
        self._length: int | None = self._full if drop_last else None

    def __len__(self) -> int:
        if self._length is None:
            return len(self._plan())
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._plan()
        self._position, self._start = self._start, 0
        for batch in batches[self._position :]:
            self._position += 1
            yield batch.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch; a different epoch than the present one starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._position, self._start = epoch, 0, 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the epoch stands.

        Args:
            position: batches consumed in this epoch, those of all processes; the number handed out if not given, which
                runs ahead of the training where a loader fetches in advance.
        """
        position = self._position if position is None else position
        return {"epoch": self.epoch, "position": position, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: the next iteration starts behind the batches consumed.

        Raises:
            ValueError: the state is of another number of rows, batch size, seed or drop_last.
        """
        for name, value in self._fingerprint().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved order has {name}={state.get(name)!r}, this sampler {name}={value!r}: it cannot be "
                    f"continued. Resume with the same data and recipe, or start the epoch anew with set_epoch."
                )
        self.epoch = state["epoch"]
        self._start = self._position = state["position"]

    def _fingerprint(self) -> dict[str, Any]:
        names = ("batch_size", "seed", "drop_last")
        return {"rows": len(self._image_of_row), **{name: getattr(self, name) for name in names}}

    def _plan(self) -> list[np.ndarray]:
        """The batches of the present epoch, [B] rows each (the last ones shorter unless dropped)."""
        generator = np.random.default_rng((self.seed, self.epoch))
        rows = generator.permutation(len(self._image_of_row))
        eligible = _occurrence(self._image_of_row[rows]) < self._full
        chosen = np.flatnonzero(eligible)[: self._full * self.batch_size]
        batches = self._deal(rows[chosen], self._full, generator)
        if not self.drop_last and len(chosen) < len(rows):
            left = np.delete(rows, chosen)
            most = int(np.bincount(self._image_of_row[left]).max())
            batches += self._deal(left, max(most, -(-len(left) // self.batch_size)), generator)
        return batches

    def _deal(self, rows: np.ndarray, batches: int, generator: np.random.Generator) -> list[np.ndarray]:
        """Deal rows like cards, those of one image one after the other: with no more than `batches` rows of an image,
        no batch gets two of them."""
        if not batches:
            return []
        order = generator.permutation(self._image_of_row.max() + 1)
        rows = rows[np.argsort(order[self._image_of_row[rows]], kind="stable")]
        # shuffled, because neighbouring batches share images
        return [rows[start::batches] for start in generator.permutation(batches)]


def _occurrence(values: np.ndarray) -> np.ndarray:
    """[N] how often the same value stood before each place."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    run = np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - run
    return result


def _full_batches(counts: np.ndarray, batch_size: int) -> int:
    """The largest M with sum(min(counts, M)) >= M * batch_size."""
    # sum(min(counts, M)) is concave in M, so what holds for M holds for every smaller one
    low, high = 0, int(counts.sum()) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(counts, middle).sum()) >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low
