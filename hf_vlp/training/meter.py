"""What each step measured, and the guard that stops a run whose loss is no number."""

import math
import warnings

import torch
from accelerate import Accelerator
from torch import nn


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is no number; the message names the objective and the optimizer step."""


class Meter:
    """Keeps what each step measured on its device and reads many steps in one transfer, so that no step waits.

    Reading is also the finite-loss guard: it comes before every evaluation and save. A model that knows the loss of collapsed
    embeddings, `collapsed_loss(pairs)`, is watched for it: one warning after `patience` steps in a row within 1 % of it.

    Args:
        model: unwrapped. pairs: of one step's batch over all processes; None: not watched.
    """

    patience = 50

    def __init__(self, accelerator: Accelerator, model: nn.Module, pairs: int | None = None):
        self.accelerator = accelerator
        self.collapsed_loss = getattr(model, "collapsed_loss", None) if pairs else None
        self.pairs, self.at_plateau = pairs, 0
        self.scales = {
            name.removesuffix(".weight").rsplit(".", 1)[-1]: parameter
            for name, parameter in model.named_parameters()
            if parameter.numel() == 1
        }
        self.rows: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self.plateaus: list[float | None] = []

    def add(self, step: int, losses: dict[str, torch.Tensor], norm: torch.Tensor, rate: float) -> None:
        # a copy: the parameters change in place
        scales = {name: parameter.detach().float().reshape(()).clone() for name, parameter in self.scales.items()}
        norm = torch.as_tensor(norm, device=losses["loss"].device)
        self.rows.append((step, rate, losses | {"grad_norm": norm.detach().float()} | scales))
        self.plateaus.append(None if self.collapsed_loss is None else self.collapsed_loss(self.pairs))

    def read(self) -> list[dict[str, float]]:
        """One dictionary a step since the last reading, losses averaged over processes; raises NonFiniteLoss."""
        if not self.rows:
            return []
        # steps of different objectives may name different losses
        flat = torch.stack([value for _, _, row in self.rows for value in row.values()])
        values = iter(self.accelerator.reduce(flat, reduction="mean").tolist())
        lines = []
        for (step, rate, row), plateau in zip(self.rows, self.plateaus, strict=True):
            line = {"step": step, "lr": rate} | {name: next(values) for name in row}
            known = ("grad_norm", "loss", *self.scales)
            self._guard(line, [name for name in row if name not in known and not name.startswith("ramp/")])
            self._watch(line, plateau)
            lines.append(line)
        self.rows, self.plateaus = [], []
        return lines

    def _watch(self, line: dict[str, float], plateau: float | None) -> None:
        # without a margin the loss of a collapsed model is that of a perfect one
        stays = bool(plateau) and abs(line["loss"] - plateau) <= 0.01 * plateau
        self.at_plateau = self.at_plateau + 1 if stays else 0
        if self.at_plateau == self.patience and self.accelerator.is_main_process:
            warnings.warn(
                f"step {line['step']}: for {self.patience} steps the loss has been {plateau:.4g}, that of embeddings that are all the "
                f"same ({self.pairs} pairs): the training has collapsed. Start with all negatives and go over to the hardest later or "
                "gradually, e.g. ramps.hardest_negatives: {unit: steps, shape: linear, at: [200, 600], values: [0, 1]}; or lower "
                "optimizer.lr.",
                stacklevel=2,
            )
            self.collapsed_loss = None  # once is enough

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
