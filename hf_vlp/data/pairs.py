"""Image-text pairs drawn from records: which text of a record is shown in which epoch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_vlp.data.prepared import PreparedRecords
from hf_vlp.data.record import check_record, missing_column

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


class ImageTextPairs(PreparedRecords):
    """A map-style data set of pairs; item i is {"image": uint8 [3, h, w], "text": str, "image_id": int, "draw": int}.

    With `regions` it is {"regions": RegionFeatures, ...} instead. The text is drawn from the record's captions; all of them must be good.

    Args:
        records: as of `PreparedRecords`. One row a picture, with all its captions, is the cheapest layout: it is prepared once a row.
        prepare: PIL image -> uint8 [3, h, w], deterministic; not needed with `regions`.
        compose: (record without its picture, generator) -> text; draws one of the captions if not given.
        options: seed, cache, regions, on_bad_record, workers and progress of `PreparedRecords`, which says what they do; its errors.
    """

    def __init__(
        self,
        records: Any,
        prepare: Callable[[Any], Any] | None = None,
        *,
        compose: Compose | None = None,
        **options: Any,
    ):
        self.compose = compose or draw_caption
        super().__init__(records, prepare, **options)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """Captions and an identity."""
        check_record(record, row, required=("captions", "image_id"))

    def content(self, record: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The text."""
        return {"text": self.compose(record, generator)}

    def text(self, index: int, generator: np.random.Generator) -> str:
        """A text of item `index` drawn anew; its image is not looked at."""
        return self.compose(self._texts[self._rows[index]], generator)

    def caption_counts(self) -> np.ndarray:
        """[N] how many captions each item has."""
        return np.asarray([len(self._texts[row]["captions"]) for row in self._rows], dtype=np.int64)
