"""What a backbone sees in a region: the image tower of a model, its last map, and the mean of the map over a box."""

import inspect
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import nn
from torchvision.ops import roi_align
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_vlp import VlpClipImageProcessor
from hf_vlp.inputs.pictures import Pictures

# Of an image processor, what it does to colours and how it resizes.
COLOURS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample")
FINEST = 1024  # parts of a cell to which boxes are rounded: so that boxes of whole cells are exactly that


def load(auto_class: type, name: str, random_weights: bool) -> nn.Module:
    """A saved model in float32, or one of its configuration."""
    if random_weights:
        return auto_class.from_config(AutoConfig.from_pretrained(name)).eval()
    return auto_class.from_pretrained(name, dtype=torch.float32).eval()


def load_backbone(name: str, size: int | None = None, random_weights: bool = False) -> tuple[nn.Module, Any, int]:
    """The image tower, an image processor of ours with its colours, and the side of its pictures (`size`, or its own).

    Raises:
        ValueError: an unknown name, a model without an image tower, an image processor without colours.
    """
    if name.startswith("timm/"):
        import timm

        if not timm.is_model(name.removeprefix("timm/")):
            raise ValueError(f"timm has no model {name.removeprefix('timm/')!r}: timm.list_models() names all")
        tower = timm.create_model(name.removeprefix("timm/"), pretrained=not random_weights, num_classes=0).eval()
        told = timm.data.resolve_model_data_config(tower)
        size = size or told["input_size"][-1]
        if hasattr(tower, "set_input_size"):
            tower.set_input_size((size, size))
        return tower, VlpClipImageProcessor(image_mean=told["mean"], image_std=told["std"]), size
    model = load(AutoModel, name, random_weights)
    tower = getattr(model, "vision_model", model)
    if tower is None or "pixel_values" not in inspect.signature(tower.forward).parameters:
        raise ValueError(f"{name} is a {type(model).__name__} without an image tower: give a backbone that sees pixels")
    processor = AutoImageProcessor.from_pretrained(name)
    # the side that the model saw: what is cut out of the resized picture, where anything is
    sides = [getattr(processor, part, None) or {} for part in ("crop_size", "size")]
    own = next((side[key] for side in map(dict, sides) for key in ("height", "shortest_edge") if side.get(key)), 224)
    if not isinstance(processor, Pictures):
        if getattr(processor, "image_mean", None) is None:
            raise ValueError(f"the {type(processor).__name__} of {name} names no image_mean: take another backbone")
        colours = {key: getattr(processor, key, None) for key in COLOURS}
        processor = VlpClipImageProcessor(**{key: value for key, value in colours.items() if value is not None})
    return tower, processor, size or own


def as_map(states: torch.Tensor, extra: int = 0) -> torch.Tensor:
    """Tokens [B, extra + h * h, D] of a square picture -> their map [B, D, h, h]; a map [B, D, h, w] as it is.

    Raises:
        ValueError: the tokens are no square.
    """
    if states.ndim == 4:
        return states
    cells = states.shape[1] - extra
    side = isqrt(cells)
    if side * side != cells:
        raise ValueError(
            f"{cells} tokens of the backbone are no square grid of a square picture: take another backbone"
        )
    return states[:, extra:].transpose(1, 2).unflatten(2, (side, side))


def feature_map(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """`pixels` [B, 3, S, S] -> the last map of an image tower of timm, transformers or hf_vlp, [B, D, h, w] float32."""
    tower = getattr(tower, "timm_model", tower)
    if hasattr(tower, "forward_features"):
        states = tower.forward_features(pixels)
        if getattr(tower, "output_fmt", "NCHW") == "NHWC" and states.ndim == 4:
            states = states.permute(0, 3, 1, 2)
        return as_map(states, getattr(tower, "num_prefix_tokens", 0)).float()
    taken = inspect.signature(tower.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in taken else {}
    states = tower(pixel_values=pixels, **options).last_hidden_state
    patch = getattr(tower.config, "patch_size", None)
    cells = (pixels.shape[-1] // patch) ** 2 if isinstance(patch, int) else 0
    # fewer tokens than patches, as of Swin, are patches merged, without any other among them
    return as_map(states, states.shape[1] - cells if 0 < cells <= states.shape[1] else 0).float()


def region_features(maps: torch.Tensor, boxes: Sequence[torch.Tensor], bins: int = 1) -> list[torch.Tensor]:
    """Features of boxes: ROI-align into bins x bins, and their mean.

    Args:
        maps: [B, D, h, w] float32.
        boxes: of each of the B pictures [R, 4] fractions, each with an area.
        bins: points looked at are a cell apart or closer in each bin; more bins look at more points.

    Returns:
        B tensors [R, D].
    """
    scale = maps.new_tensor([maps.shape[3], maps.shape[2]] * 2)
    corners = [(one.to(maps) * scale * FINEST).round() / FINEST for one in boxes]
    for one in corners:
        one[:, 2:] = torch.maximum(one[:, 2:], one[:, :2] + 1 / FINEST)
    pooled = roi_align(maps, corners, bins, sampling_ratio=-1, aligned=True)  # [all R, D, bins, bins]
    return list(pooled.mean(dim=(2, 3)).split([len(one) for one in boxes]))
