"""VSE-infinity's layouts: names, sizes and settings of the original's checkpoints, and of the CNNs it starts from, against ours.

Paper: "Learning the Best Pooling Strategy for Visual Semantic Embedding", https://arxiv.org/abs/2011.04305.
Sources: `lib/encoders.py`, `lib/vse.py` and `lib/modules/` of the released code, its branches for BERT and BiGRU. Names are those of its
two state dicts behind `img_enc.` and `txt_enc.`, without the `module.` of DataParallel. Nothing here needs values: meta tensors will do.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BertConfig

from conversion.checkpoints import looks_like
from conversion.tables import ConversionError, Drop, Rename, Row, find_row, revert, told_shape
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig

SIDES = ("img_enc", "txt_enc")  # of the list `model` in a checkpoint, in this order
# pair: both encoders; halves: the CNN as {"base": ..., "top": ...}; resnet: torchvision's names; pooling: the operator alone
LAYOUTS = ("pair", "halves", "resnet", "pooling")
BASE_SIDE = 256  # pixels, before the option `input_scale_factor`
# Which graph the released code builds for an option `backbone_source`; "detector" is any name that has the word in it.
GRAPHS_OF_SOURCES = {
    "detector": "caffe",
    "wsl": "torchvision",
    "imagenet": "caffe",
    "imagenet_res50": "caffe",
    "imagenet_res152": "caffe",
    "imagenet_resnext": "torchvision",
}
# Options of the released code that change nothing here, with the values of the paper's recipes.
OPTIONS = {
    "data_path": "./data/",
    "data_name": "coco",
    "vocab_path": "./vocab/",
    "num_epochs": 25,
    "batch_size": 128,
    "word_dim": 300,
    "grad_clip": 2.0,
    "learning_rate": 5e-4,
    "lr_update": 15,
    "optim": "adam",
    "workers": 10,
    "log_step": 10,
    "val_step": 500,
    "logger_name": "./runs/runX/log",
    "model_name": "./runs/runX/checkpoint",
    "resume": "",
    "backbone_path": "",
    "backbone_source": "detector",
    "vse_mean_warmup_epochs": 1,
    "reset_start_epoch": False,
    "backbone_warmup_epochs": 0,
    "embedding_warmup_epochs": 1,
    "backbone_lr_factor": 0.01,
    "input_scale_factor": 1,
}
# What a BERT computes beside its shapes, as every published checkpoint has it.
BERT_FIELDS = (
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
)
BERT_WIDTH, BERT_HEADS = 768, 12
COUNTER = "num_batches_tracked"


# ------------------------------------------------------------------------------------------------ names


def vse_table(config: VlpVseConfig) -> list[Row]:
    """Rows between the original's two encoders and ours for models of this configuration.

    Raises:
        ConversionError: a tower that the original cannot hold: another text encoder than BERT and BiGRU, another CNN than its own.
    """
    return [*_image_rows(config), *_text_rows(config)]


def _image_rows(config: VlpVseConfig) -> list[Row]:
    if config.vision_config is None:
        return [
            Rename("img_enc.fc.*", "visual_projection.*"),
            Rename("img_enc.mlp.layers.0.*", "region_mlp.fc1.*"),
            Rename("img_enc.mlp.bns.0.*", "region_mlp.norm.*"),
            Rename("img_enc.mlp.layers.1.*", "region_mlp.fc2.*"),
            Drop("img_enc.mlp.bns.1.*", "a batch norm that is never called"),
            Rename("img_enc.gpool.*", "visual_pooling.*"),
        ]
    if not isinstance(config.vision_config, VlpVseGridConfig):
        raise ConversionError(
            f"the image tower is a {config.vision_config.model_type}; only the original's own CNNs fit its layout"
        )
    return [
        Drop("img_enc.backbone.resnet.fc.*", "a classifier that is never called"),
        Rename("img_enc.backbone.resnet.*", "vision_model.resnet.*"),
        Rename("img_enc.image_encoder.fc.*", "visual_projection.*"),
        Rename("img_enc.image_encoder.gpool.*", "visual_pooling.*"),
    ]


def _text_rows(config: VlpVseConfig) -> list[Row]:
    pooling = Rename("txt_enc.gpool.*", "text_pooling.*")
    if isinstance(config.text_config, VlpVseGruConfig):
        return [
            Rename("txt_enc.embed.weight", "text_model.embeddings.weight"),
            Rename("txt_enc.rnn.*", "text_model.gru.*"),
            pooling,
        ]
    if config.text_config.model_type != "bert":
        raise ConversionError(
            f"the text tower is a {config.text_config.model_type}; only BERT and the BiGRU fit the original's layout"
        )
    return [
        Drop("txt_enc.bert.pooler.*", "a layer that is never called"),
        Drop("txt_enc.bert.embeddings.position_ids", "counts 0, 1, 2, ...; saved by some versions of transformers"),
        Rename("txt_enc.bert.*", "text_model.*"),
        Rename("txt_enc.linear.*", "text_projection.*"),
        pooling,
    ]


def _halves(theirs: str, ours: str) -> list[Row]:
    """The CNN as two sequences of modules: numbers in place of names."""
    named = ("conv1", "bn1", None, None, "layer1", "layer2", "layer3")  # 2 and 3 have no weights
    base = [Rename(f"{theirs}base.{place}.*", f"{ours}{name}.*") for place, name in enumerate(named) if name]
    return [*base, Rename(f"{theirs}top.0.*", f"{ours}layer4.*")]


# Second copies of the CNN's tensors in a checkpoint <-> the first ones.
COPIES = _halves("img_enc.backbone.", "img_enc.backbone.resnet.")


def grid_table(layout: str) -> list[Row]:
    """Rows between a CNN alone, of the layout halves or resnet, and `VlpVseGridModel`."""
    if layout == "halves":
        return _halves("", "resnet.")
    return [
        Drop("fc.*", "the classifier"),
        Rename("conv1.*", "resnet.conv1.*"),
        Rename("bn1.*", "resnet.bn1.*"),
        Rename("layer{}.*", "resnet.layer{}.*"),
    ]


def detect_layout(state: Mapping[str, torch.Tensor]) -> str:
    """Which of LAYOUTS the names are of.

    Raises:
        ConversionError: none of them; says what the names look like instead.
    """
    if any(name.startswith("img_enc.") for name in state) and any(name.startswith("txt_enc.") for name in state):
        return "pair"
    marks = {"base.4.0.conv1.weight": "halves", "layer1.0.conv3.weight": "resnet", "gru.weight_ih_l0": "pooling"}
    layout = next((layout for name, layout in marks.items() if name in state), None)
    if layout is None:
        found = "\n".join(f"  {name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:10])
        raise ConversionError(
            f"this is no VSE-infinity checkpoint: it looks like {looks_like(state)}.\n- found ({len(state)} entries):\n{found}\n"
            '+ expected: {"model": [image encoder, text encoder], "opt": ...}, or a bottleneck ResNet as {"base": ..., "top": ...} or '
            "under torchvision's names"
        )
    return layout


def without_copies(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A pair with every CNN tensor once, under its name below `backbone.resnet`.

    Raises:
        ConversionError: the two copies of a tensor differ.
    """
    result = {name: tensor for name, tensor in state.items() if find_row(name, COPIES) is None}
    for name, tensor in state.items():
        if (found := find_row(name, COPIES)) is None:
            continue
        first = result.setdefault(found[1][0], tensor)
        differ = first.shape != tensor.shape or first.dtype != tensor.dtype
        if differ or (not tensor.is_meta and not torch.equal(first, tensor)):
            raise ConversionError(
                f"{found[1][0]} and {name} are the same tensor in the original and differ here: parts of two models?"
            )
    return result


def with_counters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a counter of batches for every batch norm: files from before torch 0.4.1 have none."""
    missing = {}
    for name, tensor in state.items():
        counter = name.removesuffix("running_var") + COUNTER
        if name.endswith(".running_var") and counter not in state:
            missing[counter] = torch.zeros((), dtype=torch.int64, device=tensor.device)
    return {**state, **missing}


# ------------------------------------------------------------------------------------------------ sizes and settings


def infer_config(
    state: Mapping[str, torch.Tensor],
    options: Mapping[str, Any] | None = None,
    told: Mapping[str, Mapping[str, Any]] | None = None,
) -> VlpVseConfig:
    """The configuration behind a pair without copies, from its shapes and its options.

    Args:
        state: {name: tensor}; meta tensors will do.
        options: of `opt` in the checkpoint: the hinge's margin and form, normalisation, picture size and CNN. What is absent is taken as
            in the paper's recipes.
        told: what shapes and options do not tell: `bert` with fields of a BertConfig (12 heads are taken for width 768, else one for
            each 64), `backbone` with `graph`. Sizes in it must be those of the weights.

    Raises:
        ConversionError: a size that the weights tell is missing, makes no sense, or is stated otherwise; the CNN's graph is not told.
    """
    options, told = options or {}, told or {}
    _refuse_other_types(options)
    regions = "img_enc.fc.weight" in state
    projection = told_shape(state, "img_enc.fc.weight" if regions else "img_enc.image_encoder.fc.weight", 2)
    gru = (
        told_shape(state, "txt_enc.gpool.gru.weight_ih_l0", 2)[1],
        told_shape(state, "txt_enc.gpool.gru.weight_hh_l0", 2)[1],
    )
    _refuse_other("opt", options, {"embed_size": projection[0], "img_dim": projection[1]})
    _refuse_other("gpo", told.get("gpo", {}), {"d_pe": gru[0], "d_hidden": gru[1]})
    fields: dict[str, Any] = {}
    if regions:
        fields = {
            "region_size": projection[1],
            "region_mlp_size": told_shape(state, "img_enc.mlp.layers.0.weight", 2)[0],
        }
    else:
        backbone = {
            name.removeprefix("img_enc.backbone.resnet."): tensor
            for name, tensor in state.items()
            if name.startswith("img_enc.backbone.resnet.")
        }
        fields["vision_config"] = infer_grid_config(backbone, options, told.get("backbone"))
    return VlpVseConfig(
        text_config=_text_config(state, options, told.get("bert", {})),
        projection_dim=projection[0],
        position_size=gru[0],
        pooling_size=gru[1],
        normalize_image=not options.get("no_imgnorm", False),
        normalize_text=not options.get("no_txtnorm", False),
        margin=options.get("margin", 0.2),
        hardest_negatives=float(options.get("max_violation", True)),
        region_norm_rows="all",  # the statistics in the file are of all rows
        **fields,
    )


def _text_config(state: Mapping[str, torch.Tensor], options: Mapping, bert: Mapping) -> BertConfig | VlpVseGruConfig:
    if "txt_enc.embed.weight" in state:
        vocabulary, width = told_shape(state, "txt_enc.embed.weight", 2)
        layers = _count(state, r"txt_enc\.rnn\.weight_hh_l(\d+)$")
        _refuse_other("opt", options, {"vocab_size": vocabulary, "word_dim": width, "num_layers": layers})
        hidden = told_shape(state, "txt_enc.rnn.weight_hh_l0", 2)[1]
        return VlpVseGruConfig(
            vocab_size=vocabulary, embedding_size=width, hidden_size=hidden, num_hidden_layers=layers
        )
    embeddings = "txt_enc.bert.embeddings"
    vocabulary, width = told_shape(state, f"{embeddings}.word_embeddings.weight", 2)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": _count(state, r"txt_enc\.bert\.encoder\.layer\.(\d+)\."),
        "intermediate_size": told_shape(state, "txt_enc.bert.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": told_shape(state, f"{embeddings}.position_embeddings.weight", 2)[0],
        "type_vocab_size": told_shape(state, f"{embeddings}.token_type_embeddings.weight", 2)[0],
    }
    _refuse_other("bert", bert, sizes)
    heads = bert.get("num_attention_heads") or usual_heads(width)
    if width % heads:
        raise ConversionError(f"bert.num_attention_heads {heads} does not divide the width {width}")
    return BertConfig(**sizes, num_attention_heads=heads, **{name: bert[name] for name in BERT_FIELDS if name in bert})


def usual_heads(width: int) -> int:
    """Heads of a BERT whose file does not tell them: bert-base's, or one for each 64 channels."""
    return BERT_HEADS if width == BERT_WIDTH else max(1, width // 64)


def infer_grid_config(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None, told: Mapping[str, Any] | None = None
) -> VlpVseGridConfig:
    """The configuration of a CNN from the shapes under torchvision's names.

    `options`: `backbone_source`, and `input_scale_factor` (2, the paper's, if absent). `told`: `graph`, where no source tells it, and
    sizes, which must be those of the weights.

    Raises:
        ConversionError: as for `infer_config`.
    """
    options, told = options or {}, told or {}
    _refuse_other_types(options)
    stem = told_shape(state, "conv1.weight", 4)
    stages = range(1, _count(state, r"layer(\d+)\.") + 1)
    inner = [told_shape(state, f"layer{stage}.0.conv2.weight", 4) for stage in stages]  # [out, in / groups, 3, 3]
    sizes = {
        "layers": [_count(state, rf"layer{stage}\.(\d+)\.") for stage in stages],
        "stem_channels": stem[0],
        "bottleneck_channels": [shape[0] for shape in inner],
        "groups": inner[0][0] // max(1, inner[0][1]),
    }
    _refuse_other("backbone", told, sizes)
    graph, source = told.get("graph"), options.get("backbone_source")
    if graph is None and source is None:
        raise ConversionError(
            "the weights do not tell in which convolution the CNN strides: give --backbone-source, "
            f"one of {', '.join(GRAPHS_OF_SOURCES)}"
        )
    return VlpVseGridConfig(
        graph=graph or graph_of_source(source),
        embedding_size=stem[0],
        depths=sizes["layers"],
        hidden_sizes=[told_shape(state, f"layer{stage}.0.conv3.weight", 4)[0] for stage in stages],
        bottleneck_sizes=sizes["bottleneck_channels"],
        groups=sizes["groups"],
        num_channels=stem[1],
        image_size=int(BASE_SIDE * options.get("input_scale_factor", 2)),
    )


def graph_of_source(source: str) -> str:
    """The graph that the released code builds for an option `backbone_source`.

    Raises:
        ConversionError: an unknown source.
    """
    graph = "caffe" if "detector" in source else GRAPHS_OF_SOURCES.get(source)
    if graph is None:
        raise ConversionError(f"backbone_source {source!r} is unknown: the original has {', '.join(GRAPHS_OF_SOURCES)}")
    return graph


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _refuse_other_types(options: Mapping[str, Any]) -> None:
    """Raises ConversionError for an option that a file holds as something else than the original's argument parser makes."""
    kinds = {"margin": int | float, "input_scale_factor": int | float, "backbone_source": str}
    for name, kind in kinds.items():
        if name in options and not isinstance(options[name], kind):
            raise ConversionError(
                f"opt.{name} is {options[name]!r:.60}, which is no {'text' if kind is str else 'number'}"
            )


def _refuse_other(section: str, stated: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    for name, told in sizes.items():
        if name in stated and stated[name] != told:
            raise ConversionError(
                f"{section}.{name} says {stated[name]}, the shapes of the weights {told}: parts of two models?"
            )


# ------------------------------------------------------------------------------------------------ and back


def to_checkpoint(config: VlpVseConfig, state: Mapping[str, torch.Tensor], backbone_source: str | None = None) -> dict:
    """What the released training script saves, from our state dict under the names of `VlpVseModel`.

    Every CNN tensor stands twice; the batch norm that is never called is as initialised. Absent are BERT's pooler and the CNN's classifier,
    which the original keeps as it builds them, since it loads with strict=False. `opt` is an argparse.Namespace, of which its evaluation
    reads attributes: ours where ours has them, OPTIONS elsewhere. The prefix `module.` is where the branch has it.

    Args:
        backbone_source: see `usual_source`, whose answer is taken if not given.

    Raises:
        ConversionError: foreign towers, names that do not fit, a source of another graph.
    """
    both = revert(state, vse_table(config))
    if config.vision_config is None:
        both |= _unused_norm(config.projection_dim, state["visual_projection.weight"])
    else:
        first = {name: both[name] for name in both if name.startswith("img_enc.backbone.resnet.")}
        both |= revert(first, COPIES)
    options = to_options(config, backbone_source)
    bare = config.vision_config is None and isinstance(config.text_config, VlpVseGruConfig)
    model = [
        {
            ("" if bare else "module.") + name.removeprefix(f"{side}."): tensor
            for name, tensor in both.items()
            if name.startswith(f"{side}.")
        }
        for side in SIDES
    ]
    return {"epoch": 0, "model": model, "best_rsum": 0.0, "opt": argparse.Namespace(**options), "Eiters": 0}


def _unused_norm(width: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    ones, zeros = like.new_ones(width), like.new_zeros(width)
    values = {"weight": ones, "bias": zeros, "running_mean": zeros.clone(), "running_var": ones.clone()}
    values[COUNTER] = torch.zeros((), dtype=torch.int64)
    return {f"img_enc.mlp.bns.1.{name}": value for name, value in values.items()}


def to_options(config: VlpVseConfig, backbone_source: str | None = None) -> dict[str, Any]:
    """Options of the released code under which it builds this model."""
    grid, text = config.vision_config, config.text_config
    options = OPTIONS | {
        "margin": config.margin,
        "max_violation": config.hardest_negatives > 0,
        "embed_size": config.projection_dim,
        "img_dim": config.region_size if grid is None else grid.hidden_size,
        "no_imgnorm": not config.normalize_image,
        "no_txtnorm": not config.normalize_text,
        "precomp_enc_type": "basic" if grid is None else "backbone",
        "vocab_size": text.vocab_size,
    }
    if grid is not None:
        source = backbone_source or usual_source(grid)
        if graph_of_source(source) != grid.graph:
            raise ConversionError(
                f"the original builds another graph for backbone_source {source!r} than {grid.graph!r}"
            )
        options |= {"backbone_source": source, "input_scale_factor": grid.image_size / BASE_SIDE}
    if isinstance(text, VlpVseGruConfig):
        options |= {"word_dim": text.embedding_size, "num_layers": text.num_hidden_layers, "drop": True}
    return options


def usual_source(config: VlpVseGridConfig, channel_order: str | None = None) -> str:
    """The `backbone_source` whose CNN the original builds in this graph.

    `channel_order`: of the image processor; "rgb" tells a ResNet-101 of ImageNet from the detector's, which is taken if it is not given.
    """
    if config.graph == "torchvision":
        return "wsl"  # imagenet_resnext is the same network with the same pictures
    if channel_order == "rgb":
        return {(3, 4, 6, 3): "imagenet_res50", (3, 8, 36, 3): "imagenet_res152"}.get(tuple(config.depths), "imagenet")
    return "detector"


def untold_settings(config: VlpVseConfig) -> list[str]:
    """Settings that a reader of the checkpoint alone would get wrong, as "text_config.num_attention_heads 4, it takes 1"."""
    if isinstance(config.text_config, VlpVseGruConfig):
        return []
    usual = BertConfig(num_attention_heads=usual_heads(config.text_config.hidden_size))
    fields = ("num_attention_heads", "hidden_act", "layer_norm_eps", "pad_token_id")
    return [
        f"text_config.{name} {getattr(config.text_config, name)}, it takes {getattr(usual, name)}"
        for name in fields
        if getattr(config.text_config, name) != getattr(usual, name)
    ]


def to_backbone(config: VlpVseGridConfig, state: Mapping[str, torch.Tensor]) -> dict:
    """A CNN of ours, under the names of `VlpVseGridModel`, as the file that the original starts a grid model from.

    Of the "caffe" graph {"base": ..., "top": ...}, for `backbone_source` detector; else a state dict under torchvision's names.
    """
    if config.graph != "caffe":
        return revert(state, grid_table("resnet"))
    both = revert(state, grid_table("halves"))
    return {
        half: {name.removeprefix(f"{half}."): both[name] for name in both if name.startswith(f"{half}.")}
        for half in ("base", "top")
    }
