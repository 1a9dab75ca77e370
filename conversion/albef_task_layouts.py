"""Which task a file of ALBEF is of, and what the released code takes for granted in each.

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.
The tables of names are in `conversion/albef_layouts.py`.
"""

import re
from collections.abc import Mapping

import torch

from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig

CROSS_ATTENTION = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
TEACHER = re.compile(r"(visual_encoder|vision_proj|text_encoder|text_proj|cls_head|text_decoder)_m\.")
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
# Tasks by what their files hold: momentum copies with a queue, momentum copies alone, layers for two images.
CONTRASTED = ("pretraining", "retrieval")
TAUGHT = ("entailment", "nlvr2", "vqa")
OF_TWO_IMAGES = ("assignment", "nlvr2")
LABELS = {"entailment": {0: "contradiction", 1: "neutral", 2: "entailment"}, "nlvr2": {0: "False", 1: "True"}}
MOMENTUM, ANSWER_LAYERS, LAYERS_OF_TWO = 0.995, 6, (6, 6)  # of TAUGHT, VQA and OF_TWO_IMAGES, whatever the options say


def task_of(state: Mapping[str, torch.Tensor]) -> str:
    """The task that the names of a file, or ours, tell by their heads; "model" without any.

    Of a file for two images whose head was taken off, its layers tell it: they share their keys in pairs.
    """

    def held(*starts: str) -> bool:
        return any(name.startswith(starts) for name in state)

    if held("text_decoder.", "answer_decoder."):
        return "vqa"
    if held("ta_head.", "assignment_head."):
        return "assignment"
    if held("cls_head.", "classifier."):
        pairs = held("second_layers.") or ("cls_head.2.weight" in state and len(state["cls_head.2.weight"]) == 2)
        return "nlvr2" if pairs else "entailment"
    if held("text_encoder.cls.", "mlm_head."):
        return "pretraining" if held("itm_head.") else "mlm"
    if held("itm_head."):
        return "retrieval"
    return "assignment" if _pairs_share_keys(state) else "model"


def _pairs_share_keys(state: Mapping[str, torch.Tensor]) -> bool:
    name = "text_encoder.encoder.layer.{}.crossattention.self.key.weight"
    numbers = sorted({int(match[1]) for key in state if (match := CROSS_ATTENTION.match(key))})
    keys = [state.get(name.format(number)) for number in numbers]
    if not keys or len(keys) % 2 or any(key is None or key.is_meta for key in keys):
        return False
    return all(torch.equal(one, other) for one, other in zip(keys[::2], keys[1::2], strict=True))


def momentum_parts(state: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """The names of a file's momentum copies, and of its queues."""
    return [name for name in state if TEACHER.match(name)], [name for name in QUEUES if name in state]


def without_place(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of a file that no class of ours for its task has a use for.

    Momentum copies where they teach nothing, or without the queue that goes with them, and a queue without them; of text assignment the
    temperature and the projection of texts, which its loss never reads.
    """
    task, (copies, queues) = task_of(state), momentum_parts(state)
    unused = [] if teaches(task, copies, queues) else copies + queues
    if task == "assignment":
        unused += [name for name in state if name == "temp" or name.startswith("text_proj.")]
    return unused


def teaches(task: str, copies: list[str], queues: list[str]) -> bool:
    """Whether a file for a task has all of its momentum copies; `copies`, `queues`: see `momentum_parts`."""
    return bool(copies) and (task in TAUGHT or (task in CONTRASTED and bool(queues)))


def task_differences(config: VlpAlbefConfig, task: str) -> list[str]:
    """Settings that the released code has one value of for this task, as "num_labels 4, it takes 3"."""
    text, fusion, differences = config.text_config, config.multimodal_config, []
    if task in OF_TWO_IMAGES:
        if not config.shared_image_keys:
            differences.append("shared_image_keys False, it shares them")
        if (text.num_hidden_layers, fusion.num_hidden_layers) != LAYERS_OF_TWO:
            differences.append(
                f"{text.num_hidden_layers} layers of text and {fusion.num_hidden_layers} of fusion, for two images it takes 6 and 6"
            )
    if task == "entailment" and config.num_labels != len(LABELS[task]):
        differences.append(f"num_labels {config.num_labels}, it takes {len(LABELS[task])}")
    if task == "vqa" and not config.count_first_token_twice:
        differences.append("count_first_token_twice False, it counts it twice")
    return differences


def untold_of_task(config: VlpAlbefConfig, task: str) -> list[str]:
    """What the reader of a file for this task has to be told."""
    told = []
    if task in TAUGHT and config.momentum != MOMENTUM:
        told.append(f"momentum {config.momentum}, it has {MOMENTUM} for this task")
    if task == "vqa":
        if config.answer_layers != ANSWER_LAYERS:
            told.append(f"answer_layers {config.answer_layers}, it has {ANSWER_LAYERS}")
        told.append("its answer_list, which has no place in the file: the values of id2label in config.json")
    if task == "assignment":
        told.append("temp and text_proj, which its loss never reads, are the configuration's and zeros")
    elif not config.momentum_teacher:
        kept = "no momentum copies" if task in TAUGHT else "no momentum copies and no queues"
        told.append(f"{kept}, which its training scripts read: load them with strict=False")
    return told
