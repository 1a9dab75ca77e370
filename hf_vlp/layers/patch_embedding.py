"""Image to patch tokens, and position tables that follow the image's size."""

import torch
from torch import nn


class PatchEmbedding(nn.Conv2d):
    """Non-overlapping square patches, each mapped to width D (ViT, "An Image is Worth 16x16 Words", Eq. 1).

    Pixels to the right of, or below, the last whole patch are not seen, as with any strided convolution. Weights are those of
    the convolution; it is computed as a matrix product of the cut-out patches, which is faster, above all backward in bf16.
    """

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int, bias: bool = True):
        super().__init__(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, D, H // patch, W // patch].

        Raises:
            ValueError: for an image smaller than one patch or with another number of channels.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.in_channels:
            raise ValueError(
                f"pixel_values must be [B, {self.in_channels}, H, W], got shape {tuple(pixel_values.shape)}"
            )
        patch = self.kernel_size[0]
        if pixel_values.shape[-2] < patch or pixel_values.shape[-1] < patch:
            raise ValueError(
                f"pixel_values of {tuple(pixel_values.shape[-2:])} pixels are smaller than one patch of {patch}"
            )
        rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        pixels = pixel_values[..., : rows * patch, : columns * patch].to(self.weight.dtype)
        pixels = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [B, 3, h, patch, w, patch]
        pixels = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, P, 3 * patch * patch]
        patches = nn.functional.linear(pixels, self.weight.flatten(1), self.bias)  # [B, P, D]
        return patches.transpose(1, 2).unflatten(2, (rows, columns))


def resize_position_table(
    table: torch.Tensor, grid: tuple[int, int], prefix: int = 1, mode: str = "bicubic"
) -> torch.Tensor:
    """A learned table for a square grid, interpolated to another grid.

    `table` [prefix + g*g, D]: first `prefix` rows without a place (class token), then the g x g grid in raster order.
    Returns [prefix + h*w, D] for `grid` = (h, w), the table itself where the grid is the same; interpolation in float32
    with `mode`, pixel centres aligned (align_corners=False), the usual way of ViT fine-tuning at another resolution.

    Raises:
        ValueError: if the table's grid is not square.
    """
    side = round((table.shape[0] - prefix) ** 0.5)
    if side * side != table.shape[0] - prefix:
        raise ValueError(
            f"a position table of {table.shape[0]} rows holds no square grid behind {prefix} prefix row(s)"
        )
    if tuple(grid) == (side, side):
        return table
    square = table[prefix:].float().unflatten(0, (side, side)).permute(2, 0, 1).unsqueeze(0)  # [1, D, g, g]
    resized = nn.functional.interpolate(square, size=tuple(grid), mode=mode, align_corners=False)
    resized = resized.squeeze(0).flatten(1).transpose(0, 1).to(table.dtype)  # [h*w, D]
    return torch.cat([table[:prefix], resized])


def fitted_positions(
    table: torch.Tensor, heights: torch.Tensor, widths: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """A learned table for a square grid, interpolated to the grid of each image of a batch (ViLT's way).

    Corners of the table lie on the corners of each image (align_corners=True); one row or column alone takes the first of the table's.
    In float32, as two products with the weights of the interpolation along each axis.

    Args:
        table: [g * g, D], in raster order. heights, widths: [B], patches along each image's sides.
        grid: (h, w) of the canvas, which no image exceeds.

    Returns:
        [B, h * w, D] in the raster order of the canvas, 0 outside of an image.
    """
    side = round(table.shape[0] ** 0.5)
    with torch.autocast(table.device.type, enabled=False):
        down, along = (_fitting(sizes, longest, side) for sizes, longest in ((heights, grid[0]), (widths, grid[1])))
        rows = (down @ table.float().unflatten(0, (side, side)).flatten(1)).unflatten(2, (side, -1))  # [B, h, g, D]
        return (along.unsqueeze(1) @ rows).flatten(1, 2)  # [B, h * w, D]


def _fitting(sizes: torch.Tensor, longest: int, side: int) -> torch.Tensor:
    """Weights [B, longest, side] of the table's rows in each row of images of `sizes` [B]."""
    place = torch.arange(longest, device=sizes.device)
    scale = (side - 1) / (sizes - 1).clamp(min=1).float()
    source = torch.where(sizes > 1, scale, 0.0)[:, None] * place  # [B, longest]
    weights = (1 - (source.unsqueeze(-1) - torch.arange(side, device=sizes.device)).abs()).clamp(min=0)
    return weights * (place < sizes[:, None]).unsqueeze(-1)
