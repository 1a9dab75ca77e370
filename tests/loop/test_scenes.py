"""examples/data/scenes.py: every answer read anew from the scene and from the pixels, and nothing to be had from the texts alone."""

import colorsys
import importlib
import io
import itertools
import math
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_vlp.data.readers import read_records

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
TASKS = ("captions", "vqa", "nlvr2", "entailment", "referring", "multiple_choice")
SPLITS = ("train", "validation", "test", "test_new")
NEW = {"crab", "elephant", "banana", "pineapple", "car", "skateboard", "hammer", "flashlight"}
NUMBERS = {"a": 1, "an": 1, "no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
SIZES = {(96, 64): (3, 2), (64, 96): (2, 3), (80, 80): (2, 2)}  # columns and rows
HUES = {
    "red": (345, 375),
    "orange": (15, 42),
    "yellow": (42, 65),
    "green": (90, 150),
    "blue": (200, 240),
    "purple": (250, 300),
}


@pytest.fixture(scope="module")
def scenes():
    """The script as a module, with what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DATA))
        yield importlib.import_module("scenes")


@pytest.fixture(scope="module")
def emoji(scenes):
    return scenes.Emoji()


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "scenes"
    scenes.write_tasks(output, scenes=200)
    return output


@pytest.fixture(scope="module")
def records(folder, tmp_path_factory):
    """(task, split) -> rows, with decoded pictures."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield {
            (task, split): list(
                read_records(
                    folder / f"{task}_{split}.parquet", required=("images",) if task == "nlvr2" else ("image",)
                )
            )
            for task in TASKS
            for split in SPLITS
        }


# --------------------------------------------------------------------- an independent reading of scenes and texts


def cell(scene, thing):
    """Row and column of the cell that holds the middle of the box."""
    x1, y1, x2, y2 = thing["box"]
    return int((y1 + y2) / 2 * scene["rows"]), int((x1 + x2) / 2 * scene["columns"])


def place(scene, thing):
    row, column = cell(scene, thing)
    rows = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}[scene["rows"]]
    columns = {2: ("left", "right"), 3: ("left", "middle", "right")}[scene["columns"]]
    return f"{rows[row]} {columns[column]}"


def named(scene, word):
    """The objects of a concept or kind, in the singular or plural."""
    singular = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
    return [thing for thing in scene["objects"] if singular & {thing["concept"], thing["kind"], "object"}]


def matches(scene, thing, words):
    """Whether "large frog", "frog on the left", "small", "at the top", "a frog" or "frog at the top left" is said of a thing."""
    words = re.sub(r"^(the|an?) ", "", words)
    words, _, where = re.sub(r"(^| )(?:on|at) the ", r"\1@", words).partition("@")
    if where and not set(where.split()) <= set(place(scene, thing).split()):
        return False
    *sizes, last = words.split() or ["object"]
    sizes, last = ([last], "object") if last in ("small", "large") else (sizes, last)
    return thing in named(scene, last) and all(size == thing["size"] for size in sizes)


def beside(scene, one, relation, other):
    (row, column), (other_row, other_column) = cell(scene, one), cell(scene, other)
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


RELATION = "(left of|right of|above|below)"


def answer(scene, question):
    """The answer to a question, by brute force."""
    if found := re.fullmatch(r"how many (\w+) are there\?", question):
        return str(len(named(scene, found[1])))
    if question == "what color is the background?":
        return scene["color"]
    if found := re.fullmatch(r"is the background (\w+)\?", question):
        return "yes" if found[1] == scene["color"] else "no"
    if found := re.fullmatch(rf"is the (\w+) {RELATION} the (\w+)\?", question):
        (one,), (other,) = named(scene, found[1]), named(scene, found[3])
        return "yes" if beside(scene, one, found[2], other) else "no"
    if found := re.fullmatch(r"is there (.+)\?", question):
        return "yes" if any(matches(scene, thing, found[1]) for thing in scene["objects"]) else "no"
    if found := re.fullmatch(r"what is at the (.+)\?", question):
        (thing,) = [thing for thing in scene["objects"] if place(scene, thing) == found[1]]
        return thing["concept"]
    found = re.fullmatch(r"where is the (\w+)\?", question)
    (thing,) = named(scene, found[1])
    return place(scene, thing)


def holds(left, right, statement):
    """Whether a statement is true of two scenes."""
    sides = {"left": left, "right": right}
    if found := re.fullmatch(r"both pictures show an? (\w+)", statement):
        return all(named(scene, found[1]) for scene in sides.values())
    if found := re.fullmatch(r"exactly one of the two pictures shows an? (\w+)", statement):
        return sum(bool(named(scene, found[1])) for scene in sides.values()) == 1
    if found := re.fullmatch(r"there (?:is|are) exactly (\w+) (\w+) in all", statement):
        return sum(len(named(scene, found[2])) for scene in sides.values()) == NUMBERS[found[1]]
    if found := re.fullmatch(r"the (\w+) picture has more (\w+) than the (\w+) picture", statement):
        return len(named(sides[found[1]], found[2])) > len(named(sides[found[3]], found[2]))
    if found := re.fullmatch(r"there are as many (\w+) in one picture as in the other", statement):
        numbers = [len(named(scene, found[1])) for scene in sides.values()]
        assert any(numbers)
        return numbers[0] == numbers[1]
    if found := re.fullmatch(r"the (\w+) picture shows (an? \w+ \w+)", statement):
        return any(matches(sides[found[1]], thing, found[2]) for thing in sides[found[1]]["objects"])
    if found := re.fullmatch(rf"in the (\w+) picture an? (\w+) is {RELATION} an? (\w+)", statement):
        scene = sides[found[1]]
        ones, others = named(scene, found[2]), named(scene, found[4])
        assert ones and others
        return any(beside(scene, one, found[3], other) for one in ones for other in others)
    if found := re.fullmatch(r"both backgrounds are (\w+)", statement):
        return left["color"] == right["color"] == found[1]
    if found := re.fullmatch(r"exactly one of the two backgrounds is (\w+)", statement):
        return [left["color"], right["color"]].count(found[1]) == 1
    assert statement == "the two backgrounds have the same color"
    return left["color"] == right["color"]


def follows(scene, hypothesis):
    """The label, by trying every object that could be the one which is meant."""
    found = re.fullmatch(
        r"the (\w+) that (?:Anna owns|Tom drew yesterday|will be sold tomorrow|smells of soap|Mia likes best|"
        r"arrived on Monday|nobody has paid for|Ben dreamt of) is (.+)",
        hypothesis,
    )
    worlds = {matches(scene, thing, found[2]) for thing in named(scene, found[1])}
    assert len(named(scene, found[1])) > 1
    return {(True,): "entailment", (False,): "contradiction"}.get(tuple(worlds), "neutral")


def described(scene, caption):
    """Whether a caption is true of a scene."""
    if found := re.fullmatch(r"(an? \w+ \w+ at the \w+ \w+) of an? (\w+) picture with (\w+) objects?", caption):
        number = len(scene["objects"]) == NUMBERS[found[3]]
        thing = any(matches(scene, thing, found[1]) for thing in scene["objects"])
        return number and thing and scene["color"] == found[2]
    objects, color = re.fullmatch(r"(.+) on an? (\w+) background", caption).groups()
    parts = re.split(r", | and ", objects)
    if " at the " in objects:
        fitting = [[thing for thing in scene["objects"] if matches(scene, thing, part)] for part in parts]
        whole = len(parts) == len(scene["objects"]) and all(len(things) == 1 for things in fitting)
    else:
        numbers = [(NUMBERS[part.split()[0]], len(named(scene, part.split()[1]))) for part in parts]
        whole = all(one == two for one, two in numbers) and sum(n for n, _ in numbers) == len(scene["objects"])
    return whole and scene["color"] == color


def chosen(scene, question):
    """The right choice of a multiple-choice question."""
    if question == "what is there most of?":
        (first, number), *rest = Counter(thing["concept"] for thing in scene["objects"]).most_common()
        assert all(number > other for _, other in rest)
        return first
    found = re.fullmatch(rf"what is directly {RELATION} the (\w+)\?", question)
    (anchor,) = named(scene, found[2])
    row, column = cell(scene, anchor)
    down, right = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[found[1]]
    (thing,) = [thing for thing in scene["objects"] if cell(scene, thing) == (row + down, column + right)]
    return thing["concept"]


def reasoned(scene, rationale):
    """Whether a rationale is true of a scene."""
    if found := re.fullmatch(
        r"(an? \w+ at the \w+ \w+) and (the \w+ at the \w+ \w+)", rationale.replace(" is at", " at")
    ):
        return all(any(matches(scene, thing, part) for thing in scene["objects"]) for part in found.groups())
    found = re.fullmatch(r"there are (\w+) (\w+) but only (\w+) of the next most common object", rationale)
    counts = Counter(thing["concept"] for thing in scene["objects"]).most_common()
    return len(named(scene, found[2])) == counts[0][1] == NUMBERS[found[1]] and counts[1][1] == NUMBERS[found[3]]


def scenes_of(row):
    return row["scenes"] if "scenes" in row else [row["scene"]]


def all_rows(records, task):
    return [row for split in SPLITS for row in records[task, split]]


def pictures(records):
    """Every record's pictures with their scenes."""
    for task in TASKS:
        for row in all_rows(records, task):
            yield from zip(row["images"] if task == "nlvr2" else [row["image"]], scenes_of(row))


# --------------------------------------------------------------------------------------------------- answers


def test_answers_follow_from_the_scene(records):
    for row in all_rows(records, "vqa"):
        assert row["answers"] == [{"answer": answer(row["scene"], row["question"]), "score": 1.0}], row["question"]
    for row in all_rows(records, "nlvr2"):
        assert row["label"] == holds(*row["scenes"], row["statement"]), row["statement"]
    for row in all_rows(records, "entailment"):
        assert row["label"] == follows(row["scene"], row["hypothesis"]), row["hypothesis"]
    swapped = [
        row["label"] == holds(*row["scenes"][::-1], row["statement"])
        for row in all_rows(records, "nlvr2")
        if row["statement"].startswith(("the left picture", "the right picture"))
    ]
    assert 0.2 < sum(swapped) / len(swapped) < 0.9  # of the pictures in the other order it is another truth


def test_a_phrase_fits_the_box_of_its_label_and_no_other(records):
    for row in all_rows(records, "referring"):
        things = {tuple(thing["box"]): thing for thing in row["scene"]["objects"]}
        assert sorted(things) == sorted(map(tuple, row["boxes"])) and len(things) > 1
        fits = [matches(row["scene"], things[tuple(box)], row["phrase"]) for box in row["boxes"]]
        assert fits == [index == row["label"] for index in range(len(fits))], row["phrase"]


def test_one_choice_and_one_rationale_are_right_and_all_rationales_lead_to_the_choice(records):
    for row in all_rows(records, "multiple_choice"):
        scene, right = row["scene"], chosen(row["scene"], row["question"])
        assert row["boxes"] == [thing["box"] for thing in scene["objects"]]
        assert len(set(row["choices"])) == len(set(row["rationales"])) == 4
        is_right = [
            any(thing["concept"] == right for thing in named(scene, words.split()[-1])) for words in row["choices"]
        ]
        assert is_right == [index == row["label"] for index in range(4)]
        assert [reasoned(scene, text) for text in row["rationales"]] == [i == row["rationale_label"] for i in range(4)]
        assert all(row["choices"][row["label"]] in text for text in row["rationales"])


def test_captions_are_true_of_their_picture_and_but_for_training_of_no_other(records):
    for split in SPLITS:
        rows = records["captions", split]
        assert all(described(row["scene"], caption) for row in rows for caption in row["captions"])
        if split != "train":
            for row, other in itertools.permutations(rows, 2):
                assert not any(described(other["scene"], caption) for caption in row["captions"])


# ---------------------------------------------------------------------------------------------------- pixels


def color_name(rgb):
    """A colour's name by its hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    if value < 0.3 or saturation < 0.2:
        return "black" if value < 0.3 else "white"
    return next(name for name, (low, high) in HUES.items() if low <= hue * 360 < high or low <= hue * 360 + 360 < high)


def test_pictures_show_what_the_scene_says(records):
    seen = Counter()
    for picture, scene in pictures(records):
        assert picture.mode == "RGB" and SIZES[picture.size] == (scene["columns"], scene["rows"])
        shade = max(picture.getcolors(10_000))[1]
        assert color_name(shade) == scene["color"]
        drawn = (np.asarray(picture) != shade).any(-1)
        assert 1 <= len(scene["objects"]) <= 6
        for thing in scene["objects"]:
            x1, y1, x2, y2 = bounds = np.multiply(thing["box"], [*picture.size] * 2)
            assert np.allclose(bounds, bounds.round()) and (thing["row"], thing["column"]) == cell(scene, thing)
            assert 0 <= x1 < x2 <= picture.width and 0 <= y1 < y2 <= picture.height
            x1, y1, x2, y2 = bounds.round().astype(int)
            inside = drawn[y1:y2, x1:x2]
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert rows[0] <= 1 and columns[0] <= 1 and rows[-1] >= y2 - y1 - 2 and columns[-1] >= x2 - x1 - 2
            assert inside.mean() > 0.2
            length = max(x2 - x1, y2 - y1) * scene["columns"] / picture.width
            assert thing["size"] == ("large" if length > 0.7 else "small")
            inside[:] = False  # a box that reached into another would find nothing left there
            seen[thing["concept"]] += 1
        assert not drawn.any()
    assert len(seen) == 32 and min(seen.values()) > 20


def test_boxes_do_not_overlap(records):
    for _, scene in pictures(records):
        for one, other in itertools.combinations([thing["box"] for thing in scene["objects"]], 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


def test_a_box_shows_its_concept(records):
    """Of all 32 emoji, pasted there instead, the concept's own changes the picture least."""
    import pyarrow.parquet as parquet

    concepts = {thing["concept"] for _, scene in pictures(records) for thing in scene["objects"]}
    cut = {}
    for split in ("train", "validation", "test"):
        for row in parquet.read_table(DATA / "emoji" / f"{split}.parquet", columns=["caption", "image"]).to_pylist():
            concept = {"automobile": "car"}.get(row["caption"], row["caption"])
            if concept in concepts:
                picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
                cut[concept] = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 31)).getbbox())
    assert cut.keys() == concepts
    for row in records["captions", "train"][:20] + records["captions", "test_new"][:20]:
        for thing in row["scene"]["objects"]:
            box = np.multiply(thing["box"], [*row["image"].size] * 2).round().astype(int).tolist()
            real = np.asarray(row["image"].crop(box)).astype(int)
            shade = max(row["image"].getcolors(10_000))[1]
            change = {}
            for concept, picture in cut.items():
                other = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), shade)
                resized = picture.resize(other.size)
                other.paste(resized, (0, 0), resized)
                change[concept] = np.abs(real - np.asarray(other)).mean()
            assert min(change, key=change.get) == thing["concept"]


# ------------------------------------------------------------------------------------- balance and shortcuts


def test_labels_are_balanced(records):
    for split in SPLITS:
        vqa = records["vqa", split]
        for kind, answers in (("yes/no", ["yes", "no"]), ("how many", ["0", "1", "2", "3"])):
            counts = Counter(row["answers"][0]["answer"] for row in vqa if row["question_type"] == kind)
            assert set(counts) <= set(answers) and max(counts.values()) - min(counts.values()) <= 1
        sets = {}
        for row in records["nlvr2", split]:
            name, group, pair, sentence = row["identifier"].split("-")
            assert name == split
            sets.setdefault((group, sentence), {})[pair] = (row["statement"], row["label"])
        for pairs in sets.values():
            assert len(pairs) == 4 and len({text for text, _ in pairs.values()}) == 1
            assert sum(label for _, label in pairs.values()) == 2
        assert len({group for group, _ in sets}) * 2 == len(sets)
        labels = Counter((row["hypothesis"], row["label"]) for row in records["entailment", split])
        for hypothesis in {text for text, _ in labels}:
            each = {labels[hypothesis, label] for label in ("entailment", "neutral", "contradiction")}
            assert len(each) == 1 and each != {0}
        for field in ("label", "rationale_label"):
            counts = Counter(row[field] for row in records["multiple_choice", split])
            assert set(counts) == {0, 1, 2, 3} and max(counts.values()) - min(counts.values()) <= 8


def naive_bayes(training, testing):
    """The share of right guesses by counts of words; both are lists of (text, label)."""
    priors = Counter(label for _, label in training)
    words = Counter((word, label) for text, label in training for word in set(text.split()))

    def score(text, label):
        seen = sum(math.log((words[word, label] + 0.5) / (priors[label] + 1)) for word in set(text.split()))
        return math.log(priors[label]) + seen

    guesses = [max(priors, key=lambda label: score(text, label)) for text, _ in testing]
    return sum(guess == label for guess, (_, label) in zip(guesses, testing)) / len(testing)


def told(training, testing):
    """How far the words beat the most common label, in standard errors of the test."""
    majority = max(Counter(label for _, label in testing).values()) / len(testing)
    return (naive_bayes(training, testing) - majority) / math.sqrt(majority * (1 - majority) / len(testing))


def texts(rows, task):
    """Texts and labels of a task by what they are about; those of one question type compete with each other only."""
    for row in rows:
        if task == "vqa":
            yield row["question_type"], (row["question"], row["answers"][0]["answer"])
        elif task == "nlvr2":
            yield "statement", (row["statement"], row["label"])
        elif task == "entailment":
            yield "hypothesis", (row["hypothesis"], row["label"])
        elif task == "referring":
            yield len(row["boxes"]), (row["phrase"], row["label"])
        else:
            choices, reasons = row["choices"], row["rationales"]
            yield "choice", (f"{row['question']} {' '.join(choices)}", row["label"])
            yield "place of the choice", (" ".join(f"{n}:{words}" for n, words in enumerate(choices)), row["label"])
            yield "place of the rationale", (" ".join(reasons), row["rationale_label"])
            for index, words in enumerate(choices):
                yield "one choice", (f"{row['question']} {words}", index == row["label"])
            for index, words in enumerate(reasons):
                yield "one rationale", (f"{row['question']} {words}", index == row["rationale_label"])


@pytest.mark.parametrize("task", TASKS[1:])
def test_words_alone_tell_nothing(scenes, emoji, task):
    halves = []
    for seed in (1, 2):
        about = {}
        for name, pair in texts(scenes.build_scenes(task, "train", 1600, seed, emoji), task):
            about.setdefault(name, []).append(pair)
        halves.append(about)
    for name in halves[0]:
        training, testing = halves[0][name], halves[1][name]
        if len(testing) > 100:
            assert told(training, testing) < 3.5, name
    hinted = [
        [(f"{text} {label}" if i % 3 else text, label) for i, (text, label) in enumerate(pairs)]
        for pairs in (training, testing)
    ]
    assert told(*hinted) > 3.5  # the classifier does find a word that tells


# ---------------------------------------------------------------------------------------------------- splits


def shown(scene):
    """What a scene shows, but for shades and places within cells."""
    things = sorted((*cell(scene, thing), thing["concept"], thing["size"]) for thing in scene["objects"])
    return scene["columns"], scene["rows"], scene["color"], *things


def test_no_scene_is_in_two_splits_of_any_task_or_seed(scenes, emoji, records):
    of = {split: set() for split in SPLITS}
    for task, split in records:
        of[split] |= {shown(scene) for row in records[task, split] for scene in scenes_of(row)}
    for row in scenes.build_scenes("referring", "train", 1500, 7, emoji):
        of["train"].add(shown(row["image"].record()))
    for one, other in itertools.combinations(SPLITS, 2):
        assert not of[one] & of[other]
    assert all(len(found) > 100 for found in of.values())


def test_held_out_concepts_are_in_every_picture_of_test_new_and_in_no_other(records):
    for (task, split), rows in records.items():
        for row in rows:
            new = [NEW & {thing["concept"] for thing in scene["objects"]} for scene in scenes_of(row)]
            assert all(new) if split == "test_new" else not any(new)
            judged = " ".join(row.get(field) or "" for field in ("question", "statement", "hypothesis", "phrase"))
            judged += " ".join(row.get("choices") or ())
            names = any(re.search(rf"\b{concept}(s|es)?\b", judged) for concept in NEW)
            assert names == (split == "test_new") or task == "captions"


def test_answers_of_test_new_are_answers_of_training(records):
    answers = {
        split: {row["answers"][0]["answer"] for row in records["vqa", split]} for split in ("train", "test_new", "test")
    }
    assert answers["test_new"] < answers["train"] and len(answers["train"] - answers["test_new"]) > 24


# ----------------------------------------------------------------------------------------------------- files


def test_files_are_read_as_records(folder, records):
    names = {f"{task}_{split}.parquet" for task in TASKS for split in SPLITS}
    assert {file.name for file in folder.iterdir()} == {*names, "README.md"}
    readme = (folder / "README.md").read_text()
    for (task, split), rows in records.items():
        assert f"| `{task}_{split}` | {len(rows):,} |" in readme
        assert len({row["image_id"] for row in rows}) >= len(rows) / 2
    (one, two), *_ = (row["images"] for row in records["nlvr2", "train"])
    assert isinstance(one, Image.Image) and isinstance(two, Image.Image) and one.tobytes() != two.tobytes()
    assert {row["image"].size for row in records["captions", "train"]} == set(SIZES)
    assert len({row["question_id"] for row in records["vqa", "train"]}) == len(records["vqa", "train"])


def test_a_seed_gives_the_same_bytes_and_another_seed_other_ones(scenes, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        scenes.write_tasks(tmp_path / name, scenes=100, seed=seed, tasks=["vqa", "nlvr2"])
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 9
    for file in files:
        one, two, three = ((tmp_path / name / file).read_bytes() for name in ("one", "two", "three"))
        assert one == two != three


def test_the_script_writes_a_table_and_replaces_a_folder_only_when_told(tmp_path, monkeypatch, capsys):
    def run(*words):
        command = ["scenes.py", "--output", str(tmp_path / "out"), "--scenes", "100", "--tasks", "referring", *words]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.syspath_prepend(str(DATA))  # as Python does for a script
        runpy.run_path(str(DATA / "scenes.py"), run_name="__main__")

    run()
    assert "| `referring_train` | 100 | 100 | one of the boxes" in capsys.readouterr().out
    before = (tmp_path / "out" / "referring_train.parquet").read_bytes()
    with pytest.raises(SystemExit, match="--overwrite"):
        run("--seed", "3")
    assert (tmp_path / "out" / "referring_train.parquet").read_bytes() == before
    run("--seed", "3", "--overwrite")
    assert (tmp_path / "out" / "referring_train.parquet").read_bytes() != before
    with pytest.raises(SystemExit, match="20 scenes leave too few"):
        run("--scenes", "20", "--overwrite")


def test_files_are_whole_or_absent(scenes, tmp_path, monkeypatch):
    def stop(task, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "guess", stop)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_tasks(tmp_path / "out", scenes=100, tasks=["captions"])
    assert list(tmp_path.iterdir()) == []
