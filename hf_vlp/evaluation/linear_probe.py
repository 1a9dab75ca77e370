"""Linear probe: logistic regression on frozen features (Radford et al. 2021, CLIP, section 3.2 and appendix A.3).

Minimises, as scikit-learn's `LogisticRegression` does, C * (sum of the log losses) + 1/2 * |weight|^2 with the bias
free. With two classes the model is binary: one row of weights, the margin of the second class.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy


@dataclass
class LinearProbe:
    """weight [K, E], bias [K] ([1, E] and [1] with two classes), float64; classes [K] int64: the labels, ascending."""

    weight: torch.Tensor
    bias: torch.Tensor
    classes: torch.Tensor

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """[N, K] logits for features [N, E]."""
        return _logits(features.to(self.weight), self.weight, self.bias)

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [K, E] and bias [K] of an equivalent linear layer, for two classes too."""
        if len(self.weight) > 1:
            return self.weight, self.bias
        zeros = torch.zeros_like
        return torch.cat([zeros(self.weight), self.weight]), torch.cat([zeros(self.bias), self.bias])

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """[N] labels for features [N, E]."""
        return self.classes[self.scores(features).argmax(dim=1)]

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Percent of features [N, E] that get their label [N]."""
        return 100.0 * float((self.predict(features) == labels.to(self.classes)).double().mean())

    def mean_per_class_accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """The same, averaged over the classes that occur among the labels."""
        labels = labels.to(self.classes)
        right = (self.predict(features) == labels).double()
        return 100.0 * float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


def fit_linear_probe(
    features: torch.Tensor, labels: torch.Tensor, C: float = 0.316, max_iter: int = 1000, tolerance: float = 1e-6
) -> LinearProbe:
    """Fit by L-BFGS in float64.

    Args:
        features: [N, E], e.g. of `encode_image` (not normalised, as the paper's probes).
        labels: [N] int64, any values, at least two different.
        C: inverse strength of the penalty; 0.316 is the authors' choice for CIFAR-100, `choose_c` sweeps it.
        max_iter: iterations; reaching it is a warning.
        tolerance: of the largest gradient entry of the objective divided by C * N.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, one class only, C or max_iter not positive.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} must be [N, E] and [N].")
    if not C > 0 or max_iter < 1:
        raise ValueError(f"C={C} and max_iter={max_iter} must be positive.")
    if not features.isfinite().all():
        raise ValueError(f"the features of row {int((~features.isfinite().all(1)).nonzero()[0])} are not finite.")
    classes, target = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(labels)} labels are {classes.tolist()}: a probe needs two classes at least.")
    x = features.detach().double()
    rows = 1 if len(classes) == 2 else len(classes)
    weight = x.new_zeros(rows, x.shape[1], requires_grad=True)
    bias = x.new_zeros(rows, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=max_iter * 2,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        # divided by C * N: the scale of the mean loss, on which steps and tolerance are well-sized
        with torch.enable_grad():
            loss = cross_entropy(_logits(x, weight, bias), target) + weight.square().sum() / (2 * C * len(x))
            loss.backward()
        return loss

    solver.step(objective)
    largest = max(float(parameter.grad.abs().max()) for parameter in (weight, bias))
    if largest > 100 * tolerance:
        warnings.warn(
            f"the probe has not converged after {max_iter} iterations (largest gradient {largest:.1e}): raise max_iter "
            f"or scale the features.",
            stacklevel=2,
        )
    return LinearProbe(weight.detach(), bias.detach(), classes)


def choose_c(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    values: Sequence[float] = tuple(10.0**power for power in range(-6, 7)),
    max_iter: int = 1000,
) -> tuple[float, dict[float, float]]:
    """The C with the highest validation accuracy, the smallest of equals.

    Args:
        train, validation: features [N, E] and labels [N] each.
        values: to try.

    Returns:
        The best value, and the accuracy in percent of each.
    """
    accuracies = {value: fit_linear_probe(*train, C=value, max_iter=max_iter).accuracy(*validation) for value in values}
    return max(sorted(accuracies), key=accuracies.get), accuracies


def _logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = x @ weight.T + bias
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if len(weight) == 1 else logits
