"""Evaluations on two processes find what one finds, and each pair is scored by one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Number of processes -> what each of them found."""
    found = {}
    for processes in (1, 2):
        output = tmp_path_factory.mktemp("pairs") / "found"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, *launcher, str(Path(__file__).with_name("pair_scoring_worker.py")), str(output)],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = [load_file(f"{output}.{rank}of{processes}") for rank in range(processes)]
    return found


@pytest.mark.parametrize("name", ["whole", "two-stage", "one-image", "own-candidates", "one-image-apart", "resumed"])
def test_two_processes_find_what_one_finds(runs, name):
    (one,), two = runs[1], runs[2]
    for found in two:
        torch.testing.assert_close(found[f"{name}.scores"], one[f"{name}.scores"], rtol=0, atol=1e-6)
        assert torch.equal(found[f"{name}.metrics"], one[f"{name}.metrics"])
    assert torch.equal(two[0][f"{name}.scores"], two[1][f"{name}.scores"])


def test_each_pair_is_scored_by_one_process(runs):
    counts = {"whole": 147, "two-stage": None, "one-image": 3, "own-candidates": None, "one-image-apart": 3}
    for name, pairs in counts.items():
        parts = [set(map(tuple, found[f"{name}.scored"].tolist())) for found in runs[2]]
        assert not parts[0] & parts[1]
        (alone,) = (found[f"{name}.scored"] for found in runs[1])
        assert sum(len(found[f"{name}.scored"]) for found in runs[2]) == len(alone) == len(parts[0] | parts[1])
        assert pairs in (None, len(alone))
        assert (len(parts[1]) > 0) == (not name.startswith("one-image"))


def test_a_stopped_run_of_two_processes_goes_on(runs):
    assert [int(found["parts"]) for found in runs[2]] == [2, 2] and int(runs[1][0]["parts"]) == 1
    assert [int(found["files"]) for found in runs[2]] == [1, 1]
    rest = [len(found["resumed.scored"]) for found in runs[2]]
    assert sum(rest) == 147 - 2 * 6 - 3 * 6  # what batches of six had been scored on each
    torch.testing.assert_close(runs[2][0]["resumed.scores"], runs[1][0]["whole.scores"], rtol=0, atol=1e-6)


def test_questions_are_answered_once_and_in_order(runs):
    for found in runs[2]:
        assert torch.equal(found["answers.logits"], runs[1][0]["answers.logits"])
    assert not torch.equal(runs[1][0]["answers.logits"], runs[1][0]["answers.logits"].flip(0))


def test_phrases_are_found_once_and_in_order(runs):
    for found in runs[2]:
        for name in ("scores", "chosen", "metrics"):
            assert torch.equal(found[f"grounding.{name}"], runs[1][0][f"grounding.{name}"])
    assert len(runs[1][0]["grounding.scores"]) == 6 and len(runs[1][0]["grounding.chosen"].unique(dim=0)) == 3
