"""VSE-infinity's image processors: the whole picture squashed to a square, and the colours that each backbone was trained with.

VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding" (https://arxiv.org/abs/2011.04305).
The numbers of both backends are the same, and those of the released code.
"""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import PILImageResampling, SizeDict

from hf_vlp.inputs import image_transforms as transforms
from hf_vlp.inputs.pictures import PictureKwargs, Pictures, finished

DETECTOR = "detector"  # in the name of every backbone taken from a detector
IMAGENET_BACKBONES = ("wsl", "imagenet", "imagenet_res50", "imagenet_res152", "imagenet_resnext")


def backbone_colours(source: str) -> dict[str, Any]:
    """The options of an image processor for a backbone of the released code, by its `backbone_source`.

    Backbones of detectors see blue, green and red from 0 to 255 less a mean; the others red, green and blue as in ImageNet's recipes.

    Raises:
        ValueError: an unknown source.
    """
    if DETECTOR in source:
        return {
            "channel_order": "bgr",
            "do_rescale": False,
            "image_mean": list(transforms.DETECTOR_MEAN),
            "image_std": [1.0, 1.0, 1.0],
        }
    if source not in IMAGENET_BACKBONES:
        known = ", ".join(map(repr, (DETECTOR, *IMAGENET_BACKBONES)))
        raise ValueError(f"backbone_source={source!r} is unknown: the released code has {known}")
    return {
        "channel_order": "rgb",
        "do_rescale": True,
        "image_mean": list(transforms.IMAGENET_MEAN),
        "image_std": list(transforms.IMAGENET_STD),
    }


class VlpVseImageProcessorKwargs(PictureKwargs, total=False):
    """Options of both backends, beside those of every image processor.

    channel_order: "rgb" or "bgr", of the network's channels, and so of `image_mean` and `image_std`.
    """

    channel_order: str


class _VseOptions(Pictures):
    """All but the backend: defaults (the grid models' 512 pixels, ImageNet's colours) and what is done to a picture."""

    valid_kwargs = VlpVseImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = transforms.IMAGENET_MEAN
    image_std = transforms.IMAGENET_STD
    size = {"height": 512, "width": 512}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    channel_order = "rgb"

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """Pictures to `pixel_values`, float32 [B, 3, H, W].

        Args:
            images: one picture or a list: PIL images of any mode, paths, or uint8 arrays or tensors [h, w], [C, h, w] or [h, w, C] with
                C of 1, 3 (RGB) or 4 (RGBA); also one array or tensor of four axes.
            kwargs: any option of the processor for this call.

        Raises:
            ValueError: no picture, one without pixels or with too many, another dtype or shape, a file that does not decode, a mode
                without a way to RGB, another number of channels than means and deviations, a size that is no height and width, an
                unknown channel order, another way of resizing than bilinear.
        """
        return super().preprocess(images, *args, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        channel_order: str,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        **options,
    ) -> BatchFeature:
        if do_resize and resample not in (PILImageResampling.BILINEAR, None):
            raise ValueError(
                f"resample={resample!r}: this processor resizes without antialiasing, which is defined as bilinear only; "
                "leave it out, or resize the pictures before and set do_resize=False"
            )
        if do_resize and not (size.height and size.width):
            raise ValueError(f"size must hold height and width, both 1 or more; got {dict(size)}")
        groups, places = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, group in groups.items():  # uint8 [b, C, h, w]
            group = transforms.in_channel_order(group, channel_order)
            group = transforms.squashed(group, size.height, size.width) if do_resize else group
            groups[shape] = finished(group, **options)
        return BatchFeature({"pixel_values": self._batch(reorder_images(groups, places))}, tensor_type=return_tensors)


class VlpVseImageProcessor(_VseOptions, TorchvisionBackend):
    """Tensors in, tensors out, on the pictures' device or on `device`; pictures of one size are resized together."""

    def _batch(self, pixels: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        return torch.stack(pixels) if len({tuple(image.shape) for image in pixels}) == 1 else pixels


class VlpVseImageProcessorPil(_VseOptions, PilBackend):
    """The same numbers as numpy arrays, for programs that ask for `backend="pil"`."""

    def _batch(self, pixels: list[torch.Tensor]) -> list[np.ndarray]:
        return [image.cpu().numpy() for image in pixels]
