"""One picture to a tensor, with the numbers of the originals.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020), the evaluation
transform of the released code; VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding"
(https://arxiv.org/abs/2011.04305), what the released code does to raw pictures; ViLT (https://arxiv.org/abs/2102.03334), section 4.2,
the resizing to whole patches that its released code calls pixelbert.
Pictures are PIL images; R is the side of what the model sees. Depends on Pillow, numpy and torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DETECTOR_MEAN = (102.9801, 115.9465, 122.7717)  # blue, green, red from 0 to 255: of Caffe's detectors
HALF = (
    0.5,
    0.5,
    0.5,
)  # as mean and as deviation: from 0..1 to -1..1, for networks that started from ImageNet's vision transformers
CHANNEL_ORDERS = ("rgb", "bgr")

# Where Pillow takes a file for a decompression bomb: twice a quarter of a GiB of RGB.
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
CHANNELS = (1, 3, 4)


def check_size(width: int, height: int, what: str = "the picture") -> None:
    """Refuse pictures without pixels and those beyond Pillow's own bound.

    Raises:
        ValueError: a side is zero, or there are more than 178,956,970 pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{what} has no pixels: it is {width} wide and {height} high. Leave it out.")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} is {width} wide and {height} high, more than {MAX_PIXELS} pixels. Make it smaller or crop it."
        )


def picture_from_array(array: np.ndarray | torch.Tensor, channels_first: bool | None = None) -> Image.Image:
    """A PIL picture of uint8 pixels [h, w], [C, h, w] or [h, w, C] with C of 1 (grey), 3 (RGB) or 4 (RGBA).

    `channels_first` None: found out from the shape; where both ends fit, 3 channels win over 1 and 4, and the first axis over the last.

    Raises:
        ValueError: another dtype or shape, or a size that `check_size` refuses.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().numpy()
    array = channels_to_front(array, channels_first)
    array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def channels_to_front(array: Any, channels_first: bool | None = None) -> Any:
    """An array or tensor of uint8 pixels as [C, h, w], a view; see `picture_from_array`."""
    shape = tuple(array.shape)
    if array.dtype not in (np.uint8, torch.uint8):
        raise ValueError(
            f"pixels of an array or tensor must be uint8 from 0 to 255, got {array.dtype} of shape {shape}: convert them, "
            "for instance (pixels * 255).round() to uint8 where they lie between 0 and 1"
        )
    if len(shape) == 2:
        array, channels_first = array[None], True
    elif len(shape) != 3:
        raise ValueError(f"a picture must be [h, w], [C, h, w] or [h, w, C], got shape {shape}: give several in a list")
    if channels_first is None:
        ends = (shape[0], shape[2])
        channels_first = ends[0] in CHANNELS and (ends[0] == 3 or ends[1] not in CHANNELS or ends[1] != 3)
    if not channels_first:
        array = array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else array.permute(2, 0, 1)
    channels, height, width = array.shape
    check_size(width, height, f"the picture of shape {shape}")
    if channels not in CHANNELS:
        raise ValueError(f"a picture must have 1, 3 or 4 channels, got shape {shape}")
    return array


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits as mode L with the high byte of every pixel; other modes as they are.

    Mode I counts as 16 bits where a pixel is above 255. Pillow itself, and so the original, cuts every pixel off at 255, which
    leaves most such pictures white.

    Raises:
        ValueError: mode I with pixels outside 0..65535.
    """
    if not picture.mode.startswith("I"):
        return picture
    pixels = np.asarray(picture)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"a picture of mode I has pixels from {low} to {high}: bring them to 0..255 first")
    return Image.fromarray((pixels >> (8 if picture.mode != "I" or high > 255 else 0)).astype(np.uint8))


def has_alpha(picture: Image.Image) -> bool:
    """Whether the picture says how transparent it is."""
    return picture.mode in ALPHA_MODES or "transparency" in picture.info


def on_background(picture: Image.Image, colour: Sequence[int] | None) -> Image.Image:
    """A picture with transparency laid on `colour` (red, green, blue from 0 to 255), in mode RGB; others and with None: as they are.

    Raises:
        ValueError: `colour` is none.
    """
    if colour is None:
        return picture
    if len(colour) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
        raise ValueError(f"background={colour!r} must be red, green and blue from 0 to 255")
    if not has_alpha(picture):
        return picture
    picture = _converted(picture, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*colour, 255)), picture).convert("RGB")


def resized_size(width: int, height: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) after resizing: the shorter side to `size` with the longer one cut to a whole number, or to a (width, height).

    Raises:
        ValueError: either size is refused by `check_size`.
    """
    check_size(width, height)
    if isinstance(size, int):
        longer = int(size * max(width, height) / min(width, height))
        size = (size, longer) if width <= height else (longer, size)
    check_size(*size, f"the picture of {width} x {height} pixels, once resized,")
    return size


def resize_picture(
    picture: Image.Image, size: int | tuple[int, int], resample: int = Image.Resampling.BICUBIC
) -> Image.Image:
    """Pillow's antialiased resizing to `resized_size`.

    In the picture's own mode: Pillow takes the nearest pixel for palettes and 1-bit pictures, and weighs colours by their opacity
    where there is alpha.
    """
    target = resized_size(*picture.size, size)
    return picture.resize(target, resample)


def whole_patches_size(
    width: int, height: int, shortest: int, longest: int | None = None, divisor: int = 32
) -> tuple[int, int]:
    """(width, height) after ViLT's resizing to whole patches, which keeps the proportions but for less than a patch.

    The shorter side becomes `shortest`, unless the longer one were then beyond `longest`: it becomes `longest`. Each is rounded, halves up,
    and cut to a multiple of `divisor`: with 384 and 639 no side is longer than 608.

    Args:
        longest: 1333 / 800 of `shortest`, cut to a whole number, if not given; the proportion is that of detectors on COCO.
        divisor: side of a patch.

    Raises:
        ValueError: bounds below one patch, a size that `check_size` refuses, or a picture so thin that no whole patch is left of a side.
    """
    check_size(width, height)
    longest = int(1333 / 800 * shortest) if longest is None else longest
    if divisor < 1 or min(shortest, longest) < divisor:
        raise ValueError(
            f"pictures cannot be resized to a shorter side of {shortest} and a longer one of {longest} at most in patches of {divisor}: "
            "give bounds of one patch or more"
        )
    scale = shortest / min(width, height)
    sides = (scale * width, shortest) if height < width else (shortest, scale * height)
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = (sides[0] * scale, sides[1] * scale)
    sides = [int(side + 0.5) for side in sides]
    if min(sides) < divisor:
        raise ValueError(
            f"the picture of {width} x {height} pixels is too thin: resized to {sides[0]} x {sides[1]} it is thinner than one patch of "
            f"{divisor}. Crop it, frame it or leave it out"
        )
    return sides[0] // divisor * divisor, sides[1] // divisor * divisor


def resize_width_first(
    picture: Image.Image, size: tuple[int, int], resample: int = Image.Resampling.BICUBIC
) -> Image.Image:
    """Pillow's antialiased resizing to (width, height): the width first, rounded to 8 bits, then the height.

    One call does the same in the Pillow of ViLT's time; newer ones take the height first where that is less work, and some pixels
    differ by up to seven grey levels.
    """
    return picture.resize((size[0], picture.height), resample).resize(size, resample)


def crop_offset(length: int, crop: int) -> int:
    """Where a central crop starts: half of what is left over, a half rounded to the even neighbour.

    Below zero where the crop is longer than the picture: that much is filled with zeros.
    """
    return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)


def centre_crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture."""
    left, top = crop_offset(picture.width, width), crop_offset(picture.height, height)
    return picture.crop((left, top, left + width, top + height))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three channels as Pillow makes them: alpha is dropped, not composed, and what is above 255 (modes I and F) cut off.

    Raises:
        ValueError: Pillow knows no way from this mode.
    """
    return _converted(picture, "RGB")


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    try:
        return picture.convert(mode)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"a picture of mode {picture.mode} cannot be converted to {mode} ({error}): save it as PNG or JPEG"
        ) from error


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture with 8-bit channels -> uint8 [C, h, w].

    Raises:
        ValueError: another mode: 1 bit, a palette, 16 bits or more.
    """
    pixels = np.array(picture)
    if pixels.dtype != np.uint8 or picture.mode in ("P", "PA"):
        raise ValueError(f"a picture of mode {picture.mode} has no channels of 8 bits: leave do_convert_rgb on")
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalised(
    pixels: torch.Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> torch.Tensor:
    """Pixels [..., 3, H, W] from 0 to 255 -> float32 of the same shape, (pixel / 255 - mean) / std by channel; float32 is reused."""
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
    return pixels.to(torch.float32).div_(255).sub_(shift).div_(scale)


def clip_eval(
    picture: Image.Image,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    resample: int = Image.Resampling.BICUBIC,
) -> torch.Tensor:
    """CLIP's evaluation transform: resize the shorter side, crop the middle, and only then convert to RGB; numbers as the original's.

    Args:
        picture: a PIL image of any mode that Pillow resizes and converts.
        size: R.

    Returns:
        float32 [3, R, R].

    Raises:
        ValueError: no pixels, too many, or a mode without a way to RGB.
    """
    cropped = centre_crop(resize_picture(picture, size, resample), size, size)
    return normalised(to_tensor(to_rgb(cropped)), mean, std)


def squashed(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """VSE-infinity's resizing: pixels [..., C, h, w] -> float32 [..., C, height, width], each axis on its own.

    Bilinear between half-pixel centres, without antialiasing and without rounding, as OpenCV resizes float32.

    Raises:
        ValueError: either size is refused by `check_size`.
    """
    check_size(pixels.shape[-1], pixels.shape[-2])
    check_size(width, height, f"the picture of {pixels.shape[-1]} x {pixels.shape[-2]} pixels, once resized,")
    batch = pixels.to(torch.float32).reshape(-1, *pixels.shape[-3:])
    batch = functional.interpolate(batch, (height, width), mode="bilinear", align_corners=False, antialias=False)
    return batch.reshape(*pixels.shape[:-2], height, width)


def in_channel_order(pixels: torch.Tensor, order: str) -> torch.Tensor:
    """RGB pixels [..., 3, H, W] with their channels in `order`, "rgb" or "bgr".

    Raises:
        ValueError: another order.
    """
    if order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order={order!r} is unknown: choose one of {', '.join(map(repr, CHANNEL_ORDERS))}")
    return pixels.flip(-3) if order == "bgr" else pixels


def padded(images: Sequence[torch.Tensor], canvas: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [C, h, w] of several sizes as one batch, each in the upper left corner of its canvas.

    Args:
        canvas: height and width, H and W; the largest ones of the images if not given.

    Returns:
        [B, C, H, W], zero beside the images, and their mask int64 [B, H, W], 1 where the image is.

    Raises:
        ValueError: an image beyond the canvas, or images of several numbers of channels.
    """
    shapes = [tuple(image.shape) for image in images]
    height, width = canvas or (max(shape[1] for shape in shapes), max(shape[2] for shape in shapes))
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"images of the shapes {shapes} are no batch: convert them all to RGB")
    for position, shape in enumerate(shapes):
        if shape[1] > height or shape[2] > width:
            raise ValueError(
                f"image {position} is {shape[1]} high and {shape[2]} wide, beyond the canvas of {height} x {width}: give a larger one"
            )
    pixels = images[0].new_zeros(len(images), shapes[0][0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64, device=pixels.device)
    for row, (image, (_, high, wide)) in enumerate(zip(images, shapes, strict=True)):
        pixels[row, :, :high, :wide] = image
        mask[row, :high, :wide] = 1
    return pixels, mask
