"""Pairs to one batch: texts tokenized together, images augmented together.

Depends on: a processor handed in; no model knowledge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


class PairCollator:
    """Turns items of `ImageTextPairs` into the arguments of a two-tower model.

    What is random is drawn from a generator seeded by (seed, the items' `draw`), so a batch is the same whenever and
    wherever it is made.

    Args:
        processor: called as `processor(text=[...])` and, without `augment`, also with `images=[...]`; where the items hold regions,
            with `regions=[...]`.
        augment: (uint8 [B, 3, h, w], torch.Generator) -> float [B, 3, H, W], normalised. Needs pictures of one size, unless it
            has a true attribute `takes_mixed_sizes`: then it is given a list of uint8 [3, h, w]. Of regions: (list of regions,
            generator) -> list of regions, as the processor takes them.
        augment_text: (texts, generator) -> `input_ids` and `attention_mask`, in place of the processor's.
        draw_cells: (images, generator) -> `grid_mask` [images, P].
        seed: of the augmentation.
        max_length: longest text in tokens; the tokenizer's own bound if not given.
    """

    def __init__(
        self,
        processor: Any,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
        *,
        augment_text: Callable[[Sequence[str], torch.Generator], dict[str, torch.Tensor]] | None = None,
        draw_cells: Callable[[int, torch.Generator], torch.Tensor] | None = None,
    ):
        self.processor, self.augment, self.seed, self.max_length = processor, augment, seed, max_length
        self.augment_text, self.draw_cells = augment_text, draw_cells

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `pixel_values` float [B, 3, H, W], or `region_features` [B, R, F] and `region_mask` [B, R]; `input_ids` and `attention_mask`
            int64 [B, L] (L: the longest text), `image_ids` int64 [B], and `grid_mask` [B, P] where cells are drawn.

        Raises:
            ValueError: no items, or pictures of several sizes with `augment`.
        """
        if not items:
            raise ValueError("cannot make a batch of no items.")
        generator = self._generator(items)
        batch = self._images(items, generator)
        texts = [item["text"] for item in items]
        if self.augment_text is not None:
            batch |= self.augment_text(texts, generator)
        else:
            options = {} if self.max_length is None else {"max_length": self.max_length}
            batch |= dict(self.processor(text=texts, return_tensors="pt", padding=True, **options))
        if self.draw_cells is not None:
            batch["grid_mask"] = self.draw_cells(len(items), generator)
        batch["image_ids"] = torch.tensor([item["image_id"] for item in items], dtype=torch.int64)
        return batch

    def _images(self, items: Sequence[Mapping[str, Any]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        if "regions" in items[0]:
            regions = [item["regions"] for item in items]
            regions = regions if self.augment is None else self.augment(regions, generator)
            return dict(self.processor(regions=regions, return_tensors="pt"))
        pictures = [item["image"] for item in items]
        if self.augment is None:
            return dict(self.processor(images=pictures, return_tensors="pt"))
        mixed = getattr(self.augment, "takes_mixed_sizes", False)
        return {"pixel_values": self.augment(pictures if mixed else self._stack(pictures), generator)}

    def _generator(self, items: Sequence[Mapping[str, Any]]) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, *(item["draw"] for item in items)])
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    @staticmethod
    def _stack(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        sizes = {tuple(picture.shape) for picture in pictures}
        if len(sizes) > 1:
            raise ValueError(
                f"pictures of the sizes {sorted(sizes)} cannot be augmented together. Prepare to one size."
            )
        return torch.stack(list(pictures))
