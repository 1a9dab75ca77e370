import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining
from hf_vlp.training.optim import (
    TransformersAdamW,
    adamw,
    freeze,
    optimizer_of,
    parameter_groups,
    rate_factor,
    scaled_rate,
    schedule,
    training_mode,
)
from hf_vlp.training.recipe import RecipeError, ScheduleRecipe, load_recipe
from tests.contract.rows import pair_config, resnet_config
from tests.loop.toy import ToyTwoTower

RECIPES = Path(__file__).parents[2] / "examples" / "configs"


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(2, 2)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.final_norm = nn.LayerNorm(2)


def rates(groups):
    return {name: group["lr"] for group in groups for name in group["names"]}


def decays(groups):
    return {name: group["weight_decay"] for group in groups for name in group["names"]}


def test_norms_biases_and_scales_do_not_decay():
    model = ToyTwoTower()
    found = decays(parameter_groups(model, 1e-3, 0.2))
    assert found == {name: 0.2 if p.ndim >= 2 else 0.0 for name, p in model.named_parameters()}
    assert found["visual_projection.weight"] == 0.2
    assert found["text_model.1.weight"] == found["vision_model.1.bias"] == found["logit_scale"] == 0.0
    assert decays(parameter_groups(model, 1e-3, 0.2, no_decay=["projection"]))["visual_projection.weight"] == 0.0


def test_everything_decays_where_the_recipe_says_so():
    model = ToyTwoTower(batch_norm=True)
    found = decays(parameter_groups(model, 1e-3, 0.2, decay="all"))
    assert found == {name: 0.2 for name, _ in model.named_parameters()} and "norm.bias" in found
    spared = decays(parameter_groups(model, 1e-3, 0.2, decay="all", no_decay=["norm", "^logit_scale"]))
    assert {name for name, value in spared.items() if not value} == {"norm.weight", "norm.bias", "logit_scale"}
    assert len(parameter_groups(model, 1e-3, 0.2, decay="all")) == 1 < len(parameter_groups(model, 1e-3, 0.2))


def test_every_trainable_parameter_is_in_one_group():
    model = ToyTwoTower()
    frozen = freeze(model, ["^vision_model"])
    names = [name for group in parameter_groups(model, 1e-3, 0.2) for name in group["names"]]
    assert sorted(names + frozen) == sorted(name for name, _ in model.named_parameters())
    assert frozen == ["vision_model.1.bias", "vision_model.1.weight"]


def test_rate_factors_multiply():
    found = rates(parameter_groups(ToyTwoTower(), 1.0, 0.0, lr_factors={"^vision_model": 0.1, r"weight$": 0.5}))
    assert found["vision_model.1.weight"] == pytest.approx(0.05)
    assert found["vision_model.1.bias"] == pytest.approx(0.1)
    assert found["text_model.1.bias"] == 1.0


def test_layer_decay_counts_from_the_top_of_each_tower():
    pair = nn.ModuleDict({"text_model": Tower(), "vision_model": Tower()})
    found = rates(parameter_groups(pair, 1.0, 0.0, layer_decay=0.5))
    for tower in pair:
        assert found[f"{tower}.final_norm.weight"] == 1.0
        assert [found[f"{tower}.encoder.layers.{n}.weight"] for n in range(3)] == [0.25, 0.5, 1.0]
        assert found[f"{tower}.embeddings.weight"] == 0.125


@pytest.mark.parametrize(
    "call", [lambda m, p: freeze(m, [p]), lambda m, p: parameter_groups(m, 1, 0, lr_factors={p: 1})]
)
def test_a_pattern_that_matches_nothing_names_near_parameters(call):
    with pytest.raises(ValueError, match=r"'vison_model' matches no parameter; near names: vision_model"):
        call(ToyTwoTower(), "vison_model")
    with pytest.raises(ValueError, match="not a regular expression"):
        call(ToyTwoTower(), "*.weight")


def test_nothing_left_to_train():
    model = ToyTwoTower()
    freeze(model, ["."])
    with pytest.raises(ValueError, match="every one is frozen"):
        parameter_groups(model, 1e-3, 0.2)


def test_a_frozen_batch_norm_keeps_its_statistics():
    for patterns, moves in ((["^norm"], False), (["^vision_model"], True)):
        model = ToyTwoTower(batch_norm=True)
        freeze(model, patterns)
        training_mode(model)
        before = model.norm.running_mean.clone()
        model.norm(torch.randn(4, 8))
        assert (not torch.equal(model.norm.running_mean, before)) == moves
        assert model.vision_model.training


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("name", ["clip_finetune", "clip_finetune_emoji"])
def test_fine_tuning_recipes_freeze_what_either_tower_has(name, tower):
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["--data.train", "given.parquet"])
    model = VlpClipForPreTraining((pair_config(vision=resnet_config) if tower == "resnet" else pair_config())())
    optimizer_of(model, recipe.optimizer, recipe.training.batch_size)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    assert frozen == {"clip.logit_scale.weight"} | norms
    assert bool(norms) == (tower == "resnet")


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_schedules_equal_those_of_transformers(name):
    options = {"lr_end": 0.0, "power": 2.0} if name == "polynomial" else None
    ours, theirs = ([nn.Parameter(torch.zeros(1))] for _ in range(2))
    ours, theirs = adamw([{"params": ours, "lr": 0.3}], betas=(0.9, 0.98), eps=1e-6), torch.optim.AdamW(theirs, lr=0.3)
    one = schedule(ours, name=name, total_steps=20, warmup_steps=5, power=2.0)
    two = transformers.get_scheduler(name, theirs, 5, 20, scheduler_specific_kwargs=options)
    seen = []
    for _ in range(20):
        seen.append(one.get_last_lr()[0])
        assert seen[-1] == pytest.approx(two.get_last_lr()[0], abs=1e-9)
        for part in (ours, theirs, one, two):
            part.step()
    assert len(set(seen)) > 15


def test_schedule_ends_and_warm_up():
    common = {"total_steps": 100, "warmup_steps": 10}
    for name in ("cosine", "linear", "polynomial"):
        assert rate_factor(0, name=name, **common) == 0.0
        assert rate_factor(5, name=name, **common) == 0.5
        assert rate_factor(10, name=name, **common) == 1.0
        assert rate_factor(100, name=name, end_factor=0.1, **common) == pytest.approx(0.1)
    assert rate_factor(55, name="cosine", **common) == pytest.approx(0.5)
    assert rate_factor(99, name="constant", **common) == 1.0
    with pytest.raises(ValueError, match="warmup_steps = 20: expected fewer than the run's 20 steps"):
        schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), name="linear", total_steps=20, warmup_steps=20)
    with pytest.raises(ValueError, match="'cosin': expected cosine"):
        rate_factor(50, name="cosin", **common)


@pytest.mark.parametrize(
    ("milestones", "epochs", "steps_an_epoch", "gamma"),
    [([15], 25, 4, 0.1), ([15], 25, 7, 0.1), ([3, 5], 8, 3, 0.5), ([1, 2, 3], 7, 5, 0.3), ([75], 125, 226, 0.1)],
)
def test_steps_of_the_rate_are_those_of_torch_over_epochs(milestones, epochs, steps_an_epoch, gamma):
    ours, theirs = ([nn.Parameter(torch.zeros(1))] for _ in range(2))
    ours, theirs = adamw([{"params": ours, "lr": 0.3}], betas=(0.9, 0.98), eps=1e-6), torch.optim.AdamW(theirs, lr=0.3)
    parts = [place / epochs for place in milestones]
    one = schedule(ours, name="step", total_steps=epochs * steps_an_epoch, milestones=parts, gamma=gamma)
    two = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones, gamma)
    seen = []
    for _ in range(epochs):
        for _ in range(steps_an_epoch):
            seen.append(one.get_last_lr()[0])
            assert seen[-1] == pytest.approx(two.get_last_lr()[0], rel=1e-9)
            ours.step(), one.step()
        theirs.step(), two.step()
    assert len({round(rate, 12) for rate in seen}) == len(milestones) + 1


def test_steps_of_the_rate_with_a_warm_up():
    numbers = {"name": "step", "total_steps": 100, "milestones": [0.5, 0.8], "gamma": 0.1}
    found = [rate_factor(step, warmup_steps=10, **numbers) for step in (0, 5, 10, 49, 50, 79, 80, 100)]
    assert found == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rate_factor(0, **numbers) == 1.0


def epochs_by_hand(lr, min_lr, warmup_lr, warmup, epochs, steps_an_epoch, unit):
    """The rate that every step of a run uses, set as a training loop sets it: after steps of the first epoch, and before each other one."""
    rate, used = warmup_lr if warmup else lr, []
    for epoch in range(epochs):
        if epoch:
            rate = min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for step in range(steps_an_epoch):
            used.append(rate)
            if epoch == 0 and step % unit == 0 and step <= warmup * unit:
                reached = step // unit
                rate = warmup_lr + reached * (lr - warmup_lr) / warmup if reached < warmup else lr
    return used


@pytest.mark.parametrize(
    ("warmup", "epochs", "steps_an_epoch", "unit"),
    [(3, 4, 50, 10), (1, 3, 11, 10), (1, 3, 10, 10), (4, 5, 23, 10), (0, 3, 5, 100), (2, 1, 30, 7), (5, 2, 5, 1)],
)
def test_a_rate_for_each_epoch_with_a_warm_up_in_the_first(warmup, epochs, steps_an_epoch, unit):
    expected = epochs_by_hand(0.3, 0.03, 0.1, warmup, epochs, steps_an_epoch, unit)
    optimizer = adamw([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3}], betas=(0.9, 0.98), eps=1e-6)
    numbers = {"name": "cosine_epochs", "total_steps": epochs * steps_an_epoch, "epoch_steps": steps_an_epoch}
    numbers |= {"warmup_steps": warmup * unit, "warmup_unit": unit, "start_factor": 1 / 3, "end_factor": 0.1}
    one = schedule(optimizer, **numbers)
    found = []
    for _ in expected:
        found.append(one.get_last_lr()[0])
        optimizer.step(), one.step()
    assert found == pytest.approx(expected, rel=1e-9)
    assert min(found) > 0.03  # the end is never reached
    # the rate depends on the place alone: a schedule that goes on in the middle of the run has the same rates
    middle = len(expected) // 2
    resumed = schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3), **numbers)
    resumed.load_state_dict(one.state_dict() | {"last_epoch": middle - 1})
    resumed.step()
    assert resumed.get_last_lr()[0] == pytest.approx(expected[middle], rel=1e-9)


def test_a_warm_up_from_above_0():
    common = {"name": "linear", "total_steps": 100, "warmup_steps": 10}
    assert [rate_factor(step, start_factor=0.2, **common) for step in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])
    assert rate_factor(5, **common) == 0.5
    assert rate_factor(55, start_factor=0.2, **common) == rate_factor(55, **common)


def test_what_a_rate_for_each_epoch_needs():
    with pytest.raises(ValueError, match="epoch_steps = None, expected the steps of an epoch"):
        rate_factor(0, name="cosine_epochs", total_steps=10)
    assert ScheduleRecipe("cosine_epochs", warmup_steps=300).numbers(1000, 500)["epoch_steps"] == 500
    for wrong in ({"warmup_steps": 250}, {"warmup_share": 0.1}):
        assert ScheduleRecipe("cosine", **wrong)
        with pytest.raises(RecipeError, match="cosine_epochs expects steps, a multiple of schedule.warmup_unit = 100"):
            ScheduleRecipe("cosine_epochs", **wrong)


def test_rate_scaled_to_the_batch():
    assert scaled_rate(1e-3, batch=64, lr_batch=None, rule="linear") == 1e-3
    assert scaled_rate(1e-3, batch=64, lr_batch=256, rule="linear") == pytest.approx(2.5e-4)
    assert scaled_rate(1e-3, batch=64, lr_batch=256, rule="sqrt") == pytest.approx(5e-4)


def by_hand(weight, gradients, lr, betas, eps, decay):
    """The update of transformers' old AdamW, number by number."""
    mean = square = 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        weight -= lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step) * mean / (square**0.5 + eps)
        weight -= lr * decay * weight
    return weight


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_the_adamw_of_transformers_by_hand(eps):
    gradients = (0.5, -1.0, 1e-3)
    found = {}
    for build in (TransformersAdamW, adamw):
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        still = nn.Parameter(torch.tensor([3.0]))
        group = {"params": [weight, still], "lr": 0.1, "weight_decay": 0.2}
        optimizer = build([group], betas=(0.8, 0.9), eps=eps)
        for gradient in gradients:
            weight.grad = torch.full((1,), gradient, dtype=torch.float64)
            optimizer.step()
        assert still.item() == 3.0  # no gradient, no decay
        found[build] = weight.item()
    assert found[TransformersAdamW] == pytest.approx(by_hand(2.0, gradients, 0.1, (0.8, 0.9), eps, 0.2), rel=1e-6)
    assert abs(found[TransformersAdamW] - found[adamw]) > 1e-4  # torch's decays before the update and weighs eps less


def test_the_adamw_of_transformers_goes_on_from_its_state():
    torch.manual_seed(0)
    model, gradients = nn.Linear(3, 2), torch.randn(4, 2, 3)

    def steps(model, optimizer, some):
        for gradient in some:
            model.weight.grad = gradient.clone()
            optimizer.step()

    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    whole = TransformersAdamW(model.parameters(), lr=0.1)
    steps(model, whole, gradients)
    first = TransformersAdamW(twin.parameters(), lr=0.1)
    steps(twin, first, gradients[:2])
    second, fresh = TransformersAdamW(twin.parameters(), lr=0.1), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    fresh.load_state_dict(twin.state_dict())
    steps(twin, second, gradients[2:])
    assert torch.equal(twin.weight, model.weight)
    steps(fresh, TransformersAdamW(fresh.parameters(), lr=0.1), gradients[2:])
    assert not torch.allclose(fresh.weight, model.weight, atol=1e-3)
