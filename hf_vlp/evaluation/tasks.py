"""Downstream tasks of a model that chooses one of K answers: questions about images, statements about two, entailment.

VQA v2: Goyal et al. 2017, https://arxiv.org/abs/1612.00837. NLVR2: Suhr et al. 2019, https://arxiv.org/abs/1811.00491.
SNLI-VE: Xie et al. 2019, https://arxiv.org/abs/1901.06706. Beside every accuracy stands that of the best constant answer, which
a model that ignores its input can reach.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_vlp.evaluation.answers import consistent, hits, means_by_kind, sentence_of, submission
from hf_vlp.evaluation.encoding import encode, evaluating, image_inputs, text_inputs, without_pictures
from hf_vlp.evaluation.report import Report

KINDS = ("answer_type", "question_type")  # columns that say what kind of question a record asks


@dataclass
class TaskReport(Report):
    """What an evaluation of a task found.

    metrics: in percent; `accuracy`, `majority` (of the best constant answer), `<kind>/accuracy` and `<kind>/majority` of each kind
    of sample, and what a task has besides.
    counts: `records`, and what a task has besides. protocol: in words, what was measured.
    logits: [N, K] float32. answers: [N], the one chosen for each record.
    """

    logits: torch.Tensor
    answers: list[str]


def answer_logits(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    column: str,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Logits of a model for the text and the image, or the two images, of each record.

    Under several processes (`torch.distributed`) each reads its part, and all get the same. Texts of similar length are read
    together.

    Args:
        model: its forward takes the processor's batch and gives `logits` [B, K]. Evaluated in evaluation mode, returned in the
            mode it was in.
        processor: of the model; called for texts and for images, see `image_inputs`.
        records: rows with `column` and `image`, `images` (two) or `regions`.
        column: of the text.
        device, accelerator, autocast, progress: as for `evaluate_retrieval`.

    Returns:
        [N, K] float32 on the CPU.

    Raises:
        ValueError: no records, or a row whose text is missing or empty, with its position.
        PictureError: a picture does not decode, with its row's position.
    """
    texts = [record.get(column) for record in without_pictures(records)]
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"record {row} has no {column} ({text!r}). An evaluation leaves nothing out: repair or remove the row."
            )

    def prepare(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {**text_inputs(processor, [texts[row] for row in rows]), **image_inputs(processor, records, rows)}

    with evaluating(model, accelerator) as inner:
        return encode(
            len(texts),
            prepare,
            lambda **batch: inner(**batch).logits,
            batch_size=batch_size,
            device=torch.device(device) if device is not None else next(inner.parameters()).device,
            autocast=autocast,
            order=sorted(range(len(texts)), key=lambda row: len(texts[row])),
            name="records",
            progress=progress,
        )


def evaluate_vqa(
    model: torch.nn.Module, processor: Any, records: Any, id2label: Mapping[int, str] | None = None, **options
) -> TaskReport:
    """Answer questions; the accuracy is the mean score of the answers.

    Questions without `answers`, as of a test split, are answered but not scored. An answer that the model does not know cannot
    be given: `unanswerable` is the share of scored questions that have no other.

    Args:
        model, processor, options: as for `answer_logits`.
        records: rows with `question`, `answers` ([{"answer", "score"}], may be empty), optionally `answer_type` or
            `question_type`, by which the accuracy is told apart.
        id2label: the answers by their number; of the model's configuration if not given.

    Raises:
        ValueError: as `answer_logits`; or a model of another number of answers.
    """
    id2label = _labels(model, id2label, options)
    logits = answer_logits(model, processor, records, "question", **options)
    _require_classes(logits, id2label)
    chosen = [id2label[label] for label in logits.argmax(dim=1).tolist()]
    plain = list(without_pictures(records))
    given = [{one["answer"]: float(one["score"]) for one in record.get("answers") or ()} for record in plain]
    rows = [row for row, answers in enumerate(given) if answers]
    counts = {"records": len(chosen), "scored": len(rows), "answers": len(id2label)}
    if not rows:
        protocol = f"{len(rows):,} of {len(chosen):,} questions have answers: nothing is measured"
        return TaskReport({}, counts, protocol, logits, chosen)
    scores = torch.tensor([given[row].get(chosen[row], 0.0) for row in rows], dtype=torch.float64)
    column = next((name for name in KINDS if any(plain[row].get(name) for row in rows)), None)
    kinds = [str(plain[row].get(column) or "without a kind") for row in rows] if column else None
    known = set(id2label.values())
    lost = [not any(score > 0 and answer in known for answer, score in given[row].items()) for row in rows]
    metrics = _accuracies(scores, kinds, [given[row] for row in rows])
    metrics["unanswerable"] = 100.0 * sum(lost) / len(rows)
    protocol = f"mean score of the best of {len(id2label):,} answers to {len(rows):,} questions"
    return TaskReport(metrics, counts, protocol, logits, chosen)


def vqa_submission(report: TaskReport, records: Any, id2label: Mapping[int, str]) -> list[dict[str, int | str]]:
    """What VQA's test server reads, for `write_submission`.

    Args:
        report: of `evaluate_vqa` on these records, which have `question_id`.
        id2label: the answers by their number.

    Raises:
        ValueError: a record without `question_id`, or one that stands twice.
    """
    ids = [record.get("question_id") for record in without_pictures(records)]
    if None in ids:
        raise ValueError(f"record {ids.index(None)} has no question_id, by which the test server knows questions.")
    return submission(ids, report.logits, id2label)


def evaluate_nlvr2(model: torch.nn.Module, processor: Any, records: Any, **options) -> TaskReport:
    """Judge statements about two images; `consistency` is the share of statements judged right with all their pairs of images.

    Args:
        model: gives logits of false and of true. processor, options: as for `answer_logits`.
        records: rows with `images` (two), `statement`, `label` (1 or True where it is true), optionally `identifier` on every row,
            without which there is no consistency.

    Raises:
        ValueError: as `answer_logits`; a row without two images or with another label, with its position; a model of other
            classes than two.
    """
    plain = list(without_pictures(records))
    labels = [_truth(record.get("label"), row) for row, record in enumerate(plain)]
    if "images" not in (getattr(records, "column_names", None) or records[0]):
        raise ValueError("the records have no images: each statement is about two, in the column `images`.")
    logits = answer_logits(model, processor, records, "statement", **options)
    _require_classes(logits, {0: "false", 1: "true"})
    right = hits(logits, torch.tensor(labels))
    metrics = _accuracies(right, None, [{label: 1.0} for label in labels])
    counts = {"records": len(labels)}
    protocol = f"{len(labels):,} statements about two images"
    if all(record.get("identifier") for record in plain):
        whole = consistent(right, [sentence_of(record["identifier"]) for record in plain])
        metrics["consistency"] = 100.0 * float(whole.double().mean())
        counts["statements"] = len(whole)
    return TaskReport(metrics, counts, protocol, logits, [("false", "true")[one] for one in logits.argmax(dim=1)])


def evaluate_entailment(
    model: torch.nn.Module, processor: Any, records: Any, id2label: Mapping[int, str] | None = None, **options
) -> TaskReport:
    """Tell whether an image entails a hypothesis, contradicts it or neither; `<class>/accuracy` is the share right of each class.

    Args:
        model, processor, options: as for `answer_logits`.
        records: rows with `image`, `hypothesis`, `label` (one of the model's classes).
        id2label: the classes by their number; of the model's configuration if not given.

    Raises:
        ValueError: as `answer_logits`; or a label that is none of the classes, with its row's position.
    """
    id2label = _labels(model, id2label, options)
    label2id = {label: number for number, label in id2label.items()}
    labels = [record.get("label") for record in without_pictures(records)]
    for row, label in enumerate(labels):
        if label not in label2id:
            raise ValueError(f"record {row} has the label {label!r}; the model knows {', '.join(label2id)}.")
    logits = answer_logits(model, processor, records, "hypothesis", **options)
    _require_classes(logits, id2label)
    right = hits(logits, torch.tensor([label2id[label] for label in labels]))
    metrics = _accuracies(right, None, [{label: 1.0} for label in labels])
    metrics |= {f"{label}/accuracy": 100.0 * value for label, value in means_by_kind(right, labels).items()}
    counts = {"records": len(labels)} | {f"records/{label}": number for label, number in Counter(labels).items()}
    protocol = f"{len(labels):,} hypotheses about images"
    chosen = [id2label[number] for number in logits.argmax(dim=1).tolist()]
    return TaskReport(metrics, counts, protocol, logits, chosen)


def _accuracies(
    scores: torch.Tensor, kinds: Sequence[str] | None, given: Sequence[Mapping[Any, float]]
) -> dict[str, float]:
    """Accuracy and that of the best constant answer, in percent, over all and by kind.

    Args:
        scores: [N], of the answers chosen. kinds: [N] or None. given: [N], the score of each answer.
    """
    metrics = {"accuracy": 100.0 * float(scores.double().mean()), "majority": best_constant(given)}
    for kind, value in means_by_kind(scores, kinds).items() if kinds else ():
        of_kind = [answers for answers, other in zip(given, kinds) if other == kind]
        metrics |= {f"{kind}/accuracy": 100.0 * value, f"{kind}/majority": best_constant(of_kind)}
    return metrics


def best_constant(given: Sequence[Mapping[Any, float]]) -> float:
    """Percent that the best constant answer scores; `given`: of each of N samples answer -> score."""
    totals: Counter = Counter()
    for answers in given:
        totals.update(answers)
    return 100.0 * max(totals.values(), default=0.0) / max(1, len(given))


def _labels(model: torch.nn.Module, id2label: Mapping[int, str] | None, options: Mapping[str, Any]) -> dict[int, str]:
    if id2label is None:
        accelerator = options.get("accelerator")
        id2label = (model if accelerator is None else accelerator.unwrap_model(model)).config.id2label
    return {int(number): label for number, label in id2label.items()}


def _require_classes(logits: torch.Tensor, id2label: Mapping[int, str]) -> None:
    if logits.shape[1] != len(id2label):
        raise ValueError(
            f"the model chooses from {logits.shape[1]} answers, {len(id2label)} are named. Give id2label in its configuration."
        )


def _truth(label: Any, row: int) -> int:
    if label not in (0, 1):  # True and False are equal to these
        raise ValueError(
            f"record {row} has the label {label!r}; give 1 (or True) for a true statement, 0 for a false one."
        )
    return int(label)
