"""Region features in the LMDBs of ViLBERT (https://arxiv.org/abs/1908.02265), opened read-only and unlocked.

Two kinds: those of its tasks, written by both of its code bases (pickled items, ids under the key `keys`), and the one of Conceptual
Captions, written by tensorpack (msgpack, ids under `__keys__`). Nothing of them is executed.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hf_vlp.data.pickles import NUMBERS_AND_TEXTS
from hf_vlp.data.region_files import Faults, Records, pickled_regions, read_each, regions_of
from hf_vlp.inputs.regions import RegionFeatures

TASK_KEYS, CAPTIONS_KEYS = b"keys", b"__keys__"
CAPTIONS_FIELDS = ("features", "cls_prob", "boxes", "num_boxes", "image_h", "image_w", "image_id")  # a caption follows


@contextmanager
def open_lmdb(path: str | os.PathLike) -> Iterator[Any]:
    """A reading transaction on an LMDB, a folder or a single file, that neither writes nor locks.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read as one.
        ImportError: lmdb is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ImportError('LMDBs are read with lmdb: pip install "hf_vlp[regions]"') from error
    path = Path(path)
    if not (path.is_file() or (path / "data.mdb").is_file()):
        raise FileNotFoundError(f"there is no LMDB at {path}: give its folder with data.mdb, or its file")
    try:
        environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be read as an LMDB ({error})") from None
    try:
        with environment.begin(buffers=False) as transaction:
            yield transaction
    except lmdb.Error as error:
        raise ValueError(f"{path} is damaged or truncated ({error})") from None
    finally:
        environment.close()


def is_captions_lmdb(path: str | os.PathLike) -> bool:
    """Whether an LMDB is one of tensorpack's, with its ids under `__keys__`."""
    with open_lmdb(path) as transaction:
        return transaction.get(CAPTIONS_KEYS) is not None


def count_lmdb(path: str | os.PathLike) -> int:
    """How many images an LMDB holds."""
    with open_lmdb(path) as transaction:
        marks = sum(transaction.get(key) is not None for key in (TASK_KEYS, CAPTIONS_KEYS))
        return transaction.stat()["entries"] - marks


def read_vilbert_lmdb(path: str | os.PathLike, faults: Faults | None = None) -> Iterator[RegionFeatures]:
    """Regions of the LMDB of a ViLBERT task, of either code base; the key of an item is its id.

    Args:
        path: of the LMDB.
        faults: takes the errors of bad records; None: the first is raised.

    Raises:
        RecordError: a bad record, by its place in the order of keys.
        FileNotFoundError, ValueError, ImportError: as `open_lmdb`.
    """
    yield from _read(path, lambda key, value: pickled_regions(value, key), faults)


def read_captions_lmdb(path: str | os.PathLike, faults: Faults | None = None) -> Iterator[RegionFeatures]:
    """Regions of ViLBERT's LMDB of Conceptual Captions; an item names its image itself. Its captions are not read.

    Args, Raises: as `read_vilbert_lmdb`; ImportError also where msgpack is not installed.
    """
    try:
        import msgpack  # noqa: F401 - said before the first record, not of each
    except ImportError as error:
        raise ImportError('this LMDB is read with msgpack: pip install "hf_vlp[regions]"') from error
    yield from _read(path, lambda key, value: _captions_record(value), faults)


def _read(path, read, faults: Faults | None) -> Iterator[RegionFeatures]:
    with open_lmdb(path) as transaction:

        def items() -> Records:
            position = 0
            for key, value in transaction.cursor():
                if key not in (TASK_KEYS, CAPTIONS_KEYS):
                    name = key.decode("utf-8", "replace")
                    yield position, name, lambda name=name, value=value: read(name, value)
                    position += 1

        yield from read_each(items(), faults)


def _captions_record(value: bytes) -> RegionFeatures:
    fields = read_msgpack(value)
    if not isinstance(fields, list) or len(fields) < len(CAPTIONS_FIELDS):
        raise ValueError(f"expected a list of {', '.join(CAPTIONS_FIELDS)} and the caption")
    return regions_of(dict(zip(CAPTIONS_FIELDS, fields)), None)


def read_msgpack(data: bytes) -> Any:
    """What a msgpack with numpy arrays in the layout of msgpack_numpy describes: containers, numbers, texts, arrays of numbers.

    Raises:
        ValueError: it is damaged, or holds arrays of objects (which would be pickles), records, or extension types.
    """
    import msgpack

    try:
        # bounds: nothing in an item is longer than the item
        return msgpack.unpackb(data, raw=False, strict_map_key=False, object_hook=_array, ext_hook=_refused)
    except ValueError:
        raise
    except Exception as error:  # msgpack's errors have no common base but Exception
        raise ValueError(f"damaged msgpack ({type(error).__name__}: {error})") from None


def _array(mapping: dict) -> Any:
    """The array or number that a mapping stands for; a mapping that stands for none as it is."""
    item = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in mapping.items()}
    if "complex" in item:
        raise ValueError("a complex number is no number of regions")
    if "nd" not in item:
        return mapping
    code, kind = item.get("type"), item.get("kind", b"")
    code = code.decode("latin1") if isinstance(code, bytes) else code
    dtype = np.dtype(code) if isinstance(code, str) and len(code) < 16 and kind in (b"", "", None) else np.dtype("V")
    if dtype.kind not in NUMBERS_AND_TEXTS or not dtype.itemsize:
        raise ValueError(f"an array of {code!r:.40} (kind {kind!r:.8}) is no array of numbers")
    shape = tuple(item.get("shape", ())) if item["nd"] else ()
    raw = item.get("data")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes) or len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {shape} {dtype} without its bytes")
    array = np.frombuffer(raw, dtype).reshape(shape) if raw else np.zeros(shape, dtype)
    return array if shape else array.item()


def _refused(code: int, _: bytes) -> Any:
    raise ValueError(f"extension type {code} of msgpack")
