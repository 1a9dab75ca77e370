"""CLIP checkpoints -> hf_vlp folders: OpenAI's files, open_clip's files and folders, transformers' CLIPModel folders.

    python -m conversion.from_clip --checkpoint ViT-B-32.pt --vocabulary bpe_simple_vocab_16e6.txt.gz --output clip-b32

Paper: "Learning Transferable Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020.
The tables of names are in `conversion/clip_layouts.py`; `conversion/to_original.py` goes the other way.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPTokenizer

from conversion.checkpoints import read_checkpoint
from conversion.clip_layouts import (
    SIZES,
    clip_table,
    config_from_transformers,
    detect_layout,
    from_openai,
    infer_config,
    open_clip_options,
    round_to_half,
)
from conversion.preprocessing import image_options
from conversion.saving import command_line, fill, refuse_no_numbers, run_or_exit, save
from conversion.tables import ConversionError, convert, forward_names, revert
from hf_vlp.models.clip.configuration_clip import VlpClipConfig, VlpClipResNetConfig
from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining, VlpClipModel


def expected_state(config: VlpClipConfig) -> dict[str, torch.Tensor]:
    """Names and shapes (meta tensors) of our model of this configuration, under the names of `VlpClipModel`."""
    with torch.device("meta"):
        state = VlpClipForPreTraining(config).state_dict()
    return {name.removeprefix("clip."): tensor for name, tensor in state.items()}


def convert_state_dict(
    state: dict[str, torch.Tensor], config: VlpClipConfig | None = None, **options
) -> tuple[VlpClipConfig, dict[str, torch.Tensor]]:
    """A state dict of any layout -> our configuration and state dict, in the stored precision, strictly.

    Args:
        state: of the checkpoint; meta tensors will do.
        config: ours, where it is known (transformers folders); else inferred, with `options` for `infer_config`.

    Raises:
        ConversionError: another architecture, or names or shapes that do not fit: lists both sides; a size stored beside the
            weights is not theirs; a weight is not of FLOATS, or holds infinities or NaN.
    """
    layout = detect_layout(state)
    if config is None and layout == "transformers":
        raise ConversionError("transformers weights need their config.json: give the folder, not the weight file")
    config = config or infer_config(state, **options)
    table, expected = clip_table(config, layout), expected_state(config)
    ours = convert(state, table, expected)
    refuse_other_sizes(state, config)
    for name, tensor in state.items():
        if any(expected[part].is_floating_point() for part in forward_names(name, table)):
            refuse_no_numbers(name, tensor)
    return config, ours


def refuse_other_sizes(state: dict[str, torch.Tensor], config: VlpClipConfig) -> None:
    """Raises ConversionError if a size that the checkpoint states is not the one that its shapes tell (meta tensors state none)."""
    for name, (tower, field) in SIZES.items():
        if name in state and not state[name].is_meta:
            stated, told = state[name].item(), getattr(getattr(config, tower), field)
            if stated != told:
                raise ConversionError(f"{name} says {stated}, the shapes of the weights {told}: parts of two models?")


def read(
    path, sha256: str | None = None, guess_activation: bool = True, **options
) -> tuple[VlpClipConfig, dict[str, torch.Tensor]]:
    """`convert_state_dict` of a file or folder; a folder's config.json or open_clip_config.json is respected.

    `guess_activation`: take quick_gelu where neither `hidden_act`, nor a folder, nor the marks of OpenAI's files tell.

    Raises:
        CheckpointError, ConversionError: see `read_checkpoint` and `convert_state_dict`.
    """
    path = Path(path)
    state = read_checkpoint(path, sha256)
    config = None
    if (path / "open_clip_config.json").exists():
        options = {**open_clip_options(path / "open_clip_config.json"), **options}
    elif (path / "config.json").exists():
        fields = json.loads((path / "config.json").read_text("utf-8"))
        if fields.get("model_type") != "clip":
            raise ConversionError(f"{path} holds a {fields.get('model_type')} model, not a transformers CLIPModel")
        config = config_from_transformers(CLIPConfig.from_dict(fields), options.get("pooling"))
    told = config is not None or "hidden_act" in options or detect_layout(state) == "transformers" or from_openai(state)
    if not told and not guess_activation:
        raise ConversionError(
            f"{path} does not tell its activation: give --hidden-act gelu for weights that open_clip trained (LAION, DataComp), "
            "--hidden-act quick_gelu for OpenAI's and for names that end in -quickgelu"
        )
    return convert_state_dict(state, config, **options)


def load_model(
    source,
    pooling: str | None = None,
    round_to_half: bool = False,
    dtype: torch.dtype = torch.float32,
    model_class: type = VlpClipModel,
    **options,
):
    """A model of ours, in eval mode, from a checkpoint.

    Args:
        source: path of a file or folder, or a state dict.
        pooling: "eos", or "largest_id" for the original code's rule; None: what the checkpoint's configuration says, else
            "eos".
        round_to_half: round float32 weights as the original loader does.
        dtype: of the model.
        model_class: `VlpClipModel` or `VlpClipForPreTraining`.
        options: for `infer_config`.
    """
    options |= {"pooling": pooling} if pooling else {}
    config, state = convert_state_dict(source, **options) if isinstance(source, dict) else read(source, **options)
    return build_model(config, rounded(config, state) if round_to_half else state, dtype, model_class)


def rounded(config: VlpClipConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict after `round_to_half` in the original's layout."""
    table = clip_table(config)
    return convert(round_to_half(revert(state, table)), table)


def build_model(
    config: VlpClipConfig, state: dict[str, torch.Tensor], dtype=torch.float32, model_class: type = VlpClipModel
):
    """Our class filled with a converted state dict, every entry of it used and none missing."""
    if model_class is VlpClipModel:
        state = {name: tensor for name, tensor in state.items() if name != "logit_bias.weight"}
    else:
        state = {name if name.startswith("logit_bias.") else f"clip.{name}": tensor for name, tensor in state.items()}
    return fill(model_class, config, state, dtype)


def build_processor(config: VlpClipConfig, checkpoint: Path, vocabulary: Path | None):
    """The processor of a converted model: tokenizer from a merge table or a transformers folder; None if there is neither.

    Pixels are prepared as the folder says, else at the model's size with CLIP's means and deviations.

    Raises:
        ConversionError: the vocabulary's size or its end-of-text id differs from the model's, or `image_options` finds what ours
            does not compute.
    """
    from hf_vlp.inputs.vocabulary import clip_tokenizer_from_merges
    from hf_vlp.models.clip.image_processing_clip import VlpClipImageProcessor
    from hf_vlp.models.clip.processing_clip import VlpClipProcessor

    longest = config.text_config.max_position_embeddings
    if vocabulary is not None:
        tokenizer = clip_tokenizer_from_merges(vocabulary, max_length=longest)
    elif (checkpoint / "tokenizer_config.json").exists() or (checkpoint / "vocab.json").exists():
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
        tokenizer.model_max_length = longest
    else:
        return None
    if len(tokenizer) != config.text_config.vocab_size or tokenizer.eos_token_id != config.text_config.eos_token_id:
        raise ConversionError(
            f"the vocabulary has {len(tokenizer)} entries and end-of-text id {tokenizer.eos_token_id}, the model "
            f"{config.text_config.vocab_size} and {config.text_config.eos_token_id}: this is another model's vocabulary"
        )
    image_processor = VlpClipImageProcessor(**image_options(checkpoint, config.vision_config.image_size))
    return VlpClipProcessor(image_processor=image_processor, tokenizer=tokenizer)


def summary(model: VlpClipModel) -> str:
    """What was converted: towers and parameter counts (the text side with its projection and the scale)."""
    text, vision = model.config.text_config, model.config.vision_config
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    image_side = sum(size for name, size in sizes.items() if "vision_model." in name or "visual_projection." in name)
    total = sum(sizes.values())
    if isinstance(vision, VlpClipResNetConfig):
        image = f"modified ResNet {'-'.join(map(str, vision.layers))}, width {vision.width}, {vision.image_size} px"
    else:
        image = f"ViT, {vision.num_hidden_layers} blocks of width {vision.hidden_size} with "
        image += f"{vision.num_attention_heads} heads, patches of {vision.patch_size}, {vision.image_size} px, {vision.hidden_act}"
    words = f"{text.num_hidden_layers} blocks of width {text.hidden_size} with {text.num_attention_heads} heads, "
    words += (
        f"{text.max_position_embeddings} tokens out of {text.vocab_size}, {text.hidden_act}, pooled by {text.pooling}"
    )
    return "\n".join(
        [
            f"image tower  {image_side:>13,} parameters  {image}",
            f"text tower   {total - image_side:>13,} parameters  {words}",
            f"total        {total:>13,} parameters  joint space of {model.config.projection_dim}",
        ]
    )


@torch.no_grad()
def compare_outputs(model: VlpClipModel, folder: Path) -> dict[str, float]:
    """Largest differences of a forward to stored outputs of the original.

    `folder` holds inputs.safetensors (`image` [B, 3, H, W], `text` [B, L]) and outputs.safetensors with any of
    `image_features`, `text_features` (not normalised), `logits_per_image`.
    """
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    image, text = inputs["image"].to(model.dtype), inputs["text"]
    ours = {
        "image_features": model.encode_image(image),
        "text_features": model.encode_text(text),
        "logits_per_image": model(input_ids=text, pixel_values=image).logits_per_image,
    }
    return {name: (value.float() - outputs[name]).abs().max().item() for name, value in ours.items() if name in outputs}


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = command_line(
        "from_clip",
        __doc__.split("\n")[0],
        checkpoint="weight file, or a transformers or open_clip folder",
        vocabulary="bpe_simple_vocab_16e6.txt.gz; without it only the model is saved",
    )
    parser.add_argument(
        "--round-to-half", action="store_true", help="round float32 weights as the original loader does"
    )
    parser.add_argument(
        "--pooling", choices=("eos", "largest_id"), help="which token of a text is pooled; see VlpClipTextConfig"
    )
    parser.add_argument(
        "--hidden-act", choices=("quick_gelu", "gelu"), help="needed for open_clip files: the weights do not show it"
    )
    parser.add_argument(
        "--vision-heads", type=int, help="open_clip files: heads of the image tower, if not width // 64"
    )
    parser.add_argument("--text-heads", type=int, help="open_clip files: heads of the text tower, if not width // 64")
    run_or_exit(parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Convert as the parsed command line says."""
    given = {name: getattr(options, name) for name in ("pooling", "hidden_act", "vision_heads", "text_heads")}
    config, state = read(
        options.checkpoint,
        options.sha256,
        guess_activation=False,
        **{name: value for name, value in given.items() if value},
    )
    if options.round_to_half:
        state = rounded(config, state)
    dtype = getattr(torch, options.dtype)
    model = build_model(
        config, state, dtype, VlpClipForPreTraining if config.contrastive_loss == "sigmoid" else VlpClipModel
    )
    processor = build_processor(config, options.checkpoint, options.vocabulary)
    save(
        options,
        model,
        state,
        processor,
        summary(model),
        lambda folder: compare_outputs(getattr(model, "clip", model), folder),
    )


if __name__ == "__main__":
    main()
