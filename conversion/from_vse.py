"""VSE-infinity checkpoints -> hf_vlp folders: both branches of the original, and the CNNs that its grid models start from.

    python -m conversion.from_vse --checkpoint model_best.pth --vocabulary vocab.txt --output vse-coco-region
    python -m conversion.from_vse --checkpoint original_updown_backbone.pth --backbone-source detector --output updown-resnet101

Paper: "Learning the Best Pooling Strategy for Visual Semantic Embedding", https://arxiv.org/abs/2011.04305.
The tables of names are in `conversion/vse_layouts.py`; `conversion/to_original.py` goes the other way.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel

from conversion.checkpoints import CheckpointError, Original, find_state_dict, read_content, strip_prefixes
from conversion.preprocessing import read_json
from conversion.saving import command_line, fill, refuse_no_numbers, run_or_exit, save
from conversion.tables import ConversionError, convert
from conversion.vse_layouts import (
    GRAPHS_OF_SOURCES,
    SIDES,
    detect_layout,
    grid_table,
    infer_config,
    infer_grid_config,
    vse_table,
    with_counters,
    without_copies,
)
from hf_vlp.layers.pooling import GeneralizedPooling
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining, VlpVseGridModel, VlpVseModel

Config = VlpVseConfig | VlpVseGridConfig


def read_original(path, sha256: str | None = None) -> Original:
    """The tensors of a file (the encoders' behind `img_enc.` and `txt_enc.`) and the options of `opt`; DataParallel's prefixes are removed.

    Raises:
        CheckpointError: see `read_content`; or neither a state dict nor {"model": [image encoder, text encoder], ...}.
        UnsafeCheckpointError: the file asks for code.
    """
    content = read_content(path, sha256)
    parts = content if isinstance(content, Mapping) else {}
    encoders, options = parts.get("model"), parts.get("opt", {})
    if isinstance(encoders, list | tuple):
        if len(encoders) != len(SIDES):
            raise CheckpointError(path, f"`model` is a list of {len(encoders)}", "give a checkpoint of two encoders")
        state = {}
        for side, encoder in zip(SIDES, encoders, strict=True):
            tensors = strip_prefixes(find_state_dict(encoder, path))
            state |= {f"{side}.{name}": tensor for name, tensor in tensors.items()}
        options = vars(options) if isinstance(options, argparse.Namespace) else options
        if not isinstance(options, Mapping):
            raise CheckpointError(
                path, f"`opt` is a {type(options).__name__}", "save the options as a Namespace or a dict"
            )
        return Original(state, dict(options))
    if parts and set(parts) <= {"base", "top"}:
        halves = {half: find_state_dict(tensors, path) for half, tensors in parts.items()}
        return Original({f"{half}.{name}": tensor for half in halves for name, tensor in halves[half].items()})
    return Original(strip_prefixes(find_state_dict(content, path)))


def expected_state(config: Config) -> dict[str, torch.Tensor]:
    """Names and shapes (meta tensors) of our model of this configuration."""
    with torch.device("meta"):
        return AutoModel.from_config(config).state_dict()


def convert_state_dict(
    state: Mapping[str, torch.Tensor],
    options: Mapping[str, Any] | None = None,
    told: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Config, dict[str, torch.Tensor]]:
    """The tensors of a file -> our configuration and state dict, in the stored precision, strictly.

    Args:
        state: of an `Original`; meta tensors will do.
        options, told: see `infer_config`.

    Raises:
        ConversionError: another architecture, names or shapes that do not fit, copies of a tensor that differ, sizes stated otherwise
            than the weights have them, a weight that is no finite number.
    """
    layout = detect_layout(state)
    if layout == "pooling":
        raise ConversionError(
            "this is the pooling operator alone, which has no folder of its own: `load_pooling` reads it"
        )
    state = with_counters(without_copies(state))
    if layout == "pair":
        config = infer_config(state, options, told)
        table = vse_table(config)
    else:
        table = grid_table(layout)
        under_resnet = convert(state, table)
        names = {name.removeprefix("resnet."): tensor for name, tensor in under_resnet.items()}
        config = infer_grid_config(names, options, (told or {}).get("backbone"))
    expected = expected_state(config)
    ours = convert(state, table, expected)
    for name, tensor in ours.items():
        if expected[name].is_floating_point():
            refuse_no_numbers(name, tensor)
    return config, ours


def load_model(
    source,
    told: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
    model_class: type | None = None,
    **options: Any,
):
    """A model of ours, in eval mode, from a file or an `Original`.

    Args:
        told: see `infer_config`. options: in place of those of the file.
        model_class: `VlpVseModel` or `VlpVseForPreTraining` of a pair; `VlpVseModel`, or `VlpVseGridModel` for a CNN, if not given.
    """
    original = source if isinstance(source, Original) else read_original(source)
    return build_model(*convert_state_dict(original.state, original.options | options, told), dtype, model_class)


def build_model(
    config: Config,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    model_class: type | None = None,
):
    """Our class filled with a converted state dict, every entry of it used and none missing."""
    model_class = model_class or (VlpVseModel if isinstance(config, VlpVseConfig) else VlpVseGridModel)
    if model_class is VlpVseForPreTraining:
        state = {f"vse.{name}": tensor for name, tensor in state.items()}
    return fill(model_class, config, state, dtype)


def load_pooling(source) -> GeneralizedPooling:
    """The pooling operator of a file that holds it alone, or of its state dict.

    Raises:
        ConversionError: other tensors than the operator's.
    """
    state = source if isinstance(source, Mapping) else read_original(source).state
    if detect_layout(state) != "pooling":
        raise ConversionError("this is more than the pooling operator: `load_model` reads it")
    positions, hidden = state["gru.weight_ih_l0"].shape[1], state["gru.weight_ih_l0"].shape[0] // 3
    pooling = GeneralizedPooling(positions, hidden)
    try:
        pooling.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ConversionError(f"the pooling operator does not fit: {error}") from error
    return pooling.eval()


def build_processor(config: Config, vocabulary: Path | None, backbone_source: str | None):
    """The processor of a converted model; of a CNN alone, its image processor. None if vocabulary or source are not told.

    Args:
        vocabulary: vocab.txt of BERT, or vocab.json of the BiGRU branch.
        backbone_source: of the CNN; it tells the colours that it was trained with.

    Raises:
        ConversionError: the vocabulary is of the other kind, unreadable, or another model's.
    """
    from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
    from hf_vlp.models.vse.image_processing_vse import VlpVseImageProcessor, backbone_colours
    from hf_vlp.models.vse.processing_vse import VlpVseProcessor

    grid = config if isinstance(config, VlpVseGridConfig) else config.vision_config
    images = None
    if grid is not None and backbone_source is not None:
        size = {"height": grid.image_size, "width": grid.image_size}
        try:
            images = VlpVseImageProcessor(size=size, **backbone_colours(backbone_source))
        except ValueError as error:
            raise ConversionError(str(error)) from error
    if isinstance(config, VlpVseGridConfig):
        return images
    if vocabulary is None or (grid is not None and images is None):
        return None
    regions = VlpRegionFeatureExtractor(feature_size=config.region_size) if grid is None else None
    return VlpVseProcessor(images, build_tokenizer(config, vocabulary), regions)


def build_tokenizer(config: VlpVseConfig, vocabulary: Path):
    """The tokenizer of a vocabulary file; see `build_processor`."""
    from transformers import BertTokenizer

    from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer

    words = isinstance(config.text_config, VlpVseGruConfig)
    if not vocabulary.is_file() or (vocabulary.suffix == ".json") != words:
        needed = "vocab.json, {word2idx, idx2word, idx}" if words else "vocab.txt, one word piece a line"
        raise ConversionError(f"{vocabulary} is no vocabulary of this model: its text encoder needs {needed}")
    if words:
        try:
            tokenizer = VlpWordTokenizer.from_vocabulary_json(vocabulary)
        except ValueError as error:
            raise ConversionError(str(error)) from error
    else:
        longest = config.text_config.max_position_embeddings
        tokenizer = BertTokenizer(vocab=str(vocabulary), model_max_length=longest, split_special_tokens=True)
    if len(tokenizer) != config.text_config.vocab_size:
        raise ConversionError(
            f"the vocabulary {vocabulary} has {len(tokenizer)} entries, the model {config.text_config.vocab_size}: "
            "this is another model's vocabulary"
        )
    return tokenizer


def summary(model) -> str:
    """What was converted: towers and parameter counts, each side with its projection and pooling."""
    config = model.config
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    if isinstance(config, VlpVseGridConfig):
        return f"image tower  {total:>13,} parameters  {_shown(config)}"
    text_side = sum(size for name, size in sizes.items() if name.startswith("text_"))
    text = config.text_config
    if isinstance(text, VlpVseGruConfig):
        words = f"BiGRU, {text.num_hidden_layers} layer(s) of width {text.hidden_size}, word vectors of {text.embedding_size}"
    else:
        words = (
            f"BERT, {text.num_hidden_layers} blocks of width {text.hidden_size} with {text.num_attention_heads} heads"
        )
    image = f"regions of {config.region_size}" if config.vision_config is None else _shown(config.vision_config)
    return "\n".join(
        [
            f"image side   {total - text_side:>13,} parameters  {image}",
            f"text side    {text_side:>13,} parameters  {words}, vocabulary of {text.vocab_size}",
            f"total        {total:>13,} parameters  joint space of {config.projection_dim}",
        ]
    )


def _shown(config: VlpVseGridConfig) -> str:
    network = f"ResNe{'X' if config.groups > 1 else ''}t {'-'.join(map(str, config.depths))}"
    groups = f" in {config.groups} groups" if config.groups > 1 else ""
    return f"{network}{groups}, {config.graph} graph, {config.image_size} px"


@torch.no_grad()
def compare_outputs(model: VlpVseModel, folder: Path) -> dict[str, float]:
    """Largest differences of a forward to stored outputs of the original.

    `folder` holds inputs.safetensors (`images` [B, R, F] with `image_lengths` [B], or [B, 3, H, W]; `captions` [B, L] with
    `caption_lengths` [B]) and outputs.safetensors with any of `eval.img_emb`, `eval.cap_emb`, `eval.scores`.
    """
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    found = model(**model_inputs(inputs))
    ours = {
        "eval.img_emb": found.image_embeds,
        "eval.cap_emb": found.text_embeds,
        "eval.scores": found.logits_per_image,
    }
    return {name: (value.float() - outputs[name]).abs().max().item() for name, value in ours.items() if name in outputs}


def model_inputs(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's batch as ours: `images`, `captions` and their lengths -> arguments of `forward`."""
    batch = {
        "input_ids": inputs["captions"],
        "attention_mask": mask_of(inputs["caption_lengths"], inputs["captions"].shape[1]),
    }
    if inputs["images"].ndim == 4:
        return batch | {"pixel_values": inputs["images"]}
    mask = mask_of(inputs["image_lengths"], inputs["images"].shape[1])
    return batch | {"region_features": inputs["images"], "region_mask": mask}


def mask_of(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """`lengths` [B] -> [B, longest], 1 before each length."""
    return (torch.arange(longest)[None, :] < lengths.long()[:, None]).long()


def read_told(path: Path | None) -> dict[str, Any]:
    """The sections `opt`, `bert` and `backbone` of a JSON file; a configuration of BERT alone is taken for `bert`.

    Raises:
        ConversionError: missing, not JSON, or none of these.
    """
    if path is None:
        return {}
    content = read_json(path)
    if isinstance(content, dict) and any(isinstance(content.get(name), dict) for name in ("opt", "bert", "backbone")):
        return content
    if isinstance(content, dict) and "num_attention_heads" in content:
        return {"bert": content}
    raise ConversionError(
        f"{path} tells nothing: it needs a section opt, bert or backbone, or the fields of a BertConfig"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = command_line(
        "from_vse",
        __doc__.split("\n")[0],
        checkpoint="model_best.pth, or the weights of a CNN: original_updown_backbone.pth, a ResNet of torchvision or WSL-Images",
        vocabulary="vocab.txt of BERT or vocab.json of the BiGRU branch; without it only the model is saved",
    )
    parser.add_argument(
        "--config", type=Path, help="JSON with opt, bert or backbone: what the checkpoint does not tell"
    )
    parser.add_argument(
        "--backbone-source", help=f"of the CNN, where the checkpoint does not tell: {', '.join(GRAPHS_OF_SOURCES)}"
    )
    run_or_exit(parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Convert as the parsed command line says."""
    original, told = read_original(options.checkpoint, options.sha256), read_told(options.config)
    settings = original.options | told.get("opt", {})
    if options.backbone_source:
        settings["backbone_source"] = options.backbone_source
    config, state = convert_state_dict(original.state, settings, told)
    alone = isinstance(config, VlpVseGridConfig)
    if alone and options.check is not None and options.check != Path():
        raise ConversionError(
            f"--check {options.check}: a CNN alone has no stored outputs to compare with; give --check without a folder"
        )
    source = settings.get("backbone_source")
    processor = build_processor(config, options.vocabulary, source)
    needed = {"--vocabulary": options.vocabulary is None and not alone}
    needed["--backbone-source"] = source is None and (alone or config.vision_config is not None)
    remedy = " and ".join(option for option, absent in needed.items() if absent)
    model = build_model(config, state, getattr(torch, options.dtype))
    save(options, model, state, processor, summary(model), lambda folder: compare_outputs(model, folder), remedy)


if __name__ == "__main__":
    main()
