"""The splits of Karpathy and Fei-Fei (2015) for COCO (`dataset_coco.json`) and Flickr30k (`dataset_flickr30k.json`).

File: `{"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}], "imgid", "cocoid"?}]}`; `filepath` is the
sub-folder (COCO: train2014 or val2014), absent for Flickr30k.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hf_vlp.data.record import RecordError

if TYPE_CHECKING:
    from datasets import Dataset


HEAD = re.compile(r'\s*\{\s*("dataset"\s*:\s*"[^"]*"\s*,\s*)?"images"\s*:\s*\[.*"sentences"', re.DOTALL)


def is_karpathy(path: str | os.PathLike) -> bool:
    """Whether a .json file begins as a split file does: `images`, and `sentences` in the first entries."""
    if Path(path).suffix.lower() != ".json":
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return HEAD.match(file.read(65536)) is not None


def read_karpathy(
    json_path: str | os.PathLike,
    image_root: str | os.PathLike,
    split: str | None,
    *,
    restval: bool = True,
    captions_per_image: int | None = None,
    pictures: bool = True,
) -> "Dataset":
    """Read one split as records with `image`, `captions`, `image_id` (COCO's id, else the file's `imgid`), `filename`.

    Args:
        json_path: the split file.
        image_root: folder that holds the pictures, with the sub-folders that the file names.
        split: must be chosen: `train`, `val`, `test` (or `restval`); or several, e.g. `train+val`, on which ViLT is fine-tuned for
            Flickr30k, while it is chosen on `test`.
        restval: COCO's 30,504 pictures marked restval join `train`, as all published results have it.
        captions_per_image: keep the first so many captions. The COCO 5K protocol scores 5 (25,000 in all), while some
            pictures have 6 or 7.
        pictures: False leaves the column `image` out where the pictures are not below `image_root`, for models that see regions.

    Raises:
        FileNotFoundError: no such file or folder, or the split's first picture is not below `image_root` (with `pictures`).
        ValueError: the file has no such split.
        RecordError: an entry lacks a field, has no captions, or fewer than `captions_per_image`.
    """
    from datasets import Dataset, Features, Image, List, Value

    try:
        content = json.loads(Path(json_path).read_text("utf-8"))
    except ValueError as error:
        raise RecordError(None, "images", f"{json_path} is not JSON ({error})", "Repair the file.") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise RecordError(None, "images", f"{json_path} holds no list of that name", "Give a Karpathy split file.")
    root = Path(image_root)
    wanted = set((split or "").split("+"))
    joining = {"restval"} if "train" in wanted and restval else set()
    rows: dict[str, list] = {"image": [], "captions": [], "image_id": [], "filename": []}
    for position, entry in enumerate(content["images"]):
        missing = [field for field in ("filename", "split", "sentences") if field not in entry]
        if missing:
            raise RecordError(position, missing[0], "the entry has no such field", "Give a Karpathy split file.")
        if entry["split"] not in wanted | joining:
            continue
        captions = [sentence["raw"].strip() for sentence in entry["sentences"]][:captions_per_image]
        if len(captions) < (captions_per_image or 1):
            reason = f"{len(captions)} captions, {captions_per_image or 1} asked for"
            raise RecordError(position, "sentences", reason, "Ask for fewer captions_per_image.")
        rows["image"].append(str(root / entry.get("filepath", "") / entry["filename"]))
        rows["captions"].append(captions)
        rows["image_id"].append(str(entry.get("cocoid", entry.get("imgid", position))))
        rows["filename"].append(entry["filename"])
    counts = Counter(entry["split"] for entry in content["images"])
    if not wanted <= counts.keys():
        raise ValueError(f"{json_path} has no split {split!r}. It has: {dict(counts)}. Choose one.")
    features = {"image": Image(), "captions": List(Value("string"))}
    if not Path(rows["image"][0]).is_file():
        if pictures:
            raise FileNotFoundError(
                f"no picture {rows['image'][0]}. image_root must hold the sub-folders the file names."
            )
        del rows["image"], features["image"]
    return Dataset.from_dict(
        rows, features=Features({**features, "image_id": Value("string"), "filename": Value("string")})
    )
