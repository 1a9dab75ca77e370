import math

import pytest
import torch

from hf_vlp.objectives.sigmoid import sigmoid_loss
from tests.objectives.test_contrastive import rank_losses, unit


def brute_force(images, texts, scale, bias, ids):
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = scale * float((image * text).sum()) + bias
            sign = 1 if ids[i] == ids[j] else -1
            total += math.log(1 + math.exp(-sign * logit))
    return total / len(images)


def test_two_pairs_worked_by_hand():
    # logits with scale 2 and bias -1: [[1, -1], [0.2, 0.6]]; signs + on the diagonal, - elsewhere
    images, texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    expected = (0.313262 + 0.313262 + 0.798139 + 0.437488) / 2
    assert sigmoid_loss(images, texts, torch.tensor(2.0), bias=torch.tensor(-1.0)).item() == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 0, 1, 2], [1, 1, 1, 1]])
def test_identities_equal_brute_force(ids):
    images, texts = unit(4), unit(4, seed=1)
    loss = sigmoid_loss(images, texts, torch.tensor(10.0), bias=torch.tensor(-3.0), image_ids=torch.tensor(ids))
    assert loss.item() == pytest.approx(brute_force(images, texts, 10.0, -3.0, ids), rel=1e-5)
    plain = sigmoid_loss(images, texts, torch.tensor(10.0), bias=torch.tensor(-3.0))
    assert (abs(plain.item() - loss.item()) > 1e-3) == (len(set(ids)) < 4)


@pytest.mark.parametrize("ids", [None, [4, 5, 5, 7, 4, 9, 10, 4]])
def test_mean_over_ranks_is_the_global_loss_with_its_gradient(ids):
    ids = None if ids is None else torch.tensor(ids)
    sides = [
        (unit(8, requires_grad=True), unit(8, seed=1, requires_grad=True), torch.tensor(4.0, requires_grad=True))
        for _ in range(2)
    ]
    biases = [torch.tensor(-2.0, requires_grad=True) for _ in range(2)]
    whole = sigmoid_loss(*sides[0], bias=biases[0], image_ids=ids)
    split = sum(rank_losses(sigmoid_loss, *sides[1], ids, bias=biases[1])) / 2
    assert torch.allclose(whole, split)
    whole.backward()
    split.backward()
    for one, other in zip((*sides[0], biases[0]), (*sides[1], biases[1]), strict=True):
        assert one.grad.abs().max() > 1e-3 and torch.allclose(one.grad, other.grad, atol=1e-5)
    local = sum(rank_losses(sigmoid_loss, *sides[1], ids, local=True, bias=biases[1])) / 2
    assert not torch.allclose(whole, local, atol=1e-2)


def test_permuting_pairs_together_changes_nothing_and_apart_everything():
    images, texts, scale, bias = unit(6), unit(6, seed=1), torch.tensor(5.0), torch.tensor(-1.0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = sigmoid_loss(images, texts, scale, bias=bias)
    assert torch.allclose(sigmoid_loss(images[order], texts[order], scale, bias=bias), loss)
    assert not torch.allclose(sigmoid_loss(images, texts[order], scale, bias=bias), loss, atol=1e-3)


def test_float32_under_autocast_and_finite_at_extremes():
    images, texts = unit(4), unit(4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid_loss(images, texts, torch.tensor(10.0), bias=torch.tensor(-10.0))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sigmoid_loss(images, texts, torch.tensor(10.0), bias=torch.tensor(-10.0)))
    assert sigmoid_loss(images, texts, torch.tensor(1e4), bias=torch.tensor(0.0)).isfinite()
