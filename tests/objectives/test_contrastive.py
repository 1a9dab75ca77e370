import math

import pytest
import torch
from torch import nn

from hf_vlp.layers.logit_scale import LogitScale
from hf_vlp.objectives.contrastive import contrastive_loss, match_targets


def unit(rows, width=6, seed=0, requires_grad=False):
    draw = torch.Generator().manual_seed(seed)
    made = nn.functional.normalize(torch.randn(rows, width, generator=draw), dim=1)
    return made.requires_grad_(requires_grad)


def brute_force(images, texts, scale, ids):
    """Every row and column written out: minus the mean log-probability of its positives."""
    total = 0.0
    logits = [[float(scale) * sum(float(a * b) for a, b in zip(image, text)) for text in texts] for image in images]
    turned = [list(column) for column in zip(*logits)]
    for table in (logits, turned):
        for i, row in enumerate(table):
            log_sum = math.log(sum(math.exp(value) for value in row))
            positives = [j for j in range(len(row)) if ids[j] == ids[i]]
            total -= sum(row[j] - log_sum for j in positives) / len(positives) / len(table) / 2
    return total


def test_two_pairs_worked_by_hand():
    # logits [[2, 0], [1.2, 1.6]]: rows give softplus(-2) and softplus(-0.4), columns softplus(-0.8) and softplus(-1.6)
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.eye(2)
    expected = (0.126928 + 0.513015 + 0.371101 + 0.183900) / 4
    assert contrastive_loss(images, texts, torch.tensor(2.0)).item() == pytest.approx(expected, abs=1e-5)


def test_alike_embeddings_leave_chance():
    same = torch.ones(5, 4) / 2
    assert contrastive_loss(same, same, torch.tensor(30.0)).item() == pytest.approx(math.log(5), abs=1e-5)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 0, 1, 2], [5, 5, 5, 9], [1, 1, 1, 1]])
def test_identities_equal_brute_force(ids):
    images, texts, scale = unit(4), unit(4, seed=1), torch.tensor(7.0)
    loss = contrastive_loss(images, texts, scale, image_ids=torch.tensor(ids))
    assert loss.item() == pytest.approx(brute_force(images, texts, scale, ids), abs=1e-5)
    plain = contrastive_loss(images, texts, scale)
    assert plain.item() == pytest.approx(brute_force(images, texts, scale, range(4)), abs=1e-5)
    assert (abs(plain.item() - loss.item()) > 1e-3) == (len(set(ids)) < 4)


def test_two_captions_of_one_picture_do_not_repel():
    """With identities the loss has its minimum where the two captions coincide; the plain loss pushes them apart."""
    picture = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    captions = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    ids = torch.tensor([3, 3])
    contrastive_loss(picture, captions, torch.tensor(10.0), image_ids=ids).backward()
    assert captions.grad.abs().max() < 1e-6

    apart = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert contrastive_loss(picture, apart, torch.tensor(10.0), image_ids=ids) > contrastive_loss(
        picture, captions.detach(), torch.tensor(10.0), image_ids=ids
    )


def test_targets_from_identities():
    rows, columns = torch.tensor([1, 2]), torch.tensor([1, 2, 1, 3])
    assert match_targets(rows, columns).tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]
    assert match_targets(torch.tensor([9]), columns).tolist() == [[0, 0, 0, 0]]


def test_permuting_pairs_together_changes_nothing_and_apart_everything():
    images, texts, scale = unit(6), unit(6, seed=1), torch.tensor(5.0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = contrastive_loss(images, texts, scale)
    assert torch.allclose(contrastive_loss(images[order], texts[order], scale), loss)
    assert not torch.allclose(contrastive_loss(images, texts[order], scale), loss, atol=1e-3)


def test_sides_may_be_exchanged():
    images, texts, scale = unit(6), unit(6, seed=1), torch.tensor(5.0)
    assert torch.allclose(contrastive_loss(images, texts, scale), contrastive_loss(texts, images, scale))


def rank_losses(loss_function, images, texts, scale, ids, ranks=2, local=False, **more):
    """The losses of `ranks` processes, each with its own rows, the others' rows gathered."""
    size = len(images) // ranks
    losses = []
    for rank in range(ranks):
        own = slice(rank * size, (rank + 1) * size)
        gathered = {} if local else {"all_image_embeds": images, "all_text_embeds": texts, "offset": rank * size}
        if ids is not None:
            gathered["image_ids"] = ids[own]
            if not local:
                gathered["all_image_ids"] = ids
        losses.append(loss_function(images[own], texts[own], scale, **gathered, **more))
    return losses


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("ids", [None, [4, 5, 6, 7, 8, 9, 10, 11], [4, 5, 5, 7, 4, 9, 10, 4]])
def test_mean_over_ranks_is_the_global_loss_with_its_gradient(ids, ranks):
    ids = None if ids is None else torch.tensor(ids)
    sides = [
        (unit(8, requires_grad=True), unit(8, seed=1, requires_grad=True), torch.tensor(4.0, requires_grad=True))
        for _ in range(2)
    ]
    whole = contrastive_loss(*sides[0], image_ids=ids)
    split = sum(rank_losses(contrastive_loss, *sides[1], ids, ranks)) / ranks
    assert torch.allclose(whole, split)
    whole.backward()
    split.backward()
    for one, other in zip(*sides, strict=True):
        assert one.grad.abs().max() > 1e-4 and torch.allclose(one.grad, other.grad, atol=1e-6)
    local = sum(rank_losses(contrastive_loss, *sides[1], ids, ranks, local=True)) / ranks
    assert not torch.allclose(whole, local, atol=1e-2)


def test_float32_under_autocast():
    images, texts, scale = unit(8, width=64), unit(8, width=64, seed=1), torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(images, texts, scale)
        assert (images @ texts.T).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images, texts, scale))
    assert contrastive_loss(images.bfloat16(), texts.bfloat16(), scale).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_scales_stay_finite(scale):
    images, texts = unit(4, requires_grad=True), unit(4, seed=1, requires_grad=True)
    loss = contrastive_loss(images, texts, torch.tensor(scale))
    loss.backward()
    assert loss.isfinite() and images.grad.isfinite().all() and texts.grad.isfinite().all()


# The learned scale


def test_scale_starts_where_the_paper_says():
    scale = LogitScale(math.log(1 / 0.07))
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert scale.weight.ndim == 0


def test_the_loss_moves_the_scale_the_right_way():
    texts = unit(4)
    for images, sign in (
        (texts, -1),
        (texts.roll(1, 0), 1),
    ):  # aligned pairs want a larger scale, mismatched ones a smaller
        scale = LogitScale(1.0)
        contrastive_loss(images, texts, scale()).backward()
        assert torch.sign(scale.weight.grad).item() == sign


def test_above_the_limit_the_value_is_the_limit_and_the_gradient_is_not_zero():
    scale, at_limit = LogitScale(6.0), LogitScale(math.log(100))
    assert scale().item() == pytest.approx(100, rel=1e-5)
    scale().backward()
    at_limit().backward()
    assert scale.weight.grad.item() == pytest.approx(100, rel=1e-5)
    assert at_limit.weight.grad.item() == pytest.approx(100, rel=1e-5)
    assert LogitScale(6.0, limit=None)().item() == pytest.approx(math.exp(6), rel=1e-5)


def test_clamping_overwrites_what_is_above_the_limit_only():
    above, below, free = LogitScale(6.0), LogitScale(2.0), LogitScale(6.0, limit=None)
    for scale in (above, below, free):
        scale.clamp_()
    assert above.weight.item() == pytest.approx(math.log(100))
    assert below.weight.item() == 2.0 and free.weight.item() == 6.0


def test_scale_is_float32_in_a_half_precision_model():
    assert LogitScale(1.0).to(torch.bfloat16)().dtype == torch.float32
