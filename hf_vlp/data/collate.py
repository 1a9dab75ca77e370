"""Pairs to one batch: texts tokenized together, pictures augmented together.

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
        processor: called as `processor(text=[...])` and, without `augment`, also with `images=[...]`.
        augment: (uint8 [B, 3, h, w], torch.Generator) -> float [B, 3, H, W], normalised. Needs pictures of one size, unless it
            has a true attribute `takes_mixed_sizes`: then it is given a list of uint8 [3, h, w].
        seed: of the augmentation.
        max_length: longest text in tokens; the tokenizer's own bound if not given.
    """

    def __init__(
        self,
        processor: Any,
        augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
        seed: int = 0,
        max_length: int | None = None,
    ):
        self.processor, self.augment, self.seed, self.max_length = processor, augment, seed, max_length

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `pixel_values` float [B, 3, H, W], `input_ids` and `attention_mask` int64 [B, L] (L: the longest text),
            `image_ids` int64 [B].

        Raises:
            ValueError: no items, or pictures of several sizes with `augment`.
        """
        if not items:
            raise ValueError("cannot make a batch of no items.")
        texts = [item["text"] for item in items]
        pictures = [item["image"] for item in items]
        options = {} if self.max_length is None else {"max_length": self.max_length}
        if self.augment is None:
            batch = dict(self.processor(images=pictures, text=texts, return_tensors="pt", padding=True, **options))
        else:
            batch = dict(self.processor(text=texts, return_tensors="pt", padding=True, **options))
            mixed = getattr(self.augment, "takes_mixed_sizes", False)
            batch["pixel_values"] = self.augment(pictures if mixed else self._stack(pictures), self._generator(items))
        batch["image_ids"] = torch.tensor([item["image_id"] for item in items], dtype=torch.int64)
        return batch

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
