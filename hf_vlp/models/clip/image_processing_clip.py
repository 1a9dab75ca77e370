"""CLIP's image processors: Pillow, with the numbers of the released code, and torchvision, twice as fast and a grey level away.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020).
The order of operations and its reasons are in `hf_vlp.inputs.image_transforms`.
"""

from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict, pil_torch_interpolation_mapping

from hf_vlp.inputs import image_transforms as transforms
from hf_vlp.inputs.pictures import Pictures, as_picture, as_pixels, as_wished, finished


class _ClipOptions(Pictures):
    """What both backends share: defaults, and the crop that goes with a size."""

    resample = PILImageResampling.BICUBIC
    image_mean = transforms.CLIP_MEAN
    image_std = transforms.CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs):
        super().__init__(**_with_crop(kwargs))

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """Pictures to `pixel_values`, float32 [B, 3, R, R].

        Args:
            images: one picture or a list: PIL images of any mode, paths, or uint8 arrays or tensors [h, w], [C, h, w] or [h, w, C] with
                C of 1, 3 (RGB) or 4 (RGBA); also one array or tensor of four axes.
            kwargs: any option of the processor for this call; a `size` without a `crop_size` sets both.

        Raises:
            ValueError: no picture, one without pixels or with too many, another dtype or shape, a file that does not decode, a mode
                without a way to RGB, another number of channels than means and deviations.
        """
        return super().preprocess(images, *args, **_with_crop(kwargs))


class VlpClipImageProcessorPil(_ClipOptions, PilBackend):
    """The exact backend: every number as the released code computes it with the same Pillow."""

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs) -> Image.Image:
        """Any accepted picture -> PIL image in its own mode."""
        return as_picture(image, input_data_format)

    def _preprocess(self, images: list[Image.Image], return_tensors: str | None = None, **options) -> BatchFeature:
        pixels = [finished(transforms.to_tensor(_cut(image, **options)), **options).numpy() for image in images]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


class VlpClipImageProcessor(_ClipOptions, TorchvisionBackend):
    """The fast backend, also for pictures that are tensors already, on their device or on `device`.

    Same sizes and crops as the exact one; antialiased bicubic resizing of 8-bit numbers differs by a grey level here and there.
    Pictures of other modes than RGB and L (palette, 1 bit, alpha, 16 bits, CMYK, ...) take the exact way.
    """

    def process_image(
        self, image: Any, input_data_format: Any = None, device: Any = None, **options
    ) -> torch.Tensor | Image.Image:
        """Any accepted picture -> uint8 [C, h, w], or a PIL image of a mode that takes the exact way."""
        if isinstance(image, Image.Image):
            image = as_wished(image, **options)
            if image.mode not in ("RGB", "L"):
                return image
            pixels = transforms.to_tensor(image)
        else:
            pixels = as_pixels(image, input_data_format)
        return pixels if device is None else pixels.to(device)

    def _preprocess(
        self,
        images: list[torch.Tensor | Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_convert_rgb: bool,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        device: Any = None,
        **options,
    ) -> BatchFeature:
        wanted = {
            "do_resize": do_resize,
            "size": size,
            "resample": resample,
            "do_center_crop": do_center_crop,
            "crop_size": crop_size,
            "do_convert_rgb": do_convert_rgb,
        }
        fast = [image for image in images if _is_fast(image)]
        groups, places = group_images_by_shape(fast, disable_grouping=disable_grouping) if fast else ({}, {})
        for shape, group in groups.items():  # uint8 [b, C, h, w]
            if do_resize:
                width, height = transforms.resized_size(group.shape[-1], group.shape[-2], _target(size))
                mode = pil_torch_interpolation_mapping.get(resample, resample)
                group = tv.resize(group, [height, width], interpolation=mode, antialias=True)
            if do_center_crop:
                top = transforms.crop_offset(group.shape[-2], crop_size.height)
                left = transforms.crop_offset(group.shape[-1], crop_size.width)
                group = tv.crop(group, top, left, crop_size.height, crop_size.width)
            groups[shape] = group.expand(-1, 3, -1, -1) if do_convert_rgb else group
        fast = iter(reorder_images(groups, places))
        pixels = [
            next(fast)
            if _is_fast(image)
            else transforms.to_tensor(_cut(as_picture(image, ChannelDimension.FIRST), **wanted, **options)).to(
                device or getattr(image, "device", None)
            )
            for image in images
        ]
        if len({tuple(image.shape) for image in pixels}) == 1:
            pixels = finished(torch.stack(pixels), **options)
        else:
            pixels = [finished(image, **options) for image in pixels]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def _with_crop(options: dict[str, Any]) -> dict[str, Any]:
    """A size without a crop crops to the same: 224 cut out of a picture of 64 would be a frame of zeros."""
    size = options.get("size")
    if size is None or options.get("crop_size") is not None:
        return options
    size = dict(size) if isinstance(size, (dict, SizeDict)) else size
    if isinstance(size, int):
        crop = {"height": size, "width": size}
    elif isinstance(size, dict) and size.get("shortest_edge"):
        crop = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
    else:
        crop = size
    return {**options, "crop_size": crop}


def _target(size: SizeDict) -> int | tuple[int, int]:
    """Length of the shorter side, or (width, height)."""
    if size.height and size.width:
        return size.width, size.height
    if size.shortest_edge and not size.longest_edge:
        return size.shortest_edge
    raise ValueError(f"size must hold shortest_edge, or height and width, all 1 or more; got {dict(size)}")


def _is_fast(image: torch.Tensor | Image.Image) -> bool:
    """Whether torchvision resizes it as Pillow would; transparent pixels it does not weigh."""
    return isinstance(image, torch.Tensor) and len(image) != 4


def _cut(
    picture: Image.Image,
    do_resize: bool,
    size: SizeDict,
    resample: Any,
    do_center_crop: bool,
    crop_size: SizeDict,
    do_convert_rgb: bool,
    **options,
) -> Image.Image:
    """Resized and cropped by Pillow, then converted to RGB."""
    picture = as_wished(picture, **options)
    if do_resize:
        picture = transforms.resize_picture(picture, _target(size), resample)
    if do_center_crop:
        picture = transforms.centre_crop(picture, crop_size.width, crop_size.height)
    return transforms.to_rgb(picture) if do_convert_rgb else picture
