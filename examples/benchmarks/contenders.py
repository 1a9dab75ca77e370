"""What rows of several architectures share: contenders of one phase and of a training step, and how long captions are.

Captions of "real lengths": tokens, start and end included, spread like a log-normal with median 14 and sigma 0.25 (its quantiles, so
B 16 always has mean 14.4 and longest 22, B 128 mean 14.4 and longest 27), an assumption about one-sentence captions.
"""

import math
import statistics
from collections.abc import Callable, Iterable

import torch

from benchmarks.measure import Call, Contender

ATTENTION = ("sdpa", "eager")
MEDIAN, SIGMA = 14.0, 0.25  # of the real captions' lengths in tokens


def forward(work: Callable[[], torch.Tensor], flops: float | None = None) -> Contender:
    """A contender without phases."""

    def run(call: Call) -> torch.Tensor:
        with call.autocast():
            return work()

    return Contender(run, flops=flops)


def step(
    loss: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    flops: float | None = None,
    after: Callable[[], None] | None = None,
    clip_norm: float | None = None,
    compared: Callable[[], torch.Tensor] | None = None,
) -> Contender:
    """A contender of three phases, four with `clip_norm`. The rate is 0, so everyone always sees the same weights; the work is the same.

    compared: the loss without anything random, where `loss` has dropout.
    """

    def parameters() -> Iterable[torch.Tensor]:
        return (one for group in optimizer.param_groups for one in group["params"])

    def run(call: Call) -> None:
        optimizer.zero_grad()
        with call.autocast():
            value = loss()
        call.lap("forward")
        value.backward()
        call.lap("backward")
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters(), clip_norm)
            call.lap("clip")
        optimizer.step()
        if after is not None:
            after()
        call.lap("AdamW")

    def result() -> torch.Tensor:
        optimizer.zero_grad()
        value = (compared or loss)()
        value.backward()
        gradients = [one.grad for one in parameters() if one.grad is not None]
        return torch.stack([value.detach(), torch.nn.utils.get_total_norm(gradients)])

    return Contender(run, result, flops)


def real_lengths(count: int, longest: int) -> torch.Tensor:
    """Lengths of `count` captions [count], rising, `longest` at most."""
    normal = statistics.NormalDist()
    quantiles = [math.exp(SIGMA * normal.inv_cdf((row + 0.5) / count)) for row in range(count)]
    return torch.tensor([min(longest, round(MEDIAN * quantile)) for quantile in quantiles])


def lengths_of(mask: torch.Tensor) -> str:
    """The lengths of texts with this `mask` [B, L] in words."""
    lengths = mask.sum(dim=1).float()
    if lengths.min() == mask.shape[1]:
        return f"{mask.shape[1]} positions"
    return f"real lengths (mean {lengths.mean():.1f}, longest {int(lengths.max())})"


def parameters_and_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with the parameters themselves, to be shared with another model."""
    return model.state_dict(keep_vars=True)
