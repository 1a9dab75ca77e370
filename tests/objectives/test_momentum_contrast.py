import math

import pytest
import torch
from torch import nn

from hf_vlp.objectives.contrastive import contrastive_loss
from hf_vlp.objectives.distillation import distilled_cross_entropy
from hf_vlp.objectives.momentum_contrast import momentum_contrastive_loss

B, Q, E = 4, 7, 6


def unit(rows, seed, width=E, requires_grad=False):
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(made, dim=1).requires_grad_(requires_grad)


def inputs(**options):
    """image, text, teacher's image and text, queue's image and text."""
    sides = [unit(B, seed, **options) for seed in (0, 1)]
    return *sides, unit(B, 2), unit(B, 3), unit(Q, 4), unit(Q, 5)


def dot(one, other):
    return sum(float(a) * float(b) for a, b in zip(one, other))


def brute_force(embeds, temperature, weight, ids=None, queue_ids=None, exclude=False):
    """Every row written out in numbers."""
    images, texts, teacher_images, teacher_texts, queue_images, queue_texts = embeds
    every = list(range(B)) if ids is None else ids
    keys_of = every + (list(range(1000, 1000 + Q)) if queue_ids is None else queue_ids)
    total = 0.0
    for rows, teacher_rows, keys in (
        (images, teacher_images, [*teacher_texts, *queue_texts]),
        (texts, teacher_texts, [*teacher_images, *queue_images]),
    ):
        for row in range(len(rows)):
            same = {k for k in range(len(keys)) if k == row or (keys_of[k] == every[row] and every[row] != -100)}
            kept = [k for k in range(len(keys)) if not exclude or k == row or k not in same]
            positives = {row} if exclude else same
            student, teacher = (
                {k: math.exp(dot(side[row], keys[k]) / temperature) for k in kept} for side in (rows, teacher_rows)
            )
            for k in kept:
                target = (1 - weight) * (k in positives) / len(positives) + weight * teacher[k] / sum(teacher.values())
                total -= target * math.log(student[k] / sum(student.values()))
    return total / len(images) / 2


IDS = [
    (None, None),
    ([0, 1, 2, 3], [-100] * Q),
    ([5, 6, 5, 8], [1, 6, 2, 6, 5, -100, 9]),
    ([3, 3, 3, 3], [3, 1, 3, 3, 2, 2, 2]),
    ([3, -100, -100, 4], [-100, -100, 3, 9, 9, 9, 4]),
    ([5, 6, 5, 8], None),
]


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ids, queue_ids", IDS)
def test_the_loss_equals_brute_force(ids, queue_ids, weight, exclude):
    embeds, temperature = inputs(), torch.tensor(0.2)
    exclude = exclude and ids is not None
    tensors = {
        name: torch.tensor(value) for name, value in (("image_ids", ids), ("queue_ids", queue_ids)) if value is not None
    }
    loss, image_to_text, text_to_image = momentum_contrastive_loss(
        *embeds, temperature, weight, **tensors, exclude=exclude
    )
    assert loss.item() == pytest.approx(brute_force(embeds, 0.2, weight, ids, queue_ids, exclude), abs=1e-5)
    assert image_to_text.shape == text_to_image.shape == (B, B + Q)
    assert image_to_text[1, B + 2].item() == pytest.approx(dot(embeds[0][1], embeds[5][2]) / 0.2, abs=1e-5)
    assert text_to_image[3, 0].item() == pytest.approx(dot(embeds[1][3], embeds[2][0]) / 0.2, abs=1e-5)


def test_one_pair_and_one_of_the_queue_by_hand():
    image = text = teacher = torch.tensor([[1.0, 0.0]])
    queue_image, queue_text = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.6, 0.8]])
    # with temperature 0.5: 2 beside 1.2 for the text keys, 2 beside 0 for the image keys
    embeds = (image, text, teacher, teacher, queue_image, queue_text)
    hard = momentum_contrastive_loss(*embeds, torch.tensor(0.5), 0.0)[0]
    assert hard.item() == pytest.approx((0.371101 + 0.126928) / 2, abs=1e-5)  # softplus(-0.8) and softplus(-2)
    # the teacher is the student: the entropy of (0.689974, 0.310026) and of (0.880797, 0.119203)
    soft = momentum_contrastive_loss(*embeds, torch.tensor(0.5), 1.0)[0]
    assert soft.item() == pytest.approx((0.619121 + 0.365334) / 2, abs=1e-5)
    half = momentum_contrastive_loss(*embeds, torch.tensor(0.5), 0.25)[0]
    assert half.item() == pytest.approx(0.75 * hard.item() + 0.25 * soft.item(), abs=1e-6)


def test_without_queue_and_with_itself_as_teacher_it_is_the_plain_loss():
    images, texts, *_ = inputs()
    nothing = torch.zeros(0, E)
    found = momentum_contrastive_loss(images, texts, images, texts, nothing, nothing, torch.tensor(0.1), 0.0)[0]
    assert torch.allclose(found, contrastive_loss(images, texts, torch.tensor(10.0)))
    others = momentum_contrastive_loss(images, texts, texts, images, nothing, nothing, torch.tensor(0.1), 0.0)[0]
    assert not torch.allclose(found, others, atol=1e-2)


def test_identities_are_targets_or_left_out_or_negatives():
    embeds, temperature = inputs(), torch.tensor(0.1)
    ids = {"image_ids": torch.tensor([1, 1, 2, 3]), "queue_ids": torch.tensor([3, 9, 9, 9, 9, 1, 9])}
    losses = [
        momentum_contrastive_loss(*embeds, temperature, 0.0, **options)[0].item()
        for options in ({}, ids, {**ids, "exclude": True})
    ]
    assert len({round(loss, 3) for loss in losses}) == 3
    assert losses[2] < losses[0]  # fewer terms in the sum


def test_gradients_reach_the_embeddings_and_the_temperature_alone():
    embeds = [tensor.clone().requires_grad_() for tensor in inputs()]
    temperature = torch.tensor(0.2, requires_grad=True)
    loss = momentum_contrastive_loss(*embeds, temperature, 0.4)[0]
    loss.backward()
    assert all(tensor.grad.abs().max() > 1e-3 for tensor in (*embeds[:2], temperature))
    assert all(tensor.grad is None for tensor in embeds[2:])
    step = 1e-3
    with torch.no_grad():
        # the temperature of the teacher's targets is a constant: they are those of 0.2
        ahead, behind = (
            written_out(embeds, torch.tensor(0.2 + sign * step), torch.tensor(0.2), 0.4) for sign in (1, -1)
        )
        both = (brute_force(embeds, 0.2 + step, 0.4) - brute_force(embeds, 0.2 - step, 0.4)) / (2 * step)
    slope = ((ahead - behind) / (2 * step)).item()
    assert temperature.grad.item() == pytest.approx(slope, rel=1e-2)
    assert temperature.grad.item() != pytest.approx(both, rel=3e-2)


def written_out(embeds, temperature, teacher_temperature, weight):
    images, texts, teacher_images, teacher_texts, queue_images, queue_texts = embeds
    total = 0.0
    for rows, teacher_rows, keys in (
        (images, teacher_images, torch.cat([teacher_texts, queue_texts])),
        (texts, teacher_texts, torch.cat([teacher_images, queue_images])),
    ):
        soft = (teacher_rows @ keys.T / teacher_temperature).softmax(dim=1)
        targets = weight * soft + (1 - weight) * torch.eye(B, B + Q)
        total = total - (targets * (rows @ keys.T / temperature).log_softmax(dim=1)).sum(dim=1).mean() / 2
    return total


@pytest.mark.parametrize("exclude", [False, True])
def test_small_temperatures_stay_finite(exclude):
    embeds = [tensor.clone().requires_grad_() for tensor in inputs()]
    temperature = torch.tensor(1e-3, requires_grad=True)
    ids = {"image_ids": torch.tensor([1, 1, 2, 3]), "queue_ids": torch.tensor([3, 9, 9, 9, 9, 1, 9])}
    loss = momentum_contrastive_loss(*embeds, temperature, 0.4, **ids, exclude=exclude)[0]
    loss.backward()
    assert loss.isfinite() and loss > 1 and temperature.grad.isfinite() and embeds[0].grad.isfinite().all()


def test_left_out_keys_have_no_gradient():
    """A key of the same image is not pushed away: the loss does not know where it is."""
    embeds = list(inputs())
    ids = {"image_ids": torch.arange(B), "queue_ids": torch.tensor([2, 9, 9, 9, 9, 9, 9])}

    def of_row(row, **options):
        images = embeds[0].clone().requires_grad_()
        momentum_contrastive_loss(images, *embeds[1:], torch.tensor(0.2), 0.4, **options)[0].backward()
        return images.grad[row]

    before = [[of_row(row, **ids, exclude=exclude) for row in (1, 2)] for exclude in (True, False)]
    embeds[5] = embeds[5].clone()
    embeds[5][0] = unit(1, 50)[0]
    after = [[of_row(row, **ids, exclude=exclude) for row in (1, 2)] for exclude in (True, False)]
    assert torch.equal(before[0][1], after[0][1])
    assert not torch.allclose(before[0][0], after[0][0]) and not torch.allclose(before[1][1], after[1][1])


def test_float32_under_autocast():
    embeds = [unit(rows, seed, width=64) for seed, rows in enumerate((B, B, B, B, Q, Q))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = momentum_contrastive_loss(*embeds, torch.tensor(0.01), 0.4)
        assert (embeds[0] @ embeds[1].T).dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert torch.equal(found[0], momentum_contrastive_loss(*embeds, torch.tensor(0.01), 0.4)[0])
    halves = [tensor.bfloat16() for tensor in embeds]
    assert momentum_contrastive_loss(*halves, torch.tensor(0.01), 0.4)[0].dtype == torch.float32


def test_without_distillation_the_teachers_rows_are_keys_alone():
    images, texts, *rest = inputs()
    poisoned = torch.full((B, E), torch.nan)
    loss = momentum_contrastive_loss(images, texts, *rest, torch.tensor(0.2), 0.0)[0]
    assert loss.isfinite()
    assert momentum_contrastive_loss(images, texts, poisoned, *rest[1:], torch.tensor(0.2), 0.0)[0].isnan()


def test_leaving_out_asks_for_identities():
    with pytest.raises(ValueError, match="exclude=True leaves out other pairs.*give image_ids"):
        momentum_contrastive_loss(*inputs(), torch.tensor(0.2), 0.4, exclude=True)


# The cross-entropy by itself


def test_soft_and_hard_labels_by_hand():
    logits, teacher = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [math.log(4), 0.0]])
    labels = torch.tensor([1, 0])
    hard = (-math.log(3 / 4) + math.log(2)) / 2
    soft = (-(math.log(1 / 4) + math.log(3 / 4)) / 2 + math.log(2)) / 2
    for weight in (0.0, 0.4, 1.0):
        found = distilled_cross_entropy(logits, labels, teacher, weight).item()
        assert found == pytest.approx((1 - weight) * hard + weight * soft, abs=1e-6)
    assert hard != pytest.approx(soft, abs=1e-2)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_distributions_and_left_out_rows(weight):
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 7), torch.randn(5, 7)
    labels = torch.tensor([3, -100, 0, 6, -100])
    kept = labels != -100
    whole, few = (
        distilled_cross_entropy(logits[rows], labels[rows], teacher[rows], weight) for rows in (slice(None), kept)
    )
    assert torch.allclose(whole, few)
    distributions = nn.functional.one_hot(labels[kept], 7).float()
    assert torch.allclose(distilled_cross_entropy(logits[kept], distributions, teacher[kept], weight), few)
    shared = (distributions + distributions.roll(1, 1)) / 2
    other = distilled_cross_entropy(logits[kept], shared, teacher[kept], weight)
    assert torch.allclose(other, few, atol=1e-3) == (weight == 1.0)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_nothing_to_count_is_a_loss_of_zero(weight):
    logits = torch.randn(3, 4, requires_grad=True)
    for rows in (3, 0):
        loss = distilled_cross_entropy(logits[:rows], torch.full((rows,), -100), torch.randn(rows, 4), weight)
        loss.backward()
        assert loss == 0 and not logits.grad.any()


def test_the_teacher_has_no_gradient_and_is_not_read_at_weight_zero():
    logits, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distilled_cross_entropy(logits, torch.tensor([0, 1, 2]), teacher, 0.4).backward()
    assert teacher.grad is None and logits.grad.any()
    plain = distilled_cross_entropy(logits, torch.tensor([0, 1, 2]), None, 0.0)
    assert torch.allclose(plain, nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])))
    labels = torch.eye(4)[:3]
    distilled_cross_entropy(logits, labels, teacher, 0.4)
    assert torch.equal(labels, torch.eye(4)[:3])
