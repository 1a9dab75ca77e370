"""What is counted of answers and statements: VQA's scores, accuracy, NLVR2's consistency, and the file of a test server.

Everything is given for each sample, [N]; the mean is the caller's, so that batches and processes of different size weigh as they should.

VQA v2: Goyal et al. (https://arxiv.org/abs/1612.00837); the accuracy over ten annotators: Antol et al. (https://arxiv.org/abs/1505.00468),
section 3. NLVR2: Suhr et al. (https://arxiv.org/abs/1811.00491), section 5.
"""

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hf_vlp.files import write_text

IGNORED = -100
UNKNOWN = "unknown"  # what a test server is told where an id has no answer


def soft_scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The soft score of the answer that is chosen, of two equally good ones the first.

    Args:
        logits: [N, K]. targets: [N, K], the score of each answer.

    Returns:
        [N] float.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.shape != targets.shape or logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be [N, K].")
    return targets.float().gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def annotator_accuracy(answers: Sequence[str], annotators: Sequence[Sequence[str]]) -> torch.Tensor:
    """The official accuracy: the mean over all choices of nine of the ten annotators of min(those who agree / 3, 1).

    Args:
        answers: N answers, and `annotators`: of each question what its annotators answered; both in the form in which the
            official program compares them (`hf_vlp.data.answers.compared_forms`).

    Returns:
        [N] float64.

    Raises:
        ValueError: not as many questions as answers, or a question with fewer than two annotators, by its position.
    """
    scores = []
    for position, (answer, given) in enumerate(zip(answers, annotators, strict=True)):
        if len(given) < 2:
            raise ValueError(f"question {position} has {len(given)} annotators: agreement needs two at least.")
        agreeing = sum(other == answer for other in given)
        # left out one who agrees, or one who does not
        parts = agreeing * min((agreeing - 1) / 3, 1.0) + (len(given) - agreeing) * min(agreeing / 3, 1.0)
        scores.append(parts / len(given))
    return torch.tensor(scores, dtype=torch.float64)


def hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the best class is the label, where there is one.

    Args:
        logits: [..., K]. labels: [...] int64, -100 where nothing is counted.

    Returns:
        [M] bool, of the M places that count.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: give [..., K], [...]."
        )
    counted = labels != IGNORED
    return logits.argmax(dim=-1)[counted] == labels[counted]


def sentence_of(identifier: str) -> str:
    """The sentence that an NLVR2 identifier `split-set-pair-sentence` belongs to: the same words stand over several pairs of images.

    Raises:
        ValueError: not four parts.
    """
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"the identifier {identifier!r} is not of the form split-set-pair-sentence, e.g. dev-850-0-1.")
    return "-".join((parts[0], parts[1], parts[3]))


def consistent(right: torch.Tensor | Sequence[bool], groups: Sequence[Hashable]) -> torch.Tensor:
    """Whether a whole group is right; NLVR2's consistency is the mean with `groups = map(sentence_of, identifiers)`.

    Args:
        right: [N] bool. groups: N names of the group of each sample.

    Returns:
        [G] bool, groups in the order of their first sample.

    Raises:
        ValueError: not as many groups as samples.
    """
    whole: dict[Hashable, bool] = {}
    for one, group in zip(torch.as_tensor(right).tolist(), groups, strict=True):
        whole[group] = whole.get(group, True) and bool(one)
    return torch.tensor(list(whole.values()), dtype=torch.bool)


def means_by_kind(values: torch.Tensor, kinds: Iterable[str]) -> dict[str, float]:
    """Mean of the values [N] of each kind, e.g. VQA's `yes/no`, `number` and `other`; kinds in alphabetical order.

    Raises:
        ValueError: not as many kinds as values.
    """
    of_kind: dict[str, list[float]] = {}
    for value, kind in zip(values.double().tolist(), kinds, strict=True):
        of_kind.setdefault(kind, []).append(value)
    return {kind: sum(of_kind[kind]) / len(of_kind[kind]) for kind in sorted(of_kind)}


def submission(
    question_ids: Sequence[int], logits: torch.Tensor, id2label: Mapping[int, str]
) -> list[dict[str, int | str]]:
    """What VQA's test server reads: of each question its id and the best answer, `unknown` where the id has none.

    Args:
        question_ids: N ids, each once. logits: [N, K].
        id2label: answers by their number, of the model's configuration.

    Raises:
        ValueError: not as many ids as rows, or an id that stands twice.
    """
    if len(question_ids) != len(logits):
        raise ValueError(f"{len(question_ids)} question ids and {len(logits)} rows of logits: give one id a row.")
    answers: dict[int, str] = {}
    for question, label in zip(question_ids, logits.argmax(dim=1).tolist()):
        if int(question) in answers:
            raise ValueError(f"question {question} was answered twice: give each question once.")
        answers[int(question)] = id2label.get(label, UNKNOWN)
    return [{"question_id": question, "answer": answer} for question, answer in answers.items()]


def write_submission(path: str | os.PathLike, entries: Sequence[Mapping[str, int | str]]) -> Path:
    """Write the entries of `submission` as one JSON list, whole or not at all."""
    return write_text(path, json.dumps(list(entries)))
