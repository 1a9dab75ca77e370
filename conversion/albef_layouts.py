"""ALBEF's layouts: names, sizes and settings of the original's checkpoints against ours.

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.
Source: `models/` and `configs/` of the released code. Its text encoder is one BERT whose layers from `fusion_layer` on read the image
too; ours are two parts, each numbered from 0. A file of pre-training calls the text encoder `text_encoder.bert.`, one of retrieval or
grounding `text_encoder.`. Nothing here needs values: meta tensors will do.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from conversion.checkpoints import looks_like
from conversion.tables import (
    ConversionError,
    Drop,
    Rename,
    Row,
    Split,
    Squeezed,
    Table,
    Transpose,
    Unbatched,
    revert,
)
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig, VlpAlbefTextConfig

HEAD_SIZE = 64  # of the released models: the number of heads is not in the weights
POSITIONS = "visual_encoder.pos_embed"
WORDS = "embeddings.word_embeddings.weight"
CROSS_ATTENTION = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.")
PREDICTIONS = "cls.predictions"
TEACHER = re.compile(r"(visual_encoder|vision_proj|text_encoder|text_proj)_m\.")
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
INTEGERS = ("queue.image_ids", "queue.position")
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
ATTENTIONS = {"attention": "attention", "crossattention": "cross_attention"}
# Fields of our parts under the names of the options of the released code; the number of heads and what follows is not in the weights.
BERT_OPTIONS = {
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}
VIT_OPTIONS = {
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "drop_rate": "hidden_dropout",
    "attn_drop_rate": "attention_dropout",
}
# What the released code builds its image encoder of, whatever the file says, and what it reads of the text encoder from its configuration.
VIT_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3}
VIT_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_SIZES |= {"patch_size": 16}
BERT_SIZES = {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12}

# ------------------------------------------------------------------------------------------------ names


def albef_table(text_layers: int, fusion_layers: int, bert: str = "") -> Table:
    """Rows for everything that a file of pre-training, retrieval or grounding may hold.

    Args:
        text_layers: of BERT, without the image. fusion_layers: those behind them.
        bert: "bert." where the file has that in front of the names of the text encoder.
    """
    return [
        Rename("temp", "temperature.weight"),
        Rename("itm_head.*", "itm_head.*"),
        *(
            row
            for suffix, ours in (("", ""), ("_m", "teacher."))
            for row in _model_rows(suffix, ours, text_layers, fusion_layers, bert)
        ),
        Transpose("image_queue", "queue.image_features"),
        Transpose("text_queue", "queue.text_features"),
        Squeezed("idx_queue", "queue.image_ids"),
        Squeezed("queue_ptr", "queue.position"),
    ]


def _model_rows(suffix: str, prefix: str, text_layers: int, fusion_layers: int, bert: str) -> Iterator[Row]:
    """Rows of the model and its masked-language head, or of their momentum copies."""
    image, text = f"visual_encoder{suffix}", f"text_encoder{suffix}"
    ours = f"{prefix}albef"
    vision, embeddings = f"{ours}.vision_model", f"{ours}.text_model.embeddings"
    yield Rename(f"vision_proj{suffix}.*", f"{ours}.visual_projection.*")
    yield Rename(f"text_proj{suffix}.*", f"{ours}.text_projection.*")
    yield Squeezed(f"{image}.cls_token", f"{vision}.embeddings.class_embedding", axes=2)
    yield Unbatched(f"{image}.pos_embed", f"{vision}.embeddings.position_embedding")
    yield Rename(f"{image}.patch_embed.proj.*", f"{vision}.embeddings.patch_embedding.*")
    yield Rename(f"{image}.norm.*", f"{vision}.norm.*")
    block, layer = f"{image}.blocks.{{}}", f"{vision}.encoder.layers.{{}}"
    for kind in ("weight", "bias"):
        yield Split(f"{block}.attn.qkv.{kind}", [f"{layer}.attention.{part}_proj.{kind}" for part in "qkv"])
    yield Rename(f"{block}.attn.proj.*", f"{layer}.attention.out_proj.*")
    for part in ("norm1", "norm2", "mlp"):
        yield Rename(f"{block}.{part}.*", f"{layer}.{part}.*")
    yield Drop(f"{text}.{bert}embeddings.position_ids", "counts 0, 1, 2, ...")
    yield Rename(f"{text}.{bert}embeddings.LayerNorm.*", f"{embeddings}.norm.*")
    yield Rename(f"{text}.{bert}embeddings.*", f"{embeddings}.*")
    for number in range(text_layers + fusion_layers):
        own = (
            f"text_model.encoder.layers.{number}"
            if number < text_layers
            else f"fusion_model.layers.{number - text_layers}"
        )
        yield from _bert_rows(f"{text}.{bert}encoder.layer.{number}", f"{ours}.{own}", crossed=number >= text_layers)
    yield Drop(f"{text}.{PREDICTIONS}.bias", "the decoder's bias, stored twice")
    for theirs, own in (("transform.dense", "dense"), ("transform.LayerNorm", "norm"), ("decoder", "decoder")):
        yield Rename(f"{text}.{PREDICTIONS}.{theirs}.*", f"{prefix}mlm_head.{own}.*")


def _bert_rows(theirs: str, ours: str, crossed: bool) -> Iterator[Row]:
    """Rows of one layer; `crossed`: with attention to the image."""
    for name, own in list(ATTENTIONS.items())[: 1 + crossed]:
        for part, projection in PROJECTIONS.items():
            yield Rename(f"{theirs}.{name}.self.{part}.*", f"{ours}.{own}.{projection}.*")
        yield Rename(f"{theirs}.{name}.output.dense.*", f"{ours}.{own}.out_proj.*")
        yield Rename(f"{theirs}.{name}.output.LayerNorm.*", f"{ours}.{own}_norm.*")
    yield Rename(f"{theirs}.intermediate.dense.*", f"{ours}.mlp.fc1.*")
    yield Rename(f"{theirs}.output.dense.*", f"{ours}.mlp.fc2.*")
    yield Rename(f"{theirs}.output.LayerNorm.*", f"{ours}.output_norm.*")


def table_of(state: Mapping[str, torch.Tensor], config: VlpAlbefConfig) -> Table:
    """The rows for a file, whose names tell whether they have `bert.` in them."""
    bert = "bert." if f"text_encoder.bert.{WORDS}" in state else ""
    return albef_table(config.text_config.num_hidden_layers, config.multimodal_config.num_hidden_layers, bert)


def momentum_parts(state: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """The names of a file's momentum copies, and of its queues."""
    return [name for name in state if TEACHER.match(name)], [name for name in QUEUES if name in state]


def refuse_untied(state: Mapping[str, torch.Tensor]) -> None:
    """Raises ConversionError where what the released code ties differs: the decoder and the words, and its bias stored twice."""
    for text in ("text_encoder", "text_encoder_m"):
        head = f"{text}.{PREDICTIONS}"
        pairs = [(f"{head}.decoder.bias", f"{head}.bias")]
        pairs += [(f"{head}.decoder.weight", f"{text}.{bert}{WORDS}") for bert in ("bert.", "")]
        for one, other in pairs:
            if one in state and other in state and not state[one].is_meta and not torch.equal(state[one], state[other]):
                raise ConversionError(f"{one} and {other} are one tensor in the released code, and differ here")


# ------------------------------------------------------------------------------------------------ sizes and settings


def infer_config(state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None) -> VlpAlbefConfig:
    """Our configuration of a file of the original, from its shapes and the options beside them.

    Args:
        state: under the original's names; meta tensors will do.
        options: `bert_config` and `vit`, of BERT and of the image encoder, from which is taken what the weights do not tell (one head for
            each 64 of the width if absent); `yaml` of the run, of which `momentum`, `alpha` and `distill` are taken.

    Raises:
        ConversionError: another architecture, sizes that make no sense or are stated otherwise, an option of another type.
    """
    options = options or {}
    bert, vit, run = (_section(options, name) for name in ("bert_config", "vit", "yaml"))
    text = "text_encoder.bert." if f"text_encoder.bert.{WORDS}" in state else "text_encoder."
    if POSITIONS not in state or f"{text}{WORDS}" not in state:
        found = "\n".join(f"  {name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:10])
        raise ConversionError(
            f"this is no ALBEF checkpoint: it looks like {looks_like(state)}.\n- found ({len(state)} entries):\n{found}\n"
            f"+ expected: {POSITIONS}, {text}{WORDS}, visual_encoder.blocks.*, text_encoder.encoder.layer.*"
        )
    layers = {int(match[1]) for name in state if (match := LAYER.match(name))}
    crossed = {int(match[1]) for name in state if (match := CROSS_ATTENTION.match(name))}
    if not crossed or not min(crossed):
        raise ConversionError(
            "no layer of text_encoder is without crossattention, or none has it: this is not the text encoder of ALBEF's models"
        )
    vocabulary, width = _shape(state, f"{text}{WORDS}", 2)
    sizes = {
        "hidden_size": width,
        "intermediate_size": _shape(state, f"{text}encoder.layer.0.intermediate.dense.weight", 2)[0],
    }
    tables = {
        "vocab_size": vocabulary,
        "max_position_embeddings": _shape(state, f"{text}embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": _shape(state, f"{text}embeddings.token_type_embeddings.weight", 2)[0],
    }
    vision = _vision_sizes(state)
    _refuse_other_sizes(bert, {**sizes, **tables, "num_hidden_layers": len(layers), "fusion_layer": min(crossed)})
    _refuse_other_sizes(vit, {"embed_dim": vision["hidden_size"], "depth": vision["num_hidden_layers"]})
    _refuse_other_sizes(vit, {"patch_size": vision["patch_size"]})
    settings = {field: bert[option] for option, field in BERT_OPTIONS.items() if option in bert}
    sizes |= {"num_attention_heads": max(1, width // HEAD_SIZE), **settings}
    vision |= {field: vit[option] for option, field in VIT_OPTIONS.items() if option in vit}
    teacher, queues = momentum_parts(state)
    training: dict[str, Any] = {"momentum_teacher": bool(teacher and queues)}
    if "image_queue" in state:
        training["queue_size"] = _shape(state, "image_queue", 2)[1]
    training |= {
        field: run[name] for name, field in (("momentum", "momentum"), ("alpha", "distillation_weight")) if name in run
    }
    if run.get("distill") is False:
        training["distillation_weight"] = 0.0
    if "vision_proj.weight" in state:
        training["projection_dim"] = _shape(state, "vision_proj.weight", 2)[0]
    pad = {"pad_token_id": bert["pad_token_id"]} if "pad_token_id" in bert else {}
    try:
        return VlpAlbefConfig(
            vision_config=vision,
            text_config={"model_type": VlpAlbefTextConfig.model_type, **sizes, **tables, **pad}
            | {"num_hidden_layers": min(crossed)},
            multimodal_config=sizes | {"num_hidden_layers": len(crossed)},
            **training,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"no ALBEF has these sizes: {error}") from error


def _vision_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Fields of the image encoder's configuration.

    Raises:
        ConversionError: a table of positions that is no square with a class position, or parts missing.
    """
    width, channels, patch, _ = _shape(state, "visual_encoder.patch_embed.proj.weight", 4)
    rows = _shape(state, POSITIONS, 3)[1] - 1
    grid = math.isqrt(max(rows, 0))
    if grid**2 != rows or not rows:
        raise ConversionError(f"{POSITIONS} has {rows + 1} rows, not one more than a square")
    blocks = {match[1] for name in state if (match := re.match(r"visual_encoder\.blocks\.(\d+)\.", name))}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "intermediate_size": _shape(state, "visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "num_channels": channels,
        "image_size": grid * patch,
        "patch_size": patch,
    }


def _section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = options.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConversionError(f"{name} of the configuration is {found!r:.60}, which is no object")
    return found


def _refuse_other_sizes(options: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    for option, size in sizes.items():
        if options.get(option, size) != size:
            raise ConversionError(
                f"{option} of the configuration is {options[option]}, the shapes of the weights say {size}: parts of two models?"
            )


def _shape(state: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in state or state[name].ndim != dimensions:
        found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
        raise ConversionError(f"{name} {found}, so the model's sizes cannot be told")
    return state[name].shape


# ------------------------------------------------------------------------------------------------ and back


def to_state_dict(config: VlpAlbefConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's state dict from that of any of our classes.

    Of pre-training the released code keeps no identities in the queue, and calls the text encoder `bert.`.

    Raises:
        ConversionError: the released code would compute something else with these weights, or names that do not fit.
    """
    differences = hidden_differences(config)
    if differences:
        raise ConversionError(
            f"the released code would read another model from these weights: {'; '.join(differences)}"
        )
    ours = dict(state)
    if not any(name.startswith("albef.") for name in ours):
        ours = {f"albef.{name}": tensor for name, tensor in ours.items()}
    words = "albef.text_model.embeddings.word_embeddings.weight"
    pretrained = "mlm_head.decoder.bias" in ours
    if pretrained:
        ours.pop("queue.image_ids", None)
        ours.setdefault("mlm_head.decoder.weight", ours[words])
        if f"teacher.{words}" in ours:
            ours.setdefault("teacher.mlm_head.decoder.weight", ours[f"teacher.{words}"])
    bert = "bert." if pretrained else ""
    table = albef_table(config.text_config.num_hidden_layers, config.multimodal_config.num_hidden_layers, bert)
    result = revert(ours, table)
    for text in ("text_encoder", "text_encoder_m"):
        if f"{text}.{bert}{WORDS}" in result:
            device = result[f"{text}.{bert}{WORDS}"].device
            counted = torch.arange(config.text_config.max_position_embeddings, device=device)[None]
            result[f"{text}.{bert}embeddings.position_ids"] = counted
        if f"{text}.{PREDICTIONS}.decoder.bias" in result:
            result[f"{text}.{PREDICTIONS}.bias"] = result[f"{text}.{PREDICTIONS}.decoder.bias"]
    return result


def to_checkpoint(config: VlpAlbefConfig, state: Mapping[str, torch.Tensor]) -> dict:
    """What the released scripts save of weights and options; see `to_state_dict`."""
    run = {
        "image_res": config.vision_config.image_size,
        "vision_width": config.vision_config.hidden_size,
        "embed_dim": config.projection_dim,
        "temp": config.temperature_init_value,
        "queue_size": config.queue_size,
        "momentum": config.momentum,
        "alpha": config.distillation_weight,
        "distill": config.distillation_weight > 0,
    }
    return {"model": to_state_dict(config, state), "config": run, "epoch": 0}


def hidden_differences(config: VlpAlbefConfig) -> list[str]:
    """Settings that the released code has one value of, as "vision_config.hidden_act relu, it takes gelu"."""
    vision, text, fusion = config.vision_config, config.text_config, config.multimodal_config
    if not isinstance(text, VlpAlbefTextConfig):
        return [f"text_config is a {text.model_type} model, it takes BERT"]
    differences = [
        f"vision_config.{name} {getattr(vision, name)}, it takes {VIT_FIXED[name]}"
        for name in VIT_FIXED
        if getattr(vision, name) != VIT_FIXED[name]
    ]
    differences += [
        f"multimodal_config.{name} {getattr(fusion, name)}, text_config {getattr(text, name)}, it takes one BERT"
        for name in ("intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
        if getattr(fusion, name) != getattr(text, name)
    ]
    if not config.tie_word_embeddings and config.mlm_weight:
        differences.append("tie_word_embeddings False, it ties them")
    return differences


def untold_sizes(config: VlpAlbefConfig) -> list[str]:
    """What its reader has to be told: sizes that the released code builds by default, and copies that its training starts from."""
    told = [
        f"{part}.{name} {getattr(getattr(config, part), name)}, it has {sizes[name]}"
        for part, sizes in (("vision_config", VIT_SIZES), ("text_config", BERT_SIZES))
        for name in sizes
        if getattr(getattr(config, part), name) != sizes[name]
    ]
    if config.text_config.num_hidden_layers != config.multimodal_config.num_hidden_layers:
        told.append(f"fusion_layer {config.text_config.num_hidden_layers}, of its config_bert.json")
    if not config.momentum_teacher:
        told.append("no momentum copies and no queues, which its training scripts read: load them with strict=False")
    return told
