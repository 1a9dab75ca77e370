import math

import pytest
import torch
from torch import nn

from hf_vlp.objectives.matching import draw_negatives, matching_labels, matching_loss, negative_weights


def similarities(size=5, seed=0):
    return 3 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def test_weights_by_hand():
    table = torch.tensor([[5.0, 0.0, math.log(3)], [0.0, 0.0, 0.0], [math.log(2), 0.0, 9.0]])
    weights = negative_weights(table)
    assert weights.diagonal().tolist() == [0, 0, 0]
    assert (weights[0, 2] / weights[0, 1]).item() == pytest.approx(3)
    assert (weights[2, 0] / weights[2, 1]).item() == pytest.approx(2)
    assert weights[1].tolist() == pytest.approx([1 / 3, 0, 1 / 3])
    torch.testing.assert_close(weights[0, 1:], table[0].softmax(0)[1:])


@pytest.mark.parametrize("ids", [None, [1, 2, 3, 4, 5], [1, 2, 1, 1, 2], [7, 7, 7, 7, 7], [-100, 3, -100, 3, -100]])
def test_what_matches_the_row_has_no_weight_and_all_else_has(ids):
    for table in (similarities(), 1000 * similarities(), torch.diag(torch.full((5,), 500.0))):
        weights = negative_weights(table, None if ids is None else torch.tensor(ids))
        for row in range(5):
            for column in range(5):
                matches = row == column or (ids is not None and ids[row] == ids[column] != -100)
                assert (weights[row, column] == 0) == matches
                if not matches:
                    assert weights[row, column].item() == pytest.approx(table[row].softmax(0)[column].item(), abs=1e-7)
    assert weights.isfinite().all() and not weights.requires_grad


def draw_by_hand(weights, draw):
    """Walk along the row until the share drawn is reached."""
    total = sum(weights)
    if total == 0:
        return None
    reached = 0.0
    for index, weight in enumerate(weights):
        reached += weight
        if reached > draw * total:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


@pytest.mark.parametrize("ids", [None, [1, 2, 1, 1, 2], [7, 7, 7, 7, 7], [7, 7, 7, 7, 8]])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_draws_equal_a_walk_along_the_row(ids, scale):
    weights = negative_weights(scale * similarities(), None if ids is None else torch.tensor(ids))
    for seed in range(20):
        draws = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        index, found = draw_negatives(weights, draws)
        assert index.dtype == torch.int64 and found.dtype == torch.bool
        wanted = [draw_by_hand(row, draw) for row, draw in zip(weights.double().tolist(), draws.tolist())]
        assert [i if f else None for i, f in zip(index.tolist(), found.tolist())] == wanted
        assert (0 <= index).all() and (index < 5).all()


def test_the_ends_of_the_interval_never_reach_a_weight_of_zero():
    weights = torch.tensor(
        [[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0, 1e-30], [0.2, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]
    )
    for draw, wanted in (
        (0.0, [1, 4, 0]),
        (0.2999, [1, 4, 0]),
        (0.3001, [3, 4, 0]),
        (1 - 2**-53, [3, 4, 0]),
        (1.0, [3, 4, 0]),
    ):
        index, found = draw_negatives(weights, torch.full((4,), draw, dtype=torch.float64))
        assert index[:3].tolist() == wanted and found.tolist() == [True, True, True, False]


def test_frequencies_follow_the_weights():
    weights = negative_weights(torch.tensor([[9.0, 0.0, math.log(3), math.log(6)]] * 4))
    draws = (torch.arange(4000) + 0.5) / 4000
    index = draw_negatives(weights[:1].expand(4000, -1), draws)[0]
    shares = torch.bincount(index, minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0, 0.1, 0.3, 0.6], abs=1e-3)


def test_rows_that_underflow_still_have_negatives_of_equal_chance():
    weights = negative_weights(torch.diag(torch.full((4,), 1e4)))
    assert (torch.diag(torch.full((4,), 1e4)).softmax(1) > 0).sum() == 4  # the diagonal alone
    for draw, wanted in ((0.1, [1, 0, 0, 0]), (0.5, [2, 2, 1, 1]), (0.9, [3, 3, 3, 2])):
        index, found = draw_negatives(weights, torch.full((4,), draw))
        assert index.tolist() == wanted and found.all()


@pytest.mark.parametrize("size, ids", [(1, None), (3, [5, 5, 5])])
def test_a_batch_of_one_image_has_no_negatives(size, ids):
    weights = negative_weights(similarities(size), None if ids is None else torch.tensor(ids))
    index, found = draw_negatives(weights, torch.full((size,), 0.7))
    assert not found.any() and (index < size).all()
    labels = matching_labels(found, found)
    assert labels.tolist() == [1] * size + [-100] * 2 * size
    logits = torch.randn(3 * size, 2, requires_grad=True)
    loss, _, count = matching_loss(logits, labels)
    assert count == size and torch.allclose(loss, nn.functional.cross_entropy(logits[:size], labels[:size]))


def test_the_loss_by_hand():
    labels = matching_labels(torch.tensor([True, False]), torch.tensor([True, True]))
    assert labels.tolist() == [1, 1, 0, -100, 0, 0]
    three = math.log(3)
    logits = torch.tensor([[0.0, three], [three, 0.0], [three, 0.0], [0.0, 99.0], [0.0, three], [0.0, 0.0]])
    loss, correct, count = matching_loss(logits, labels)
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    assert loss.item() == pytest.approx((2 * right + 2 * wrong + math.log(2)) / 5, abs=1e-6)
    assert (correct.item(), count.item()) == (3, 5)  # a tie goes to the first class, no match
    assert matching_loss(-2 * logits, labels)[0] > loss + 0.1
    swapped = matching_labels(torch.tensor([True, True]), torch.tensor([True, False]))
    assert matching_loss(logits, swapped)[0] > loss


def test_all_labels_at_once_are_the_plain_cross_entropy():
    every = torch.ones(4, dtype=torch.bool)
    logits = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1] * 4 + [0] * 8)
    assert torch.equal(matching_labels(every, every), labels)
    loss, correct, count = matching_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32 and count == 12 and correct == (logits.bfloat16().argmax(1) == labels).sum()
    assert torch.allclose(loss, nn.functional.cross_entropy(logits.bfloat16().float(), labels))
