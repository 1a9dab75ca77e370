"""ALBEF checkpoints -> hf_vlp folders: the released files of pre-training, retrieval and grounding, and those of the scripts.

    python -m conversion.from_albef --checkpoint ALBEF.pth --vocabulary vocab.txt --output albef-14m

    python -m conversion.from_albef --checkpoint mscoco.pth --vocabulary vocab.txt --output albef-14m-coco

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.
The tables of names are in `conversion/albef_layouts.py`; `conversion/to_original.py` goes the other way. The task is told by the heads of
the file. One of pre-training makes a retrieval model as well (`--task retrieval`), which goes on with its momentum copies and its queue, as
the released code does.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertTokenizer

from conversion.albef_layouts import INTEGERS, infer_config, momentum_parts, refuse_untied, table_of
from conversion.checkpoints import CheckpointError, find_state_dict, read_content, strip_prefixes
from conversion.saving import command_line, fill, refuse_no_numbers, run_or_exit, save
from conversion.tables import ConversionError, convert
from hf_vlp.inputs.vocabulary import without_end_mark
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.objectives.momentum_contrast import UNKNOWN_IMAGE

CLASSES = {
    "pretraining": VlpAlbefForPreTraining,
    "retrieval": VlpAlbefForImageTextRetrieval,
    "model": VlpAlbefModel,
}
SECTIONS = ("bert_config", "vit", "yaml")


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Original:
    """A file of the original. state: its tensors. options: what is known of its configurations, see `infer_config`."""

    state: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """A model of ours to be: its class, configuration and state dict, and what of the file has no place in it."""

    model_class: type
    config: VlpAlbefConfig
    state: dict[str, torch.Tensor]
    left_out: list[str]


def read_original(path, sha256: str | None = None) -> Original:
    """The tensors of a file and the run's configuration beside them; what a training script keeps besides is passed over.

    Raises:
        CheckpointError: see `read_content` and `find_state_dict`; or a `config` that is none.
        UnsafeCheckpointError: the file asks for code.
    """
    content = read_content(path, sha256)
    run = content.get("config", {}) if isinstance(content, Mapping) else {}
    if not isinstance(run, Mapping):
        raise CheckpointError(path, f"`config` holds a {type(run).__name__}", "save the run's configuration as a dict")
    state = find_state_dict(content, path)
    return Original(strip_prefixes(state), {"yaml": dict(run)})


def task_of(state: Mapping[str, torch.Tensor]) -> str:
    """The task that the names of a file, or ours, tell: "pretraining", "retrieval", or "model" for the encoders alone."""
    if any(name.startswith(("text_encoder.cls.", "mlm_head.")) for name in state):
        return "pretraining"
    return "retrieval" if "itm_head.weight" in state else "model"


def expected_state(config: VlpAlbefConfig, task: str) -> dict[str, torch.Tensor]:
    """Names and shapes (meta tensors) of everything that a file for this task holds, under the names of the tables."""
    with torch.device("meta"):
        expected = CLASSES[task](config).state_dict()
    return {f"albef.{name}": tensor for name, tensor in expected.items()} if task == "model" else dict(expected)


def convert_all(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None
) -> tuple[VlpAlbefConfig, dict[str, torch.Tensor], list[str]]:
    """Everything that a file of the original holds, under our names, in the stored precision, strictly; and what is of no use.

    Of no use are momentum copies without a queue and queues without the copies. A file of pre-training knows no identities of the images
    in its queue.

    Args:
        state: of an `Original`; meta tensors will do. options: see `infer_config`.

    Raises:
        ConversionError: see `infer_config`; names or shapes that do not fit, a weight that is no finite number, untied weights that the
            released code ties.
    """
    config, task = infer_config(state, options), task_of(state)
    refuse_untied(state)
    copies, queues = momentum_parts(state)
    unused = [] if config.momentum_teacher and task != "model" else copies + queues
    taken = {name: tensor for name, tensor in state.items() if name not in unused}
    expected = expected_state(config, task)
    identities = expected.get("queue.image_ids")
    if identities is not None and "idx_queue" not in state:
        del expected["queue.image_ids"]
    ours = convert(taken, table_of(state, config), expected)
    for name, tensor in ours.items():
        if name not in INTEGERS:
            refuse_no_numbers(name, tensor)
    if identities is not None:
        unknown = torch.full(identities.shape, UNKNOWN_IMAGE, device=ours["queue.position"].device)
        ours.setdefault("queue.image_ids", unknown)
    return config, ours, unused


def for_task(
    config: VlpAlbefConfig, ours: Mapping[str, torch.Tensor], unused: list[str], task: str | None = None
) -> Converted:
    """What one of our classes takes of everything that a file holds.

    Args:
        config, ours, unused: as of `convert_all`.
        task: one of CLASSES; the one that the heads tell if not given.

    Raises:
        ConversionError: the file lacks the head of the task.
    """
    model_class = CLASSES[task or task_of(ours)]
    state = dict(ours)
    if model_class is VlpAlbefModel:
        state = {name.removeprefix("albef."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    missing = [name for name in expected if name not in state]
    if missing:
        raise ConversionError(
            f"the file has no {', '.join(missing[:5])}, which {model_class.__name__} needs: leave --task out, and let "
            f"{model_class.__name__}.from_pretrained start its head at random from the folder"
        )
    left_out = [name for name in state if name not in expected]
    return Converted(model_class, config, {name: state[name] for name in expected}, left_out + unused)


def read(
    path, task: str | None = None, sha256: str | None = None, options: Mapping[str, Any] | None = None
) -> Converted:
    """`for_task` of a file of the original; `options`: in place of what the file tells.

    Raises:
        CheckpointError, ConversionError: see `read_original`, `convert_all`, `for_task`.
    """
    original = read_original(path, sha256)
    return for_task(*convert_all(original.state, {**original.options, **(options or {})}), task)


def read_options(path: Path | None) -> dict[str, Any]:
    """Configurations of a JSON file: an object with any of `bert_config`, `vit` and `yaml`, or a `config_bert.json` alone.

    Raises:
        ConversionError: missing, not JSON, or no object.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, not the configuration of the released code as an object"
        )
    told = {name: content[name] for name in SECTIONS if name in content}
    return told or {"bert_config": content}


# ------------------------------------------------------------------------------------------------ building


def load_model(
    source,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
):
    """A model of ours, in eval mode, from a file or an `Original`; see `read`."""
    if isinstance(source, Original):
        converted = for_task(*convert_all(source.state, {**source.options, **(options or {})}), task)
    else:
        converted = read(source, task, options=options)
    return build_model(converted, dtype)


def build_model(converted: Converted, dtype: torch.dtype = torch.float32):
    """Our class filled with a converted state dict, every entry of it used and none missing."""
    return fill(converted.model_class, converted.config, converted.state, dtype)


def build_processor(config: VlpAlbefConfig, vocabulary: Path | None):
    """The processor of a converted model; None without a vocabulary.

    Args:
        vocabulary: vocab.txt of BERT, lower case.

    Raises:
        ConversionError: no readable vocabulary, or another model's.
    """
    from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor
    from hf_vlp.models.albef.processing_albef import VlpAlbefProcessor

    if vocabulary is None:
        return None
    if not vocabulary.is_file() or vocabulary.suffix == ".json":
        raise ConversionError(f"{vocabulary} is no vocabulary of this model: it needs vocab.txt, one word piece a line")
    tokenizer = BertTokenizer(vocab=str(vocabulary), model_max_length=config.text_config.max_position_embeddings)
    if len(tokenizer) != config.text_config.vocab_size:
        raise ConversionError(
            f"the vocabulary has {len(tokenizer)} entries, the model {config.text_config.vocab_size}: this is another model's vocabulary"
        )
    side = config.vision_config.image_size
    return VlpAlbefProcessor(VlpAlbefImageProcessor(size={"height": side, "width": side}), without_end_mark(tokenizer))


def summary(model, left_out: list[str]) -> str:
    """What was converted: the parts, the momentum copy, and what of the file has no place in the class."""
    sizes = Counter()
    for name, parameter in model.named_parameters():
        sizes[name.removeprefix("albef.").partition(".")[0]] += parameter.numel()
    config = model.config
    vision, text, fusion = config.vision_config, config.text_config, config.multimodal_config
    facts = {
        "vision_model": f"{vision.num_hidden_layers} blocks of width {vision.hidden_size}, patches of {vision.patch_size}, table for "
        f"{vision.image_size} px",
        "text_model": f"{text.num_hidden_layers} layers of width {text.hidden_size} with {text.num_attention_heads} heads, "
        f"{text.max_position_embeddings} tokens out of {text.vocab_size}",
        "fusion_model": f"{fusion.num_hidden_layers} layers",
        "teacher": "momentum copies, for training",
        "total": type(model).__name__,
    }
    sizes["total"] = sum(sizes.values())
    lines = [f"{part:<24} {sizes[part]:>13,} parameters  {facts.get(part, '')}".rstrip() for part in sizes]
    if left_out:
        lines.append(f"left out, without a place there: {', '.join(sorted(left_out))}")
    return "\n".join(lines)


@torch.no_grad()
def compare_outputs(model, folder: Path) -> dict[str, float]:
    """Largest differences of a forward to stored outputs of the original, at tokens that are no padding.

    `folder` holds inputs.safetensors (`input_ids`, `attention_mask` [B, L], `image` [B, 3, H, W]) and outputs.safetensors with any of
    `image_feat`, `text_feat`, `multimodal_last_hidden`, `itm_logits` (those of the pairs).
    """
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    if not {"input_ids", "attention_mask", "image"} <= set(inputs):
        raise ConversionError(f"--check {folder}: its inputs are not input_ids, attention_mask and image")
    base, real = getattr(model, "albef", model), inputs["attention_mask"].bool()
    output = base(inputs["input_ids"], inputs["attention_mask"], inputs["image"])
    states = output.last_hidden_state
    found = {
        "image_feat": base.project_image(output.image_hidden_states) - outputs.get("image_feat", torch.nan),
        "text_feat": base.project_text(output.text_hidden_states) - outputs.get("text_feat", torch.nan),
    }
    if "multimodal_last_hidden" in outputs:
        found["multimodal_last_hidden"] = states[real] - outputs["multimodal_last_hidden"][real]
    if hasattr(model, "itm_head") and len(outputs.get("itm_logits", ())) == len(states):
        found["itm_logits"] = model.itm_head(states[:, 0]) - outputs["itm_logits"]
    found = {name: value for name, value in found.items() if name in outputs}
    if not found:
        raise ConversionError(f"--check {folder}: none of its outputs is one that a {type(model).__name__} computes")
    return {name: value.abs().max().item() for name, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = command_line(
        "from_albef",
        __doc__.split("\n")[0],
        checkpoint=".pth file of the released code",
        vocabulary="vocab.txt of bert-base-uncased; without it only the model is saved",
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON of the released code: config_bert.json, or an object with bert_config, vit and yaml",
    )
    parser.add_argument("--task", choices=CLASSES, help="class to make; the one whose heads the file has if not given")
    run_or_exit(parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Convert as the parsed command line says."""
    converted = read(options.checkpoint, options.task, options.sha256, read_options(options.config))
    processor = build_processor(converted.config, options.vocabulary)
    model = build_model(converted, getattr(torch, options.dtype))
    save(
        options,
        model,
        converted.state,
        processor,
        summary(model, converted.left_out),
        lambda folder: compare_outputs(model, folder),
        model_class=converted.model_class,
    )


if __name__ == "__main__":
    main()
