"""ALBEF's cases with weights in other wrappings and of other sizes than the golden ones, and cases that must not pass."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.albef_model import masking, rate, with_copies
from tests.parity.harness import Case, run

GOLDEN = Path(__file__).parents[1] / "golden" / "albef"


def copied(case: str, folder: Path, change) -> Path:
    """A copy of a golden folder, whose content `{"model": {...}, ...}`, config and outputs `change` has altered."""
    for path in (GOLDEN / case).iterdir():
        shutil.copyfile(path, folder / path.name)
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    outputs = load_file(folder / "outputs.safetensors")
    content = change(content, config, outputs) or content
    torch.save(content, folder / "checkpoint.pth")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({name: tensor.clone() for name, tensor in outputs.items()}, folder / "outputs.safetensors")
    return folder


def failures(case: Case) -> list[str]:
    return [line.name for line in case.lines if line.verdict == "FAIL"]


def is_momentum(name: str) -> bool:
    return name.split(".")[0].endswith("_m")


def test_a_bare_file_without_copies_and_queues(tmp_path):
    def change(content, config, outputs):
        for name in [name for name in outputs if name.endswith("_m")]:
            del outputs[name]
        kept = {name: tensor for name, tensor in content["model"].items() if "queue" not in name}
        return {f"module.{name}": tensor for name, tensor in kept.items() if not is_momentum(name)}

    assert not failures(run("albef", "backbone", copied("backbone", tmp_path, change)))


@pytest.mark.parametrize(("case", "switched"), [("pretrain_alpha04", False), ("retrieval_finetune", True)])
def test_pre_training_has_no_switch_of_its_soft_targets(case, switched, tmp_path):
    def change(content, config, outputs):
        config["yaml"]["distill"] = False

    assert bool(failures(run("albef", case, copied(case, tmp_path, change)))) == switched


def test_one_weight_less_and_one_changed(tmp_path):
    def changed(content, config, outputs):
        content["model"]["text_encoder.bert.encoder.layer.3.crossattention.self.key.weight"][0] += 1

    found = failures(run("albef", "backbone", copied("backbone", tmp_path, changed)))
    assert {"text_layer_3", "itm_logits"} <= set(found)
    assert not {"text_layer_2", "image_embeds", "text_feat", "mlm_logits_m"} & set(found)

    def less(content, config, outputs):
        del content["model"]["itm_head.bias"]

    assert "the procedure" in failures(run("albef", "backbone", copied("backbone", tmp_path, less)))


def test_halves_of_other_lengths(tmp_path):
    """The golden model without its last layer: three layers, of which one reads the image."""

    def change(content, config, outputs):
        config["bert_config"]["num_hidden_layers"] = 3
        for name in [name for name in content["model"] if ".layer.3." in name]:
            del content["model"][name]
        last = outputs["text_layer_2"]
        for name in ("mlm_logits", "mlm_logits_m", "itm_logits", "multimodal_with_token_types", "text_layer_3"):
            del outputs[name]
        outputs |= {"multimodal_last_hidden": last, "fusion_last_hidden": last}

    assert not failures(run("albef", "backbone", copied("backbone", tmp_path, change)))

    def wrong(content, config, outputs):
        change(content, config, outputs)
        config["bert_config"]["fusion_layer"] = 1

    assert "the procedure" in failures(run("albef", "backbone", copied("backbone", tmp_path, wrong)))


@pytest.mark.parametrize(
    ("field", "touched", "untouched"),
    [
        (("alpha_used", 0.1), {"loss_ita", "loss_mlm"}, {"loss_itm", "sim_i2t_m", "after.image_queue"}),
        (("momentum", 0.9), {"sim_i2t_m", "after.vision_proj_m.weight", "loss_ita"}, {"image_embeds", "mlm_logits"}),
    ],
    ids=["alpha", "momentum"],
)
def test_settings_reach_the_step(field, touched, untouched, tmp_path):
    name, value = field

    def change(content, config, outputs):
        (config if name in config else config["yaml"])[name] = value

    found = set(failures(run("albef", "pretrain_alpha04", copied("pretrain_alpha04", tmp_path, change))))
    assert touched <= found and not untouched & found


def test_copies_are_made_where_queues_stand_alone():
    state = {"vision_proj.weight": torch.ones(2), "temp": torch.ones(()), "image_queue": torch.ones(2, 2)}
    made = with_copies(state)
    assert made.keys() - state.keys() == {"vision_proj_m.weight"}
    assert made["vision_proj_m.weight"] is state["vision_proj.weight"]
    del state["image_queue"]
    assert with_copies(state) == state


def test_masking_spares_the_start_and_padding():
    config = {"token_ids": {"pad": 0, "cls": 2, "mask": 4}, "yaml": {}}
    ids, mask = torch.tensor([[2, 3, 9, 0]]), torch.tensor([[1, 1, 1, 0]])
    every = torch.ones(1, 4, dtype=torch.long)
    masked, labels = masking(config, 12)(ids, mask, chosen=every, replaced=every, randomised=every, random_ids=every)
    assert masked.tolist() == [[2, 4, 4, 0]] and labels.tolist() == [[-100, 3, 9, -100]]


def test_rates_of_the_scheduler():
    plan = {"lr": 1e-4, "warmup_lr": 1e-5, "min_lr": 1e-6, "warmup_epochs": 20, "epochs": 30}
    at = {time: rate({"yaml": {"schedular": plan}, "options": {"sched_t": time}}) for time in (0, 3, 19, 20, 21, 35)}
    warm = {time: 1e-5 + time * 9e-5 / 20 for time in (0, 3, 19, 20)}
    halves = {21: 0.5 * (1 + torch.cos(torch.tensor(torch.pi / 30, dtype=torch.float64)).item()), 35: 0.5}
    assert at == pytest.approx(warm | {time: 1e-6 + 9.9e-5 * part for time, part in halves.items()}, rel=1e-12)
