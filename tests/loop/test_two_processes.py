import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.loop.two_processes_worker import READ_BOTH, TERMS

ROOT = Path(__file__).parents[2]


def launch(processes: int, output: Path) -> dict[str, torch.Tensor]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("two_processes_worker.py")), str(output)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return {count: launch(count, folder / f"{count}.safetensors") for count in (1, 2)}


QUEUE = ("image_features", "text_features", "image_ids", "position")
CLIP = [f"clip-{objective}-{step}" for objective in ("softmax", "sigmoid") for step in ("plain", "cached")]
VSE = [f"vse-{form}-{step}" for form in ("hardest", "mixed") for step in ("plain", "cached")]
FROZEN = ["frozen-plain", "frozen-cached"]
STREAM = [*READ_BOTH, *(f"terms-{name}" for name in TERMS), "terms-words"]


@pytest.mark.parametrize("step", ["plain", "cached", "accumulated", *CLIP, *VSE, *FROZEN, *STREAM])
def test_two_processes_equal_one_with_the_whole_batch(runs, step):
    names = [name for name in runs[1] if name.startswith(f"{step}.")]
    assert len(names) > 10
    for name in names:
        torch.testing.assert_close(
            runs[2][name], runs[1][name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_comparison_can_fail(runs):
    one, other = (
        {k.split(".", 1)[1]: v for k, v in runs[2].items() if k.startswith(step)} for step in ("plain", "accum")
    )
    assert (one["visual_projection.weight"] - other["visual_projection.weight"]).abs().max() > 1e-3
    for step in ("plain", "cached"):
        assert runs[1][f"{step}.loss0"] != runs[1][f"{step}.loss3"]
    for step in CLIP + VSE + FROZEN + STREAM:
        assert runs[1][f"{step}.loss0"] != runs[1][f"{step}.loss1"]
    one, other = (
        runs[2][f"clip-{objective}-plain.clip.visual_projection.weight"] for objective in ("softmax", "sigmoid")
    )
    assert (one - other).abs().max() > 1e-3
    one, other = (runs[2][f"vse-{form}-plain.vse.visual_projection.weight"] for form in ("hardest", "mixed"))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("step", ["plain", "cached"])
def test_processes_that_keep_their_negatives_apart_take_another_step(runs, step):
    local, weight = f"vse-local-{step}", "vse.visual_projection.weight"
    assert torch.equal(
        runs[1][f"{local}.{weight}"], runs[1][f"vse-hardest-{step}.{weight}"]
    )  # one process has no others
    assert (runs[2][f"{local}.{weight}"] - runs[1][f"{local}.{weight}"]).abs().max() > 1e-3
    # three pairs have fewer negatives than six, and the loss is a sum over the pairs of a process
    assert runs[2][f"{local}.loss0"] < 0.6 * runs[1][f"{local}.loss0"]


@pytest.mark.parametrize("step", FROZEN)
def test_a_frozen_tower_has_no_gradients_on_any_number_of_processes(runs, step):
    for count in (1, 2):
        had = [runs[count][f"{step}.gradients{number}"].tolist() for number in range(4)]
        (none, one, some, every), whole = [pair[0] for pair in had], had[0][1]
        assert none == one == 0 < some < every == whole


@pytest.mark.parametrize("processes", [1, 2])
def test_the_loss_of_a_collapsed_model_is_known_for_global_and_local_negatives(runs, processes):
    for negatives, pairs in (("global", 6), ("local", 6 // processes)):
        loss, told = (runs[processes][f"collapsed.{negatives}.{name}"].item() for name in ("loss", "told"))
        # each of the pairs loses twice: a quarter over all others, three quarters once
        assert loss == pytest.approx(told) == pytest.approx(2 * 0.2 * pairs * (0.25 * (pairs - 1) + 0.75))


@pytest.mark.parametrize("step", ["plain", "cached"])
def test_processes_evaluate_with_the_same_batch_statistics(runs, step):
    trained, evaluated = (runs[2][f"statistics.{step}.{when}"] for when in ("trained", "evaluated"))
    assert evaluated.shape == (2, 8) and torch.equal(evaluated[0], evaluated[1])
    assert torch.equal(evaluated[0], trained[0])  # those of the first process, which are saved
    # the plain step's forward shares them before it adds to them
    assert torch.equal(trained[0], trained[1]) == (step == "cached")
    assert not torch.equal(runs[1][f"statistics.{step}.evaluated"][0], evaluated[0])


def test_the_queue_of_two_processes_is_that_of_one_with_the_whole_batch(runs):
    one, two, reverse = (
        {
            name: runs[count][f"queue-{order}.{name}"]
            for name in ("image_features", "text_features", "image_ids", "position")
        }
        for count, order in ((1, "ranks"), (2, "ranks"), (2, "reverse"))
    )
    assert one["image_features"][:, 0].tolist() == [10, 11, 7, 8, 9] and one["image_ids"].tolist() == [
        -100,
        -100,
        7,
        -100,
        -100,
    ]
    assert one["position"] == reverse["position"] == 2
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], reverse[name]) for name in one if name != "position")


def test_processes_write_the_same_queue_though_none_sends_it(runs):
    one, two = ({name: runs[count][f"aligned.{name}"] for name in QUEUE} for count in (1, 2))
    assert runs[1]["aligned.sends"] == runs[2]["aligned.sends"] == 0
    for name in QUEUE:
        assert len(one[name]) == 1 and len(two[name]) == 2
        assert torch.equal(two[name][0], two[name][1]), name
    for name in ("image_features", "text_features"):  # of the first step, before the processes' own pairs taught them
        torch.testing.assert_close(two[name][0, :4], one[name][0, :4], rtol=1e-5, atol=1e-6)
    assert torch.equal(two["image_ids"][0], one["image_ids"][0]) and two["position"][0] == one["position"][0] == 8
    assert not torch.allclose(two["text_features"][0, :4], two["text_features"][0, 4:8], atol=1e-2)


def test_gathered_rows_and_their_gradient(runs):
    assert runs[2]["gathered"][:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    # the sum over processes: (1 + 2) * the weight of the row
    assert runs[2]["gather_gradient"][:, 0].tolist() == [3.0, 6.0, 9.0, 12.0]
    assert runs[1]["gathered"][:, 0].tolist() == [1.0, 1.0]
    assert runs[1]["gather_gradient"][:, 0].tolist() == [1.0, 2.0]
