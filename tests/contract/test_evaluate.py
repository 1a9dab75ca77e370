"""examples/evaluate.py as a user runs it, and what it records of how a number was measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hf_vlp.evaluation.provenance import command, conditions, shortened
from tests.contract.tiny import save_tiny_clip

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "evaluate.py"
COLOURS = ("red", "green", "blue", "black", "white", "gray")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, tmp_path_factory):
    """Runs the script in a folder with six pictures and returns what results.json holds then."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny_clip(tmp_path / "tiny")
    for colour in COLOURS:
        Image.new("RGB", (9, 7), colour).save(f"{colour}.png")

    def run(*words) -> list[dict]:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "tiny", *words])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return json.loads(Path("tiny/results.json").read_text())

    return run


def write_rows(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_karpathy_splits_and_their_first_captions(evaluate):
    def entry(number, colour, split):
        sentences = [{"raw": f"{colour} {word}"} for word in ("apple", "face", "ship", "boat")[: 2 + number % 3]]
        return {"filename": f"{colour}.png", "split": split, "cocoid": number, "sentences": sentences}

    images = [entry(i, colour, "train" if i < 2 else "test") for i, colour in enumerate(COLOURS)]
    Path("split").mkdir()
    Path("split/dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    shared = ["--task", "retrieval", "--data", "split/dataset_coco.json", "--image-root", ".", "--split", "test"]
    (result,) = evaluate(*shared, "--captions-per-image", "2")
    assert result["counts"]["images"] == 4 and result["counts"]["captions"] == 8
    assert "the first 2 captions of each image" in result["protocol"]
    first, whole = evaluate(*shared)
    assert first == result and whole["counts"]["captions"] == 4 + 2 + 3 + 4
    with pytest.raises(ValueError, match="5,000 images"):
        evaluate(*shared, "--five-fold")
    with pytest.raises(ValueError, match="captions, 5 are asked for"):
        evaluate(*shared, "--captions-per-image", "5")


def test_a_number_never_replaces_one_of_another_precision(evaluate):
    write_rows("pairs.jsonl", [{"image": f"{colour}.png", "caption": f"a {colour} ship"} for colour in COLOURS])
    words = ["--task", "retrieval", "--data", str(Path("pairs.jsonl").resolve())]
    evaluate(*words)
    evaluate(*words)  # in place of the first
    plain, low = evaluate(*words, "--bf16")
    assert plain["protocol"].endswith(", float32, torchvision pictures")
    assert low["protocol"].endswith(", bfloat16 autocast, torchvision pictures")
    assert plain["data"] == low["data"] == "pairs.jsonl"
    assert low["command"] == "python examples/evaluate.py tiny --task retrieval --data pairs.jsonl --bf16"


def test_a_probe_refuses_labels_that_it_never_saw(evaluate):
    def write(name, labels):
        write_rows(name, [{"image": f"{c}.png", "caption": c, "label": label} for c, label in zip(COLOURS, labels)])

    # as texts "10" stands before "2": the number 2 would be scored as the third class
    write("train.jsonl", [2, 10, 30, 2, 10, 30])
    write("same.jsonl", [30, 10, 2, 30, 10, 2])
    write("other.jsonl", [0, 1, 2, 0, 1, 2])
    words = ["--task", "linear-probe", "--train", "train.jsonl"]
    (result,) = evaluate(*words, "--data", "same.jsonl")
    assert result["counts"]["classes"] == 3
    with pytest.raises(SystemExit, match=r"the labels 0, 1 are none of the 3 classes \(10, 2, 30\)"):
        evaluate(*words, "--data", "other.jsonl")
    Path("names.txt").write_text("red apple\nface\nship\n")
    zero_shot = evaluate("--task", "zero-shot", "--data", "other.jsonl", "--classes", "names.txt")[-1]
    assert zero_shot["counts"]["classes"] == 3  # names in order: numbers count in it


def test_the_command_is_honest_and_without_paths_of_the_machine(tmp_path, monkeypatch):
    inside, outside = ROOT / "examples" / "data" / "emoji" / "test.parquet", tmp_path / "far" / "pairs.jsonl"
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "me/clip", "--data", str(inside), f"--train={outside}", "--prompt", "a {}"]
    )
    rest = (
        "examples/evaluate.py me/clip --data examples/data/emoji/test.parquet --train=.../pairs.jsonl --prompt 'a {}'"
    )
    assert command() == f"python {rest}"
    assert command(4) == f"accelerate launch --num_processes 4 {rest}"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command() == f"accelerate launch {rest}"
    monkeypatch.chdir(ROOT / "examples")
    assert shortened("data/emoji/test.parquet") == shortened(inside) == "examples/data/emoji/test.parquet"
    assert shortened("pairs.jsonl") == "pairs.jsonl" and shortened("../absent/x.jsonl") == "../absent/x.jsonl"
    monkeypatch.chdir(tmp_path)
    assert shortened(outside) == "far/pairs.jsonl"


def test_precision_and_backend():
    from hf_vlp import VlpClipImageProcessor, VlpClipImageProcessorPil

    layer = torch.nn.Linear(2, 2)
    assert conditions(layer, VlpClipImageProcessor()) == "float32, torchvision pictures"
    assert conditions(layer, VlpClipImageProcessorPil(), torch.float16) == "float16 autocast, pil pictures"
    assert conditions(layer.bfloat16(), VlpClipImageProcessor()) == "bfloat16, torchvision pictures"
