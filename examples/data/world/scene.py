"""A small world: objects in the cells of a picture on a plain background, what is known of them, and the picture itself.

An object is one of 32 concepts in four kinds, small or large, alone in its cell. Eight concepts are held out: no scene of the
splits train, validation and test shows one, every scene of `test_new` does.
"""

import io
import random
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as parquet
from PIL import Image

EMOJI = Path(__file__).parents[1] / "emoji"

# kind: concepts of training, and those held out, whose emoji are not in train.parquet of the emoji pairs either
KINDS = {
    "animal": (("frog", "fox", "panda", "penguin", "butterfly", "fish"), ("crab", "elephant")),
    "fruit": (("strawberry", "avocado", "watermelon", "coconut", "peach", "pear"), ("banana", "pineapple")),
    "vehicle": (("bus", "bicycle", "rocket", "sailboat", "tractor", "airplane"), ("car", "skateboard")),
    "tool": (("axe", "magnet", "bucket", "ladder", "key", "wrench"), ("hammer", "flashlight")),
}
SEEN = tuple(concept for seen, _ in KINDS.values() for concept in seen)
NEW = tuple(concept for _, new in KINDS.values() for concept in new)
KIND_OF = {concept: kind for kind, both in KINDS.items() for concepts in both for concept in concepts}
CAPTION = {"car": "automobile"}  # in the emoji pairs, where it is not the concept's own name

# softer than the emoji's own colours, and far enough apart for SHADE
COLORS = {
    "red": (205, 75, 75),
    "orange": (240, 160, 80),
    "yellow": (245, 225, 115),
    "green": (100, 175, 100),
    "blue": (95, 140, 215),
    "purple": (150, 105, 185),
    "white": (245, 245, 245),
    "black": (45, 45, 50),
}
SHADE = 8  # the most that each channel of a background differs from its colour
SIZES = {"small": (0.44, 0.52), "large": (0.82, 0.92)}  # longer side of an object, as a share of the cell's
MOST = 6  # objects in a scene
TRIES = 2_000  # before a text is taken to fit no scene
SPLITS = ("train", "validation", "test", "test_new")


@dataclass(frozen=True, eq=False)
class Layout:
    """How a picture is divided.

    cell: side of a cell in pixels.
    cells: row and column of each cell by its name, such as "top left", in reading order.
    """

    columns: int
    rows: int
    cell: int
    cells: dict[str, tuple[int, int]]


def _divided(columns: int, rows: int, cell: int) -> Layout:
    """A layout of two or three columns, and of rows."""
    vertical = ("top", "bottom") if rows == 2 else ("top", "middle", "bottom")
    horizontal = ("left", "right") if columns == 2 else ("left", "middle", "right")
    cells = {f"{v} {h}": (row, column) for row, v in enumerate(vertical) for column, h in enumerate(horizontal)}
    return Layout(columns, rows, cell, cells)


LAYOUTS = (_divided(3, 2, 32), _divided(2, 3, 32), _divided(2, 2, 40))  # 96 x 64, 64 x 96 and 80 x 80 pixels
POSITIONS = tuple(dict.fromkeys(place for one in LAYOUTS for place in one.cells))


class Thing(NamedTuple):
    """An object. box: x1 y1 x2 y2 in pixels, just around what is seen."""

    concept: str
    size: str
    row: int
    column: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def kind(self) -> str:
        return KIND_OF[self.concept]

    def is_a(self, word: str) -> bool:
        """Whether it is of this concept or kind; everything is an object."""
        return word in (self.concept, self.kind, "object")


class Scene(NamedTuple):
    """What there is to know of a picture. things: its objects in reading order. shade: RGB of the background."""

    layout: Layout
    color: str
    things: tuple[Thing, ...]
    shade: tuple[int, int, int] = (0, 0, 0)

    @property
    def width(self) -> int:
        return self.layout.columns * self.layout.cell

    @property
    def height(self) -> int:
        return self.layout.rows * self.layout.cell

    def all(self, word: str) -> list[Thing]:
        """The things of this concept or kind."""
        return [thing for thing in self.things if thing.is_a(word)]

    def count(self, word: str) -> int:
        return len(self.all(word))

    def position(self, thing: Thing) -> str:
        """Where it is, such as "top left"."""
        return next(place for place, cell in self.layout.cells.items() if cell == (thing.row, thing.column))

    def fractions(self, thing: Thing) -> list[float]:
        """Its box as fractions of width and height."""
        x1, y1, x2, y2 = thing.box
        return [x1 / self.width, y1 / self.height, x2 / self.width, y2 / self.height]

    def record(self) -> dict[str, Any]:
        """The scene as a column of a record."""
        names = ("concept", "kind", "size", "row", "column")
        things = [
            {name: getattr(thing, name) for name in names} | {"box": self.fractions(thing)} for thing in self.things
        ]
        return {"color": self.color, "columns": self.layout.columns, "rows": self.layout.rows, "objects": things}


class Emoji:
    """The concepts' pictures, cut out and at any size."""

    def __init__(self, folder: Path = EMOJI):
        wanted = {CAPTION.get(concept, concept): concept for concept in KIND_OF}
        self._pictures = {}
        for split in ("train", "validation", "test"):
            table = parquet.read_table(folder / f"{split}.parquet", columns=["caption", "image"])
            for row, caption in enumerate(table["caption"].to_pylist()):
                if caption in wanted:
                    picture = Image.open(io.BytesIO(table["image"][row].as_py()["bytes"])).convert("RGBA")
                    seen = picture.getchannel("A").point(lambda alpha: 255 * (alpha >= 32)).getbbox()
                    self._pictures[wanted[caption]] = picture.crop(seen)
        self._resized: dict[tuple[str, int], Image.Image] = {}

    def at(self, concept: str, side: int) -> Image.Image:
        """The concept's picture (RGBA), its longer side that many pixels."""
        if (concept, side) not in self._resized:
            picture = self._pictures[concept]
            scale = side / max(picture.size)
            size = [max(1, round(length * scale)) for length in picture.size]
            self._resized[concept, side] = picture.resize(size, Image.Resampling.LANCZOS)
        return self._resized[concept, side]

    def paint(self, scene: Scene) -> Image.Image:
        """The picture of a scene (RGB)."""
        picture = Image.new("RGB", (scene.width, scene.height), scene.shade)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            cut = self.at(thing.concept, max(x2 - x1, y2 - y1))
            picture.paste(cut, (x1, y1), cut)
        return picture


class Wish(NamedTuple):
    """What a scene is drawn with.

    counts: how many of a concept, and no more; the first ones, where they are more than a scene holds.
    places: concepts by position. color: of the background.
    """

    counts: Mapping[str, int] = {}
    places: Mapping[str, str] = {}
    color: str | None = None


class Claim(NamedTuple):
    """A text about one or two scenes.

    truth: (scene, ...) -> its truth or answer, None where the text does not apply.
    wish: draws what a scene should have, so that no truth is rare.
    """

    text: str
    truth: Callable[..., Any]
    wish: Callable[[], Wish] = Wish


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to, whatever the seed: scenes equal but for the place within cells and the shade are in one.

    Shows it a held-out concept, it is `test_new`; else a hash gives a tenth each to test and validation.
    """
    if any(thing.concept in NEW for thing in scene.things):
        return "test_new"
    things = [(thing.row, thing.column, thing.concept, thing.size) for thing in scene.things]
    bucket = zlib.crc32(repr((scene.layout.columns, scene.layout.rows, scene.color, things)).encode()) % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


class World:
    """Draws scenes of one split for one task; the same arguments give the same scenes.

    Attributes:
        draw: the generator of everything random.
        new: whether the split is `test_new`.
        named: concepts that texts may name; in `test_new` the held-out ones alone.
        shown: concepts that scenes may show.
    """

    def __init__(self, task: str, split: str, seed: int, emoji: Emoji):
        self.split, self.emoji = split, emoji
        self.draw = random.Random(f"{task} {split} {seed}")
        self.new = split == "test_new"
        self.named = NEW if self.new else SEEN
        self.shown = (*SEEN, *NEW) if self.new else SEEN

    def scene(self) -> Scene:
        """Any scene of the split."""
        return self._placed(self._of_split(Wish()))

    def scene_where(self, claim: Claim, truth: Any) -> Scene:
        """A scene of which the claim has that truth.

        Raises:
            ValueError: there seems to be none.
        """
        found = self.scenes_where([claim], [truth])
        if found is None:
            raise ValueError(f"no scene of the split {self.split} for {claim.text!r} with {truth!r} in {TRIES} tries.")
        return found[0]

    def scenes_where(
        self, claims: Sequence[Claim], truths: Sequence[Any], pictures: int = 1, tries: int = TRIES
    ) -> list[Scene] | None:
        """Scenes of which each claim has its truth, drawn until they fit; None where none did in that many tries."""
        for _ in range(tries):
            scenes = [self._of_split(_joined([claim.wish() for claim in claims])) for _ in range(pictures)]
            if all(claim.truth(*scenes) == truth for claim, truth in zip(claims, truths)):
                return [self._placed(scene) for scene in scenes]
        return None

    def _of_split(self, wish: Wish) -> Scene:
        while True:
            scene = self._sketch(wish)
            if split_of(scene) == self.split:
                return scene

    def _sketch(self, wish: Wish) -> Scene:
        """A scene whose objects have no boxes yet."""
        draw = self.draw
        places = dict(wish.places)
        counts = Counter(wish.counts) - Counter(places.values())
        free = list(counts.elements())[: MOST - len(places)]
        number = max(len(places) + len(free), draw.randint(1, MOST))
        while len(places) + len(free) < number:
            concept = draw.choice(self.shown)
            if concept not in wish.counts:
                free += [concept] * min(draw.choice((1, 1, 1, 2, 3)), number - len(places) - len(free))
        fitting = [one for one in LAYOUTS if len(one.cells) >= number and places.keys() <= one.cells.keys()]
        layout = draw.choice(fitting)
        others = [place for place in layout.cells if place not in places]
        places.update(zip(draw.sample(others, len(free)), free))
        sizes = tuple(SIZES)
        things = [
            Thing(places[place], draw.choice(sizes), *cell) for place, cell in layout.cells.items() if place in places
        ]
        return Scene(layout, wish.color or draw.choice(tuple(COLORS)), tuple(things))

    def _placed(self, scene: Scene) -> Scene:
        """The scene with a shade for its background, and its objects somewhere within their cells."""
        draw, cell = self.draw, scene.layout.cell
        shade = tuple(channel + draw.randint(-SHADE, SHADE) for channel in COLORS[scene.color])
        things = []
        for thing in scene.things:
            low, high = (round(share * cell) for share in SIZES[thing.size])
            width, height = self.emoji.at(thing.concept, draw.randint(low, high)).size
            x = thing.column * cell + draw.randint(0, cell - width)
            y = thing.row * cell + draw.randint(0, cell - height)
            things.append(thing._replace(box=(x, y, x + width, y + height)))
        return scene._replace(things=tuple(things), shade=shade)


def _joined(wishes: Sequence[Wish]) -> Wish:
    """All wishes in one; of two for the same concept or place the later one."""
    if len(wishes) == 1:
        return wishes[0]
    counts = {concept: number for wish in wishes for concept, number in wish.counts.items()}
    places = {place: concept for wish in wishes for place, concept in wish.places.items()}
    return Wish(counts, places, next((wish.color for wish in wishes if wish.color), None))
