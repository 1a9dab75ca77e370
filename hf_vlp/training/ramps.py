"""Numbers that change while training: shares of a loss, a factor on the gradient, how much of a tower is frozen.

A value is a function of the place in the run alone, so a resumed run goes on as if it had never stopped.
"""

import difflib
from bisect import bisect_right
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from hf_vlp.training.optim import training_mode
from hf_vlp.training.recipe import RampRecipe, RecipeError
from hf_vlp.training.steps import Batch, Step
from hf_vlp.training.stream import BatchStream

LOSS_FACTOR = "loss_factor"
FROZEN_STAGES = "frozen_stages"  # changes which parameters have a gradient, which DistributedDataParallel has to be told


def ramp_value(ramp: RampRecipe, place: float) -> float:
    """The value at a place of the run, in the ramp's unit."""
    index = bisect_right(ramp.at, place) - 1
    if index < 0:
        return ramp.values[0]
    if ramp.shape == "step" or index == len(ramp.at) - 1:
        return ramp.values[index]
    part = (place - ramp.at[index]) / (ramp.at[index + 1] - ramp.at[index])
    return ramp.values[index] + part * (ramp.values[index + 1] - ramp.values[index])


def ramped(step: Step, ramps: dict[str, RampRecipe], model: nn.Module, stream: BatchStream) -> Step:
    """The step function `step`, with every ramp's value set before it; the step itself where there are none.

    `loss_factor` multiplies the gradients, which is what multiplying the loss does. The other ramps are given to the setters that the
    model names: `model.ramps()` is a dictionary of name -> function of the value. Values are reported as "ramp/NAME" among the losses.

    Args:
        model: unwrapped. stream: tells the place in the run and the batches of an epoch.

    Raises:
        RecipeError: a ramp that the model does not have, or a value that it does not take.
    """
    if not ramps:
        return step
    setters: dict[str, Callable[[float], None]] = model.ramps() if hasattr(model, "ramps") else {}
    for name in ramps:
        if name != LOSS_FACTOR and name not in setters:
            known = [LOSS_FACTOR, *setters]
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"ramps.{name}: {type(model).__name__} has {', '.join(known)}; the nearest is {nearest!r}")
        for value in reversed(ramps[name].values):  # the first is left set
            try:
                setters.get(name, _refuse_negative)(value)
            except ValueError as error:
                raise RecipeError(f"ramps.{name}: {error}") from error

    frozen: dict[str, float] = {}

    def run(accelerator: Accelerator, prepared: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
        progress = stream.progress
        # the batches of this step have been handed out already
        epochs = progress.epoch + (progress.position - len(batches)) / len(stream.sampler)
        values = {name: ramp_value(ramp, epochs if ramp.unit == "epochs" else progress.step) for name, ramp in ramps.items()}
        for name, value in values.items():
            if name in setters:
                setters[name](value)
        if values.get(FROZEN_STAGES) != frozen.get(FROZEN_STAGES):
            frozen[FROZEN_STAGES] = values[FROZEN_STAGES]
            training_mode(model)
        losses = step(accelerator, prepared, batches)
        if values.get(LOSS_FACTOR, 1.0) != 1.0:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, values[LOSS_FACTOR])
        return losses | {f"ramp/{name}": losses["loss"].new_tensor(value) for name, value in values.items()}

    return run


def _refuse_negative(factor: float) -> None:
    if not factor >= 0:
        raise ValueError(f"{factor} turns the training round: give 0 or more")
