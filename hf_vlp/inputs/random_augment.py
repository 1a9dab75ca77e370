"""RandAugment with the operations of ALBEF's released code: two of ten changes, each made half of the time.

"RandAugment: Practical automated data augmentation with a reduced search space" (https://arxiv.org/abs/1909.13719); in "Align before Fuse"
(https://arxiv.org/abs/2107.07651), section 3.5, without changes of colour: texts name colours. `hf_vlp.inputs.rand_augment` is another
choice of operations by Pillow. These are OpenCV's, number by number, with whole numbers where OpenCV has them.
Pictures are uint8 [h, w, 3] from 0 to 255. Depends on numpy and torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

MOST = 10  # of the magnitude
GREY = np.array([0.114, 0.587, 0.299])  # the released code takes red for blue and blue for red
FILL = 128  # beyond the picture
SHARPENED = ((1, 1, 1), (1, 5, 1), (1, 1, 1))  # in thirteenths
POSITION_BITS, PLACES = 10, 32  # of a warp: positions are whole 1024ths, and then whole 32nds of a pixel

Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Operation:
    """One change of a picture.

    apply: (uint8 [h, w, 3], value) -> uint8 of the same shape. value: of a magnitude from 0 to 10. turns: whether a draw in [0, 1) turns
    the value round; None where no sign is drawn.
    """

    apply: Callable[[np.ndarray, float], np.ndarray]
    value: Callable[[float], float] = lambda magnitude: 0.0
    turns: Callable[[float], bool] | None = None


def _by_table(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each level replaced by its entry of `table`, clipped and cut to a whole number."""
    return table.clip(0, 255).astype(np.uint8)[pixels]


def _by_channel(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda pixels, _: np.stack([change(pixels[:, :, channel]) for channel in range(pixels.shape[2])], axis=2)


def _stretched(channel: np.ndarray) -> np.ndarray:
    """The darkest level becomes 0, the brightest one 255."""
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return channel
    scale = 255 / (high - low)
    return _by_table(channel, np.arange(256) * scale - low * scale)


def _equalized(channel: np.ndarray) -> np.ndarray:
    """Every level about as frequent as any other."""
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (channel.size - counts[int(channel.max())]) // 255
    if step == 0:
        return channel
    below = np.cumsum(counts) - counts
    return _by_table(channel, (step // 2 + below) // step)


def _brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _by_table(pixels, np.arange(256, dtype=np.float32) * np.float32(factor))


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from the grey of the whole picture, or towards it."""
    grey = float(pixels.mean(axis=(0, 1)) @ GREY)
    return _by_table(pixels, (np.arange(256) - grey) * factor + grey)


def _color(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Each pixel away from its own grey, or towards it."""
    mix = factor * np.eye(3) + (1 - factor) * GREY[:, None]
    return (pixels.astype(np.float32) @ mix.astype(np.float32)).clip(0, 255).astype(np.uint8)


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from the blurred picture, or towards it; the border stays, and what leaves 0..255 comes back at the other end."""
    height, width = pixels.shape[:2]
    if min(height, width) < 3:
        return pixels
    total = sum(
        weight * pixels[top : height - 2 + top, left : width - 2 + left].astype(np.int64)
        for top, weights in enumerate(SHARPENED)
        for left, weight in enumerate(weights)
    )
    blurred = np.rint(total / np.sum(SHARPENED)).astype(np.float32)
    inside = pixels[1:-1, 1:-1].astype(np.float32)
    result = pixels.copy()
    result[1:-1, 1:-1] = (blurred + np.float32(factor) * (inside - blurred)).astype(np.int64) & 255
    return result


def _solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(pixels < threshold, pixels, 255 - pixels)


def _posterize(pixels: np.ndarray, bits: float) -> np.ndarray:
    return pixels & np.uint8((255 << (8 - int(bits))) & 255)


def warped(pixels: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The picture moved by an affine map, as OpenCV moves 8-bit pixels: bilinear, 128 where nothing comes from the picture.

    Args:
        pixels: uint8 [h, w, C].
        matrix: two rows that take (x, y, 1) of a pixel to where it goes; centres of pixels are whole numbers.

    Returns:
        uint8 of the same shape.
    """
    height, width = pixels.shape[:2]
    (a, b, c), (d, e, f) = matrix
    share = 1 / (a * e - b * d)
    back = ((e * share, -b * share), (-d * share, a * share))  # to where a pixel comes from
    columns, rows = [
        _sources(along, down, -along * c - down * f, np.arange(width), np.arange(height)) for along, down in back
    ]
    framed = np.full((height + 2, width + 2, pixels.shape[2]), FILL, np.int32)
    framed[1:-1, 1:-1] = pixels
    left, right = ((columns // PLACES + step).clip(0, width + 1) for step in (1, 2))
    top, bottom = ((rows // PLACES + step).clip(0, height + 1) for step in (1, 2))
    across, down = (columns % PLACES)[:, :, None], (rows % PLACES)[:, :, None]
    above = framed[top, left] * (PLACES - across) + framed[top, right] * across
    below = framed[bottom, left] * (PLACES - across) + framed[bottom, right] * across
    total = above * (PLACES - down) + below * down
    return ((total + PLACES**2 // 2) // PLACES**2).astype(np.uint8)


def _sources(along: float, down: float, start: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One coordinate of where each pixel comes from, in 32nds of a pixel: int32 [h, w]."""
    unit = 1 << POSITION_BITS
    place = np.rint(along * x * unit)[None] + np.rint((down * y + start) * unit)[:, None]
    step = unit // PLACES
    return ((place + step // 2) // step).astype(np.int32)


def _rotated(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """About half of width and height, counter-clockwise."""
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    cos, sin = np.cos(degrees * np.pi / 180), np.sin(degrees * np.pi / 180)
    return warped(pixels, ((cos, sin, (1 - cos) * x - sin * y), (-sin, cos, sin * x + (1 - cos) * y)))


def _above_half(number: float) -> bool:
    return number > 0.5


def _below_half(number: float) -> bool:
    return number < 0.5


def _factor(magnitude: float) -> float:
    return magnitude / MOST * 1.8 + 0.1


def _shear(magnitude: float) -> float:
    return magnitude / MOST * 0.3


def _pixels(magnitude: float) -> float:
    return magnitude / MOST * 10


# With the names of the released code.
OPERATIONS = {
    "Identity": Operation(lambda pixels, _: pixels),
    "AutoContrast": Operation(_by_channel(_stretched)),
    "Equalize": Operation(_by_channel(_equalized)),
    "Brightness": Operation(_brightness, _factor),
    "Sharpness": Operation(_sharpness, _factor),
    "ShearX": Operation(lambda pixels, by: warped(pixels, ((1, by, 0), (0, 1, 0))), _shear, _above_half),
    "ShearY": Operation(lambda pixels, by: warped(pixels, ((1, 0, 0), (by, 1, 0))), _shear, _above_half),
    "TranslateX": Operation(lambda pixels, by: warped(pixels, ((1, 0, -by), (0, 1, 0))), _pixels, _above_half),
    "TranslateY": Operation(lambda pixels, by: warped(pixels, ((1, 0, 0), (0, 1, -by))), _pixels, _above_half),
    "Rotate": Operation(_rotated, lambda magnitude: magnitude / MOST * 30, _below_half),
    "Color": Operation(_color, _factor),
    "Contrast": Operation(_contrast, _factor),
    "Solarize": Operation(_solarize, lambda magnitude: int(magnitude / MOST * 256)),
    "Posterize": Operation(_posterize, lambda magnitude: int(magnitude / MOST * 4)),
}
WITHOUT_COLOURS = tuple(OPERATIONS)[:10]

Draws = tuple[Sequence[str], Sequence[float]]  # of one picture


@dataclass(frozen=True)
class RandomAugment:
    """count operations, each one of all with the same chance, perhaps the same again, each applied half of the time.

    count: n. magnitude: m, from 0 to 10. operations: to draw from, names of `OPERATIONS`; the paper's leave colours alone.
    """

    count: int = 2
    magnitude: float = 7
    operations: Sequence[str] = WITHOUT_COLOURS

    def __post_init__(self):
        if self.count < 0 or not 0 <= self.magnitude <= MOST:
            raise ValueError(
                f"count={self.count} operations of magnitude={self.magnitude}: give a count of 0 or more and a magnitude from 0 to {MOST}"
            )
        if not self.operations:
            raise ValueError("operations is empty: name one or more to draw from")
        _check_names(self.operations)

    def draws(self, pictures: int, generator: torch.Generator) -> list[Draws]:
        """What `__call__` takes beside each of so many pictures."""
        shape = (pictures, self.count)
        chosen = torch.randint(len(self.operations), shape, generator=generator, device=generator.device).tolist()
        numbers = torch.rand((*shape, 2), generator=generator, device=generator.device).tolist()
        draws = []
        for row, pairs in zip(chosen, numbers, strict=True):
            names, used = [self.operations[index] for index in row], []
            for name, (chance, sign) in zip(names, pairs, strict=True):
                used += [chance, sign] if chance <= 0.5 and OPERATIONS[name].turns else [chance]
            draws.append((names, used))
        return draws

    def steps(self, names: Sequence[str], numbers: Sequence[float]) -> list[tuple[str, float]]:
        """The operations that are applied, each with its value.

        Args:
            names: of operations, in the order in which they are applied.
            numbers: in [0, 1), in the order of the released code: one for each operation, which is left out above 0.5; after it, where the
                operation is applied and has a sign, one more, which turns the value round above 0.5 (`Rotate`: below).

        Raises:
            ValueError: an unknown operation, another number of draws.
        """
        _check_names(names)
        rest, steps = list(numbers), []
        for name in names:
            if rest and rest.pop(0) > 0.5:
                continue
            operation = OPERATIONS[name]
            value = operation.value(self.magnitude)
            steps.append((name, -value if operation.turns and rest and operation.turns(rest.pop(0)) else value))
        needed = len(names) + sum(OPERATIONS[name].turns is not None for name, _ in steps)
        if len(numbers) != needed:
            raise ValueError(
                f"{len(numbers)} draws for the operations {list(names)}, of which {[name for name, _ in steps]} are applied: "
                f"give {needed}, one each and one more for each that is applied and has a sign"
            )
        return steps

    def __call__(self, pixels: np.ndarray, names: Sequence[str], numbers: Sequence[float]) -> np.ndarray:
        """uint8 [h, w, 3] -> uint8 of the same shape, after the `steps` of these draws."""
        for name, value in self.steps(names, numbers):
            pixels = OPERATIONS[name].apply(pixels, value)
        return pixels


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}: choose of {', '.join(OPERATIONS)}")
