"""Metrics of answers: hand-worked numbers, brute force over annotators, the file of a test server."""

import itertools
import json
import random

import pytest
import torch

from hf_vlp.data.answers import compared_forms
from hf_vlp.evaluation.answers import (
    annotator_accuracy,
    consistent,
    hits,
    means_by_kind,
    sentence_of,
    soft_scores,
    submission,
    write_submission,
)


def test_the_score_of_the_chosen_answer():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0], [5.0, 5.0, 0.0]])
    targets = torch.tensor([[0.0, 0.3, 1.0], [0.9, 0.0, 0.0], [0.6, 1.0, 0.0]])
    torch.testing.assert_close(soft_scores(logits, targets), torch.tensor([0.3, 0.9, 0.6]))
    assert soft_scores(-logits, targets).tolist() != soft_scores(logits, targets).tolist()
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(3, 2\)"):
        soft_scores(logits, targets[:, :2])


def test_the_official_accuracy_is_the_mean_over_nine_of_ten_annotators():
    draw = random.Random(0)
    answers, annotators = [], []
    for _ in range(50):
        annotators.append([draw.choice("abc") for _ in range(10)])
        answers.append(draw.choice("abcd"))

    def by_hand(answer, given):
        parts = [min(nine.count(answer) / 3, 1) for nine in itertools.combinations(given, 9)]
        return sum(parts) / len(parts)

    expected = torch.tensor([by_hand(*one) for one in zip(answers, annotators)], dtype=torch.float64)
    torch.testing.assert_close(annotator_accuracy(answers, annotators), expected)
    # three of ten agree: 0.9, where the plain rule gives 1
    assert annotator_accuracy(["a"], [["a"] * 3 + ["b"] * 7]).item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="question 1 has 1 annotators"):
        annotator_accuracy(["a", "a"], [["a", "b"], ["a"]])
    with pytest.raises(ValueError):
        annotator_accuracy(["a"], [])


@pytest.mark.parametrize(
    ("answer", "given", "accuracy"),
    [
        ("Yes.\n", ["yes"] * 10, 1.0),
        ("the dog", ["a dog"] * 9 + ["cat"], 0.0),  # annotators keep their articles
        ("the dog", ["dog."] * 9 + ["cat"], 1.0),  # but not their marks,
        ("the dog", ["dog."] * 10, 0.0),  # unless they agree
        ("yes", ["Yes"] * 9 + ["no"], 0.0),
        ("red\t?", ["red ?"] * 9 + ["blue"], 0.0),  # a mark beside a space leaves the space, which an answer loses
        ("two", ["2"] * 3 + ["two"] * 7, 0.9),
    ],
)
def test_answers_as_written_are_compared_as_the_official_program_does(answer, given, accuracy):
    form, forms = compared_forms(answer, given)
    assert annotator_accuracy([form], [forms]).item() == pytest.approx(accuracy)


def test_hits_pass_over_what_is_not_counted():
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert hits(logits, torch.tensor([[1, 1], [-100, 1]])).tolist() == [True, False, True]
    assert hits(logits, torch.full((2, 2), -100)).tolist() == []
    with pytest.raises(ValueError, match="do not fit"):
        hits(logits, torch.zeros(2, dtype=torch.int64))


def test_a_sentence_is_right_if_it_is_with_all_its_pairs():
    identifiers = ["dev-7-0-0", "dev-7-1-0", "dev-7-0-1", "dev-8-0-0"]
    assert [sentence_of(one) for one in identifiers] == ["dev-7-0", "dev-7-0", "dev-7-1", "dev-8-0"]
    right = torch.tensor([True, False, True, True])
    assert consistent(right, [sentence_of(one) for one in identifiers]).tolist() == [False, True, True]
    assert consistent(torch.ones(4, dtype=torch.bool), [0, 0, 1, 2]).tolist() == [True, True, True]
    with pytest.raises(ValueError, match="'dev-7-0' is not of the form"):
        sentence_of("dev-7-0")
    with pytest.raises(ValueError):
        consistent(right, identifiers[:2])


def test_means_by_kind():
    values = torch.tensor([1.0, 0.0, 0.5, 1.0])
    assert means_by_kind(values, ["other", "number", "other", "number"]) == {"number": 0.5, "other": 0.75}
    with pytest.raises(ValueError):
        means_by_kind(values, ["other"])


def test_a_submission_is_written_whole(tmp_path):
    entries = submission([7, 3], torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]), {0: "yes", 1: "no"})
    assert entries == [{"question_id": 7, "answer": "no"}, {"question_id": 3, "answer": "unknown"}]
    path = write_submission(tmp_path / "deep" / "result.json", entries)
    assert json.loads(path.read_text()) == entries
    with pytest.raises(TypeError):
        write_submission(path, [{"question_id": object()}])
    assert json.loads(path.read_text()) == entries and len(list(path.parent.iterdir())) == 1
    with pytest.raises(ValueError, match="question 7 was answered twice"):
        submission([7, 7], torch.zeros(2, 3), {})
    with pytest.raises(ValueError, match="1 question ids and 2 rows"):
        submission([7], torch.zeros(2, 3), {})
