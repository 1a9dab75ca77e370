"""Which patches of an image a transformer sees, where images of a batch have different sizes.

Patches are numbered row by row over the grid of the whole canvas, P = h * w of them. A selection [B, n] holds n numbers for each image;
where an image has fewer real patches, the rest of its numbers are those of padding patches, whose mask is 0.
ViLT (https://arxiv.org/abs/2102.03334), section 3.1, keeps 200 at random while pre-training.
"""

import torch


def patch_mask(pixel_mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`pixel_mask` [B, H, W], 1 at real pixels -> [B, h, w], 1 where the upper left pixel of a patch is real."""
    rows, columns = pixel_mask.shape[-2] // patch_size, pixel_mask.shape[-1] // patch_size
    return pixel_mask[:, ::patch_size, ::patch_size][:, :rows, :columns]


def raster_patches(mask: torch.Tensor) -> torch.Tensor:
    """`mask` [B, h, w] -> every real patch of each image in order, [B, n] with n as many as the fullest image has.

    In a traced graph, where shapes cannot depend on the mask, n is P.
    """
    order = mask.flatten(1).eq(0).to(torch.int8).argsort(dim=1, stable=True)
    if torch.compiler.is_compiling():
        return order
    return order[:, : max(1, int(mask.flatten(1).ne(0).sum(dim=1).max()))]


def draw_patches(mask: torch.Tensor, longest: int, generator: torch.Generator) -> torch.Tensor:
    """`mask` [B, h, w] -> at most `longest` real patches of each image, each set with the same chance, in order, [B, n].

    n is as many as the fullest image has, `longest` at most.

    Raises:
        ValueError: `longest` below 1.
    """
    if longest < 1:
        raise ValueError(f"longest={longest}: an image needs one patch or more")
    hidden = mask.flatten(1).eq(0)
    count = min(longest, max(1, int((~hidden).sum(dim=1).max())))
    noise = torch.rand(hidden.shape, generator=generator, device=generator.device).to(hidden.device)
    place = torch.arange(hidden.shape[1], device=hidden.device)
    # real patches in a random order, then the padding ones in their own
    chosen = torch.where(hidden, 1 + place, noise).argsort(dim=1)[:, :count]
    return chosen.gather(1, (chosen + hidden.shape[1] * hidden.gather(1, chosen)).argsort(dim=1))
