"""Every golden case of every architecture through the procedure of its kind."""

from pathlib import Path

import pytest
import torch

from tests.parity.clip_model import Checkpoint
from tests.parity.harness import ARCHITECTURES, Case, find_kind, run

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    (name, folder.name) for name in ARCHITECTURES for folder in sorted((GOLDEN / name).iterdir()) if folder.is_dir()
]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_case(architecture, kind):
    case = run(architecture, kind, GOLDEN / architecture / kind)
    assert case.passed, "\n".join(str(line) for line in case.lines if line.verdict == "FAIL")


def test_the_goldens_are_here():
    assert len(CASES) >= 12


@pytest.mark.parametrize("kind", ["vit", "vit_multihead", "resnet"])
def test_pooling_at_the_end_token_agrees_where_there_is_one(kind):
    case = Case(GOLDEN / "clip" / kind, find_kind("clip", kind))
    text, end = case.inputs["text"], case.config["eot_token_id"]
    rows = (text == end).any(dim=1)
    assert rows.any()
    clip = Checkpoint(case.folder / "checkpoint.pt", case.config, pooling="eos").model().clip
    assert clip.config.text_config.eos_token_id == end
    with torch.no_grad():
        features = clip.encode_text(text[rows])
        positions = clip.text_model.end_of_text(text[rows])
    assert torch.equal(positions, case.outputs["text.pool_index"][rows])
    torch.testing.assert_close(features, case.outputs["text_features"][rows], atol=2e-5, rtol=0)
    # the sibling: another row's end is another place, and another place gives other features
    assert (features[0] - features[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_rows_without_an_end_token_need_the_rule_of_the_original(kind):
    case = Case(GOLDEN / "clip" / kind, find_kind("clip", kind))
    rows = ~(case.inputs["text"] == case.config["eot_token_id"]).any(dim=1)
    assert rows.any()
    clip = Checkpoint(case.folder / "checkpoint.pt", case.config, pooling="eos").model().clip
    with pytest.raises(ValueError, match="no end-of-text"):
        clip.encode_text(case.inputs["text"][rows])
