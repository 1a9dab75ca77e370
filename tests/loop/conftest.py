"""What tests of recipes share: the scripts of the examples, run as a user runs them."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs a recipe of the repository by its script, in an empty folder: (name, words behind it) -> what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script

    def run(name, *words):
        recipe = EXAMPLES / "configs" / f"{name}.yaml"
        task = yaml.safe_load(recipe.read_text()).get("task")
        file = "pretrain.py" if task in (None, "text_assignment") else "finetune.py"
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"examples/{file}", "--config", str(recipe), *words])
        try:
            runpy.run_path(str(EXAMPLES / file), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return run
