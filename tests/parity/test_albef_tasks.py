"""ALBEF's task cases and stages with other settings and wrappings than the golden ones, and cases that must not pass."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.tables import revert
from hf_vlp.models.albef.tasks_albef import VlpAlbefForTextAssignment
from tests.parity.albef_init import renamed
from tests.parity.albef_training import config_of, table_for
from tests.parity.harness import run
from tests.parity.test_albef_model import GOLDEN, copied, failures, is_momentum


def copied_json(folder: Path, name: str, change) -> Path:
    """A copy of the golden optimizer_groups, one of whose JSON files `change` has altered."""
    for path in (GOLDEN / "optimizer_groups").iterdir():
        content = path.read_text("utf-8")
        if path.name == name:
            tree = json.loads(content)
            change(tree)
            content = json.dumps(tree)
        (folder / path.name).write_text(content, "utf-8")
    return folder


@pytest.mark.parametrize("case", ["ve", "vqa_train", "nlvr_finetune"])
def test_the_weight_of_the_teacher_reaches_the_loss_alone(case, tmp_path):
    def change(content, config, outputs):
        config["alpha_used"] = 0.1

    found = failures(run("albef", case, copied(case, tmp_path, change)))
    assert "loss" in found and any(name.startswith("grads.json: ") for name in found)
    assert all(name in ("loss", "per_answer_loss") or name.startswith("grads.json: ") for name in found)


def test_a_task_file_without_copies_is_taught_by_itself(tmp_path):
    def change(content, config, outputs):
        predicted = outputs["prediction"]
        for name in [name for name in outputs if "_m" in name]:
            del outputs[name]
        outputs["multimodal_last_hidden_m"] = outputs["multimodal_last_hidden"]
        outputs["prediction_m"] = predicted
        log = predicted.log_softmax(dim=1)
        hard = -log[torch.arange(len(log)), targets]
        soft = -(log.exp() * log).sum(dim=1)
        outputs["loss"] = ((1 - config["alpha_used"]) * hard + config["alpha_used"] * soft).mean()
        return {name: tensor for name, tensor in content["model"].items() if not is_momentum(name)}

    targets = inputs_of("ve")["targets"]
    found = failures(run("albef", "ve", copied("ve", tmp_path, change)))
    assert not [name for name in found if not name.startswith("grads.json: ")]

    def off(content, config, outputs):
        state = change(content, config, outputs)
        config["yaml"]["distill"] = False
        return state

    assert [name for name in failures(run("albef", "ve", copied("ve", tmp_path, off))) if "grads" not in name] == [
        "loss"
    ]


def inputs_of(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "inputs.safetensors")


def test_a_layer_of_the_second_image_changed(tmp_path):
    def changed(content, config, outputs):
        content["model"]["text_encoder.encoder.layer.7.intermediate.dense.weight"][0] += 1

    found = set(failures(run("albef", "nlvr_finetune", copied("nlvr_finetune", tmp_path, changed))))
    assert {"text_layer_7", "text_layer_8", "last_hidden", "prediction_eval"} <= found
    assert not {"text_layer_5", "text_layer_6"} & found


def test_keys_of_a_pair_that_differ_are_refused(tmp_path):
    def untied(content, config, outputs):
        name = "text_encoder.encoder.layer.7.crossattention.self.key.weight"
        content["model"][name] = content["model"][name] + 1

    assert "the procedure" in failures(run("albef", "nlvr_finetune", copied("nlvr_finetune", tmp_path, untied)))


@pytest.mark.parametrize(("columns", "passes"), [([0, 1, 2, 4, 3], True), ([1, 0, 2, 3, 4], False)])
def test_answers_with_the_same_first_word_come_in_any_order(columns, passes, tmp_path):
    def change(content, config, outputs):
        ids = outputs["candidate_ids_by_first_token"]
        rows = outputs["candidate_logits"].view(*ids.shape, *outputs["candidate_logits"].shape[1:])
        for tensor in (ids, outputs["candidate_sequence_loss"], rows):
            tensor[0] = tensor[0, columns].clone()

    found = failures(run("albef", "vqa_rank_answer", copied("vqa_rank_answer", tmp_path, change)))
    assert found == ([] if passes else ["candidate_ids_by_first_token"])


def test_a_parameter_in_the_other_group(tmp_path):
    def change(groups):
        groups["ve"]["decay"].remove("visual_encoder.cls_token")
        groups["ve"]["no_decay"].append("visual_encoder.cls_token")

    found = set(failures(run("albef", "optimizer_groups", copied_json(tmp_path, "optimizer_groups.json", change))))
    assert found == {f"optimizer_groups.json: ve: {group}" for group in ("no_decay", "decay")}


def test_a_stage_begun_from_another_layer(tmp_path):
    folder = copied("init_nlvr_from_ta", tmp_path, lambda content, config, outputs: None)
    path = folder / "key_mapping.json"
    stored = json.loads(path.read_text("utf-8"))
    own, other = (f"text_encoder.encoder.layer.{number}.attention.self.query.weight" for number in (7, 6))
    stored["nlvr"]["mapping"][own] = other
    stored["nlvr"]["missing_keys"].remove("cls_head.0.bias")
    path.write_text(json.dumps(stored), "utf-8")
    found = set(failures(run("albef", "init_nlvr_from_ta", folder)))
    assert found == {f"key_mapping.json: nlvr: {own}", "key_mapping.json: nlvr: missing_keys"}


def test_where_a_stage_looks_for_a_tensor():
    options = {"bert_config": {"fusion_layer": 2}}
    layer, words = "text_encoder.bert.encoder.layer.{}.output.dense.bias", "text_encoder.bert.embeddings.LayerNorm.bias"

    def plain(number: int) -> str:
        return layer.format(number).replace("bert.", "")

    assert renamed(layer.format(3), "retrieval", options) == [plain(3)]
    assert renamed(layer.format(1), "nlvr_pretrain", options) == [plain(1)]
    assert renamed(layer.format(3), "nlvr_pretrain", options) == [plain(4), plain(5)]
    assert renamed(layer.format(1), "vqa", options) == [plain(1)]
    assert renamed(layer.format(3), "vqa", options) == [plain(3), layer.format(1).replace("encoder.b", "decoder.b")]
    both = [words.replace("bert.", ""), words.replace("text_encoder", "text_decoder")]
    assert renamed(words, "vqa", options) == both
    assert renamed("visual_encoder.blocks.1.norm1.bias", "vqa", options) == ["visual_encoder.blocks.1.norm1.bias"]
    assert renamed("text_encoder_m.cls.predictions.bias", "vqa", options) == ["text_decoder_m.cls.predictions.bias"]


def test_the_groups_of_text_assignment_pass_over_what_no_loss_reaches(tmp_path):
    model = VlpAlbefForTextAssignment(config_of(json.loads((GOLDEN / "optimizer_groups/config.json").read_text())))
    unread = {f"albef.text_projection.{kind}": torch.zeros(shape) for kind, shape in (("weight", (2, 2)), ("bias", 2))}
    ours = model.state_dict() | unread | {"temperature.weight": torch.tensor(0.07)}
    state = revert(ours, table_for(model, set()))

    def change(groups):
        groups["nlvr_pretrain"] = entry = groups.pop("pretrain") | {"no_decay": [], "decay": [], "not_trained": []}
        for name, tensor in state.items():
            if not name.endswith("position_ids"):
                entry["no_decay" if name.endswith("bias") or tensor.ndim == 1 else "decay"].append(name)

    def moved(groups):
        change(groups)
        groups["nlvr_pretrain"]["decay"].append(groups["nlvr_pretrain"]["no_decay"].pop())

    case = run("albef", "optimizer_groups", copied_json(tmp_path, "optimizer_groups.json", change))
    passed = {line.name.rpartition(" ")[2] for line in case.lines if line.verdict == "listed"}
    assert not failures(case)
    assert {"temp", "text_proj.weight", "vision_proj.bias"} <= passed and "ta_head.weight" not in passed
    assert failures(run("albef", "optimizer_groups", copied_json(tmp_path, "optimizer_groups.json", moved)))


@pytest.mark.parametrize("case", ["gradcam", "vqa_rank_answer"])
def test_every_weight_file_of_a_folder_is_compared(case, tmp_path):
    def change(content, config, outputs):
        outputs.pop("candidate_ids_by_first_token", None)  # ours then, in whose order the golden case is

    folder = copied(case, tmp_path, change)
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    torch.save(content, folder / "checkpoint.pt")
    assert not failures(run("albef", case, folder))
    state = content.get("model", content)
    for name in [name for name in state if name.endswith("crossattention.self.query.weight")]:
        state[name] = state[name] + 0.5
    torch.save(content, folder / "checkpoint.pt")
    found = failures(run("albef", case, folder))
    assert found and all(name.startswith("checkpoint.pt: ") for name in found)
