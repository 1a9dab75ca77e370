"""Cases of models that begin from an earlier stage's checkpoint: which of its tensors they take, and what new ones begin as."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from conversion.albef_layouts import to_state_dict
from conversion.from_albef import load_model, read_original
from hf_vlp.layers.patch_embedding import resize_position_table
from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
)
from hf_vlp.objectives.momentum_contrast import UNKNOWN_IMAGE
from tests.parity.albef_model import with_copies
from tests.parity.albef_tasks import parts_of, states_of_two
from tests.parity.harness import Case

CLASSES = {
    "retrieval": VlpAlbefForImageTextRetrieval,
    "vqa": VlpAlbefForVisualQuestionAnswering,
    "ve": VlpAlbefForVisualEntailment,
    "nlvr_pretrain": VlpAlbefForTextAssignment,
    "nlvr": VlpAlbefForVisualReasoning,
}
LABELS = {"ve": 3}
UNREAD = {"nlvr_pretrain": ("temp", "text_proj.weight", "text_proj.bias")}  # never read by that loss, and not in ours
FRESH = "<fresh>"
INTERPOLATED = re.compile(r"interpolated\((.+)\)")
LAYER = re.compile(r"(.*encoder\.layer\.)(\d+)(\..*)")
COUNTED = "position_ids"


def init_from_pretrain(case: Case) -> None:
    """Each class from a saved folder of a pre-training checkpoint: where every tensor comes from, and what the loaded parts compute."""
    inputs, words = case.inputs, (case.inputs["input_ids"], case.inputs["attention_mask"])
    for before, models in begun_models(case):
        for name, model in models.items():
            compare_mapping(case, name, model, before)
            with torch.no_grad():
                case.compare({f"{name}.image_embeds": model.encode_image(inputs["image"])["image_embeds"]})
                if name == "nlvr_pretrain":
                    *_, last = states_of_two(model, *words, inputs["image"], inputs["image1"])
                    case.compare({f"{name}.last_hidden": last}, mask=words[1])
                    continue
                for ending, parts in parts_of(model).items():
                    states = parts.albef(*words, inputs["image"]).last_hidden_state
                    case.compare({f"{name}.multimodal_last_hidden{ending}": states}, mask=words[1])
                    if name == "vqa":
                        written = parts.answer_decoder(inputs["decoder_input_ids"], states, words[1])
                        logits = {f"{name}.decoder_logits{ending}": parts.answer_decoder.head(written)}
                        case.compare(logits, mask=inputs["decoder_attention_mask"])
                    if name == "retrieval" and not ending:
                        case.compare({f"{name}.itm_logits": parts.itm_head(states[:, 0])})


def init_nlvr_from_ta(case: Case) -> None:
    """The class of NLVR2 from a saved folder of a text-assignment checkpoint.

    Of the momentum copy, which the released code makes before it loads the file, ours begins as the loaded model.
    """
    inputs = case.inputs
    for before, models in begun_models(case):
        model = models["nlvr"]
        compare_mapping(case, "nlvr", model, before)
        with torch.no_grad():
            *_, last = states_of_two(
                model, inputs["input_ids"], inputs["attention_mask"], inputs["image0"], inputs["image1"]
            )
        case.compare({"last_hidden": last}, mask=inputs["attention_mask"])


def begun_models(case: Case) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, nn.Module]]]:
    """Of every weight file its tensors, and a model of each class of key_mapping.json in eval mode, loaded out of a folder of it."""
    names = list(case.json("key_mapping.json"))
    for path in case.weight_files():
        original = read_original(path)
        original = replace(original, state=with_copies(original.state))
        with TemporaryDirectory() as folder:
            load_model(original, options=case.config).save_pretrained(folder)
            models = {name: begun(name, folder, case.config) for name in names}
        yield original.state, models


def begun(name: str, folder: str | Path, options: Mapping) -> nn.Module:
    """A model of CLASSES with momentum copies, where its class has them, for images of the next stage's size."""
    sizes = {"answer_layers": options["decoder_layers"]} if name == "vqa" else {"num_labels": LABELS.get(name, 2)}
    model = CLASSES[name].from_pretrained(folder, momentum_teacher=True, **sizes)
    if hasattr(model, "queue"):
        model.queue.forget_images()
    model.resize_image_positions(options["downstream_image_res"])
    return model.eval()


def compare_mapping(case: Case, name: str, model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """key_mapping.json of one model, tensor by tensor and bit for bit; `before`: of the file."""
    stored, start = case.json("key_mapping.json")[name], f"key_mapping.json: {name}: "
    ours = to_state_dict(model.config, model.state_dict())
    mapping = stored["mapping"]
    wanted = {key: tuple([value] if isinstance(value, str) else value) for key, value in mapping.items()}
    case.expect({f"{start}{key}": value for key, value in wanted.items()})
    for key, sources in wanted.items():
        if key.endswith(COUNTED):
            case.listed(f"{start}{key}", "counts 0, 1, 2, ...")
        elif key in UNREAD.get(name, ()):
            case.listed(f"{start}{key}", "the loss never reads it, and ours has no such weight")
        elif key not in ours:
            case.settle(f"{start}{key}", False, note="ours has no such tensor")
        elif sources != (FRESH,):
            case.compare({f"{start}{key}": sources if taken(ours[key], sources[0], before) else (FRESH,)})
        else:
            case.settle(f"{start}{key}", *fresh(key, ours, mapping, before))
    pretrained = {target for key in before for target in renamed(key, name, case.config)}
    found = {"missing_keys": sorted(ours.keys() - pretrained), "unexpected_keys": sorted(pretrained - ours.keys())}
    found["missing_keys"] = [key for key in found["missing_keys"] if not key.endswith(COUNTED)]
    for kind, keys in found.items():
        entry = [key for key in sorted(stored[kind]) if not (kind == "missing_keys" and key.endswith(COUNTED))]
        case.expect({f"{start}{kind}": entry})
        case.compare({f"{start}{kind}": keys})
    table = "pos_embed" if f"{name}.pos_embed" not in case.outputs else f"{name}.pos_embed"
    case.compare({table: ours["visual_encoder.pos_embed"]})


def taken(value: torch.Tensor, source: str, before: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is the tensor `source` of the file, or its position table interpolated."""
    interpolated = INTERPOLATED.fullmatch(source)
    if interpolated is None:
        return torch.equal(value, before[source])
    side = round((value.shape[1] - 1) ** 0.5)
    table = resize_position_table(before[interpolated[1]][0], (side, side))[None]
    return table.shape == value.shape and torch.allclose(table, value, rtol=0, atol=1e-6)


def fresh(
    key: str, ours: Mapping[str, torch.Tensor], mapping: Mapping, before: Mapping[str, torch.Tensor]
) -> tuple[bool, None, None, str]:
    """Whether a tensor that is not of the file is new: a queue of no known images, a head, or a copy of what is trained."""
    value, own = ours[key], key.replace("_m.", ".", 1)
    if key == "idx_queue":
        return bool(value.eq(UNKNOWN_IMAGE).all()), None, None, "of no known image"
    if own != key:
        return torch.equal(value, ours[own]), None, None, "a copy of the loaded model's"
    return not any(torch.equal(value, tensor) for tensor in before.values()), None, None, "not of the file"


def renamed(key: str, name: str, options: Mapping) -> list[str]:
    """Under which names of the next stage's model a tensor of the file is looked for.

    `name`: of a class. The layers that fuse go to the decoder as well as to the encoder, or twice to that of two images.
    """
    if name == "nlvr":
        return [key]
    plain, first = key.replace(".bert.", "."), options["bert_config"]["fusion_layer"]
    layer = LAYER.fullmatch(plain)
    fusing = layer is not None and int(layer[2]) >= first and key.startswith("text_encoder")
    offset = int(layer[2]) - first if fusing else 0
    if name == "nlvr_pretrain" and fusing:
        return [f"{layer[1]}{first + 2 * offset + second}{layer[3]}" for second in (0, 1)]
    if name == "vqa" and key.startswith("text_encoder"):
        decoder = key.replace("text_encoder", "text_decoder")
        if ".cls." in key:
            return [decoder]
        if fusing:
            return [plain, LAYER.sub(rf"\g<1>{offset}\3", decoder)]
        return [plain] if layer is not None else [plain, decoder]
    return [plain]
