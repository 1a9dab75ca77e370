"""Input cases of VSE-infinity with less in them, and with faults that must be found."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "vse"


@pytest.fixture
def copied(tmp_path):
    return lambda kind: Path(shutil.copytree(GOLDEN / kind, tmp_path / f"{kind}_b"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("kind", ["caption_processing_bert", "caption_processing_bigru"])
def test_captions_of_a_case_with_less_and_with_faults(kind, copied):
    folder = copied(kind)
    for name in ("eval.json", "outputs.safetensors", "train_caps.txt", "config.json"):
        (folder / name).unlink(missing_ok=True)
    assert run("vse", kind, folder).passed
    edit(folder / "train.json", lambda entries: entries[3]["ids"].append(2))
    case = run("vse", kind, folder)
    assert [line.name for line in case.lines if line.verdict == "FAIL"] == ["train.json: 3: ids"]
    edit(folder / "train.json", lambda entries: entries[3].update(ids=[], unheard_of=1))
    assert not run("vse", kind, folder).passed


def test_vocabularies_and_batches_that_differ(copied):
    folder = copied("caption_processing_bigru")
    edit(folder / "config.json", lambda config: config.update(threshold=1))
    failed = {line.name for line in run("vse", folder.name[:-2], folder).lines if line.verdict == "FAIL"}
    assert failed == {"vocab.json: word2idx", "vocab.json: idx2word", "vocab.json: idx"}
    edit(folder / "config.json", lambda config: config.update(threshold=2, image_lengths=[4, 3, 2, 4, 3, 2]))
    failed = {line.name for line in run("vse", folder.name[:-2], folder).lines if line.verdict == "FAIL"}
    assert failed == {"collated.image_lengths"}


def test_pictures_without_training_and_with_a_wrong_pixel(copied):
    folder = copied("image_processing")
    outputs = {name: pixels for name, pixels in load_file(folder / "outputs.safetensors").items() if "eval" in name}
    edit(folder / "config.json", lambda config: config.pop("base_target_size"))
    save_file(outputs, folder / "outputs.safetensors")
    assert run("vse", "image_processing", folder).passed
    outputs["eval.detector.1"][0, 5, 5] += 1e-3
    save_file(outputs, folder / "outputs.safetensors")
    failed = {line.name for line in run("vse", "image_processing", folder).lines if line.verdict == "FAIL"}
    assert failed == {"VlpVseImageProcessor: eval.detector.1", "VlpVseImageProcessorPil: eval.detector.1"}
