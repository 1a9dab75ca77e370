"""The linear probe against scikit-learn's stored solution, and the conditions of its optimum."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hf_vlp.evaluation.linear_probe import choose_c, fit_linear_probe

GOLDEN = Path(__file__).parents[1] / "golden" / "clip" / "linear_probe"


def blobs(classes, count=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, 6, generator=generator)
    return centres[labels] + torch.randn(count, 6, generator=generator), labels


def test_the_stored_solution():
    inputs, outputs = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text())
    train = inputs["train_features"], inputs["train_labels"]
    test = inputs["test_features"], inputs["test_labels"]
    probe = fit_linear_probe(*train, C=config["C"], max_iter=config["max_iter"])
    assert torch.equal(probe.predict(test[0]), outputs["predictions"])
    assert probe.accuracy(*test) == pytest.approx(float(outputs["accuracy_percent"]), abs=1e-3)
    torch.testing.assert_close(probe.weight.float(), outputs["coef"], atol=1e-2, rtol=0)
    torch.testing.assert_close(probe.bias.float(), outputs["intercept"], atol=1e-2, rtol=0)
    other = fit_linear_probe(*train, C=10 * config["C"])
    assert (other.weight.float() - outputs["coef"]).abs().max() > 0.1


# what scikit-learn 1.9.1 gives: classes, C, intercepts, first three coefficients of the first row
SKLEARN = [
    (2, 100.0, [-6.57946], [-1.00640, -0.13183, -2.78286]),
    (3, 30.0, [2.68580, -2.93058, 0.24478], [0.86290, -0.82033, 1.46178]),
    (4, 10.0, [4.88218, -3.59326, 0.50259, -1.79152], [1.64865, -0.96231, 1.72323]),
]


@pytest.mark.parametrize(("classes", "C", "intercepts", "coefficients"), SKLEARN)
def test_stops_where_scikit_learn_stops(classes, C, intercepts, coefficients):
    inputs = load_file(GOLDEN / "inputs.safetensors")
    kept = inputs["train_labels"] < classes
    train = inputs["train_features"][kept], inputs["train_labels"][kept]

    def difference(**options) -> float:
        probe = fit_linear_probe(*train, C=C, **options)
        found = torch.cat([probe.bias, probe.weight[0, :3]])
        return float((found - torch.tensor(intercepts + coefficients)).abs().max())

    assert difference() < 5e-3
    assert difference(tolerance=1e-7) > 1e-2  # the optimum itself is somewhere else


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_gradient_of_the_documented_objective_vanishes(classes):
    features, labels = blobs(classes)
    C = 0.7
    probe = fit_linear_probe(features, labels, C=C, tolerance=1e-6)
    assert probe.weight.shape == (1 if classes == 2 else classes, 6)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    logits = features.double() @ weight.T + bias
    if classes == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    (C * cross_entropy(logits, labels, reduction="sum") + 0.5 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    assert weight.abs().max() > 0.1
    # the bias is free of the penalty: moving it away from zero costs nothing in itself
    torch.testing.assert_close(probe.scores(features), logits.detach())
    layer_weight, layer_bias = probe.head()
    assert layer_weight.shape == (classes, 6)
    torch.testing.assert_close(features.double() @ layer_weight.T + layer_bias, logits.detach())


def test_labels_may_be_any_numbers():
    features, labels = blobs(3)
    names = torch.tensor([40, 7, 1000])
    probe, plain = fit_linear_probe(features, names[labels]), fit_linear_probe(features, labels)
    assert probe.classes.tolist() == [7, 40, 1000]
    assert torch.equal(probe.predict(features), names[plain.predict(features)])
    assert probe.accuracy(features, names[labels]) == plain.accuracy(features, labels) > 50


def test_mean_per_class_accuracy():
    features, labels = blobs(2)
    probe = fit_linear_probe(features, labels)
    right = probe.predict(features) == labels
    uneven = torch.cat([torch.arange(90)[labels == 0], torch.arange(90)[labels == 1][:3]])
    by_class = [right[uneven][labels[uneven] == label].double().mean() for label in (0, 1)]
    assert probe.mean_per_class_accuracy(features[uneven], labels[uneven]) == pytest.approx(50 * float(sum(by_class)))


def test_choosing_c():
    train, validation = blobs(4, seed=1), blobs(4, seed=1)
    best, accuracies = choose_c(train, validation, values=(1e-6, 1.0, 1e-5))
    assert set(accuracies) == {1e-6, 1.0, 1e-5} and accuracies[best] == max(accuracies.values())
    assert choose_c(train, validation, values=(2.0, 2.0 + 1e-9))[0] == 2.0  # the smallest of equals


def test_bad_input_and_no_convergence():
    features, labels = blobs(3)
    with pytest.raises(ValueError, match="two classes"):
        fit_linear_probe(features, torch.zeros_like(labels))
    with pytest.raises(ValueError, match=r"\[N, E\] and \[N\]"):
        fit_linear_probe(features, labels[:5])
    with pytest.raises(ValueError, match="must be positive"):
        fit_linear_probe(features, labels, C=0)
    broken = features.clone()
    broken[4, 1] = torch.inf
    with pytest.raises(ValueError, match="row 4 are not finite"):
        fit_linear_probe(broken, labels)
    with pytest.warns(UserWarning, match="not converged after 1 iterations"):
        fit_linear_probe(features, labels, C=100.0, max_iter=1)
