"""VQA v2 from its official files (Goyal et al., https://arxiv.org/abs/1612.00837).

A folder holds `v2_OpenEnded_mscoco_<part>_questions.json`, `{"questions": [{"image_id", "question", "question_id"}]}`, and of train2014 and
val2014 `v2_mscoco_<part>_annotations.json`, `{"annotations": [{"question_id", "multiple_choice_answer", "answers": [{"answer"}]}]}`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vlp.data.answers import normalize_answer, scored, vqa_rule
from hf_vlp.data.record import RecordError

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = re.compile(r"v2_OpenEnded_mscoco_(.+)_questions\.json")
SPLITS = {
    "train": "train2014",
    "val": "val2014",
    "trainable_val": "val2014",
    "rest_val": "val2014",
    "test": "test2015",
    "test-dev": "test-dev2015",
}
HELD_OUT = 1000  # images of val that published runs validate on, while they train on all others


def is_vqav2(path: str | os.PathLike) -> bool:
    """Whether a file is named as the official files of questions are, or a folder holds one of them."""
    path = Path(path)
    return any(QUESTIONS.fullmatch(file.name) for file in (path.iterdir() if path.is_dir() else [path]))


def read_vqav2(
    source: str | os.PathLike,
    image_root: str | os.PathLike,
    split: str | None = None,
    *,
    rule: Callable[[int], float] = vqa_rule,
    normalize: bool = True,
    pictures: bool = True,
) -> "Dataset":
    """Read questions as records, one a question in the order of the files.

    They have `image`, `image_id`, `question`, `question_id`, `answers` (empty where there are no annotations), `majority_answer`
    (normalised) and, where the file tells, `answer_type`, such as `yes/no`.

    Args:
        source: the folder, or one of its files of questions, which may be named without `split`.
        image_root: folder that holds train2014, val2014 and test2015 with COCO's pictures.
        split: `train`, `val`, `test`, `test-dev`; of val's images, in the order of the file, all but the last 1,000 (`trainable_val`)
            or these (`rest_val`); or several, e.g. `train+trainable_val`, which published models are trained on.
        rule: annotators who agree -> score of an answer. normalize: compare the annotators' answers normalised; published models were
            trained with `rounded_rule` on answers as they are written.
        pictures: False leaves `image` out, for models that see regions.

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: a file is missing, or a split's first picture is not below `image_root` (with `pictures`).
        RecordError: an empty split, a file that cannot be parsed, a question that lacks a field or has no annotation, by its position.
    """
    from datasets import Dataset, Features, Image, List, Value

    source = Path(source)
    if source.is_dir():
        folder, splits = source, (split or "").split("+")
    else:
        folder, found = source.parent, QUESTIONS.fullmatch(source.name)
        own = [name for name, part in SPLITS.items() if found and part == found[1]]
        if not own:
            parts = ", ".join(dict.fromkeys(SPLITS.values()))
            raise ValueError(f"{source} is no v2_OpenEnded_mscoco_<part>_questions.json of {parts}. Give one of these.")
        splits = split.split("+") if split else own[:1]
        if not set(splits) <= set(own):
            raise ValueError(f"{source} has the split {', '.join(own)}, not {split!r}. Choose one, or give the folder.")
    records: list[dict[str, Any]] = []
    for name in splits:
        new = list(_records(folder, name, Path(image_root), rule, normalize))
        if pictures and new and not Path(new[0]["image"]).is_file():
            raise FileNotFoundError(
                f"no picture {new[0]['image']}. image_root must hold the folders train2014, val2014 and test2015."
            )
        records += new
    if not records:
        raise RecordError(None, "questions", f"split={split!r} of {source} is empty", "Choose another.")
    features = {
        "image": Image(),
        "image_id": Value("string"),
        "question": Value("string"),
        "question_id": Value("int64"),
    }
    features["answers"] = List({"answer": Value("string"), "score": Value("float64")})
    features |= {"majority_answer": Value("string"), "answer_type": Value("string")}
    if not pictures:
        del features["image"]
    rows = {field: [record[field] for record in records] for field in features}
    return Dataset.from_dict(rows, features=Features(features))


def _records(folder: Path, split: str, root: Path, rule, normalize: bool) -> Iterator[dict[str, Any]]:
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"split={split!r} is none of VQA v2. Choose one of {known}, or several joined by '+'.")
    part = SPLITS[split]
    questions_file = folder / f"v2_OpenEnded_mscoco_{part}_questions.json"
    questions = _entries(questions_file, "questions", ("image_id", "question", "question_id"))
    annotations = None
    if not part.startswith("test"):
        fields = ("question_id", "multiple_choice_answer", "answers")
        entries = _entries(folder / f"v2_mscoco_{part}_annotations.json", "annotations", fields)
        annotations = {entry["question_id"]: entry for entry in entries}
    images = list(dict.fromkeys(question["image_id"] for question in questions))
    wanted = {"trainable_val": set(images[:-HELD_OUT]), "rest_val": set(images[-HELD_OUT:])}.get(split)
    pictures = part.replace("test-dev", "test")
    start = str(root / pictures / f"COCO_{pictures}_")
    for position, question in enumerate(questions):
        if wanted is not None and question["image_id"] not in wanted:
            continue
        record = {"image_id": str(question["image_id"]), "majority_answer": None, "answer_type": None, "answers": []}
        record |= {"question": question["question"], "question_id": question["question_id"]}
        record["image"] = f"{start}{int(question['image_id']):012}.jpg"
        if annotations is not None:
            entry = annotations.get(question["question_id"])
            if entry is None:
                reason = f"question {question['question_id']} has no annotation"
                raise RecordError(position, "question_id", reason, "Give questions and annotations of one release.")
            given = [str(one["answer"]) for one in entry["answers"]]
            record["answers"] = scored(map(normalize_answer, given) if normalize else given, rule)
            record["majority_answer"] = normalize_answer(entry["multiple_choice_answer"])
            record["answer_type"] = entry.get("answer_type")
        yield record


def _entries(path: Path, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The entries of a file, each with these fields."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RecordError(None, name, f"{path} is not JSON ({error})", "Repair the file.") from None
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise RecordError(None, name, f"{path} holds no list of that name", "Give the official file.")
    for position, entry in enumerate(entries):
        missing = [field for field in fields if not isinstance(entry, dict) or entry.get(field) is None]
        if missing:
            raise RecordError(position, missing[0], f"the entry of {path.name} has no such field", "Repair the file.")
    return entries
