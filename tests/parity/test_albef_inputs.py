"""Input cases of ALBEF with less in them, other numbers, and faults that must be found."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "albef"


@pytest.fixture
def copied(tmp_path):
    def copy(kind: str) -> Path:
        folder = Path(shutil.copytree(GOLDEN / kind, tmp_path / f"{kind}_b"))
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        return folder

    return copy


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def failed(kind: str, folder: Path) -> set[str]:
    return {line.name for line in run("albef", kind, folder).lines if line.verdict == "FAIL"}


def test_operations_with_less_and_with_faults(copied):
    folder = copied("image_transform")
    outputs = {name: pixels for name, pixels in load_file(folder / "outputs.safetensors").items() if "op." in name}
    outputs["op.Color.M7"][0, 0, 0] += 1 - 2 * (outputs["op.Color.M7"][0, 0, 0] == 255)  # within its bound
    save_file(outputs, folder / "outputs.safetensors")
    edit(folder / "config.json", lambda config: [config.pop(name) for name in ("cases", "mean", "std", "used_ops")])
    assert not failed("image_transform", folder)
    outputs["op.Color.M3"][0, 0, 0] ^= 2
    outputs["op.Rotate.M7"][3, 3, 0] ^= 1
    save_file(outputs, folder / "outputs.safetensors")
    edit(folder / "config.json", lambda config: config["ops"].update({"op.ShearX.M3": [0.1, [128, 128, 0]]}))
    faults = {"op.Color.M3", "op.Rotate.M7", "config.json: op.ShearX.M3", "config.json: op.ShearX.M3: fill"}
    assert failed("image_transform", folder) == faults


def test_training_transforms_with_other_steps(copied):
    folder = copied("image_transform")

    def change(config):
        config["magnitude"] = 3  # the values of the steps are those of 7
        config["cases"][3]["flip"] = False  # pretrain1
        config["cases"][4]["crop_top_left_h_w"][0] += 1  # train1
        config["used_ops"].reverse()

    edit(folder / "config.json", change)
    stages = ("after_crop_resize_uint8", "after_randaugment_uint8", "final")
    assert failed("image_transform", folder) == {
        "config.json: used_ops",
        *(f"config.json: {name}0: steps" for name in ("pretrain", "train", "grounding")),
        *(f"{name}0.{stage}" for name in ("pretrain", "train", "grounding") for stage in stages[1:]),
        *(f"pretrain1.{stage}" for stage in stages[1:]),
        *(f"train1.{stage}" for stage in stages),
    }


def test_texts_with_other_options_and_with_faults(copied):
    folder = copied("text_processing")
    text = json.loads((folder / "text.json").read_text("utf-8"))
    name = next(name for name in text if name.startswith("pretrain"))
    short = {kind: [row[:7] for row in rows] for kind, rows in text[name].items()}
    edit(folder / "text.json", lambda t: t.update({"short (padding=longest, truncation, max_length=7)": short}))
    edit(folder / "text.json", lambda t: [t.pop(name), t.pop("tokens"), t["pre_caption"].pop("5")])
    assert not failed("text_processing", folder)

    def change(t):
        t["raw"][0] += " dog"
        t["answers_raw"][0] = "no"

    edit(folder / "text.json", change)
    faults = failed("text_processing", folder)
    assert {"text.json: pre_caption: 30", "text.json: pre_question: 5"} & faults == {"text.json: pre_caption: 30"}
    assert {entry.partition(" (")[0].removeprefix("text.json: ") for entry in faults if "input_ids" in entry} == {
        "retrieval_train/grounding_train",
        "retrieval_eval",
        "nlvr/ve",
        "vqa_eval_question",
        "vqa_answers",
    }
