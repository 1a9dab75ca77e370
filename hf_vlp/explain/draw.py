"""Maps over a picture, drawn with Pillow alone."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

FAINT = 0.25  # how much of a cold patch is left
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


def map_sheet(
    picture: Image.Image, titles: Sequence[str], heats: Sequence[torch.Tensor], *, columns: int = 4, side: int = 240
) -> Image.Image:
    """One picture sheet: the picture under each map, with its title above.

    Args:
        heats: maps [h, w] from 0 to 1, as many as titles. side: longer side of a cell in pixels.

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
        sheet.paste(overlay(small, heat), (left, top + TITLE))
    return sheet
