"""Cells of a grid of image features left out while training.

VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding" (https://arxiv.org/abs/2011.04305), size augmentation.
"""

import torch


class GridDropping:
    """Draws which cells of each image stay.

    Each image has one uniform draw. At or below `rate` it keeps all cells; above, it loses each cell with the chance rate x draw, so
    between rate^2 and rate of them.

    Args:
        cells: P, of one image. rate: 0.2 in the paper.

    Raises:
        ValueError: no cell, or a rate outside 0 to 1.
    """

    def __init__(self, cells: int, rate: float = 0.2):
        if cells < 1 or not 0 <= rate <= 1:
            raise ValueError(f"cells={cells} must be 1 or more, and rate={rate} a share of them from 0 to 1, such as 0.2")
        self.cells, self.rate = cells, rate

    def __call__(
        self,
        images: int,
        generator: torch.Generator | None = None,
        *,
        cell_draws: torch.Tensor | None = None,
        image_draws: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`grid_mask` [images, P] int64, 1 at cells that stay; at least one of each image does.

        `cell_draws` [images, P] and `image_draws` [images], from 0 to 1, are drawn from the generator where not given.

        Raises:
            ValueError: neither draws nor a generator, or draws of another shape.
        """
        if (cell_draws is None or image_draws is None) and generator is None:
            raise ValueError("the augmentation needs a generator to draw from: give generator=, or cell_draws= and image_draws=")
        if cell_draws is None:
            cell_draws = torch.rand(images, self.cells, generator=generator, dtype=torch.float64)
        if image_draws is None:
            image_draws = torch.rand(images, generator=generator, dtype=torch.float64)
        if cell_draws.shape != (images, self.cells) or image_draws.shape != (images,):
            raise ValueError(
                f"draws of the shapes {tuple(cell_draws.shape)} and {tuple(image_draws.shape)} do not fit {images} images of "
                f"{self.cells} cells"
            )
        # in float64, as in the original: the threshold must not depend on rounding
        cell_draws, image_draws = cell_draws.double(), image_draws.double()
        kept = cell_draws > self.rate * image_draws[:, None]
        kept |= (image_draws <= self.rate)[:, None]
        lonely = ~kept.any(dim=1)
        kept[lonely, cell_draws[lonely].argmax(dim=1)] = True
        return kept.long()
