"""Cases of ViLT's texts with less in them, and with faults that must be found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "vilt" / "text_processing"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "text_processing_b"))


def change(folder, name, edit):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def failed(folder):
    return [line.name for line in run("vilt", "text_processing", folder).lines if line.verdict == "FAIL"]


def test_a_case_of_padded_rows_alone_and_without_tokens(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    count = len(config["strings"])

    def keep(tensors):
        for name in tensors:
            tensors[name] = tensors[name][:count].clone()

    change(folder, "inputs.safetensors", keep)
    change(folder, "outputs.safetensors", keep)
    groups = json.loads((folder / "wwm_shuffled_candidates.json").read_text("utf-8"))
    (folder / "wwm_shuffled_candidates.json").write_text(json.dumps(groups[:count]))
    del config["tokens"]
    (folder / "config.json").write_text(json.dumps(config))
    case = run("vilt", "text_processing", folder)
    assert case.passed and sum(line.verdict == "ok" for line in case.lines) == 6


def test_wrong_masks_and_orders_are_found(folder):
    def wrong(tensors):
        tensors["plain.labels"][0, 0] = 5

    change(folder, "outputs.safetensors", wrong)
    assert failed(folder) == ["plain.labels"]
    groups = json.loads((folder / "wwm_shuffled_candidates.json").read_text("utf-8"))
    (folder / "wwm_shuffled_candidates.json").write_text(json.dumps([row[::-1] for row in groups]))
    assert failed(folder) == ["wwm.input_ids", "wwm.labels", "plain.labels"]


def test_a_draw_that_was_not_recorded_is_found(folder):
    change(
        folder, "inputs.safetensors", lambda tensors: tensors.update({"wwm.replace_draw": torch.zeros(14, 40).long()})
    )
    assert failed(folder) == ["wwm.input_ids"]
