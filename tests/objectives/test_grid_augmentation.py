"""Cells of a grid dropped while training: against a plain loop over the draws, its distribution, and draws that are replayed."""

import numpy as np
import pytest
import torch

from hf_vlp.inputs.grid_augmentation import GridDropping


def by_hand(cell_draws, image_draws, rate):
    """As the paper's code has it, with the guard that an image keeps its largest draw."""
    masks = []
    for cells, image in zip(cell_draws.tolist(), image_draws.tolist()):
        kept = [image <= rate or cell > rate * image for cell in cells]
        if not any(kept):
            kept[cells.index(max(cells))] = True
        masks.append([int(one) for one in kept])
    return masks


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("cells", [1, 5, 16])
def test_given_draws_decide(rate, cells):
    draws = np.random.default_rng(cells)
    cell_draws, image_draws = torch.from_numpy(draws.random((40, cells))), torch.from_numpy(draws.random(40))
    mask = GridDropping(cells, rate)(40, cell_draws=cell_draws, image_draws=image_draws)
    assert mask.tolist() == by_hand(cell_draws, image_draws, rate)
    assert mask.dtype == torch.int64 and mask.sum(dim=1).min() >= 1
    assert bool((mask == 0).any()) == (0 < rate < 1 and cells > 1)  # no draw is above a rate of 1


def test_numbers_worked_by_hand():
    cells = torch.tensor([[0.05, 0.11, 0.99, 0.1], [0.0, 0.01, 0.1, 0.15], [0.19, 0.1, 0.05, 0.21]])
    images = torch.tensor([0.5, 0.2, 0.99], dtype=torch.float64)
    mask = GridDropping(4, 0.2)(3, cell_draws=cells.double(), image_draws=images)
    # the thresholds are 0.1 (a draw of just above it in float32), none (the image's draw is not above the rate) and 0.198
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]


def test_the_comparison_is_in_float64():
    image = torch.tensor([0.7], dtype=torch.float64)
    threshold = 0.2 * 0.7
    cells = torch.tensor([[threshold - 1e-12, threshold, threshold + 1e-12, 0.9]], dtype=torch.float64)
    assert GridDropping(4, 0.2)(1, cell_draws=cells, image_draws=image).tolist() == [[0, 0, 1, 1]]
    assert len(set(cells.float()[0, :3].tolist())) == 1  # which float32 could not tell apart


def test_an_image_keeps_its_largest_draw_where_none_is_above():
    cells, images = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.1, 0.55]]), torch.tensor([0.9, 0.95])
    assert GridDropping(3, 0.6)(2, cell_draws=cells, image_draws=images).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert GridDropping(3, 0.4)(2, cell_draws=cells, image_draws=images).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert GridDropping(3, 0.1)(2, cell_draws=cells, image_draws=images).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_the_share_that_is_dropped():
    mask = GridDropping(64, 0.2)(20000, torch.Generator().manual_seed(0)).double()
    dropped = 1 - mask.mean(dim=1)
    whole = (mask.min(dim=1).values == 1).double().mean().item()
    # a fifth keeps all by its own draw; above it hardly an image of 64 cells does by chance
    lucky = np.mean([(1 - 0.2 * u) ** 64 for u in np.linspace(0.2, 1, 10001)]) * 0.8
    assert whole == pytest.approx(0.2 + lucky, abs=0.01)
    # the mean over draws u from 0.2 to 1 of 0.2 u, times the share of such images
    assert dropped.mean().item() == pytest.approx(0.8 * 0.2 * 0.6, abs=0.001)
    assert mask.mean(dim=0).std() < 0.005  # no place is dearer than another
    small = GridDropping(64, 0.1)(20000, torch.Generator().manual_seed(0)).double()
    assert 1 - small.mean().item() == pytest.approx(0.9 * 0.1 * 0.55, abs=0.001)


def test_draws_are_the_generators_and_can_be_replayed():
    drop, generator = GridDropping(16, 0.5), torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    mask = drop(6, generator)
    assert torch.equal(torch.get_rng_state(), state)
    again = torch.Generator().manual_seed(3)
    cells = torch.rand(6, 16, generator=again, dtype=torch.float64)
    images = torch.rand(6, generator=again, dtype=torch.float64)
    assert torch.equal(mask, drop(6, cell_draws=cells, image_draws=images))
    assert torch.equal(mask, drop(6, torch.Generator().manual_seed(3)))
    assert not torch.equal(mask, drop(6, generator))
    # one of the two given, the other is drawn
    ones = torch.ones(6)
    half = drop(6, torch.Generator().manual_seed(3), image_draws=ones)
    assert torch.equal(half, drop(6, cell_draws=cells, image_draws=ones))


def test_what_is_refused():
    for cells, rate in ((0, 0.2), (4, -0.1), (4, 1.1), (4, float("nan"))):
        with pytest.raises(ValueError, match=f"cells={cells} must be 1 or more, and rate={rate} a share"):
            GridDropping(cells, rate)
    with pytest.raises(ValueError, match="needs a generator to draw from"):
        GridDropping(4)(2)
    with pytest.raises(ValueError, match="needs a generator"):
        GridDropping(4)(2, image_draws=torch.zeros(2))
    for cells, images in ((torch.zeros(2, 5), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(3))):
        with pytest.raises(ValueError, match="do not fit 2 images of 4 cells"):
            GridDropping(4)(2, cell_draws=cells, image_draws=images)
