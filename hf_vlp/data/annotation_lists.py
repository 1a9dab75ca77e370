"""JSON lists of annotations, the files on which "Align before Fuse" (https://arxiv.org/abs/2107.07651) and its successors train.

A file is one list of objects. Captions: `{"image", "caption": text | [text], "image_id"?}`; of grounding `{"image", "text"}`.
Questions: `{"dataset", "image", "question", "question_id", "answer"?: [text] | text}`. Statements: `{"images": [2], "sentence", "label"}`,
which is "True" or "False". Hypotheses: `{"image", "sentence", "label"}`. Phrases: `{"image", "text", "ref_id"}`, whose boxes are in the
files of REFER (Yu et al., https://arxiv.org/abs/1608.00272) and of a detector. Images are paths below a folder.
"""

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vlp.data.answers import scored
from hf_vlp.data.nlvr2 import LABELS
from hf_vlp.data.pickles import read_pickle
from hf_vlp.data.record import RecordError
from hf_vlp.data.tasks import ENTAILMENT

if TYPE_CHECKING:
    from datasets import Dataset

ONLY_ANSWER = 0.5  # weight of an answer that one person gave, as in Visual Genome
LOOKED_AT = 100  # first pictures of captions, of which one is to be there: lists from the web lack some
REPAIR = "Repair the file."
TEXTS = "a list of texts"
KINDS = {str: "a text", list: "a list", int: "a whole number", dict: "an object"}

PathLike = str | os.PathLike


def read_caption_lists(
    paths: PathLike | Sequence[PathLike],
    image_root: PathLike | None = None,
    *,
    text: str = "caption",
    pictures: bool = True,
) -> "Dataset":
    """Read captions as records, one an entry in the order of the files: `image`, `captions`, `image_id`.

    `image_id` is the entry's own, else its image's path, so that several entries may show one image. An entry without image or caption
    is a record without them, which `on_bad_record="skip"` leaves out and counts.

    Args:
        paths: a file, or several whose entries follow one another.
        image_root: folder before the images' paths; not for lists that hold whole paths, as those of pre-training do.
        text: field of the caption or captions; `text` in the lists of grounding.
        pictures: False leaves the column `image` out.

    Raises:
        FileNotFoundError: no such file, or none of a file's first pictures is there (with `pictures`).
        RecordError: a file that holds no list of objects, none of them with such a field, or a caption that is neither text nor list, by
            the position in its file.
    """
    rows = []
    for path in _several(paths):
        entries = _entries(path, {})
        for field in ("image", text):
            if not any(entry.get(field) for entry in entries):
                raise RecordError(None, field, f"no entry of {path} has such a field", REPAIR)
        for position, entry in enumerate(entries):
            image, captions = entry.get("image"), _captions(entry.get(text), text, position, path)
            image_id = entry.get("image_id", image)
            image = _joined(image_root, image) if isinstance(image, str) else None
            image_id = None if image_id is None else str(image_id)
            rows.append({"image": image, "captions": captions, "image_id": image_id})
        _one_is_there([row["image"] for row in rows[-len(entries) :][:LOOKED_AT]], pictures)
    return _dataset(rows, "image", pictures, captions=["string"], image_id="string")


def is_caption_list(path: PathLike) -> bool:
    """Whether a .json file begins a list with the caption or captions of a picture, and no other fields."""
    entry = _first_entry(path)
    known = {"image", "caption"} <= entry.keys() <= {"image", "caption", "image_id"}
    return known and "://" not in str(entry["image"])


def is_question_list(path: PathLike) -> bool:
    """Whether a .json file begins a list with a question about an image of some data set."""
    return {"dataset", "image", "question", "question_id"} <= _first_entry(path).keys()


def read_question_lists(
    paths: PathLike | Sequence[PathLike], image_roots: PathLike | Mapping[str, PathLike], *, pictures: bool = True
) -> "Dataset":
    """Read questions as records, one an entry in the order of the files: `image`, `image_id`, `question`, `question_id`, `answers`.

    The score of an answer is the share of the annotators that gave it, of the only answer 0.5; `answers` is empty where an entry has none.
    Answers stay as they are written.

    Args:
        paths: a file, or several whose entries follow one another.
        image_roots: folder before the images' paths of each `dataset`, e.g. {"vqa": ..., "vg": ...}; or one folder, in which the images
            of a `dataset` are in the folder of its name where there is one.
        pictures: False leaves the column `image` out, and needs no folder.

    Raises:
        FileNotFoundError: no such file, or the first picture of a file is not there (with `pictures`).
        RecordError: a file that holds no list of such entries, or a `dataset` without a folder, by the position in its file.
    """
    rows = []
    fields = {"dataset": (str,), "image": (str,), "question": (str,), "question_id": (int,)}
    for path in _several(paths):
        entries = _entries(path, fields)
        roots = _folders(image_roots, {entry["dataset"] for entry in entries})
        for position, entry in enumerate(entries):
            if pictures and entry["dataset"] not in roots:
                known = ", ".join(roots) or "none"
                reason = f"no folder for the pictures of {entry['dataset']!r} of {path}"
                raise RecordError(position, "dataset", reason, f"image_roots has: {known}.")
            image = _joined(roots.get(entry["dataset"]), entry["image"])
            row = {name: entry[name] for name in ("question", "question_id")}
            rows.append(row | {"image": image, "image_id": entry["image"], "answers": _weighted(entry, position, path)})
        _first_is_there([rows[-len(entries)]["image"]], pictures)
    answers = {"answer": "string", "score": "float64"}
    return _dataset(
        rows, "image", pictures, image_id="string", question="string", question_id="int64", answers=[answers]
    )


def read_answer_list(path: PathLike) -> list[str]:
    """The answers to choose from, one after the other.

    Raises:
        RecordError: no list of texts, an empty text, or an answer that stands twice, by its position.
    """
    answers = _texts(_content(path), "answer", None, path)
    seen: dict[str, int] = {}
    for position, answer in enumerate(answers):
        if answer in seen:
            raise RecordError(position, "answer", f"{answer!r} stood at {seen[answer]} already in {path}", REPAIR)
        seen[answer] = position
    return answers


def is_reasoning_list(path: PathLike) -> bool:
    """Whether a .json file begins a list with a statement about pictures."""
    return {"images", "sentence", "label"} <= _first_entry(path).keys()


def is_entailment_list(path: PathLike) -> bool:
    """Whether a .json file begins a list with a hypothesis about a picture that is named without its `.jpg`."""
    entry = _first_entry(path)
    return {"sentence", "label"} <= entry.keys() and isinstance(image := entry.get("image"), str) and "." not in image


def read_reasoning_list(path: PathLike, image_root: PathLike, *, pictures: bool = True) -> "Dataset":
    """Read statements about two pictures as records: `images` (two), `statement`, `label` (1 = true), `image_id` (of the pair).

    Args:
        path: the file. image_root: folder before the images' paths. pictures: False leaves the column `images` out.

    Raises:
        FileNotFoundError: no such file, or a picture of the first pair is not there (with `pictures`).
        RecordError: a file that holds no list of such entries, by the position.
    """
    rows = []
    for position, entry in enumerate(_entries(path, {"images": (list,), "sentence": (str,), "label": (str,)})):
        names = _texts(entry["images"], "images", position, path)
        if len(names) != 2:
            raise RecordError(position, "images", f"{len(names)} pictures in {path}", "Give two.")
        label = _one_of(LABELS, entry["label"], position, path)
        images = [_joined(image_root, name) for name in names]
        row = {"images": images, "statement": entry["sentence"], "label": LABELS[label]}
        rows.append(row | {"image_id": " ".join(names)})
    _first_is_there(rows[0]["images"], pictures)
    return _dataset(rows, "images", pictures, statement="string", label="int64", image_id="string")


def read_entailment_list(path: PathLike, image_root: PathLike, *, pictures: bool = True) -> "Dataset":
    """Read hypotheses about a picture as records: `image`, `hypothesis`, `label` (a class of `ENTAILMENT`), `image_id`.

    Args:
        path: the file, whose images are named without their `.jpg`.
        image_root: folder of the pictures. pictures: False leaves the column `image` out.

    Raises:
        FileNotFoundError: no such file, or the first picture is not there (with `pictures`).
        RecordError: a file that holds no list of such entries, by the position.
    """
    rows = []
    for position, entry in enumerate(_entries(path, {"image": (str,), "sentence": (str,), "label": (str,)})):
        label = _one_of(ENTAILMENT, entry["label"], position, path)
        row = {"image": _joined(image_root, f"{entry['image']}.jpg"), "hypothesis": entry["sentence"], "label": label}
        rows.append(row | {"image_id": entry["image"]})
    _first_is_there([rows[0]["image"]], pictures)
    return _dataset(rows, "image", pictures, hypothesis="string", label="string", image_id="string")


def read_phrase_list(
    path: PathLike,
    image_root: PathLike,
    *,
    references: Mapping[int, Mapping[str, Any]] | None = None,
    proposals: Mapping[int, Sequence[Sequence[float]]] | None = None,
    pictures: bool = True,
) -> "Dataset":
    """Read phrases to be found in a picture as records: `image`, `image_id`, `phrase`, `ref_id`, and where they are given boxes.

    Boxes are [x, y, w, h] in pixels: `box` is the one that the phrase means, beside it stands its `split`; `proposals` are those that a
    detector found.

    Args:
        path: the file. image_root: folder before the images' paths. pictures: False leaves the column `image` out.
        references: of `read_references`. proposals: of `read_proposals`, which are found by the image of the reference.

    Raises:
        ValueError: proposals without references.
        FileNotFoundError: no such file, or the first picture is not there (with `pictures`).
        RecordError: a file that holds no list of such entries, an id without reference or proposals, by the position.
    """
    if proposals is not None and references is None:
        raise ValueError("proposals are found by the image of a reference: give references too.")
    rows, box = [], ["float64"]
    for position, entry in enumerate(_entries(path, {"image": (str,), "text": (str,), "ref_id": (int,)})):
        row = {"image": _joined(image_root, entry["image"]), "image_id": entry["image"], "phrase": entry["text"]}
        row["ref_id"] = entry["ref_id"]
        if references is not None:
            if entry["ref_id"] not in references:
                raise RecordError(position, "ref_id", f"no reference {entry['ref_id']}", "Give lists of one data set.")
            reference = references[entry["ref_id"]]
            row |= {"box": reference["box"], "split": reference["split"]}
            if proposals is not None:
                if not proposals.get(reference["image_id"]):
                    reason = f"no proposals for the image {reference['image_id']}"
                    raise RecordError(position, "proposals", reason, "Give those of the same pictures.")
                row["proposals"] = proposals[reference["image_id"]]
        rows.append(row)
    _first_is_there([rows[0]["image"]], pictures)
    given = {"image_id": "string", "phrase": "string", "ref_id": "int64"}
    given |= {} if references is None else {"box": box, "split": "string"}
    return _dataset(rows, "image", pictures, **given | ({} if proposals is None else {"proposals": [box]}))


def read_references(references: PathLike, instances: PathLike) -> dict[int, dict[str, Any]]:
    """What the phrases of REFER mean, by `ref_id`: `image_id`, `split` and `box` [x, y, w, h].

    Args:
        references: `refs(unc).p` or the like, which is read without executing it, or the same list as JSON.
        instances: `instances.json`, whose `annotations` have `id` and `bbox`.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a file that holds no such entries, or a reference to no annotation, by the position.
    """
    if Path(references).suffix == ".json":
        content = _content(references)
    else:
        try:
            content = read_pickle(Path(references).read_bytes())
        except (pickle.UnpicklingError, ValueError, EOFError) as error:
            raise RecordError(None, "references", f"{references} cannot be read ({error})", REPAIR) from None
    listed = _content(instances)
    listed = listed.get("annotations") if isinstance(listed, dict) else None
    annotations = _checked(listed, instances, {"id": (int,), "bbox": (list,)})
    boxes = {entry["id"]: _box(entry["bbox"], position, instances) for position, entry in enumerate(annotations)}
    fields = {"ref_id": (int,), "ann_id": (int,), "image_id": (int,), "split": (str,)}
    found = {}
    for position, entry in enumerate(_checked(content, references, fields)):
        if entry["ann_id"] not in boxes:
            reason = f"{instances} has no annotation {entry['ann_id']}"
            raise RecordError(position, "ann_id", reason, "Give both files of one data set.")
        found[entry["ref_id"]] = {"image_id": entry["image_id"], "split": entry["split"], "box": boxes[entry["ann_id"]]}
    return found


def read_proposals(path: PathLike) -> dict[int, list[list[float]]]:
    """The boxes [x, y, w, h] that a detector found in each image, of `{"image_id": [[x, y, w, h], ...]}`.

    Raises:
        FileNotFoundError: no such file.
        RecordError: the file holds no such object, or a box that is none, by the position of its image.
    """
    content = _content(path)
    if not isinstance(content, dict) or not all(key.isdecimal() for key in content):
        raise RecordError(None, "proposals", f"{path} holds no object of image ids", "Give a file such as dets.json.")
    found = {}
    for position, (key, boxes) in enumerate(content.items()):
        if not isinstance(boxes, list):
            raise RecordError(position, "proposals", f"of image {key} in {path} is no list of boxes", REPAIR)
        found[int(key)] = [_box(box, position, path) for box in boxes]
    return found


def _several(paths: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _content(path: PathLike) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise RecordError(None, "list", f"{path} is not JSON ({error})", REPAIR) from None


def _first_entry(path: PathLike) -> dict[str, Any]:
    """The first object of a list in a .json file, empty of any other file; only its beginning is read."""
    if Path(path).suffix.lower() != ".json":
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(65536).lstrip()
    try:
        entry, _ = json.JSONDecoder().raw_decode(start[1:].lstrip())
    except ValueError:
        return {}
    return entry if start.startswith("[") and isinstance(entry, dict) else {}


def _entries(path: PathLike, fields: Mapping[str, tuple[type, ...]]) -> list[dict[str, Any]]:
    return _checked(_content(path), path, fields)


def _checked(content: Any, path: PathLike, fields: Mapping[str, tuple[type, ...]]) -> list[dict[str, Any]]:
    """The entries of a list, each with these fields of these kinds."""
    if not isinstance(content, list) or not content:
        raise RecordError(None, "list", f"{path} holds no list of entries", "Give a list with one at least.")
    for position, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise RecordError(position, "list", f"{entry!r:.80} in {path} is not {KINDS[dict]}", REPAIR)
        for field, kinds in fields.items():
            if entry.get(field) is None:
                raise RecordError(position, field, f"the entry of {path} has no such field", REPAIR)
            if not isinstance(entry[field], kinds) or isinstance(entry[field], bool):
                wanted = " or ".join(KINDS[kind] for kind in kinds)
                raise RecordError(position, field, f"{entry[field]!r:.80} in {path} is not {wanted}", REPAIR)
    return content


def _texts(value: Any, field: str, position: int | None, path: PathLike) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise RecordError(position, field, f"{value!r:.80} in {path} is not {TEXTS}, one at least", REPAIR)
    return value


def _captions(value: Any, field: str, position: int, path: PathLike) -> list[str | None]:
    """The captions of an entry, perhaps none or empty ones."""
    captions = value if isinstance(value, list) else [] if value is None else [value]
    for caption in captions:
        if not isinstance(caption, str | None):
            raise RecordError(position, field, f"{value!r:.80} in {path} is not a text or {TEXTS}", REPAIR)
    return captions


def _weighted(entry: Mapping[str, Any], position: int, path: PathLike) -> list[dict[str, str | float]]:
    """The answers of a question with their weights."""
    answer = entry.get("answer")
    if answer is None:
        return []
    if isinstance(answer, str):
        return [{"answer": answer, "score": ONLY_ANSWER}]
    given = _texts(answer, "answer", position, path)
    return scored(given, lambda count: count / len(given))


def _one_of(known: Mapping[str, int], label: str, position: int, path: PathLike) -> str:
    if label not in known:
        raise RecordError(position, "label", f"{label!r} in {path} is none of {', '.join(known)}", REPAIR)
    return label


def _box(value: Any, position: int, path: PathLike) -> list[float]:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(one) in (int, float) for one in value)
    if not numbers or not (value[2] > 0 and value[3] > 0):
        raise RecordError(position, "box", f"{value!r:.80} in {path} is no [x, y, w, h] with an area", REPAIR)
    return [float(one) for one in value]


def _folders(roots: PathLike | Mapping[str, PathLike], names: set[str]) -> Mapping[str, PathLike]:
    if isinstance(roots, Mapping):
        return roots
    return {name: Path(roots) / name if (Path(roots) / name).is_dir() else roots for name in names}


def _joined(root: PathLike | None, image: str) -> str:
    return image if root is None else str(Path(root) / image)


def _first_is_there(images: Sequence[str], pictures: bool) -> None:
    """All of the first entry's pictures."""
    if pictures and (missing := [image for image in images if not Path(image).is_file()]):
        raise _no_picture(missing[0])


def _one_is_there(images: Sequence[str | None], pictures: bool) -> None:
    if pictures and not any(Path(image).is_file() for image in images if image):
        raise _no_picture(images[0])


def _no_picture(image: str | None) -> FileNotFoundError:
    return FileNotFoundError(f"no picture {image}. The image folder must hold the paths that the list names.")


def _dataset(rows: list[dict[str, Any]], image: str, pictures: bool, **columns: Any) -> "Dataset":
    """Records with these columns and, with `pictures`, the column `image`."""
    from datasets import Dataset, Features, Image, List, Value

    def feature(kind: Any):
        if isinstance(kind, list):
            return List(feature(kind[0]))
        return {name: Value(own) for name, own in kind.items()} if isinstance(kind, dict) else Value(kind)

    features = {name: feature(kind) for name, kind in columns.items()}
    if pictures:
        features = {image: List(Image()) if image == "images" else Image()} | features
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=Features(features))
