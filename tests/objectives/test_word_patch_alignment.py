import itertools
import math

import pytest
import torch

from hf_vlp.objectives.word_patch_alignment import (
    alignment_loss,
    cosine_cost,
    patches_to_align,
    transport_distance,
    transport_plan,
    word_patch_alignment_loss,
    words_to_align,
)

SOLVERS = ("ipot", "sinkhorn", "exact")
TEXT = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]  # 3, 1 and 2 words
IMAGE = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]  # 6, 4 and 2 patches


def states(rows=3, length=5, patches=7, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, width, generator=draw), torch.randn(rows, patches, width, generator=draw)


def batch(seed=0):
    """States, their masks and labels: three pairs, the second does not match."""
    return *states(seed=seed), torch.tensor(TEXT), torch.tensor(IMAGE), torch.tensor([1, 0, 1])


def problem(seed=0):
    """Cost [3, 5, 7], words [3, 5] and patches [3, 7]."""
    text, image, attention_mask, image_mask, _ = batch(seed)
    return cosine_cost(text, image), words_to_align(attention_mask), patches_to_align(image_mask)


def plain_ipot(cost, words, patches, beta, iterations):
    """The iterations of one pair over numbers, in the order and with the penalties of the released code: [P][L] as there."""
    rows, columns = range(len(patches)), range(len(words))
    x_length, y_length = sum(words), sum(patches)
    pair = [[patches[n] * words[m] for m in columns] for n in rows]
    A = [[pair[n][m] * math.exp(-cost[m][n] / beta) for m in columns] for n in rows]
    T = [[float(pair[n][m]) for m in columns] for n in rows]
    sigma = [words[m] / x_length for m in columns]
    for _ in range(iterations):
        Q = [[A[n][m] * T[n][m] for m in columns] for n in rows]
        delta = [1 / (y_length * sum(Q[n][m] * sigma[m] for m in columns) + 1e4 * (1 - patches[n])) for n in rows]
        sigma = [1 / (x_length * sum(delta[n] * Q[n][m] for n in rows) + 1e4 * (1 - words[m])) for m in columns]
        T = [[delta[n] * Q[n][m] * sigma[m] * pair[n][m] for m in columns] for n in rows]
    return T


def test_two_words_and_two_patches_worked_by_hand():
    """Costs 0 on the diagonal and 1 elsewhere, beta 1 / ln 2: A is [[1, 1/2], [1/2, 1]], and sides stay alike by symmetry.

    After n iterations T is [[1, 2^-n], [2^-n, 1]] over its sum 2 + 2 * 2^-n, and the distance 2^-n / (1 + 2^-n).
    """
    cost, both = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.ones(1, 2)
    for iterations, share in ((1, 1 / 2), (3, 1 / 8), (10, 1 / 1024)):
        plan = transport_plan(cost, both, both, beta=1 / math.log(2), iterations=iterations)
        expected = torch.tensor([[[1, share], [share, 1]]]) / (2 + 2 * share)
        torch.testing.assert_close(plan, expected)
        assert transport_distance(cost, plan).item() == pytest.approx(share / (1 + share))
    assert transport_distance(cost, transport_plan(cost, both, both, solver="exact")).item() == 0
    assert transport_distance(cost, transport_plan(cost, both, both)).item() != 0


def test_a_single_word_goes_everywhere_alike():
    """Nothing is to be chosen: the distance is the mean cost of the patches used, (0.5 + 0.1 + 1.2) / 3."""
    cost = torch.tensor([[[9.0, 9, 9, 9], [9, 0.5, 0.1, 1.2], [9, 9, 9, 9]]])
    for solver in SOLVERS:
        plan = transport_plan(cost, torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 1, 1]]), solver=solver)
        assert transport_distance(cost, plan).item() == pytest.approx(0.6, abs=1e-6)
        assert plan[0, 1].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=1e-6)
        assert plan[0, [0, 2]].eq(0).all()


@pytest.mark.parametrize(("beta", "iterations"), [(0.5, 50), (0.5, 1), (0.1, 20), (0.07, 9), (2.0, 3)])
def test_ipot_equals_plain_loops_of_the_released_iterations(beta, iterations):
    cost, words, patches = problem()
    plan = transport_plan(cost, words, patches, beta=beta, iterations=iterations)
    for row in range(3):
        used = words[row].long().tolist(), patches[row].long().tolist()
        expected = torch.tensor(plain_ipot(cost[row].tolist(), *used, beta, iterations)).T
        torch.testing.assert_close(plan[row], expected, atol=1e-6, rtol=1e-5)
    other = transport_plan(cost, words, patches, beta=beta, iterations=iterations + 1)
    assert (other - plan).abs().max() > 1e-6


def test_words_and_patches_are_what_is_valid_without_the_special_tokens():
    mask = torch.tensor([*TEXT, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    used = [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], *[[0] * 5] * 3, [0, 0, 1, 1, 0]]
    assert words_to_align(mask).long().tolist() == used
    image = torch.tensor(IMAGE)
    assert patches_to_align(image).long().tolist() == [[0, *row[1:]] for row in IMAGE]
    assert image.tolist() == IMAGE


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_word_and_every_patch_has_the_same_mass(solver):
    cost, words, patches = problem()
    enough = {"ipot": 1000, "sinkhorn": 1000, "exact": 1}[solver]
    # entropy weighs beta / iterations: at a small weight even a thousand scalings leave the columns uneven
    beta = 100.0 if solver == "sinkhorn" else 0.5
    plan = transport_plan(cost, words, patches, solver=solver, beta=beta, iterations=enough)
    assert plan.min() >= 0
    assert plan.masked_select(~(words[:, :, None] & patches[:, None])).eq(0).all()
    torch.testing.assert_close(plan.sum(dim=2), words / words.sum(dim=1, keepdim=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(dim=1), patches / patches.sum(dim=1, keepdim=True), atol=2e-5, rtol=0)
    if solver != "exact":
        early = transport_plan(cost, words, patches, solver=solver, iterations=1)
        torch.testing.assert_close(early.sum(dim=2), words / words.sum(dim=1, keepdim=True), atol=1e-6, rtol=0)
        assert (early.sum(dim=1) - patches / patches.sum(dim=1, keepdim=True)).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_and_the_other_rows_change_nothing(solver):
    text, image, attention_mask, image_mask, labels = batch()
    pad = torch.nn.functional.pad
    wider = pad(text, (0, 0, 0, 3), value=5.0), pad(image, (0, 0, 0, 2), value=-4.0)
    masks = pad(attention_mask, (0, 3)), pad(image_mask, (0, 2))
    loss = word_patch_alignment_loss(text, image, attention_mask, image_mask, labels, solver=solver)
    padded = word_patch_alignment_loss(*wider, *masks, labels, solver=solver)
    torch.testing.assert_close(padded, loss, atol=1e-6, rtol=0)
    open_masks = pad(attention_mask, (0, 3), value=1), pad(image_mask, (0, 2))
    assert (word_patch_alignment_loss(*wider, *open_masks, labels, solver=solver) - loss).abs() > 1e-3

    cost, words, patches = problem()
    whole, order = transport_plan(cost, words, patches, solver=solver), torch.tensor([2, 0, 1])
    moved = transport_plan(cost[order], words[order], patches[order], solver=solver)
    torch.testing.assert_close(moved, whole[order], atol=1e-6, rtol=0)
    assert (moved - whole).abs().max() > 1e-2
    alone = torch.cat([transport_plan(cost[[i]], words[[i]], patches[[i]], solver=solver) for i in range(3)])
    torch.testing.assert_close(alone, whole, atol=2e-5, rtol=0)


def test_exact_transport_is_the_best_permutation_of_a_square_problem():
    draw = torch.Generator().manual_seed(0)
    cost, all_of_them = torch.rand(6, 4, 4, generator=draw), torch.ones(6, 4)
    plan = transport_plan(cost, all_of_them, all_of_them, solver="exact")
    best = [
        min(sum(float(row[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(4))) / 4
        for row in cost
    ]
    assert transport_distance(cost, plan).tolist() == pytest.approx(best, abs=1e-6)
    assert plan.round(decimals=6).unique().tolist() == [0, 0.25]
    # IPOT comes to it from above, and is not there yet after the paper's 50 iterations
    near, paper = (transport_plan(cost, all_of_them, all_of_them, iterations=n) for n in (5000, 50))
    assert transport_distance(cost, near).tolist() == pytest.approx(best, abs=1e-4)
    assert (transport_distance(cost, paper) - torch.tensor(best)).max() > 1e-4
    assert (transport_distance(cost, paper) - torch.tensor(best)).min() > -1e-6


def test_exact_transport_of_mixed_sizes_is_cheapest_of_all():
    cost, words, patches = problem()
    exact = transport_distance(cost, transport_plan(cost, words, patches, solver="exact"))
    product = (words / words.sum(1, keepdim=True))[:, :, None] * (patches / patches.sum(1, keepdim=True))[:, None]
    blurred = transport_plan(cost, words, patches, solver="sinkhorn", beta=100.0, iterations=1000)
    for plan in (product, blurred):
        distance = transport_distance(cost, plan)
        assert (distance - exact).min() > -1e-5 and (distance - exact).max() > 0.01
    near = transport_distance(cost, transport_plan(cost, words, patches, beta=0.1, iterations=5000))
    torch.testing.assert_close(near, exact, atol=1e-4, rtol=0)


def test_entropic_transport_is_close_to_ipot_at_its_weight():
    text, image = states(4, 12, 30, 256, seed=3)
    cost, words, patches = cosine_cost(text, image), torch.ones(4, 12), torch.ones(4, 30)
    words[1, 5:], patches[2, 9:] = 0, 0
    ipot, entropic = (transport_plan(cost, words, patches, solver=name) for name in SOLVERS[:2])
    distance = transport_distance(cost, ipot)
    torch.testing.assert_close(transport_distance(cost, entropic), distance, atol=1e-4, rtol=0)
    blurred = transport_plan(cost, words, patches, solver="sinkhorn", beta=50.0)
    assert (transport_distance(cost, blurred) - distance).min() > 0.05


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_a_text_without_words_adds_nothing_and_moves_nothing(solver, valid):
    text, image, attention_mask, image_mask, labels = batch()
    attention_mask[1] = torch.arange(5) < valid
    text.requires_grad_(), image.requires_grad_()
    loss = word_patch_alignment_loss(text, image, attention_mask, image_mask, labels, solver=solver)
    loss.backward()
    assert loss.isfinite() and text.grad.isfinite().all() and image.grad.isfinite().all()
    assert not text.grad[1].any() and not image.grad[1].any()
    assert text.grad[[0, 2]].any(dim=2).sum() == 5 and image.grad[[0, 2]].abs().max() > 1e-3
    rest = [tensor[[0, 2]] for tensor in (text, image, attention_mask, image_mask, labels)]
    assert loss.item() == pytest.approx(word_patch_alignment_loss(*rest, solver=solver).item() * 2 / 3, abs=1e-5)
    alone = word_patch_alignment_loss(
        *(t[[1]] for t in (text, image, attention_mask, image_mask, labels)), solver=solver
    )
    assert alone == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_without_patches_is_no_hole_either(solver):
    cost, words, patches = problem()
    patches[0] = False
    plan = transport_plan(cost, words, patches, solver=solver)
    assert not plan[0].any() and plan[1:].sum(dim=(1, 2)).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_matching_pairs_count_up_and_the_others_down():
    distances = torch.tensor([0.5, 0.25, 1.0])
    assert alignment_loss(distances, torch.tensor([1, 0, 1])).item() == pytest.approx((0.5 + 1 - 0.25) / 3)
    assert alignment_loss(distances, torch.tensor([0, 0, 0])).item() == pytest.approx(-1.75 / 3)
    text, image, *masks, labels = batch()
    cost, words, patches = problem()
    expected = alignment_loss(transport_distance(cost, transport_plan(cost, words, patches)), labels)
    assert torch.equal(word_patch_alignment_loss(text, image, *masks, labels), expected)
    none, every = (word_patch_alignment_loss(text, image, *masks, torch.full((3,), one)) for one in (0, 1))
    assert none == -every != expected
    other = word_patch_alignment_loss(text, image, *masks, labels, beta=2.0, iterations=7)
    assert (other - expected).abs() > 1e-3


def test_the_gradient_is_that_of_the_costs_at_a_given_plan():
    text, image, attention_mask, image_mask, labels = batch()
    cost, words, patches = problem()
    signs = (2 * labels.double() - 1)[:, None, None] / 3
    plan = transport_plan(cost, words, patches).double()

    def wide_cost(one, two):
        # the arithmetic of the library in float64, where its own is float32
        return 1 - torch.nn.functional.cosine_similarity(one[:, :, None], two[:, None], dim=3)

    leaves = [side.double().requires_grad_() for side in (text, image)]
    assert torch.autograd.gradcheck(lambda *sides: (wide_cost(*sides) * plan * signs).sum(), leaves)
    expected = torch.autograd.grad((wide_cost(*leaves) * plan * signs).sum(), leaves)
    floats = [side.clone().requires_grad_() for side in (text, image)]
    ours = torch.autograd.grad(word_patch_alignment_loss(*floats, attention_mask, image_mask, labels), floats)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted.float(), atol=1e-6, rtol=1e-4)

    # with the plan solved anew at both sides, the difference is another: early plans are not yet the cheapest
    step, moved = 1e-3, torch.zeros_like(text)
    moved[0, 1, 0] = step
    masks = attention_mask, image_mask, labels
    up, down = (
        word_patch_alignment_loss(text + sign * moved, image, *masks, iterations=2).double() for sign in (1, -1)
    )
    early = text.clone().requires_grad_()
    word_patch_alignment_loss(early, image, *masks, iterations=2).backward()
    assert abs((up - down) / (2 * step) - early.grad[0, 1, 0]) > 1e-3


def test_plans_have_no_gradient_and_leave_what_they_are_given():
    cost, words, patches = problem()
    cost.requires_grad_()
    for solver in SOLVERS:
        before = cost.detach().clone(), words.clone(), patches.clone()
        plan = transport_plan(cost, words, patches, solver=solver)
        assert not plan.requires_grad and plan.dtype == torch.float32
        assert all(torch.equal(kept, now) for kept, now in zip(before, (cost, words, patches)))
        torch.testing.assert_close(torch.autograd.grad(transport_distance(cost, plan).sum(), cost)[0], plan)


def test_float32_under_autocast():
    text, image, *rest = batch()
    cost, words, patches = problem()
    for solver in SOLVERS:
        expected = word_patch_alignment_loss(text, image, *rest, solver=solver)
        plan = transport_plan(cost, words, patches, solver=solver)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (text @ image.transpose(1, 2)).dtype == torch.bfloat16
            assert torch.equal(word_patch_alignment_loss(text, image, *rest, solver=solver), expected)
            assert torch.equal(transport_plan(cost, words, patches, solver=solver), plan)
        rounded = word_patch_alignment_loss(text.bfloat16(), image.bfloat16(), *rest, solver=solver)
        assert rounded.dtype == torch.float32 and rounded != expected


@pytest.mark.parametrize("iterations", [3, 30])
def test_small_beta_does_not_underflow(iterations):
    """exp(-C / beta) of costs around 1 is 0 in float32 for beta 0.005, and the released code divides by it."""
    cost, words, patches = problem()
    assert torch.exp(-cost / 0.005)[:, 1:-1, 1:].eq(0).all(dim=1).any()
    plan = transport_plan(cost, words, patches, beta=0.005, iterations=iterations)
    for row in range(3):
        used = words[row].long().tolist(), patches[row].long().tolist()
        expected = torch.tensor(plain_ipot(cost[row].tolist(), *used, 0.005, iterations)).T
        torch.testing.assert_close(plan[row], expected, atol=1e-6, rtol=0)


def test_states_of_no_length_cost_one():
    text, image = states()
    text[0, 0] = 0
    assert cosine_cost(text, image)[0, 0].tolist() == [1.0] * 7
    assert (cosine_cost(text * 3, image * 0.2) - cosine_cost(text, image)).abs().max() < 1e-6
    assert cosine_cost(text, text)[1].diagonal().abs().max() < 1e-6 < cosine_cost(text, -text)[1].diagonal().min() - 1.9


def test_faults_are_named():
    cost, words, patches = problem()
    with pytest.raises(ValueError, match="unknown solver 'ipott'"):
        transport_plan(cost, words, patches, solver="ipott")
    with pytest.raises(ValueError, match="above 0, got 0.0 and 50"):
        transport_plan(cost, words, patches, beta=0.0)
    with pytest.raises(ValueError, match=r"cost \[3, 5, 7\].*words are \[3, 7\] and patches \[3, 5\]"):
        transport_plan(cost, patches, words)
