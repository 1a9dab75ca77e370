import pytest
import torch

from hf_vlp.inputs.patch_selection import draw_patches, patch_mask, raster_patches


def test_the_upper_left_pixel_tells_a_patch():
    pixels = torch.zeros(1, 9, 8, dtype=torch.long)  # the last row of pixels is no whole patch
    pixels[0, :4, :6] = 1
    assert patch_mask(pixels, 4).tolist() == [[[1, 1], [0, 0]]]
    pixels[0, 0, 4] = 0
    assert patch_mask(pixels, 4).tolist() == [[[1, 0], [0, 0]]]


def test_real_patches_in_order_then_padding():
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[1, 0, 0], [0, 0, 0]]])
    assert raster_patches(mask).tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]
    assert raster_patches(torch.ones(1, 2, 3)).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_drawn_patches_are_real_in_order_and_each_as_likely():
    mask = torch.zeros(3, 3, 4, dtype=torch.long)
    mask[0], mask[1, :2, :3], mask[2, :1, :2] = 1, 1, 1
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_patches(mask, 4, generator) for _ in range(2000)])  # [2000, 3, 4]
    assert draws.shape == (2000, 3, 4) and (draws[..., 1:] > draws[..., :-1])[:, :2].all()
    for row, real in enumerate(mask.flatten(1)):
        counts = torch.bincount(draws[:, row].flatten(), minlength=12) / 2000
        number = int(real.sum())
        if number < 4:  # all of them, filled up by the first padding patches
            assert torch.equal(counts, torch.tensor([1.0, 1, 1, 1] + 8 * [0]))
        else:
            assert not counts[real == 0].any()
            assert (counts[real == 1] - 4 / number).abs().max() < 0.05
    assert not torch.equal(draws[0], draws[1])


def test_the_same_seed_draws_the_same_and_another_not():
    mask = torch.ones(2, 6, 6)
    one, other, third = (draw_patches(mask, 9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)


def test_a_limit_above_the_patches_keeps_all():
    mask = torch.tensor([[[1, 1], [0, 0]]])
    assert draw_patches(mask, 200, torch.Generator()).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="longest=0"):
        draw_patches(mask, 0, torch.Generator())
