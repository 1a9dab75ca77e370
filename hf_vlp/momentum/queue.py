"""The features of the pairs seen last, to contrast a batch with more than itself ("Momentum Contrast", https://arxiv.org/abs/1911.05722)."""

import torch
from torch import nn
from transformers import initialization as init

from hf_vlp.distributed import gather_without_gradient
from hf_vlp.objectives.momentum_contrast import UNKNOWN_IMAGE, same_image


class FeatureQueue(nn.Module):
    """A ring of the last Q pairs of features, the same on every process; all of it is saved with the model.

    `image_features`, `text_features`: [Q, E], unit rows, at random directions before there is anything. `image_ids`: [Q] int64, -100
    where the image is unknown. `position`: int64 scalar, the row to be written next.

    Writing changes these tensors in place: what a backward still needs must be a copy, as the concatenation that
    `momentum_contrastive_loss` makes.

    Args:
        size: Q, 65536 in the paper. width: E.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue holds at least 1 pair, got size {size}; contrast without a queue needs none")
        self.register_buffer("image_features", torch.empty(size, width))
        self.register_buffer("text_features", torch.empty(size, width))
        self.register_buffer("image_ids", torch.full((size,), UNKNOWN_IMAGE))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random unit rows of no known image; what came from a checkpoint stays."""
        for features in (self.image_features, self.text_features):
            init.normal_(features, generator=generator)
            init.copy_(features, nn.functional.normalize(features, dim=1))
        init.constant_(self.image_ids, UNKNOWN_IMAGE)
        init.zeros_(self.position)

    def forget_images(self) -> None:
        """The features go on as of no known image: identities are those of one data set, and another one follows."""
        self.image_ids.fill_(UNKNOWN_IMAGE)

    @torch.no_grad()
    def enqueue(
        self, image_features: torch.Tensor, text_features: torch.Tensor, image_ids: torch.Tensor | None = None
    ) -> None:
        """Writes the pairs of all processes, in the order of their ranks, over the oldest; of more than Q the last stay.

        Args:
            image_features, text_features: [B, E] unit rows of this process, the same B on each.
            image_ids: identities [B], on every process or on none.

        Raises:
            ValueError: features of other shapes.
        """
        size, width = self.image_features.shape
        if image_features.shape != text_features.shape or image_features.shape[1] != width:
            raise ValueError(
                f"the queue takes image and text features [B, {width}], got {list(image_features.shape)} and "
                f"{list(text_features.shape)}"
            )
        pairs = torch.cat([image_features, text_features], dim=1).to(self.image_features.dtype)
        pairs = gather_without_gradient(pairs)  # [N, 2 E], in one exchange
        if image_ids is None:
            image_ids = self.image_ids.new_full((len(pairs),), UNKNOWN_IMAGE)
        else:
            image_ids = gather_without_gradient(image_ids)
        places = self.position + torch.arange(len(pairs), device=pairs.device)
        images, texts = pairs[-size:].split(width, dim=1)
        rows = places[-size:] % size
        self.image_features.index_copy_(0, rows, images)
        self.text_features.index_copy_(0, rows, texts)
        self.image_ids.index_copy_(0, rows, image_ids[-size:].to(self.image_ids.dtype))
        self.position.add_(len(pairs)).remainder_(size)

    def same_image(self, image_ids: torch.Tensor) -> torch.Tensor:
        """Identities [B] -> [B, Q] bool, whether a row of the queue is of that image; unknown ones (-100) are never the same."""
        return same_image(image_ids, self.image_ids)
