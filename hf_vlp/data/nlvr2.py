"""NLVR2, statements about two pictures (Suhr et al., https://arxiv.org/abs/1811.00491), from its official JSON lines.

A line is `{"identifier": "split-set-pair-sentence", "sentence", "label": "True" | "False"}`, with `directory` in train. The pictures of a
pair are `<split-set-pair>-img0.png` and `-img1.png` in the folder `train/<directory>`, `dev` or `test1`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vlp.data.record import RecordError

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = {"True": 1, "False": 0}


def is_nlvr2(path: str | os.PathLike) -> bool:
    """Whether a .json file begins with a line of NLVR2's fields."""
    if Path(path).suffix.lower() != ".json":
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline(65536)
    try:
        entry = json.loads(first)
    except ValueError:
        return False
    return isinstance(entry, dict) and {"identifier", "sentence"} <= entry.keys()


def read_nlvr2(path: str | os.PathLike, image_root: str | os.PathLike, *, pictures: bool = True) -> "Dataset":
    """Read statements as records, one a line: `images` (two), `statement`, `label` (1 = true), `identifier`, `image_id` (of the pair).

    Args:
        path: e.g. `train.json`, `dev.json`, `balanced_test1.json`.
        image_root: folder that holds `train`, `dev` and `test1`, or a folder `images` with them.
        pictures: False leaves `images` out, for models that see regions.

    Raises:
        FileNotFoundError: no such file, or the first pair is not below `image_root` (with `pictures`).
        RecordError: a line that cannot be parsed, lacks a field, or has another label than True and False, by its position.
    """
    from datasets import Dataset, Features, Image, List, Value

    root = Path(image_root)
    root = root / "images" if (root / "images").is_dir() else root
    records = list(_records(Path(path), root))
    if not records:
        raise RecordError(None, "identifier", f"{path} holds no line", "Give a file of NLVR2.")
    features = {"images": List(Image()), "statement": Value("string"), "label": Value("int64")}
    features |= {"identifier": Value("string"), "image_id": Value("string")}
    if not pictures:
        del features["images"]
    elif missing := [image for image in records[0]["images"] if not Path(image).is_file()]:
        raise FileNotFoundError(f"no picture {missing[0]}. image_root must hold the folders train, dev and test1.")
    return Dataset.from_dict(
        {field: [record[field] for record in records] for field in features}, features=Features(features)
    )


def _records(path: Path, root: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        for position, line in enumerate(line for line in lines if line.strip()):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise RecordError(position, "line", f"not JSON ({error})", "One object a line.") from None
            if not isinstance(entry, dict):
                raise RecordError(position, "line", f"a {type(entry).__name__}, not an object", "One object a line.")
            for field in ("identifier", "sentence", "label"):
                if field not in entry:
                    raise RecordError(position, field, "the line has no such field", "Give a file of NLVR2.")
            if str(entry["label"]) not in LABELS:
                raise RecordError(
                    position, "label", f"{entry['label']!r} is neither True nor False", "Repair the line."
                )
            pair, _, sentence = str(entry["identifier"]).rpartition("-")
            folder = root / pair.split("-")[0]
            if folder.name == "train":
                if "directory" not in entry:
                    raise RecordError(position, "directory", "the line has no such field", "Give a file of NLVR2.")
                folder = folder / str(entry["directory"])
            yield {
                "images": [str(folder / f"{pair}-img{number}.png") for number in (0, 1)],
                "statement": entry["sentence"],
                "label": LABELS[str(entry["label"])],
                "identifier": entry["identifier"],
                "image_id": pair,
            }
