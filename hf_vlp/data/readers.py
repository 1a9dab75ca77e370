"""Records from parquet, JSON lines, CSV and TSV files, image folders, tar shards and the Hub, through `datasets`.

Whatever the source, the result has the columns `image` (decoded when a row is read), `captions: list[str]` and
`image_id`, beside all columns of the source that were not renamed.
"""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vlp.data.annotation_lists import (
    is_caption_list,
    is_entailment_list,
    is_question_list,
    is_reasoning_list,
    read_caption_lists,
    read_entailment_list,
    read_question_lists,
    read_reasoning_list,
)
from hf_vlp.data.arrow_tables import ArrowRecords, read_arrow_tables, tables_of
from hf_vlp.data.karpathy import is_karpathy, read_karpathy
from hf_vlp.data.nlvr2 import is_nlvr2, read_nlvr2
from hf_vlp.data.precomputed import PrecomputedSplit
from hf_vlp.data.record import RecordError, decode_image, missing_column
from hf_vlp.data.vqav2 import is_vqav2, read_vqav2

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset",
}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

# lists of annotations of one split each, told by names that a list of one's own may have as well
LISTS = (
    (is_question_list, read_question_lists),
    (is_reasoning_list, read_reasoning_list),
    (is_entailment_list, read_entailment_list),
)

# Where the caller maps nothing, the first of these that the source has.
USUAL_NAMES = {
    "image": ("image", "image_path", "filepath", "file_name", "jpg", "png", "webp"),
    "captions": ("captions", "caption", "text", "txt"),
    "image_id": ("image_id", "__key__"),
}


def read_records(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    split: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    image_root: str | os.PathLike | None = None,
    required: Sequence[str] = ("image", "captions"),
    streaming: bool = False,
) -> "Dataset | IterableDataset | ArrowRecords":
    """Read records.

    Args:
        source: a file (.parquet, .jsonl, .json, .csv, .tsv, .tar), a list or glob pattern of such files of one kind, a
            folder (pictures with or without a `metadata.jsonl/.csv/.parquet` that has a `file_name` column; or data
            files; or what `Dataset.save_to_disk` wrote), or the id of a data set on the Hub. A .json file with
            Karpathy's splits of COCO or Flickr30k is read by `read_karpathy`, pictures from `image_root`; a folder with the
            `<split>_caps.txt` and `<split>_ims.npy` of SCAN and VSE-infinity by `PrecomputedSplit`, which gives `regions`, not `image`;
            VQA v2's files of questions, or their folder, by `read_vqav2`; NLVR2's .json files by `read_nlvr2`; JSON lists of questions,
            statements, hypotheses and captions, where no `columns` are mapped, by the readers of `hf_vlp.data.annotation_lists`;
            all these with pictures from `image_root`; .arrow files, or a folder of them, by `read_arrow_tables`.
        split: split to read; needed only where the source has several. In a folder, a sub-folder of that name counts. Karpathy's
            splits, VQA v2's and tables can be joined, e.g. `train+val`.
        columns: what to find where, e.g. `{"captions": ["caption", "alt"], "image": "file", "image_id": "id"}`; a
            caption column holds a text or a list of texts, several are joined. Other keys rename. What is not named is
            looked for under the usual names.
        image_root: folder of relative picture paths; the folder of the file if not given.
        required: fields that must be there.
        streaming: read rows as they are asked for (`IterableDataset`) instead of indexing the source.

    Returns:
        The records. Without an `image_id` column, two rows are of one image if they give one path or one key of `regions`, and
        of two images otherwise: the id is the path, the key, or the row's position where the pictures are stored within.

        A picture folder without metadata gets its captions from the names: the sub-folder's (a class), else the
        file's, with `_` and `-` read as spaces.

    Raises:
        RecordError: a column is missing (with the available and the nearest names), or the file cannot be parsed
            (with the first bad row where one can be told).
        FileNotFoundError: no such file.
        ValueError: unknown kind of file, or a split that must be chosen.
    """
    files = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(file) for file in source]
    if _holds_tables(files):
        return _open_tables(files, split, columns, required, streaming)
    if len(files) == 1 and glob.has_magic(str(files[0])) and not files[0].exists():
        files = [Path(name) for name in sorted(glob.glob(str(files[0])))]
    folder = files[0] if files and files[0].is_dir() else files[0].parent if files else Path()
    root = Path(image_root) if image_root is not None else folder
    pictures = {"image", "images"} & set(required) != set()
    dataset = _open_official(files, root, split, pictures, () if columns else LISTS)
    if dataset is None and not columns and split is None and _are_captions(files):
        dataset = read_caption_lists(files, root, pictures=pictures)
    if dataset is None:
        dataset, folder = _open(source, split, streaming)
        root = Path(image_root) if image_root is not None else folder
    elif streaming:
        dataset = dataset.to_iterable_dataset()
    return arrange(dataset, columns or {}, root, required)


def _are_captions(files: list[Path]) -> bool:
    return bool(files) and all(file.is_file() and is_caption_list(file) for file in files)


def parse_columns(items: Sequence[str]) -> dict[str, list[str]]:
    """The `columns` of `read_records` from command-line words such as `captions=caption,alt image=file`.

    Raises:
        ValueError: a word without `=`.
    """
    result = {}
    for item in items:
        field, equals, names = item.partition("=")
        if not (field and equals and names):
            raise ValueError(f"'{item}' does not map a column. Write FIELD=COLUMN, e.g. captions=caption,alt.")
        result[field] = names.split(",")
    return result


def _holds_tables(files: list[Path]) -> bool:
    if len(files) == 1 and files[0].is_dir():
        saved = any((files[0] / name).is_file() for name in ("state.json", "dataset_dict.json"))  # by `datasets`
        return not saved and any(files[0].glob("*.arrow"))
    return bool(files) and all(file.suffix.lower() == ".arrow" for file in files)


def _open_tables(
    files: list[Path], split: str | None, columns, required: Sequence[str], streaming: bool
) -> ArrowRecords:
    if columns or streaming:
        raise ValueError(
            "tables are read row by row and with the fields they have: give neither columns nor streaming."
        )
    if files[0].is_dir():
        files = tables_of(files[0], split)
    elif split is not None:
        raise ValueError(
            f"{files[0]} is one table, split={split!r} was asked for. Give that split's file or the folder."
        )
    elif len(files) == 1 and glob.has_magic(str(files[0])):
        files = [Path(name) for name in sorted(glob.glob(str(files[0])))]
    records = read_arrow_tables(files)
    if not len(records):
        raise RecordError(None, "file", f"{', '.join(map(str, files))} hold no row", "Give another split.")
    for field in required:
        if field not in records.column_names:
            raise missing_column(field, records.column_names)
    return records


def _open_official(files: list[Path], root: Path, split: str | None, pictures: bool, lists) -> "Dataset | None":
    """The records of files that a task or a split is published in, or of one of the `lists`; None of other files."""
    from datasets import concatenate_datasets

    if len(files) == 1 and files[0].exists() and is_vqav2(files[0]):
        return read_vqav2(files[0], root, split, pictures=pictures)
    if not files or not all(file.is_file() for file in files):
        return None
    if len(files) == 1 and is_karpathy(files[0]):
        return read_karpathy(files[0], root, split, pictures=pictures)
    for is_one, read_one in ((is_nlvr2, read_nlvr2), *lists):
        if not all(is_one(file) for file in files):
            continue
        if split is not None:
            raise ValueError(
                f"{files[0]} is one file without splits, split={split!r} was asked for. Give that split's file."
            )
        return concatenate_datasets([read_one(file, root, pictures=pictures) for file in files])
    return None


def _open(source, split: str | None, streaming: bool) -> tuple[Any, Path]:
    """The data set as it is stored, and the folder that relative paths start from."""
    from datasets import load_dataset, load_from_disk

    if not isinstance(source, str | os.PathLike):
        files = [Path(item) for item in source]
        return _open_files(files, streaming), files[0].parent if files else Path()
    path = Path(source)
    if path.is_file():
        if split not in (None, "train"):  # what `datasets` calls the one split of a file
            raise ValueError(
                f"{path} is one file without splits, split={split!r} was asked for. Give that split's file."
            )
        return _open_files([path], streaming), path.parent
    if path.is_dir():
        if split is not None and (path / split).is_dir():
            path, split = path / split, None
        for name in METADATA:
            if (path / name).is_file():
                return _open_files([path / name], streaming), path
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _choose_split(load_from_disk(str(path)), split, path), path
        if any(path.glob("*.parquet")) or any(path.glob("*.jsonl")) or any(path.glob("data/*.parquet")):
            return _choose_split(load_dataset(str(path), split=split, streaming=streaming), split, path), path
        if any(path.glob("*_caps.txt")):
            records = _precomputed(path, split)
            return records.to_iterable_dataset() if streaming else records, path
        return _picture_folder(path, streaming), path
    if glob.has_magic(str(source)):
        files = sorted(map(Path, glob.glob(str(source))))
        if not files:
            raise FileNotFoundError(f"no file matches {source}.")
        return _open_files(files, streaming), files[0].parent
    if path.suffix.lower() in BUILDERS or path.is_absolute() or str(source).count("/") > 1 or str(source)[:1] == ".":
        raise FileNotFoundError(f"there is no file or folder {source} (working folder: {Path.cwd()}).")
    return _choose_split(load_dataset(str(source), split=split, streaming=streaming), split, source), Path()


def _precomputed(folder: Path, split: str | None) -> "Dataset":
    there = sorted(file.name.removesuffix("_caps.txt") for file in folder.glob("*_caps.txt"))
    if split is None and len(there) == 1:
        split = there[0]
    if split not in there:
        raise ValueError(f"{folder} has the splits {', '.join(there)}; split={split!r} is none of them. Choose one.")
    return PrecomputedSplit(folder, split).records()


def _choose_split(dataset, split: str | None, source):
    if not hasattr(dataset, "keys"):
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split not in dataset:
        raise ValueError(f"{source} has the splits {', '.join(dataset)}; split={split!r} is none of them. Choose one.")
    return dataset[split]


def _open_files(files: list[Path], streaming: bool):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= BUILDERS.keys():
        raise ValueError(
            f"cannot read files of kind {', '.join(sorted(kinds)) or 'none'}. Give files of one of the kinds "
            f"{', '.join(BUILDERS)}, a folder of pictures, or the id of a data set on the Hub."
        )
    kind = kinds.pop()
    options = {}
    if kind in (".csv", ".tsv"):
        # pandas would read the captions "None" and "NA" as missing values
        options = {"sep": "\t" if kind == ".tsv" else ",", "keep_default_na": False}
    names = [str(file) for file in files]
    try:
        return load_dataset(BUILDERS[kind], data_files=names, split="train", streaming=streaming, **options)
    except (DatasetGenerationError, ValueError, OSError, RuntimeError) as error:
        if kind in (".jsonl", ".json"):
            for file in files:
                check_json_lines(file)
        cause = error.__cause__ or error
        raise RecordError(None, "file", f"{', '.join(names)} cannot be read ({cause})", "Repair the file.") from error


def check_json_lines(file: Path) -> None:
    """Find the first line of a JSON-lines file that is not an object, or whose columns change their kind.

    Raises:
        RecordError: with the row's position.
    """
    kinds: dict[str, tuple[type, int]] = {}
    position = -1
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if not line.strip():
                continue
            position += 1
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"not JSON ({error.msg} at character {error.colno})"
                raise RecordError(position, "line", reason, "One object a line.") from None
            if not isinstance(row, dict):
                raise RecordError(position, "line", f"a {type(row).__name__}, not an object", "One object a line.")
            for name, value in row.items():
                kind, first = kinds.setdefault(name, (type(value), position)) if value is not None else (None, 0)
                if kind is not None and kind is not type(value) and {kind, type(value)} != {int, float}:
                    reason = f"{value!r} is a {type(value).__name__}, but row {first} holds a {kind.__name__}"
                    raise RecordError(position, name, reason, "Write one kind throughout.")


def _picture_folder(folder: Path, streaming: bool):
    from datasets import Dataset

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no data file, no picture and no {' or '.join(METADATA)}.")
    names = [file.relative_to(folder) for file in files]
    words = [name.parent.name if name.parent.name else name.stem for name in names]
    captions = [[" ".join(word.replace("_", " ").replace("-", " ").split())] for word in words]
    rows = {"image": [str(name) for name in names], "captions": captions, "image_id": [str(name) for name in names]}
    dataset = Dataset.from_dict(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


def arrange(dataset, columns: Mapping[str, str | Sequence[str]], folder: Path, required: Sequence[str] = ()):
    """Give a `datasets.Dataset` (or `IterableDataset`) the columns of a record.

    Args:
        dataset: rows in any layout.
        columns: as for `read_records`.
        folder: where relative picture paths start.
        required: fields that must be there.

    Raises:
        RecordError: a column is missing.
    """
    from datasets import Dataset, Image, List, Value

    features = dataset.features or next(iter(dataset.take(1)), {})
    available = list(features)
    found: dict[str, list[str]] = {}
    for field, names in columns.items():
        found[field] = [names] if isinstance(names, str) else list(names)
        for name in found[field]:
            if name not in available:
                raise missing_column(name, available)
        if field != "captions" and len(found[field]) != 1:
            raise RecordError(None, field, f"{len(found[field])} columns are given", "Only captions join several.")
    for field, names in USUAL_NAMES.items():
        if field not in found and (name := next((name for name in names if name in available), None)):
            found[field] = [name]
    for field in required:
        if field not in found and field not in available:
            raise missing_column(field, available, f"Say which with columns={{'{field}': ...}}")

    stored = Image(decode=False)
    image = found.get("image", [None])[0]
    is_path = image is not None and getattr(features[image], "dtype", "string") in ("string", "large_string")

    regions = found.get("regions", ["regions"])[0]
    # the column that tells which rows are of one image
    identity = image if is_path else regions if regions in available and _is_key(features[regions]) else None

    def joined(row, position) -> list[str]:
        texts = []
        for name in found["captions"]:
            value = row[name]
            texts.extend(value if isinstance(value, list | tuple) else [value])
        for text in texts:
            if not isinstance(text, str | int | float | None):
                reason = f"{text!r} is a {type(text).__name__}, not a text"
                raise RecordError(position, "captions", reason, "A caption column holds a text or a list of texts.")
        return [text if text is None else str(text) for text in texts]

    def rooted(path: str) -> str:
        return path if not path or "://" in path else str(folder / path)

    if not isinstance(dataset, Dataset):

        def row_of_record(row, position):
            path, key = row[image] if is_path else None, None if identity is None else row[identity]
            result = {field: row[names[0]] for field, names in found.items() if field != "captions"}
            if "captions" in found:
                result["captions"] = joined(row, position)
            result["image_id"] = result.get("image_id", position if key in (None, "") else key)
            if image is not None:
                result["image"] = decode_image(rooted(path or "") if is_path else row[image], position)
            if row.get("images"):
                pictures = [rooted(one) if isinstance(one, str) else one for one in row["images"]]
                result["images"] = [decode_image(one, position, "images") for one in pictures]
            return result

        return dataset.map(row_of_record, with_indices=True)

    # Column by column, so that stored pictures are neither decoded nor copied
    caption_source = found.pop("captions", None)
    if caption_source is not None and caption_source != ["captions"] or _is_text(features.get("captions")):
        found["captions"] = caption_source
        texts = [joined(row, position) for position, row in enumerate(dataset.select_columns(caption_source))]
        dataset = dataset.remove_columns("captions") if "captions" in available else dataset
        dataset = dataset.add_column("captions", texts, feature=List(Value("string")))
        found.pop("captions")
    if "image_id" not in found:
        ids = list(range(len(dataset))) if identity is None else list(dataset[identity])
        dataset = dataset.add_column("image_id", ids)
    for field, (name,) in found.items():
        if field != name:
            if field in dataset.column_names:
                dataset = dataset.remove_columns(field)
            dataset = dataset.rename_column(name, field)
    if is_path:
        paths = [rooted(path or "") for path in dataset["image"]]
        dataset = dataset.remove_columns("image").add_column("image", paths)
    if "images" in dataset.column_names:  # of tasks with several pictures a row
        if _is_text(getattr(dataset.features["images"], "feature", None)):
            paths = [[rooted(path or "") for path in row or ()] for row in dataset["images"]]
            dataset = dataset.remove_columns("images").add_column("images", paths)
        dataset = dataset.cast_column("images", List(stored)).cast_column("images", List(Image()))
    return dataset if image is None else dataset.cast_column("image", stored).cast_column("image", Image())


def _is_text(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_key(feature) -> bool:
    """Whether a column, or a streamed value of it, is text or whole numbers."""
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    return kind.startswith(("str", "large_string", "int", "uint"))
