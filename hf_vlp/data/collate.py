"""Pairs to one batch: texts tokenized together, images augmented together.

Depends on: a processor handed in; no model knowledge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


class Collator:
    """What collators share: images encoded together, texts tokenized together, and draws that are a function of the items.

    What is random is drawn from a generator seeded by (seed, the items' `draw`), so a batch is the same whenever and
    wherever it is made.

    Args:
        processor: called as `processor(text=[...])` and, without `augment`, also with `images=[...]`; where the items hold regions,
            with `regions=[...]`.
        augment: (uint8 [B, 3, h, w], torch.Generator) -> float [B, 3, H, W], normalised, or a dict that holds these as `pixel_values`
            and their `pixel_mask`. Needs pictures of one size, unless it has a true attribute `takes_mixed_sizes`: then it is given a
            list of uint8 [3, h, w]. Of regions: (list of regions, generator) -> list of regions, as the processor takes them.
        seed: of the augmentation.
        max_length: longest text in tokens; the tokenizer's own bound if not given.
    """

    def __init__(
        self,
        processor: Any,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
    ):
        self.processor, self.augment, self.seed, self.max_length = processor, augment, seed, max_length

    def _images(self, images: Sequence[Any], kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Pictures (`kind` "image" or "images") or "regions", augmented or as the processor takes them; tensors of as many rows."""
        if kind == "regions":
            regions = images if self.augment is None else self.augment(images, generator)
            return dict(self.processor(regions=regions, return_tensors="pt"))
        if self.augment is None:
            return dict(self.processor(images=images, return_tensors="pt"))
        mixed = getattr(self.augment, "takes_mixed_sizes", False)
        views = self.augment(images if mixed else self._stack(images), generator)
        return views if isinstance(views, dict) else {"pixel_values": views}

    def _texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [texts, L], padded to the longest."""
        options = {} if self.max_length is None else {"max_length": self.max_length}
        return dict(self.processor(text=texts, return_tensors="pt", padding=True, **options))

    @staticmethod
    def _kind(items: Sequence[Mapping[str, Any]]) -> str:
        """The key of the items' images.

        Raises:
            ValueError: no items.
        """
        if not items:
            raise ValueError("cannot make a batch of no items.")
        return next(name for name in ("image", "images", "regions") if name in items[0])

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


class PairCollator(Collator):
    """Turns items of `ImageTextPairs` into the arguments of a two-tower model.

    Args:
        processor, augment, seed, max_length: as of `Collator`.
        augment_text: (texts, generator) -> `input_ids` and `attention_mask`, in place of the processor's.
        draw_cells: (images, generator) -> `grid_mask` [images, P].
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
        super().__init__(processor, augment, seed, max_length)
        self.augment_text, self.draw_cells = augment_text, draw_cells

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `pixel_values` float [B, 3, H, W], with `pixel_mask` [B, H, W] where the processor or `augment` makes one, or `region_features`
            [B, R, F] and `region_mask` [B, R]; `input_ids` and `attention_mask` int64 [B, L] (L: the longest text), `image_ids` int64
            [B], and `grid_mask` [B, P] where cells are drawn.

        Raises:
            ValueError: no items, or pictures of several sizes with `augment`.
        """
        kind, generator = self._kind(items), self._generator(items)
        batch = self._images([item[kind] for item in items], kind, generator)
        texts = [item["text"] for item in items]
        batch |= self._texts(texts) if self.augment_text is None else self.augment_text(texts, generator)
        if self.draw_cells is not None:
            batch["grid_mask"] = self.draw_cells(len(items), generator)
        batch["image_ids"] = torch.tensor([item["image_id"] for item in items], dtype=torch.int64)
        return batch
