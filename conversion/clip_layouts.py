"""CLIP's layouts: names, sizes and settings of OpenAI's, open_clip's and transformers' checkpoints against ours.

Paper: "Learning Transferable Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020.
Sources: `clip/model.py` of the released code (`build_model`, `convert_weights`), open_clip's `CLIP` and
`CustomTextCLIP`, transformers' `CLIPModel`. Nothing here reads values: meta tensors do.
"""

import json
import logging
import math
import re
from pathlib import Path

import torch
from transformers import CLIPConfig

from conversion.checkpoints import looks_like
from conversion.tables import ConversionError, Drop, Rename, Row, Split, Transpose
from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)

logger = logging.getLogger(__name__)

# original: OpenAI's and open_clip's CLIP; text_prefix: open_clip's CustomTextCLIP; transformers: CLIPModel
LAYOUTS = ("original", "text_prefix", "transformers")
# transformers' first CLIP configurations have this id whatever the vocabulary; there it means: pool at the largest id.
LEGACY_EOS = 2
# What the released code keeps in half precision (`convert_weights`): convolutions, linears, attention, projections.
HALF = re.compile(
    r"text_projection|visual\.proj|.*\.in_proj_(weight|bias)|.*\.(out_proj|c_fc|c_proj|[qkv]_proj)\.(weight|bias)"
    r"|visual\.(.*\.)?conv\d\.weight|visual\..*\.downsample\.0\.weight"
)


# Entries of OpenAI's files that repeat what the shapes tell, and where ours has it.
SIZES = {
    "input_resolution": ("vision_config", "image_size"),
    "context_length": ("text_config", "max_position_embeddings"),
    "vocab_size": ("text_config", "vocab_size"),
}


def clip_table(config: VlpClipConfig, layout: str = "original") -> list[Row]:
    """Rows between a layout (one of LAYOUTS) and ours for models of this configuration.

    Raises:
        ConversionError: a tower that the layout cannot hold: a foreign one, or a ResNet in transformers.
    """
    if not isinstance(config.text_config, VlpClipTextConfig):
        raise ConversionError(
            f"the text tower is a {config.text_config.model_type}; only CLIP's own fits the original layouts"
        )
    resnet = isinstance(config.vision_config, VlpClipResNetConfig)
    if not resnet and not isinstance(config.vision_config, VlpClipVisionConfig):
        raise ConversionError(
            f"the image tower is a {config.vision_config.model_type}; only CLIP's own fit the original layouts"
        )
    if layout == "transformers":
        if resnet:
            raise ConversionError("transformers' CLIPModel has no ResNet tower; use the layout original or open_clip")
        return _transformers_rows()
    rows = _text_rows("text." if layout == "text_prefix" else "") + (_resnet_rows() if resnet else _vit_rows())
    if config.contrastive_loss == "sigmoid":
        rows.append(Rename("logit_bias", "logit_bias.weight"))
    return rows


def _block_rows(theirs: str, ours: str) -> list[Row]:
    theirs, ours = f"{theirs}transformer.resblocks.{{}}", f"{ours}.encoder.layers.{{}}"
    return [
        Rename(f"{theirs}.ln_1.*", f"{ours}.norm1.*"),
        Rename(f"{theirs}.ln_2.*", f"{ours}.norm2.*"),
        Split(f"{theirs}.attn.in_proj_weight", [f"{ours}.attention.{part}_proj.weight" for part in "qkv"]),
        Split(f"{theirs}.attn.in_proj_bias", [f"{ours}.attention.{part}_proj.bias" for part in "qkv"]),
        Rename(f"{theirs}.attn.out_proj.*", f"{ours}.attention.out_proj.*"),
        Rename(f"{theirs}.mlp.c_fc.*", f"{ours}.mlp.fc1.*"),
        Rename(f"{theirs}.mlp.c_proj.*", f"{ours}.mlp.fc2.*"),
    ]


def _text_rows(prefix: str) -> list[Row]:
    return [
        *(Drop(name, "a size, told by the shapes") for name in SIZES),
        Rename("logit_scale", "logit_scale.weight"),
        Rename(f"{prefix}token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        Rename(f"{prefix}positional_embedding", "text_model.embeddings.position_embedding"),
        *_block_rows(prefix, "text_model"),
        Rename(f"{prefix}ln_final.*", "text_model.final_norm.*"),
        Transpose(f"{prefix}text_projection", "text_projection.weight"),
    ]


def _vit_rows() -> list[Row]:
    return [
        Rename("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        Rename("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        Rename("visual.positional_embedding", "vision_model.embeddings.position_embedding"),
        Rename("visual.ln_pre.*", "vision_model.pre_norm.*"),
        *_block_rows("visual.", "vision_model"),
        Rename("visual.ln_post.*", "vision_model.post_norm.*"),
        Transpose("visual.proj", "visual_projection.weight"),
    ]


def _resnet_rows() -> list[Row]:
    pool = "vision_model.attention_pool"
    return [
        Rename("visual.attnpool.positional_embedding", f"{pool}.position_embedding"),
        *(Rename(f"visual.attnpool.{part}_proj.*", f"{pool}.attention.{part}_proj.*") for part in "qkv"),
        Rename("visual.attnpool.c_proj.*", f"{pool}.attention.out_proj.*"),
        Rename("visual.layer{}.*", "vision_model.resnet.layer{}.*"),
        Rename("visual.conv{}.*", "vision_model.resnet.conv{}.*"),
        Rename("visual.bn{}.*", "vision_model.resnet.bn{}.*"),
    ]


def _transformers_rows() -> list[Row]:
    rows = [Rename("logit_scale", "logit_scale.weight")]
    for tower in ("text_model", "vision_model"):
        block = f"{tower}.encoder.layers.{{}}"
        rows += [
            Drop(f"{tower}.embeddings.position_ids", "counts 0, 1, 2, ...; saved by old versions"),
            Rename(f"{tower}.embeddings.position_embedding.weight", f"{tower}.embeddings.position_embedding"),
            Rename(f"{block}.self_attn.*", f"{block}.attention.*"),
            Rename(f"{block}.layer_norm1.*", f"{block}.norm1.*"),
            Rename(f"{block}.layer_norm2.*", f"{block}.norm2.*"),
            Rename(f"{block}.mlp.*", f"{block}.mlp.*"),
        ]
    return [
        *rows,
        Rename("text_model.embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        Rename("text_model.final_layer_norm.*", "text_model.final_norm.*"),
        Rename("text_projection.weight", "text_projection.weight"),
        Rename("vision_model.embeddings.class_embedding", "vision_model.embeddings.class_embedding"),
        Rename("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
        Rename("vision_model.pre_layrnorm.*", "vision_model.pre_norm.*"),  # their spelling
        Rename("vision_model.post_layernorm.*", "vision_model.post_norm.*"),
        Rename("visual_projection.weight", "visual_projection.weight"),
    ]


def detect_layout(state: dict[str, torch.Tensor]) -> str:
    """Which of LAYOUTS the names are of.

    Raises:
        ConversionError: none of them; says what the names look like instead.
    """
    if "text_model.embeddings.position_embedding.weight" in state:
        return "transformers"
    if any(re.match(r"visual\.(conv1|transformer|layer1|attnpool)\.", name) for name in state):
        if any(name.startswith("text.") for name in state):
            return "text_prefix"
        return "original"
    raise ConversionError(f"this is no CLIP checkpoint: it looks like {looks_like(state)}.\n{_two_sides(state)}")


def from_openai(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict bears the marks of OpenAI's files: their sizes as entries, or their mixed precisions."""
    if "input_resolution" in state:
        return True
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return detect_layout(state) == "original" and all(
        tensor.dtype == (torch.float16 if HALF.fullmatch(name) else torch.float32) for name, tensor in floats.items()
    )


def _two_sides(state) -> str:
    found = [f"  {name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:10]]
    needed = [f"  {row.original}" for row in _text_rows("")[len(SIZES) :] + _vit_rows()[:3] + _resnet_rows()[:1]]
    return "\n".join([f"- found ({len(state)} entries):", *found, "  ...", "+ expected, among others:", *needed])


def infer_config(
    state: dict[str, torch.Tensor],
    hidden_act: str | None = None,
    pooling: str = "eos",
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> VlpClipConfig:
    """The configuration behind a state dict of OpenAI's or open_clip's layout, from its shapes (meta tensors will do).

    Args:
        state: {name: tensor}, of `layout` original or text_prefix.
        hidden_act: cannot be seen in shapes. OpenAI's models have "quick_gelu", which is taken if none is given;
            open_clip's own have "gelu" unless their name ends in "-quickgelu".
        pooling: see `VlpClipTextConfig`.
        vision_heads, text_heads: cannot be seen either; width // 64 (at least 1) unless given.

    Raises:
        ConversionError: an entry that tells a size is missing, or its shape makes no sense.
    """
    prefix = "text." if detect_layout(state) == "text_prefix" else ""
    if hidden_act is None:
        hidden_act = "quick_gelu"
        if "input_resolution" not in state:  # OpenAI's published files have this entry
            logger.warning(
                "Activation taken to be quick_gelu. A model of open_clip without -quickgelu in its name has gelu."
            )

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state or state[name].ndim != dimensions:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise ConversionError(f"{name} {found}, so the model's sizes cannot be told.\n{_two_sides(state)}")
        return state[name].shape

    def grid(name: str) -> int:
        rows = shape(name, 2)[0] - 1
        if math.isqrt(max(rows, 0)) ** 2 != rows or rows < 1:
            raise ConversionError(f"{name} has {rows + 1} rows, not one more than a square")
        return math.isqrt(rows)

    def blocks(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    vocabulary, text_width = shape(f"{prefix}token_embedding.weight", 2)
    embed = shape(f"{prefix}text_projection", 2)[1]
    text = VlpClipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        intermediate_size=shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        num_hidden_layers=blocks(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\."),
        num_attention_heads=text_heads or max(1, text_width // 64),
        max_position_embeddings=shape(f"{prefix}positional_embedding", 2)[0],
        hidden_act=hidden_act,
        pooling=pooling,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    if "visual.layer1.0.conv1.weight" in state:
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        vision = VlpClipResNetConfig(
            width=width,
            layers=[blocks(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
            num_attention_heads=vision_heads or max(1, width * 32 // 64),
            image_size=32 * grid("visual.attnpool.positional_embedding"),
            projection_dim=embed,
        )
    else:
        width, channels, patch, _ = shape("visual.conv1.weight", 4)
        vision = VlpClipVisionConfig(
            hidden_size=width,
            intermediate_size=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            num_hidden_layers=blocks(r"visual\.transformer\.resblocks\.(\d+)\."),
            num_attention_heads=vision_heads or max(1, width // 64),
            num_channels=channels,
            image_size=patch * grid("visual.positional_embedding"),
            patch_size=patch,
            hidden_act=hidden_act,
        )
    loss = "sigmoid" if "logit_bias" in state else "softmax"
    return VlpClipConfig(text_config=text, vision_config=vision, projection_dim=embed, contrastive_loss=loss)


SAME_FIELDS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
]
TEXT_FIELDS = [*SAME_FIELDS, "vocab_size", "max_position_embeddings"]
VISION_FIELDS = [*SAME_FIELDS, "image_size", "patch_size", "num_channels"]


def config_from_transformers(theirs: CLIPConfig, pooling: str | None = None) -> VlpClipConfig:
    """Ours for a transformers `CLIPConfig`.

    An end-of-text id of 2 is their mark for pooling at the largest id: it becomes `pooling="largest_id"` with the real id
    (the last of the vocabulary), unless `pooling` says otherwise.
    """
    legacy = theirs.text_config.eos_token_id == LEGACY_EOS
    last = theirs.text_config.vocab_size - 1
    return VlpClipConfig(
        text_config=VlpClipTextConfig(
            **{name: getattr(theirs.text_config, name) for name in TEXT_FIELDS},
            pooling=pooling or ("largest_id" if legacy else "eos"),
            bos_token_id=last - 1 if legacy else theirs.text_config.bos_token_id,
            eos_token_id=last if legacy else theirs.text_config.eos_token_id,
            pad_token_id=last if legacy else theirs.text_config.eos_token_id,
        ),
        vision_config=VlpClipVisionConfig(**{name: getattr(theirs.vision_config, name) for name in VISION_FIELDS}),
        projection_dim=theirs.projection_dim,
        logit_scale_init_value=theirs.logit_scale_init_value,
    )


def config_to_transformers(ours: VlpClipConfig) -> CLIPConfig:
    """transformers' configuration for one of ours with a ViT; the inverse of `config_from_transformers`.

    Raises:
        ConversionError: end-of-text is id 2 and pooled as such; there that id means the largest id.
    """
    text = ours.text_config
    if text.pooling == "eos" and text.eos_token_id == LEGACY_EOS:
        raise ConversionError(
            "eos_token_id 2 makes CLIPModel pool at the largest id; use a vocabulary with another end-of-text id"
        )
    return CLIPConfig(
        text_config={
            **{name: getattr(text, name) for name in TEXT_FIELDS},
            "projection_dim": ours.projection_dim,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": LEGACY_EOS if text.pooling == "largest_id" else text.eos_token_id,
            "pad_token_id": text.pad_token_id,
        },
        vision_config={
            **{name: getattr(ours.vision_config, name) for name in VISION_FIELDS},
            "projection_dim": ours.projection_dim,
        },
        projection_dim=ours.projection_dim,
        logit_scale_init_value=ours.logit_scale_init_value,
    )


def half_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the original layout in the published files' precisions: HALF in float16, other floats in float32."""
    return {
        name: tensor.to(torch.float16 if HALF.fullmatch(name.removeprefix("text.")) else torch.float32)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def round_to_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the original loader makes of a float32 state dict: HALF tensors rounded to float16; all returned as float32."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half_layout(state).items()
    }


# Fields of open_clip's configurations that the weights show or that change nothing at inference; the others must have
# their defaults.
OPEN_CLIP_KNOWN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_bias", "init_logit_scale"},
    "vision_cfg": {
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "patch_dropout",
        "output_tokens",
    },
    "text_cfg": {
        "layers",
        "width",
        "heads",
        "mlp_ratio",
        "context_length",
        "vocab_size",
        "hf_tokenizer_name",
        "output_tokens",
    },
}
OPEN_CLIP_DEFAULTS = (None, False, "tok", "argmax", "linear", {})


def open_clip_options(path: Path) -> dict:
    """Options of `infer_config` that an open_clip_config.json tells.

    Raises:
        ConversionError: it sets something that leaves no trace in the weights and that ours does not compute.
    """
    model = json.loads(path.read_text("utf-8"))["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    foreign = [
        f"{section}.{key}".removeprefix(".")
        for section, fields in (("", model), ("vision_cfg", vision), ("text_cfg", text))
        for key, value in fields.items()
        if key not in OPEN_CLIP_KNOWN[section] and value not in OPEN_CLIP_DEFAULTS
    ]
    if foreign:
        raise ConversionError(
            f"{path} sets {', '.join(foreign)}, which ours does not compute; only plain CLIP towers convert"
        )
    width = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    return {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_heads": max(1, width // vision.get("head_width", 64)),
        "text_heads": text.get("heads"),
    }
