"""Linear probe: logistic regression on frozen features (Radford et al. 2021, CLIP, section 3.2 and appendix A.3).

Minimises, as scikit-learn's `LogisticRegression` does, C * (sum of the log losses) + 1/2 * |weight|^2 with the bias
free. With two classes the model is binary: one row of weights, the margin of the second class.

The authors' probes are scikit-learn's, which stops before the optimum: at a gradient of 1e-4 of the mean loss. Where the
penalty is weak its weights are still visibly away from the optimum then, so a probe with the same numbers must take the
same steps: SciPy's L-BFGS-B from zeros, with scikit-learn's order of the parameters, line search and stopping rule.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
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
    features: torch.Tensor, labels: torch.Tensor, C: float = 0.316, max_iter: int = 1000, tolerance: float = 1e-4
) -> LinearProbe:
    """Fit by L-BFGS-B in float64, from zeros.

    Stops, as scikit-learn does, when no entry of the gradient exceeds `tolerance`, or a step lowers the objective by less
    than 64 roundings of it, or after `max_iter` steps.

    Args:
        features: [N, E], e.g. of `encode_image` (not normalised, as the paper's probes).
        labels: [N] int64, any values, at least two different.
        C: inverse strength of the penalty; 0.316 is the authors' choice for CIFAR-100, `choose_c` sweeps it.
        max_iter: iterations; reaching it is a warning.
        tolerance: of the largest gradient entry of the objective divided by C * N; 1e-4 is scikit-learn's, a smaller one
            goes on towards the optimum.

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
    count, width = x.shape

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = _unflatten(flat, rows, width + 1).to(x.device).requires_grad_()
        weight, bias = parameters[:, :width], parameters[:, width]
        # divided by C * N: the scale of the mean loss, on which the stopping rule is meant
        with torch.enable_grad():
            loss = cross_entropy(_logits(x, weight, bias), target) + weight.square().sum() / (2 * C * count)
            (gradient,) = torch.autograd.grad(loss, parameters)
        return loss.item(), gradient.T.reshape(-1).cpu().numpy()

    options = {"maxiter": max_iter, "maxls": 50, "gtol": tolerance, "ftol": 64 * np.finfo(float).eps}
    found = minimize(objective, np.zeros(rows * (width + 1)), jac=True, method="L-BFGS-B", options=options)
    if not found.success:
        warnings.warn(
            f"the probe has not converged after {found.nit} iterations (largest gradient {abs(found.jac).max():.1e}): "
            f"raise max_iter or scale the features.",
            stacklevel=2,
        )
    parameters = _unflatten(found.x, rows, width + 1).to(x.device)
    return LinearProbe(parameters[:, :width].contiguous(), parameters[:, width].contiguous(), classes)


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


def _unflatten(flat: np.ndarray, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] from parameters that stand column by column."""
    return torch.from_numpy(flat.copy()).view(columns, rows).T


def _logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = x @ weight.T + bias
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if len(weight) == 1 else logits
