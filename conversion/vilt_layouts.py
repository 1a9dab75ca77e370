"""ViLT's layouts: names, sizes and settings of the original's checkpoints and of transformers' against ours.

Paper: "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", https://arxiv.org/abs/2102.03334.
Sources: `vilt/modules/` and `vilt/config.py` of the released code, transformers' `ViltModel` and the classes on top of it. A file holds
the transformer and any of the heads. Ours are named here as in `VlpViltForPreTraining` and `VlpViltForImageTextRetrieval`; the
classifiers of the other two tasks, which our classes both call `classifier`, have `vqa_` and `nlvr2_` in front. Nothing here needs values:
meta tensors will do.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import ViltConfig

from conversion.checkpoints import looks_like
from conversion.tables import (
    ConversionError,
    Cut,
    Drop,
    Rename,
    Row,
    Split,
    Table,
    Unbatched,
    refuse_difference,
    refuse_shapes,
    revert,
    told_shape,
)
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig

MODALITIES = "token_type_embeddings.weight"
POSITION_IDS = "text_embeddings.position_ids"
CLASSIFIER = {"0": "fc1", "1": "norm", "3": "fc2"}  # places in a Sequential
HEAD_SIZE = 64  # of the released models: the number of heads is not in the weights
HEADS = {  # objective of a head -> where the names of its tensors begin, there and here
    "mlm": ("mlm_score.", "mlm_head."),
    "mpp": ("mpp_score.", "mpp_head."),
    "itm": ("itm_score.", "itm_head."),
    "irtr": ("rank_output.", "rank_head."),
    "vqa": ("vqa_classifier.",),
    "nlvr2": ("nlvr2_classifier.",),
}
SECOND_IMAGE = "second_image_embedding"
# What the released code computes whatever the file says.
FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "text_layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "num_channels": 3,
}
VIT = "vit_base_patch32_384"  # the only one of the released code with released weights, and its sizes
VIT_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_SIZES |= {"image_size": 384, "patch_size": 32}
# Options of the released code, with their defaults, that the configuration does not tell.
OPTIONS = {
    "exp_name": "vilt",
    "seed": 0,
    "batch_size": 4096,
    "train_transform_keys": ["pixelbert"],
    "val_transform_keys": ["pixelbert"],
    "draw_false_image": 1,
    "image_only": False,
    "vqav2_label_size": 3129,
    "tokenizer": "bert-base-uncased",
    "whole_word_masking": False,
    "mlm_prob": 0.15,
    "draw_false_text": 0,
    "vit": VIT,
    "optim_type": "adamw",
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "decay_power": 1,
    "max_epoch": 100,
    "max_steps": 25000,
    "warmup_steps": 2500,
    "end_lr": 0,
    "lr_mult": 1,
    "get_recall_metric": False,
    "resume_from": None,
    "fast_dev_run": False,
    "val_check_interval": 1.0,
    "test_only": False,
    "data_root": "",
    "log_dir": "result",
    "per_gpu_batchsize": 0,
    "num_gpus": 1,
    "num_nodes": 1,
    "load_path": "",
    "num_workers": 8,
    "precision": 16,
}

# ------------------------------------------------------------------------------------------------ names


def vilt_table(modalities: int = 3) -> Table:
    """Rows for everything that a file of the original may hold; `modalities`: rows of its table of them, 2, or 3 with NLVR2."""
    block, ours = "transformer.blocks.{}", "vilt.encoder.layers.{}"
    return [
        Drop(POSITION_IDS, "counts 0, 1, 2, ..."),
        Rename("text_embeddings.LayerNorm.*", "vilt.text_embeddings.norm.*"),
        Rename("text_embeddings.*", "vilt.text_embeddings.*"),
        _modalities(MODALITIES, modalities),
        Rename("transformer.cls_token", "vilt.image_embeddings.class_token"),
        Unbatched("transformer.pos_embed", "vilt.image_embeddings.position_embedding"),
        Rename("transformer.mask_token", "vilt.image_embeddings.mask_token"),
        Rename("transformer.patch_embed.proj.*", "vilt.image_embeddings.patch_embedding.*"),
        *(
            Split(f"{block}.attn.qkv.{kind}", [f"{ours}.attention.{part}_proj.{kind}" for part in "qkv"])
            for kind in ("weight", "bias")
        ),
        Rename(f"{block}.attn.proj.*", f"{ours}.attention.out_proj.*"),
        *(Rename(f"{block}.{part}.*", f"{ours}.{part}.*") for part in ("norm1", "norm2", "mlp")),
        Rename("transformer.norm.*", "vilt.norm.*"),
        Rename("pooler.*", "vilt.pooler.*"),
        Rename("mlm_score.bias", "mlm_head.decoder.bias"),
        *_head_rows(),
    ]


def transformers_table(modalities: int = 2) -> Table:
    """Rows between transformers' `ViltFor...` and ours; `modalities`: rows of their table, 2, or 3 with NLVR2.

    Their names are those of `plain_transformers`: with `vilt.` in front, and with the task in front of a classifier.
    """
    embeddings, text = "vilt.embeddings", "vilt.embeddings.text_embeddings"
    block, ours = "vilt.encoder.layer.{}", "vilt.encoder.layers.{}"
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    return [
        Drop(f"{text}.position_ids", "counts 0, 1, 2, ...; saved by old versions"),
        Drop(f"{text}.token_type_ids", "zeros; saved by old versions"),
        Rename(f"{text}.LayerNorm.*", "vilt.text_embeddings.norm.*"),
        Rename(f"{text}.*", "vilt.text_embeddings.*"),
        _modalities(f"{embeddings}.{MODALITIES}", modalities),
        Rename(f"{embeddings}.cls_token", "vilt.image_embeddings.class_token"),
        Unbatched(f"{embeddings}.position_embeddings", "vilt.image_embeddings.position_embedding"),
        Rename(f"{embeddings}.patch_embeddings.projection.*", "vilt.image_embeddings.patch_embedding.*"),
        *(Rename(f"{block}.attention.attention.{part}.*", f"{ours}.attention.{parts[part]}.*") for part in parts),
        Rename(f"{block}.attention.output.dense.*", f"{ours}.attention.out_proj.*"),
        Rename(f"{block}.layernorm_before.*", f"{ours}.norm1.*"),
        Rename(f"{block}.layernorm_after.*", f"{ours}.norm2.*"),
        Rename(f"{block}.intermediate.dense.*", f"{ours}.mlp.fc1.*"),
        Rename(f"{block}.output.dense.*", f"{ours}.mlp.fc2.*"),
        Rename("vilt.layernorm.*", "vilt.norm.*"),
        Rename("vilt.pooler.*", "vilt.pooler.*"),
        *_head_rows(),
    ]


def _modalities(original: str, rows: int) -> Row:
    """The table of modalities, whose third row is a parameter of its own here."""
    if rows > 2:
        return Cut(original, "vilt.modality_embeddings.weight", SECOND_IMAGE, 2)
    return Rename(original, "vilt.modality_embeddings.weight")


def _head_rows() -> list[Row]:
    """Rows of the heads, which transformers kept as they were."""
    return [
        *(
            Rename(f"{head}_score.{theirs}.*", f"{head}_head.{ours}.*")
            for head in ("mlm", "mpp")
            for theirs, ours in (("transform.dense", "dense"), ("transform.LayerNorm", "norm"), ("decoder", "decoder"))
        ),
        Rename("itm_score.fc.*", "itm_head.*"),
        Rename("rank_output.*", "rank_head.*"),
        *(
            Rename(f"{task}_classifier.{place}.*", f"{task}_classifier.{part}.*")
            for task in ("vqa", "nlvr2")
            for place, part in CLASSIFIER.items()
        ),
    ]


def heads_of(state: Mapping[str, torch.Tensor]) -> set[str]:
    """The heads among the names of a file, or among ours, by their objectives: mlm, mpp, itm, irtr, vqa, nlvr2."""
    return {head for head, starts in HEADS.items() if any(name.startswith(starts) for name in state)}


def switches_of(heads: set[str]) -> dict[str, float]:
    """Fields of the configuration under which pre-training has these heads; the weights are the paper's."""
    switches = {f"{head}_weight": float(head in heads) for head in ("mlm", "itm", "mpp")}
    return switches | {"wpa_weight": 0.1 * switches["itm_weight"]}


def with_task_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of one of our classes, also of `VlpViltModel`, under the names that the tables have."""
    if not any(name.startswith("vilt.") for name in state):
        return {f"vilt.{name}": tensor for name, tensor in state.items()}
    task = "nlvr2" if SECOND_IMAGE in state else "vqa"
    return {re.sub(r"^classifier\.", f"{task}_classifier.", name): tensor for name, tensor in state.items()}


def plain_transformers(state: Mapping[str, torch.Tensor], config: ViltConfig) -> dict[str, torch.Tensor]:
    """A state dict of transformers under the names that `transformers_table` has.

    A decoder tied to the words, which is not stored, is a copy of theirs; of a bias stored twice, as old versions did, one is kept.

    Raises:
        ConversionError: the two copies of the bias differ.
    """
    if "embeddings.cls_token" in state:
        return {f"vilt.{name}": tensor for name, tensor in state.items()}
    task = "nlvr2" if config.num_images == 2 else "vqa"
    result = {re.sub(r"^classifier\.", f"{task}_classifier.", name): tensor for name, tensor in state.items()}
    words = result.get("vilt.embeddings.text_embeddings.word_embeddings.weight")
    if "mlm_score.transform.dense.weight" in result:
        if words is not None:
            result.setdefault("mlm_score.decoder.weight", words.clone())
        if (bias := result.pop("mlm_score.bias", None)) is not None:
            kept = result.setdefault("mlm_score.decoder.bias", bias)
            if not kept.is_meta and not torch.equal(kept, bias):
                raise ConversionError("mlm_score.bias and mlm_score.decoder.bias are one tensor there and differ here")
    return result


# ------------------------------------------------------------------------------------------------ sizes and settings


def infer_config(state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None) -> VlpViltConfig:
    """Our configuration of a file of the original, from its shapes and the options beside them.

    Args:
        state: under the original's names; meta tensors will do.
        options: its `config`. `num_heads` (one for each 64 of the width if absent), `drop_rate` and `max_image_len` are taken from it;
            sizes that the weights tell must be theirs.

    Raises:
        ConversionError: another architecture, sizes that make no sense or are stated otherwise, an option of another type.
    """
    options = options or {}
    _refuse_other_types(options)
    if "transformer.pos_embed" not in state or MODALITIES not in state:
        found = "\n".join(f"  {name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:10])
        raise ConversionError(
            f"this is no ViLT checkpoint: it looks like {looks_like(state)}.\n- found ({len(state)} entries):\n{found}\n"
            f"+ expected: transformer.pos_embed, {MODALITIES}, text_embeddings.*, transformer.blocks.*"
        )
    vocabulary, width = told_shape(state, "text_embeddings.word_embeddings.weight", 2)
    _, channels, patch, _ = told_shape(state, "transformer.patch_embed.proj.weight", 4)
    rows, modalities = told_shape(state, "transformer.pos_embed", 3)[1] - 1, told_shape(state, MODALITIES, 2)[0]
    grid = math.isqrt(max(rows, 0))
    if grid**2 != rows or not rows:
        raise ConversionError(
            f"transformer.pos_embed has {rows + 1} rows, not one more than a square; a DeiT with its two tokens in front has no "
            "counterpart here"
        )
    if modalities not in (2, 3):
        raise ConversionError(f"{MODALITIES} has {modalities} rows; it has 2, or 3 with NLVR2")
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(
            {match[1] for name in state if (match := re.match(r"transformer\.blocks\.(\d+)\.", name))}
        ),
        "intermediate_size": told_shape(state, "transformer.blocks.0.mlp.fc1.weight", 2)[0],
        "max_position_embeddings": told_shape(state, "text_embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": told_shape(state, "text_embeddings.token_type_embeddings.weight", 2)[0],
        "patch_size": patch,
        "num_channels": channels,
    }
    stated = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "max_text_len": "max_position_embeddings",
        "patch_size": "patch_size",
    }
    for option, field in stated.items():
        if options.get(option, sizes[field]) != sizes[field]:
            raise ConversionError(
                f"{option} of the configuration is {options[option]}, the shapes of the weights say {sizes[field]}: parts of two models?"
            )
    limit = options.get("max_image_len", -1)
    heads = heads_of(state)
    answers = {"num_labels": told_shape(state, "vqa_classifier.3.weight", 2)[0]} if "vqa" in heads else {}
    try:
        return VlpViltConfig(
            **sizes,
            num_attention_heads=options.get("num_heads", max(1, width // HEAD_SIZE)),
            image_size=grid * patch,  # of the table; the option is the shorter side of pictures
            hidden_dropout_prob=options.get("drop_rate", 0.1),
            max_image_length=limit if limit > 0 else None,
            **answers,
            **switches_of(heads),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"no ViLT has these sizes: {error}") from error


def _refuse_other_types(options: Mapping[str, Any]) -> None:
    """Raises ConversionError for an option that is something else than a number where one is read."""
    whole = ("num_heads", "max_image_len", "image_size")
    for name, kind in {**dict.fromkeys(whole, int), "drop_rate": int | float}.items():
        if name in options and (not isinstance(options[name], kind) or isinstance(options[name], bool)):
            raise ConversionError(f"{name} of the configuration is {options[name]!r:.60}, which is no number")


SAME_FIELDS = (
    "vocab_size",
    "type_vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "initializer_range",
    "image_size",
    "patch_size",
    "num_channels",
    "pad_token_id",
)


def config_from_transformers(theirs: ViltConfig) -> VlpViltConfig:
    """Ours for a transformers `ViltConfig`: both norms' eps are its one.

    Raises:
        ConversionError: it describes what ours does not compute.
    """
    if theirs.num_images not in (-1, 2):
        raise ConversionError(f"num_images is {theirs.num_images}; visual reasoning here is about two pictures")
    if not theirs.qkv_bias:
        raise ConversionError("qkv_bias is False; the attention here has biases")
    try:
        return VlpViltConfig(
            **{name: getattr(theirs, name) for name in SAME_FIELDS},
            layer_norm_eps=theirs.layer_norm_eps,
            text_layer_norm_eps=theirs.layer_norm_eps,
            max_image_length=theirs.max_image_length if (theirs.max_image_length or -1) > 0 else None,
            id2label=theirs.id2label,
            label2id=theirs.label2id,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"no ViLT of ours has this configuration: {error}") from error


def config_to_transformers(ours: VlpViltConfig, images: int = 1) -> ViltConfig:
    """transformers' configuration for one of ours; `images`: 2 for visual reasoning.

    Of two eps it can hold one: that of the text and of the heads, as in the published conversions. No limit of patches is passed on, as
    theirs would draw them in evaluation too.
    """
    return ViltConfig(
        **{name: getattr(ours, name) for name in SAME_FIELDS},
        layer_norm_eps=ours.text_layer_norm_eps,
        max_image_length=-1,
        modality_type_vocab_size=1 + images,
        num_images=images if images > 1 else -1,
        id2label=ours.id2label,
        label2id=ours.label2id,
    )


def longest_edge(shortest_edge: int) -> int:
    """The longest side of a picture in the released code and transformers, for the shorter one."""
    return int(1333 / 800 * shortest_edge)


# ------------------------------------------------------------------------------------------------ and back


def to_transformers(
    config: VlpViltConfig, state: Mapping[str, torch.Tensor]
) -> tuple[type, ViltConfig, dict[str, torch.Tensor], list[str]]:
    """transformers' class, its configuration and state dict from those of any of our classes, and what its reader has to be told.

    Raises:
        ConversionError: that class would compute something else, or names that do not fit.
    """
    ours = with_task_names(state)
    heads = heads_of(ours)
    kinds = {
        "nlvr2": transformers.ViltForImagesAndTextClassification,
        "vqa": transformers.ViltForQuestionAnswering,
        "irtr": transformers.ViltForImageAndTextRetrieval,
        "mlm": transformers.ViltForMaskedLM,
    }
    kind = next((kinds[head] for head in kinds if head in heads), transformers.ViltModel)
    if heads & {"nlvr2", "vqa"} and config.hidden_act != "gelu":
        raise ConversionError(f"hidden_act is {config.hidden_act!r}; the classifiers of transformers have gelu alone")
    told = []
    if config.layer_norm_eps != config.text_layer_norm_eps:
        told.append(f"layer_norm_eps {config.layer_norm_eps:g} in the blocks, it takes {config.text_layer_norm_eps:g}")
    foreign = {name for name in ours if name.startswith(("itm_head.", "mpp_head.", "vilt.image_embeddings.mask_token"))}
    told += [f"{name}, which {kind.__name__} has not" for name in sorted({name.rpartition(".")[0] for name in foreign})]
    images = 2 if "nlvr2" in heads else 1
    result = revert(
        {name: tensor for name, tensor in ours.items() if name not in foreign}, transformers_table(1 + images)
    )
    theirs = config_to_transformers(config, images)
    if (
        kind is transformers.ViltForMaskedLM and "vilt.pooler.dense.weight" not in result
    ):  # it has one that nothing reads
        result["vilt.pooler.dense.weight"] = result["mlm_score.transform.dense.weight"].new_zeros(
            [config.hidden_size] * 2
        )
        result["vilt.pooler.dense.bias"] = result["mlm_score.transform.dense.bias"].new_zeros(config.hidden_size)
    prefix = "vilt." if kind is transformers.ViltModel else ""
    result = {
        re.sub(r"^\w+_classifier\.", "classifier.", name.removeprefix(prefix)): tensor
        for name, tensor in result.items()
    }
    with torch.device("meta"):
        expected = kind(theirs).state_dict()
    refuse_difference(
        {name: tensor for name, tensor in result.items() if name not in expected},
        {name: tensor for name, tensor in expected.items() if name not in result},
        "our model",
        kind.__name__,
    )
    refuse_shapes(result, expected)
    return kind, theirs, result, told


def to_checkpoint(config: VlpViltConfig, state: Mapping[str, torch.Tensor]) -> dict:
    """What the released code's trainer saves of weights and options, from the configuration and state dict of any of our classes.

    Raises:
        ConversionError: the released code would compute something else with these weights, or names that do not fit.
    """
    differences = hidden_differences(config)
    if differences:
        raise ConversionError(
            f"the released code would read another model from these weights: {'; '.join(differences)}"
        )
    ours = with_task_names(state)
    result = revert(ours, vilt_table(3 if SECOND_IMAGE in ours else 2))
    device = result[MODALITIES].device
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "1.1.4",
        "state_dict": {POSITION_IDS: torch.arange(config.max_position_embeddings, device=device)[None], **result},
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": to_options(config, heads_of(ours))},
    }


def to_options(config: VlpViltConfig, heads: set[str]) -> dict[str, Any]:
    """Options of the released code under which it builds this model; `heads` as of `heads_of`."""
    switches = {head: int(head in heads) for head in ("itm", "mlm", "mpp", "vqa", "nlvr2", "irtr")}
    if "irtr" in heads and "itm" in heads:
        switches["itm"] = 0.5  # built, not trained
    ratio = config.intermediate_size / config.hidden_size
    return OPTIONS | {
        "loss_names": switches,
        "vqav2_label_size": config.num_labels if "vqa" in heads else OPTIONS["vqav2_label_size"],
        "image_size": config.image_size,
        "max_image_len": config.max_image_length or -1,
        "patch_size": config.patch_size,
        "max_text_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
        "drop_rate": config.hidden_dropout_prob,
        "get_recall_metric": "irtr" in heads,
    }


def hidden_differences(config: VlpViltConfig) -> list[str]:
    """Settings that the released code has one value of, as "hidden_act relu, it takes gelu"."""
    differences = [
        f"{name} {getattr(config, name)}, it takes {FIXED[name]}"
        for name in FIXED
        if getattr(config, name) != FIXED[name]
    ]
    if config.hidden_size == VIT_SIZES["hidden_size"]:
        differences += untold_sizes(config)
    return differences


def untold_sizes(config: VlpViltConfig) -> list[str]:
    """Sizes of the transformer other than those that the released code builds by name."""
    return [
        f"{name} {getattr(config, name)}, {VIT} has {VIT_SIZES[name]}"
        for name in VIT_SIZES
        if getattr(config, name) != VIT_SIZES[name]
    ]
