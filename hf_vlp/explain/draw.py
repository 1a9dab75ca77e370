"""Maps over a picture, drawn with Pillow alone."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

FAINT = 0.25  # how much of a cold patch is left
BLUR, WEIGHT = (
    0.02,
    0.7,
)  # of a glow: deviation of its blur as a share of the longer side, power of the map that mixes the colours
JET = {  # colours from cold to hot: places from 0 to 1 and the share of the colour there
    "red": ((0.35, 0.66, 0.89, 1.0), (0.0, 1.0, 1.0, 0.5)),
    "green": ((0.125, 0.375, 0.64, 0.91), (0.0, 1.0, 1.0, 0.0)),
    "blue": ((0.0, 0.11, 0.34, 0.65), (0.5, 1.0, 1.0, 0.0)),
}
MARGIN, TITLE = 8, 22  # pixels around the cells of a sheet, and above each for its title


def on_white(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, transparent places white."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def overlay(picture: Image.Image, heat: torch.Tensor) -> Image.Image:
    """The picture where `heat` [h, w], from 0 to 1, is high, and faint and grey where it is low; patches keep their edges."""
    picture = on_white(picture)
    alpha = Image.fromarray(heat.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy())
    grey = ImageOps.grayscale(picture).convert("RGB")
    cold = Image.blend(Image.new("RGB", picture.size, "white"), grey, FAINT)
    return Image.composite(picture, cold, alpha.resize(picture.size, Image.Resampling.NEAREST))


def unit_range(heat: torch.Tensor) -> torch.Tensor:
    """A map [h, w] shifted and scaled to 0..1, float32; an even one is 0 everywhere."""
    heat = heat.float() - heat.min()
    return heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)


def glow(picture: Image.Image, heat: torch.Tensor) -> Image.Image:
    """The picture under colours from blue to red, by `heat` [h, w] of any range, resized and smoothed; cold places show the picture.

    As the figures of "Align before Fuse" (https://arxiv.org/abs/2107.07651) are drawn.
    """
    picture = on_white(picture)
    width, height = picture.size
    heat = unit_range(heat).cpu()[None, None]
    heat = F.interpolate(heat, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    heat = _blurred(heat, BLUR * max(width, height))
    heat = unit_range(heat[0, 0]).numpy()
    colours = np.stack([np.interp(heat, *places) for places in JET.values()], axis=-1) * 255
    weight = heat[..., None] ** WEIGHT
    mixed = weight * colours + (1 - weight) * np.asarray(picture, dtype=np.float64)
    return Image.fromarray(mixed.round().astype(np.uint8))


def _blurred(maps: torch.Tensor, deviation: float) -> torch.Tensor:
    """`maps` [B, 1, H, W] under a Gaussian as wide as four deviations to each side, the border repeated."""
    reach = math.ceil(4 * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])


def map_sheet(
    picture: Image.Image,
    titles: Sequence[str],
    heats: Sequence[torch.Tensor],
    *,
    columns: int = 4,
    side: int = 240,
    draw: Callable[[Image.Image, torch.Tensor], Image.Image] = overlay,
) -> Image.Image:
    """One picture sheet: the picture under each map, with its title above.

    Args:
        heats: maps [h, w] from 0 to 1, as many as titles. side: longer side of a cell in pixels. draw: one picture under one map, `overlay`
            or `glow`.

    Raises:
        ValueError: no map, or another number of titles.
    """
    if not heats or len(heats) != len(titles):
        raise ValueError(f"{len(titles)} titles for {len(heats)} maps: give one each, and at least one")
    small = ImageOps.contain(on_white(picture), (side, side))
    columns = min(columns, len(heats))
    cell = side + MARGIN, small.height + TITLE + MARGIN
    size = columns * cell[0] + MARGIN, -(-len(heats) // columns) * cell[1] + MARGIN
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (title, heat) in enumerate(zip(titles, heats)):
        left, top = MARGIN + number % columns * cell[0], MARGIN + number // columns * cell[1]
        pen.text((left, top + TITLE // 4), title, fill="black", font=font)
        sheet.paste(draw(small, heat), (left, top + TITLE))
    return sheet
