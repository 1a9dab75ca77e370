"""Runs retrieval cases of another size than the shared one, and changed ones that must not pass."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "vilt" / "irtr_eval"


@pytest.fixture
def smaller(tmp_path):
    """Runs the case with five images and the texts given alone; `change` alters the inputs."""

    def run_with(texts: list[int], change=lambda inputs: None):
        for name in ("checkpoint.ckpt", "config.json"):
            shutil.copy(GOLDEN / name, tmp_path)
        inputs = load_file(GOLDEN / "inputs.safetensors")
        scores = load_file(GOLDEN / "outputs.safetensors")["scores"][:5, texts].contiguous()
        inputs = {name: value[texts] if name.startswith("text") else value[:5] for name, value in inputs.items()}
        change(inputs)
        save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "inputs.safetensors")
        owners = inputs["text_image_index"]
        first = (scores.argmax(dim=0) == owners).float().mean()
        save_file({"scores": scores, "ir_r1": first}, tmp_path / "outputs.safetensors")
        return run("vilt", "irtr_eval", tmp_path)

    return run_with


def test_other_numbers_of_images_and_texts(smaller):
    assert smaller([6, 1, 0, 3]).passed  # image 1 has no text among them


def test_texts_of_other_images_give_other_scores(smaller):
    def swap(inputs):
        inputs["text_ids"] = inputs["text_ids"].flip(0)

    assert not smaller([6, 1, 0, 3], swap).passed


def test_a_picture_of_another_size_gives_other_scores(smaller):
    def cut(inputs):
        inputs["image_sizes"] = torch.where(inputs["image_sizes"] == 48, 40, inputs["image_sizes"])

    assert not smaller([6, 1, 0, 3], cut).passed
