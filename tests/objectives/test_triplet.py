import pytest
import torch
from torch import nn

from hf_vlp.objectives.triplet import collapsed_loss, triplet_loss

FORMS = (0.0, 0.3, 1.0)


def unit(rows, width=6, seed=0, requires_grad=False):
    draw = torch.Generator().manual_seed(seed)
    made = nn.functional.normalize(torch.randn(rows, width, generator=draw), dim=1)
    return made.requires_grad_(requires_grad)


def brute_force(images, texts, margin, ids):
    """Both forms in loops over numbers: the sum over all negatives, and the largest hinge of every image and every caption."""
    count = len(images)
    scores = [[sum(float(a) * float(b) for a, b in zip(image, text)) for text in texts] for image in images]
    total, hardest = 0.0, 0.0
    for i in range(count):
        of_image, of_caption = [0.0], [0.0]
        for j in range(count):
            if ids[i] == ids[j]:
                continue
            of_image.append(max(0.0, margin + scores[i][j] - scores[i][i]))
            of_caption.append(max(0.0, margin + scores[j][i] - scores[i][i]))
        total += sum(of_image) + sum(of_caption)
        hardest += max(of_image) + max(of_caption)
    return total, hardest


def test_three_pairs_worked_by_hand():
    """Scores [[0.9, 0.8, 0.1], [0.3, 0.5, 0.6], [0.2, 0.55, 0.7]], margin 0.2.

    Images: row 0 has hinges 0.1 and 0 against 0.9, row 1 has 0 and 0.3 against 0.5, row 2 has 0 and 0.05 against 0.7.
    Captions: column 0 has 0 and 0 against 0.9, column 1 has 0.5 and 0.25 against 0.5, column 2 has 0 and 0.1 against 0.7.
    """
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.5, 0.6], [0.2, 0.55, 0.7]])
    images, texts = scores, torch.eye(3)
    assert triplet_loss(images, texts, hardest=0.0).item() == pytest.approx(0.1 + 0.3 + 0.05 + 0.5 + 0.25 + 0.1)
    assert triplet_loss(images, texts).item() == pytest.approx(0.1 + 0.3 + 0.05 + 0.5 + 0.1)
    assert triplet_loss(images, texts, margin=0.0).item() == pytest.approx(0.1 + 0.3)
    # captions 1 and 2 are of one image: what remains are row 0, row 2 with nothing and column 1 with 0.5
    ids = torch.tensor([4, 6, 6])
    assert triplet_loss(images, texts, image_ids=ids).item() == pytest.approx(0.1 + 0.5)


def test_hinges_worked_by_hand_move_what_is_in_them():
    """The hardest form of the scores above: +1 at each selected negative, -1 at the pair it is measured against."""
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.5, 0.6], [0.2, 0.55, 0.7]], requires_grad=True)
    triplet_loss(scores, torch.eye(3)).backward()
    # images pick (0, 1), (1, 2), (2, 1); captions pick (0, 1) for 1 and (1, 2) for 2
    assert scores.grad.tolist() == [[-1, 2, 0], [0, -2, 2], [0, 1, -2]]
    scores.grad = None
    triplet_loss(scores, torch.eye(3), hardest=0.0).backward()
    # besides, caption 1 meets image 2
    assert scores.grad.tolist() == [[-1, 2, 0], [0, -3, 2], [0, 2, -2]]


@pytest.mark.parametrize("ids", [None, [0, 0, 1, 2, 3, 4, 5], [5, 5, 5, 9, 9, 1, 2], [1] * 7])
@pytest.mark.parametrize("margin", [0.2, 1.3])
def test_both_forms_and_their_mixture_equal_brute_force(ids, margin):
    images, texts = unit(7), unit(7, seed=1)
    total, hardest = brute_force(images, texts, margin, range(7) if ids is None else ids)
    for share in FORMS:
        loss = triplet_loss(
            images, texts, margin=margin, hardest=share, image_ids=None if ids is None else torch.tensor(ids)
        )
        assert loss.item() == pytest.approx(share * hardest + (1 - share) * total, rel=1e-5, abs=1e-6)
        plain = triplet_loss(images, texts, margin=margin, hardest=share)
        assert (abs(plain.item() - loss.item()) > 1e-3) == (ids is not None)
    if ids != [1] * 7:
        assert total > hardest + 0.1 > 0.2


@pytest.mark.parametrize("share", FORMS)
@pytest.mark.parametrize("ids", [None, [5, 5, 1, 9, 9, 1]])
def test_gradient_equals_finite_differences(share, ids):
    images, texts = unit(6).double(), unit(6, seed=1).double()
    ids = None if ids is None else torch.tensor(ids)

    def loss(i, t):
        # the arithmetic of the library in float64, where its own is float32
        scores = i @ t.T
        same = torch.eye(6, dtype=torch.bool) if ids is None else ids[:, None] == ids
        parts = [(0.2 + s - s.diagonal()[:, None]).clamp(min=0).masked_fill(same, 0) for s in (scores, scores.T)]
        return sum((1 - share) * part.sum() + share * part.amax(1).sum() for part in parts)

    leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    floats = images.float().requires_grad_(), texts.float().requires_grad_()
    ours = torch.autograd.grad(triplet_loss(*floats, hardest=share, image_ids=ids), floats)
    assert all(torch.allclose(a, b.float(), atol=1e-5) for a, b in zip(ours, expected, strict=True))
    other = torch.autograd.grad(triplet_loss(*floats, hardest=0.6, image_ids=ids), floats)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, other, strict=True))


def test_pairs_far_apart_from_all_others_cost_nothing_and_move_nothing():
    images = torch.eye(4).requires_grad_()
    for share in FORMS:
        loss = triplet_loss(images, torch.eye(4), hardest=share)
        loss.backward()
        assert loss == 0 and not images.grad.any()
    assert triplet_loss(images, torch.eye(4), margin=1.25).item() == pytest.approx(8 * 0.25)


def test_it_is_a_sum_over_the_batch():
    """A batch beside itself, out of reach of the first copy, costs twice as much; a mean would cost the same."""
    images, texts = unit(4), unit(4, seed=1)
    twice = [torch.block_diag(side, side) for side in (images, texts)]
    for share in FORMS:
        once = triplet_loss(images, texts, margin=0.0, hardest=share)
        among_zeros = triplet_loss(*twice, margin=0.0, hardest=share)
        total, hardest = brute_force(*twice, 0.0, range(8))
        assert among_zeros.item() == pytest.approx(share * hardest + (1 - share) * total, rel=1e-5)
        assert among_zeros > 1.5 * once > 0.1


def test_permuting_pairs_together_changes_nothing_and_apart_everything():
    images, texts, ids = unit(6), unit(6, seed=1), torch.tensor([1, 2, 2, 3, 4, 1])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for share in FORMS:
        loss = triplet_loss(images, texts, hardest=share, image_ids=ids)
        assert torch.allclose(triplet_loss(images[order], texts[order], hardest=share, image_ids=ids[order]), loss)
        assert not torch.allclose(
            triplet_loss(images[order], texts, hardest=share, image_ids=ids[order]), loss, atol=1e-2
        )
        assert not torch.allclose(
            triplet_loss(images[order], texts[order], hardest=share, image_ids=ids), loss, atol=1e-2
        )


def test_sides_may_be_exchanged():
    images, texts = unit(6), unit(6, seed=1)
    for share in FORMS:
        assert torch.allclose(triplet_loss(images, texts, hardest=share), triplet_loss(texts, images, hardest=share))


def rank_losses(images, texts, ids, ranks=2, local=False, **form):
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
        losses.append(triplet_loss(images[own], texts[own], **gathered, **form))
    return losses


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("share", FORMS)
@pytest.mark.parametrize("ids", [None, [4, 5, 6, 7, 8, 9, 10, 11], [4, 5, 5, 7, 4, 9, 10, 4]])
def test_mean_over_ranks_is_the_global_loss_with_its_gradient(ids, share, ranks):
    ids = None if ids is None else torch.tensor(ids)
    sides = [(unit(8, requires_grad=True), unit(8, seed=1, requires_grad=True)) for _ in range(2)]
    whole = triplet_loss(*sides[0], hardest=share, image_ids=ids)
    split = sum(rank_losses(*sides[1], ids, ranks, hardest=share)) / ranks
    assert torch.allclose(whole, split)
    whole.backward()
    split.backward()
    for one, other in zip(*sides, strict=True):
        assert one.grad.abs().max() > 0.1 and torch.allclose(one.grad, other.grad, atol=1e-5)
    local = sum(rank_losses(*sides[1], ids, ranks, local=True, hardest=share)) / ranks
    assert not torch.allclose(whole, local, rtol=0.05)


@pytest.mark.parametrize("share", FORMS)
@pytest.mark.parametrize("pairs", [1, 2, 9])
def test_a_collapsed_model_costs_what_is_said(pairs, share):
    same = torch.full((pairs, 4), 0.5)
    for margin in (0.2, 0.7):
        loss = triplet_loss(same, same, margin=margin, hardest=share)
        assert loss.item() == pytest.approx(collapsed_loss(pairs, margin=margin, hardest=share))
    if pairs == 9:
        spread = triplet_loss(unit(9), unit(9, seed=1), hardest=share)
        assert spread.item() != pytest.approx(collapsed_loss(9, hardest=share), rel=0.02)


def test_the_plateau_of_the_released_code():
    """128 pairs at margin 0.2, and the sum over all of them before."""
    assert collapsed_loss(128) == pytest.approx(51.2)
    assert collapsed_loss(128, hardest=0.0) == pytest.approx(51.2 * 127)
    assert collapsed_loss(128, hardest=0.25) == pytest.approx(51.2 * (0.25 + 0.75 * 127))


def test_float32_under_autocast():
    images, texts = unit(8, width=64), unit(8, width=64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = triplet_loss(images, texts)
        assert (images @ texts.T).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, triplet_loss(images, texts))
    assert triplet_loss(images.bfloat16(), texts.bfloat16()).dtype == torch.float32
