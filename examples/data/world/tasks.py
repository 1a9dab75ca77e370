"""What is said, asked and claimed of scenes: one function a task, each yields records whose pictures are still scenes.

No text tells its answer: the text is drawn first, its truth second, and then scenes until they fit; a statement about two pictures
and a hypothesis come with every label equally often. In `test_new` every text that is judged names a held-out concept.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from world.scene import COLORS, KIND_OF, KINDS, LAYOUTS, POSITIONS, SIZES, Claim, Scene, Thing, Wish, World

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
# rows and columns from the other object
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
SIDES = {
    "on the left": lambda scene, thing: thing.column == 0,
    "on the right": lambda scene, thing: thing.column == scene.layout.columns - 1,
    "at the top": lambda scene, thing: thing.row == 0,
    "at the bottom": lambda scene, thing: thing.row == scene.layout.rows - 1,
}
# what no picture shows: whose it is, how it smells, what happens on another day
HIDDEN = (
    "Anna owns",
    "Tom drew yesterday",
    "will be sold tomorrow",
    "smells of soap",
    "Mia likes best",
    "arrived on Monday",
    "nobody has paid for",
    "Ben dreamt of",
)
ENTAILMENT = ("entailment", "neutral", "contradiction")
PAIRS = 4  # pairs of pictures that a statement is about; it is true of half of them
STATEMENTS = 2  # about the same pairs

Rows = Iterator[dict[str, Any]]


# ------------------------------------------------------------------------------------------------- words


def plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "sh", "ch")) else f"{word}s"


def a(words: str) -> str:
    """The words with their article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def some(number: int, word: str) -> str:
    """One is "a frog", two are "two frogs"."""
    return a(word) if number == 1 else f"{NUMBERS[number]} {plural(word)}"


def listed(parts: Sequence[str]) -> str:
    """The parts as "x", "x and y" or "x, y and z"."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


# ---------------------------------------------------------------------------------------------- captions


def captions(world: World, number: int) -> Rows:
    """Pictures with two captions: one of all that is there, one of one of its objects.

    But for training, no caption of a picture is true of another picture of the split.
    """
    said, true = set(), set()
    for index in range(number):
        while True:
            scene = world.scene()
            objects = [about_object(scene, thing) for thing in scene.things]
            texts = [about_all(scene), world.draw.choice(objects)]
            possible = {texts[0], *objects}
            if world.split == "train" or not (true.intersection(texts) or said & possible):
                break
        said.update(texts)
        true |= possible
        yield {"image_id": f"captions-{world.split}-{index:06d}", "image": scene, "captions": texts}


def about_all(scene: Scene) -> str:
    """One or two objects each with its size and place; of more, how many of each concept."""
    if len(scene.things) <= 2:
        parts = [f"{a(f'{thing.size} {thing.concept}')} at the {scene.position(thing)}" for thing in scene.things]
    else:
        concepts = dict.fromkeys(thing.concept for thing in scene.things)
        parts = [some(scene.count(concept), concept) for concept in concepts]
    return f"{listed(parts)} on {a(scene.color)} background"


def about_object(scene: Scene, thing: Thing) -> str:
    number = "one object" if len(scene.things) == 1 else some(len(scene.things), "object")
    return (
        f"{a(f'{thing.size} {thing.concept}')} at the {scene.position(thing)} of {a(scene.color)} picture with {number}"
    )


# --------------------------------------------------------------------------------------------------- VQA


def vqa(world: World, number: int) -> Rows:
    """Pictures with two questions: first yes or no, or how many; then what, where or which colour.

    In `test_new` all name a held-out concept, so there is no what and no colour, and every answer is one of training.
    """
    yes_no = [is_there, is_there_of_size, is_there_at, is_it_beside] + (
        [] if world.new else [is_there_kind, is_background]
    )
    how_many = [how_many_of] if world.new else [how_many_of, how_many_of, how_many_of_kind]
    seconds = [where] if world.new else [what, where, what_color]
    for index in range(number):
        turn, is_yes_no = divmod(index, 2)
        kind, answers, forms = (
            ("yes/no", ("yes", "no"), yes_no) if is_yes_no else ("how many", ("0", "1", "2", "3"), how_many)
        )
        answer = answers[turn % len(answers)]
        claim = forms[turn // len(answers) % len(forms)](world)
        scene = world.scene_where(claim, answer)
        asked = [(kind, claim.text, answer)]
        further = [seconds[(turn + shift) % len(seconds)](world, scene) for shift in range(len(seconds))]
        asked += [question for question in further if question][:1]
        for part, (kind, question, answer) in enumerate(asked):
            yield {
                "image_id": f"vqa-{world.split}-{index:06d}",
                "image": scene,
                "question": question,
                "question_id": index * 10 + part,
                "question_type": kind,
                "answers": [{"answer": answer, "score": 1.0}],
            }


def is_there(world: World) -> Claim:
    word, draw = world.draw.choice(world.named), world.draw
    return Claim(
        f"is there {a(word)}?", lambda scene: yes(scene.count(word) > 0), lambda: Wish({word: draw.randint(0, 1)})
    )


def is_there_kind(world: World) -> Claim:
    kind = world.draw.choice(tuple(KINDS))
    return Claim(f"is there {a(kind)}?", lambda scene: yes(scene.count(kind) > 0))


def is_there_of_size(world: World) -> Claim:
    word, size, draw = world.draw.choice(world.named), world.draw.choice(tuple(SIZES)), world.draw
    return Claim(
        f"is there {a(f'{size} {word}')}?",
        lambda scene: yes(any(thing.size == size for thing in scene.all(word))),
        lambda: Wish({word: draw.randint(1, 2)}),
    )


def is_there_at(world: World) -> Claim:
    word, place, draw = world.draw.choice(world.named), world.draw.choice(POSITIONS), world.draw
    return Claim(
        f"is there {a(word)} at the {place}?",
        lambda scene: yes(any(scene.position(thing) == place for thing in scene.all(word))),
        lambda: Wish({word: draw.randint(1, 3)}),
    )


def is_it_beside(world: World) -> Claim:
    """Of two objects that are there once each: is this one further to that side?"""
    (one, other), relation = world.draw.sample(world.named, 2), world.draw.choice(tuple(RELATIONS))

    def truth(scene: Scene) -> str | None:
        if scene.count(one) != 1 or scene.count(other) != 1:
            return None
        return yes(is_beside(scene.all(one)[0], relation, scene.all(other)[0]))

    return Claim(f"is the {one} {relation} the {other}?", truth, lambda: Wish({one: 1, other: 1}))


def is_beside(one: Thing, relation: str, other: Thing) -> bool:
    """Whether its column (left of, right of) or row (above, below) is further to that side than the other's."""
    down, right = RELATIONS[relation]
    return down * (one.row - other.row) + right * (one.column - other.column) > 0


def is_background(world: World) -> Claim:
    color, draw = world.draw.choice(tuple(COLORS)), world.draw
    return Claim(
        f"is the background {color}?",
        lambda scene: yes(scene.color == color),
        lambda: Wish(color=draw.choice((color, None))),
    )


def how_many_of(world: World) -> Claim:
    word, draw = world.draw.choice(world.named), world.draw
    return Claim(
        f"how many {plural(word)} are there?",
        lambda scene: str(scene.count(word)),
        lambda: Wish({word: draw.randint(0, 3)}),
    )


def how_many_of_kind(world: World) -> Claim:
    kind = world.draw.choice(tuple(KINDS))
    return Claim(f"how many {plural(kind)} are there?", lambda scene: str(scene.count(kind)))


def what(world: World, scene: Scene) -> tuple[str, str, str]:
    thing = world.draw.choice(scene.things)
    return "what", f"what is at the {scene.position(thing)}?", thing.concept


def where(world: World, scene: Scene) -> tuple[str, str, str] | None:
    """Where an object is that is the only one of its concept, if any is."""
    alone = [thing for thing in scene.things if thing.concept in world.named and scene.count(thing.concept) == 1]
    if not alone:
        return None
    thing = world.draw.choice(alone)
    return "where", f"where is the {thing.concept}?", scene.position(thing)


def what_color(world: World, scene: Scene) -> tuple[str, str, str]:
    return "color", "what color is the background?", scene.color


# ------------------------------------------------------------------------------------------------- NLVR2


def nlvr2(world: World, number: int) -> Rows:
    """Sets of four pairs of pictures and two statements, each true of two of the pairs.

    An identifier is split-set-pair-sentence, as in the original: consistency asks for all pairs of one set and sentence.
    """
    forms = [both_show, one_shows, in_all, more_in_one, as_many, shows_of_size, beside_in_one]
    forms += [] if world.new else [both_backgrounds, one_background, same_background]
    for index in range(max(1, number // (PAIRS * STATEMENTS))):
        pairs = None
        while pairs is None:  # two statements may contradict each other
            claims = [form(world) for form in world.draw.sample(forms, STATEMENTS)]
            labels = [world.draw.sample([1, 1, 0, 0], PAIRS) for _ in claims]
            pairs = _pairs(world, claims, labels)
        for number_of_pair, pair in enumerate(pairs):
            for sentence, claim in enumerate(claims):
                yield {
                    "image_id": f"nlvr2-{world.split}-{index:06d}-{number_of_pair}",
                    "images": pair,
                    "statement": claim.text,
                    "label": labels[sentence][number_of_pair],
                    "identifier": f"{world.split}-{index}-{number_of_pair}-{sentence}",
                }


def _pairs(world: World, claims: Sequence[Claim], labels: Sequence[Sequence[int]]) -> list[list[Scene]] | None:
    """Pairs of scenes for which the claims have these labels; None where there seem to be none."""
    pairs = []
    for truths in zip(*labels):
        pair = world.scenes_where(claims, truths, pictures=2, tries=200)
        if pair is None:
            return None
        pairs.append(pair)
    return pairs


def _word(world: World) -> tuple[str, Callable[[], Wish]]:
    """A concept or, but for `test_new`, now and then a kind; and the wish for some of it."""
    draw = world.draw
    if not world.new and draw.random() < 0.2:
        return draw.choice(tuple(KINDS)), Wish
    word = draw.choice(world.named)
    return word, lambda: Wish({word: draw.choice((0, 1, 1, 2, 3))})


def both_show(world: World) -> Claim:
    word, wish = _word(world)
    return Claim(
        f"both pictures show {a(word)}", lambda left, right: bool(left.count(word) and right.count(word)), wish
    )


def one_shows(world: World) -> Claim:
    word, wish = _word(world)
    return Claim(
        f"exactly one of the two pictures shows {a(word)}",
        lambda left, right: bool(left.count(word)) != bool(right.count(word)),
        wish,
    )


def in_all(world: World) -> Claim:
    (word, wish), number = _word(world), world.draw.randint(1, 4)
    text = f"there is exactly one {word} in all" if number == 1 else f"there are exactly {some(number, word)} in all"
    return Claim(text, lambda left, right: left.count(word) + right.count(word) == number, wish)


def more_in_one(world: World) -> Claim:
    (word, wish), (side, other) = _word(world), world.draw.sample(("left", "right"), 2)

    def truth(left: Scene, right: Scene) -> bool:
        more = left.count(word) - right.count(word)
        return more > 0 if side == "left" else more < 0

    return Claim(f"the {side} picture has more {plural(word)} than the {other} picture", truth, wish)


def as_many(world: World) -> Claim:
    """Does not apply where neither picture has one."""
    word, wish = _word(world)

    def truth(left: Scene, right: Scene) -> bool | None:
        numbers = left.count(word), right.count(word)
        return numbers[0] == numbers[1] if any(numbers) else None

    return Claim(f"there are as many {plural(word)} in one picture as in the other", truth, wish)


def shows_of_size(world: World) -> Claim:
    draw = world.draw
    word, size, side = draw.choice(world.named), draw.choice(tuple(SIZES)), draw.choice(("left", "right"))

    def truth(left: Scene, right: Scene) -> bool:
        return any(thing.size == size for thing in (left if side == "left" else right).all(word))

    return Claim(
        f"the {side} picture shows {a(f'{size} {word}')}", truth, lambda: Wish({word: draw.choice((0, 1, 1, 2))})
    )


def beside_in_one(world: World) -> Claim:
    """Applies where that picture has both concepts."""
    draw = world.draw
    (one, other), side, relation = (
        draw.sample(world.named, 2),
        draw.choice(("left", "right")),
        draw.choice(tuple(RELATIONS)),
    )

    def truth(left: Scene, right: Scene) -> bool | None:
        scene = left if side == "left" else right
        if not (scene.count(one) and scene.count(other)):
            return None
        return any(is_beside(this, relation, that) for this in scene.all(one) for that in scene.all(other))

    return Claim(
        f"in the {side} picture {a(one)} is {relation} {a(other)}",
        truth,
        lambda: Wish({one: draw.randint(1, 2), other: 1}),
    )


def _color(world: World) -> tuple[str, Callable[[], Wish]]:
    color, draw = world.draw.choice(tuple(COLORS)), world.draw
    return color, lambda: Wish(color=draw.choice((color, color, None)))


def both_backgrounds(world: World) -> Claim:
    color, wish = _color(world)
    return Claim(f"both backgrounds are {color}", lambda left, right: left.color == right.color == color, wish)


def one_background(world: World) -> Claim:
    color, wish = _color(world)
    return Claim(
        f"exactly one of the two backgrounds is {color}",
        lambda left, right: (left.color == color) != (right.color == color),
        wish,
    )


def same_background(world: World) -> Claim:
    _, wish = _color(world)
    return Claim("the two backgrounds have the same color", lambda left, right: left.color == right.color, wish)


# -------------------------------------------------------------------------------------------- entailment


def entailment(world: World, number: int) -> Rows:
    """Hypotheses, each with a scene that entails it, one that leaves it open, and one that contradicts it.

    "The animal that Anna owns is a frog" means one animal of the picture, and no picture shows which. It follows where
    all animals are frogs, it contradicts a picture without a frog, and where some are and some are not, nobody can tell.
    """
    forms = [owned_is_a] if world.new else [owned_is_a, owned_has_size, owned_is_at]
    for index in range(max(1, number // len(ENTAILMENT))):
        claim = forms[index % len(forms)](world)
        for part, label in enumerate(ENTAILMENT):
            yield {
                "image_id": f"entailment-{world.split}-{index * len(ENTAILMENT) + part:06d}",
                "image": world.scene_where(claim, label),
                "hypothesis": claim.text,
                "label": label,
            }


def owned_is_a(world: World) -> Claim:
    draw, concept = world.draw, world.draw.choice(world.named)
    kind = KIND_OF[concept]
    others = [other for other in world.shown if KIND_OF[other] == kind and other != concept]
    return _hidden_one(
        world,
        draw.choice((kind, kind, "object")),
        a(concept),
        lambda scene, thing: thing.concept == concept,
        lambda: Wish({concept: draw.randint(0, 3), draw.choice(others): draw.randint(0, 3)}),
    )


def owned_has_size(world: World) -> Claim:
    word, size = world.draw.choice((*KINDS, "object")), world.draw.choice(tuple(SIZES))
    return _hidden_one(world, word, size, lambda scene, thing: thing.size == size, _two_of(world, word))


def owned_is_at(world: World) -> Claim:
    word, side = world.draw.choice((*KINDS, "object")), world.draw.choice(tuple(SIDES))
    return _hidden_one(world, word, side, SIDES[side], _two_of(world, word))


def _hidden_one(
    world: World, word: str, words: str, holds: Callable[[Scene, Thing], bool], wish: Callable[[], Wish]
) -> Claim:
    """That the one of `word` of which something hidden is said is `words`. Applies where there are two of `word` or more."""

    def truth(scene: Scene) -> str | None:
        found = [holds(scene, thing) for thing in scene.all(word)]
        if len(found) < 2:
            return None
        return "entailment" if all(found) else "neutral" if any(found) else "contradiction"

    return Claim(f"the {word} that {world.draw.choice(HIDDEN)} is {words}", truth, wish)


def _two_of(world: World, word: str) -> Callable[[], Wish]:
    concepts = [concept for concept in world.shown if word in (KIND_OF[concept], "object")]
    return lambda: Wish({concept: 1 for concept in world.draw.sample(concepts, 2)})


# --------------------------------------------------------------------------------- referring expressions


class Phrase(NamedTuple):
    """What fits one object of a scene, of which at least `least` are of `word`."""

    text: str
    word: str
    least: int
    fits: Callable[[Scene, Thing], bool]
    wish: Callable[[], Wish]

    def found(self, scene: Scene) -> list[Thing]:
        return [thing for thing in scene.all(self.word) if self.fits(scene, thing)]


def referring(world: World, number: int) -> Rows:
    """Phrases that fit one object of a picture; the boxes of all its objects, in any order, are the candidates."""
    forms = [the_only, the_one_of_size, the_one_at] + ([] if world.new else [the_only_of_kind])
    for index in range(number):
        phrase = forms[index % len(forms)](world)
        scene = world.scene_where(Claim(phrase.text, partial(refers, phrase), phrase.wish), True)
        things = world.draw.sample(scene.things, len(scene.things))
        yield {
            "image_id": f"referring-{world.split}-{index:06d}",
            "image": scene,
            "phrase": phrase.text,
            "boxes": [scene.fractions(thing) for thing in things],
            "label": things.index(phrase.found(scene)[0]),
        }


def refers(phrase: Phrase, scene: Scene) -> bool:
    return len(scene.things) > 1 and scene.count(phrase.word) >= phrase.least and len(phrase.found(scene)) == 1


def the_only(world: World) -> Phrase:
    word = world.draw.choice(world.named)
    return Phrase(f"the {word}", word, 1, lambda scene, thing: True, lambda: Wish({word: 1}))


def the_only_of_kind(world: World) -> Phrase:
    kind = world.draw.choice(tuple(KINDS))
    return Phrase(f"the {kind}", kind, 1, lambda scene, thing: True, Wish)


def the_one_of_size(world: World) -> Phrase:
    draw, word, size = world.draw, world.draw.choice(world.named), world.draw.choice(tuple(SIZES))
    return Phrase(
        f"the {size} {word}",
        word,
        2,
        lambda scene, thing: thing.size == size,
        lambda: Wish({word: draw.randint(2, 3)}),
    )


def the_one_at(world: World) -> Phrase:
    draw, word, side = world.draw, world.draw.choice(world.named), world.draw.choice(tuple(SIDES))
    return Phrase(f"the {word} {side}", word, 2, SIDES[side], lambda: Wish({word: draw.randint(2, 3)}))


# --------------------------------------------------------------------------------------- multiple choice


def multiple_choice(world: World, number: int) -> Rows:
    """Questions with four answers, and with four reasons for the right one, of which the picture has one.

    Every reason leads to the right answer, so that words alone tell neither.
    """
    for index in range(number):
        turn, form = divmod(index, 2)
        label, rationale_label = turn % 4, (turn + turn // 4) % 4
        question, choices, rationales, scene = (beside_what, most_of_what)[form](world, label, rationale_label)
        yield {
            "image_id": f"multiple_choice-{world.split}-{index:06d}",
            "image": scene,
            "boxes": [scene.fractions(thing) for thing in scene.things],
            "question": question,
            "choices": choices,
            "label": label,
            "rationales": rationales,
            "rationale_label": rationale_label,
        }


# places of one object and of its direct neighbour on that side, in any layout
NEIGHBOURS = {
    relation: [
        (first, second)
        for first, second in itertools.permutations(POSITIONS, 2)
        if any(
            first in layout.cells
            and second in layout.cells
            and layout.cells[first] == (layout.cells[second][0] + down, layout.cells[second][1] + right)
            for layout in LAYOUTS
        )
    ]
    for relation, (down, right) in RELATIONS.items()
}
# how many of the most common concept and of the next
MAJORITIES = ((2, 1), (3, 1), (3, 2), (4, 1), (4, 2))


def beside_what(world: World, label: int, reason: int) -> tuple[str, list[str], list[str], Scene]:
    """What the direct neighbour of an object is, because of where the two are."""
    draw, relation = world.draw, world.draw.choice(tuple(RELATIONS))
    anchor, *concepts = draw.sample(world.named, 5)
    answer, places = concepts[label], draw.sample(NEIGHBOURS[relation], 4)
    place, place_of_anchor = places[reason]

    def truth(scene: Scene) -> bool:
        if scene.count(anchor) != 1 or scene.count(answer) != 1:
            return False
        one, other = scene.all(answer)[0], scene.all(anchor)[0]
        return (one.row - other.row, one.column - other.column) == RELATIONS[relation]

    def wish() -> Wish:
        others = {concept: draw.randint(0, 1) for concept in concepts}
        return Wish({**others, anchor: 1, answer: 1}, {place: answer, place_of_anchor: anchor})

    question = f"what is directly {relation} the {anchor}?"
    reasons = [f"{a(answer)} is at the {first} and the {anchor} at the {second}" for first, second in places]
    scene = world.scene_where(Claim(question, truth, wish), True)
    return question, [a(concept) for concept in concepts], reasons, scene


def most_of_what(world: World, label: int, reason: int) -> tuple[str, list[str], list[str], Scene]:
    """Which concept most objects are of, because of how many there are and of the next."""
    draw = world.draw
    concepts, majorities = draw.sample(world.named, 4), draw.sample(MAJORITIES, 4)
    most, next_most = majorities[reason]

    def truth(scene: Scene) -> bool:
        first, second, *_ = *Counter(thing.concept for thing in scene.things).most_common(2), (None, 0), (None, 0)
        return (*first, second[1]) == (concepts[label], most, next_most)

    def wish() -> Wish:
        others = {concept: draw.randint(0, next_most) for concept in concepts}
        return Wish({**others, concepts[label]: most})

    question = "what is there most of?"
    reasons = [
        f"there are {some(one, concepts[label])} but only {NUMBERS[two]} of the next most common object"
        for one, two in majorities
    ]
    scene = world.scene_where(Claim(f"{question} {concepts[label]}", truth, wish), True)
    return question, [plural(concept) for concept in concepts], reasons, scene


TASKS = {
    "captions": captions,
    "vqa": vqa,
    "nlvr2": nlvr2,
    "entailment": entailment,
    "referring": referring,
    "multiple_choice": multiple_choice,
}
