import pytest
import torch
from torch import nn

from hf_vlp.objectives.masked_prediction import (
    distilled_masked_prediction_loss,
    masked_prediction_loss,
    patch_colours,
)


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


# With a teacher


def taught(seed=0):
    torch.manual_seed(seed)
    states, teacher_states = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    labels = torch.full((2, 5), -100)
    labels[0, 1], labels[0, 4], labels[1, 2] = 3, 0, 6
    return states, labels, nn.Linear(4, 7), teacher_states, nn.Linear(4, 7)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_soft_labels_equal_a_walk_over_the_places(weight):
    states, labels, head, teacher_states, teacher_head = taught()
    total, right = 0.0, 0
    for row, place in ((0, 1), (0, 4), (1, 2)):
        log_probs = head(states[row, place]).log_softmax(0)
        soft = teacher_head(teacher_states[row, place]).softmax(0)
        label = labels[row, place]
        total += (-(1 - weight) * log_probs[label] - weight * (soft * log_probs).sum()).item() / 3
        right += int(log_probs.argmax() == label)
    loss, correct, count = distilled_masked_prediction_loss(states, labels, head, teacher_states, teacher_head, weight)
    assert loss.item() == pytest.approx(total, abs=1e-6) and (correct.item(), count.item()) == (right, 3)
    plain = masked_prediction_loss(states, labels, head)
    assert torch.allclose(loss, plain[0], atol=1e-3) == (weight == 0) and (correct, count) == plain[1:]
    loss.backward()
    assert teacher_states.grad is None and teacher_head.weight.grad is None
    assert head.weight.grad.any() and states.grad[0, 1].any() and not states.grad[1, 1].any()


def test_the_teacher_is_asked_where_something_is_masked_and_only_if_it_counts():
    states, labels, head, teacher_states, teacher_head = taught()
    seen = []
    teacher_head.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape, torch.is_grad_enabled())))
    distilled_masked_prediction_loss(states, labels, head, teacher_states, teacher_head, 0.4)
    assert seen == [((3, 4), False)]
    distilled_masked_prediction_loss(states, labels, head, teacher_states, teacher_head, 0.0)
    assert len(seen) == 1


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_nothing_masked_with_a_teacher_is_a_loss_of_zero(weight):
    states, labels, head, teacher_states, teacher_head = taught()
    loss, correct, count = distilled_masked_prediction_loss(
        states, torch.full_like(labels, -100), head, teacher_states, teacher_head, weight
    )
    loss.backward()
    assert loss == correct == count == 0 and not states.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_a_traced_graph_finds_the_same(monkeypatch):
    everything = taught()
    eager = distilled_masked_prediction_loss(*everything, 0.4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = distilled_masked_prediction_loss(*everything, 0.4)
    assert all(torch.allclose(one.float(), other.float()) for one, other in zip(eager, traced, strict=True))
    assert not torch.allclose(eager[0], distilled_masked_prediction_loss(*everything, 0.5)[0])
