"""Weights of timm's vision transformers under the names that our blocks have."""

import re
from typing import Any

import torch
from torch import nn

_BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")


def timm_state_dict(tower: Any) -> dict[str, torch.Tensor]:
    """The weights of a model of timm: one given, or the pretrained one of a name as "timm/vit_base_patch32_384".

    Raises:
        ValueError: a name without "timm/" in front, or one that timm does not have.
    """
    if isinstance(tower, nn.Module):
        return getattr(tower, "timm_model", tower).state_dict()
    if not str(tower).startswith("timm/"):
        raise ValueError(f"{tower!r} is no name of timm: write timm/<architecture>, e.g. timm/vit_base_patch32_384")
    import timm

    name = str(tower).removeprefix("timm/")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}; timm.list_models('vit*') names those it has")
    return timm.create_model(name, pretrained=True).state_dict()


def timm_blocks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The blocks alone, named as `Block`: "<number>.attention.q_proj.weight", ... of "blocks.<number>.attn.qkv.weight", ..."""
    ours = {}
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            continue
        number, part, kind = match.groups()
        if part == "attn.qkv":
            for projection, rows in zip(_PARTS, tensor.chunk(3), strict=True):
                ours[f"{number}.attention.{projection}.{kind}"] = rows
        else:
            ours[f"{number}.{part.replace('attn.proj', 'attention.out_proj')}.{kind}"] = tensor
    return ours
