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


def timm_weights(state: dict[str, torch.Tensor], embeddings: str) -> dict[str, torch.Tensor]:
    """All but class token and positions under our names: patches in the module `embeddings`, the last norm, and the blocks as of
    `Encoder`: "encoder.layers.<number>.attention.q_proj.weight", ... of "blocks.<number>.attn.qkv.weight", ..."""
    ours = {f"{embeddings}.patch_embedding.{kind}": state[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    ours |= {name: state[name] for name in ("norm.weight", "norm.bias")}
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            continue
        number, part, kind = match.groups()
        block = f"encoder.layers.{number}"
        if part == "attn.qkv":
            for projection, rows in zip(_PARTS, tensor.chunk(3), strict=True):
                ours[f"{block}.attention.{projection}.{kind}"] = rows
        else:
            ours[f"{block}.{part.replace('attn.proj', 'attention.out_proj')}.{kind}"] = tensor
    return ours
