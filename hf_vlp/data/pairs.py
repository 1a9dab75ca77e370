"""Image-text pairs drawn from records: which text of a record is shown in which epoch, and what a bad record does.

`prepare` is the deterministic part of a picture's transform, so that its result can be kept; what is random follows
in the collator, on the whole batch. Images may also be regions, read from a store by the records' keys.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_vlp.data.readers import missing_column
from hf_vlp.data.record import RecordError, check_record, decode_image, identity

Compose = Callable[[Mapping[str, Any], np.random.Generator], str]


def draw_caption(record: Mapping[str, Any], generator: np.random.Generator) -> str:
    """One of the record's captions, each with the same chance."""
    captions = record["captions"]
    return captions[int(generator.integers(len(captions)))] if len(captions) > 1 else captions[0]


def first_caption(record: Mapping[str, Any], generator: np.random.Generator) -> str:
    """The record's first caption, always."""
    return record["captions"][0]


def caption_with_keywords(
    *columns: str,
    separator: str = ", ",
    shuffle: bool = False,
    keep: float = 1.0,
    chance: float = 1.0,
    caption: Compose = draw_caption,
) -> Compose:
    """A function that appends a record's keywords to its caption, for training texts.

    Args:
        columns: columns that hold keywords, as one comma-separated text or a list of texts; may be empty in a row.
        separator: written before each keyword.
        shuffle: put the keywords in a random order.
        keep: chance of each keyword to be kept.
        chance: of a text to be given keywords at all; otherwise it is the caption alone.
        caption: draws the caption.

    Returns:
        A function for `ImageTextPairs(compose=...)`; it can be pickled.

    Raises:
        ValueError: no column, or `keep` or `chance` outside 0..1.
    """
    if not columns:
        raise ValueError("caption_with_keywords needs the name of at least one column.")
    for name, value in (("keep", keep), ("chance", chance)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value} is no probability. Give a number from 0 to 1.")
    return functools.partial(
        _with_keywords,
        columns=columns,
        separator=separator,
        shuffle=shuffle,
        keep=keep,
        chance=chance,
        caption=caption,
    )


def _with_keywords(record, generator, *, columns, separator, shuffle, keep, chance, caption) -> str:
    text = caption(record, generator)
    if chance < 1.0 and generator.random() >= chance:
        return text
    words = []
    for column in columns:
        if column not in record:
            raise missing_column(column, list(record))
        value = record[column] or ()
        words.extend(value.split(",") if isinstance(value, str) else value)
    words = [word.strip() for word in words if word and word.strip()]
    if keep < 1.0:
        words = [word for word in words if generator.random() < keep]
    if shuffle and len(words) > 1:
        words = [words[i] for i in generator.permutation(len(words))]
    return separator.join([text, *words])


class ImageTextPairs(torch.utils.data.Dataset):
    """A map-style data set of pairs; item i is {"image": uint8 [3, h, w], "text": str, "image_id": int, "draw": int}.

    With `regions` it is {"regions": RegionFeatures, ...} instead.

    Text and `draw` are a pure function of (seed, epoch, row): resumed, on any number of workers or processes, the same
    epoch shows the same texts. `draw` is a random 63-bit number that seeds what is random further on.

    `on_bad_record="raise"` stops at the first record with a picture that does not decode or a caption that is empty
    (a RecordError with the row's position). `"skip"` leaves such rows out and counts them:

    - bad texts are found at once, whatever `cache` is, and the rows left out;
    - with `cache`, so are bad pictures;
    - without, a bad picture is found when it is asked for. The next good row stands in for it, with its own text and
      identity, so that batches keep their size on every process. Its picture may then be in the batch already, on whichever
      process: the two carry the same `image_id`, so a loss with targets by identity takes the captions of both as
      positives, one with plain targets as negatives. `python -m hf_vlp.data.validate` finds such rows before.

    `report()` counts each bad row once, workers' included.

    Args:
        records: a `datasets.Dataset` as `read_records` gives, or a sequence of such rows. One row a picture, with all
            its captions, is the cheapest layout: pictures are prepared once a row.
        prepare: PIL image -> uint8 [3, h, w], deterministic; not needed with `regions`.
        seed: of the texts drawn.
        compose: (record without its picture, generator) -> text; draws one of the captions if not given.
        cache: decode and prepare all pictures now and keep them (N * 3 * h * w bytes).
        regions: a `RegionStore`, or another object with `read(key)`; a record's `regions`, else its `image_id`, is the key.
        on_bad_record: "raise" or "skip".
        workers: threads that fill the cache; the number of cores if not given.
        progress: show a bar while the cache is filled.

    Raises:
        RecordError: a bad record, or no good one.
        ValueError: unknown `on_bad_record`.
    """

    def __init__(
        self,
        records: Any,
        prepare: Callable[[Any], torch.Tensor] | None = None,
        *,
        seed: int = 0,
        compose: Compose | None = None,
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
        self.prepare, self.seed, self.compose = prepare, seed, compose or draw_caption
        self.regions = regions
        self.skips = on_bad_record == "skip"
        self.faults: list[RecordError] = []
        self._records = _undecoded(records) if regions is None else None
        self._total = len(records)
        self._texts = _without_pictures(records)
        # shared memory: persistent workers see a new epoch, and their bad rows are counted here
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._bad = torch.zeros(max(self._total, 1), dtype=torch.bool).share_memory_()
        self._pictures: list[torch.Tensor] | torch.Tensor | None = None

        rows = [row for row in range(self._total) if self._text_is_good(row)]
        if cache:
            rows, self._pictures = self._prepare_all(rows, workers or os.cpu_count() or 1, progress)
        if not rows:
            reason = f"none of {self._total} records is usable"
            raise self.faults[0] if self.faults else RecordError(None, "image", reason, "Give some records.")
        self._rows = np.asarray(rows)
        self.image_ids = np.asarray([identity(self._texts[row]["image_id"]) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a data set of {len(self)} pairs.")
        index %= len(self)
        for offset in range(len(self)):
            here = (index + offset) % len(self)
            row = int(self._rows[here])
            image = self._image(here, row)
            if image is not None:
                break
        else:
            reason = f"none of {self._total} pictures is usable"
            raise self.faults[0] if self.faults else RecordError(None, "image", reason, "Give some good ones.")
        record = self._texts[row]
        generator = np.random.default_rng((self.seed, int(self._epoch), row))
        text = self.compose(record, generator)
        draw = int(generator.integers(1 << 63))
        kind = "image" if self.regions is None else "regions"
        return {kind: image, "text": text, "image_id": int(self.image_ids[here]), "draw": draw}

    def set_epoch(self, epoch: int) -> None:
        """Draw the texts of this epoch from now on."""
        self._epoch.fill_(epoch)

    def report(self) -> dict[str, Any]:
        """What was skipped so far: `rows`, `skipped`, `fraction_kept`, and `first_faults` (at most ten texts)."""
        skipped = int(self._bad.sum())
        kept = (self._total - skipped) / self._total if self._total else 0.0
        faults = [str(fault) for fault in self.faults[:10]]
        return {"rows": self._total, "skipped": skipped, "fraction_kept": kept, "first_faults": faults}

    def _text_is_good(self, row: int) -> bool:
        try:
            check_record(self._texts[row], row, required=("captions", "image_id"))
            return True
        except RecordError as fault:
            self._count(fault)
            return False

    def _image(self, here: int, row: int) -> Any:
        """uint8 [3, h, w] or regions, or None where the row's image is bad and bad rows are skipped."""
        if self._pictures is not None:
            return self._pictures[here]
        if self._bad[row]:
            return None
        prepared = self._prepare_row(row) if self.regions is None else self._read_regions(row)
        if isinstance(prepared, RecordError):
            self._count(prepared)
            return None
        return prepared

    def _read_regions(self, row: int) -> Any:
        record = self._texts[row]
        key = record["regions"] if "regions" in record else record["image_id"]
        try:
            return self.regions.read(key)
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = str(error.args[0] if error.args else error).rstrip(".")
            return RecordError(
                row, "regions", reason, "Repair or remove the row, or skip such rows with on_bad_record='skip'."
            )

    def _prepare_row(self, row: int) -> torch.Tensor | RecordError:
        try:
            return self.prepare(decode_image(self._records[row]["image"], row))
        except RecordError as fault:
            return fault

    def _prepare_all(self, rows: list[int], workers: int, progress: bool):
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
                    pictures.append(prepared)
        one_size = len({picture.shape for picture in pictures}) == 1
        return good, torch.stack(pictures).share_memory_() if one_size else pictures

    def _count(self, fault: RecordError) -> None:
        if not self.skips:
            raise fault
        self._bad[fault.position] = True
        self.faults.append(fault)


def _undecoded(records: Any) -> Any:
    """The records with pictures as stored: `datasets` decodes whole rows, whose errors name no position."""
    if not hasattr(records, "cast_column"):
        return records
    if "image" not in records.column_names:
        raise missing_column("image", records.column_names)
    from datasets import Image

    return records.cast_column("image", Image(decode=False))


def _without_pictures(records: Any) -> Sequence[Mapping[str, Any]]:
    """All columns but the pictures, as a list with an `image_id` in every row: the regions' key, else the row's position."""
    if hasattr(records, "remove_columns"):
        rows = records.remove_columns([name for name in records.column_names if name == "image"]).to_list()
    else:
        rows = [{key: value for key, value in row.items() if key != "image"} for row in records]
    return [
        row if "image_id" in row else {**row, "image_id": row.get("regions", position)}
        for position, row in enumerate(rows)
    ]
