"""Answers of VQA: the worked examples of their normal form, scores by count, vocabularies, targets."""

import pytest

from hf_vlp.data.answers import (
    CONTRACTIONS,
    answer_vocabulary,
    has_known_answer,
    majority_answers,
    normalize_answer,
    rounded_rule,
    scored,
    share_without_known_answer,
    target_scores,
    vqa_rule,
)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("The Cat", "cat"),
        ("two dogs.", "2 dogs"),
        ("none", "0"),
        ("black/white", "black white"),  # a mark between letters parts them
        ("black /white", "black white"),  # one beside a space is dropped
        ("a/b /c", "ab c"),  # and then everywhere in the answer
        ("1,000", "1000"),
        ("t-shirt 1,000", "tshirt 1000"),  # a number with a comma drops all marks
        ("a,b", "b"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("10:30", "10:30"),
        ("$5.00", "$5.00"),
        ("dont", "don't"),
        ("wed've", "we'd've"),
        ("wed", "wed"),
        ("Im", "im"),  # capitals are lost before contractions are looked up
        ("..", ""),
        ("a" + 40 * ".", "a" + 8 * "."),  # 32 periods are dropped, no more
        ("", ""),
    ],
)
def test_the_normal_form_of_an_answer(answer, normal):
    assert normalize_answer(answer) == normal


def test_contractions_lead_to_what_is_normal_already():
    assert len(CONTRACTIONS) == 114 and all(word == word.lower() for word in CONTRACTIONS)
    for whole in CONTRACTIONS.values():
        assert normalize_answer(whole) == whole
    for word, whole in CONTRACTIONS.items():
        assert normalize_answer(word) == whole != word
    assert normalize_answer("xyz've") == "xyz've"  # no entry, no change


def test_scores_by_the_number_of_annotators():
    assert [rounded_rule(count) for count in range(6)] == [0, 0.3, 0.6, 0.9, 1, 1]
    assert [vqa_rule(count) for count in range(6)] == [0, 1 / 3, 2 / 3, 1, 1, 1]


def test_answers_keep_the_order_of_the_first_annotator():
    given = ["red", "blue", "red", "green", "red", "blue", "red"]
    assert scored(given) == [
        {"answer": "red", "score": 1.0},
        {"answer": "blue", "score": 2 / 3},
        {"answer": "green", "score": 1 / 3},
    ]
    assert [one["score"] for one in scored(given, rounded_rule)] == [1.0, 0.6, 0.3]
    assert scored([]) == []


def test_a_vocabulary_numbers_answers_by_their_first_appearance():
    answers = ["b", "a", "c", "a", "b", "a", "d", "c"]
    assert answer_vocabulary(answers, minimum=2) == {"b": 0, "a": 1, "c": 2}
    assert answer_vocabulary(answers, minimum=3) == {"a": 0}
    assert answer_vocabulary(answers, minimum=1, most=2) == {"b": 0, "a": 1}  # b and c are equal, b is first
    assert answer_vocabulary(answers, minimum=1) == {"b": 0, "a": 1, "c": 2, "d": 3}
    with pytest.raises(ValueError, match="seen 9 times.*'a' 3 times.*Lower the minimum"):
        answer_vocabulary(answers)
    with pytest.raises(ValueError, match="no answers"):
        answer_vocabulary([])


def test_the_majority_answer_of_records():
    one = [{"answer": "x", "score": 0.3}, {"answer": "y", "score": 1.0}, {"answer": "z", "score": 1.0}]
    records = [{"answers": one}, {"answers": one, "majority_answer": "z"}, {"answers": []}]
    assert list(majority_answers(records)) == ["y", "z"]


def test_answers_outside_the_vocabulary_are_reported():
    label2id = {"red": 0, "blue": 1}
    questions = [
        [{"answer": "red", "score": 1.0}],
        [{"answer": "green", "score": 1.0}, {"answer": "blue", "score": 0.3}],
        [{"answer": "green", "score": 1.0}],
        [{"answer": "blue", "score": 0.0}],  # no annotator gave it
        [],
    ]
    assert [has_known_answer(answers, label2id) for answers in questions] == [True, True, False, False, False]
    assert share_without_known_answer(questions, label2id) == 3 / 5
    assert share_without_known_answer(questions[:2], label2id) == 0
    assert share_without_known_answer([], label2id) == 0


def test_targets_hold_the_last_score_of_an_answer():
    label2id = {"red": 0, "blue": 1, "two": 2}
    answers = [{"answer": "two", "score": 0.3}, {"answer": "green", "score": 1.0}, {"answer": "two", "score": 0.9}]
    assert target_scores(answers, label2id) == [0, 0, 0.9]
    assert target_scores([], label2id) == [0, 0, 0]
