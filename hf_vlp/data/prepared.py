"""Records with their pictures prepared for a transform, and what a bad record does; for every task.

`prepare` is the deterministic part of a picture's transform, so that its result can be kept; what is random follows in the collator, on
the whole batch. Pictures may also be regions, read from a store by the records' keys.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_vlp.data.record import (
    BAD_ROW,
    IMAGE_FIELDS,
    RecordError,
    check_record,
    decode_image,
    identity,
    missing_column,
)


class PreparedRecords(torch.utils.data.Dataset):
    """A map-style data set of records; item i is {"image": uint8 [3, h, w], "image_id": int, "draw": int} and what the task adds.

    With `regions` it is {"regions": RegionFeatures, ...}, of a task with several pictures {"images": [uint8 [3, h, w], ...], ...}.

    What is drawn is a pure function of (seed, epoch, row): resumed, on any number of workers or processes, the same epoch
    shows the same items. `draw` is a random 63-bit number that seeds what is random further on.

    `on_bad_record="raise"` stops at the first record that lacks what the task needs or has a picture that does not decode (a
    RecordError with the row's position). `"skip"` leaves such rows out and counts them:

    - all but the pictures is checked at once, whatever `cache` is, and bad rows are left out;
    - with `cache`, so are bad pictures;
    - without, a bad picture is found when it is asked for. The next good row stands in for it, with its own text and
      identity, so that batches keep their size on every process. Its picture may then be in the batch already, on whichever
      process: the two carry the same `image_id`, so a loss with targets by identity takes the captions of both as
      positives, one with plain targets as negatives. `python -m hf_vlp.data.validate` finds such rows before.

    `report()` counts each bad row once, workers' included.

    A task says in `check` what is bad about a record but its pictures, in `wanted` which good ones it has a use for, and in `content`
    what an item holds besides.

    Args:
        records: a `datasets.Dataset` as `read_records` gives, or a sequence of such rows.
        prepare: PIL image -> uint8 [3, h, w], deterministic; not needed with `regions`.
        pictures: how many a record has; of more than one they are in `images`.
        seed: of what is drawn.
        cache: decode and prepare all pictures now and keep them (3 * h * w bytes each).
        regions: a `RegionStore`, or another object with `read(key)`; a record's `regions`, else its `image_id`, is the key.
        on_bad_record: "raise" or "skip".
        workers: threads that fill the cache; the number of cores if not given.
        progress: show a bar while the cache is filled.

    Raises:
        RecordError: a bad record, or no good one.
        ValueError: unknown `on_bad_record`, neither `prepare` nor `regions` or both.
    """

    def __init__(
        self,
        records: Any,
        prepare: Callable[[Any], torch.Tensor] | None = None,
        *,
        pictures: int = 1,
        seed: int = 0,
        cache: bool = False,
        regions: Any = None,
        on_bad_record: str = "raise",
        workers: int | None = None,
        progress: bool = True,
    ):
        if on_bad_record not in ("raise", "skip"):
            raise ValueError(f"on_bad_record={on_bad_record!r} is unknown. Choose 'raise' or 'skip'.")
        if (prepare is None) == (regions is None) or (cache and prepare is None):
            raise ValueError("give prepare=, for pictures, or regions=, a store that needs no cache; one of them.")
        self.prepare, self.seed, self.regions = prepare, seed, regions
        self.skips = on_bad_record == "skip"
        self.faults: list[RecordError] = []
        self._field, self._each = IMAGE_FIELDS[pictures > 1], pictures
        self._records = _undecoded(records, self._field) if regions is None else None
        self._total = len(records)
        self._texts = _without_pictures(records)
        # shared memory: persistent workers see a new epoch, and their bad rows are counted here
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._bad = torch.zeros(max(self._total, 1), dtype=torch.bool).share_memory_()
        self._pictures: Sequence[torch.Tensor] | None = None  # `pictures` for each item, one after another

        rows = [row for row in range(self._total) if self._is_good(row) and self.wanted(self._texts[row])]
        if cache:
            rows, self._pictures = self._prepare_all(rows, workers or os.cpu_count() or 1, progress)
        if not rows:
            raise self._nothing_left("records")
        self._rows = np.asarray(rows)
        self.image_ids = np.asarray([identity(self._texts[row]["image_id"]) for row in rows], dtype=np.int64)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """Raise a RecordError for what is bad about a record, its pictures left aside."""
        check_record(record, row, required=("image_id",))

    def wanted(self, record: Mapping[str, Any]) -> bool:
        """Whether a good record is an item."""
        return True

    def content(self, record: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """What an item holds besides picture, identity and draw."""
        return {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        here, image = self._standing_in(index)
        row = int(self._rows[here])
        generator = np.random.default_rng((self.seed, int(self._epoch), row))
        content = self.content(self._texts[row], generator)
        draw = int(generator.integers(1 << 63))
        kind = self._field if self.regions is None else "regions"
        return {kind: image, **content, "image_id": int(self.image_ids[here]), "draw": draw}

    def image(self, index: int, other_than: int | None = None) -> Any:
        """The image of item `index` alone, or where it is bad of the next good one; uint8 [3, h, w] or regions.

        Args:
            other_than: identity of an image to pass over.

        Raises:
            RecordError: no such image is good.
        """
        return self._standing_in(index, other_than)[1]

    def set_epoch(self, epoch: int) -> None:
        """Draw what this epoch shows from now on."""
        self._epoch.fill_(epoch)

    def report(self) -> dict[str, Any]:
        """What was skipped so far: `rows`, `skipped`, `fraction_kept`, and `first_faults` (at most ten texts)."""
        skipped = int(self._bad.sum())
        kept = (self._total - skipped) / self._total if self._total else 0.0
        faults = [str(fault) for fault in self.faults[:10]]
        return {"rows": self._total, "skipped": skipped, "fraction_kept": kept, "first_faults": faults}

    def _is_good(self, row: int) -> bool:
        try:
            self.check(self._texts[row], row)
            return True
        except RecordError as fault:
            self._count(fault)
            return False

    def _standing_in(self, index: int, other_than: int | None = None) -> tuple[int, Any]:
        """The index of the first good item from `index` on, not of that image, and its image."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a data set of {len(self)} items.")
        for offset in range(len(self)):
            here = (index + offset) % len(self)
            if self.image_ids[here] == other_than:
                continue
            image = self._image(here)
            if image is not None:
                return here, image
        raise self._nothing_left("pictures")

    def _nothing_left(self, of_what: str) -> RecordError:
        reason = f"none of {self._total} {of_what} is usable"
        return self.faults[0] if self.faults else RecordError(None, self._field, reason, "Give some good ones.")

    def _image(self, here: int) -> Any:
        """uint8 [3, h, w], a list of them, or regions; None where the row's image is bad and bad rows are skipped."""
        row = int(self._rows[here])
        if self._pictures is not None:
            pictures = [self._pictures[here * self._each + number] for number in range(self._each)]
        elif self._bad[row]:
            return None
        else:
            pictures = self._prepare_row(row) if self.regions is None else self._read_regions(row)
        if isinstance(pictures, RecordError):
            self._count(pictures)
            return None
        return pictures[0] if self._each == 1 else pictures

    def _read_regions(self, row: int) -> list[Any] | RecordError:
        record = self._texts[row]
        key = record["regions"] if "regions" in record else record["image_id"]
        try:
            return [self.regions.read(key)]
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = str(error.args[0] if error.args else error).rstrip(".")
            return RecordError(row, "regions", reason, BAD_ROW)

    def _prepare_row(self, row: int) -> list[torch.Tensor] | RecordError:
        record = self._records[row]
        try:
            if self._field not in record:
                check_record(record, row, (self._field,))
            stored = record[self._field] if self._each > 1 else [record[self._field]]
            if not isinstance(stored, list | tuple) or len(stored) != self._each:
                count = len(stored) if isinstance(stored, list | tuple) else 1
                reason = f"{self._each} pictures are needed, and there {'is' if count == 1 else 'are'} {count}"
                return RecordError(row, self._field, reason, BAD_ROW)
            return [self.prepare(decode_image(picture, row, self._field)) for picture in stored]
        except RecordError as fault:
            return fault
        except ValueError as error:  # of a picture that decodes and that the transform refuses, such as one too thin
            return RecordError(row, self._field, str(error).rstrip("."), BAD_ROW)

    def _prepare_all(self, rows: list[int], workers: int, progress: bool) -> tuple[list[int], Sequence[torch.Tensor]]:
        good, pictures = [], []
        with ThreadPoolExecutor(workers) as pool:  # Pillow lets go of the interpreter lock while it works
            for row, prepared in zip(
                rows, tqdm(pool.map(self._prepare_row, rows), "pictures", len(rows), disable=not progress)
            ):
                if isinstance(prepared, RecordError):
                    try:
                        self._count(prepared)
                    except RecordError:
                        pool.shutdown(cancel_futures=True)
                        raise
                else:
                    good.append(row)
                    pictures.extend(prepared)
        one_size = len({picture.shape for picture in pictures}) == 1
        return good, torch.stack(pictures).share_memory_() if one_size else pictures

    def _count(self, fault: RecordError) -> None:
        if not self.skips:
            raise fault
        self._bad[fault.position] = True
        self.faults.append(fault)


def _undecoded(records: Any, field: str) -> Any:
    """The records with pictures as stored: `datasets` decodes whole rows, whose errors name no position."""
    if not hasattr(records, "cast_column"):
        return records
    if field not in records.column_names:
        raise missing_column(field, records.column_names)
    from datasets import Image, List

    stored = Image(decode=False)
    return records.cast_column(field, stored if field == IMAGE_FIELDS[0] else List(stored))


def _without_pictures(records: Any) -> Sequence[Mapping[str, Any]]:
    """All columns but the pictures, as a list with an `image_id` in every row: the regions' key, else the row's position."""
    if hasattr(records, "remove_columns"):
        rows = records.remove_columns([name for name in records.column_names if name in IMAGE_FIELDS]).to_list()
    else:
        rows = [{key: value for key, value in row.items() if key not in IMAGE_FIELDS} for row in records]
    return [
        row if "image_id" in row else {**row, "image_id": row.get("regions", position)}
        for position, row in enumerate(rows)
    ]
