"""Questions, statements and hypotheses judged by a model: what is counted, and what bad records get."""

from types import SimpleNamespace

import pytest
import torch

from hf_vlp.data.answers import target_scores
from hf_vlp.evaluation.answers import soft_scores
from hf_vlp.evaluation.encoding import PictureError
from hf_vlp.evaluation.tasks import (
    answer_logits,
    best_constant,
    evaluate_entailment,
    evaluate_nlvr2,
    evaluate_vqa,
    vqa_submission,
)

ANSWERS = {0: "cat", 1: "dog", 2: "2", 3: "yes"}


class Chooser(torch.nn.Module):
    """Chooses the class that the text's last number and the images add up to; forgets nothing of what it was handed."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(classes))
        self.config = SimpleNamespace(id2label=dict(list(ANSWERS.items())[:classes]))
        self.shapes = []

    def forward(self, input_ids, attention_mask, pixel_values, pixel_mask=None):
        assert not self.training and torch.equal(attention_mask, (input_ids > 0).long())
        self.shapes.append((tuple(input_ids.shape), tuple(pixel_values.shape)))
        last = input_ids[torch.arange(len(input_ids)), attention_mask.sum(dim=1) - 1] - 1
        chosen = last + pixel_values.sum(dim=1)
        return SimpleNamespace(logits=self.weight[chosen % len(self.weight)])


class Numbers:
    """Texts of numbers (one more, as 0 fills up); an image is a number, two are a pair of them."""

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": torch.tensor(images).reshape(len(images), -1), "other": None}
        rows = [torch.tensor([int(word) + 1 for word in line.split()]) for line in text]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def one(answer, score=1.0):
    return {"answer": answer, "score": score}


def questions():
    """Chosen: cat, dog, 2, yes, cat."""
    return [
        {"image": 0, "question": "9 9 0", "answers": [one("cat"), one("dog", 0.3)], "answer_type": "other"},
        {"image": 1, "question": "0", "answers": [one("cat", 0.6), one("dog", 0.9)], "answer_type": "other"},
        {"image": 1, "question": "1", "answers": [one("3")], "answer_type": "number"},
        {"image": 1, "question": "8 2", "answers": [one("yes"), one("no", 0.3)], "answer_type": "yes/no"},
        {"image": 2, "question": "2", "answers": [one("cat", 0.0), one("bird")], "answer_type": "other"},
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_questions_are_scored_by_what_annotators_said(batch_size):
    model = Chooser().train()
    report = evaluate_vqa(model, Numbers(), questions(), batch_size=batch_size, progress=False)
    assert model.training and report.answers == ["cat", "dog", "2", "yes", "cat"]
    targets = torch.tensor(
        [target_scores(row["answers"], {answer: number for number, answer in ANSWERS.items()}) for row in questions()]
    )
    assert report.metrics["accuracy"] == pytest.approx(100 * float(soft_scores(report.logits, targets).mean()))
    assert report.metrics == pytest.approx(
        {
            "accuracy": 100 * (1 + 0.9 + 0 + 1 + 0) / 5,
            "majority": 100 * 1.6 / 5,  # cat: 1 + 0.6
            "number/accuracy": 0.0,
            "number/majority": 100.0,
            "other/accuracy": 100 * 1.9 / 3,
            "other/majority": 100 * 1.6 / 3,
            "yes/no/accuracy": 100.0,
            "yes/no/majority": 100.0,
            "unanswerable": 40.0,  # 3 and bird
        }
    )
    assert report.counts == {"records": 5, "scored": 5, "answers": 4}
    lines = report.table().splitlines()
    assert lines[1].split() == ["all", "58.0", "%", "32.0", "%", "40.0", "%"] and lines[4].startswith("yes/no")
    wrong = [row | {"image": row["image"] + 1} for row in questions()]
    assert evaluate_vqa(Chooser(), Numbers(), wrong, progress=False).metrics["accuracy"] < 10


def test_questions_without_answers_are_answered_and_not_scored():
    rows = [row | {"question_id": 50 - number} for number, row in enumerate(questions())]
    rows[0] = rows[0] | {"answers": []}
    report = evaluate_vqa(Chooser(), Numbers(), rows, progress=False)
    assert report.counts["scored"] == 4 and report.metrics["accuracy"] == pytest.approx(100 * 1.9 / 4)
    bare = [{name: row[name] for name in ("image", "question", "question_id")} for row in rows]
    report = evaluate_vqa(Chooser(), Numbers(), bare, progress=False)
    assert report.metrics == {} and "nothing is measured" in report.table()
    entries = vqa_submission(report, bare, ANSWERS)
    assert entries[1] == {"question_id": 49, "answer": "dog"} and len(entries) == 5
    with pytest.raises(ValueError, match="record 2 has no question_id"):
        vqa_submission(report, [*bare[:2], {"image": 0, "question": "1"}, *bare[3:]], ANSWERS)


def test_answers_without_kinds():
    rows = [{name: row[name] for name in ("image", "question", "answers")} for row in questions()]
    assert set(evaluate_vqa(Chooser(), Numbers(), rows, progress=False).metrics) == {
        "accuracy",
        "majority",
        "unanswerable",
    }
    with pytest.raises(ValueError, match="chooses from 3 answers, 4 are named"):
        evaluate_vqa(Chooser(3), Numbers(), rows, ANSWERS, progress=False)


def statements():
    """Judged true, true, false, false."""
    rows = [((0, 1), "0", 1), ((1, 1), "7 1", True), ((0, 0), "0", 0), ((1, 2), "3", True)]
    return [{"images": list(pair), "statement": text, "label": label} for pair, text, label in rows]


def test_statements_about_two_images():
    model = Chooser(2)
    report = evaluate_nlvr2(model, Numbers(), statements(), progress=False)
    assert report.answers == ["true", "true", "false", "false"] and model.shapes == [((4, 2), (4, 2))]
    assert report.metrics == {"accuracy": 75.0, "majority": 75.0} and report.counts == {"records": 4}
    names = ["dev-1-0-0", "dev-1-1-0", "dev-2-0-0", "dev-2-1-0"]
    named = [row | {"identifier": name} for row, name in zip(statements(), names)]
    report = evaluate_nlvr2(Chooser(2), Numbers(), named, progress=False)
    assert report.metrics["consistency"] == 50.0 and report.counts["statements"] == 2
    swapped = [named[number] | {"identifier": names[other]} for number, other in enumerate((0, 2, 1, 3))]
    assert evaluate_nlvr2(Chooser(2), Numbers(), swapped, progress=False).metrics["consistency"] == 50.0
    mixed = [named[number] | {"identifier": names[other]} for number, other in enumerate((0, 1, 3, 2))]
    mixed[3] = mixed[3] | {"label": 0}
    assert evaluate_nlvr2(Chooser(2), Numbers(), mixed, progress=False).metrics["consistency"] == 100.0


def test_statements_that_cannot_be_judged():
    rows = statements()
    with pytest.raises(PictureError, match="record 1 has 1 images where two are read"):
        evaluate_nlvr2(Chooser(2), Numbers(), [rows[0], rows[1] | {"images": [1]}], progress=False)
    with pytest.raises(ValueError, match="record 2 has the label 'maybe'"):
        evaluate_nlvr2(Chooser(2), Numbers(), [*rows[:2], rows[2] | {"label": "maybe"}], progress=False)
    with pytest.raises(ValueError, match="have no images"):
        evaluate_nlvr2(Chooser(2), Numbers(), [{"image": 1, "statement": "1", "label": 1}], progress=False)
    with pytest.raises(ValueError, match="record 0 has no statement"):
        evaluate_nlvr2(Chooser(2), Numbers(), [rows[0] | {"statement": " "}], progress=False)
    with pytest.raises(ValueError, match="no records to encode"):
        answer_logits(Chooser(), Numbers(), [], "question", progress=False)


def test_hypotheses_by_class():
    classes = {0: "contradiction", 1: "neutral", 2: "entailment"}
    labels = ["contradiction", "neutral", "neutral", "entailment", "neutral"]
    rows = [{"image": 0, "hypothesis": str(n), "label": label} for n, label in zip((0, 1, 2, 2, 1), labels)]
    report = evaluate_entailment(Chooser(3), Numbers(), rows, classes, progress=False)
    assert report.metrics == pytest.approx(
        {
            "accuracy": 80.0,
            "majority": 60.0,
            "contradiction/accuracy": 100.0,
            "entailment/accuracy": 100.0,
            "neutral/accuracy": 200 / 3,
        }
    )
    assert report.counts["records/neutral"] == 3 and report.answers[2] == "entailment"
    with pytest.raises(ValueError, match="record 0 has the label 'contradiction'; the model knows cat, dog, 2"):
        evaluate_entailment(Chooser(3), Numbers(), rows, progress=False)


def test_the_best_constant_answer():
    assert best_constant([{"a": 1.0}, {"b": 0.3, "a": 0.3}, {"b": 0.9}]) == pytest.approx(100 * 1.3 / 3)
    assert best_constant([]) == 0.0
