"""What every image processor of ours takes, refuses and does first and last, whatever the paper does in between.

Pictures come as PIL images of any mode, paths, arrays or tensors; at the end channels are rescaled and normalised. Depends on
`hf_vlp.inputs.image_transforms` and on transformers' image processors.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs

from hf_vlp.inputs import image_transforms as transforms


class PictureKwargs(ImagesKwargs, total=False):
    """Options of every processor, beside those of transformers.

    background: colour (red, green, blue from 0 to 255) put under transparent pictures. None: their alpha is dropped, as in the originals,
        and whatever the file hides there is seen.
    high_byte: take the high byte of 16-bit pictures. False: what is above 255 is cut off, as in the originals, which leaves most of
        them white.
    """

    background: list[int] | tuple[int, ...] | None
    high_byte: bool


class Pictures:
    """Goes before transformers' backend among the bases of an image processor: files, checks and pixels of what was handed in."""

    valid_kwargs = PictureKwargs
    background = None
    high_byte = False

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

    def process_image(self, image: Any, device: Any = None, **options) -> torch.Tensor:
        """Any accepted picture -> uint8 [3, h, w], or with its own channels where it is not to be converted."""
        pixels = as_rgb(image, **options)
        return pixels if device is None else pixels.to(device)


class PilPictures(Pictures):
    """The same for a backend that works on PIL images."""

    def process_image(
        self, image: Any, do_convert_rgb: bool = True, input_data_format: Any = None, **options
    ) -> Image.Image:
        """Any accepted picture -> PIL image in RGB, or in its own mode where it is not to be converted."""
        picture = as_wished(as_picture(image, input_data_format), **options)
        return transforms.to_rgb(picture) if do_convert_rgb else picture


def pictures_or_pairs(image_processor: Any, images: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The image processor's batch; of a list of pairs, [[left, right], ...], with an axis for the two.

    Raises:
        ValueError: a pair that is none, and what the image processor refuses.
    """
    if not isinstance(images, (list, tuple)) or not any(isinstance(entry, (list, tuple)) for entry in images):
        return image_processor(images, **options)
    for position, pair in enumerate(images):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            found = f"{len(pair)} pictures" if isinstance(pair, (list, tuple)) else "one picture without a list"
            raise ValueError(f"entry {position} of images is {found}: where one entry is a pair, each must be one")
    batch = image_processor([image for pair in images for image in pair], **options)
    return {
        name: [value[i : i + 2] for i in range(0, len(value), 2)]
        if isinstance(value, list)  # pictures of several sizes
        else value.reshape(len(images), 2, *value.shape[1:])
        for name, value in batch.items()
    }


def as_picture(image: Any, input_data_format: Any = None) -> Image.Image:
    """A PIL image as it is; an array or tensor of uint8 pixels as one."""
    if isinstance(image, Image.Image):
        return image
    return transforms.picture_from_array(image, _channels_first(input_data_format))


def as_pixels(image: np.ndarray | torch.Tensor, input_data_format: Any = None) -> torch.Tensor:
    """An array or tensor of uint8 pixels -> uint8 tensor [C, h, w], where it is."""
    pixels = transforms.channels_to_front(image, _channels_first(input_data_format))
    return torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels


def as_rgb(image: Any, do_convert_rgb: bool = True, input_data_format: Any = None, **options) -> torch.Tensor:
    """Any accepted picture -> uint8 [3, h, w] where it is, or with its own channels where it is not to be converted."""
    pixels = None if isinstance(image, Image.Image) else as_pixels(image, input_data_format)
    if pixels is not None and len(pixels) != 4:
        return pixels.expand(3, -1, -1) if do_convert_rgb else pixels
    where = None if pixels is None else pixels.device
    picture = as_wished(as_picture(image, input_data_format), **options)
    return transforms.to_tensor(transforms.to_rgb(picture) if do_convert_rgb else picture).to(where)


def as_wished(picture: Image.Image, background: Any = None, high_byte: bool = False, **options) -> Image.Image:
    """The picture as the options beside the original's want it before anything else."""
    transforms.check_size(*picture.size)
    return transforms.on_background(transforms.eight_bits(picture) if high_byte else picture, background)


def finished(
    pixels: torch.Tensor,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
    **options,
) -> torch.Tensor:
    """Pixels [..., C, H, W] from 0 to 255 -> float32, rescaled and normalised as asked; float32 is reused.

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


def _channels_first(input_data_format: Any) -> bool | None:
    return None if input_data_format is None else ChannelDimension(input_data_format) == ChannelDimension.FIRST
