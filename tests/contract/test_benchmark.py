"""The benchmark runs, measures every row it promises, and compares only what computes the same. No timings are judged."""

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BY_DTYPE = {
    "clip": ("image", "text", "step", "rn50"),
    "vse": ("step",),
    "albef": ("step", "ablation", "rerank", "answers"),
}
DTYPES = ("float32", "bfloat16")
STEPS = {
    "clip": {"ours sdpa", "ours eager", "transformers sdpa", "transformers eager"},
    "vse": {"ours sdpa", "ours eager"},
    "albef": {"ours sdpa", "ours eager"},
}
BATCH = {
    "clip": (),
    "albef": (),
    "vse": ("--batch", "36"),
}  # so many captions that they are computed in groups of similar length


@pytest.fixture(scope="module", params=BY_DTYPE)
def measured(request, tmp_path_factory) -> tuple[str, dict]:
    """What `benchmark.py ARCHITECTURE --small` prints, and its JSON."""
    output = tmp_path_factory.mktemp("benchmark") / "bench.json"
    command = [sys.executable, EXAMPLES / "benchmark.py", request.param, "--small", "--threads", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command += [*BATCH[request.param], "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules beside the script, which finds them because it lies in their folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("benchmarks.clip"), importlib.import_module("benchmarks.measure")


def test_every_row_is_measured(measured, benchmarks):
    architecture, records = measured[1]["architecture"], measured[1]["rows"]
    rows = importlib.import_module(f"benchmarks.{architecture}").ROWS
    assert {record["name"] for record in records} == set(rows)
    for name in BY_DTYPE[architecture]:
        assert {record["dtype"] for record in records if record["name"] == name} == set(DTYPES)
    for row in {record["row"] for record in records}:
        contenders = [record["contender"] for record in records if record["row"] == row]
        assert "plain" in contenders and any(name.startswith("ours") for name in contenders), row
    both = {record["contender"] for record in records if record["name"] == "step"}
    assert STEPS[architecture] <= both


def test_numbers_are_positive(measured):
    for record in measured[1]["rows"]:
        assert record["value"] > 0 and record["ratio"] > 0, record
        assert record["contender"] != "plain" or record["ratio"] == 1.0
        if record["name"] in BY_DTYPE[measured[1]["architecture"]]:
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


def test_the_pooling_is_compared_in_value_and_every_gradient(benchmarks, monkeypatch):
    vse, measure = importlib.import_module("benchmarks.vse"), benchmarks[1]
    settings = measure.Settings(batch=5, repeat=1, small=True)
    forward, trained = vse.gpo_rows(settings)
    numbers = trained.contenders["ours"].run(measure.Call())
    parameters = sum(parameter.numel() for parameter in vse.GeneralizedPooling().parameters())
    assert numbers.shape == (5 * 16 + 5 * 9 * 16 + parameters,) and forward.contenders.keys() == {"plain", "ours"}
    monkeypatch.setattr(vse.GeneralizedPooling, "temperature", 0.11)
    with pytest.raises(AssertionError, match="differs from the plain formulation"):
        trained.measure(settings)


def test_a_step_is_compared_without_dropout_and_runs_with_it(benchmarks):
    vse, measure = importlib.import_module("benchmarks.vse"), benchmarks[1]
    everyone = vse.Everyone(measure.Settings(batch=4, small=True))
    for loss in (
        lambda dropout: everyone.loss("eager", dropout),
        lambda dropout: everyone.plain_loss(everyone.weights, dropout, "cpu"),
    ):
        assert torch.equal(loss(False), loss(False)) and not torch.equal(loss(True), loss(True))
    lengths = everyone.region_lengths
    assert lengths.min() == 6 and lengths.max() == 9 and not everyone.regions[everyone.region_mask == 0].any()


@pytest.fixture
def albef_step(benchmarks):
    """A small step in training without dropout: step(way, draws, full) -> loss, gradients and what moved, by name.

    By a formulation, or by the model itself where `way` is None; `full`: with texts padded to their limit.
    """
    albef, plain = (importlib.import_module(f"benchmarks.{name}") for name in ("albef", "albef_plain"))
    everyone = albef.Everyone(benchmarks[1].Settings(batch=4, small=True))
    with torch.no_grad():
        for weight in everyone.first.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    batch = everyone.batch(real=True)

    def step(way, draws: torch.Tensor, full: bool) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(everyone.first).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout") and not isinstance(module.dropout, torch.nn.Module):
                module.dropout = 0.0
        words = albef.lengthened(batch) if full else batch
        if way is None:
            loss = model(**words, negative_draws=draws).loss
        else:
            loss = plain.pretraining_loss(model, words, draws, way)
        loss.backward()
        gradients = {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
        moved = {name: value for name, value in model.state_dict().items() if name.startswith(("teacher.", "queue."))}
        return {"loss": loss.detach(), **gradients, **moved}

    return step


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def test_albef_every_formulation_of_the_step_gives_the_same_loss_gradients_and_momentum(albef_step):
    plain, step = importlib.import_module("benchmarks.albef_plain"), albef_step
    draws = torch.tensor([[0.1, 0.9], [0.5, 0.3], [0.8, 0.6], [0.2, 0.7]])
    expected = step(plain.PLAIN, draws, full=True)
    ways = {**plain.formulations(), "ours": None}
    assert len(ways) == 1 + len(plain.CHANGES)
    for name, way in ways.items():
        assert furthest(step(way, draws, full=way is not None), expected) < 2e-5, name
    assert furthest(step(plain.PLAIN, 1 - draws, full=True), expected) > 1e-3
    assert expected["queue.position"] == 4 and len(expected) > 100


def test_albef_each_change_leaves_out_work(benchmarks):
    albef, plain = (importlib.import_module(f"benchmarks.{name}") for name in ("albef", "albef_plain"))
    everyone = albef.Everyone(benchmarks[1].Settings(batch=4, small=True))
    batch = albef.lengthened(everyone.batch(real=False))

    def flops(way) -> float:
        return benchmarks[1].count_flops(lambda: everyone.formulated(way, "eager", batch, train=False).backward())

    ways = [plain.PLAIN, *plain.formulations().values()]
    counted = dict(zip(("plain", *plain.CHANGES), map(flops, ways)))
    assert counted["plain"] == counted["copy moved at once"] == counted["false pairs drawn at once"]
    assert counted["plain"] > counted["logits at masked words"] >= counted["pairs in one pass"]
    assert counted["pairs in one pass"] > counted["last layer where read"] > counted["image keys once"]


def test_albef_many_answers_are_ranked_in_groups_with_less_than_half_the_work(benchmarks):
    albef, plain = (importlib.import_module(f"benchmarks.{name}") for name in ("albef", "albef_plain"))
    config = albef.configuration(benchmarks[1].Settings(small=True), momentum_teacher=False, num_labels=150)
    torch.manual_seed(0)
    model = albef.VlpAlbefForVisualQuestionAnswering(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    answers, states = albef.answer_list(config, 150), torch.randn(3, 12, config.multimodal_config.hidden_size)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 5:] = 0

    def ranked(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model.rank_answers(states, mask, *answers, 100)

    with torch.inference_mode():
        expected, found = plain.rank_answers(model, states, mask, answers, 100), ranked(mask)
        assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-4)
        assert not torch.allclose(ranked(torch.ones_like(mask))[1], expected[1], atol=1e-2)
        count = benchmarks[1].count_flops
        work = count(lambda: plain.rank_answers(model, states, mask, answers, 100)), count(lambda: ranked(mask))
    assert work[1] < work[0] / 2


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
