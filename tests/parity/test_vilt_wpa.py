"""Word-patch alignment cases of other sizes, with values from plain loops: they pass, and a value that is off does not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_vlp.objectives.word_patch_alignment import cosine_cost
from tests.objectives.test_word_patch_alignment import plain_ipot
from tests.parity.harness import run

CONFIG = {"beta": 0.3, "iteration": 17, "k": 1, "weight": 0.2}


def write_case(folder, **changes):
    """Two pairs of 4 x 6 places, the first whole, the second padded; `changes` replace outputs or, as `config`, its entries."""
    draw = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, 4, 12, generator=draw), torch.randn(2, 6, 12, generator=draw)
    text_pad = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 1]])
    image_pad = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1]])
    cost = cosine_cost(text, image)
    used = [((1 - text_pad[row]).tolist(), (1 - image_pad[row]).tolist()) for row in range(2)]

    def plans(beta, iterations):
        return torch.tensor([plain_ipot(cost[row].tolist(), *used[row], beta, iterations) for row in range(2)])

    def distances(plan):
        return (cost * plan.transpose(1, 2)).sum(dim=(1, 2))

    plan, config = plans(CONFIG["beta"], CONFIG["iteration"]), CONFIG | changes.pop("config", {})
    distance = distances(plan)
    loss = (distance[1] - distance[0]) / 2
    outputs = {"cost_unmasked": cost, "plan": plan, "plan_visualisation": plans(0.1, 1000)}
    outputs |= {"distance": distance, "trace": distance.clone(), "ot_loss": loss, "wpa_loss": CONFIG["weight"] * loss}
    outputs |= {"distance_beta025_it7": distances(plans(0.25, 7)), "distance_beta2_it1": distances(plans(2, 1))}
    inputs = {"txt": text, "img": image, "txt_pad": text_pad, "img_pad": image_pad}
    save_file(inputs | {"itm_labels": torch.tensor([0, 1])}, folder / "inputs.safetensors")
    save_file(outputs | changes, folder / "outputs.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return outputs


def test_other_sizes_and_settings_pass(tmp_path):
    outputs = write_case(tmp_path)
    case = run("vilt", "wpa_ipot", tmp_path)
    assert case.passed, "\n".join(map(str, case.lines))
    assert {line.name for line in case.lines if line.verdict == "ok"} == set(outputs)


@pytest.mark.parametrize("name", ["plan", "plan_visualisation", "distance_beta025_it7", "trace", "wpa_loss"])
def test_a_value_that_is_off_does_not(tmp_path, name):
    off = write_case(tmp_path)[name] + 2e-5
    write_case(tmp_path, **{name: off})
    case = run("vilt", "wpa_ipot", tmp_path)
    assert [line.name for line in case.lines if line.verdict == "FAIL"] == [name]


def test_settings_are_taken_from_the_configuration(tmp_path):
    write_case(tmp_path, config={"iteration": 3})
    failed = {line.name for line in run("vilt", "wpa_ipot", tmp_path).lines if line.verdict == "FAIL"}
    assert failed == {"plan", "distance", "trace", "ot_loss", "wpa_loss"}
    write_case(tmp_path, config={"k": 2})
    assert any("only one inner step exists" in line.note for line in run("vilt", "wpa_ipot", tmp_path).lines)
