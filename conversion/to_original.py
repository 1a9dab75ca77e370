"""hf_vlp folders -> files that the originals load.

    python -m conversion.to_original clip-vit-b-32 --output ViT-B-32.pt --half

Layouts of CLIP: `original`, a plain state dict for the released code, `clip.model.build_model(torch.load(FILE))` (its
`clip.load` cannot read plain state dicts with recent torch, whatever wrote them); `open_clip`, the same without the entries
that tell sizes; `transformers`, a folder for `CLIPModel`, with tokenizer and image processor if the folder has them.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from conversion.checkpoints import CheckpointError, read_checkpoint, save_state_dict
from conversion.clip_layouts import clip_table, config_to_transformers, half_layout, infer_config
from conversion.preprocessing import SAME_FIELDS
from conversion.tables import ConversionError, refuse_difference, refuse_shapes, revert
from hf_vlp.files import whole_folder
from hf_vlp.models.clip.configuration_clip import VlpClipConfig

# Settings that change no embedding: ids beside the pooled one, and what only training uses.
WITHOUT_EFFECT = {
    "pooling",
    "bos_token_id",
    "pad_token_id",
    "attention_dropout",
    "transformers_version",
    "dtype",
    "architectures",
}


def read_folder(folder) -> tuple[VlpClipConfig, dict[str, torch.Tensor]]:
    """Configuration and state dict, under the names of `VlpClipModel`, of a folder that `save_pretrained` wrote.

    Raises:
        CheckpointError, ConversionError: no weights, or not a CLIP of ours.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ConversionError(
            f"{folder} has no config.json: give a folder that save_pretrained or conversion.from_clip wrote"
        )
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, VlpClipConfig):
        raise ConversionError(f"{folder} holds a {config.model_type} model; this script knows vlp_clip")
    return config, {name.removeprefix("clip."): tensor for name, tensor in read_checkpoint(folder).items()}


def to_state_dict(
    config: VlpClipConfig, state: dict[str, torch.Tensor], layout: str = "original", half: bool = False
) -> dict[str, torch.Tensor]:
    """Our state dict in the layout `original` or `open_clip`.

    `half`: in the published files' precisions (convolutions, linears and projections in float16, the rest in float32).

    Raises:
        ConversionError: the original code would compute something else with these weights, because it takes heads,
            activation and end-of-text from sizes; or names that do not fit.
    """
    result = revert(state, clip_table(config))
    if layout == "original":
        differences = hidden_differences(config, result)
        if differences:
            raise ConversionError(
                f"the released code would read another model from these weights: {'; '.join(differences)}"
            )
    if half:
        result = half_layout(result)
    if layout == "original":
        sizes = (
            config.vision_config.image_size,
            config.text_config.max_position_embeddings,
            config.text_config.vocab_size,
        )
        result |= dict(zip(("input_resolution", "context_length", "vocab_size"), map(torch.tensor, sizes), strict=True))
    return result


def hidden_differences(config: VlpClipConfig, original: dict[str, torch.Tensor]) -> list[str]:
    """Settings that a reader of the weights alone would get wrong, as "text_config.num_attention_heads 4, it takes 1"."""
    taken = infer_config(original)
    differences = ["logit_bias, which it does not know"] if config.contrastive_loss == "sigmoid" else []
    for tower in ("text_config", "vision_config"):
        ours, theirs = getattr(config, tower).to_dict(), getattr(taken, tower).to_dict()
        differences += [
            f"{tower}.{name} {ours[name]}, it takes {theirs[name]}"
            for name in theirs
            if name not in WITHOUT_EFFECT and ours.get(name) != theirs[name]
        ]
    return differences


def to_transformers(
    config: VlpClipConfig, state: dict[str, torch.Tensor]
) -> tuple[CLIPConfig, dict[str, torch.Tensor]]:
    """transformers' configuration and state dict of a ViT model of ours.

    Raises:
        ConversionError: a ResNet, a foreign tower, or names that do not fit.
    """
    state = {name: tensor for name, tensor in state.items() if name != "logit_bias.weight"}
    result = revert(state, clip_table(config, "transformers"))
    theirs = config_to_transformers(config)
    with torch.device("meta"):
        expected = CLIPModel(theirs).state_dict()
    refuse_difference(
        {name: tensor for name, tensor in result.items() if name not in expected},
        {name: tensor for name, tensor in expected.items() if name not in result},
        "our model",
        "CLIPModel",
    )
    refuse_shapes(result, expected)
    return theirs, result


def save_transformers(folder, output, half: bool = False, overwrite: bool = False) -> None:
    """Write a `CLIPModel` folder from one of ours, with its processor where ours has one. `half`: all weights in float16."""
    config, state = to_transformers(*read_folder(folder))
    dtype = torch.float16 if half else next(tensor.dtype for tensor in state.values() if tensor.ndim == 2)
    model = CLIPModel.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype)
    with whole_folder(output, overwrite) as partial:
        model.save_pretrained(partial)
        if (Path(folder) / "tokenizer_config.json").exists():
            ours = AutoProcessor.from_pretrained(folder)
            pixels = {name: getattr(ours.image_processor, name) for name in SAME_FIELDS}
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            CLIPProcessor(image_processor=CLIPImageProcessor(**pixels), tokenizer=tokenizer).save_pretrained(partial)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser("python -m conversion.to_original", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of ours")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write (.pt or .safetensors); a folder for transformers"
    )
    parser.add_argument("--layout", choices=("original", "open_clip", "transformers"), default="original")
    parser.add_argument("--half", action="store_true", help="half precision, as the published files have it")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args(arguments)
    try:
        if options.layout == "transformers":
            save_transformers(options.folder, options.output, options.half, options.overwrite)
        else:
            config, state = read_folder(options.folder)
            result = to_state_dict(config, state, options.layout, options.half)
            save_state_dict(result, options.output, options.overwrite)
            for difference in hidden_differences(config, result):
                print(f"tell open_clip: {difference}")
    except (CheckpointError, ConversionError, FileExistsError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"saved {options.output} in the layout {options.layout}")


if __name__ == "__main__":
    main()
