"""Transforms for training, in two parts.

A picture is prepared once, without randomness, so that the result can be cached. What is random is done to a whole batch of
prepared pictures and drawn from a generator.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020), section 2.5;
VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding" (https://arxiv.org/abs/2011.04305); ViLT
(https://arxiv.org/abs/2102.03334), sections 3.4 and 4.2; "Align before Fuse" (https://arxiv.org/abs/2107.07651), section 3.5; and what
small data sets need besides. R is the side of what the model sees, or the shorter side where pictures keep their proportions. Depends on
`hf_vlp.inputs.image_transforms`, `hf_vlp.inputs.rand_augment` and `hf_vlp.inputs.random_augment`.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from PIL import Image
from torch.nn import functional

from hf_vlp.inputs import random_augment
from hf_vlp.inputs.image_transforms import (
    CLIP_MEAN,
    CLIP_STD,
    centre_crop,
    check_size,
    eight_bits,
    in_channel_order,
    normalised,
    on_background,
    padded,
    picture_from_array,
    resize_picture,
    resize_width_first,
    squashed,
    to_rgb,
    to_tensor,
    whole_patches_size,
)
from hf_vlp.inputs.rand_augment import Draws, RandAugment


def _uniform(generator: torch.Generator, count: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    """[count] float32. Drawn on the generator's device, so that every device sees the numbers of the same seed."""
    return torch.empty(count, device=generator.device).uniform_(low, high, generator=generator).to(device)


def _spread(value: float, name: str, most: float = math.inf) -> None:
    if not 0.0 <= value <= most:
        raise ValueError(f"{name}={value} must lie between 0 and {most:g}")


@dataclass
class _Augmentation:
    """What every augmentation knows of the network.

    size: R. mean, std: of the normalisation of pixels from 0 to 1. channel_order: "rgb" or "bgr", of the network and of mean and std.
    """

    size: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    channel_order: str = "rgb"

    takes_mixed_sizes: ClassVar[bool] = False
    default_margin: ClassVar[float | None] = 1.0  # of the canvas, in R; None: pictures keep their own size
    has_canvas: ClassVar[bool] = True

    @staticmethod
    def numbers_of(image_processor: Any) -> dict[str, Any]:
        """The augmentation's own numbers that are settings of the image processor; size and colours are found elsewhere."""
        return {}

    def finished(self, pixels: torch.Tensor) -> torch.Tensor:
        """RGB [..., 3, H, W] from 0 to 255 -> float32 as the network sees it; float32 is reused."""
        return normalised(in_channel_order(pixels, self.channel_order), self.mean, self.std)


@dataclass
class RandomSquareCrop(_Augmentation):
    """A random square of the resized picture: CLIP's only augmentation (section 2.5)."""

    takes_mixed_sizes: ClassVar[bool] = True

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """uint8 [B, 3, h, w], or B of [3, h, w] with their own sizes -> float32 [B, 3, R, R].

        Raises:
            ValueError: a picture smaller than R.
        """
        room = torch.tensor([[image.shape[-2] - self.size, image.shape[-1] - self.size] for image in images])
        if room.min() < 0:
            raise ValueError(
                f"a picture smaller than the crop of {self.size}: prepare pictures to {self.size} pixels or more"
            )
        draws = torch.rand(room.shape, generator=generator, device=generator.device).cpu()
        corners = (draws * (room + 1)).long().minimum(room).tolist()
        crops = [image[:, y : y + self.size, x : x + self.size] for image, (y, x) in zip(images, corners, strict=True)]
        return self.finished(torch.stack(crops))

    @staticmethod
    def lay_out(picture: Image.Image, canvas: int, resample: int) -> Image.Image:
        """The whole picture, its shorter side `canvas` long."""
        return resize_picture(picture, canvas, resample)


@dataclass
class RandomCropSquash(_Augmentation):
    """A random part of the picture with its proportions, squashed to R x R and mirrored half of the time: VSE-infinity's.

    smallest: the part has between this and the whole of each side, the same share of both; 0.6 in the released code.
    """

    smallest: float = 0.6

    takes_mixed_sizes: ClassVar[bool] = True
    default_margin: ClassVar[float | None] = None

    def __post_init__(self):
        if not 0.0 < self.smallest <= 1.0:
            raise ValueError(f"smallest={self.smallest} is no share of a side: give a number above 0, at most 1")

    def __call__(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        generator: torch.Generator | None = None,
        *,
        draws: Sequence[Sequence[float]] | None = None,
    ) -> torch.Tensor:
        """uint8 [B, 3, h, w], or B of [3, h, w] with their own sizes -> float32 [B, 3, R, R].

        Args:
            generator: to draw from, where draws are not given.
            draws: per picture, in the order of the released code: a number in [0, 1) for the share; the pixels left of the part and those
                above it, each only where the part is smaller than the picture; a number in [0, 1), above 0.5 to mirror.

        Raises:
            ValueError: neither generator nor draws, draws that do not fit the pictures, or a part without pixels.
        """
        if draws is None:
            if generator is None:
                raise ValueError("the augmentation needs a generator to draw from: give generator= or draws=")
            draws = [None] * len(images)
            numbers = torch.rand(len(images), 4, generator=generator, device=generator.device, dtype=torch.float64)
        elif len(draws) != len(images):
            raise ValueError(f"draws holds {len(draws)} lists for {len(images)} pictures: give one list a picture")
        views = torch.empty(len(images), 3, self.size, self.size, device=images[0].device)
        for row, (image, given) in enumerate(zip(images, draws, strict=True)):
            given = self._draws(image, numbers[row].tolist()) if given is None else given
            left, top, width, height, mirrored = self._part(image, given, row)
            view = squashed(image[:, top : top + height, left : left + width], self.size, self.size)
            views[row] = self.finished(view.flip(-1) if mirrored else view)
        return views

    def _sides(self, image: torch.Tensor, share: float) -> tuple[int, int]:
        """Width and height of the part."""
        ratio = self.smallest + (1 - self.smallest) * share
        return int(image.shape[-1] * ratio), int(image.shape[-2] * ratio)

    def _draws(self, image: torch.Tensor, numbers: Sequence[float]) -> list[float]:
        """Four numbers in [0, 1) -> draws of the released code: an offset is below the room, so the last one is never taken."""
        width, height = self._sides(image, numbers[0])
        rooms = (image.shape[-1] - width, image.shape[-2] - height)
        offsets = [int(number * room) for number, room in zip(numbers[1:3], rooms, strict=True) if room]
        return [numbers[0], *offsets, numbers[3]]

    def _part(self, image: torch.Tensor, draws: Sequence[float], row: int) -> tuple[int, int, int, int, bool]:
        """Left, top, width and height of the part, and whether to mirror it."""
        share, *offsets, mirror = draws
        width, height = self._sides(image, share)
        if not width or not height:
            raise ValueError(
                f"picture {row} of {image.shape[-1]} x {image.shape[-2]} pixels is too small to be cropped: leave it out"
            )
        rooms = (image.shape[-1] - width, image.shape[-2] - height)
        if len(offsets) != sum(room > 0 for room in rooms) or not all(
            0 <= offset < room for offset, room in zip(offsets, [room for room in rooms if room], strict=True)
        ):
            raise ValueError(
                f"the offsets {offsets} of picture {row} do not fit: its part of {width} x {height} pixels leaves room for "
                f"{rooms[0]} and {rooms[1]}"
            )
        offsets = [int(offset) for offset in offsets]
        left = offsets.pop(0) if rooms[0] else 0
        return left, offsets.pop() if rooms[1] else 0, width, height, mirror > 0.5

    @staticmethod
    def lay_out(picture: Image.Image, canvas: int | None, resample: int) -> Image.Image:
        """The picture in RGB, each side longer than `canvas` shrunk to it: what follows sees shares of the sides only."""
        picture = to_rgb(picture)
        if canvas is None or max(picture.size) <= canvas:
            return picture
        return resize_picture(picture, (min(picture.width, canvas), min(picture.height, canvas)), resample)


@dataclass
class RandomResizedCrop(_Augmentation):
    """A random window of a square picture, resized to R, with optional turning, mirroring, colour changes and erasing.

    Inception's random resized crop where the window lies inside (scale up to 1); with a scale above 1 the window also reaches
    beyond the border, whose pixels are repeated, so that pictures that fill their frame are shifted and shrunk too.
    For small data sets; CLIP itself needs `RandomSquareCrop` only.

    scale: smallest and largest area of the window, in areas of the picture.
    aspect: the window's width to height is drawn between 1 / (1 + aspect) and 1 + aspect, evenly in its logarithm.
    shift: the window moves up to this part of the picture's side further than it needs to stay inside.
    rotation: largest turn, in degrees. flip: chance to be mirrored (captions that say left and right suffer).
    brightness, contrast, saturation: a factor between 1 - x and 1 + x. erasing: chance that a rectangle is set to the mean colour.
    erasing_area: its smallest and largest part of the picture.
    """

    scale: Sequence[float] = (0.9, 1.0)
    aspect: float = 0.0
    shift: float = 0.0
    rotation: float = 0.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    erasing: float = 0.0
    erasing_area: Sequence[float] = (0.02, 0.2)

    default_margin: ClassVar[float | None] = 1.125
    CHUNK: ClassVar[int] = 32  # pictures whose intermediate values fit a cache; twice as fast as all at once
    GREY: ClassVar[tuple[float, float, float]] = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L

    def __post_init__(self):
        for name in ("scale", "erasing_area"):
            low, high = pair = tuple(getattr(self, name))
            if not 0.0 < low <= high:
                raise ValueError(f"{name}={list(pair)} must be two rising numbers above 0")
        for name in ("aspect", "shift", "rotation"):
            _spread(getattr(self, name), name)
        for name in ("flip", "brightness", "contrast", "saturation", "erasing"):
            _spread(getattr(self, name), name, 1.0)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 [B, 3, h, h] -> float32 [B, 3, R, R].

        Raises:
            ValueError: another dtype or shape, for instance pictures that are not square.
        """
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or images.shape[2] != images.shape[3]
            or images.dtype != torch.uint8
        ):
            raise ValueError(
                f"expected square uint8 pictures [B, 3, h, h], got {images.dtype} of shape {tuple(images.shape)}"
            )
        count, device = len(images), images.device
        plan = (*self._windows(count, generator, device), *self._factors(count, generator, device))
        hidden = self._hidden(count, generator, device) if self.erasing else None
        views = torch.empty(count, 3, self.size, self.size, device=device)
        for start in range(0, count, self.CHUNK):
            some = slice(start, start + self.CHUNK)
            views[some] = self._view(images[some], *(part[some] for part in plan))
        return views if hidden is None else views.masked_fill_(hidden, 0.0)

    def _view(self, images, columns, rows, bright, contrast, colour) -> torch.Tensor:
        """[b, 3, h, h], places [b, R, 2] and factors [b, 1, 1] -> [b, 3, R, R], normalised."""
        grid = columns[:, None] + rows[:, :, None]  # [b, R, R, 2]
        views = functional.grid_sample(
            images.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        if self.brightness or self.contrast or self.saturation:
            grey = torch.tensor(self.GREY, device=views.device)
            mix = colour * torch.eye(3, device=views.device) + (1 - colour) * grey.expand(3, 3)  # [b, 3, 3]
            mean_grey = (views.mean(dim=(2, 3)) @ grey)[:, None, None] * bright
            offset = (mean_grey * (1 - contrast)).expand(-1, 3, 1)
            # each of the three changes is affine in the pixel: one matrix a picture
            views = torch.baddbmm(offset, bright * contrast * mix, views.flatten(2)).clamp_(0, 255).view_as(views)
        return self.finished(views)

    def _factors(self, count: int, generator: torch.Generator, device: torch.device) -> list[torch.Tensor]:
        """Factors of brightness, contrast and saturation, each [B, 1, 1]."""
        strengths = (self.brightness, self.contrast, self.saturation)
        return [(1 + _uniform(generator, count, -1, 1, device) * strength)[:, None, None] for strength in strengths]

    def _windows(
        self, count: int, generator: torch.Generator, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, R, 2] twice: a pixel of the result is read at the sum of its column's and its row's (x, y), from -1 to 1."""
        area = _uniform(generator, count, *self.scale, device)
        stretch = (_uniform(generator, count, -1, 1, device) * math.log1p(self.aspect)).exp()
        longest = max(1.0, math.sqrt(self.scale[1]))
        width = (area * stretch).sqrt().clamp(max=longest)
        height = (area / stretch).sqrt().clamp(max=longest)
        centre_x = _uniform(generator, count, -1, 1, device) * ((1 - width).abs() + 2 * self.shift)
        centre_y = _uniform(generator, count, -1, 1, device) * ((1 - height).abs() + 2 * self.shift)
        angle = _uniform(generator, count, -1, 1, device) * math.radians(self.rotation)
        side = torch.where(_uniform(generator, count, 0, 1, device) < self.flip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        place = (torch.arange(self.size, device=device) * 2 + 1) / self.size - 1  # pixel centres, [R]
        along_x = torch.stack([cos, sin], dim=1) * (width * side)[:, None]
        along_y = torch.stack([-sin, cos], dim=1) * height[:, None]
        columns = place[:, None] * along_x[:, None] + torch.stack([centre_x, centre_y], dim=1)[:, None]
        return columns, place[:, None] * along_y[:, None]

    def _hidden(self, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """bool [B, 1, R, R]: the rectangle to erase, of some pictures."""
        chosen = _uniform(generator, count, 0, 1, device) < self.erasing
        area = _uniform(generator, count, *self.erasing_area, device)
        stretch = _uniform(generator, count, -math.log(2), math.log(2), device).exp()
        place = (torch.arange(self.size, device=device) + 0.5) / self.size
        inside = []
        for half in ((area * stretch).sqrt() / 2, (area / stretch).sqrt() / 2):
            centre = _uniform(generator, count, 0, 1, device)
            inside.append((place - centre[:, None]).abs() < half[:, None])  # [B, R]
        return inside[0][:, None, :, None] & inside[1][:, None, None, :] & chosen[:, None, None, None]

    @staticmethod
    def lay_out(picture: Image.Image, canvas: int, resample: int) -> Image.Image:
        """The middle square of the picture, `canvas` long."""
        return centre_crop(resize_picture(picture, canvas, resample), canvas, canvas)


@dataclass
class WholePatches(_Augmentation):
    """Nothing random: pictures resized to whole patches, which keeps their proportions, and padded to one canvas. ViLT's, section 4.2.

    longest, divisor: bound of the longer side and side of a patch, as `whole_patches_size` has them. resample: Pillow's number of the way
    of resizing.
    """

    longest: int | None = None
    divisor: int = 32
    resample: int = Image.Resampling.BICUBIC

    takes_mixed_sizes: ClassVar[bool] = True
    default_margin: ClassVar[float | None] = None
    has_canvas: ClassVar[bool] = False

    @staticmethod
    def numbers_of(image_processor: Any) -> dict[str, Any]:
        sizes, divisor = dict(image_processor.size), getattr(image_processor, "size_divisor", None)
        if not divisor or not sizes.get("shortest_edge"):
            raise ValueError(
                f"the image processor's size {sizes} and size_divisor {divisor} are no bounds of whole patches: it needs a "
                "shortest_edge and a size_divisor"
            )
        return {"longest": sizes.get("longest_edge"), "divisor": divisor, "resample": image_processor.resample}

    def resized_size(self, picture: Image.Image) -> tuple[int, int]:
        """Width and height that the model sees; a picture that is too thin is an error."""
        return whole_patches_size(*picture.size, self.size, self.longest, self.divisor)

    def resized(self, picture: Image.Image) -> Image.Image:
        """A picture in RGB at the size that the model sees."""
        return resize_width_first(picture, self.resized_size(picture), self.resample)

    def batch(self, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Resized uint8 [3, h, w] to `pixel_values` float32 [B, 3, H, W] and `pixel_mask` int64 [B, H, W]."""
        values, mask = padded([self.finished(image) for image in images])
        return {"pixel_values": values, "pixel_mask": mask}

    def __call__(
        self, images: Sequence[torch.Tensor], generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """B of uint8 [3, h, w] as `lay_out` made them -> `pixel_values` float32 [B, 3, H, W], `pixel_mask` int64 [B, H, W]."""
        return self.batch(images)

    def lay_out(self, picture: Image.Image, canvas: int | None, resample: int) -> Image.Image:
        """The picture in RGB, resized."""
        return self.resized(to_rgb(picture))


@dataclass
class WholePatchesRandAugment(WholePatches):
    """ViLT's augmentation of fine-tuning, section 3.4: RandAugment on the picture as it is, and only then resized to whole patches.

    count, magnitude: of `RandAugment`.
    """

    count: int = 2
    magnitude: float = 9
    policy: RandAugment = field(init=False, repr=False)

    has_canvas: ClassVar[bool] = True

    def __post_init__(self):
        self.policy = RandAugment(self.count, self.magnitude)

    def __call__(
        self,
        images: Sequence[torch.Tensor],
        generator: torch.Generator | None = None,
        *,
        draws: Sequence[Draws] | None = None,
    ) -> dict[str, torch.Tensor]:
        """B of uint8 [3, h, w] -> `pixel_values` float32 [B, 3, H, W], `pixel_mask` int64 [B, H, W].

        Args:
            generator: to draw from, where draws are not given.
            draws: per picture names of operations and signs, as `RandAugment` takes them.

        Raises:
            ValueError: neither generator nor draws, draws that do not fit the pictures or the operations, a picture that is too thin.
        """
        if draws is None:
            if generator is None:
                raise ValueError("the augmentation needs a generator to draw from: give generator= or draws=")
            draws = self.policy.draws(len(images), generator)
        elif len(draws) != len(images):
            raise ValueError(f"draws holds {len(draws)} entries for {len(images)} pictures: give one a picture")
        pictures = [
            self.resized(self.policy(picture_from_array(image, channels_first=True), *given))
            for image, given in zip(images, draws, strict=True)
        ]
        return self.batch([to_tensor(picture) for picture in pictures])

    def lay_out(self, picture: Image.Image, canvas: int | None, resample: int) -> Image.Image:
        """The picture in RGB; a longer side beyond `canvas` is shrunk to it, with the proportions kept.

        Raises:
            ValueError: a picture that is too thin to be resized later: now its record is known.
        """
        picture = _within(to_rgb(picture), canvas, resample)
        self.resized_size(picture)
        return picture


View = tuple[Sequence[int] | None, bool, Sequence[str], Sequence[float]]  # window, mirrored, operations and their draws


@dataclass
class RandomAugmentCrop(_Augmentation):
    """A random window resized to R x R, mirrored half of the time, and then `RandomAugment`: that of "Align before Fuse".

    scale: smallest and largest area of the window, in areas of the picture: (0.2, 1) in the paper's pre-training, (0.5, 1) in fine-tuning;
    None: no window, the whole picture is resized, as for places in pictures. aspect: the window's width to height is drawn between
    1 / aspect and aspect, evenly in its logarithm. flip: chance to be mirrored (captions that say left and right suffer).
    count, magnitude: of `RandomAugment`. resample: Pillow's number of the way of resizing.
    """

    scale: Sequence[float] | None = (0.2, 1.0)
    aspect: float = 4 / 3
    flip: float = 0.5
    count: int = 2
    magnitude: float = 7
    resample: int = Image.Resampling.BICUBIC
    policy: random_augment.RandomAugment = field(init=False, repr=False)

    takes_mixed_sizes: ClassVar[bool] = True
    default_margin: ClassVar[float | None] = None
    ATTEMPTS: ClassVar[int] = 10  # at a window that fits

    def __post_init__(self):
        if self.scale is not None:
            low, high = tuple(self.scale)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(f"scale={[low, high]} must be two rising numbers above 0, at most 1")
        if self.aspect < 1.0:
            raise ValueError(f"aspect={self.aspect} must be 1 or more: the window is up to so much wider or higher")
        _spread(self.flip, "flip", 1.0)
        self.policy = random_augment.RandomAugment(self.count, self.magnitude)

    @staticmethod
    def numbers_of(image_processor: Any) -> dict[str, Any]:
        return {"resample": image_processor.resample}

    @property
    def has_canvas(self) -> bool:
        return self.scale is not None

    def draws(self, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> list[View]:
        """What `__call__` takes for pictures of so many (width, height)."""
        windows, flips = (
            torch.rand(len(sizes), count, generator=generator, device=generator.device, dtype=torch.float64).tolist()
            for count in (4 * self.ATTEMPTS, 1)
        )
        policies = self.policy.draws(len(sizes), generator)
        return [
            (None if self.scale is None else self._window(*size, numbers), flip < self.flip, *policy)
            for size, numbers, (flip,), policy in zip(sizes, windows, flips, policies, strict=True)
        ]

    def _window(self, width: int, height: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width: the first of ten attempts that fits, else the largest one in the middle."""
        low, high = self.scale
        for area, stretch, down, across in zip(*[iter(numbers)] * 4, strict=True):
            area, stretch = width * height * (low + (high - low) * area), self.aspect ** (2 * stretch - 1)
            wide, tall = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
            if 0 < wide <= width and 0 < tall <= height:
                return int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide
        wide = min(width, round(height * self.aspect))
        tall = min(height, round(width * self.aspect))
        return (height - tall) // 2, (width - wide) // 2, tall, wide

    def __call__(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        generator: torch.Generator | None = None,
        *,
        draws: Sequence[View] | None = None,
    ) -> torch.Tensor:
        """uint8 [B, 3, h, w], or B of [3, h, w] with their own sizes -> float32 [B, 3, R, R].

        Args:
            generator: to draw from, where draws are not given.
            draws: per picture the window (top, left, height, width) or None for the whole, whether to mirror it, and names of operations
                and their numbers as `RandomAugment` takes them.

        Raises:
            ValueError: neither generator nor draws, draws that do not fit the pictures or the operations.
        """
        if draws is None:
            if generator is None:
                raise ValueError("the augmentation needs a generator to draw from: give generator= or draws=")
            draws = self.draws([(image.shape[-1], image.shape[-2]) for image in images], generator)
        elif len(draws) != len(images):
            raise ValueError(f"draws holds {len(draws)} entries for {len(images)} pictures: give one a picture")
        views = [self._view(image, *given) for image, given in zip(images, draws, strict=True)]
        return self.finished(torch.stack(views))

    def _view(self, image: torch.Tensor, window: Sequence[int] | None, mirrored: bool, names, numbers) -> torch.Tensor:
        """uint8 [3, h, w] -> [3, R, R]."""
        height, width = image.shape[-2:]
        if window is not None:
            top, left, tall, wide = window
            if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
                raise ValueError(
                    f"the window (top, left, height, width) of {tuple(window)} leaves the picture of {width} x {height} pixels"
                )
            image = image[:, top : top + tall, left : left + wide]
        picture = resize_width_first(
            picture_from_array(image, channels_first=True), (self.size, self.size), self.resample
        )
        pixels = to_tensor(picture)
        pixels = (pixels.flip(-1) if mirrored else pixels).permute(1, 2, 0).numpy()
        return torch.from_numpy(self.policy(pixels, names, numbers)).permute(2, 0, 1)

    def lay_out(self, picture: Image.Image, canvas: int | None, resample: int) -> Image.Image:
        """The picture in RGB, a longer side beyond `canvas` shrunk to it; without windows resized as the model sees it."""
        picture = to_rgb(picture)
        if self.scale is None:
            return resize_width_first(picture, (self.size, self.size), self.resample)
        return _within(picture, canvas, resample)


def _within(picture: Image.Image, canvas: int | None, resample: int) -> Image.Image:
    """The picture with its longer side shrunk to `canvas` where it is longer, and its proportions kept."""
    if canvas is None or max(picture.size) <= canvas:
        return picture
    width, height = (max(1, round(side * canvas / max(picture.size))) for side in picture.size)
    return resize_picture(picture, (width, height), resample)


AUGMENTATIONS = {
    "random_square_crop": RandomSquareCrop,
    "random_resized_crop": RandomResizedCrop,
    "random_crop_squash": RandomCropSquash,
    "pixelbert": WholePatches,
    "pixelbert_randaugment": WholePatchesRandAugment,
    "random_augment": RandomAugmentCrop,
}


def build_augmentation(
    name: str,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    channel_order: str = "rgb",
    **numbers: Any,
) -> RandomSquareCrop | RandomResizedCrop | RandomCropSquash | WholePatches | RandomAugmentCrop:
    """The augmentation of that name.

    Raises:
        ValueError: unknown name, or a number it does not have.
    """
    of_network = {field.name for field in fields(_Augmentation)}
    known = [field.name for field in fields(_kind(name)) if field.init and field.name not in of_network]
    for number in numbers:
        if number not in known:
            near = difflib.get_close_matches(number, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"the augmentation {name} has no number {number!r}: {hint}")
    return AUGMENTATIONS[name](size, mean, std, channel_order, **numbers)


def _kind(name: str) -> type[_Augmentation]:
    if name not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


class TrainingTransform:
    """The two parts of a training transform, with size and colours of an image processor.

    `prepare`: a PIL image -> uint8 [3, h, w], always the same. `augment`: (uint8 [B, 3, h, w], generator) -> float32 [B, 3, R, R], or a
    dict of `pixel_values` [B, 3, H, W] and `pixel_mask` [B, H, W] where pictures keep their proportions (the names that start with
    "pixelbert").

    Args:
        image_processor: with `size`, `crop_size`, `resample`, `image_mean`, `image_std` as transformers' have, perhaps `size_divisor`,
            `do_rescale`, `rescale_factor`, `channel_order`, `background` and `high_byte`.
        name: of the augmentation; CLIP's own if not given.
        canvas: pixels to which a picture is reduced once; pictures kept in memory are as large. `random_square_crop`: length of the shorter
            side, R if not given. `random_resized_crop`: of the middle square, 9/8 R if not given. `random_crop_squash`: longest side,
            each axis on its own and antialiased; if not given pictures keep their size, as in the released code. `pixelbert_randaugment`
            and `random_augment`: longest side, with proportions kept; else as before. `pixelbert` and `random_augment` with `scale` None
            have none: their pictures are kept as the model sees them.
        numbers: of the augmentation.

    Raises:
        ValueError: a canvas smaller than R or where there is none, an unknown name or number, an image processor without the settings
            that the augmentation needs.
    """

    def __init__(
        self, image_processor: Any, name: str = "random_square_crop", *, canvas: int | None = None, **numbers: Any
    ):
        side = _side(image_processor)
        numbers = _kind(name).numbers_of(image_processor) | numbers
        self.augment = build_augmentation(name, side, *_colours(image_processor), **numbers)
        if canvas is not None and not self.augment.has_canvas:
            raise ValueError(
                f"canvas={canvas}: pictures of {name} are kept at the size that the model sees; leave it out"
            )
        margin = self.augment.default_margin
        self.canvas = round(side * margin) if canvas is None and margin is not None else canvas
        if self.canvas is not None and self.canvas < side:
            raise ValueError(
                f"canvas={self.canvas} is smaller than the {side} pixels the model sees: give {side} or more"
            )
        self.resample = image_processor.resample
        self.background = getattr(image_processor, "background", None)
        self.high_byte = getattr(image_processor, "high_byte", False)

    def prepare(self, picture: Image.Image) -> torch.Tensor:
        """PIL image -> uint8 [3, h, w], contiguous.

        Raises:
            ValueError: no pixels, too many, or a mode without a way to RGB.
        """
        check_size(*picture.size)
        picture = eight_bits(picture) if self.high_byte else picture
        laid_out = self.augment.lay_out(on_background(picture, self.background), self.canvas, self.resample)
        return to_tensor(to_rgb(laid_out)).contiguous()


def _colours(image_processor: Any) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean and deviation of pixels from 0 to 1, and the order of the channels."""
    factor = getattr(image_processor, "rescale_factor", 1 / 255) if getattr(image_processor, "do_rescale", True) else 1
    # (pixel * factor - mean) / std, of pixels that were divided by 255
    mean, std = (
        [value / (255 * factor) for value in part] for part in (image_processor.image_mean, image_processor.image_std)
    )
    return mean, std, getattr(image_processor, "channel_order", "rgb")


def _side(image_processor: Any) -> int:
    """R of an image processor: what it crops to, or else resizes to, the shorter side where it has bounds for both."""
    cropped = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else None
    sizes: Mapping[str, Any] = dict(cropped or image_processor.size)
    sides = {value for name, value in sizes.items() if value and name != "longest_edge"}
    if len(sides) != 1:
        raise ValueError(f"the image processor's size {sizes} is no square: set its size and crop_size to one number")
    return int(sides.pop())
