"""ALBEF checkpoints -> hf_vlp folders: the released files, and those that the scripts of every stage and task save.

    python -m conversion.from_albef --checkpoint ALBEF.pth --vocabulary vocab.txt --output albef-14m

    python -m conversion.from_albef --checkpoint mscoco.pth --vocabulary vocab.txt --output albef-14m-coco

    python -m conversion.from_albef --checkpoint vqa.pth --vocabulary vocab.txt --answers answer_list.json --output albef-14m-vqa

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.
The tables of names are in `conversion/albef_layouts.py`; `conversion/to_original.py` goes the other way. The task is told by the heads of
the file. One of pre-training makes a retrieval model as well (`--task retrieval`), which goes on with its momentum copies and its queue, as
the released code does, or one that fills masks (`--task mlm`). Every other task begins from the folder of a stage before it, by its
`from_pretrained`.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conversion.albef_layouts import INTEGERS, infer_config, refuse_untied, table_of
from conversion.albef_task_layouts import task_of, without_place
from conversion.checkpoints import CheckpointError, Original, find_state_dict, read_content, strip_prefixes
from conversion.preprocessing import bert_tokenizer, read_json, refuse_other_vocabulary
from conversion.saving import (
    Converted,
    build_model,
    command_line,
    counted_parts,
    refuse_no_numbers,
    run_or_exit,
    save,
)
from conversion.tables import ConversionError, convert
from hf_vlp.data.annotation_lists import read_answer_list
from hf_vlp.inputs.vocabulary import without_end_mark
from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForMaskedLM,
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
)
from hf_vlp.objectives.distillation import IGNORED
from hf_vlp.objectives.momentum_contrast import UNKNOWN_IMAGE

CLASSES = {
    "pretraining": VlpAlbefForPreTraining,
    "retrieval": VlpAlbefForImageTextRetrieval,
    "vqa": VlpAlbefForVisualQuestionAnswering,
    "nlvr2": VlpAlbefForVisualReasoning,
    "entailment": VlpAlbefForVisualEntailment,
    "assignment": VlpAlbefForTextAssignment,
    "mlm": VlpAlbefForMaskedLM,
    "model": VlpAlbefModel,
}
TESTED_WORDS = 50  # of a question, after which it is cut
SECTIONS = ("bert_config", "vit", "yaml")


# ------------------------------------------------------------------------------------------------ reading


def read_original(path, sha256: str | None = None) -> Original:
    """The tensors of a file, and the run's configuration among the options; what a training script keeps besides is passed over.

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


def expected_state(config: VlpAlbefConfig, task: str) -> dict[str, torch.Tensor]:
    """Names and shapes (meta tensors) of everything that a file for this task holds, under the names of the tables."""
    with torch.device("meta"):
        expected = CLASSES[task](config).state_dict()
    return {f"albef.{name}": tensor for name, tensor in expected.items()} if task == "model" else dict(expected)


def convert_all(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any] | None = None
) -> tuple[VlpAlbefConfig, dict[str, torch.Tensor], list[str]]:
    """Everything that a file of the original holds, under our names, in the stored precision, strictly; and what is of no use.

    What no file holds is filled in: identities of the images in a queue of pre-training are unknown, the list of answers is empty, and a
    head of text assignment that was taken off is zeros.

    Args:
        state: of an `Original`; meta tensors will do. options: see `infer_config`.

    Raises:
        ConversionError: see `infer_config`; names or shapes that do not fit, a weight that is no finite number, untied weights that the
            released code ties.
    """
    config, task, unused = infer_config(state, options), task_of(state), without_place(state)
    table = table_of(state, config)
    refuse_untied(state, table)
    taken = {name: tensor for name, tensor in state.items() if name not in unused}
    expected, filled, device = expected_state(config, task), {}, next(iter(state.values())).device
    if "queue.image_ids" in expected and "idx_queue" not in state:
        filled["queue.image_ids"] = UNKNOWN_IMAGE
    if task == "vqa":
        filled["answer_ids"] = IGNORED
    if task == "assignment" and "ta_head.weight" not in state:
        filled |= {"assignment_head.weight": 0.0, "assignment_head.bias": 0.0}
    added = {name: torch.full(expected.pop(name).shape, value, device=device) for name, value in filled.items()}
    ours = convert(taken, table, expected)
    for name, tensor in ours.items():
        if name not in INTEGERS:
            refuse_no_numbers(name, tensor)
    return config, {**ours, **added}, unused


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
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, not the configuration of the released code as an object"
        )
    told = {name: content[name] for name in SECTIONS if name in content}
    return told or {"bert_config": content}


def read_answers(path: Path) -> list[str]:
    """The answers of a JSON list, as in answer_list.json.

    Raises:
        ConversionError: missing, not JSON, no list of texts, or an answer twice.
    """
    try:
        return read_answer_list(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"--answers {path}: {error}") from error


def with_answers(converted: Converted, answers: list[str], processor) -> Converted:
    """The same model of questions with a list to answer from.

    `processor`: as of `build_processor`; makes tokens of the answers.

    Raises:
        ConversionError: a model of another task, or an answer longer than the decoder reads.
    """
    if converted.model_class is not VlpAlbefForVisualQuestionAnswering:
        raise ConversionError(f"a {converted.model_class.__name__} gives no answers: leave --answers out")
    try:
        encoded = processor.encode_answers(answers)
    except ValueError as error:
        raise ConversionError(f"--answers: {error}") from error
    ids = encoded["answer_ids"].masked_fill(encoded["answer_mask"].eq(0), IGNORED)
    length = max(converted.config.answer_length, ids.shape[1])
    ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=IGNORED)
    names = {"id2label": dict(enumerate(answers)), "label2id": {answer: row for row, answer in enumerate(answers)}}
    config = VlpAlbefConfig(**{**converted.config.to_dict(), **names, "answer_length": length})
    return replace(converted, config=config, state={**converted.state, "answer_ids": ids})


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


def build_processor(config: VlpAlbefConfig, vocabulary: Path | None, questions: bool = False):
    """The processor of a converted model; None without a vocabulary.

    Args:
        vocabulary: vocab.txt of BERT, lower case.
        questions: texts are cleaned as questions and cut after 50 words, as the released code tests; else as captions.

    Raises:
        ConversionError: no readable vocabulary, or another model's.
    """
    from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor
    from hf_vlp.models.albef.processing_albef import VlpAlbefProcessor

    if vocabulary is None:
        return None
    tokenizer = bert_tokenizer(vocabulary, config.text_config.max_position_embeddings)
    refuse_other_vocabulary(tokenizer, config.text_config.vocab_size)
    side = config.vision_config.image_size
    cleaning = {"text_cleaning": "question", "max_words": TESTED_WORDS} if questions else {}
    images = VlpAlbefImageProcessor(size={"height": side, "width": side})
    return VlpAlbefProcessor(images, without_end_mark(tokenizer), **cleaning)


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
        "second_layers": f"{fusion.num_hidden_layers} layers of the second image",
        "teacher": "momentum copies, for training",
        "total": type(model).__name__,
    }
    if isinstance(model, VlpAlbefForVisualQuestionAnswering):
        listed = (
            f"{config.num_labels} answers to choose from"
            if model.answer_ids.ge(0).any()
            else "no list of answers: give --answers"
        )
        facts["answer_decoder"] = f"{config.answer_layers} layers, {listed}"
    if isinstance(model, VlpAlbefForTextAssignment) and not model.assignment_head.weight.any():
        facts["assignment_head"] = "zeros: the file has none"
    return counted_parts(sizes, facts, left_out)


@torch.no_grad()
def compare_outputs(model, folder: Path) -> dict[str, float]:
    """Largest differences of a forward to stored outputs of the original, at tokens that are no padding.

    `folder` holds inputs.safetensors and outputs.safetensors. Inputs are `input_ids`, `attention_mask` [B, L] (of questions
    `question_input_ids`, `question_attention_mask`) and `image` [B, 3, H, W], of two images `image0` and `image1`. Outputs are any of
    `image_feat`, `text_feat`, `multimodal_last_hidden`, `itm_logits` (those of the pairs); `prediction_eval` of a classifier; `loss` of
    text assignment with `first_image_idx`, `second_image_idx`, `label` [B]; `topk_probs` [B, k] among the answers `answer_input_ids`,
    `answer_attention_mask` [K, La].
    """
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    asked = "question_" if "question_input_ids" in inputs else ""
    pair = ("image0", "image1") if "image0" in inputs else ("image",)
    if not {f"{asked}input_ids", f"{asked}attention_mask", *pair} <= set(inputs):
        raise ConversionError(f"--check {folder}: its inputs are not input_ids, attention_mask and image")
    words = inputs[f"{asked}input_ids"], inputs[f"{asked}attention_mask"]
    images = torch.stack([inputs[name] for name in pair], dim=1) if len(pair) > 1 else inputs["image"]
    found: dict[str, torch.Tensor] = {}
    if isinstance(model, VlpAlbefForVisualEntailment | VlpAlbefForVisualReasoning):
        found["prediction_eval"] = model(*words, images).logits
    elif isinstance(model, VlpAlbefForTextAssignment):
        chosen = (inputs.get(name) for name in ("first_image_idx", "second_image_idx", "label"))
        found["loss"] = model(*words, images, None, *chosen).loss
    elif "topk_probs" in outputs:
        states, answers = model.albef(*words, images).last_hidden_state, inputs["answer_input_ids"]
        most = outputs["topk_probs"].shape[1]
        _, scores = model.rank_answers(states, words[1], answers, inputs["answer_attention_mask"], most)
        found["topk_probs"] = scores.softmax(dim=-1)
    else:
        found = _states(model, *words, images)
    real = words[1].bool()
    differences = {}
    for name in [name for name in found if name in outputs]:
        if found[name].shape != outputs[name].shape:
            continue
        value = found[name] - outputs[name]
        differences[name] = (value[real] if name == "multimodal_last_hidden" else value).abs().max().item()
    if not differences:
        raise ConversionError(f"--check {folder}: none of its outputs is one that a {type(model).__name__} computes")
    return differences


def _states(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """States of pairs and what heads without a loss make of them."""
    base = getattr(model, "albef", model)
    output = base(input_ids, attention_mask, image)
    states = output.last_hidden_state
    found = {}
    if getattr(base, "text_projection", None) is not None:
        found["image_feat"] = base.project_image(output.image_hidden_states)
        found["text_feat"] = base.project_text(output.text_hidden_states)
    found["multimodal_last_hidden"] = states
    if hasattr(model, "itm_head"):
        found["itm_logits"] = model.itm_head(states[:, 0])
    return found


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
    parser.add_argument("--answers", type=Path, help="answer_list.json: the answers that a VQA model chooses from")
    run_or_exit(parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Convert as the parsed command line says."""
    converted = read(options.checkpoint, options.task, options.sha256, read_options(options.config))
    questions = converted.model_class is VlpAlbefForVisualQuestionAnswering
    processor = build_processor(converted.config, options.vocabulary, questions)
    if options.answers is not None:
        if processor is None:
            raise ConversionError(f"--answers {options.answers} needs --vocabulary, which makes tokens of the answers")
        converted = with_answers(converted, read_answers(options.answers), processor)
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
