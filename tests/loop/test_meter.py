"""The warning of a training that has collapsed: once, after fifty steps at the loss of embeddings that are all the same."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
from hf_vlp.training.loop import train
from hf_vlp.training.meter import Meter
from hf_vlp.training.report import RunLog
from hf_vlp.training.state import Progress
from tests.contract.rows import gru_config, vse_config
from tests.loop.toy import ToyTwoTower, parts, stream

PLATEAU = 3.2  # 2 x margin 0.2 x 8 pairs


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


class Stuck(ToyTwoTower):
    """Its loss is what `losses` gives at each step, whatever it does."""

    def __init__(self, losses):
        super().__init__()
        self.told, self.asked = iter(losses), []

    def collapsed_loss(self, pairs):
        self.asked.append(pairs)
        return PLATEAU * pairs / 8

    def forward(self, **batch):
        output = super().forward(**batch)
        output.loss = output.loss * 0 + next(self.told)
        return output


def warned(accelerator, tmp_path, losses, log_every=7):
    model = Stuck(losses)
    prepared, optimizer, scheduler = parts(accelerator, model, total_steps=len(losses))
    log = RunLog(accelerator, tmp_path / "metrics.jsonl", steps=len(losses))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            accelerator, prepared, optimizer, scheduler, stream(accelerator, Progress()), steps=len(losses), log=log,
            log_every=log_every,
        )  # fmt: skip
    log.close()
    assert set(model.asked) == {8}  # the batch of all processes
    return [str(one.message) for one in caught if "collapsed" in str(one.message)]


def test_fifty_steps_at_the_plateau_warn_once(accelerator, tmp_path):
    near = [PLATEAU * (1 + 0.009 * (-1) ** step) for step in range(120)]
    (message,) = warned(accelerator, tmp_path, [9.0] * 10 + near)
    assert "step 60: for 50 steps the loss has been 3.2, that of embeddings that are all the same (8 pairs)" in message
    assert "ramps.hardest_negatives: {unit: steps, shape: linear" in message and "optimizer.lr" in message


@pytest.mark.parametrize("log_every", [1, 50, 200])
def test_however_often_is_logged(accelerator, tmp_path, log_every):
    assert len(warned(accelerator, tmp_path, [PLATEAU] * 130, log_every)) == 1


@pytest.mark.parametrize(
    "losses",
    [
        [PLATEAU] * 49 + [3.1] + [PLATEAU] * 49,  # it leaves in between
        [PLATEAU] * 49,
        [PLATEAU * 1.02] * 120,
        [PLATEAU * 0.98] * 120,
    ],
)
def test_a_loss_that_leaves_or_lies_elsewhere_does_not(accelerator, tmp_path, losses):
    assert warned(accelerator, tmp_path, losses) == []


def test_what_is_not_watched(accelerator):
    losses = {"loss": torch.tensor(0.0)}
    still = ToyTwoTower()
    still.collapsed_loss = lambda pairs: 0.0  # no margin: a perfect model has this loss too
    for meter in (Meter(accelerator, ToyTwoTower(), 8), Meter(accelerator, still, None), Meter(accelerator, still, 8)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(120):
                meter.add(step, losses, torch.tensor(1.0), 0.1)
            assert len(meter.read()) == 120


def test_the_plateau_follows_the_form_of_the_loss(accelerator):
    """While a ramp mixes the two forms the loss of a collapsed model changes from step to step."""
    model = VlpVseForPreTraining(vse_config(gru_config)())
    same = torch.ones(8, 4)
    for follows, expected in ((True, 1), (False, 0)):
        meter = Meter(accelerator, model, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(60):
                model.ramps()["hardest_negatives"](step / 60)
                loss = model.objective(same, same)[0] if follows else torch.tensor(PLATEAU)
                meter.add(step, {"loss": loss}, torch.tensor(1.0), 0.1)
            meter.read()
        assert len(caught) == expected
    assert model.collapsed_loss(8) == pytest.approx(PLATEAU * (1 + 6 / 60))  # 1/60 of the 7 others, 59/60 of one
