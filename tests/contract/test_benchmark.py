"""The benchmark runs, measures every row it promises, and compares only what computes the same. No timings are judged."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BY_DTYPE = ("image", "text", "step", "rn50")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[str, dict]:
    """What `benchmark.py clip --small` prints, and its JSON."""
    output = tmp_path_factory.mktemp("benchmark") / "bench.json"
    command = [sys.executable, EXAMPLES / "benchmark.py", "clip", "--small", "--threads", "1", "--output", output]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules beside the script, which finds them because it lies in their folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("benchmarks.clip"), importlib.import_module("benchmarks.measure")


def test_every_row_is_measured(measured, benchmarks):
    records = measured[1]["rows"]
    assert {record["name"] for record in records} == set(benchmarks[0].ROWS)
    for name in BY_DTYPE:
        assert {record["dtype"] for record in records if record["name"] == name} == set(DTYPES)
    for row in {record["row"] for record in records}:
        contenders = [record["contender"] for record in records if record["row"] == row]
        assert "plain" in contenders and any(name.startswith("ours") for name in contenders), row
    both = {record["contender"] for record in records if record["name"] == "step"}
    assert {"ours sdpa", "ours eager", "transformers sdpa", "transformers eager"} <= both


def test_numbers_are_positive(measured):
    for record in measured[1]["rows"]:
        assert record["value"] > 0 and record["ratio"] > 0, record
        assert record["contender"] != "plain" or record["ratio"] == 1.0
        if record["name"] in BY_DTYPE:
            assert record["ms"] > 0 and record["mfu"] > 0 and record["ceiling_gflops"] > 0, record


def test_table_has_every_line(measured):
    printed, result = measured
    for record in result["rows"]:
        assert f"{record['row']}{' ' + record['dtype'] if record['dtype'] else ''}" in printed
        assert record["contender"] in printed


def row_of(measure, other: float, **options):
    contenders = {
        "plain": measure.Contender(lambda call: torch.tensor([1.0, 2.0])),
        "ours": measure.Contender(lambda call: torch.tensor([1.0, other]), **options),
    }
    return measure.TimedRow("a row", "pictures", 2, contenders, by_dtype=False)


def test_refuses_to_time_what_computes_something_else(benchmarks):
    measure = benchmarks[1]
    settings = measure.Settings(repeat=2, small=True)
    assert len(row_of(measure, 2.0001).measure(settings)) == 2
    with pytest.raises(AssertionError, match="a row: ours differs from the plain formulation by 5.0e-04"):
        row_of(measure, 2.001).measure(settings)
    with pytest.raises(AssertionError, match="differs"):
        row_of(measure, float("nan")).measure(settings)
    assert len(row_of(measure, 2.001, tolerance=1e-2).measure(settings)) == 2


def test_counts_the_matmuls_forward_and_backward(benchmarks):
    left = torch.empty(3, 5, device="meta", requires_grad=True)
    right = torch.empty(5, 7, device="meta", requires_grad=True)
    assert benchmarks[1].count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert benchmarks[1].count_flops(lambda: (left @ right).sum().backward()) == 3 * (2 * 3 * 5 * 7)


def test_real_captions_have_the_stated_lengths(benchmarks):
    clip, measure = benchmarks
    everyone = clip.Everyone(measure.Settings(batch=16, small=True))
    ids, mask = everyone.captions(real=True)
    lengths = mask.sum(dim=1)
    assert ids.shape == (16, 77) and 14 <= lengths.float().mean() <= 15 and lengths.max() == 22
    ends = (ids == everyone.config.text_config.eos_token_id).int().argmax(dim=1)
    assert torch.equal(ends, lengths - 1)
    assert clip.cut(ids, mask)[0].shape == (16, 22)
    assert everyone.captions(real=False)[1].min() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--rows", "image,txt"], "clip has no txt"), (["--batch", "0"], "give 1 or more"), (["--device", "tpu"], "tpu")],
)
def test_bad_options_are_named(benchmarks, monkeypatch, capsys, options, message):
    script = importlib.import_module("benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "clip", *options])
    with pytest.raises(SystemExit):
        script.arguments()
    assert message in capsys.readouterr().err
