import pytest
import torch

from hf_vlp.layers.patch_embedding import fitted_positions


@pytest.mark.parametrize("grid", [(7, 9), (5, 5), (12, 4)])
def test_each_image_gets_what_interpolation_of_its_own_gives(grid):
    torch.manual_seed(0)
    table = torch.randn(25, 6)
    square = table.view(1, 5, 5, 6).permute(0, 3, 1, 2)
    sizes = [(grid[0], grid[1]), (1, grid[1]), (grid[0], 1), (1, 1), (3, 2), (5, 4)]
    sizes = [(min(h, grid[0]), min(w, grid[1])) for h, w in sizes]
    found = fitted_positions(table, *torch.tensor(sizes).T, grid)
    assert found.shape == (6, grid[0] * grid[1], 6)
    for row, (height, width) in enumerate(sizes):
        own = torch.nn.functional.interpolate(square, size=(height, width), mode="bilinear", align_corners=True)
        laid = torch.zeros(6, *grid)
        laid[:, :height, :width] = own[0]
        assert torch.allclose(found[row], laid.flatten(1).T, atol=1e-6)
    centred = torch.nn.functional.interpolate(square, size=sizes[4], mode="bilinear", align_corners=False)
    assert not torch.allclose(found[4].view(*grid, 6)[:3, :2], centred[0].permute(1, 2, 0), atol=1e-2)


def test_the_tables_own_grid_is_the_table_itself():
    table = torch.randn(16, 3)
    found = fitted_positions(table, torch.tensor([4]), torch.tensor([4]), (4, 4))[0]
    assert torch.equal(found, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = fitted_positions(table, torch.tensor([4]), torch.tensor([4]), (4, 4))[0]
    assert torch.equal(again, table)
    assert not torch.equal(fitted_positions(table, torch.tensor([3]), torch.tensor([4]), (4, 4))[0], table)


def test_gradients_reach_the_table():
    table = torch.randn(9, 2, dtype=torch.float32, requires_grad=True)
    fitted_positions(table, torch.tensor([5, 1]), torch.tensor([2, 4]), (5, 4)).sum().backward()
    assert table.grad.sum().item() == pytest.approx(2 * (5 * 2 + 1 * 4), rel=1e-5)  # weights of each patch sum to 1
