"""Input cases of ViLT with less in them, other numbers, and faults that must be found."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "vilt"


@pytest.fixture
def copied(tmp_path):
    return lambda kind: Path(shutil.copytree(GOLDEN / kind, tmp_path / f"{kind}_b"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def failed(kind: str, folder: Path) -> set[str]:
    return {line.name for line in run("vilt", kind, folder).lines if line.verdict == "FAIL"}


def test_pictures_of_a_case_with_less_and_with_faults(copied):
    folder = copied("image_processing")
    (folder / "resize_table.json").unlink()
    edit(
        folder / "config.json",
        lambda config: [config.pop(name) for name in ("longer", "mean", "std", "divisor", "resample")],
    )
    outputs = load_file(folder / "outputs.safetensors")
    del outputs["processed_1_pillow13"]
    save_file(outputs, folder / "outputs.safetensors")
    assert not failed("image_processing", folder)
    outputs["processed_1"][0, 5, 5] += 1e-6
    outputs["pixel_mask"][4, 0, 95] = 1
    save_file(outputs, folder / "outputs.safetensors")
    assert failed("image_processing", folder) == {"processed_1", "pixel_mask"}
    save_file(outputs | {"unheard_of": outputs["pixel_mask"].clone()}, folder / "outputs.safetensors")
    assert "unheard_of" in failed("image_processing", folder)


def test_sizes_alone_and_with_a_fault(copied):
    folder = copied("image_processing")
    for name in ("config.json", "inputs.safetensors", "outputs.safetensors"):
        (folder / name).unlink()
    assert not failed("image_processing", folder)
    thin = next(
        row
        for row, entry in enumerate(json.loads((folder / "resize_table.json").read_text()))
        if entry["out_width"] == 0
    )
    edit(folder / "resize_table.json", lambda rows: (rows[0].update(out_width=480), rows[thin].update(out_width=32)))
    expected = {
        f"resize_table.json: {row}: {name}"
        for row, name in ((0, "out_width"), (thin, "out_width"), (thin, "out_height"))
    }
    assert failed("image_processing", folder) == expected


def test_operations_of_a_case_with_less_and_with_faults(copied):
    folder = copied("randaugment")
    outputs = {name: value for name, value in load_file(folder / "outputs.safetensors").items() if "seed" not in name}
    edit(folder / "config.json", lambda config: [config.pop(name) for name in ("sequences", "ops", "max_m")])
    save_file(outputs, folder / "outputs.safetensors")
    assert not failed("randaugment", folder)
    edit(folder / "config.json", lambda config: config.update(m=10))
    assert {"Rotate_pos", "Color_neg"} <= failed("randaugment", folder)
    outputs["Equalize_pos"][0, 0, 0] ^= 1
    save_file(outputs, folder / "outputs.safetensors")
    edit(folder / "config.json", lambda config: config.update(m=9))
    assert failed("randaugment", folder) == {"Equalize_pos"}


def test_a_table_and_sequences_that_differ(copied):
    folder = copied("randaugment")

    def change(config):
        config["ops"][2]["value_at_m9"] = 8.0
        config["sequences"][0]["ops"].reverse()
        config["sequences"][1]["seed"] += 100
        config["max_m"] = 10

    edit(folder / "config.json", change)
    assert failed("randaugment", folder) == {
        "config.json: ops: Rotate: value_at_m9",
        "config.json: sequences: 0: ops",
        "config.json: sequences: 1: ops",
        "randaug_seed1",
        "config.json: max_m",
    }
