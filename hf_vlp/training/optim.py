"""Parameter groups, AdamW and the learning-rate schedule of a recipe."""

import difflib
import math
import re

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_vlp.training.recipe import OptimizerRecipe

# "...layers.3." of a transformer, "...layer2." of a ResNet: the tower before it, and the number of the block
_BLOCK = re.compile(r"^(?P<tower>.*?)\blayers?\.?(?P<number>\d+)\.")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    decay: str = "matrices",
    no_decay: list[str] | tuple[str, ...] = (),
    lr_factors: dict[str, float] | None = None,
    layer_decay: float = 1.0,
) -> list[dict]:
    """The trainable parameters, grouped by weight decay and learning rate.

    Args:
        decay: "matrices" spares norms, biases, scales and single vectors (fewer than two dimensions) the decay, "all" does not.
        no_decay: regular expressions searched in the parameter names; matching weights do not decay either.
        lr_factors: regular expression -> factor on the rate; where several match, the factors multiply.
        layer_decay: factor on the rate for every block between a parameter and the top of its tower; a tower is what
            comes before `layers.N.` or `layerN.` in a name.

    Returns:
        Groups of AdamW with `names` beside `params`, in the order in which the model first needs them.

    Raises:
        ValueError: a pattern that matches no parameter, or nothing left to train.
    """
    lr_factors = lr_factors or {}
    names = [name for name, _ in model.named_parameters()]
    for pattern in (*no_decay, *lr_factors):
        _matching(pattern, names)
    depth = _depth_from_top(names)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = (decay == "all" or parameter.ndim >= 2) and not any(re.search(pattern, name) for pattern in no_decay)
        factor = math.prod(value for pattern, value in lr_factors.items() if re.search(pattern, name))
        factor *= layer_decay ** depth[name]
        key = (weight_decay if decays else 0.0, lr * factor)
        group = groups.setdefault(key, {"params": [], "names": [], "weight_decay": key[0], "lr": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("no parameter is left to train: every one is frozen")
    return list(groups.values())


def optimizer_of(model: nn.Module, recipe: OptimizerRecipe, pairs: int) -> torch.optim.Optimizer:
    """Freezes, groups and builds what a recipe says, for `pairs` pairs a step."""
    freeze(model, recipe.freeze)
    groups = parameter_groups(
        model,
        scaled_rate(recipe.lr, batch=pairs, lr_batch=recipe.lr_batch, rule=recipe.lr_rule),
        recipe.weight_decay,
        decay=recipe.decay,
        no_decay=recipe.no_decay,
        lr_factors=recipe.lr_factors,
        layer_decay=recipe.layer_decay,
    )
    build = {"torch": adamw, "transformers": TransformersAdamW}[recipe.update]
    return build(groups, betas=recipe.betas, eps=recipe.eps)


def freeze(model: nn.Module, patterns: list[str] | tuple[str, ...]) -> list[str]:
    """Cuts the parameters whose names match from training; `training_mode` keeps their batch statistics still.

    Returns:
        The frozen names.

    Raises:
        ValueError: a pattern that is no regular expression or matches no parameter.
    """
    parameters = dict(model.named_parameters())
    frozen = sorted({name for pattern in patterns for name in _matching(pattern, list(parameters))})
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def training_mode(model: nn.Module) -> None:
    """`model.train()`, but a batch norm whose parameters are all frozen keeps and uses its stored statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


def adamw(groups: list[dict], *, betas: tuple[float, float] | list[float], eps: float) -> torch.optim.AdamW:
    """AdamW with its fused kernel on CPU and CUDA, where one kernel instead of several per tensor does the update."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=tuple(betas), eps=eps, fused=devices <= {"cpu", "cuda"})


class TransformersAdamW(torch.optim.Optimizer):
    """AdamW as transformers had it until its fifth version, which several papers were trained with.

    It differs from torch's in two places: eps is added before the second moment's bias correction, so that it weighs more in the first
    steps, and weights decay after the update. Parameters without a gradient stay as they are.

    Args:
        params: groups with `lr` and `weight_decay`. betas, eps: as in torch.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure`, if given, computes the loss that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), weights = group["betas"], [p for p in group["params"] if p.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": torch.zeros_like(weight),
                    }
                self.state[weight]["step"] += 1
            # weights that joined later are at another step
            for step in sorted({self.state[weight]["step"] for weight in weights}):
                some = [weight for weight in weights if self.state[weight]["step"] == step]
                gradients = [weight.grad for weight in some]
                means, squares = ([self.state[weight][name] for weight in some] for name in ("exp_avg", "exp_avg_sq"))
                torch._foreach_mul_(means, beta1)
                torch._foreach_add_(means, gradients, alpha=1 - beta1)
                torch._foreach_mul_(squares, beta2)
                torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
                spread = torch._foreach_sqrt(squares)
                torch._foreach_add_(spread, group["eps"])
                size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
                torch._foreach_addcdiv_(some, means, spread, -size)
                if group["weight_decay"]:
                    torch._foreach_add_(some, some, alpha=-group["lr"] * group["weight_decay"])
        return loss


def scaled_rate(lr: float, *, batch: int, lr_batch: int | None, rule: str) -> float:
    """The rate for `batch` pairs a step, given the rate that holds for `lr_batch`; "linear" or "sqrt" in the batch."""
    if lr_batch is None:
        return lr
    return lr * (batch / lr_batch if rule == "linear" else math.sqrt(batch / lr_batch))


def rate_factor(
    step: int,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int = 0,
    power: float = 1.0,
    end_factor: float = 0.0,
    milestones: list[float] | tuple[float, ...] = (),
    gamma: float = 0.1,
    start_factor: float = 0.0,
    warmup_unit: int = 100,
    epoch_steps: float | None = None,
) -> float:
    """The factor on the peak rate at optimizer step `step` (from 0): linear warm-up from `start_factor`, then down to `end_factor`.

    "cosine": half a cosine wave; "linear"; "polynomial": (1 - progress) ** power; "constant": 1; "step": `gamma` to the number of
    `milestones`, parts of the whole run, that are reached. With both factors 0 the values are those of the transformers schedules of the
    same names.

    "cosine_epochs" is the schedule of "Align before Fuse" (https://arxiv.org/abs/2107.07651): one value an epoch of `epoch_steps` steps, on
    half a cosine wave over all epochs, whose end is never reached. The warm-up is in the first epoch, which cuts it short: it rises once
    every `warmup_unit` steps, the first time after the step `warmup_unit`, and is at its height after `warmup_steps`.
    """
    if name == "cosine_epochs":
        if not epoch_steps:
            raise ValueError(f"schedule cosine_epochs: epoch_steps = {epoch_steps}, expected the steps of an epoch")
        epoch = int(step / epoch_steps)
        if epoch:
            return end_factor + (1.0 - end_factor) * 0.5 * (1.0 + math.cos(math.pi * epoch * epoch_steps / total_steps))
        units, reached = warmup_steps // warmup_unit, max(0, step - 1) // warmup_unit
        return start_factor + (1.0 - start_factor) * reached / units if reached < units else 1.0
    if step < warmup_steps:
        return start_factor + (1.0 - start_factor) * step / max(1, warmup_steps)
    if name == "constant":
        return 1.0
    if name == "step":
        return gamma ** sum(step >= round(part * total_steps) for part in milestones)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "cosine":
        falling = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif name in ("linear", "polynomial"):
        falling = (1.0 - progress) ** (power if name == "polynomial" else 1.0)
    else:
        raise ValueError(f"schedule {name!r}: expected cosine, cosine_epochs, linear, polynomial, constant or step")
    return end_factor + (1.0 - end_factor) * falling


def schedule(
    optimizer: torch.optim.Optimizer, *, name: str, total_steps: int, warmup_steps: int = 0, **numbers
) -> torch.optim.lr_scheduler.LambdaLR:
    """`rate_factor` as a scheduler, to be stepped once for each optimizer step; `numbers` are further ones of it."""
    if warmup_steps >= total_steps and name not in ("constant", "step"):
        raise ValueError(f"schedule.warmup_steps = {warmup_steps}: expected fewer than the run's {total_steps} steps")
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: rate_factor(step, name=name, total_steps=total_steps, warmup_steps=warmup_steps, **numbers),
    )


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        matches = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
    if not matches:
        parts = {name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)}
        nearest = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.0)
        raise ValueError(f"the pattern {pattern!r} matches no parameter; near names: {', '.join(nearest)}")
    return matches


def _depth_from_top(names: list[str]) -> dict[str, int]:
    """Blocks between each parameter and the top of its tower; what precedes the first block lies one deeper than it."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := _BLOCK.match(name):
            numbers.setdefault(match["tower"], set()).add(int(match["number"]))
    # a tower's stem lies beside its encoder: "text_model.embeddings" belongs to "text_model.encoder."
    stems = {tower: _trunk(tower) for tower in numbers}
    depth, seen = {}, set()
    for name in names:
        match = _BLOCK.match(name)
        if match:
            seen.add(match["tower"])
            depth[name] = max(numbers[match["tower"]]) - int(match["number"])
        else:
            below = [tower for tower, stem in stems.items() if stem and name.startswith(stem) and tower not in seen]
            depth[name] = max((len(numbers[tower]) for tower in below), default=0)
    return depth


def _trunk(tower: str) -> str:
    return re.sub(r"(encoder|resnet|transformer|blocks)\.$", "", tower)
