import json
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_vlp.training.loop import dry_run, train
from hf_vlp.training.meter import NonFiniteLoss
from hf_vlp.training.report import RunLog, check_trackers, draw_curves, draw_retrieval, parameter_table, read_metrics
from hf_vlp.training.state import Checkpoints, Progress
from hf_vlp.training.steps import cached_contrastive_step, choose_step, plain_step
from hf_vlp.training.stream import BatchStream
from tests.loop.toy import ToyTwoTower, batch, parts, stream


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def gradients(accelerator, model, step, batches):
    model.zero_grad()
    torch.manual_seed(3)
    losses = step(accelerator, model, batches)
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_cached_and_plain_gradients_are_the_same(accelerator, chunk):
    model, whole = accelerator.prepare(ToyTwoTower()), batch(8)
    losses, plain = gradients(accelerator, model, plain_step, [whole])
    cached_losses, cached = gradients(accelerator, model, choose_step(chunk, 1), [whole])
    assert losses["itc"].item() == pytest.approx(cached_losses["itc"].item(), abs=1e-6)
    assert plain["logit_scale"].abs() > 1e-4
    assert largest_difference(plain, cached) < 1e-6
    # and this is not what two halves give
    _, halves = gradients(accelerator, model, plain_step, [batch(4), batch(4, start=4)])
    assert largest_difference(plain, halves) > 1e-4


def test_cached_step_repeats_its_dropout(accelerator):
    def gradient(step_chunk):
        return gradients(accelerator, model, choose_step(step_chunk, 1), [batch(8)])[1]

    model = accelerator.prepare(ToyTwoTower(dropout=0.5))
    # in one chunk the random draws are those of the plain step
    assert largest_difference(gradient(None), gradient(8)) < 1e-6
    # in several they are others: the reference is the plain step over embeddings drawn chunk by chunk
    cached = gradient(4)
    model.zero_grad()
    torch.manual_seed(3)
    pieces = [model.embed(*(piece[key] for key in ("pixel_values", "input_ids"))) for piece in (batch(4), batch(4, 4))]
    model.objective(*(torch.cat(side) for side in zip(*pieces, strict=True)), batch(8)["image_ids"])[0].backward()
    reference = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert largest_difference(cached, reference) < 1e-6
    assert largest_difference(cached, gradient(8)) > 1e-4


def test_cached_step_leaves_random_state_and_running_statistics_as_one_pass(accelerator):
    states = []
    for step in (plain_step, choose_step(8, 1)):
        model = accelerator.prepare(ToyTwoTower(dropout=0.5, batch_norm=True))
        gradients(accelerator, model, step, [batch(8)])
        states.append((torch.get_rng_state(), model.norm.running_mean.clone(), model.norm.num_batches_tracked.clone()))
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))
    assert states[0][1].abs().max() > 0


def test_accumulation_averages_and_warns(accelerator):
    model = accelerator.prepare(ToyTwoTower())
    _, both = gradients(accelerator, model, plain_step, [batch(4), batch(4, start=4)])
    _, cached = gradients(accelerator, model, choose_step(2, 1), [batch(4), batch(4, start=4)])
    parts_of = [gradients(accelerator, model, plain_step, [part])[1] for part in (batch(4), batch(4, start=4))]
    mean = {name: (parts_of[0][name] + parts_of[1][name]) / 2 for name in both}
    assert largest_difference(both, mean) < 1e-6
    assert largest_difference(cached, mean) < 1e-6
    with pytest.warns(UserWarning, match="training.accumulation = 2.*contrasted with itself"):
        choose_step(None, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_step(None, 1)


def test_cached_step_refuses_a_model_without_the_verbs(accelerator):
    with pytest.raises(TypeError, match="cached_chunk_size needs a two-tower model with `embed`, Linear has none"):
        cached_contrastive_step(accelerator, torch.nn.Linear(2, 2), [batch(4)], chunk_size=2)


# ------------------------------------------------------------------------------------------------ loop


def run(accelerator, folder, *, model=None, steps=20, evaluate=None, save=True, **options):
    model, optimizer, scheduler = parts(accelerator, model or ToyTwoTower(), total_steps=steps)
    batches = stream(accelerator, Progress())
    log = RunLog(accelerator, folder / "metrics.jsonl", steps=steps)
    checkpoints = Checkpoints(folder, accelerator, model, optimizer, scheduler, batches) if save else None
    metrics = train(
        accelerator, model, optimizer, scheduler, batches, steps=steps, log=log, log_every=5,
        evaluate=evaluate, checkpoints=checkpoints, **options,
    )  # fmt: skip
    log.close()
    return model, metrics, checkpoints


def test_training_learns_and_writes_every_step(accelerator, tmp_path):
    model, _, _ = run(accelerator, tmp_path, steps=60)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {"loss", "itc", "lr", "grad_norm", "logit_scale", "seconds"} <= lines[0].keys()
    assert sum(line["itc"] for line in lines[-5:]) < 0.7 * sum(line["itc"] for line in lines[:5])
    assert lines[0]["lr"] == 0.0 and lines[2]["lr"] == pytest.approx(1e-2)
    assert model.steps_seen == 60


class Announced(ToyTwoTower):
    """Writes down what the loop tells it and each of its forwards."""

    def __init__(self):
        super().__init__()
        self.told = []

    def before_step(self):
        self.told.append("before")

    def forward(self, **inputs):
        self.told.append("forward")
        return super().forward(**inputs)

    def after_step(self):
        self.told.append("after")
        super().after_step()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_model_is_told_before_the_forwards_of_a_step_and_after_it(accelerator, tmp_path, accumulation):
    model = Announced()
    run(accelerator, tmp_path, model=model, steps=3, accumulation=accumulation)
    assert model.told == ["before", *["forward"] * accumulation, "after"] * 3


def test_evaluations_and_checkpoints_come_when_due(accelerator, tmp_path):
    scores = iter([50.0, 10.0, 30.0, 20.0, 25.0])
    seen = []

    def evaluate():
        model.eval()
        seen.append(next(scores))
        return {"validation/rsum": seen[-1]}

    model = ToyTwoTower()
    _, metrics, checkpoints = run(
        accelerator, tmp_path, model=model, evaluate=evaluate, evaluate_every=5, save_every=10
    )
    evaluated = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "evaluation" in line]
    assert [line["step"] for line in evaluated] == [0, 5, 10, 15, 20]
    assert metrics == {"validation/rsum": 25.0}
    assert model.training
    # 5 and 10 were the best so far; two newest and the best stay
    assert [path.name for path in checkpoints.all()] == ["step-00000010", "step-00000020"]
    assert checkpoints.best().name == "step-00000010"


def test_rotation_never_takes_the_best(accelerator, tmp_path):
    scores = iter([0.0, 9.0, *[1.0] * 9])
    _, _, checkpoints = run(
        accelerator, tmp_path, evaluate=lambda: {"validation/rsum": next(scores)}, evaluate_every=2, save_every=2
    )
    assert [path.name[-2:] for path in checkpoints.all()] == ["02", "18", "20"]
    assert checkpoints.best().name[-2:] == "02"


class Diverging(ToyTwoTower):
    """The second of two named objectives is no number from the seventh step on."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.losses["mlm"] = output.loss * (float("nan") if self.steps_seen >= 6 else 1.0)
        output.loss = output.loss + output.losses["mlm"]
        return output


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_objective(accelerator, tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 7: the objective mlm = nan is not finite"):
        run(accelerator, tmp_path, model=Diverging(), save_every=4)
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert kept == ["step-00000004"]
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert all(line["step"] <= 5 for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_gradient_that_is_no_number_is_told_from_a_loss(accelerator, tmp_path):
    class BadGradient(ToyTwoTower):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.loss = output.loss + torch.sqrt(self.logit_scale * 0.0)
            return output

    with pytest.raises(NonFiniteLoss, match="step 1: the gradient of itc is not finite"):
        run(accelerator, tmp_path, model=BadGradient(), save=False)


def test_clipping_bounds_the_step(accelerator):
    for bound, expected in ((1e-3, 1e-3), (None, None)):
        model = accelerator.prepare(ToyTwoTower())
        plain_step(accelerator, model, [batch(8)])
        before = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        accelerator.clip_grad_norm_(model.parameters(), bound or float("inf"))
        after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert after == pytest.approx(expected or before, rel=1e-3)
    assert before > 1e-2


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_half_precision_runs_stay_finite_with_float32_losses(tmp_path, precision, chunk):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, _, _ = run(accelerator, tmp_path, steps=40, step=choose_step(chunk, 1), clip_norm=1.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["itc"] < 0.8 * lines[0]["itc"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    loss = plain_step(accelerator, model, [batch(8)])["itc"]
    assert loss.dtype == torch.float32
    # under autocast the towers do compute in half precision
    with accelerator.autocast():
        inputs = batch(8)
        states = model.visual_projection(model.vision_model(inputs["pixel_values"]))
    assert states.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------ stream and report


def test_processes_share_each_global_batch(accelerator):
    whole = next(iter(stream(accelerator, Progress())))["image_ids"]
    halves = []
    for rank in range(2):
        part = stream(accelerator, Progress())
        part.rank, part.processes = rank, 2
        halves.append(next(iter(part))["image_ids"])
    assert torch.equal(torch.cat(halves), whole)
    with pytest.raises(ValueError, match="batch_size = 8 does not divide into 3 processes"):
        BatchStream(part.dataset, part.sampler, part.collate, processes=3)


def test_epochs_differ_and_loading_draws_nothing_from_the_global_generator(accelerator):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches = iter(stream(accelerator, Progress()))
    ids = [next(batches)["image_ids"].tolist() for _ in range(8)]
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(sum(ids[:4], [])) == sorted(sum(ids[4:], [])) == list(range(32))
    assert ids[:4] != ids[4:]


def test_metrics_survive_a_line_cut_short_and_are_cut_back_on_resuming(accelerator, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)) + '{"step": 9, "lo')
    assert len(read_metrics(path)) == 8
    RunLog(accelerator, path, steps=20, start=5).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_pictures_of_a_run(accelerator, tmp_path):
    from PIL import Image

    scores = iter(range(1, 9))
    names = ("validation/rsum", "test/text_to_image/R@1", "test/image_to_text/R@1")
    run(accelerator, tmp_path, evaluate=lambda: dict.fromkeys(names, next(scores)), evaluate_every=10, save=False)
    drawn = Image.open(draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png"))
    assert len(drawn.convert("RGB").resize((200, 60)).getcolors(99999)) > 20
    sheets = []
    for right in (True, False):
        pictures = [[Image.new("RGB", (8, 8), "blue")] * 5]
        sheet = draw_retrieval(["a caption"], pictures, [[right] + [False] * 4], tmp_path / f"{right}.png")
        colours = Image.open(sheet).convert("RGB").getcolors(99999)
        sheets.append(sum(count for count, (r, g, b) in colours if g > 120 and r < 90 and b < 90))
    assert sheets[0] > 100 and sheets[1] == 0
    assert not list(tmp_path.glob(".writing*"))


def test_parameter_table_counts_frozen_parts():
    model = ToyTwoTower()
    model.vision_model.requires_grad_(False)
    rows = {line.split()[0]: line.split()[1:] for line in parameter_table(model).splitlines()}
    assert rows["vision_model"] == ["104", "0"]
    assert rows["text_model"] == ["96", "96"]
    assert rows["all"] == ["297", "193"]


def test_a_tracker_that_is_not_there_is_an_error():
    check_trackers([])
    with pytest.raises(ValueError, match="'tensorbored' is not installed or unknown"):
        check_trackers(["tensorbored"])


def test_a_dry_run_measures_and_writes_nothing(accelerator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer, scheduler = parts(accelerator, ToyTwoTower())
    batches = stream(accelerator, Progress())
    text = dry_run(accelerator, model, optimizer, scheduler, batches, steps=3)
    assert batches.progress.step == 4
    assert "text_projection" in text and "peak memory" in text
    shown = float(text.split("seconds a step")[1].split()[0])
    assert 0.0 < shown < 1.0 and float(text.split("peak memory")[1].split()[0]) > 0.05
    assert list(tmp_path.iterdir()) == []


def test_cached_and_plain_gradients_of_clip_are_the_same(accelerator):
    from hf_vlp import VlpClipConfig, VlpClipForPreTraining

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 20, "max_position_embeddings": 6, "bos_token_id": 18, "eos_token_id": 19, "pad_token_id": 19}
    vision = {"image_size": 8, "patch_size": 4}
    config = VlpClipConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=8)
    torch.manual_seed(0)
    model = accelerator.prepare(VlpClipForPreTraining(config))
    ids = torch.cat([torch.randint(0, 18, (6, 5)), torch.full((6, 1), 19)], dim=1)
    inputs = {"pixel_values": torch.randn(6, 3, 8, 8), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {}
    for name, image_ids in (("all different", range(6)), ("two alike", [0, 0, 1, 2, 3, 4])):
        whole = inputs | {"image_ids": torch.tensor(list(image_ids))}
        found[name] = gradients(accelerator, model, plain_step, [whole])[1]
        assert largest_difference(found[name], gradients(accelerator, model, choose_step(4, 1), [whole])[1]) < 2e-5
    assert largest_difference(*found.values()) > 1e-3


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_batch_key_that_the_model_does_not_know_is_refused_by_either_step(accelerator, chunk):
    from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining
    from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
    from tests.contract.rows import END, REGION, gru_config, pair_config, vse_config

    ids = torch.cat([torch.randint(3, 30, (4, 5)), torch.full((4, 1), END)], dim=1)
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_ids": torch.arange(4)}
    clip, vse = VlpClipForPreTraining(pair_config()()), VlpVseForPreTraining(vse_config(gru_config)())
    for model, image in (
        (clip, {"pixel_values": torch.randn(4, 3, 32, 32)}),
        (vse, {"region_features": torch.randn(4, 3, REGION)}),
    ):
        step = choose_step(chunk, 1)
        assert torch.isfinite(step(accelerator, model, [texts | image])["loss"])
        with pytest.raises(TypeError, match="token_type_ids"):
            step(accelerator, model, [texts | image | {"token_type_ids": torch.zeros_like(ids)}])
