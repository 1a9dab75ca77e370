"""ALBEF's image processors: Pillow, with the numbers of the released code, and torchvision, faster and a grey level away.

ALBEF, "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (https://arxiv.org/abs/2107.07651).
The whole picture becomes a square, whatever its proportions. The order of the two passes of resizing and its reason are in
`hf_vlp.inputs.image_transforms`.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import PILImageResampling, SizeDict, pil_torch_interpolation_mapping

from hf_vlp.inputs import image_transforms as transforms
from hf_vlp.inputs.pictures import Pictures, PilPictures, finished


class _AlbefOptions(Pictures):
    """What both backends share: defaults, those of pre-training."""

    resample = PILImageResampling.BICUBIC
    image_mean = transforms.CLIP_MEAN
    image_std = transforms.CLIP_STD
    size = {"height": 256, "width": 256}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """Pictures to `pixel_values`, float32 [B, 3, R, R].

        Args:
            images: one picture or a list: PIL images of any mode, paths, or uint8 arrays or tensors [h, w], [C, h, w] or [h, w, C] with
                C of 1, 3 (RGB) or 4 (RGBA); also one array or tensor of four axes.
            kwargs: any option of the processor for this call. `size` is R, or holds `height` and `width`: 256 in pre-training, 384 in
                most fine-tuning.

        Raises:
            ValueError: no picture, one without pixels or with too many, another dtype or shape, a file that does not decode, a mode
                without a way to RGB, another number of channels than means and deviations, a size that is no height and width.
        """
        return super().preprocess(images, *args, **kwargs)


class VlpAlbefImageProcessorPil(PilPictures, _AlbefOptions, PilBackend):
    """The exact backend: every number as the released code computes it with the Pillow of its time, whatever Pillow is installed."""

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        return_tensors: str | None = None,
        **options,
    ) -> BatchFeature:
        pixels: list[np.ndarray] = []
        for image in images:
            if do_resize:
                image = transforms.resize_width_first(image, _target(size), resample)
            pixels.append(finished(transforms.to_tensor(image), **options).numpy())
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


class VlpAlbefImageProcessor(_AlbefOptions, TorchvisionBackend):
    """The fast backend, also for pictures that are tensors already, on their device or on `device`.

    Antialiased bicubic resizing of 8-bit numbers differs from the exact one by a grey level or two here and there.
    """

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        **options,
    ) -> BatchFeature:
        groups, places = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, group in groups.items():  # uint8 [b, C, h, w]
            if do_resize:
                width, height = _target(size)
                mode = pil_torch_interpolation_mapping.get(resample, resample)
                group = tv.resize(group, [height, width], interpolation=mode, antialias=True)
            groups[shape] = finished(group, **options)
        pixels = reorder_images(groups, places)
        if len({tuple(image.shape) for image in pixels}) == 1:
            pixels = torch.stack(pixels)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def _target(size: SizeDict) -> tuple[int, int]:
    """(width, height) of every picture, resized."""
    if not (size.height and size.width):
        raise ValueError(f"size must hold height and width, both 1 or more; got {dict(size)}")
    return size.width, size.height
