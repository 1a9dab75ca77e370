"""What each step measured, and the guard that stops a run whose loss is no number."""

import math

import torch
from accelerate import Accelerator
from torch import nn


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is no number; the message names the objective and the optimizer step."""


class Meter:
    """Keeps what each step measured on its device and reads many steps in one transfer, so that no step waits.

    Reading is also the finite-loss guard: it comes before every evaluation and save.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator = accelerator
        self.scales = {
            name.removesuffix(".weight").rsplit(".", 1)[-1]: parameter
            for name, parameter in model.named_parameters()
            if parameter.numel() == 1
        }
        self.rows: list[tuple[int, float, dict[str, torch.Tensor]]] = []

    def add(self, step: int, losses: dict[str, torch.Tensor], norm: torch.Tensor, rate: float) -> None:
        # a copy: the parameters change in place
        scales = {name: parameter.detach().float().reshape(()).clone() for name, parameter in self.scales.items()}
        norm = torch.as_tensor(norm, device=losses["loss"].device)
        self.rows.append((step, rate, losses | {"grad_norm": norm.detach().float()} | scales))

    def read(self) -> list[dict[str, float]]:
        """One dictionary a step since the last reading, losses averaged over processes; raises NonFiniteLoss."""
        if not self.rows:
            return []
        # steps of different objectives may name different losses
        flat = torch.stack([value for _, _, row in self.rows for value in row.values()])
        values = iter(self.accelerator.reduce(flat, reduction="mean").tolist())
        lines = []
        for step, rate, row in self.rows:
            line = {"step": step, "lr": rate} | {name: next(values) for name in row}
            self._guard(line, [name for name in row if name not in ("grad_norm", "loss", *self.scales)])
            lines.append(line)
        self.rows = []
        return lines

    def _guard(self, line: dict[str, float], terms: list[str]) -> None:
        bad = [name for name in terms or ["loss"] if not math.isfinite(line[name])]
        if not bad and not math.isfinite(line["loss"]):
            bad = ["loss"]
        remedy = "earlier checkpoints are untouched; try a lower optimizer.lr, a training.clip_norm, or bf16 for fp16"
        if bad:
            values = ", ".join(f"{name} = {line[name]}" for name in bad)
            raise NonFiniteLoss(f"step {line['step']}: the objective {values} is not finite; {remedy}")
        # with a loss scale an infinite gradient is part of the search for the scale: that step is skipped
        if self.accelerator.scaler is None and not math.isfinite(line["grad_norm"]):
            raise NonFiniteLoss(f"step {line['step']}: the gradient of {', '.join(terms)} is not finite; {remedy}")
