"""Answers of VQA: their normalisation, the scores that annotators give them, and the vocabulary that a classifier chooses from.

VQA: Antol et al. (https://arxiv.org/abs/1505.00468); the normalisation is that of the task's official evaluation, in the form in which
Pythia and ViLT apply it to the majority answers.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

Answers = Sequence[Mapping[str, Any]]  # [{"answer": str, "score": float}]

MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the released code passes a flag, whose value is 32, where the number of replacements is expected
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
# The official table, but for entries that change nothing and four that start with a capital I, which no lower-case word meets.
# fmt: off
CONTRACTIONS = dict(pair.split(":") for pair in """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't
hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've
it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've
there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll
theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't
whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's whereve:where've
whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's
wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
you'dve:you'd've youll:you'll youre:you're youve:you've
""".split())
# fmt: on


@lru_cache(maxsize=1 << 16)  # millions of answers are few thousand different ones
def normalize_answer(answer: str) -> str:
    """The form in which answers are compared: no marks, lower case, digits for numbers, no articles, contractions with apostrophes.

    >>> normalize_answer("The 2 dogs.")
    '2 dogs'
    """
    words = without_marks(answer).lower().split()
    words = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def without_marks(answer: str) -> str:
    """An answer without marks and without periods that no digit follows, its case and its words as they are.

    >>> without_marks("10:30, the U.S.")
    '10:30 the US'
    """
    # a mark that touches a space stands between words already; one number with a comma lets all marks of an answer vanish
    digits = DIGIT_COMMA_DIGIT.search(answer) is not None
    text = answer
    for mark in MARKS:
        joined = digits or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if joined else " ")
    return PERIOD.sub("", text, count=PERIODS)


def compared_forms(answer: str, annotators: Sequence[str]) -> tuple[str, list[str]]:
    """A model's answer to a question and its annotators' answers, in the forms in which the task's official program compares them.

    The answer is normalised wholly; the annotators' lose their marks alone, and only where they are not all the same. An annotator's
    "a dog" is thus met by no answer, each of which has lost its article.

    >>> compared_forms("The dog", ["a dog.", "dog."])
    ('dog', ['a dog', 'dog'])
    """
    normal = normalize_answer(re.sub(r"[\n\t]", " ", answer).strip())
    return normal, [without_marks(one) for one in annotators] if len(set(annotators)) > 1 else list(annotators)


def vqa_rule(count: int) -> float:
    """The score of an answer that `count` of ten annotators gave, as the task defines it: min(count / 3, 1)."""
    return min(count / 3, 1.0)


def rounded_rule(count: int) -> float:
    """The score in the targets of Bottom-Up-Top-Down, Pythia and ViLT: 0, 0.3, 0.6, 0.9, and 1 from four annotators on."""
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(count, 4)]


def scored(given: Iterable[str], rule: Callable[[int], float] = vqa_rule) -> list[dict[str, str | float]]:
    """The distinct answers of a question's annotators, in the order of their first, as a record's `answers`.

    Args:
        given: an answer of each annotator, normalised or not.
        rule: annotators who agree -> score.
    """
    return [{"answer": answer, "score": rule(count)} for answer, count in Counter(given).items()]


def majority_answers(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The answer that most annotators of each record gave: its `majority_answer`, else the best scored, the first of equals.

    Records without any answer are passed over. Rows are read as they come: give them without their pictures.
    """
    # row by row, `datasets` takes ten times as long
    for record in records.to_list() if hasattr(records, "to_list") else records:
        answer = record.get("majority_answer")
        if answer is None and record["answers"]:
            answer = max(record["answers"], key=lambda one: one["score"])["answer"]
        if answer is not None:
            yield answer


def answer_vocabulary(answers: Iterable[str], minimum: int = 9, most: int | None = None) -> dict[str, int]:
    """The answers to choose from, with their ids, as `label2id` of a configuration.

    Of the normalised majority answers of VQA v2's train and val, in that order, those seen nine times are the 3,129 that
    published models have.

    Args:
        answers: one of each question, e.g. `majority_answers`.
        minimum: how often an answer is seen at least.
        most: keep the most frequent, of equals the first; all if not given.

    Returns:
        Answer -> id, ids in the order of the first appearance.

    Raises:
        ValueError: no answer is left.
    """
    counts = Counter(answers)
    kept = {answer for answer, count in counts.most_common(most) if count >= minimum}
    if not kept:
        frequent = ", ".join(f"{answer!r} {count} times" for answer, count in counts.most_common(3)) or "no answers"
        raise ValueError(f"no answer is seen {minimum} times (most frequent: {frequent}). Lower the minimum.")
    return {answer: label for label, answer in enumerate(answer for answer in counts if answer in kept)}


def has_known_answer(answers: Answers, label2id: Mapping[str, int]) -> bool:
    """Whether an answer of a question that scores is in the vocabulary."""
    return any(one["answer"] in label2id and one["score"] > 0 for one in answers)


def share_without_known_answer(answers: Iterable[Answers], label2id: Mapping[str, int]) -> float:
    """Share of questions, by their `answers`, at which a model of this vocabulary cannot score, from 0 to 1; 0 of no question."""
    known = [has_known_answer(one, label2id) for one in answers]
    return known.count(False) / max(len(known), 1)


def target_scores(answers: Answers, label2id: Mapping[str, int]) -> list[float]:
    """The target of a classifier: K scores, 0 of every answer that is not given; of an answer given twice the last counts."""
    scores = [0.0] * len(label2id)
    for one in answers:
        if one["answer"] in label2id:
            scores[label2id[one["answer"]]] = float(one["score"])
    return scores
