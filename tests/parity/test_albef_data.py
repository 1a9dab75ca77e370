"""Runs cases of lists, measures and schedules of other sizes than the shared ones, and changed ones that must not pass."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "albef"


def recalls_by_hand(scores, positives):
    """Recalls in percent where the highest score comes first, and of equal ones the one that stands last."""
    ranks = []
    for row, right in zip(scores.tolist(), positives):
        order = sorted(range(len(row)), key=lambda place: (row[place], place), reverse=True)
        ranks.append(min((order.index(place) for place in right), default=len(order)))
    return [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]


@pytest.fixture
def tied(tmp_path):
    """Runs a case of four images, one without a text, and eleven texts, whose scores are few numbers; `change` alters what is stored."""

    def run_with(change=lambda outputs: None):
        generator = torch.Generator().manual_seed(3)
        of_text = torch.tensor([0, 0, 1, 3, 1, 0, 3, 3, 3, 1, 0])
        to_text = torch.randint(-1, 2, (4, 11), generator=generator).float()
        to_image = torch.randint(-1, 2, (11, 4), generator=generator).float()
        text = recalls_by_hand(to_text, [(of_text == image).nonzero().flatten().tolist() for image in range(4)])
        image = recalls_by_hand(to_image, [[owner] for owner in of_text.tolist()])
        found = {
            f"itm.{way}_r{k}": value
            for way, values in (("txt", text), ("img", image))
            for k, value in zip((1, 5, 10), values)
        }
        found |= {
            "itm.txt_r_mean": sum(text) / 3,
            "itm.img_r_mean": sum(image) / 3,
            "itm.r_mean": sum(text + image) / 6,
        }
        outputs = {name: torch.tensor(value) for name, value in found.items()}
        change(outputs)
        save_file({"scores_i2t": to_text, "scores_t2i": to_image, "txt2img": of_text}, tmp_path / "inputs.safetensors")
        save_file(outputs, tmp_path / "outputs.safetensors")
        (tmp_path / "metrics.json").write_text("{}")
        return run("albef", "metrics", tmp_path)

    return run_with


def test_recalls_with_ties(tied):
    assert tied().passed
    assert not tied(lambda outputs: outputs.update({"itm.img_r1": outputs["itm.img_r1"] + 1})).passed


@pytest.mark.parametrize("kind", ["datasets", "metrics", "schedule"])
def test_a_changed_number_does_not_pass(kind, tmp_path):
    folder = shutil.copytree(GOLDEN / kind, tmp_path / kind)
    assert run("albef", kind, folder).passed
    file = folder / f"{kind}.json"
    stored = json.loads(file.read_text())
    if kind == "datasets":
        stored["annotations"]["vqa_train"][0]["answer"][0] = "blue"
    elif kind == "metrics":
        stored["refs"][0]["bbox"][2] += 3
    else:
        stored["vqa"]["steps_per_epoch"] += 50
    file.write_text(json.dumps(stored))
    assert not run("albef", kind, folder).passed


def test_another_power_of_the_area_gives_other_scores(tmp_path):
    folder = shutil.copytree(GOLDEN / "metrics", tmp_path / "metrics")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"grounding_alpha": 1.0}))
    case = run("albef", "metrics", folder)
    assert not case.passed
    outputs, stored = load_file(folder / "outputs.safetensors"), json.loads((folder / "metrics.json").read_text())
    for ref in stored["refs"]:
        boxes = torch.tensor(stored["dets"][str(ref["image_id"])])
        outputs[f"proposal_scores_{ref['ref_id']}"] /= (boxes[:, 2] * boxes[:, 3]) ** 0.5
    save_file(outputs, folder / "outputs.safetensors")
    failed = {line.name for line in run("albef", "metrics", folder).lines if line.verdict == "FAIL"}
    assert not any(name.startswith(("proposal_scores", "upsampled", "itm")) for name in failed)
