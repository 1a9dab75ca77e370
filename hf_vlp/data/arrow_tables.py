"""Records from the Arrow tables that ViLT (https://arxiv.org/abs/2102.03334) and VLMo (https://arxiv.org/abs/2111.02358) are trained on.

A file `<table>.arrow` is one RecordBatchFile with a row an image, or a pair of images, and all its texts; pictures are stored as they were
encoded. Columns of captions: `image`, `caption` (a list), `image_id`. Of VQA v2: `image`, `questions`, `question_id`, `answers`,
`answer_labels`, `answer_scores` (lists over the questions), `image_id`. Of NLVR2: `image_0`, `image_1`, `questions`, `answers` ("True" or
"False"), `identifier` (of the pair).
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_vlp.data.record import RecordError, decode_image

if TYPE_CHECKING:
    from datasets import Dataset

# What the released code reads of each set; `*` is the number of a part. Of COCO, Flickr30k and NLVR2 `val` holds test data.
PUBLISHED: dict[str, dict[str, tuple[str, ...]]] = {
    "coco": {
        "train": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
        "val": ("coco_caption_karpathy_test",),
        "test": ("coco_caption_karpathy_test",),
    },
    "f30k": {
        "train": ("f30k_caption_karpathy_train", "f30k_caption_karpathy_val"),
        "val": ("f30k_caption_karpathy_test",),
        "test": ("f30k_caption_karpathy_test",),
    },
    "gcc": {"train": ("conceptual_caption_train_*",), "val": ("conceptual_caption_val_0",)},
    "sbu": {"train": ("sbu_*",)},
    "vg": {"train": ("vg",)},
    "vqa": {
        "train": ("vqav2_train", "vqav2_trainable_val"),
        "val": ("vqav2_rest_val",),
        "test": ("vqav2_test",),
    },
    "nlvr2": {
        "train": ("nlvr2_train",),
        "val": ("nlvr2_dev", "nlvr2_test1"),
        "test": ("nlvr2_dev", "nlvr2_test1"),
    },
}
CAPTIONS = {"image", "caption", "image_id"}
VQA = {"image", "questions", "question_id", "answers", "answer_labels", "answer_scores", "image_id"}
NLVR2 = {"image_0", "image_1", "questions", "answers", "identifier"}
LABELS = {"True": 1, "False": 0}


def tables_of(folder: str | os.PathLike, split: str | None) -> list[Path]:
    """The files of a split.

    Args:
        folder: with the files, which may be of several data sets.
        split: names of tables, such as `nlvr2_dev`, or of published splits, such as `vqa/train` (`train` alone where the folder holds
            one data set), joined by `+`.

    Raises:
        ValueError: a name that is neither, or that leaves open which data set is meant.
        FileNotFoundError: a table of the published split is missing.
    """
    folder = Path(folder)
    there = sorted(file.stem for file in folder.glob("*.arrow"))
    patterns = {name: [table for tables in splits.values() for table in tables] for name, splits in PUBLISHED.items()}
    sets = [name for name, tables in patterns.items() if any(_matching(table, there) for table in tables)]
    files = []
    for name in (split or "").split("+"):
        given, _, part = name.rpartition("/")
        if name in there:
            found = [name]
        elif (given or len(sets) == 1) and part in PUBLISHED.get(given or sets[0], {}):
            found = []
            for table in PUBLISHED[given or sets[0]][part]:
                if not (tables := _matching(table, there)):
                    raise FileNotFoundError(f"{folder} has no {table}.arrow, which belongs to split={name!r}.")
                found += tables
        else:
            splits = [f"{one}/{part}" for one in sets for part in PUBLISHED[one]]
            known = f"of its tables {', '.join(there)}" + (f" or of {', '.join(splits)}" if splits else "")
            raise ValueError(f"split={split!r} of {folder}: {name!r} is none {known}. Choose one.")
        files += [folder / f"{table}.arrow" for table in found]
    return files


def _matching(table: str, there: Sequence[str]) -> list[str]:
    pattern = re.compile(re.escape(table).replace(r"\*", r"(\d+)"))
    found = [match for name in there if (match := pattern.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: [int(number) for number in match.groups()])]


def read_arrow_tables(
    files: str | os.PathLike | Sequence[str | os.PathLike], *, unique_captions: bool = True
) -> "ArrowRecords":
    """Read tables of one kind as records, one after the other.

    Of captions a record is an image: `image`, `captions`, `image_id`. Of VQA v2 a question: `image`, `question`, `question_id`, `answers`
    and beside them `answer_labels`, their ids in the released vocabulary. Of NLVR2 a statement: `images`, `statement`, `label`, `image_id`
    (of the pair). Further columns are kept.

    Args:
        files: the tables.
        unique_captions: leave out the second of two equal captions of an image, as the released code does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file is given.
        RecordError: not such a file, tables of different kinds, or a row whose lists do not fit together, by its position.
    """
    from datasets import Dataset

    paths = [Path(files)] if isinstance(files, str | os.PathLike) else [Path(file) for file in files]
    if not paths:
        raise ValueError("no table is given. Give one file at least.")
    rows: dict[str, list[Any]] = {}
    places: list[tuple[int, int]] = []
    kind: tuple[tuple[str, ...], Any] | None = None
    for number, path in enumerate(paths):
        table = open_table(path)
        kind, first = _kind(path, table.column_names), kind
        if first not in (None, kind):
            raise RecordError(None, "file", f"{path} holds other records than {paths[0]}", "Read them apart.")
        pictures, unfold = kind
        for position, row in enumerate(table.drop_columns(list(pictures)).to_pylist()):
            for record in unfold(row, position, path.name):
                if unique_captions and "captions" in record:
                    record["captions"] = list(dict.fromkeys(record["captions"] or ()))
                for name, value in record.items():
                    if name not in rows:
                        rows[name] = [None] * len(places)  # what the tables before lack
                    rows[name].append(value)
                places.append((number, position))
        for column in rows.values():  # and what this one lacks
            column += [None] * (len(places) - len(column))
    return ArrowRecords(paths, pictures, np.array(places, dtype=np.int64).reshape(-1, 2), Dataset.from_dict(rows))


def answer_ids(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The released vocabulary as far as the records of VQA use it: answer -> id, by id. Give records without their pictures.

    Raises:
        ValueError: two answers of one id.
    """
    answers: dict[int, str] = {}
    for record in records:
        for one, label in zip(record["answers"], record["answer_labels"], strict=True):
            if answers.setdefault(label, one["answer"]) != one["answer"]:
                raise ValueError(f"id {label} is both {answers[label]!r} and {one['answer']!r}: the tables do not fit.")
    return {answers[label]: label for label in sorted(answers)}


class ArrowRecords(Sequence):
    """Records whose texts are in memory and whose pictures stay in memory-mapped tables, shared by all texts of an image.

    Behaves as a `datasets.Dataset` as far as this package asks: rows by position, columns of texts by name, `column_names`,
    `remove_columns`, `select_columns`, `select`, and `cast_column` of the pictures to `Image(decode=False)`, their encoded bytes.

    Args:
        files: the tables. columns: one or two of them with pictures. places: [N, 2] number of the table and row in it of each record.
        texts: all other fields, N rows.

    Raises:
        RecordError: a picture that does not decode, by the record's position, when it is asked for.
    """

    def __init__(self, files: Sequence[Path], columns: tuple[str, ...], places: np.ndarray, texts: "Dataset"):
        self.files, self.columns, self.places, self.texts = list(files), columns, places, texts
        self.field, self.decode = "image" if len(columns) == 1 else "images", True
        self._tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return self.texts[index]
        index = range(len(self))[index]
        pictures = [self._picture(index, column) for column in self.columns]
        return {self.field: pictures if self.field == "images" else pictures[0], **self.texts[index]}

    @property
    def column_names(self) -> list[str]:
        return [self.field, *self.texts.column_names]

    def remove_columns(self, names: str | Sequence[str]) -> "ArrowRecords | Dataset":
        """The records without some columns; without pictures a `datasets.Dataset`."""
        names = [names] if isinstance(names, str) else list(names)
        texts = self.texts.remove_columns([name for name in names if name != self.field])
        return texts if self.field in names else self._with(texts=texts)

    def select_columns(self, names: str | Sequence[str]) -> "ArrowRecords | Dataset":
        """The records with some columns alone; without pictures a `datasets.Dataset`."""
        names = [names] if isinstance(names, str) else list(names)
        texts = self.texts.select_columns([name for name in names if name != self.field])
        return self._with(texts=texts) if self.field in names else texts

    def select(self, indices: Iterable[int]) -> "ArrowRecords":
        """Some of the records, by position."""
        indices = list(indices)
        return self._with(places=self.places[indices], texts=self.texts.select(indices))

    def cast_column(self, name: str, feature: Any) -> "ArrowRecords":
        """The records with another feature of a column; of the pictures, whether they are decoded."""
        if name == self.field:
            return self._with(decode=getattr(feature, "feature", feature).decode)
        return self._with(texts=self.texts.cast_column(name, feature))

    def _with(self, **changes: Any) -> "ArrowRecords":
        result = copy.copy(self)
        result.__dict__.update(changes)
        return result

    def _picture(self, index: int, column: str) -> Any:
        number, row = self.places[index].tolist()
        if number not in self._tables:
            self._tables[number] = open_table(self.files[number])
        stored = {"bytes": self._tables[number].column(column)[row].as_py(), "path": None}
        return decode_image(stored, index, self.field) if self.decode else stored


def open_table(path: Path):
    """The table of a file, memory-mapped.

    Raises:
        FileNotFoundError: no such file.
        RecordError: not an Arrow file of record batches.
    """
    import pyarrow

    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise RecordError(None, "file", f"{path} is no Arrow file of record batches ({error})", "Repair it.") from None


def _kind(path: Path, columns: Sequence[str]):
    """The columns of pictures and the function that makes records of a row."""
    for fields, pictures, unfold in (
        (VQA, ("image",), _questions),
        (NLVR2, ("image_0", "image_1"), _statements),
        (CAPTIONS, ("image",), _captions),
    ):
        if fields <= set(columns):
            return pictures, unfold
    reason = f"{path} has the columns {', '.join(columns)}, which are none of captions, VQA v2 or NLVR2"
    raise RecordError(None, "file", reason, "Convert it, e.g. to parquet, and say which column is what.")


def _text(image_id: Any) -> str | None:
    return None if image_id is None else str(image_id)


def _captions(row: dict[str, Any], position: int, file: str) -> Iterator[dict[str, Any]]:
    yield {"captions": row.pop("caption"), "image_id": _text(row.pop("image_id")), **row}


def _questions(row: dict[str, Any], position: int, file: str) -> Iterator[dict[str, Any]]:
    questions, ids = row.pop("questions"), row.pop("question_id")
    answers, labels, scores = row.pop("answers"), row.pop("answer_labels"), row.pop("answer_scores")
    image_id = _text(row.pop("image_id"))
    try:
        if not answers:  # of the tests
            answers = labels = scores = [[]] * len(questions)
        for question, question_id, *given in zip(questions, ids, answers, labels, scores, strict=True):
            scored = [{"answer": answer, "score": score} for answer, _, score in zip(*given, strict=True)]
            record = {"image_id": image_id, "question": question, "question_id": question_id, "answers": scored}
            yield record | {"answer_labels": given[1], **row}
    except (TypeError, ValueError) as error:
        reason = f"the lists of this row of {file} do not fit together ({error})"
        raise RecordError(position, "questions", reason, "Repair it.") from None


def _statements(row: dict[str, Any], position: int, file: str) -> Iterator[dict[str, Any]]:
    statements, answers, pair = row.pop("questions"), row.pop("answers"), row.pop("identifier")
    if not statements or len(statements) != len(answers or ()) or not set(answers) <= LABELS.keys():
        reason = f"the statements {statements} of this row of {file} have the answers {answers}"
        raise RecordError(position, "answers", reason, "Give True or False for each.")
    for statement, answer in zip(statements, answers):
        yield {"statement": statement, "label": LABELS[answer], "image_id": pair, **row}
