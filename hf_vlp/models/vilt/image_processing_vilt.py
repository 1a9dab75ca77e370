"""ViLT's image processors: Pillow, with the numbers of the released code, and torchvision, faster and a grey level away.

ViLT, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision" (https://arxiv.org/abs/2102.03334), section 4.2.
Pictures keep their proportions, so those of one batch are padded to one canvas. The sizes and their reasons are in
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
from hf_vlp.inputs.pictures import PictureKwargs, Pictures, PilPictures, finished


class VlpViltImageProcessorKwargs(PictureKwargs, total=False):
    """Options of both backends, beside those of every image processor.

    size_divisor: side of a patch; pictures are resized to multiples of it.
    """

    size_divisor: int


class _ViltOptions(Pictures):
    """What both backends share: defaults, and the batch at the end."""

    valid_kwargs = VlpViltImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BICUBIC
    image_mean = transforms.HALF
    image_std = transforms.HALF
    size = {"shortest_edge": 384, "longest_edge": 639}
    default_to_square = False
    size_divisor = 32
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """Pictures to `pixel_values`, float32 [B, 3, H, W], and `pixel_mask`, int64 [B, H, W], 1 where the picture is.

        H and W are those of the highest and of the widest picture of the call, multiples of `size_divisor`; what is smaller lies in the
        upper left corner of zeros, which are mid-grey.

        Args:
            images: one picture or a list: PIL images of any mode, paths, or uint8 arrays or tensors [h, w], [C, h, w] or [h, w, C] with
                C of 1, 3 (RGB) or 4 (RGBA); also one array or tensor of four axes.
            kwargs: any option of the processor for this call. `size` holds `shortest_edge` and perhaps `longest_edge`, which is else
                1333 / 800 of it; a whole number is the shortest edge. `pad_size` is a canvas larger than needed. Without `do_pad`
                pictures keep their sizes, and there is no mask.

        Raises:
            ValueError: no picture, one without pixels or with too many, another dtype or shape, a file that does not decode, a mode
                without a way to RGB, another number of channels than means and deviations, a size without a shortest edge, a picture
                so thin that less than a patch is left of a side, one beyond `pad_size`.
        """
        return super().preprocess(images, *args, **kwargs)

    def _batch(
        self, pixels: list[torch.Tensor], do_pad: bool, pad_size: SizeDict | None, return_tensors: str | None
    ) -> BatchFeature:
        """Float32 [C, h, w] of several sizes to the batch, in the backend's kind of array."""
        if not do_pad:
            return BatchFeature({"pixel_values": [self._array(image) for image in pixels]}, tensor_type=return_tensors)
        canvas = (pad_size.height, pad_size.width) if pad_size else None
        values, mask = (self._array(tensor) for tensor in transforms.padded(pixels, canvas))
        return BatchFeature({"pixel_values": values, "pixel_mask": mask}, tensor_type=return_tensors)


class VlpViltImageProcessorPil(PilPictures, _ViltOptions, PilBackend):
    """The exact backend: every number as the released code computes it with the Pillow of its time, whatever Pillow is installed."""

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        size_divisor: int,
        resample: Any,
        do_pad: bool,
        pad_size: SizeDict | None = None,
        return_tensors: str | None = None,
        **options,
    ) -> BatchFeature:
        pixels = []
        for image in images:
            if do_resize:
                image = transforms.resize_width_first(image, _target(*image.size, size, size_divisor), resample)
            pixels.append(finished(transforms.to_tensor(image), **options))
        return self._batch(pixels, do_pad, pad_size, return_tensors)

    @staticmethod
    def _array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.numpy()


class VlpViltImageProcessor(_ViltOptions, TorchvisionBackend):
    """The fast backend, also for pictures that are tensors already, on their device or on `device`.

    Same sizes and masks as the exact one; antialiased bicubic resizing of 8-bit numbers differs by a grey level or two here and there.
    """

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        size_divisor: int,
        resample: Any,
        do_pad: bool,
        pad_size: SizeDict | None = None,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        **options,
    ) -> BatchFeature:
        groups, places = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, group in groups.items():  # uint8 [b, C, h, w]
            if do_resize:
                width, height = _target(group.shape[-1], group.shape[-2], size, size_divisor)
                mode = pil_torch_interpolation_mapping.get(resample, resample)
                group = tv.resize(group, [height, width], interpolation=mode, antialias=True)
            groups[shape] = finished(group, **options)
        return self._batch(reorder_images(groups, places), do_pad, pad_size, return_tensors)

    @staticmethod
    def _array(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _target(width: int, height: int, size: SizeDict, divisor: int) -> tuple[int, int]:
    """(width, height) of a picture, resized."""
    if not size.shortest_edge or size.height or size.width:
        raise ValueError(f"size must hold shortest_edge, and perhaps longest_edge, both 1 or more; got {dict(size)}")
    return transforms.whole_patches_size(width, height, size.shortest_edge, size.longest_edge, divisor)
