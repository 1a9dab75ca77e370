"""Region features in the files that exist in the world: detector TSV, arrays of numpy (.npy, .npz) and HDF5.

Each reader is a generator of `RegionFeatures`, one an image, in the order of the file. Nothing of a file is executed: pickled content goes
through `hf_vlp.data.pickles`. LMDBs are in `hf_vlp.data.region_lmdb`.

Formats: bottom-up-attention (https://arxiv.org/abs/1707.07998) and ViLBERT (https://arxiv.org/abs/1908.02265) write the TSV, ViLBERT's
second code base a pickled .npy an image, SCAN (https://arxiv.org/abs/1803.08024) and VSE-infinity one .npy of all images of a split.
"""

import base64
import binascii
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_vlp.data.pickles import read_npy, read_npy_bytes, read_pickle
from hf_vlp.data.record import RecordError
from hf_vlp.inputs.region_store import store_key
from hf_vlp.inputs.regions import SURELY_PIXELS, RegionError, RegionFeatures

UNITS = ("pixels", "fractions")
# Of each field, the names it goes by.
NAMES = {
    "image_id": ("image_id", "img_id"),
    "features": ("features", "feature", "image_features", "x", "feat"),
    "boxes": ("boxes", "bbox", "bboxes", "image_bb"),
    "width": ("image_width", "image_w", "img_w", "width"),
    "height": ("image_height", "image_h", "img_h", "height"),
    "num_boxes": ("num_boxes", "num_bbox", "num_box"),
    "class_probs": ("class_probs", "cls_prob", "cls_probs"),
    "objectness": ("objectness", "objects_conf"),
}
COLUMNS = "image_id image_w image_h num_boxes boxes features cls_prob".split()
LXMERT_COLUMNS = "img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split()
REPAIR = "Repair or remove it, or have bad records left out and counted: faults=[], or --on-bad-record skip."

LARGEST_MEMBER = 2**30  # bytes of an array in an .npz, which is one image: zeros of any number pack into a few

Faults = list[RecordError]
Records = Iterable[tuple[int, Any, Callable[[], RegionFeatures]]]


def read_each(records: Records, faults: Faults | None) -> Iterator[RegionFeatures]:
    """The regions of records, a bad one reported by its position and id.

    Args:
        records: (position, id, what reads it).
        faults: a list that takes the errors of bad records, which are then passed over; None: the first is raised.

    Raises:
        RecordError: a bad record.
    """
    for position, image_id, read in records:
        try:
            regions = read()
        except RegionError as error:
            fault = RecordError(position, error.field, f"of image {error.image_id!r}, {error.reason}", error.remedy)
            fault.__cause__ = error
        except Exception as error:  # what a damaged record makes of numpy, zipfile, h5py and pickle has no common base
            said = isinstance(error, ValueError | pickle.UnpicklingError)
            why = str(error) if said else f"{type(error).__name__}: {error}"
            fault = RecordError(position, "regions", f"image {image_id!r} cannot be read ({why})", REPAIR)
            fault.__cause__ = error
        else:
            yield regions
            continue
        if faults is None:
            raise fault
        faults.append(fault)


def regions_of(
    item: Mapping[Any, Any], image_id: Any, box_units: str | None = "pixels", counted: bool = True
) -> RegionFeatures:
    """The regions that a mapping describes, under whichever of the usual names.

    Args:
        item: features as an array [R, F] or base64 of raw float32, and what else there is.
        image_id: to be used where the item names none.
        box_units: of the boxes, "pixels" or "fractions"; None: pixels where a corner lies far outside the fractions.
        counted: the number of boxes in the item must agree with the features (the second ViLBERT code ignores it).

    Raises:
        RegionError: bad values, or pixels without the image's size.
        ValueError: no features, or broken base64.
    """
    found = {
        field: next((item[name] for name in names if item.get(name) is not None), None)
        for field, names in NAMES.items()
    }
    image_id = found["image_id"] if image_id is None else image_id
    image_id = store_key(image_id.decode("utf-8") if isinstance(image_id, bytes) else image_id)
    if found["features"] is None:
        raise ValueError(f"no features among {', '.join(sorted(map(str, item)))}")
    count = None if found["num_boxes"] is None else int(found["num_boxes"])
    if count is not None and count < 1:
        raise RegionError(image_id, "num_boxes", f"it is {count}: there are no regions", "Leave the image out.")
    arrays = {
        name: _array(image_id, name, found[name], count) for name in ("features", "boxes", "class_probs", "objectness")
    }
    if counted and count is not None and len(arrays["features"]) != count:
        reason = f"it is {count}, and there are {len(arrays['features'])} rows of features"
        raise RegionError(image_id, "num_boxes", reason, "The record was cut, or its rows were padded: write it again.")
    width, height = found["width"], found["height"]
    fields = {"class_probs": arrays["class_probs"], "objectness": arrays["objectness"], "image_id": image_id}
    boxes = arrays["boxes"]
    if boxes is None:
        return RegionFeatures(arrays["features"], None, width, height, **fields)
    if box_units is None:
        in_pixels = boxes.size and width is not None and float(np.max(boxes)) > SURELY_PIXELS
        box_units = "pixels" if in_pixels else "fractions"
    boxes = boxes[:, :4] if boxes.ndim == 2 else boxes  # a score may follow
    if box_units == "fractions":
        return RegionFeatures(arrays["features"], boxes, width, height, **fields)
    if width is None or height is None:
        reason = "they are in pixels, and the record has no image size to divide by"
        raise RegionError(image_id, "boxes", reason, "Give records with width and height, or boxes as fractions.")
    return RegionFeatures.from_pixels(arrays["features"], boxes, width, height, **fields)


def read_region_tsv(path: str | os.PathLike, faults: Faults | None = None) -> Iterator[RegionFeatures]:
    """Regions of a detector's TSV: base64 of raw float32 in tab-separated columns without a header, boxes in pixels.

    The columns are image_id, image_w, image_h, num_boxes, boxes, features, and in ViLBERT's files cls_prob; or LXMERT's ten.

    Args:
        path: of the file.
        faults: takes the errors of bad records; None: the first is raised.

    Raises:
        RecordError: a bad record, by its line from 0 and its image id.
    """

    def lines() -> Records:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for position, line in enumerate(file):
                if line.strip():
                    image_id = line.partition("\t")[0]
                    yield position, image_id, lambda line=line: _tsv_record(line)

    return read_each(lines(), faults)


def _tsv_record(line: str) -> RegionFeatures:
    values = line.rstrip("\r\n").split("\t")
    names = LXMERT_COLUMNS if len(values) == len(LXMERT_COLUMNS) else COLUMNS[: len(values)]
    if values[0] in NAMES["image_id"]:
        raise ValueError("the file has a header line, remove it")
    if len(values) not in (6, 7, len(LXMERT_COLUMNS)):
        raise ValueError(
            f"{len(values)} columns, where 6, 7 or {len(LXMERT_COLUMNS)} are expected; the file may be cut short"
        )
    return regions_of(dict(zip(names, values)), None)


def read_region_arrays(
    path: str | os.PathLike, box_units: str | None = None, faults: Faults | None = None
) -> Iterator[RegionFeatures]:
    """Regions of one .npy or .npz an image, of a folder of them, by name.

    A .npy is an array [R, F], then the file's name without its ending is the id, and `<name>_info.npy` beside it tells of boxes and
    sizes; or a pickled dict of arrays, as ViLBERT's extraction writes it. A .npz holds arrays by name. An id within goes before the name.

    Args:
        path: file or folder; sub-folders too, their names a part of the id.
        box_units: as `regions_of`.
        faults: takes the errors of bad records; None: the first is raised.

    Raises:
        RecordError: a bad file, by its place in the order of names.
        FileNotFoundError: no such file or folder, or no such files in it.
    """
    files = array_files(path)
    root = Path(path) if Path(path).is_dir() else Path(path).parent

    def items() -> Records:
        for position, file in enumerate(files):
            name = file.relative_to(root).with_suffix("").as_posix()
            yield position, name, lambda file=file, name=name: _array_record(file, name, box_units)

    return read_each(items(), faults)


def array_files(path: str | os.PathLike) -> list[Path]:
    """The .npy and .npz files of a folder, or the one file.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.np[yz]"))
    files = [file for file in files if not file.name.endswith("_info.npy")]
    if not files:
        raise FileNotFoundError(f"no .npy or .npz file at {path}")
    return files


def _array_record(file: Path, name: str, box_units: str | None) -> RegionFeatures:
    if file.suffix == ".npz":
        with zipfile.ZipFile(file) as archive:
            members = {Path(member).stem: member for member in archive.namelist() if member.endswith(".npy")}
            wanted = {known for names in NAMES.values() for known in names} & members.keys()
            item = {member: read_npy_bytes(_member(archive, members[member]), members[member]) for member in wanted}
    else:
        item = read_npy(file)
        if isinstance(item, np.ndarray):
            item = {"features": item}
            beside = file.with_name(f"{file.stem}_info.npy")
            if beside.is_file():
                told = read_npy(beside)
                item |= {key: told[key] for key in told if key not in NAMES["features"] + NAMES["num_boxes"]}
    if not isinstance(item, dict):
        raise ValueError(f"{file.name} holds a {type(item).__name__}, not an array or a dict of arrays")
    own = next((item[known] for known in NAMES["image_id"] if item.get(known) is not None), name)
    own = own.item() if isinstance(own, np.ndarray) and own.size == 1 else own
    return regions_of(item, own, box_units)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size  # reading stops there, whatever else is packed
    if size > LARGEST_MEMBER:
        raise ValueError(f"{name} unpacks to {size:,} bytes, more than {LARGEST_MEMBER:,} for one image")
    return archive.read(name)


def read_region_matrix(
    path: str | os.PathLike, ids: str | os.PathLike | None = None, faults: Faults | None = None
) -> Iterator[RegionFeatures]:
    """Regions of SCAN's and VSE-infinity's `<split>_ims.npy`, float [N, R, F] of all images of a split; without boxes.

    An id that comes several times, as each five times in the evaluation files, is read once; its rows must be equal.

    Args:
        path: of the .npy file.
        ids: text file of N lines, the id of each row (or of every caption, the same number for each row); if not given,
            `<split>_ids.txt` beside it. Without one the number of the row is the id.
        faults: takes the errors of bad records; None: the first is raised.

    Raises:
        RecordError: a bad row, or one that differs from an earlier one of the same id.
        ValueError: not such an array, or another number of ids than rows.
    """
    features, names = region_matrix(path, ids)

    def rows() -> Records:
        first: dict[str, int] = {}
        for row, name in enumerate(names):
            earlier = first.setdefault(name, row)
            if earlier == row:
                yield row, name, lambda row=row, name=name: RegionFeatures(features[row], image_id=name)
            elif not np.array_equal(features[row], features[earlier]):
                yield row, name, lambda name=name, earlier=earlier: _differs(name, earlier)

    return read_each(rows(), faults)


def region_matrix(path: str | os.PathLike, ids: str | os.PathLike | None = None) -> tuple[np.ndarray, list[str]]:
    """The memory-mapped array [N, R, F] and the id of each row, as `read_region_matrix` has them.

    Raises:
        ValueError: not such an array, or ids that do not fit its rows.
    """
    features = read_npy(path)
    if not isinstance(features, np.ndarray) or features.ndim != 3 or features.dtype.kind != "f":
        shape = list(features.shape) if isinstance(features, np.ndarray) else type(features).__name__
        raise ValueError(f"{path} holds {shape}, not the features [N, R, F] of N images")
    features, path = np.asarray(features), Path(path)
    if ids is None and path.name.endswith("_ims.npy"):
        ids = path.with_name(path.name.removesuffix("_ims.npy") + "_ids.txt")
        ids = ids if ids.is_file() else None
    if ids is None:
        return features, [str(row) for row in range(len(features))]
    names = Path(ids).read_text("utf-8").split()
    each = len(names) // max(1, len(features))  # one an image, or one a caption
    rows = [names[row * each : (row + 1) * each] for row in range(len(features))]
    if len(names) != each * len(features) or any(len(set(row)) != 1 for row in rows):
        raise ValueError(f"{ids} has {len(names)} ids for the {len(features)} images of {path}: give one a row")
    return features, [row[0] for row in rows]


def _differs(name: str, earlier: int) -> RegionFeatures:
    reason = f"they differ from those of row {earlier}, which has the same id"
    raise RegionError(name, "features", reason, "Check that ids and features are of one split.")


def read_region_h5(
    path: str | os.PathLike, box_units: str | None = None, faults: Faults | None = None
) -> Iterator[RegionFeatures]:
    """Regions of an HDF5 file, in one of its usual forms.

    - Data sets `image_ids` [N], `num_boxes` [N], `features` [N, R, F] padded, with `boxes` [N, R, 4] and sizes where there are any;
    - the same with features [sum of num_boxes, F] one after another (`pos_boxes` [N, 2], first and end, may stand for `num_boxes`);
    - a group, or a data set [R, F], for each image under its id.

    Args:
        path: of the file.
        box_units: as `regions_of`.
        faults: takes the errors of bad records; None: the first is raised.

    Raises:
        RecordError: a bad record, by its position.
        ValueError: no such file, or one in another form.
        ImportError: h5py is not installed.
    """
    with open_h5(path) as file:
        yield from read_each(h5_records(file, path, box_units), faults)


def open_h5(path: str | os.PathLike) -> Any:
    """The opened HDF5 file.

    Raises:
        ImportError, ValueError: as `read_region_h5`.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files are read with h5py: pip install "hf_vlp[regions]"') from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5 ({error})") from None


def h5_records(file: Any, path: Any, box_units: str | None) -> Records:
    """The records of an open HDF5 file.

    Raises:
        ValueError: it is in no form that `read_region_h5` lists.
    """
    columns = {
        field: next(
            (entry for name in (*names, *(f"{name}s" for name in names)) if _is_data(entry := _own(file, name))),
            None,
        )
        for field, names in NAMES.items()
    }
    features = columns["features"]
    if features is None:
        if not len(file):
            raise ValueError(f"{path} is empty")
        for position, name in enumerate(file):
            yield position, name, lambda name=name: _h5_group(_own(file, name), name, box_units)
        return
    ids, counts, spans = columns["image_id"], columns["num_boxes"], _own(file, "pos_boxes")
    if ids is None or features.ndim not in (2, 3) or (features.ndim == 2 and counts is None and spans is None):
        raise ValueError(
            f"{path} holds {', '.join(file)}: expected image_ids, num_boxes and features, or one entry an image"
        )
    ids = ids.asstr()[:] if ids.dtype.kind == "O" else ids[:]
    if spans is not None and features.ndim == 2:
        spans = spans[:].astype(np.int64)
    else:
        given = np.full(len(ids), features.shape[1]) if counts is None else counts[:].reshape(-1).astype(np.int64)
        ends = np.cumsum(given)
        spans = np.stack([ends - given, ends], axis=1) if features.ndim == 2 else np.stack([given * 0, given], axis=1)
    rows = len(features) if features.ndim == 3 else len(spans)
    if len(ids) != rows or len(spans) != rows:
        raise ValueError(
            f"{path} has {len(ids)} image_ids, {len(spans)} num_boxes and {rows} features: they must agree"
        )

    def row(position: int) -> RegionFeatures:
        begin, end = spans[position].tolist()
        image_id = ids[position].item() if isinstance(ids[position], np.generic) else ids[position]
        image_id = store_key(image_id.decode("utf-8") if isinstance(image_id, bytes) else image_id)
        available = features.shape[1] if features.ndim == 3 else len(features)
        if not 0 <= begin < end <= available:
            reason = f"it counts {end - begin} regions, from {begin} on, of {available}"
            raise RegionError(image_id, "num_boxes", reason, "Write the file again.")
        item = {}
        for field in ("features", "boxes", "class_probs", "objectness"):
            column = columns[field]
            if column is not None:
                item[field] = column[begin:end] if features.ndim == 2 else column[position, begin:end]
        for field in ("width", "height"):
            if columns[field] is not None:
                item[field] = columns[field][position].item()
        return regions_of(item, image_id, box_units)

    for position in range(rows):
        yield position, str(ids[position]), lambda position=position: row(position)


def _h5_group(entry: Any, name: str, box_units: str | None) -> RegionFeatures:
    if _is_data(entry):
        return regions_of({"features": entry[:]}, name, box_units)
    item = {key: value[()] for key in entry if _is_data(value := _own(entry, key))} | dict(entry.attrs)
    item = {key: value.item() if isinstance(value, np.generic) else value for key, value in item.items()}
    return regions_of(item, name, box_units)


def _own(group: Any, name: str) -> Any:
    """What a group has under a name, or None.

    Raises:
        ValueError: it lies in another file, which whoever wrote this one chose and the reader did not.
    """
    import h5py

    link = group.get(name, getlink=True)
    entry = None if link is None or isinstance(link, h5py.ExternalLink) else group.get(name)
    elsewhere = isinstance(link, h5py.ExternalLink) or (
        entry is not None and entry.file.filename != group.file.filename
    )
    if elsewhere or (isinstance(entry, h5py.Dataset) and (entry.external or entry.is_virtual)):
        raise ValueError(f"{name} lies in another file: copy what it refers to into this one")
    return entry


def _is_data(entry: Any) -> bool:
    return hasattr(entry, "dtype")


def _array(image_id: Any, name: str, value: Any, count: int | None) -> np.ndarray | None:
    """An array as it is, or from base64 of raw float32, `count` rows."""
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, list | tuple):
        return np.asarray(value)
    if not isinstance(value, str | bytes):
        raise RegionError(image_id, name, f"a {type(value).__name__} is no array", "Write the record again.")
    try:
        raw = base64.b64decode("".join(value.split()) if isinstance(value, str) else value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RegionError(image_id, name, f"it is not base64 ({error})", "Write the record again.") from None
    if count is None:
        raise RegionError(image_id, "num_boxes", "it is missing, and base64 has no shape", "Write the record again.")
    columns = 1 if name == "objectness" else 4 if name == "boxes" else len(raw) // (4 * count)
    if len(raw) != 4 * count * columns or not columns:
        reason = f"its {len(raw)} bytes are not {count} rows{' of 4' if name == 'boxes' else ''} of float32"
        raise RegionError(image_id, name, reason, "The record was cut, or num_boxes is wrong: write it again.")
    array = np.frombuffer(raw, "<f4")
    return array if name == "objectness" else array.reshape(count, columns)


def pickled_regions(data: bytes, key: str) -> RegionFeatures:
    """The regions of a pickled item of a ViLBERT LMDB, of either code base; boxes in pixels.

    Raises:
        pickle.UnpicklingError: as `read_pickle`.
        RegionError, ValueError: as `regions_of`.
    """
    item = read_pickle(data)
    if not isinstance(item, dict):
        raise ValueError(f"a pickled {type(item).__name__} where a dict is expected")
    encoded = isinstance(item.get("features"), str | bytes)
    return regions_of(item, key, counted=encoded)
