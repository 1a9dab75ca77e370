"""hf_vlp folders -> files that the originals load.

    python -m conversion.to_original clip-vit-b-32 --output ViT-B-32.pt --half

    python -m conversion.to_original vse-coco-region --output model_best.pth

    python -m conversion.to_original vilt-b32 --output vilt_200k_mlm_itm.ckpt

    python -m conversion.to_original albef-14m --output ALBEF.pth

Layouts of CLIP: `original`, a plain state dict for the released code, `clip.model.build_model(torch.load(FILE))` (its
`clip.load` cannot read plain state dicts with recent torch, whatever wrote them); `open_clip`, the same without the entries
that tell sizes; `transformers`, a folder for `CLIPModel`, with tokenizer and image processor if the folder has them.
VSE-infinity has the layout `original` alone: the dictionary that its training script saves, in the file format that also the old
torch reads which it is pinned to; of a CNN alone the file that it starts a grid model from. ViLT has `original`, the file that the released
code takes for `load_path` or `test_only`, in the same file format, and `transformers`, a folder for the class of the same task. ALBEF has
`original`, the .pth file that the released scripts take for `--checkpoint`, in the same file format.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ViltImageProcessor,
    ViltProcessor,
)

from conversion.albef_layouts import to_checkpoint as to_albef_checkpoint
from conversion.albef_layouts import untold_sizes as untold_sizes_of_albef
from conversion.albef_task_layouts import task_of as task_of_albef
from conversion.checkpoints import CheckpointError, read_checkpoint, save_content, save_state_dict
from conversion.clip_layouts import clip_table, config_to_transformers, half_layout, infer_config
from conversion.preprocessing import SAME_FIELDS
from conversion.tables import ConversionError, refuse_difference, refuse_shapes, revert
from conversion.vilt_layouts import longest_edge, untold_sizes
from conversion.vilt_layouts import to_checkpoint as to_vilt_checkpoint
from conversion.vilt_layouts import to_transformers as to_transformers_vilt
from conversion.vse_layouts import (
    BERT_WIDTH,
    GRAPHS_OF_SOURCES,
    to_backbone,
    to_checkpoint,
    untold_settings,
    usual_source,
    vse_table,
)
from hf_vlp.files import whole_folder
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.clip.configuration_clip import VlpClipConfig
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig

Config = VlpClipConfig | VlpVseConfig | VlpVseGridConfig | VlpViltConfig | VlpAlbefConfig

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


def read_folder(folder) -> tuple[Config, dict[str, torch.Tensor]]:
    """Configuration and state dict of a folder that `save_pretrained` wrote: of ViLT and ALBEF under the names of the class that was saved,
    of the others under those of the class that AutoModel gives.

    Raises:
        CheckpointError, ConversionError: no weights, or no model of an architecture that has a table.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ConversionError(f"{folder} has no config.json: give a folder that save_pretrained or a converter wrote")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, Config):
        known = ", ".join(known.model_type for known in get_args(Config))
        raise ConversionError(f"{folder} holds a {config.model_type} model; this script knows {known}")
    # the names of a ForPreTraining stand behind the model's
    prefix = {"vlp_clip": "clip.", "vlp_vse": "vse."}.get(config.model_type, "")
    return config, {name.removeprefix(prefix): tensor for name, tensor in read_checkpoint(folder).items()}


def channel_order(folder: Path) -> str | None:
    """Of the folder's image processor; None without one."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            stored = json.loads((folder / name).read_text("utf-8"))
            return stored.get("image_processor", stored).get("channel_order")
    return None


def save_vse(folder: Path, output: Path, config, state, backbone_source: str | None, overwrite: bool) -> list[str]:
    """Write the checkpoint of a VSE-infinity of ours; returns what its reader has to be told.

    Raises:
        ConversionError: see `to_checkpoint`; or the released code, which knows bert-base alone, would compute something else.
    """
    if isinstance(config, VlpVseGridConfig):
        save_content(to_backbone(config, state), output, overwrite)
        return []
    vse_table(config)  # refuses towers of other kinds
    differences = untold_settings(config)
    if differences and config.text_config.hidden_size == BERT_WIDTH:
        raise ConversionError(
            f"the released code would read another model from these weights: {'; '.join(differences)}"
        )
    if backbone_source is None and config.vision_config is not None:
        backbone_source = usual_source(config.vision_config, channel_order(folder))
    save_content(to_checkpoint(config, state, backbone_source), output, overwrite)
    return differences


def save_vilt(folder: Path, output: Path, config, state, layout: str, half: bool, overwrite: bool) -> list[str]:
    """Write a ViLT of ours as the released code or transformers would; returns what its reader has to be told.

    Raises:
        ConversionError: see `to_checkpoint` and `to_transformers` of `vilt_layouts`.
    """
    if layout == "original":
        save_content(to_vilt_checkpoint(config, state), output, overwrite)
        return untold_sizes(config)
    kind, theirs, state, told = to_transformers_vilt(config, state)
    dtype = torch.float16 if half else next(tensor.dtype for tensor in state.values() if tensor.ndim == 2)
    model = kind.from_pretrained(None, config=theirs, state_dict=dict(state), dtype=dtype)
    with whole_folder(output, overwrite) as partial:
        model.save_pretrained(partial)
        if (folder / "tokenizer_config.json").exists():
            ours = AutoProcessor.from_pretrained(folder)
            images = ours.image_processor
            fields = {
                name: getattr(images, name) for name in (*SAME_FIELDS, "size_divisor", "do_pad") if "crop" not in name
            }
            taken = longest_edge(images.size.shortest_edge)  # whatever the size says
            if images.size.longest_edge not in (None, taken):
                told.append(f"size.longest_edge {images.size.longest_edge}, it takes {taken}")
            fields["size"] = {"shortest_edge": images.size.shortest_edge}
            ViltProcessor(ViltImageProcessor(**fields), ours.tokenizer).save_pretrained(partial)
    return told


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
    config, state = read_folder(folder)
    if not isinstance(config, VlpClipConfig):
        raise ConversionError(f"{folder} holds a {config.model_type} model, which transformers has no class for")
    config, state = to_transformers(config, state)
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
    parser.add_argument("--half", action="store_true", help="half precision, as CLIP's published files have it")
    parser.add_argument(
        "--backbone-source",
        choices=GRAPHS_OF_SOURCES,
        help="VSE-infinity on pixels: the option written; else told by CNN and processor",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args(arguments)
    try:
        told = run(options)
    except (CheckpointError, ConversionError, FileExistsError) as error:
        parser.exit(1, f"error: {error}\n")
    for difference in told:
        print(f"tell its reader: {difference}")
    print(f"saved {options.output} in the layout {options.layout}")


def run(options: argparse.Namespace) -> list[str]:
    """Write as the parsed command line says; returns what the file does not tell its reader."""
    folder, output = options.folder, options.output
    config, state = read_folder(folder)
    if isinstance(config, VlpViltConfig):
        if options.layout == "open_clip" or (
            options.layout == "original" and (options.half or output.suffix == ".safetensors")
        ):
            raise ConversionError(
                "ViLT has the layout original, a .ckpt file in the precision of the folder, and the layout transformers; leave other "
                "--layout and --half out"
            )
        return save_vilt(folder, output, config, state, options.layout, options.half, options.overwrite)
    if isinstance(config, VlpAlbefConfig):
        if options.layout != "original" or options.half or output.suffix == ".safetensors":
            raise ConversionError(
                "ALBEF has one layout: a .pth file, in the precision of the folder; leave --layout and --half out"
            )
        save_content(to_albef_checkpoint(config, state), output, options.overwrite)
        return untold_sizes_of_albef(config, task_of_albef(state))
    if options.layout == "transformers":
        save_transformers(folder, output, options.half, options.overwrite)
        return []
    if not isinstance(config, VlpClipConfig):
        if options.layout != "original" or options.half or output.suffix == ".safetensors":
            raise ConversionError(
                "VSE-infinity has one layout: a .pth file, in the precision of the folder; leave --layout and --half out"
            )
        return save_vse(folder, output, config, state, options.backbone_source, options.overwrite)
    result = to_state_dict(config, state, options.layout, options.half)
    save_state_dict(result, output, options.overwrite)
    return hidden_differences(config, result)


if __name__ == "__main__":
    main()
