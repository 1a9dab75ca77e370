"""The annotations of Crisscrossed Captions, in the files that VSE-infinity evaluates with.

`testall_ids.txt`: COCO's id of the image of each caption, one a line, so that each stands as often as it has captions.
`testall_capids.txt`: COCO's id of each caption. `cxc_it.json`: `{"t2i": {caption: [[image, score]]}, "i2t": {image:
[[caption, score]]}}`. `cxc_t2t.json`, `cxc_i2i.json`: `{query: [[target, score]]}`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vlp.data.record import RecordError

Lists = dict[str, list[list[Any]]]


@dataclass
class CrisscrossedAnnotations:
    """captions_of: image id -> the ids of its captions, both in the files' order.

    annotations: `image_to_text`, `text_to_image`, `text_to_text`, `image_to_image` -> id of a query -> [id, score] pairs.
    """

    captions_of: dict[str, list[str]]
    annotations: dict[str, Lists]


def read_crisscrossed(folder: str | os.PathLike) -> CrisscrossedAnnotations:
    """Read the five files of a folder (or of its `cxc_annots`).

    Raises:
        FileNotFoundError: a file is missing.
        RecordError: a file that cannot be parsed or holds something else (named), id lists of different lengths, an image
            or caption that stands twice.
    """
    folder = Path(folder)
    folder = folder / "cxc_annots" if (folder / "cxc_annots").is_dir() else folder
    image_ids, caption_ids = _ids(folder / "testall_ids.txt"), _ids(folder / "testall_capids.txt")
    if len(image_ids) != len(caption_ids):
        raise RecordError(
            None,
            "testall_ids.txt",
            f"{len(image_ids)} lines, where testall_capids.txt has {len(caption_ids)}",
            "Give each caption's image, as often as it has captions.",
        )
    captions_of: dict[str, list[str]] = {}
    seen: set[str] = set()
    for position, (image, caption) in enumerate(zip(image_ids, caption_ids)):
        if caption in seen:
            raise RecordError(position, "testall_capids.txt", f"caption {caption} stands twice", "Repair the file.")
        if image in captions_of and image != image_ids[position - 1]:
            reason = f"the lines of image {image} do not stand together"
            raise RecordError(position, "testall_ids.txt", reason, "Repair the file.")
        seen.add(caption)
        captions_of.setdefault(image, []).append(caption)
    both = _json(folder / "cxc_it.json")
    for name in ("i2t", "t2i"):
        if name not in both:
            reason = f"it has no '{name}', but {', '.join(list(both)[:5])}"
            raise RecordError(None, "cxc_it.json", reason, "Give the file of image-text annotations.")
    annotations = {
        "image_to_text": _lists("cxc_it.json", both["i2t"]),
        "text_to_image": _lists("cxc_it.json", both["t2i"]),
        "text_to_text": _lists("cxc_t2t.json", _json(folder / "cxc_t2t.json")),
        "image_to_image": _lists("cxc_i2i.json", _json(folder / "cxc_i2i.json")),
    }
    return CrisscrossedAnnotations(captions_of, annotations)


def _ids(path: Path) -> list[str]:
    ids = path.read_text(encoding="utf-8").split()
    if not ids:
        raise RecordError(None, path.name, "the file is empty", "Give one id a line.")
    return ids


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(None, path.name, f"not JSON ({error})", "Repair the file.") from None
    if not isinstance(content, dict):
        raise RecordError(None, path.name, f"a {type(content).__name__}, not an object", "Give the annotations' file.")
    return content


def _lists(name: str, lists: Any) -> Lists:
    """Checked: an object of lists of [id, score]."""
    for query, pairs in lists.items() if isinstance(lists, dict) else [(name, lists)]:
        good = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int | float) for pair in pairs
        )
        if not good:
            raise RecordError(None, name, f"the entry of {query} is no list of [id, score] pairs", "Repair the file.")
    return lists
