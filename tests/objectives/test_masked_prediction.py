import pytest
import torch
from torch import nn

from hf_vlp.objectives.masked_prediction import masked_prediction_loss, patch_colours


def test_the_loss_by_hand():
    head = nn.Identity()  # states are logits
    states = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]]])
    loss, correct, count = masked_prediction_loss(states, torch.tensor([[-100, 0, 0]]), head)
    expected = (torch.tensor([-3.0, 2.0]).exp() + 1).log().mean()  # -log of 1 / (1 + e^-3) and of 1 / (1 + e^2)
    assert loss.item() == pytest.approx(expected.item()) and (correct.item(), count.item()) == (1, 2)
    assert masked_prediction_loss(states, torch.tensor([[-100, 0, 1]]), head)[0] < loss


def test_several_classifications_of_one_place_equal_each_of_them():
    torch.manual_seed(0)
    head, states = nn.Linear(5, 3 * 4), torch.randn(2, 6, 5)
    labels = torch.randint(4, (2, 6, 3))
    labels[0, :4] = -100
    labels[1, 0, 1] = -100  # one of three alone
    loss, correct, count = masked_prediction_loss(states, labels, head)
    logits = head(states).unflatten(-1, (3, 4))
    assert count == (labels != -100).sum() and correct == (logits.argmax(-1) == labels).sum()
    assert torch.allclose(loss, nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-100))
    turned = head(states).unflatten(-1, (4, 3)).transpose(-1, -2)
    other = nn.functional.cross_entropy(turned.flatten(0, 2), labels.flatten(), ignore_index=-100)
    assert not torch.allclose(loss, other, atol=1e-3)


def test_nothing_masked_is_a_loss_of_zero_with_gradients_of_zero():
    head, states = nn.Linear(4, 7), torch.randn(2, 3, 4, requires_grad=True)
    loss, correct, count = masked_prediction_loss(states, torch.full((2, 3), -100), head)
    loss.backward()
    assert loss == correct == count == 0
    assert head.weight.grad is not None and not head.weight.grad.any() and not states.grad.any()


def test_logits_are_computed_where_something_is_masked_alone():
    seen, head = [], nn.Linear(4, 7)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    labels = torch.full((2, 3), -100)
    labels[1, 2] = 4
    states = torch.randn(2, 3, 4)
    loss = masked_prediction_loss(states, labels, head)[0]
    assert seen == [(1, 4)]
    assert torch.allclose(loss, nn.functional.cross_entropy(head(states).flatten(0, 1), labels.flatten()))


def test_colours_of_patches_by_hand():
    pixels = torch.zeros(1, 3, 2, 4)
    pixels[0, 0] = 1.0  # red at its most: 255
    pixels[0, 1, :, 2:] = torch.tensor(
        [[-1.0, 0.0], [0.0, 0.2]]
    )  # green of the second patch: 0, 127.5, 127.5, 153 -> 102
    pixels[0, 2] = -1.0
    assert patch_colours(pixels, 2).tolist() == [[[255, 127, 0], [255, 102, 0]]]
    assert patch_colours(pixels, 2, mean=0.0, std=1.0)[0, 0].tolist() == [255, 0, 0]  # beyond the range it is cut
