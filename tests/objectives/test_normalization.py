import pytest
import torch
from torch import nn

from hf_vlp.layers.normalization import MaskedBatchNorm, keep_statistics


def pair(width=5, **more) -> tuple[MaskedBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's with the same parameters and the same running statistics."""
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm(width, **more), nn.BatchNorm1d(width, **more)
    with torch.no_grad():
        for tensor in (ours.weight, ours.bias, ours.running_mean):
            tensor.normal_()
        ours.running_var.uniform_(0.5, 2.0)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def sets(seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(4, 6, 5, generator=draw) + torch.arange(5.0)
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]).long()
    mask[0, 2] = 0  # real elements may stand anywhere
    return inputs, mask


def statistics(norm: nn.BatchNorm1d) -> list[torch.Tensor]:
    return [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]


def same(one: list[torch.Tensor], other: list[torch.Tensor], tolerance=1e-5) -> bool:
    return all(torch.allclose(a.float(), b.float(), atol=tolerance) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_it_equals_batch_norm_over_the_selected_rows(dtype, momentum):
    ours, theirs = pair(momentum=momentum)
    inputs, mask = sets()
    one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    real = mask.bool()
    normed = ours(one, mask.to(dtype))
    expected = theirs(other[real])
    assert normed.shape == inputs.shape and torch.allclose(normed[real], expected, atol=1e-5)
    assert same(statistics(ours), statistics(theirs)) and ours.num_batches_tracked == 1

    weight = torch.arange(expected.numel()).cos().view(expected.shape)
    (normed[real] * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-5) and not one.grad[~real].any() and one.grad[real].any()
    for name in ("weight", "bias"):
        assert torch.allclose(getattr(ours, name).grad, getattr(theirs, name).grad, atol=1e-4), name

    over_all, _ = pair(momentum=momentum)
    assert not torch.allclose(over_all(inputs)[real], expected, atol=1e-2)
    assert not same(statistics(over_all), statistics(theirs), 1e-2)


def test_padding_and_what_is_in_it_change_nothing():
    ours, _ = pair()
    inputs, mask = sets()
    normed = ours(inputs, mask)[mask.bool()]
    for junk in (0.0, 1e4):
        again, _ = pair()
        changed = nn.functional.pad(inputs.masked_fill(mask.unsqueeze(-1) == 0, junk), (0, 0, 0, 3), value=junk)
        padded = again(changed, nn.functional.pad(mask, (0, 3)))
        assert torch.allclose(padded[:, :6][mask.bool()], normed, atol=1e-5)
        assert same(statistics(again), statistics(ours))
        seen, _ = pair()
        assert not torch.allclose(seen(changed)[:, :6][mask.bool()], normed, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_without_a_mask_it_is_torchs(training):
    ours, theirs = pair()
    ours.train(training), theirs.train(training)
    inputs, mask = sets()
    expected = theirs(inputs.flatten(0, 1)).view_as(inputs)
    assert torch.equal(ours(inputs), expected)
    assert same(statistics(ours), statistics(theirs), 0.0)
    assert torch.equal(ours(inputs, mask), expected) == (not training)  # in evaluation no row sees another
    assert (ours.num_batches_tracked > 0) == training


def test_a_mask_of_ones_is_no_mask():
    ours, theirs = pair()
    inputs, _ = sets()
    assert torch.allclose(
        ours(inputs, torch.ones(4, 6)), theirs(inputs.flatten(0, 1)).view_as(inputs), atol=1e-5
    ) and same(statistics(ours), statistics(theirs))


def test_large_means_do_not_swallow_the_variance():
    ours, theirs = pair()
    inputs, mask = sets()
    inputs = inputs + 1e4
    assert torch.allclose(ours(inputs, mask)[mask.bool()], theirs(inputs[mask.bool()]), atol=5e-3)


def test_one_or_no_real_row_leaves_finite_statistics():
    """torch refuses one value per channel; here a batch of a single region is an odd batch, not the end of a run."""
    inputs, mask = sets()
    for kept in (1, 0):
        ours, _ = pair()
        only = torch.zeros_like(mask)
        only[1, :kept] = 1
        normed = ours(inputs, only)
        assert normed.isfinite().all() and all(tensor.isfinite().all() for tensor in statistics(ours))
        if kept:
            assert torch.allclose(normed[1, 0], ours.bias, atol=1e-5)


def test_the_cached_step_can_hold_the_statistics_still():
    ours, theirs = pair()
    inputs, mask = sets()
    before = statistics(ours)
    ours.track_running_stats = False
    normed = ours(inputs, mask)[mask.bool()]
    assert same(statistics(ours), before, 0.0) and torch.allclose(normed, theirs(inputs[mask.bool()]), atol=1e-5)
    ours.track_running_stats = True
    ours(inputs, mask)
    assert same(statistics(ours), statistics(theirs)) and not same(statistics(ours), before, 1e-2)


def test_statistics_in_float32_under_autocast_and_in_half_precision():
    exact, theirs = pair()
    inputs, mask = sets()
    exact(inputs, mask)
    for half in (False, True):
        ours, _ = pair()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not half):
            normed = (ours.bfloat16() if half else ours)(inputs.bfloat16(), mask)
        assert normed.dtype == torch.bfloat16 and normed.isfinite().all()
        expected = theirs.train()(inputs[mask.bool()])
        assert (normed[mask.bool()].float() - expected).norm() / expected.norm() < 0.02
        assert same(statistics(ours), statistics(exact), 0.1)


def test_keep_statistics_reaches_batch_norms_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Sequential(MaskedBatchNorm(5), nn.LayerNorm(4)))
    model.train()
    keep_statistics(model)
    assert [part.training for part in model.modules()] == [True, False, True, True, False, True]
    ours = model[2][0]
    before = statistics(ours)
    inputs, mask = sets()
    kept = ours(inputs, mask)
    assert same(statistics(ours), before, 0.0)
    assert not torch.allclose(ours.train()(inputs, mask), kept, atol=1e-2)
    assert not same(statistics(ours), before, 1e-2)
