"""ViLT checkpoints -> hf_vlp folders: the released .ckpt files, and folders of transformers' `ViltModel` and its tasks.

    python -m conversion.from_vilt --checkpoint vilt_200k_mlm_itm.ckpt --vocabulary vocab.txt --output vilt-b32

    python -m conversion.from_vilt --checkpoint vilt_vqa.ckpt --vocabulary vocab.txt --answers vqa_dict.json --output vilt-b32-vqa

Paper: "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", https://arxiv.org/abs/2102.03334.
The tables of names are in `conversion/vilt_layouts.py`; `conversion/to_original.py` goes the other way. The task is told by the heads of
the file. One of pre-training makes a retrieval model as well (`--task retrieval`): its rank head is then the matching head's row of a
match, as in the paper's zero-shot retrieval.
"""

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertTokenizer, ViltConfig

from conversion.checkpoints import (
    CheckpointError,
    Original,
    find_state_dict,
    read_checkpoint,
    read_content,
    strip_prefixes,
)
from conversion.preprocessing import SAME_FIELDS, bert_tokenizer, read_json, refuse_other_vocabulary
from conversion.saving import (
    Converted,
    build_model,
    command_line,
    counted_parts,
    refuse_no_numbers,
    run_or_exit,
    save,
)
from conversion.tables import ConversionError, Table, convert
from conversion.vilt_layouts import (
    MODALITIES,
    SECOND_IMAGE,
    config_from_transformers,
    heads_of,
    infer_config,
    longest_edge,
    plain_transformers,
    switches_of,
    transformers_table,
    vilt_table,
)
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.modeling_vilt import MATCH, VlpViltForPreTraining, VlpViltModel
from hf_vlp.models.vilt.tasks_vilt import (
    VlpViltForImageTextRetrieval,
    VlpViltForMaskedLM,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)

CLASSES = {
    "nlvr2": VlpViltForVisualReasoning,
    "vqa": VlpViltForVisualQuestionAnswering,
    "retrieval": VlpViltForImageTextRetrieval,
    "pretraining": VlpViltForPreTraining,
    "mlm": VlpViltForMaskedLM,
    "model": VlpViltModel,
}
# heads that tell a task; one of masked words alone is for filling masks
TASKS = {"nlvr2": {"nlvr2"}, "vqa": {"vqa"}, "retrieval": {"irtr"}, "pretraining": {"mlm", "itm", "mpp"}}
USUAL_WEIGHTS = {
    name: getattr(VlpViltConfig(), name) for name in ("mlm_weight", "itm_weight", "wpa_weight", "mpp_weight")
}
MASK_TOKEN = "vilt.image_embeddings.mask_token"
TRUTH = {0: "False", 1: "True"}


# ------------------------------------------------------------------------------------------------ reading


def read_original(path, sha256: str | None = None) -> Original:
    """The tensors of a file and the options in the `config` of its `hyper_parameters`; what a trainer keeps besides is passed over.

    Raises:
        CheckpointError: see `read_content` and `find_state_dict`; or `hyper_parameters` that are none.
        UnsafeCheckpointError: the file asks for code.
    """
    content = read_content(path, sha256)
    options = content.get("hyper_parameters", {}) if isinstance(content, Mapping) else {}
    options = options.get("config", {}) if isinstance(options, Mapping) else options
    if not isinstance(options, Mapping):
        raise CheckpointError(
            path, f"`hyper_parameters` holds a {type(options).__name__}", 'save the options as {"config": {...}}'
        )
    return Original(strip_prefixes(find_state_dict(content, path)), dict(options))


def expected_state(config: VlpViltConfig, heads: set[str]) -> dict[str, torch.Tensor]:
    """Names and shapes (meta tensors) of the transformer and of these heads, as `vilt_layouts` has them."""
    config = with_fields(config, **switches_of(heads))
    with torch.device("meta"):
        expected = {f"vilt.{name}": tensor for name, tensor in VlpViltModel(config).state_dict().items()}
        if heads & TASKS["pretraining"]:
            expected |= VlpViltForPreTraining(config).state_dict()
        for task in ("nlvr2", "vqa", "retrieval"):
            if heads & TASKS[task]:
                held = CLASSES[task](config).state_dict()
                expected |= {f"{task}_{name}": held[name] for name in held if name.startswith("classifier.")}
                expected |= {name: held[name] for name in held if name.startswith("rank_head.")}
    return expected


def with_fields(config: VlpViltConfig, **fields: Any) -> VlpViltConfig:
    """The same configuration with other values of these fields."""
    return VlpViltConfig(**{**config.to_dict(), **fields})


def convert_all_heads(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None
) -> tuple[VlpViltConfig, dict[str, torch.Tensor]]:
    """Everything that a file of the original holds, under the names of `vilt_layouts`, in the stored precision, strictly.

    Args:
        state: of an `Original`; meta tensors will do. options: see `infer_config`.

    Raises:
        ConversionError: see `infer_config`; names or shapes that do not fit, a weight that is no finite number.
    """
    config, modalities = infer_config(state, options), len(state[MODALITIES])
    return config, _strictly(state, vilt_table(modalities), config, modalities)


def convert_transformers(
    state: Mapping[str, torch.Tensor], theirs: ViltConfig
) -> tuple[VlpViltConfig, dict[str, torch.Tensor]]:
    """`convert_all_heads` of a state dict of transformers' `ViltModel` or of a class on top of it.

    Raises:
        ConversionError: see `config_from_transformers` and `plain_transformers`; otherwise as `convert_all_heads`.
    """
    config = config_from_transformers(theirs)
    named = plain_transformers(state, theirs)
    if heads_of(named) & {"vqa", "nlvr2"} and config.hidden_act != "gelu":
        raise ConversionError(f"hidden_act is {config.hidden_act!r}; the classifiers of transformers have gelu alone")
    return config, _strictly(
        named, transformers_table(theirs.modality_type_vocab_size), config, theirs.modality_type_vocab_size
    )


def _strictly(
    state: Mapping[str, torch.Tensor], table: Table, config: VlpViltConfig, modalities: int
) -> dict[str, torch.Tensor]:
    heads = heads_of(state)
    expected = expected_state(config, heads)
    if heads and heads <= {"mlm", "mpp"} and not any("pooler." in name for name in state):  # nothing reads it there
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("vilt.pooler.")}
    if modalities > 2:
        expected[SECOND_IMAGE] = torch.empty(modalities - 2, config.hidden_size, device="meta")
    if "transformer.mask_token" in state:  # also without the objective that needs it
        expected[MASK_TOKEN] = torch.empty(1, 1, config.hidden_size, device="meta")
    ours = convert(state, table, expected)
    for name, tensor in ours.items():
        refuse_no_numbers(name, tensor)
    return ours


def task_of(heads: set[str]) -> str:
    """The task that the heads of a file tell; "model" without any.

    Raises:
        ConversionError: heads of several.
    """
    rest = heads - {"itm"} if "irtr" in heads else heads  # a retrieval file keeps the matching head
    told = ["mlm"] if rest == {"mlm"} else [task for task, marks in TASKS.items() if rest & marks]
    if len(told) > 1:
        raise ConversionError(f"the file has heads of several tasks: choose one with --task, of {', '.join(told)}")
    return told[0] if told else "model"


def for_task(config: VlpViltConfig, ours: Mapping[str, torch.Tensor], task: str | None = None) -> Converted:
    """What one of our classes takes of everything that a file holds.

    Args:
        ours: as of `convert_all_heads`.
        task: one of CLASSES; the one that the heads tell if not given, "model" for a transformer alone.

    A file without a rank head gets one for "retrieval": row 1 of its matching head. One without a matching head, as transformers' are, gets
    one of zeros, which finds every pair as likely as not. The second image of "nlvr2" begins as the first where the file has no third
    modality.

    Raises:
        ConversionError: the file lacks the head of the task, or has those of several and none is chosen.
    """
    heads = heads_of(ours)
    task = task or task_of(heads)
    state = {re.sub(rf"^{task}_classifier\.", "classifier.", name): tensor for name, tensor in ours.items()}
    if task == "retrieval":
        for part in ("weight", "bias"):
            if "itm" in heads:
                state.setdefault(f"rank_head.{part}", state[f"itm_head.{part}"][MATCH:].clone())
            elif "irtr" in heads:
                row = state[f"rank_head.{part}"]
                state[f"itm_head.{part}"] = row.new_zeros(2, *row.shape[1:])
    if task == "nlvr2":
        state.setdefault(SECOND_IMAGE, state["vilt.modality_embeddings.weight"][1:].clone())
    if task == "model":
        state = {name.removeprefix("vilt."): tensor for name, tensor in state.items()}
    config = with_fields(config, **(switches_of(heads) if task == "pretraining" else USUAL_WEIGHTS))
    if task == "nlvr2":
        config = with_fields(config, id2label=TRUTH, label2id={label: number for number, label in TRUTH.items()})
    model_class = CLASSES[task]
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    missing = [name for name in expected if name not in state]
    if missing or (task == "pretraining" and not heads & TASKS[task]):
        held, name = ", ".join(sorted(heads)) or "none", model_class.__name__
        raise ConversionError(
            f"the file has no {', '.join(missing[:5]) or 'head of pre-training'}, which {name} needs (heads of the file: {held}): "
            f"leave --task out, and let {name}.from_pretrained start its head at random from the folder"
        )
    left_out = [name for name in state if name not in expected]
    return Converted(model_class, config, {name: state[name] for name in expected}, left_out)


def read(
    path, task: str | None = None, sha256: str | None = None, options: Mapping[str, Any] | None = None
) -> Converted:
    """`for_task` of a file of the original or of a folder of transformers.

    `options`: in place of those of the file; a folder's config.json tells its own.

    Raises:
        CheckpointError, ConversionError: see `read_original`, `read_checkpoint`, `convert_all_heads`, `for_task`.
    """
    path = Path(path)
    if not path.is_dir():
        original = read_original(path, sha256)
        return for_task(*convert_all_heads(original.state, {**original.options, **(options or {})}), task)
    if options:
        raise ConversionError(f"{path} is a folder, whose config.json tells its sizes; leave the configuration out")
    state = read_checkpoint(path, sha256)
    return for_task(*convert_transformers(state, ViltConfig.from_dict(_fields_of(path))), task)


def _fields_of(folder: Path) -> dict[str, Any]:
    fields = read_json(folder / "config.json")
    if not isinstance(fields, dict) or fields.get("model_type") != ViltConfig.model_type:
        found = fields.get("model_type") if isinstance(fields, dict) else None
        raise ConversionError(f"{folder} holds a {found} model, not a ViLT of transformers")
    return fields


def read_options(path: Path | None) -> dict[str, Any]:
    """The options of a JSON file, alone or under `config`; none without a file.

    Raises:
        ConversionError: missing, not JSON, or no object.
    """
    content = {} if path is None else read_json(path)
    options = content.get("config", content) if isinstance(content, dict) else content
    if not isinstance(options, dict):
        raise ConversionError(
            f"{path} holds a {type(options).__name__}, not the options of the released code as an object"
        )
    return options


def read_answers(path: Path, count: int) -> dict[int, str]:
    """Label -> answer of a file {"0": answer, ...}, alone or under `id2answer` as in vqa_dict.json, {answer: 0, ...}, or [answer, ...].

    Raises:
        ConversionError: not JSON, or not each of `count` labels with an answer of its own.
    """
    content = read_json(path)
    content = content.get("id2answer", content) if isinstance(content, dict) else content
    pairs = (
        list(enumerate(content))
        if isinstance(content, list)
        else list(content.items())
        if isinstance(content, dict)
        else []
    )
    if pairs and isinstance(pairs[0][1], int):
        pairs = [(label, answer) for answer, label in pairs]
    try:
        answers = {int(label): answer for label, answer in pairs}
    except (TypeError, ValueError):
        answers = {}
    named = all(isinstance(answer, str) for answer in answers.values())
    if sorted(answers) != list(range(count)) or not named or len(set(answers.values())) != count:
        raise ConversionError(
            f"{path} has {len(pairs)} entries; the model has {count} answers, so it needs one text for each number from 0 to {count - 1}, "
            "no text twice"
        )
    return dict(sorted(answers.items()))


# ------------------------------------------------------------------------------------------------ building


def load_model(
    source,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
):
    """A model of ours, in eval mode, from a file, a folder of transformers, or an `Original`; see `read`."""
    if isinstance(source, Original):
        converted = for_task(*convert_all_heads(source.state, {**source.options, **(options or {})}), task)
    else:
        converted = read(source, task, options=options)
    return build_model(converted, dtype)


def build_processor(config: VlpViltConfig, checkpoint: Path, vocabulary: Path | None, image_size: int | None = None):
    """The processor of a converted model; None without a vocabulary.

    Args:
        checkpoint: a folder of transformers brings its tokenizer and how it prepares pictures.
        vocabulary: vocab.txt of BERT, lower case.
        image_size: shorter side of pictures in training, if it was not that of the position table.

    Raises:
        ConversionError: no readable vocabulary, or another model's.
    """
    from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessor
    from hf_vlp.models.vilt.processing_vilt import VlpViltProcessor

    longest = config.max_position_embeddings
    if vocabulary is not None:
        tokenizer = bert_tokenizer(vocabulary, longest)
    elif (checkpoint / "tokenizer_config.json").exists() or (checkpoint / "vocab.txt").exists():
        tokenizer = BertTokenizer.from_pretrained(checkpoint, model_max_length=longest)
    else:
        return None
    refuse_other_vocabulary(tokenizer, config.vocab_size)
    shorter = image_size or config.image_size
    options = {"size": {"shortest_edge": shorter}, "size_divisor": config.patch_size}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (checkpoint / name).exists():
            stored = read_json(checkpoint / name)
            stored = stored.get("image_processor", stored)
            known = (name for name in (*SAME_FIELDS, "size_divisor", "do_pad") if "crop" not in name)
            options |= {name: stored[name] for name in known if stored.get(name) is not None}
    if set(options["size"]) == {"shortest_edge"}:
        options["size"] = {**options["size"], "longest_edge": longest_edge(options["size"]["shortest_edge"])}
    return VlpViltProcessor(VlpViltImageProcessor(**options), tokenizer)


def summary(model, left_out: list[str]) -> str:
    """What was converted: the transformer, the heads, and what of the file has no place in the class."""
    config, sizes = model.config, Counter()
    for name, parameter in model.named_parameters():
        inside = isinstance(model, VlpViltModel) or name.startswith("vilt.")
        sizes["transformer" if inside else name.partition(".")[0]] += parameter.numel()
    facts = f"{config.num_hidden_layers} blocks of width {config.hidden_size} with {config.num_attention_heads} heads, patches of "
    facts += f"{config.patch_size}, table for {config.image_size} px, {config.max_position_embeddings} tokens out of {config.vocab_size}"
    facts = {"transformer": facts, "total": type(model).__name__}
    return counted_parts(sizes, facts, left_out)


@torch.no_grad()
def compare_outputs(model, folder: Path) -> dict[str, float]:
    """Largest differences of a forward to stored outputs of the original.

    `folder` holds inputs.safetensors (`text_ids`, `text_masks` [B, L], `text_ids_mlm` of masked texts; `image` [B, 3, H, W], or
    `image_0` and `image_1`; `image_sizes` [N, 2] of images to be read with every text) and outputs.safetensors with any of `infer.pooled`,
    `mlm_logits`, `vqa_logits`, `nlvr2_logits`, `scores`. Pixels whose channels add up to 0 are padding.
    """
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    ids, mask = inputs["text_ids"], inputs["text_masks"]
    found = {}
    if "image" in inputs:
        seen = {"pixel_values": inputs["image"], "pixel_mask": inputs["image"].sum(dim=1).ne(0).long()}
    if "infer.pooled" in outputs:
        found["infer.pooled"] = getattr(model, "vilt", model)(ids, mask, **seen).pooler_output
    if "mlm_logits" in outputs and hasattr(model, "mlm_head"):
        found["mlm_logits"] = model.mlm_head(model.vilt(inputs["text_ids_mlm"], mask, **seen).text_hidden_states)
    if "vqa_logits" in outputs:
        found["vqa_logits"] = model(ids, mask, **seen).logits
    if "nlvr2_logits" in outputs:
        both = torch.stack([inputs["image_0"], inputs["image_1"]], dim=1)
        found["nlvr2_logits"] = model(ids, mask, both, both.sum(dim=2).ne(0).long()).logits
    if "scores" in outputs:
        images = zip(inputs["image"], inputs["image_sizes"].tolist(), strict=True)
        rows = [image[None, :, :height, :width].expand(len(ids), -1, -1, -1) for image, (height, width) in images]
        found["scores"] = torch.stack([model.score_pairs(ids, mask, pixel_values=row) for row in rows])
    if not found:
        raise ConversionError(f"--check {folder}: none of its outputs is one that a {type(model).__name__} computes")
    return {name: (value.float() - outputs[name]).abs().max().item() for name, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = command_line(
        "from_vilt",
        __doc__.split("\n")[0],
        checkpoint=".ckpt file of the released code, or a folder of transformers",
        vocabulary="vocab.txt of bert-base-uncased; without it only the model is saved",
    )
    parser.add_argument(
        "--config", type=Path, help="JSON of the released code's options, in place of those in the file"
    )
    parser.add_argument("--task", choices=CLASSES, help="class to make; the one whose head the file has if not given")
    parser.add_argument("--answers", type=Path, help="vqa_dict.json: the texts of the answers of a VQA model")
    run_or_exit(parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Convert as the parsed command line says."""
    told = read_options(options.config)
    converted = read(options.checkpoint, options.task, options.sha256, told)
    config = converted.config
    if options.answers is not None:
        if converted.model_class is not VlpViltForVisualQuestionAnswering:
            raise ConversionError(f"--answers {options.answers}: a {converted.model_class.__name__} gives no answers")
        answers = read_answers(options.answers, config.num_labels)
        config = with_fields(config, id2label=answers, label2id={answer: label for label, answer in answers.items()})
    processor = build_processor(config, options.checkpoint, options.vocabulary, told.get("image_size"))
    model = build_model(replace(converted, config=config), getattr(torch, options.dtype))
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
