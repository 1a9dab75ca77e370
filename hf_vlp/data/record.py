"""One example of any task, what makes it bad, and the error that says so.

A record is a mapping with an image (or two, or the key of stored regions), `captions: list[str]`, `image_id`, and per
task `question`, `answers`, `label`, `statement`, `hypothesis`, `choices`, `phrase`, `boxes`.
"""

import difflib
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

TEXT_FIELDS = ("question", "statement", "hypothesis", "phrase")
TEXT_LIST_FIELDS = ("captions", "choices")
IMAGE_FIELDS = ("image", "images")

# Pillow's own bound (a quarter of a GiB of RGB); beyond it Pillow warns of a decompression bomb, we refuse.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# Resizing the shorter side to 224 makes a picture of 1 x 10,000 pixels one of 224 x 2,240,000: 1.5 GB.
MAX_ASPECT_RATIO = 200

BAD_ROW = "Repair or remove the row, or skip such rows with on_bad_record='skip'."


class RecordError(ValueError):
    """A record, or a whole file of them, that cannot be used.

    Attributes:
        position: row, from 0, in the order of the file; None where the fault is the file's, not one row's.
        field: the column at fault.
        reason: what is wrong, with the value at fault.
        remedy: what to do about it.
    """

    def __init__(self, position: int | None, field: str, reason: str, remedy: str):
        self.position, self.field, self.reason, self.remedy = position, field, reason, remedy
        where = "records" if position is None else f"record {position}"
        super().__init__(f"{where}, field '{field}': {reason}. {remedy}")

    def __reduce__(self):  # the error crosses from a loader's worker to the main process
        return type(self), (self.position, self.field, self.reason, self.remedy)


def missing_column(name: str, available: Sequence[str], hint: str = "") -> RecordError:
    """The error for a column that is not there: names the nearest and all available ones."""
    near = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    remedy = f"Did you mean '{near[0]}'? " if near else ""
    return RecordError(
        None,
        name,
        f"there is no column '{name}'",
        f"{remedy}Available columns: {', '.join(available)}. {hint}".rstrip(),
    )


def identity(image_id: Any) -> int:
    """A non-negative 63-bit number for an image id, the same in every process and run.

    A number and its decimal text give the same identity, because CSV reads `7` where JSON lines hold `"7"`.

    Raises:
        ValueError: the id is missing (None, NaN or an empty text).
    """
    if isinstance(image_id, float | np.floating) and float(image_id).is_integer():
        image_id = int(image_id)
    text = "" if image_id is None else str(image_id)
    if text in ("", "nan"):
        raise ValueError(f"an image id is missing (it is {image_id!r}). Give every row one, or none at all.")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def decode_image(value: Any, position: int | None = None, field: str = "image") -> Image.Image:
    """The decoded picture of a record.

    Args:
        value: a PIL image, a file path, encoded bytes, or the `{"bytes", "path"}` that `datasets` stores.
        position: row of the record, for the error.
        field: column of the picture, for the error.

    Returns:
        The picture, its pixels loaded, turned as its EXIF entry says.

    Raises:
        RecordError: no picture, no such file, not decodable, of zero or absurd size.
    """

    def bad(reason: str) -> RecordError:
        return RecordError(position, field, reason, BAD_ROW)

    name, image = "the stored picture", None
    if isinstance(value, Mapping):
        value, name = value.get("bytes") or value.get("path"), value.get("path") or name
    if isinstance(value, Image.Image):
        image = value
    elif isinstance(value, bytes | bytearray):
        source = io.BytesIO(value)
    elif isinstance(value, str | os.PathLike) and str(value):
        source, name = value, str(value)
        if "://" in name:
            raise bad(f"{name} is a URL, which is not fetched; download the pictures first")
    elif value is None or isinstance(value, str):
        raise bad("there is no picture")
    else:
        raise bad(f"a {type(value).__name__} is not a picture")
    try:
        # Image.open reads the header alone: the size is judged before any pixel is decoded
        image = Image.open(source) if image is None else image
        _check_size(image.size, bad)
        image.load()
        return ImageOps.exif_transpose(image)
    except RecordError:
        raise
    except FileNotFoundError:
        raise bad(f"no file {name}") from None
    except UnidentifiedImageError:
        raise bad(f"{name} is not in a picture format that Pillow reads") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise bad(f"{name} holds more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise bad(f"{name} does not decode ({type(error).__name__}: {error})") from None


def _check_size(size: tuple[int, int], bad) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise bad(f"the picture is {width} x {height} pixels: nothing to see")
    if width * height > MAX_PIXELS:
        raise bad(f"the picture is {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise bad(f"the picture is {width} x {height} pixels, a side more than {MAX_ASPECT_RATIO} times the other")


def check_record(
    record: Mapping[str, Any], position: int, required: Sequence[str] = ("image", "captions"), decode: bool = True
) -> None:
    """Raise for the first field of `required` that is missing, empty or, for a picture, not decodable.

    Args:
        record: the row.
        position: its place in the file, from 0, for the error.
        required: fields that the task needs.
        decode: also decode the pictures (the slow part).

    Raises:
        RecordError: naming the row, the field and the fault.
    """
    for field in required:
        if field not in record:
            raise RecordError(
                position, field, "the record has no such field", f"Its fields are: {', '.join(map(str, record))}."
            )
        value = record[field]
        if field in IMAGE_FIELDS:
            pictures = value if field == "images" and isinstance(value, list | tuple) else [value]
            if not pictures:
                raise RecordError(position, field, "there is no picture", "Give at least one.")
            for picture in pictures if decode else ():
                decode_image(picture, position, field)
        elif field in TEXT_LIST_FIELDS:
            if not isinstance(value, list | tuple) or not value:
                raise RecordError(position, field, f"expected a list of texts, found {value!r}", "Give at least one.")
            for index, text in enumerate(value):
                _check_text(text, position, field, f"text {index} ")
        elif field in TEXT_FIELDS:
            _check_text(value, position, field, "the text ")
        elif field == "image_id":
            try:
                identity(value)
            except ValueError as error:
                raise RecordError(position, field, str(error), "Leave the column out to number the rows.") from None
        elif value is None:
            raise RecordError(position, field, "the value is missing", "Fill it in or remove the row.")


def _check_text(text: Any, position: int, field: str, which: str) -> None:
    if not isinstance(text, str):
        raise RecordError(position, field, f"{which}is {text!r}, not a text", "Fill it in or remove the row.")
    if not text.strip():
        raise RecordError(position, field, f"{which}is empty", "Fill it in or remove the row.")
