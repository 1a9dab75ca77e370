"""Region data sets in the other layouts of their files; and one that is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "vse" / "region_dataset"


@pytest.fixture
def folder(tmp_path):
    """The case as the evaluation files have it: each image five times, with ids."""
    shutil.copytree(GOLDEN, tmp_path / "case")
    folder = tmp_path / "case"
    (split,) = (path.name.removesuffix("_ims.npy") for path in folder.glob("precomp/*_ims.npy"))
    features = np.load(folder / "precomp" / f"{split}_ims.npy").repeat(5, axis=0)
    (folder / "precomp" / f"{split}_ims.npy").unlink()
    (folder / "precomp" / f"{split}_caps.txt").rename(folder / "precomp" / "dev_caps.txt")
    np.save(folder / "precomp" / "dev_ims.npy", features)
    ids = np.arange(len(features)) // 5 + 700
    (folder / "precomp" / "dev_ids.txt").write_text("".join(f"{name}\n" for name in ids))
    outputs = load_file(GOLDEN / "outputs.safetensors")
    outputs["eval.image_index"] = load_file(folder / "inputs.safetensors")["indices"]
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "config.json").write_text(json.dumps({"images_in_file": len(features), "captions": len(features)}))
    return folder


def failed(case):
    return [line.name for line in case.lines if line.verdict == "FAIL"]


def test_each_image_five_times(folder):
    case = run("vse", "region_dataset", folder)
    assert case.passed, failed(case)


def test_other_draws_fail(folder):
    inputs = load_file(folder / "inputs.safetensors")
    inputs["region_draws"] = 1 - inputs["region_draws"]
    save_file(inputs, folder / "inputs.safetensors")
    assert failed(run("vse", "region_dataset", folder)) == ["train.images", "train.image_lengths"]


def test_other_captions_and_images_fail(folder):
    captions = (folder / "precomp" / "dev_caps.txt").read_text("utf-8").splitlines()
    (folder / "precomp" / "dev_caps.txt").write_text("".join(f"{line} cat\n" for line in captions), "utf-8")
    features = np.load(folder / "precomp" / "dev_ims.npy")
    np.save(folder / "precomp" / "dev_ims.npy", features + 1)
    names = failed(run("vse", "region_dataset", folder))
    assert {"eval.images", "eval.captions", "train.images", "train.caption_lengths"} <= set(names)
