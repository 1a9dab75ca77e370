"""Batches of models that read words and image together: masked words, false images or texts, texts to be assigned to images.

ViLT (https://arxiv.org/abs/2102.03334), sections 3.2, 3.3 and 4.2, as its released code draws them, with one difference: an image is never
its own false image, nor its text its own false text, unless asked for. False ones come out of the whole data set, so that a batch may be
small. A model that finds them in its batch by similarity ("Align before Fuse", https://arxiv.org/abs/2107.07651, section 3.2) is given the
numbers that it draws them by. Depends on a processor and a masking handed in; no model knowledge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_vlp.data.collate import Collator
from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.inputs.patch_selection import draw_patches, patch_mask

Mask = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]

HIDDEN = 0.8  # of the patches to be predicted; the others stay in sight


class FalseRows:
    """Draws rows uniformly out of those that are not of a given image.

    Args:
        image_ids: [N], the image of each row.
        allow_true: draw out of all rows, those of the given image too.
    """

    def __init__(self, image_ids: np.ndarray, allow_true: bool = False):
        self._rows = np.argsort(image_ids, kind="stable")  # those of one image side by side
        self._ids = image_ids[self._rows]
        self.allow_true = allow_true

    def __call__(self, image_ids: Sequence[int], each: int, generator: torch.Generator) -> np.ndarray:
        """[B, each] rows, with replacement, none of them of the image of their line.

        Raises:
            ValueError: all rows are of one of these images.
        """
        draws = torch.rand(len(image_ids), each, generator=generator, dtype=torch.float64).numpy()
        if self.allow_true:
            return self._rows[(draws * len(self._rows)).astype(np.int64)]
        first, last = (np.searchsorted(self._ids, image_ids, side)[:, None] for side in ("left", "right"))
        others = len(self._rows) - (last - first)  # [B, 1]
        if not others.all():
            raise ValueError(
                f"the data set holds {len(self._rows)} pairs, all of one image, which then has no false one: add other images, or set "
                "allow_true=True"
            )
        place = (draws * others).astype(np.int64)
        return self._rows[place + (place >= first) * (last - first)]


class FusionPretrainingCollator(Collator):
    """Items of `ImageTextPairs` to a batch for masked words, matching and masked patches; without `pairs` or `mask` it lacks their part.

    Args:
        processor, augment, seed, max_length: as of `Collator`.
        pairs: the data set that the items are of, for false images; only those are decoded besides the items' own.
        mask: (input_ids [B, L], attention_mask [B, L], generator) -> (masked ids, labels), such as `WholeWordMasking`.
        allow_true: a false image may be the text's own, as in the released code.
        patch_size: of the model, in pixels; needed for the following two.
        max_image_length: most patches of an image, drawn anew for each pass; None keeps all.
        mask_patches: chance of each patch to be predicted from the others, 0.15 in the paper; 0 leaves masked patches out.
        negative_draws: add the numbers by which a model draws false images and texts out of the batch.

    Raises:
        ValueError: no patch size where one is needed, a limit below 1 or a chance outside 0 to 1.
    """

    def __init__(
        self,
        processor: Any,
        pairs: ImageTextPairs | None,
        mask: Mask | None,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
        *,
        allow_true: bool = False,
        patch_size: int | None = None,
        max_image_length: int | None = None,
        mask_patches: float = 0.0,
        negative_draws: bool = False,
    ):
        super().__init__(processor, augment, seed, max_length)
        if not 0 <= mask_patches <= 1:
            raise ValueError(f"mask_patches={mask_patches} is no chance: give 0 to 1, such as 0.15")
        if max_image_length is not None and max_image_length < 1:
            raise ValueError(f"max_image_length={max_image_length} leaves no patch: give 1 or more, or None for all")
        if patch_size is None and (max_image_length is not None or mask_patches):
            raise ValueError("patches can be drawn only if their size is known: give the model's patch_size")
        self.pairs, self.mask = pairs, mask
        self.patch_size, self.max_image_length, self.mask_patches = patch_size, max_image_length, mask_patches
        self.negative_draws = negative_draws
        self.false_rows = None if pairs is None else FalseRows(pairs.image_ids, allow_true)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `input_ids` and `attention_mask` int64 [B, L], whole texts; `mlm_input_ids` and `mlm_labels` int64 [B, L], masked ones and
            what was masked, -100 elsewhere; `image_ids` int64 [B].
            `pixel_values` float [B, 3, H, W] and, where the processor or `augment` makes it, `pixel_mask` [B, H, W]: the texts' own images.
            `itm_pixel_values`, `itm_pixel_mask`: the same where `itm_labels` int64 [B] is 1, false images where it is 0; half of the
            labels are 1, rounded down, in random order. H x W holds the largest picture, false ones included. Items of regions have
            `region_features` and so on in place of pixels.
            `patch_index`, `itm_patch_index` and `mpp_patch_index` int64 [B, n], of each pass, where patches are limited: the patches
            kept, as numbers in the grid of the canvas. `mpp_mask` and `mpp_replace` int64 [B, P] where patches are masked: 1 at those to
            be predicted, and of all 1 at those that are hidden if they are to be predicted.
            `negative_draws` float32 [B, 2] in [0, 1) where asked for.

        Raises:
            ValueError: no items, pictures of several sizes with an `augment` that needs one, no false image in the data set.
            RecordError: a false image that is bad, of a data set that skips none.
        """
        kind, generator = self._kind(items), self._generator(items)
        count, images, ids = len(items), [item[kind] for item in items], [item["image_id"] for item in items]
        if self.pairs is not None:
            labels = (torch.randperm(count, generator=generator) < count // 2).long()
            false = labels.eq(0).nonzero().flatten()
            rows = self.false_rows([ids[place] for place in false], 1, generator)[:, 0]
            apart = [None if self.false_rows.allow_true else ids[place] for place in false]
            images += [self.pairs.image(int(row), own) for row, own in zip(rows, apart, strict=True)]
        encoded = self._images(images, kind, generator)
        batch = {name: values[:count] for name, values in encoded.items()}
        if self.pairs is not None:
            source = torch.arange(count)
            source[false] = count + torch.arange(len(false))
            batch |= {f"itm_{name}": values[source] for name, values in encoded.items()} | {"itm_labels": labels}
        batch |= self._texts([item["text"] for item in items])
        if self.mask is not None:
            masked = self.mask(batch["input_ids"], batch["attention_mask"], generator)
            batch |= dict(zip(("mlm_input_ids", "mlm_labels"), masked, strict=True))
        batch |= self._patches(batch, generator)
        if self.negative_draws:
            batch["negative_draws"] = torch.rand(count, 2, generator=generator)
        return batch | {"image_ids": torch.tensor(ids, dtype=torch.int64)}

    def _patches(self, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Patches kept and patches to be predicted."""
        drawn = {}
        if self.max_image_length is not None:
            passes = {"": "", "itm_": "itm_"} if self.pairs is not None else {"": ""}
            passes |= {"mpp_": ""} if self.mask_patches else {}
            for name, images in passes.items():
                pixels = batch[f"{images}pixel_values"]
                mask = batch.get(f"{images}pixel_mask", torch.ones_like(pixels[:, 0], dtype=torch.int64))
                grid = patch_mask(mask, self.patch_size)
                drawn[f"{name}patch_index"] = draw_patches(grid, self.max_image_length, generator)
        if self.mask_patches:
            count, _, height, width = batch["pixel_values"].shape
            patches = (height // self.patch_size) * (width // self.patch_size)
            for name, chance in (("mpp_mask", self.mask_patches), ("mpp_replace", HIDDEN)):
                drawn[name] = (torch.rand(count, patches, generator=generator) < chance).long()
        return drawn


class TextAssignmentCollator(Collator):
    """Items of `ImageTextPairs` to a batch for assigning each text to one of two images ("Align before Fuse", section 4.2).

    Args:
        processor, augment, seed, max_length: as of `Collator`.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `input_ids` and `attention_mask` int64 [B, L]; `pixel_values` float [B, 3, H, W], image i of text i, and what else the
            processor or `augment` makes; `assignment_draws` float32 [B, 4] in [0, 1), by which the model draws two images for each text.

        Raises:
            ValueError: no items, pictures of several sizes with an `augment` that needs one.
        """
        kind, generator = self._kind(items), self._generator(items)
        batch = self._images([item[kind] for item in items], kind, generator)
        batch |= self._texts([item["text"] for item in items])
        return batch | {"assignment_draws": torch.rand(len(items), 4, generator=generator)}


class FusionRetrievalCollator(Collator):
    """Items of `ImageTextPairs` to a batch that tells an image's text from false ones.

    Args:
        processor, augment, seed, max_length: as of `Collator`.
        pairs: the data set that the items are of, for false texts.
        false_texts: of each image; 15 in the released code.
        allow_true: a false text may be the image's own, as in the released code.

    Raises:
        ValueError: no false text.
    """

    def __init__(
        self,
        processor: Any,
        pairs: ImageTextPairs,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
        *,
        false_texts: int = 15,
        allow_true: bool = False,
    ):
        super().__init__(processor, augment, seed, max_length)
        if false_texts < 1:
            raise ValueError(f"false_texts={false_texts}: an image's text is told from one false text or more")
        self.pairs, self.false_texts = pairs, false_texts
        # a row of each caption, so that all captions have the same chance
        self._items = np.repeat(np.arange(len(pairs)), pairs.caption_counts())
        self.false_rows = FalseRows(pairs.image_ids[self._items], allow_true)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these items.

        Returns:
            `input_ids` and `attention_mask` int64 [B, T, L]: T texts an image, its own first, then false ones, drawn with replacement;
            `pixel_values` float [B, 3, H, W] with `pixel_mask` [B, H, W] where the processor or `augment` makes one, or regions;
            `labels` int64 [B], 0, where the true text is.

        Raises:
            ValueError: no items, pictures of several sizes with an `augment` that needs one, no false text in the data set.
        """
        kind, generator = self._kind(items), self._generator(items)
        batch = self._images([item[kind] for item in items], kind, generator)
        rows = self.false_rows([item["image_id"] for item in items], self.false_texts, generator)
        seed = int(torch.randint(1 << 62, (), generator=generator))
        words, texts = np.random.default_rng(seed), []
        for item, false in zip(items, self._items[rows], strict=True):
            texts += [item["text"], *(self.pairs.text(int(index), words) for index in false)]
        encoded = self._texts(texts)
        batch |= {name: values.unflatten(0, (len(items), -1)) for name, values in encoded.items()}
        return batch | {"labels": torch.zeros(len(items), dtype=torch.int64)}
