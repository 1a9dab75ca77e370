"""Makes a small world for every downstream task: scenes of the emoji pictures, and what is said, asked and claimed of them.

    python examples/data/scenes.py --output scenes
    python examples/data/scenes.py --output scenes --seed 1 --scenes 20000 --tasks vqa nlvr2 --overwrite

Writes OUTPUT/<task>_<split>.parquet, records as `hf_vlp.data.readers.read_records` takes them, and OUTPUT/README.md, which says what
is in them, what is held out and what a guess gets. All files or none; the same seed gives the same bytes on one machine.
The scenes are in `world/scene.py` beside this file, the texts in `world/tasks.py`.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from datasets import Features, Image, List, Value
from tqdm.auto import tqdm
from world.scene import SPLITS, Emoji, Scene, World
from world.tasks import TASKS

from hf_vlp.files import whole_folder

ROW_GROUP = 1000
TEXT, NUMBER, BOX = Value("string"), Value("int64"), List(Value("float64"), length=4)
OBJECT = {"concept": TEXT, "kind": TEXT, "size": TEXT, "row": NUMBER, "column": NUMBER, "box": BOX}
SCENE = {"color": TEXT, "columns": NUMBER, "rows": NUMBER, "objects": List(OBJECT)}
ONE, TWO = {"image": Image(), "scene": SCENE}, {"images": List(Image(), length=2), "scenes": List(SCENE, length=2)}
COLUMNS = {
    "captions": {"captions": List(TEXT), **ONE},
    "vqa": {
        "question": TEXT,
        "question_id": NUMBER,
        "question_type": TEXT,
        "answers": List({"answer": TEXT, "score": Value("float64")}),
        **ONE,
    },
    "nlvr2": {"statement": TEXT, "label": NUMBER, "identifier": TEXT, **TWO},
    "entailment": {"hypothesis": TEXT, "label": TEXT, **ONE},
    "referring": {"phrase": TEXT, "boxes": List(BOX), "label": NUMBER, **ONE},
    "multiple_choice": {
        "question": TEXT,
        "choices": List(TEXT),
        "label": NUMBER,
        "rationales": List(TEXT),
        "rationale_label": NUMBER,
        "boxes": List(BOX),
        **ONE,
    },
}


def build_scenes(
    task: str, split: str, scenes: int, seed: int = 0, emoji: Emoji | None = None
) -> Iterator[dict[str, Any]]:
    """The records of a task's split, drawn one by one; `image`, or each of `images`, is a `Scene` that `Emoji().paint` paints.

    Args:
        task: one of `TASKS`.
        split: one of `SPLITS`.
        scenes: about how many pictures.
        seed: another one gives other scenes, of the same split still.
        emoji: the concepts' pictures, read if not given.
    """
    return TASKS[task](World(task, split, seed, emoji or Emoji()), scenes)


def sizes(scenes: int) -> dict[str, int]:
    """Pictures of each split: all of `scenes` for training, a tenth but at most 1,000 for each other."""
    return {split: scenes if split == "train" else min(scenes // 10, 1000) for split in SPLITS}


def write_tasks(
    output: str | Path,
    scenes: int = 4000,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    overwrite: bool = False,
    progress: bool = False,
) -> str:
    """Write the tasks' files and their README.

    Args:
        output: folder to make.
        scenes: training pictures of each task; the other splits have a tenth, at most 1,000.
        seed: of everything.
        tasks: of `TASKS`.
        overwrite: replace a folder that exists.
        progress: show a bar.

    Returns:
        A table of the files: rows, pictures, and what a guess gets.

    Raises:
        ValueError: too few scenes.
        FileExistsError: `output` is there, and `overwrite` is false.
    """
    if scenes < 100:
        raise ValueError(f"{scenes} scenes leave too few for validation and test. Ask for 100 or more.")
    emoji, lines = Emoji(), []
    with whole_folder(output, overwrite) as folder:
        files = [(task, split) for task in TASKS if task in tasks for split in SPLITS]
        for task, split in tqdm(files, desc="scenes", unit="file", disable=not progress):
            records = build_scenes(task, split, sizes(scenes)[split], seed, emoji)
            rows = _write(folder / f"{task}_{split}.parquet", task, records, emoji)
            pictures = len({row["image_id"] for row in rows}) * (2 if task == "nlvr2" else 1)
            lines.append(f"| `{task}_{split}` | {len(rows):,} | {pictures:,} | {guess(task, rows)} |")
        table = "\n".join(["| file | records | pictures | what a guess gets |", "|---|---|---|---|", *lines])
        (folder / "README.md").write_text(README.format(table=table, seed=seed, scenes=scenes), encoding="utf-8")
    return table


def _write(file: Path, task: str, records: Iterable[dict[str, Any]], emoji: Emoji) -> list[dict[str, Any]]:
    """Write the records with painted pictures, and return them without."""
    schema = Features({"image_id": TEXT, **COLUMNS[task]}).arrow_schema

    @lru_cache(2 * ROW_GROUP)
    def painted(scene: Scene) -> dict[str, Any]:
        buffer = io.BytesIO()
        emoji.paint(scene).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows, group = [], []
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            group.clear()

        for record in records:
            rows.append({name: value for name, value in record.items() if name not in ("image", "images")})
            if "image" in record:
                pictures = {"image": painted(record["image"]), "scene": record["image"].record()}
            else:
                pictures = {
                    "images": [painted(scene) for scene in record["images"]],
                    "scenes": [scene.record() for scene in record["images"]],
                }
            group.append({**record, **pictures})
            if len(group) == ROW_GROUP:
                flush()
        flush()
    return rows


def share(values: Iterable[Any]) -> float:
    """Of the most common value."""
    counts = Counter(values)
    return max(counts.values()) / counts.total()


def guess(task: str, rows: Sequence[dict[str, Any]]) -> str:
    """What the best answer that looks at no picture gets, in words."""
    if task == "captions":
        return f"recall@1 {1 / len(rows):.2%}"
    if task == "vqa":
        answers: dict[str, list[str]] = {}
        for row in rows:
            answers.setdefault(row["question_type"], []).append(row["answers"][0]["answer"])
        best = {kind: share(given) for kind, given in answers.items()}
        overall = sum(best[kind] * len(given) for kind, given in answers.items()) / len(rows)
        each = ", ".join(f"{kind} {part:.1%}" for kind, part in best.items())
        one = share(row["answers"][0]["answer"] for row in rows)
        return f"one answer to all {one:.1%}; the best answer to each type {overall:.1%} ({each})"
    if task == "referring":
        return f"one of the boxes {sum(1 / len(row['boxes']) for row in rows) / len(rows):.1%}"
    text = f"the most common label {share(row['label'] for row in rows):.1%}"
    if task == "nlvr2":
        return f"{text}, consistency 0 %"
    if task == "multiple_choice":
        both = share((row["label"], row["rationale_label"]) for row in rows)
        return f"{text}, rationale {share(row['rationale_label'] for row in rows):.1%}, both {both:.1%}"
    return text


README = """# Scenes of emoji, with records for every downstream task

Made by `python examples/data/scenes.py --output ... --seed {seed} --scenes {scenes}`. The same command gives the same bytes on one machine.

{table}

"Pictures" counts each once, though several records may be about it; a guess looks at none. The texts give no more than that away: a
text is drawn first, its truth second, and then scenes until they fit.

## Scenes

A scene has one to six objects on a background of one of eight colours (red, orange, yellow, green, blue, purple, white, black).
Pictures are 96 x 64, 64 x 96 and 80 x 80 pixels, divided into 3 x 2, 2 x 3 and 2 x 2 cells; an object lies within one cell, so boxes
never overlap, and "top", "middle", "bottom", "left" and "right" are rows and columns of cells. "Left of" compares columns, "above"
compares rows; "directly" means the next cell. A small object is about half as long as its cell, a large one nearly as long.

Concepts are of four kinds, those in brackets held out:

| kind | concepts |
|---|---|
| animal | frog, fox, panda, penguin, butterfly, fish (crab, elephant) |
| fruit | strawberry, avocado, watermelon, coconut, peach, pear (banana, pineapple) |
| vehicle | bus, bicycle, rocket, sailboat, tractor, airplane (car, skateboard) |
| tool | axe, magnet, bucket, ladder, key, wrench (hammer, flashlight) |

## What is held out

- `train`, `validation` and `test` show the 24 concepts of training. No scene is in two of them, nor one that differs only in shade
  and in places within cells: a hash of what it shows says in which it is, whatever the seed and the task, so that a model trained on
  one seed or task can be tested on another.
- `test_new`: every picture shows at least one of the eight held-out concepts, and every text that is judged names one (a caption may
  name another object of its picture). They are not in the training split of the emoji pairs either. A model that has learnt nothing but
  `train` has never read their names, so its score tells what it makes of a new word and a new picture; pre-training on other data
  may do better. VQA asks there only what an answer of training answers: no "what", no colour.

## Records

Every record has an `image_id` and a picture `image` with its `scene`: `color`, `columns`, `rows`, and `objects`, each with `concept`,
`kind`, `size`, `row`, `column` and `box` (x1 y1 x2 y2 as fractions of width and height, as all boxes here).

- `captions`: `captions`, two texts: all that is there; one of the objects. But for training, none is true of another picture of its file.
- `vqa`: `question`, `question_id`, `question_type` (yes/no, how many, what, where, color), `answers`: one, of score 1.
- `nlvr2`: `statement`, `label` (1: true), `identifier`, and two pictures `images` with their `scenes`. An identifier is
  split-set-pair-sentence, as in the original: a set has four pairs of pictures and two statements, each true of two of the pairs.
  Consistency asks for all pairs of one set and sentence.
- `entailment`: `hypothesis`, `label` ("entailment", "neutral" or "contradiction").
- `referring`: `phrase`, `boxes`, `label`: position in `boxes` of the one object that the phrase fits. All objects are candidates, in
  any order.
- `multiple_choice`: `question`, four `choices`, `label`, four `rationales`, `rationale_label`, and the objects' `boxes`. Every rationale
  leads to the right choice; one is in the picture.

"The animal that Anna owns is a frog" means exactly one animal of the picture, which has two or more; no picture shows whose, how
smelling or when. It is entailed where all animals are frogs, contradicted where none is, and neutral where some are: then nobody can tell.

## Licence

The pictures are composed of the Fluent emoji by Microsoft Corporation, under the MIT licence: see `examples/data/emoji`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=4000, metavar="N", help="training pictures of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    options = parser.parse_args()
    try:
        table = write_tasks(
            options.output, options.scenes, options.seed, options.tasks, options.overwrite, sys.stderr.isatty()
        )
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(table)


if __name__ == "__main__":
    main()
