"""ALBEF's layouts: names, sizes and settings of the original's checkpoints against ours.

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.
Source: `models/` and `configs/` of the released code. Its text encoder is one BERT whose layers from `fusion_layer` on read the image
too; ours are two parts, each numbered from 0. Of two images (NLVR2 and its pre-training by text assignment) every second of these reads
the second one; ours are in `second_layers`. A file of pre-training calls the text encoder `text_encoder.bert.`, others `text_encoder.`.
Nothing here needs values: meta tensors will do.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from conversion.albef_task_layouts import (
    CONTRASTED,
    CROSS_ATTENTION,
    LABELS,
    OF_TWO_IMAGES,
    momentum_parts,
    task_differences,
    task_of,
    teaches,
    untold_of_task,
)
from conversion.checkpoints import looks_like
from conversion.tables import (
    ConversionError,
    Drop,
    Rename,
    Repeat,
    Row,
    Split,
    Squeezed,
    Table,
    Transpose,
    Unbatched,
    revert,
    told_shape,
)
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig, VlpAlbefTextConfig

HEAD_SIZE = 64  # of the released models: the number of heads is not in the weights
POSITIONS = "visual_encoder.pos_embed"
WORDS = "embeddings.word_embeddings.weight"
LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.")
PREDICTIONS = "cls.predictions"
DECODER_LAYER = re.compile(r"text_decoder\.bert\.encoder\.layer\.(\d+)\.")
INTEGERS = ("queue.image_ids", "queue.position", "answer_ids")
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


def albef_table(text_layers: int, fusion_layers: int, bert: str = "", images: int = 1, answer_layers: int = 0) -> Table:
    """Rows for everything that a file of any stage or task may hold.

    Args:
        text_layers: of BERT, without the image. fusion_layers: those behind them, of each image.
        bert: "bert." where the file has that in front of the names of the text encoder.
        images: that the layers attend to in turn, 1 or 2. answer_layers: of the decoder that writes answers.
    """
    return [
        Rename("temp", "temperature.weight"),
        Rename("itm_head.*", "itm_head.*"),
        Rename("ta_head.*", "assignment_head.*"),
        *(
            row
            for suffix, ours in (("", ""), ("_m", "teacher."))
            for row in (
                *_model_rows(suffix, ours, text_layers, fusion_layers, bert, images),
                *_head_rows(suffix, ours, answer_layers),
            )
        ),
        Transpose("image_queue", "queue.image_features"),
        Transpose("text_queue", "queue.text_features"),
        Squeezed("idx_queue", "queue.image_ids"),
        Squeezed("queue_ptr", "queue.position"),
    ]


def _model_rows(
    suffix: str, prefix: str, text_layers: int, fusion_layers: int, bert: str, images: int
) -> Iterator[Row]:
    """Rows of the model, or of its momentum copy."""
    image, text = f"visual_encoder{suffix}", f"text_encoder{suffix}.{bert}"
    ours = f"{prefix}albef"
    vision = f"{ours}.vision_model"
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
    yield from _embedding_rows(f"{text}embeddings", f"{ours}.text_model.embeddings")
    layer = f"{text}encoder.layer"
    for number in range(text_layers):
        yield from _bert_rows(f"{layer}.{number}", f"{ours}.text_model.encoder.layers.{number}", crossed=False)
    for number in range(fusion_layers):
        first = text_layers + images * number
        if images == 2:  # the layers of a pair share what makes keys and values of the image
            for part in ("key", "value"):
                for kind in ("weight", "bias"):
                    name = f"crossattention.self.{part}.{kind}"
                    yield Repeat(f"{layer}.{first + 1}.{name}", f"{layer}.{first}.{name}")
            yield from _bert_rows(f"{layer}.{first + 1}", f"{prefix}second_layers.{number}", crossed=True)
        yield from _bert_rows(f"{layer}.{first}", f"{ours}.fusion_model.layers.{number}", crossed=True)


def _head_rows(suffix: str, prefix: str, answer_layers: int) -> Iterator[Row]:
    """Rows of the heads that have momentum copies, or of these."""
    yield from _prediction_rows(f"text_encoder{suffix}", f"{prefix}mlm_head")
    yield Rename(f"cls_head{suffix}.0.*", f"{prefix}classifier.fc1.*")
    yield Rename(f"cls_head{suffix}.2.*", f"{prefix}classifier.fc2.*")
    decoder, ours = f"text_decoder{suffix}", f"{prefix}answer_decoder"
    yield from _embedding_rows(f"{decoder}.bert.embeddings", f"{ours}.embeddings")
    for number in range(answer_layers):
        yield from _bert_rows(f"{decoder}.bert.encoder.layer.{number}", f"{ours}.layers.{number}", crossed=True)
    yield from _prediction_rows(decoder, f"{ours}.head")


def _embedding_rows(theirs: str, ours: str) -> Iterator[Row]:
    yield Drop(f"{theirs}.position_ids", "counts 0, 1, 2, ...")
    yield Rename(f"{theirs}.LayerNorm.*", f"{ours}.norm.*")
    yield Rename(f"{theirs}.*", f"{ours}.*")


def _prediction_rows(theirs: str, ours: str) -> Iterator[Row]:
    """Rows of a masked-language head."""
    head = f"{theirs}.{PREDICTIONS}"
    yield Repeat(f"{head}.bias", f"{head}.decoder.bias")
    for part, own in (("transform.dense", "dense"), ("transform.LayerNorm", "norm"), ("decoder", "decoder")):
        yield Rename(f"{head}.{part}.*", f"{ours}.{own}.*")


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
    return albef_table(
        config.text_config.num_hidden_layers,
        config.multimodal_config.num_hidden_layers,
        bert="bert." if f"text_encoder.bert.{WORDS}" in state else "",
        images=2 if task_of(state) in OF_TWO_IMAGES else 1,
        answer_layers=config.answer_layers,
    )


def refuse_untied(state: Mapping[str, torch.Tensor], table: Table) -> None:
    """Raises ConversionError where what the released code ties differs: what it stores twice, and decoders and their words."""
    pairs = [(row.of, row.original) for row in table if isinstance(row, Repeat)]
    for text in ("text_encoder", "text_encoder_m", "text_decoder", "text_decoder_m"):
        pairs += [(f"{text}.{PREDICTIONS}.decoder.weight", f"{text}.{bert}{WORDS}") for bert in ("bert.", "")]
    for one, other in pairs:
        if one in state and other in state and not state[one].is_meta and not torch.equal(state[one], state[other]):
            raise ConversionError(f"{one} and {other} are one tensor in the released code, and differ here")


# ------------------------------------------------------------------------------------------------ sizes and settings


def infer_config(state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None) -> VlpAlbefConfig:
    """Our configuration of a file of the original, from its shapes and the options beside them.

    Args:
        state: under the original's names; meta tensors will do.
        options: `bert_config` and `vit`, of BERT and of the image encoder, from which is taken what the weights do not tell (one head for
            each 64 of the width if absent); `yaml` of the run, of which `alpha` and, behind pre-training, `distill` are taken, `momentum`
            of the stages with a queue (the tasks have 0.995 whatever it says), and `k_test` of VQA.

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
    task, fusion_layers = task_of(state), len(crossed)
    if task in OF_TWO_IMAGES:
        if fusion_layers % 2:
            raise ConversionError(
                f"{fusion_layers} layers of text_encoder have crossattention: for two images they come in pairs"
            )
        fusion_layers //= 2
    vocabulary, width = told_shape(state, f"{text}{WORDS}", 2)
    sizes = {
        "hidden_size": width,
        "intermediate_size": told_shape(state, f"{text}encoder.layer.0.intermediate.dense.weight", 2)[0],
    }
    tables = {
        "vocab_size": vocabulary,
        "max_position_embeddings": told_shape(state, f"{text}embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": told_shape(state, f"{text}embeddings.token_type_embeddings.weight", 2)[0],
    }
    vision = _vision_sizes(state)
    counts = {"num_hidden_layers": len(layers) - len(crossed) + fusion_layers, "fusion_layer": min(crossed)}
    _refuse_other_sizes(bert, {**sizes, **tables, **counts})
    _refuse_other_sizes(vit, {"embed_dim": vision["hidden_size"], "depth": vision["num_hidden_layers"]})
    _refuse_other_sizes(vit, {"patch_size": vision["patch_size"]})
    settings = {field: bert[option] for option, field in BERT_OPTIONS.items() if option in bert}
    sizes |= {"num_attention_heads": max(1, width // HEAD_SIZE), **settings}
    vision |= {field: vit[option] for option, field in VIT_OPTIONS.items() if option in vit}
    training: dict[str, Any] = {"momentum_teacher": teaches(task, *momentum_parts(state))}
    if "image_queue" in state:
        training["queue_size"] = told_shape(state, "image_queue", 2)[1]
    taken = {"alpha": "distillation_weight"}
    taken |= (
        {"momentum": "momentum"} if task in CONTRASTED else {"k_test": "answer_candidates"} if task == "vqa" else {}
    )
    training |= {field: run[name] for name, field in taken.items() if name in run}
    if run.get("distill") is False and task != "pretraining":  # which has no such switch
        training["distillation_weight"] = 0.0
    if "vision_proj.weight" in state:
        training["projection_dim"] = told_shape(state, "vision_proj.weight", 2)[0]
    if task == "vqa":
        training["answer_layers"] = len({match[1] for name in state if (match := DECODER_LAYER.match(name))})
    labels = LABELS.get(task, {})
    if "cls_head.2.weight" in state:
        rows = told_shape(state, "cls_head.2.weight", 2)[0]
        training |= (
            {"id2label": labels, "label2id": {name: row for row, name in labels.items()}}
            if len(labels) == rows
            else {"num_labels": rows}
        )
    pad = {"pad_token_id": bert["pad_token_id"]} if "pad_token_id" in bert else {}
    try:
        return VlpAlbefConfig(
            vision_config=vision,
            text_config={"model_type": VlpAlbefTextConfig.model_type, **sizes, **tables, **pad}
            | {"num_hidden_layers": min(crossed)},
            multimodal_config=sizes | {"num_hidden_layers": fusion_layers},
            **training,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"no ALBEF has these sizes: {error}") from error


def _vision_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Fields of the image encoder's configuration.

    Raises:
        ConversionError: a table of positions that is no square with a class position, or parts missing.
    """
    width, channels, patch, _ = told_shape(state, "visual_encoder.patch_embed.proj.weight", 4)
    rows = told_shape(state, POSITIONS, 3)[1] - 1
    grid = math.isqrt(max(rows, 0))
    if grid**2 != rows or not rows:
        raise ConversionError(f"{POSITIONS} has {rows + 1} rows, not one more than a square")
    blocks = {match[1] for name in state if (match := re.match(r"visual_encoder\.blocks\.(\d+)\.", name))}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "intermediate_size": told_shape(state, "visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
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


# ------------------------------------------------------------------------------------------------ and back


def to_state_dict(config: VlpAlbefConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's state dict from that of any of our classes.

    Of pre-training the released code keeps no identities in the queue, and calls the text encoder `bert.`. Text assignment has in its
    file a temperature and a projection of texts, which it never reads: the configuration's and zeros.

    Raises:
        ConversionError: the released code would compute something else with these weights, or names that do not fit.
    """
    ours = dict(state)
    if not any(name.startswith("albef.") for name in ours):
        ours = {f"albef.{name}": tensor for name, tensor in ours.items()}
    task = task_of(ours)
    differences = hidden_differences(config, task)
    if differences:
        raise ConversionError(
            f"the released code would read another model from these weights: {'; '.join(differences)}"
        )
    bert = "bert." if task in ("pretraining", "mlm") else ""
    ours.pop("answer_ids", None)
    if bert:
        ours.pop("queue.image_ids", None)
    for copy in ("", "teacher."):
        for head, words in (
            ("mlm_head", "albef.text_model.embeddings"),
            ("answer_decoder.head", "answer_decoder.embeddings"),
        ):
            if f"{copy}{head}.decoder.bias" in ours:
                tied = ours[f"{copy}{words}.word_embeddings.weight"]
                ours.setdefault(f"{copy}{head}.decoder.weight", tied)
    if task == "assignment":
        projection = ours["albef.visual_projection.bias"]
        sizes = len(projection), config.text_config.hidden_size
        ours["albef.text_projection.weight"] = projection.new_zeros(sizes)
        ours["albef.text_projection.bias"] = torch.zeros_like(projection)
        ours["temperature.weight"] = torch.full_like(projection[0], config.temperature_init_value)
    images = 2 if task in OF_TWO_IMAGES else 1
    text, fusion = config.text_config.num_hidden_layers, config.multimodal_config.num_hidden_layers
    result = revert(ours, albef_table(text, fusion, bert, images, config.answer_layers))
    for part in (f"text_encoder.{bert}", f"text_encoder_m.{bert}", "text_decoder.bert.", "text_decoder_m.bert."):
        if f"{part}{WORDS}" in result:
            device = result[f"{part}{WORDS}"].device
            counted = torch.arange(config.text_config.max_position_embeddings, device=device)[None]
            result[f"{part}embeddings.position_ids"] = counted
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
    if task_of(state) == "vqa":
        run["k_test"] = config.answer_candidates
    return {"model": to_state_dict(config, state), "config": run, "epoch": 0}


def hidden_differences(config: VlpAlbefConfig, task: str = "model") -> list[str]:
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
    return differences + task_differences(config, task)


def untold_sizes(config: VlpAlbefConfig, task: str = "model") -> list[str]:
    """What its reader has to be told: sizes that the released code builds by default, and copies that its training starts from."""
    told = [
        f"{part}.{name} {getattr(getattr(config, part), name)}, it has {sizes[name]}"
        for part, sizes in (("vision_config", VIT_SIZES), ("text_config", BERT_SIZES))
        for name in sizes
        if getattr(getattr(config, part), name) != sizes[name]
    ]
    if config.text_config.num_hidden_layers != config.multimodal_config.num_hidden_layers:
        told.append(f"fusion_layer {config.text_config.num_hidden_layers}, of its config_bert.json")
    return told + untold_of_task(config, task)
