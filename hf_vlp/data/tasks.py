"""Records of downstream tasks and their batches: questions about a picture, statements about two, hypotheses about one.

VQA v2 (https://arxiv.org/abs/1612.00837), NLVR2 (https://arxiv.org/abs/1811.00491), SNLI-VE (https://arxiv.org/abs/1901.06706).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_vlp.data.collate import Collator
from hf_vlp.data.prepared import PreparedRecords
from hf_vlp.data.record import RecordError, check_record

ENTAILMENT = {"contradiction": 0, "neutral": 1, "entailment": 2}


class Questions(PreparedRecords):
    """Items {"image": uint8 [3, h, w], "text": question, "labels": float32 [K], "image_id", "draw"}.

    Labels are the scores of the answers of a vocabulary; of an answer given twice the last score counts. A question none of whose answers
    is in the vocabulary teaches nothing: it is left out, as in ViLT's released code, and counted.

    Args:
        records: with `question`, `answers` (a list of {"answer", "score"}) and perhaps `question_id`; otherwise as of `PreparedRecords`.
        label2id: answer -> 0 to K - 1, each once; None: no labels, and answers are not looked at.
        keep_unanswered: questions without an answer of the vocabulary stay, their scores all 0; as a measurement wants it.
        options: as of `PreparedRecords`.

    Raises:
        RecordError: as of `PreparedRecords`; answers that are none, no question left.
        ValueError: numbers of `label2id` that are not 0 to K - 1.
    """

    def __init__(
        self,
        records: Any,
        prepare: Callable[[Any], torch.Tensor] | None = None,
        label2id: Mapping[str, int] | None = None,
        *,
        keep_unanswered: bool = False,
        **options: Any,
    ):
        if label2id is not None and sorted(label2id.values()) != list(range(len(label2id))):
            raise ValueError(f"label2id must number its {len(label2id)} answers from 0 on, each once")
        self.label2id, self.keep_unanswered = label2id, keep_unanswered
        self._answers = self._outside = self._unanswered = 0
        super().__init__(records, prepare, **options)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """A question, an identity, and answers where there is a vocabulary."""
        check_record(record, row, required=("question", "image_id"))
        if self.label2id is not None:
            check_record(record, row, required=("answers",))
            _check_answers(record["answers"], row)

    def wanted(self, record: Mapping[str, Any]) -> bool:
        """Whether an answer is in the vocabulary."""
        if self.label2id is None:
            return True
        inside = sum(one["answer"] in self.label2id for one in record["answers"])
        self._answers += len(record["answers"])
        self._outside += len(record["answers"]) - inside
        self._unanswered += not inside
        return bool(inside) or self.keep_unanswered

    def content(self, record: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The question and the scores of its answers."""
        if self.label2id is None:
            return {"text": record["question"]}
        scores = torch.zeros(len(self.label2id))
        for one in record["answers"]:
            if one["answer"] in self.label2id:
                scores[self.label2id[one["answer"]]] = float(one["score"])
        return {"text": record["question"], "labels": scores}

    @property
    def question_ids(self) -> list[Any]:
        """`question_id` of each item, the row's position where records have none."""
        return [self._texts[row].get("question_id", int(row)) for row in self._rows]

    def report(self) -> dict[str, Any]:
        """As of `PreparedRecords`, and of the good rows: `answers`, `fraction_outside` of them that the vocabulary lacks, and how many
        questions are `unanswered`, with no answer in it."""
        share = self._outside / self._answers if self._answers else 0.0
        return {
            **super().report(),
            "answers": self._answers,
            "fraction_outside": share,
            "unanswered": self._unanswered,
        }

    def _nothing_left(self, of_what: str) -> RecordError:
        if self._unanswered and not self.keep_unanswered and of_what == "records":
            reason = f"none of {self._unanswered} questions has an answer of the vocabulary of {len(self.label2id)}"
            return RecordError(None, "answers", reason, "Build the vocabulary from these records, or keep_unanswered.")
        return super()._nothing_left(of_what)


class WrittenAnswers(PreparedRecords):
    """Items {"image": uint8 [3, h, w], "text": question, "answers": [text, ...], "answer_weights": float32 [n], "image_id", "draw"}.

    For a model that learns to write the answers, whatever it will choose from: all n answers of a question that score, as they stand, with
    their scores as weights. A question without any teaches nothing: it is left out and counted.

    Args:
        records: as of `Questions`; in the lists on which such models were trained a score is the share of annotators that gave the answer.
        options: as of `PreparedRecords`.

    Raises:
        RecordError: as of `PreparedRecords`; answers that are none, no question left.
    """

    def __init__(self, records: Any, prepare: Callable[[Any], torch.Tensor] | None = None, **options: Any):
        self._unanswered = 0
        super().__init__(records, prepare, **options)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """A question, an identity and answers."""
        check_record(record, row, required=("question", "image_id", "answers"))
        _check_answers(record["answers"], row)

    def wanted(self, record: Mapping[str, Any]) -> bool:
        """Whether an answer scores."""
        answered = any(one["score"] > 0 for one in record["answers"])
        self._unanswered += not answered
        return answered

    def content(self, record: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The question, and its answers with their weights."""
        given = [one for one in record["answers"] if one["score"] > 0]
        weights = torch.tensor([float(one["score"]) for one in given])
        return {"text": record["question"], "answers": [one["answer"] for one in given], "answer_weights": weights}

    def report(self) -> dict[str, Any]:
        """As of `PreparedRecords`, and how many of the good rows are questions `unanswered`."""
        return {**super().report(), "unanswered": self._unanswered}

    def _nothing_left(self, of_what: str) -> RecordError:
        if self._unanswered and of_what == "records":
            reason = f"none of {self._unanswered} questions has an answer that scores"
            return RecordError(None, "answers", reason, "Give records with answers, as those of a test split have not.")
        return super()._nothing_left(of_what)


class Statements(PreparedRecords):
    """Items {"images": [uint8 [3, h, w], uint8 [3, h, w]], "text": statement, "labels": 1 if it is true, else 0, "image_id", "draw"}.

    Args:
        records: with `images`, two, `statement`, `label` (True, False, 1 or 0) and perhaps `identifier`.
        labelled: False: no labels, and `label` is not looked at.
        options: as of `PreparedRecords`.

    Raises:
        RecordError: as of `PreparedRecords`; another number of pictures than two, a label that is none.
    """

    def __init__(self, records: Any, prepare: Callable[[Any], torch.Tensor], *, labelled: bool = True, **options: Any):
        self.labelled = labelled
        super().__init__(records, prepare, pictures=2, **options)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """A statement, an identity and a label."""
        check_record(record, row, required=("statement", "image_id", *(("label",) if self.labelled else ())))
        if self.labelled and record["label"] not in (0, 1):
            raise RecordError(row, "label", f"{record['label']!r} is not true or false", "Give True, False, 1 or 0.")

    def content(self, record: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The statement and whether it is true."""
        return _labelled(record["statement"], int(record["label"]) if self.labelled else None)

    @property
    def identifiers(self) -> list[Any]:
        """`identifier` of each item, the row's position where records have none."""
        return [self._texts[row].get("identifier", int(row)) for row in self._rows]


class Hypotheses(PreparedRecords):
    """Items {"image": uint8 [3, h, w], "text": hypothesis, "labels": class, "image_id", "draw"}.

    Args:
        records: with `hypothesis` and `label`, one of `label2id`.
        label2id: class -> number; contradiction 0, neutral 1, entailment 2 if not given.
        labelled: False: no labels, and `label` is not looked at.
        options: as of `PreparedRecords`.

    Raises:
        RecordError: as of `PreparedRecords`; a label that is none of the classes.
    """

    def __init__(
        self,
        records: Any,
        prepare: Callable[[Any], torch.Tensor] | None = None,
        label2id: Mapping[str, int] = ENTAILMENT,
        *,
        labelled: bool = True,
        **options: Any,
    ):
        self.label2id, self.labelled = dict(label2id), labelled
        super().__init__(records, prepare, **options)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """A hypothesis, an identity and a label."""
        check_record(record, row, required=("hypothesis", "image_id", *(("label",) if self.labelled else ())))
        if self.labelled and record["label"] not in tuple(self.label2id):
            known = ", ".join(map(str, self.label2id))
            raise RecordError(row, "label", f"{record['label']!r} is no class", f"The classes are: {known}.")

    def content(self, record: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The hypothesis and its class."""
        return _labelled(record["hypothesis"], self.label2id[record["label"]] if self.labelled else None)


class TaskCollator(Collator):
    """Items of one of these tasks to the arguments of its model.

    Args:
        processor, augment, seed, max_length: as of `Collator`.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `input_ids` and `attention_mask` int64 [B, L]; `pixel_values` float [B, 3, H, W], of items with two pictures [B, 2, 3, H, W],
            and where the processor or `augment` makes it `pixel_mask` without the 3; or regions. `labels` where the items have them:
            int64 [B], or float [B, K] scores.

        Raises:
            ValueError: no items, pictures of several sizes with an `augment` that needs one.
        """
        kind, generator = self._kind(items), self._generator(items)
        if kind == "images":
            images = [picture for item in items for picture in item["images"]]
            encoded = self._images(images, kind, generator)
            batch = {name: values.unflatten(0, (len(items), -1)) for name, values in encoded.items()}
        else:
            batch = self._images([item[kind] for item in items], kind, generator)
        batch |= self._texts([item["text"] for item in items])
        if "labels" in items[0]:
            batch["labels"] = torch.stack([torch.as_tensor(item["labels"]) for item in items])
        return batch


class WrittenAnswerCollator(TaskCollator):
    """Items of `WrittenAnswers` to the arguments of a model that writes.

    Args:
        processor, augment, seed, max_length: as of `Collator`; the processor has `encode_answers`.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            As of `TaskCollator`; and of all A answers, one question after the other, `answer_ids` and `answer_mask` int64 [A, La],
            `answer_weights` float32 [A] and `answer_rows` int64 [A], the question of each.

        Raises:
            ValueError: as of `TaskCollator`; an answer that is too long.
        """
        batch = super().__call__(items)
        batch |= self.processor.encode_answers([answer for item in items for answer in item["answers"]])
        batch["answer_weights"] = torch.cat([item["answer_weights"] for item in items])
        counts = torch.tensor([len(item["answers"]) for item in items])
        batch["answer_rows"] = torch.arange(len(items)).repeat_interleave(counts)
        return batch


def _labelled(text: str, label: int | None) -> dict[str, Any]:
    return {"text": text} if label is None else {"text": text, "labels": label}


def _check_answers(answers: Any, row: int) -> None:
    """Raise a RecordError unless these are a list, perhaps empty, of {"answer": text, "score": 0 to 1}."""
    remedy = "Write answers as [{'answer': 'yes', 'score': 1.0}, ...], or an empty list."
    if not isinstance(answers, list | tuple):
        raise RecordError(row, "answers", f"{answers!r:.80} is no list of answers", remedy)
    for number, one in enumerate(answers):
        if not isinstance(one, Mapping) or not isinstance(one.get("answer"), str):
            raise RecordError(row, "answers", f"answer {number} is {one!r:.80}", remedy)
        score = one.get("score")
        if not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 1:
            raise RecordError(row, "answers", f"the score of answer {number} is {score!r}, not from 0 to 1", remedy)
