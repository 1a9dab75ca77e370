"""Region features of many images in one memory-mapped file, read by the image's id.

The file: a header of 4,096 bytes (one line of JSON), one record an image, an index. A record is features [R, F] float16, then what
the store has of boxes [R, 4] float32, class probabilities [R, C] float16 and objectness [R] float32, each from a multiple of 64
bytes on. The index is what `INDEX` lists, each for N images, and the keys as UTF-8; all is little-endian. Nothing in it is executed.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf_vlp.files import whole_file
from hf_vlp.inputs.regions import SHAPES, RegionError, RegionFeatures

FORMAT, VERSION = "hf_vlp region store", 1
HEADER_BYTES, ALIGNMENT = 4096, 64
LARGEST_HALF = 65504.0  # of float16
INDEX = {"start": "<i8", "count": "<i4", "width": "<i4", "height": "<i4", "crc32": "<u4", "key_end": "<i8"}
HEADER = {
    "images": int,
    "regions": int,
    "fewest": int,
    "most": int,
    "feature_size": int,
    "class_size": int,
    "boxes": bool,
    "objectness": bool,
    "index_start": int,
    "file_bytes": int,
}
WRITE_AGAIN = "Copy it again, or write it again with write_region_store."


def store_key(image_id: Any) -> str:
    """The text by which a store knows an image; a number and its decimal text are the same.

    Raises:
        TypeError: neither text nor a whole number.
        ValueError: empty text.
    """
    if isinstance(image_id, str):
        if not image_id:
            raise ValueError("an image id is empty text: give every image one")
        return image_id
    whole = isinstance(image_id, int | np.integer) and not isinstance(image_id, bool)
    if whole or (isinstance(image_id, float | np.floating) and float(image_id).is_integer()):
        return str(int(image_id))
    raise TypeError(f"{image_id!r:.80} is no image id: give text or a whole number")


class _Layout:
    """Where the parts of a record of `count` regions begin, and its length in bytes."""

    def __init__(self, header: dict, count: int):
        parts = [("features", (count, header["feature_size"]), "<f2")]
        parts += [("boxes", (count, 4), "<f4")] if header["boxes"] else []
        parts += [("class_probs", (count, header["class_size"]), "<f2")] if header["class_size"] else []
        parts += [("objectness", (count,), "<f4")] if header["objectness"] else []
        self.parts, self.bytes = [], 0
        for name, shape, dtype in parts:
            dtype = np.dtype(dtype)
            self.parts.append((name, shape, dtype, self.bytes))
            self.bytes += -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Any, start: int) -> dict[str, np.ndarray | None]:
        """The parts of the record at `start` of a buffer; None for those that the store does not have."""
        views = dict.fromkeys(SHAPES)
        for name, shape, dtype, offset in self.parts:
            views[name] = np.ndarray(shape, dtype, buffer, start + offset)
        return views


class RegionStore:
    """Reads regions from a file of `write_region_store`. Safe in forked and spawned workers, which share the system's page cache.

    Opening reads the header and the index, never the features. The arrays that come back are read-only views of the file.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no region store, it is truncated, or its index is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"there is no region store at {self.path}: make one with write_region_store, "
                f"or with python -m hf_vlp.data.regions import SOURCE --output {self.path}"
            )
        with open(self.path, "rb") as file:
            self.header = _read_header(file, self.path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = self.header["index_start"]
        index = self._map[start:]
        if self.header["checksum"] != _checksum(self.header, index):
            raise ValueError(f"{self.path} is damaged: its header or index does not have its checksum. {WRITE_AGAIN}")
        self._index, place = {}, 0
        for name, dtype in INDEX.items():
            self._index[name] = np.frombuffer(index, dtype, self.header["images"], place)
            place += self._index[name].nbytes
        self._key_bytes = index[place:]
        self._check_index()
        self._row_of_key: dict[str, int] | None = None
        self._layouts: dict[int, _Layout] = {}

    def __reduce__(self):
        return type(self), (self.path,)

    def __len__(self) -> int:
        return self.header["images"]

    def __contains__(self, image_id: Any) -> bool:
        return store_key(image_id) in self._rows

    def keys(self) -> list[str]:
        """The ids of all images, in the order in which they were written."""
        return list(self._rows)

    def read(self, image_id: str | int) -> RegionFeatures:
        """The regions of one image.

        Args:
            image_id: text, or a number for its decimal text.

        Returns:
            Features float16 [R, F], boxes float32 [R, 4], class_probs float16 [R, C], objectness float32 [R]; views of the file.

        Raises:
            RegionError: the store has no such image.
        """
        return self._read(self._row(image_id))

    def read_batch(self, image_ids: Sequence[str | int]) -> list[RegionFeatures]:
        """The regions of several images; the system is told of all of them first, and fetches what is not in memory meanwhile.

        Raises:
            RegionError: the store has no such image.
        """
        rows = [self._row(image_id) for image_id in image_ids]
        if hasattr(mmap, "MADV_WILLNEED"):
            for row in sorted(rows):
                start = self._index["start"].item(row)
                first = start - start % mmap.PAGESIZE
                length = start + self._layout(self._index["count"].item(row)).bytes - first
                self._map.madvise(mmap.MADV_WILLNEED, first, length)
        return [self._read(row) for row in rows]

    def describe(self) -> str:
        """What the store holds: keys, count, shapes, units of the boxes, sizes, checksum."""
        header = self.header
        keys = [repr(key) for _, key in zip(range(3), self._rows)]
        sizes = int((self._index["width"] > 0).sum())
        regions = (
            f"{header['fewest']}" if header["fewest"] == header["most"] else f"{header['fewest']} to {header['most']}"
        )
        none = "none"
        lines = {
            "file": f"{self.path} ({header['file_bytes']:,} bytes)",
            "images": f"{len(self):,}",
            "keys": ", ".join(keys) + (", ..." if len(self) > len(keys) else ""),
            "regions": f"R is {regions} an image, {header['regions']:,} in all",
            "features": f"[R, {header['feature_size']}] float16",
            "boxes": "[R, 4] float32, x1 y1 x2 y2 as fractions of width and height" if header["boxes"] else none,
            "image size": f"width and height in pixels of {sizes:,} images" if sizes else none,
            "class_probs": f"[R, {header['class_size']}] float16, probabilities" if header["class_size"] else none,
            "objectness": "[R] float32" if header["objectness"] else none,
            "checksum": header["checksum"],
        }
        return "\n".join(f"{name:<12} {value}" for name, value in lines.items())

    def verify(self, progress: bool = False) -> None:
        """Compare every record with its checksum; reads the whole file.

        Args:
            progress: show a bar.

        Raises:
            RegionError: a record is damaged; names its image.
        """
        from tqdm.auto import tqdm

        for key, row in tqdm(self._rows.items(), "verify", unit="image", disable=not progress):
            start = self._index["start"].item(row)
            end = start + self._layout(self._index["count"].item(row)).bytes
            with memoryview(self._map) as whole, whole[start:end] as record:
                found = zlib.crc32(record)
            if found != self._index["crc32"].item(row):
                reason = f"its bytes {start:,} to {end:,} in {self.path} do not have their checksum"
                raise RegionError(key, "features", reason, WRITE_AGAIN)

    def _check_index(self) -> None:
        """A file that was made to have its checksum may still send a view outside itself, which would crash the process.

        Raises:
            ValueError: widths, places, counts or keys that no file of `write_region_store` has.
        """
        header, index = self.header, self._index
        end, starts, counts, key_ends = header["index_start"], index["start"], index["count"], index["key_end"]
        # numbers within the file first, so that no product of two of them is beyond 64 bits in what follows
        widths = 1 <= header["feature_size"] <= end and 0 <= header["class_size"] <= end
        sane = widths and ((counts >= 1) & (counts <= end) & (starts >= HEADER_BYTES) & (starts <= end)).all()
        sane = sane and int(counts.max()) * max(header["feature_size"], header["class_size"]) <= end
        if sane:
            different, which = np.unique(counts, return_inverse=True)
            sizes = np.array([_Layout(header, count).bytes for count in different.tolist()], np.int64)
            sane = (starts % ALIGNMENT == 0).all() and (starts + sizes[which] <= end).all()
        if not sane:
            raise ValueError(f"{self.path} is damaged: its index sends to records that are not there. {WRITE_AGAIN}")
        if key_ends[0] < 1 or (key_ends[1:] <= key_ends[:-1]).any() or key_ends[-1] != len(self._key_bytes):
            raise ValueError(f"{self.path} is damaged: its index does not divide its keys. {WRITE_AGAIN}")

    @property
    def _rows(self) -> dict[str, int]:
        """Key -> row. Built at the first question: with many images it is most of the work of opening."""
        if self._row_of_key is None:
            ends = self._index["key_end"].tolist()
            text, begin, rows = self._key_bytes, 0, {}
            for row, end in enumerate(ends):
                rows[text[begin:end].decode("utf-8")] = row
                begin = end
            self._row_of_key = rows
        return self._row_of_key

    def _row(self, image_id: Any) -> int:
        try:
            return self._rows[image_id if type(image_id) is str else store_key(image_id)]
        except KeyError:
            some = ", ".join(repr(key) for _, key in zip(range(3), self._rows))
            raise RegionError(
                image_id,
                "image_id",
                f"{self.path} has no such key among its {len(self):,} (it has {some}, ...)",
                "Ask for one that it has, or import the file that holds this image.",
            ) from None

    def _layout(self, count: int) -> _Layout:
        layout = self._layouts.get(count)
        if layout is None:
            layout = self._layouts[count] = _Layout(self.header, count)
        return layout

    def _read(self, row: int) -> RegionFeatures:
        index = self._index
        fields = self._layout(index["count"].item(row)).views(self._map, index["start"].item(row))
        fields["width"] = index["width"].item(row) or None
        fields["height"] = index["height"].item(row) or None
        begin = index["key_end"].item(row - 1) if row else 0
        fields["image_id"] = self._key_bytes[begin : index["key_end"].item(row)].decode("utf-8")
        return RegionFeatures.checked_before(fields)


def write_region_store(
    path: str | os.PathLike,
    regions: Iterable[RegionFeatures],
    overwrite: bool = False,
    faults: list | None = None,
) -> RegionStore:
    """Write the regions of many images to one file, which is whole or absent, and open it.

    Args:
        path: of the file to write.
        regions: one an image, each with an `image_id`; kept in memory one at a time.
        overwrite: replace a file that exists.
        faults: takes the errors of images that cannot be written, which are then left out; None: the first is raised.

    Raises:
        FileExistsError: the file exists and `overwrite` is false.
        ValueError: no regions at all.
        RegionError: an image with bad values, without id, with the id of another, with other fields or widths than the first, or with
            numbers too large for float16.
    """
    path = Path(path)
    if path.exists() and (not overwrite or path.is_dir()):
        raise FileExistsError(f"{path} exists: give another path, or overwrite a file")
    with whole_file(path) as partial, open(partial, "w+b") as file:
        file.write(bytes(HEADER_BYTES))
        header, index = _write_records(file, regions, faults)
        header["checksum"] = _checksum(header, index)
        file.write(index)
        file.seek(0)
        line = json.dumps({"format": FORMAT, "version": VERSION, **header}).encode("ascii")
        file.write(line.ljust(HEADER_BYTES - 1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return RegionStore(path)


def _write_records(file: BinaryIO, regions: Iterable[RegionFeatures], faults: list | None = None) -> tuple[dict, bytes]:
    """The records; returns the header and the index that tell of them."""
    columns: dict[str, list] = {name: [] for name in INDEX}
    keys: dict[str, None] = {}
    key_bytes, start, header, layouts = bytearray(), HEADER_BYTES, None, {}
    for one in regions:
        try:
            one.check()
            key = _new_key(one, keys)
            if header is not None and header != _fields_of(one):
                raise _other_fields(one, header, next(iter(keys)))
            _check_half(one)
        except RegionError as error:
            if faults is None:
                raise
            faults.append(error)
            continue
        keys[key] = None
        if header is None:
            header = _fields_of(one)
        count = len(one)
        layout = layouts.get(count)
        if layout is None:
            layout = layouts[count] = _Layout(header, count)
        record = bytearray(layout.bytes)
        for name, view in layout.views(record, 0).items():
            if view is not None:
                np.copyto(view, getattr(one, name), casting="same_kind")
        file.write(record)
        key_bytes += key.encode("utf-8")
        values = (start, count, one.width or 0, one.height or 0, zlib.crc32(record), len(key_bytes))
        for name, value in zip(INDEX, values):
            columns[name].append(value)
        start += layout.bytes
    if header is None:
        raise ValueError("there are no regions to write: give those of one image or more")
    index = b"".join(np.array(columns[name], dtype).tobytes() for name, dtype in INDEX.items()) + key_bytes
    counts = columns["count"]
    header |= {"images": len(keys), "regions": sum(counts), "fewest": min(counts), "most": max(counts)}
    header |= {"index_start": start, "file_bytes": start + len(index)}
    return header, index


def _new_key(regions: RegionFeatures, keys: dict[str, None]) -> str:
    try:
        key = store_key(regions.image_id)
        key.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise RegionError(regions.image_id, "image_id", str(error), "Every image of a store needs one.") from None
    if key in keys:
        remedy = "Write each image once."
        if key.isdecimal():
            remedy += " Rows of a matrix are numbered where neither an _ids.txt beside it nor --ids names their images."
        raise RegionError(key, "image_id", "another image has this id already", remedy)
    return key


def _fields_of(regions: RegionFeatures) -> dict:
    """What must be the same of all images of a store."""
    return {
        "feature_size": regions.features.shape[1],
        "class_size": 0 if regions.class_probs is None else regions.class_probs.shape[1],
        "boxes": regions.boxes is not None,
        "objectness": regions.objectness is not None,
    }


def _other_fields(regions: RegionFeatures, header: dict, first: str) -> RegionError:
    mine = _fields_of(regions)
    name = next(name for name in mine if mine[name] != header[name])
    field = {"feature_size": "features", "class_size": "class_probs"}.get(name, name)
    if name.endswith("size") and mine[name] and header[name]:
        reason = f"it is {mine[name]} wide, and {header[name]} wide for image {first!r}"
    else:
        there, other = ("has it", "has none") if mine[name] else ("has none", "has it")
        reason = f"this image {there} and image {first!r} {other}"
    return RegionError(regions.image_id, field, reason, "All images of a store have the same fields and widths.")


def _check_half(regions: RegionFeatures) -> None:
    if regions.features.dtype.itemsize > 2:
        largest = float(np.abs(regions.features).max())
        if largest > LARGEST_HALF:
            reason = f"{largest:.6g} is beyond {LARGEST_HALF:.0f}, the largest number of float16"
            raise RegionError(regions.image_id, "features", reason, "Scale the features down, all by the same number.")


def _read_header(file: BinaryIO, path: Path) -> dict:
    size = os.fstat(file.fileno()).st_size
    line = file.read(HEADER_BYTES)
    try:
        header = json.loads(line)
        known = header.pop("format") == FORMAT
        version = header.pop("version")
    except (ValueError, AttributeError, KeyError, TypeError):
        known = False
    if not known:
        short = f"it has {size:,} bytes, less than a header" if size < HEADER_BYTES else "it does not begin like one"
        raise ValueError(
            f"{path} is no region store ({short}): import other files with python -m hf_vlp.data.regions import {path}"
        )
    if version != VERSION:
        raise ValueError(f"{path} is a region store of version {version!r}, this is for {VERSION}: update hf_vlp")
    if {name: type(value) for name, value in header.items()} != {**HEADER, "checksum": str}:
        raise ValueError(f"{path} is damaged: its header has the entries {', '.join(header)}. {WRITE_AGAIN}")
    if size != header["file_bytes"]:
        what = "truncated" if size < header["file_bytes"] else "damaged"
        raise ValueError(f"{path} is {what}: it has {size:,} of {header['file_bytes']:,} bytes. {WRITE_AGAIN}")
    fixed = header["images"] * sum(np.dtype(dtype).itemsize for dtype in INDEX.values())
    if not HEADER_BYTES <= header["index_start"] <= size - fixed or header["images"] < 1:
        raise ValueError(f"{path} is damaged: its header tells of an index that is not there. {WRITE_AGAIN}")
    return header


def _checksum(header: dict, index: bytes) -> str:
    """SHA-256 of header and index, and so, through the CRC-32 of each record, of the whole file."""
    told = json.dumps({name: header[name] for name in HEADER}, sort_keys=True).encode("ascii")
    return hashlib.sha256(told + index).hexdigest()
