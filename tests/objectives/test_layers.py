import pytest
import torch
from torch import nn

from hf_vlp.layers.blocks import FeedForward
from hf_vlp.layers.patch_embedding import PatchEmbedding, resize_position_table
from hf_vlp.layers.pooling import first_token_index, gather_rows, largest_id_index, masked_mean
from hf_vlp.layers.resnet import Bottleneck, ModifiedResNet

# Position tables


def test_the_same_grid_gives_the_table_itself():
    table = torch.randn(10, 4)
    assert resize_position_table(table, (3, 3)) is table


def test_a_constant_table_stays_constant():
    table = torch.full((10, 4), 2.5)
    assert torch.allclose(resize_position_table(table, (5, 7)), torch.full((36, 4), 2.5), atol=1e-5)


def test_the_class_row_stays_and_the_grid_equals_torchs_interpolation():
    table = torch.randn(10, 4)
    resized = resize_position_table(table, (5, 2))
    assert resized.shape == (11, 4) and torch.equal(resized[0], table[0])
    grid = table[1:].T.reshape(1, 4, 3, 3)
    expected = nn.functional.interpolate(grid, size=(5, 2), mode="bicubic", align_corners=False)
    assert torch.allclose(resized[1:].T.reshape(1, 4, 5, 2), expected, atol=1e-6)
    assert not torch.allclose(resize_position_table(table, (2, 5))[1:], resized[1:], atol=1e-3)


def test_a_left_to_right_ramp_stays_one():
    ramp = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    wide = resize_position_table(ramp, (4, 8), prefix=0, mode="bilinear").reshape(4, 8)
    assert (wide.diff(dim=1) >= 0).all() and torch.allclose(wide, wide[:1].expand(4, 8))


def test_interpolation_keeps_dtype_and_gradient():
    table = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    resized = resize_position_table(table, (3, 3))
    assert resized.dtype == torch.bfloat16
    resized.sum().backward()
    assert (table.grad != 0).all()


def test_a_table_without_a_square_grid():
    with pytest.raises(ValueError, match="11 rows holds no square grid"):
        resize_position_table(torch.randn(11, 4), (3, 3))


# Patches


def test_patches_equal_the_matrix_product():
    layer = PatchEmbedding(3, 5, 4)
    image = torch.randn(2, 3, 8, 12)
    patch = image[:, :, 4:8, 8:12].reshape(2, -1)
    assert torch.allclose(layer(image)[:, :, 1, 2], patch @ layer.weight.reshape(5, -1).T + layer.bias, atol=1e-5)
    assert layer(image).shape == (2, 5, 2, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_patches_equal_the_convolution_forward_and_backward(bias):
    layer, image = PatchEmbedding(3, 5, 4, bias=bias), torch.randn(2, 3, 9, 14, requires_grad=True)
    weight = torch.randn(2, 5, 2, 3)
    convolved = nn.functional.conv2d(image, layer.weight, layer.bias, stride=4)
    leaves = [image, *layer.parameters()]
    assert torch.allclose(layer(image), convolved, atol=1e-5)
    ours = torch.autograd.grad((layer(image) * weight).sum(), leaves)
    theirs = torch.autograd.grad((convolved * weight).sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    other = nn.functional.conv2d(image, layer.weight.flip(-1), layer.bias, stride=4)
    assert not torch.allclose(layer(image), other, atol=1e-3)


def test_pixels_behind_the_last_whole_patch_are_not_seen():
    layer, image = PatchEmbedding(3, 5, 4), torch.randn(1, 3, 8, 8)
    assert torch.allclose(layer(nn.functional.pad(image, (0, 3, 0, 3), value=9.0)), layer(image))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (2, 3, 3, 8), (2, 3, 8, 3)])
def test_pixels_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="pixel_values"):
        PatchEmbedding(3, 5, 4)(torch.zeros(shape))


# Pooling


def test_first_token_index():
    ids = torch.tensor([[1, 9, 5, 9], [9, 1, 2, 3], [1, 2, 3, 9]])
    assert first_token_index(ids, 9).tolist() == [1, 0, 3]


def test_rows_without_the_token_are_named():
    with pytest.raises(ValueError, match=r"row\(s\) \[0, 2\].*eos_token_id 9.*largest_id"):
        first_token_index(torch.tensor([[1, 2], [1, 9], [3, 4]]), 9)


def test_largest_id_index_takes_the_first_of_equals():
    assert largest_id_index(torch.tensor([[1, 9, 5, 9], [7, 1, 2, 3]])).tolist() == [1, 0]


def test_gather_rows():
    states = torch.arange(12.0).reshape(2, 3, 2)
    assert gather_rows(states, torch.tensor([2, 0])).tolist() == [[4, 5], [6, 7]]


def test_masked_mean():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]], [[1.0], [1.0], [1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert masked_mean(states, mask).flatten().tolist() == [2, 4, 0]
    assert masked_mean(states, None)[0].item() == pytest.approx(104 / 3)


# The modified ResNet


def test_strides_and_channels_of_the_stages():
    trunk = ModifiedResNet([1, 2, 1, 1], width=4).eval()
    maps = trunk.stages(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 16, 24), (16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert torch.equal(trunk(torch.ones(1, 3, 64, 64)), trunk.stages(torch.ones(1, 3, 64, 64))[-1])
    assert [len(getattr(trunk, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [1, 2, 1, 1]


def test_only_the_stem_strides_by_convolution():
    """The rest shrinks by average pooling, which sees every pixel."""
    trunk = ModifiedResNet([1, 1, 1, 1], width=4)
    strided = [name for name, part in trunk.named_modules() if isinstance(part, nn.Conv2d) and part.stride != (1, 1)]
    assert strided == ["conv1"]
    assert not any(part.bias is not None for part in trunk.modules() if isinstance(part, nn.Conv2d))


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (8, 1), (16, 2)])
def test_bottleneck_equals_the_formula(in_channels, stride):
    layer = Bottleneck(in_channels, 4, stride).eval()
    for part in layer.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.running_mean)
    x = torch.randn(2, in_channels, 8, 8)
    relu, pool = nn.functional.relu, nn.functional.avg_pool2d
    inner = relu(layer.bn2(layer.conv2(relu(layer.bn1(layer.conv1(x))))))
    inner = layer.bn3(layer.conv3(pool(inner, stride)))
    if in_channels == 16 and stride == 1:
        assert layer.downsample is None
        shortcut = x
    else:
        shortcut = layer.downsample[1](layer.downsample[0](pool(x, stride)))
    assert torch.allclose(layer(x.clone()), relu(inner + shortcut), atol=1e-5)


def test_the_input_is_not_changed():
    layer, x = Bottleneck(16, 4, 1).eval(), torch.randn(2, 16, 8, 8)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_quick_gelu():
    activation = FeedForward(4, 8, "quick_gelu").activation
    x = torch.cat([torch.linspace(-5, 5, 21), torch.tensor([-1e4, 0.0, 1e4])]).double().requires_grad_()
    expected = x * torch.sigmoid(1.702 * x)
    assert torch.allclose(activation(x), expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (activation(x), expected))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(FeedForward(4, 8, "gelu").activation(x), expected, atol=1e-3)
    assert not torch.allclose(nn.functional.silu(x), expected, atol=1e-3)
