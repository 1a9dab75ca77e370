"""The learned scale of contrastive logits (initial value, limit and clamp in one place), the bias of the sigmoid loss, the temperature."""

import math

import torch
from torch import nn
from transformers import initialization as init


class LogitScale(nn.Module):
    """A learned factor exp(t) <= `limit` (CLIP section 2.3: t starts at ln(1/0.07), exp(t) at most 100).

    The parameter holds the logarithm t. Expect exp(t) to rise from 14 to the limit of 100 in a long training; one that falls
    towards 1 says that the two sides do not align. It is one-dimensional-or-less, so it is never decayed.

    Args:
        initial: t at the start.
        limit: largest t; None for no limit.
    """

    def __init__(self, initial: float, limit: float | None = math.log(100.0)):
        super().__init__()
        self.initial = initial
        self.limit = limit
        self.weight = nn.Parameter(torch.tensor(float(initial)))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.initial)

    def forward(self) -> torch.Tensor:
        """exp(t), a float32 scalar.

        In training, above the limit the value is the limit's and the gradient the ordinary one there; in evaluation a
        stored scale counts as it is, so that a converted checkpoint gives its original's logits.
        """
        log = self.weight.float()
        if self.limit is not None and self.training:
            log = log + (log.clamp(max=self.limit) - log).detach()
        return log.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Overwrite t with min(t, limit): to be called after every optimizer step."""
        if self.limit is not None:
            self.weight.clamp_(max=self.limit)


class LogitBias(nn.Module):
    """The learned bias of the sigmoid loss, a float32 scalar (SigLIP, section 3.2: -10 at the start, as most pairs do not match)."""

    def __init__(self, initial: float):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.tensor(float(initial)))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.initial)

    def forward(self) -> torch.Tensor:
        return self.weight.float()


class Temperature(nn.Module):
    """A learned positive number that divides similarities (ALBEF, https://arxiv.org/abs/2107.07651, section 3.2), 0.07 at the start.

    Args:
        initial: at the start. limits: smallest and largest value, which `clamp_` holds it to; None for none.
    """

    def __init__(self, initial: float, limits: tuple[float, float] | None = None):
        super().__init__()
        self.initial, self.limits = initial, limits
        self.weight = nn.Parameter(torch.tensor(float(initial)))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.initial)

    def forward(self) -> torch.Tensor:
        """A float32 scalar."""
        return self.weight.float()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put the number between its limits: to be called before every step."""
        if self.limits is not None:
            self.weight.clamp_(*self.limits)
