"""Ramps: values worked by hand, what they do to gradients and parameters, and that a resumed run goes on with them."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
from hf_vlp.training.loop import train
from hf_vlp.training.optim import adamw, parameter_groups, schedule, training_mode
from hf_vlp.training.ramps import ramp_value, ramped
from hf_vlp.training.recipe import RampRecipe, RecipeError
from hf_vlp.training.report import RunLog, read_metrics
from hf_vlp.training.state import Checkpoints, Progress
from hf_vlp.training.steps import choose_step, plain_step
from hf_vlp.training.stream import BatchStream
from tests.contract.rows import VOCABULARY, grid_config, gru_config, vse_config
from tests.loop.toy import ToySampler, ToyTwoTower, stream


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def ramp(at, values, **options):
    return RampRecipe(list(map(float, at)), list(map(float, values)), **options)


class Dialled(ToyTwoTower):
    """A toy with a dial that is turned, and a part that is frozen; it keeps what it was told."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.modes = [], []

    def ramps(self):
        return {"dial": self.seen.append, "frozen_stages": self.freeze}

    def freeze(self, stages):
        for part in (self.vision_model, self.norm):
            part.requires_grad_(not stages)

    def forward(self, **batch):
        self.modes.append(self.norm.training)
        return super().forward(**batch)


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("at", "values", "shape", "expected"),
    [
        ([0, 5], [0, 1], "step", {0: 0, 4.99: 0, 5: 1, 5.01: 1, 1000: 1}),
        ([2, 4], [7, 8], "step", {0: 7, 1.9: 7, 2: 7, 3.99: 7, 4: 8}),
        ([100, 300], [0, 1], "linear", {0: 0, 99: 0, 100: 0, 150: 0.25, 200: 0.5, 299: 0.995, 300: 1, 9999: 1}),
        ([100, 300], [0, 1], "step", {150: 0, 299: 0, 300: 1}),
        ([1, 3, 7], [4, 2, 10], "linear", {0: 4, 1: 4, 2: 3, 3: 2, 4: 4, 7: 10, 8: 10}),
        # a place named twice: what is before goes to the first value, the place itself has the second
        ([0, 5, 5, 10], [1, 1, 0, 1], "linear", {0: 1, 4.99: 1, 5: 0, 6: 0.2, 7.5: 0.5, 10: 1, 11: 1}),
        ([0, 4, 4, 8], [0, 4, 10, 20], "linear", {2: 2, 3: 3, 4: 10, 6: 15}),
        ([3, 3, 5], [1, 0, 2], "linear", {2.99: 1, 3: 0, 4: 1, 5: 2}),
        ([3, 3, 5], [1, 0, 2], "step", {2.99: 1, 3: 0, 4.99: 0, 5: 2}),
        ([0], [0.3], "step", {0: 0.3, 8: 0.3}),
        ([6], [0.3], "linear", {0: 0.3, 6: 0.3, 8: 0.3}),
    ],
)
def test_values_by_hand(at, values, shape, expected):
    found = {place: ramp_value(ramp(at, values, shape=shape), place) for place in expected}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("accumulation", "unit", "expected"),
    [
        (1, "epochs", [0, 0.25, 0.5, 0.75, 1, 1.25]),  # 32 pairs in batches of 8
        (3, "epochs", [0, 0.75, 1.5, 2.25, 3, 3.75]),
        (1, "steps", [0, 1, 2, 3, 4, 5]),
        (3, "steps", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_places_are_those_of_the_first_pair_of_a_step(accelerator, tmp_path, accumulation, unit, expected):
    model = Dialled()
    optimizer = adamw(parameter_groups(model, 1e-3, 0.1), betas=(0.9, 0.98), eps=1e-6)
    batches = stream(accelerator, Progress())
    counting = ramp([0, 100], [0, 100], shape="linear", unit=unit)
    step = ramped(plain_step, {"dial": counting}, model, batches)
    assert model.seen.pop() == 0  # the first value is left set
    model.seen.clear()
    model, optimizer = accelerator.prepare(model, optimizer)
    log = RunLog(accelerator, tmp_path / "metrics.jsonl", steps=6)
    constant = schedule(optimizer, name="constant", total_steps=6)
    train(accelerator, model, optimizer, constant, batches, steps=6, step=step, accumulation=accumulation, log=log)
    log.close()
    assert model.seen == pytest.approx(expected)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["ramp/dial"] for line in lines] == pytest.approx(expected, abs=1e-6)
    assert "ramp/dial" not in model.state_dict()


# ------------------------------------------------------------------------------------------------ factor on the loss


def step_of(accelerator, batches, model, factor, chunk=None):
    inner = choose_step(chunk, 1)
    return inner if factor is None else ramped(inner, {"loss_factor": ramp([0], [factor])}, model, batches)


def gradients(accelerator, factor, chunk=None, *, loss_times=1.0, count=1):
    model, batches = ToyTwoTower(), stream(accelerator, Progress())
    objective = model.objective
    model.objective = lambda *inputs: (loss_times * objective(*inputs)[0], {})
    drawn = iter(batches)
    fetched = [next(drawn) for _ in range(count)]
    losses = step_of(accelerator, batches, model, factor, chunk)(accelerator, accelerator.prepare(model), fetched)
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_the_factor_is_that_of_the_loss(accelerator, chunk, count):
    losses, found = gradients(accelerator, 0.3, chunk, count=count)
    _, scaled = gradients(accelerator, None, chunk, loss_times=0.3, count=count)
    plain_losses, plain = gradients(accelerator, None, chunk, count=count)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, scaled[name], rtol=1e-5, atol=1e-7)
    weight = "visual_projection.weight"
    assert (found[weight] - plain[weight]).abs().max() > 1e-3
    # what is reported is the loss itself
    assert torch.equal(losses["loss"], plain_losses["loss"])
    assert losses["ramp/loss_factor"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_without_a_gradient_adamw_still_decays(accelerator, factor):
    model, batches = ToyTwoTower(), stream(accelerator, Progress())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(parameter_groups(model, 1e-2, 0.1, decay="all"), betas=(0.9, 0.999), eps=1e-8)
    model, optimizer = accelerator.prepare(model, optimizer)
    step_of(accelerator, batches, model, factor)(accelerator, model, [next(iter(batches))])
    assert all(bool(p.grad.any()) == bool(factor) for name, p in model.named_parameters() if name.endswith("weight"))
    optimizer.step()
    decayed = [
        torch.allclose(parameter, before[name] * (1 - 1e-2 * 0.1), rtol=1e-6)
        for name, parameter in model.named_parameters()
        if before[name].any()
    ]
    assert all(decayed) if factor == 0 else not any(decayed)


def test_a_ramp_or_value_that_the_model_does_not_have(accelerator):
    batches, gru = stream(accelerator, Progress()), vse_config(gru_config)()
    with pytest.raises(
        RecipeError, match="ramps.dail: Dialled has loss_factor, dial, frozen_stages; the nearest is 'dial'"
    ):
        ramped(plain_step, {"dail": ramp([0], [1])}, Dialled(), batches)
    with pytest.raises(RecipeError, match="ramps.hardest_negatives: ToyTwoTower has loss_factor; the nearest is"):
        ramped(plain_step, {"hardest_negatives": ramp([0], [1])}, ToyTwoTower(), batches)
    regions = VlpVseForPreTraining(gru)
    with pytest.raises(RecipeError, match="frozen_stages: VlpVseForPreTraining has loss_factor, hardest_negatives;"):
        ramped(plain_step, {"frozen_stages": ramp([0], [4])}, regions, batches)
    with pytest.raises(RecipeError, match="ramps.hardest_negatives: 1.5 is no share"):
        ramped(plain_step, {"hardest_negatives": ramp([0, 2], [0, 1.5])}, regions, batches)
    with pytest.raises(RecipeError, match="ramps.loss_factor: -1.0 turns the training round"):
        ramped(plain_step, {"loss_factor": ramp([0, 2], [1, -1])}, regions, batches)
    grid = VlpVseForPreTraining(vse_config(gru_config, grid_config)())
    with pytest.raises(RecipeError, match=r"ramps.frozen_stages: .*the tower has 3 stage"):
        ramped(plain_step, {"frozen_stages": ramp([0, 2], [4, 0])}, grid, batches)
    ramped(plain_step, {"frozen_stages": ramp([0, 2], [3, 0])}, grid, batches)
    assert ramped(plain_step, {}, ToyTwoTower(), batches) is plain_step


# ------------------------------------------------------------------------------------------------ VSE-infinity


class GridPairs(torch.utils.data.Dataset):
    """Fixed pictures of 32 pixels and captions of five words."""

    def __init__(self):
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(12, 3, 32, 32, generator=draw)
        self.texts = torch.randint(3, VOCABULARY, (12, 5), generator=draw)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "input_ids": self.texts[index], "image_ids": torch.tensor(index)}


def grid_run(accelerator, ramps, *, freeze_norms=True, steps=5, chunk=None):
    """Weights before every step and after the last, states of AdamW, and the model."""
    torch.manual_seed(0)
    grid = grid_config()
    grid.freeze_norms = freeze_norms
    model = VlpVseForPreTraining(vse_config(gru_config, lambda: grid)())
    optimizer = adamw(parameter_groups(model, 1e-3, 0.1, decay="all"), betas=(0.9, 0.999), eps=1e-8)
    batches = BatchStream(GridPairs(), ToySampler(12, 6), torch.utils.data.default_collate)
    step, drawn = ramped(choose_step(chunk, 1), ramps, model, batches), iter(batches)
    training_mode(model)
    states = []
    for _ in range(steps):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        step(accelerator, model, [next(drawn)])
        optimizer.step()
        optimizer.zero_grad()
        batches.progress.step += 1
    return states + [model.state_dict()], optimizer, model


def moved(states, step):
    return {name for name, value in states[step].items() if not torch.equal(value, states[step + 1][name])}


@pytest.mark.parametrize("chunk", [None, 4])
def test_stages_thaw_at_their_step_and_adamw_leaves_frozen_ones_alone(accelerator, chunk):
    ramps = {"frozen_stages": ramp([0, 2, 4], [3, 1, 0], unit="steps")}
    states, optimizer, model = grid_run(accelerator, ramps, chunk=chunk)
    tower = "vse.vision_model.resnet."
    low = {name for name in states[0] if name.startswith((f"{tower}conv1", f"{tower}bn1", f"{tower}layer1"))}
    cnn = {name for name in states[0] if name.startswith(tower)}
    weights = {name for name, _ in model.named_parameters()}
    for step in (0, 1):
        assert not moved(states, step) & cnn and moved(states, step) >= {"vse.visual_projection.weight"}
    for step in (2, 3):
        assert not moved(states, step) & low
        assert {name for name in weights & (cnn - low) if "conv" in name} <= moved(states, step)
    assert {name for name in weights & low if "conv" in name} <= moved(states, 4)
    taken = {name: optimizer.state[parameter]["step"].item() for name, parameter in model.named_parameters()}
    assert {taken[name] for name in weights & low} == {1} and {taken[name] for name in weights & (cnn - low)} == {3}
    assert {taken[name] for name in weights - cnn} == {5}


def test_batch_norms_that_train_stand_still_while_their_stage_is_frozen(accelerator):
    ramps = {"frozen_stages": ramp([0, 2], [3, 0], unit="steps")}
    statistics = [f"vse.vision_model.resnet.{name}.running_mean" for name in ("bn1", "layer2.0.bn1", "layer3.0.bn3")]
    states, _, _ = grid_run(accelerator, ramps, freeze_norms=False, steps=3)
    assert not moved(states, 0) & {*statistics} and not moved(states, 1) & {*statistics}
    assert moved(states, 2) >= {*statistics}
    kept, _, _ = grid_run(accelerator, ramps, freeze_norms=True, steps=3)
    assert not moved(kept, 2) & {*statistics}


def test_the_share_of_the_hardest_reaches_the_loss(accelerator):
    def losses(values):
        model = VlpVseForPreTraining(vse_config(gru_config, grid_config)())
        batches = BatchStream(GridPairs(), ToySampler(12, 6), torch.utils.data.default_collate)
        ramps = {"hardest_negatives": ramp(range(len(values)), values, unit="steps")}
        step, drawn, found = ramped(plain_step, ramps, model, batches), iter(batches), []
        model.eval()
        for _ in values:
            found.append(step(accelerator, model, [next(drawn)])["triplet"].item())
            batches.progress.step += 1
        return found

    torch.manual_seed(0)
    mixed = losses([0, 1, 0.25])
    torch.manual_seed(0)
    all_of_them = losses([0, 0, 0])
    torch.manual_seed(0)
    hardest = losses([1, 1, 1])
    assert mixed[0] == all_of_them[0] and mixed[1] == hardest[1] < all_of_them[1]
    assert mixed[2] == pytest.approx(0.75 * all_of_them[2] + 0.25 * hardest[2], rel=1e-6)


# ------------------------------------------------------------------------------------------------ resuming


class Run:
    """Ten steps over epochs of four with dropout, a batch norm that thaws at the sixth, and an evaluation every third."""

    RAMPS = {
        "frozen_stages": ramp([0, 1.25], [1, 0]),
        "loss_factor": ramp([0, 1.25, 1.25, 2.5], [1, 1, 0, 1], shape="linear"),
        "dial": ramp([0, 10], [0, 10], unit="steps", shape="linear"),
    }

    def __init__(self, accelerator, folder, ramps=None):
        torch.manual_seed(5)
        model = Dialled(dropout=0.3, batch_norm=True)
        optimizer = adamw(parameter_groups(model, 1e-2, 0.1), betas=(0.9, 0.98), eps=1e-6)
        self.scheduler = schedule(optimizer, name="constant", total_steps=10)
        self.accelerator, self.folder = accelerator, folder
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.stream = stream(accelerator, Progress())
        self.step = ramped(plain_step, self.RAMPS if ramps is None else ramps, model, self.stream)
        self.checkpoints = Checkpoints(
            folder, accelerator, self.model, self.optimizer, self.scheduler, self.stream, keep=10
        )

    def evaluate(self):
        self.model.eval()
        return {}

    def to(self, steps):
        log = RunLog(self.accelerator, self.folder / "metrics.jsonl", steps=10, start=self.stream.progress.step)
        train(
            self.accelerator, self.model, self.optimizer, self.scheduler, self.stream, steps=steps, step=self.step,
            clip_norm=1.0, log=log, checkpoints=self.checkpoints, evaluate=self.evaluate, evaluate_every=3, save_every=1,
        )  # fmt: skip
        log.close()
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("at", [1, 4, 5, 7])
def test_stopped_and_resumed_equals_never_stopped(accelerator, tmp_path, at):
    first = Run(accelerator, tmp_path / "a")
    unbroken = first.to(10)
    assert first.model.modes == [False] * 5 + [True] * 5  # thawed at 1.25 epochs of four steps
    second = Run(accelerator, tmp_path / "a")
    second.checkpoints.resume(tmp_path / "a" / "checkpoints" / f"step-{at:08d}")
    resumed = second.to(10)
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())
    other = Run(accelerator, tmp_path / "b", {**Run.RAMPS, "frozen_stages": ramp([0, 1.5], [1, 0])}).to(10)
    assert any(not torch.equal(value, other[name]) for name, value in unbroken.items())


def test_weights_that_thaw_are_clipped_with_the_others(accelerator, tmp_path):
    run, norms = Run(accelerator, tmp_path), []
    step = run.step

    def measured(*inputs):
        losses = step(*inputs)
        norms.append(torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm().item())
        return losses

    run.step = measured
    run.to(10)
    shown = [line["grad_norm"] for line in read_metrics(tmp_path / "metrics.jsonl") if "grad_norm" in line]
    assert shown == pytest.approx(norms, rel=1e-5) and norms[5] == 0 < min(norms[6:])
