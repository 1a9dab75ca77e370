"""CLIP's image processors: Pillow, with the numbers of the released code, and torchvision, twice as fast and a grey level away.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020).
The order of operations and its reasons are in `hf_vlp.inputs.image_transforms`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tv
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict, pil_torch_interpolation_mapping
from transformers.processing_utils import ImagesKwargs

from hf_vlp.inputs import image_transforms as transforms


class VlpClipImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of both backends, beside those of every image processor.

    background: colour (red, green, blue from 0 to 255) put under transparent pictures. None: their alpha is dropped, as in the original,
        and whatever the file hides there is seen.
    high_byte: take the high byte of 16-bit pictures. False: what is above 255 is cut off, as in the original, which leaves most of
        them white.
    """

    background: list[int] | tuple[int, ...] | None
    high_byte: bool


class _ClipOptions:
    """What both backends share: defaults, the crop that goes with a size, files, and checks."""

    valid_kwargs = VlpClipImageProcessorKwargs
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
    background = None
    high_byte = False

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

    def fetch_images(self, images: Any) -> Any:
        """Paths become PIL images in their own mode; web addresses go the way of transformers; pictures stay as they are."""
        if isinstance(images, (list, tuple)):
            for position, image in enumerate(images):
                if image is None:
                    raise ValueError(f"picture {position} is None: leave it out, and its caption with it")
            return [self.fetch_images(image) for image in images]
        if (
            isinstance(images, Path)
            or isinstance(images, str)
            and not images.startswith(("http://", "https://", "data:"))
        ):
            try:
                with Image.open(images) as picture:
                    picture.load()
                return picture
            except (FileNotFoundError, IsADirectoryError):
                raise ValueError(
                    f"there is no picture at {str(images)!r:.200}: give a path, a web address or a picture"
                ) from None
            except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(
                    f"the picture {str(images)!r} does not decode ({error}): repair it or leave it out"
                ) from error
        return super().fetch_images(images)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 2:
            images = [images]
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("no pictures were given: the list is empty")
        if isinstance(images, (list, tuple)) and all(isinstance(image, (np.ndarray, torch.Tensor)) for image in images):
            if all(image.ndim == 2 for image in images):
                return list(images)
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim not in (3, 4):
            raise ValueError(f"an array of pictures must have 2, 3 or 4 axes, got shape {tuple(images.shape)}")
        return super()._prepare_images_structure(images, expected_ndims)


class VlpClipImageProcessorPil(_ClipOptions, PilBackend):
    """The exact backend: every number as the released code computes it with the same Pillow."""

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs) -> Image.Image:
        """Any accepted picture -> PIL image in its own mode."""
        return _picture(image, input_data_format)

    def _preprocess(self, images: list[Image.Image], return_tensors: str | None = None, **options) -> BatchFeature:
        pixels = [_finished(transforms.to_tensor(_cut(image, **options)), **options).numpy() for image in images]
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
            transforms.check_size(*image.size)
            image = _plain(image, **options)
            if image.mode not in ("RGB", "L"):
                return image
            pixels = transforms.to_tensor(image)
        else:
            pixels = transforms.channels_to_front(image, _channels_first(input_data_format))
            pixels = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
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
            else transforms.to_tensor(_cut(_picture(image, ChannelDimension.FIRST), **wanted, **options)).to(
                device or getattr(image, "device", None)
            )
            for image in images
        ]
        if len({tuple(image.shape) for image in pixels}) == 1:
            pixels = _finished(torch.stack(pixels), **options)
        else:
            pixels = [_finished(image, **options) for image in pixels]
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


def _channels_first(input_data_format: Any) -> bool | None:
    return None if input_data_format is None else ChannelDimension(input_data_format) == ChannelDimension.FIRST


def _picture(image: Any, input_data_format: Any) -> Image.Image:
    return (
        image
        if isinstance(image, Image.Image)
        else transforms.picture_from_array(image, _channels_first(input_data_format))
    )


def _is_fast(image: torch.Tensor | Image.Image) -> bool:
    """Whether torchvision resizes it as Pillow would; transparent pixels it does not weigh."""
    return isinstance(image, torch.Tensor) and len(image) != 4


def _plain(picture: Image.Image, background: Any = None, high_byte: bool = False, **options) -> Image.Image:
    """The picture as the options beside the original's want it before anything else."""
    transforms.check_size(*picture.size)
    return transforms.on_background(transforms.eight_bits(picture) if high_byte else picture, background)


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
    picture = _plain(picture, **options)
    if do_resize:
        picture = transforms.resize_picture(picture, _target(size), resample)
    if do_center_crop:
        picture = transforms.centre_crop(picture, crop_size.width, crop_size.height)
    return transforms.to_rgb(picture) if do_convert_rgb else picture


def _finished(
    pixels: torch.Tensor,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
    **options,
) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32, rescaled and normalised as asked.

    Raises:
        ValueError: neither one nor as many means and deviations as channels.
    """
    channels = pixels.shape[-3]
    if do_normalize and not {np.size(image_mean), np.size(image_std)} <= {1, channels}:
        raise ValueError(
            f"a picture of {channels} channel(s) cannot be normalised by {np.size(image_mean)} means and {np.size(image_std)} "
            "deviations: leave do_convert_rgb on, or give image_mean and image_std for its channels"
        )
    if do_rescale and do_normalize and rescale_factor == 1 / 255:
        return transforms.normalised(pixels, image_mean, image_std)
    pixels = pixels.to(torch.float32) * (rescale_factor if do_rescale else 1.0)
    if not do_normalize:
        return pixels
    mean, std = (
        torch.tensor(x, dtype=torch.float32, device=pixels.device).view(-1, 1, 1) for x in (image_mean, image_std)
    )
    return (pixels - mean) / std
