"""RandAugment with the operations of ViLT's released code: a few of fourteen changes, drawn anew for each picture.

"RandAugment: Practical automated data augmentation with a reduced search space" (https://arxiv.org/abs/1909.13719); in ViLT
(https://arxiv.org/abs/2102.03334), section 3.4, without the inversion of colours and the cutting out of squares: texts name colours and
small things. Depends on Pillow, numpy and torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

MOST = 30  # of the magnitude


@dataclass(frozen=True)
class Operation:
    """apply: (picture, value) -> picture. low, high: values at magnitudes 0 and 30. signed: whether a draw turns the value round."""

    apply: Callable[[Image.Image, float], Image.Image]
    low: float
    high: float
    signed: bool = False

    def value(self, magnitude: float) -> float:
        """In between, as far as the magnitude is."""
        return magnitude / MOST * (self.high - self.low) + self.low


def _posterize(picture: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(picture, max(1, int(bits)))


def _solarize_add(picture: Image.Image, addition: float) -> Image.Image:
    brighter = np.clip(np.asarray(picture).astype(np.int64) + addition, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(brighter), 128)


def _affine(*matrix: float | None) -> Callable[[Image.Image, float], Image.Image]:
    """An affine map with the value in the place of None; nearest pixel, black where there is none."""
    return lambda picture, value: picture.transform(
        picture.size, Image.Transform.AFFINE, [value if entry is None else entry for entry in matrix]
    )


def _enhance(kind: type) -> Operation:
    return Operation(lambda picture, factor: kind(picture).enhance(factor), 0.1, 1.9)


# In the order, and with the names, of the released code: draws by number mean the same there and here.
OPERATIONS = {
    "AutoContrast": Operation(lambda picture, _: ImageOps.autocontrast(picture), 0, 1),
    "Equalize": Operation(lambda picture, _: ImageOps.equalize(picture), 0, 1),
    "Rotate": Operation(lambda picture, degrees: picture.rotate(degrees), 0, 30, signed=True),
    "Posterize": Operation(_posterize, 0, 4),
    "Solarize": Operation(ImageOps.solarize, 0, 256),
    "SolarizeAdd": Operation(_solarize_add, 0, 110),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": Operation(_affine(1, None, 0, 0, 1, 0), 0.0, 0.3, signed=True),
    "ShearY": Operation(_affine(1, 0, 0, None, 1, 0), 0.0, 0.3, signed=True),
    "TranslateXabs": Operation(_affine(1, 0, None, 0, 1, 0), 0, 100, signed=True),
    "TranslateYabs": Operation(_affine(1, 0, 0, 0, 1, None), 0, 100, signed=True),
}

Draws = tuple[Sequence[str], Sequence[float]]  # of one picture


@dataclass(frozen=True)
class RandAugment:
    """count operations, each one of all with the same chance, perhaps the same again, all at one magnitude.

    count: n. magnitude: m, from 0 to 30. The paper of RandAugment tunes both; 2 and 9 are ViLT's.
    """

    count: int = 2
    magnitude: float = 9

    def __post_init__(self):
        if self.count < 0 or not 0 <= self.magnitude <= MOST:
            raise ValueError(
                f"count={self.count} operations of magnitude={self.magnitude}: give a count of 0 or more and a magnitude from 0 to {MOST}"
            )

    def draws(self, pictures: int, generator: torch.Generator) -> list[Draws]:
        """What `__call__` takes beside each of so many pictures: names of operations, and a number in [0, 1) for each signed one."""
        names, shape = list(OPERATIONS), (pictures, self.count)
        chosen = torch.randint(len(names), shape, generator=generator, device=generator.device).tolist()
        numbers = torch.rand(shape, generator=generator, device=generator.device).tolist()
        draws = []
        for row, signs in zip(chosen, numbers, strict=True):
            operations = [names[index] for index in row]
            signed = [OPERATIONS[name].signed for name in operations]
            draws.append((operations, [sign for sign, used in zip(signs, signed, strict=True) if used]))
        return draws

    def __call__(self, picture: Image.Image, operations: Sequence[str], signs: Sequence[float]) -> Image.Image:
        """A picture in RGB -> one of the same size.

        Args:
            operations: names out of `OPERATIONS`, in the order in which they are applied.
            signs: a number in [0, 1) for each signed operation of these; above 0.5 its value is negative.

        Raises:
            ValueError: an unknown operation, another number of signs.
        """
        for name in operations:
            if name not in OPERATIONS:
                raise ValueError(f"unknown operation {name!r}: choose of {', '.join(OPERATIONS)}")
        signed = [name for name in operations if OPERATIONS[name].signed]
        if len(signs) != len(signed):
            raise ValueError(
                f"{len(signs)} signs for the {len(signed)} signed operations of {list(operations)}: give one each"
            )
        rest = iter(signs)
        for name in operations:
            operation = OPERATIONS[name]
            value = operation.value(self.magnitude)
            picture = operation.apply(picture, -value if operation.signed and next(rest) > 0.5 else value)
        return picture
