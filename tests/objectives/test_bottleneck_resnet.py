"""The two graphs: torchvision's against torchvision itself, the first release's against its layers written out."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

from hf_vlp.layers.bottleneck_resnet import SMALLEST, BottleneckResNet
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining, VlpVseGridModel, VlpVseModel, as_cells
from tests.contract.rows import bert_config

functional = nn.functional
GRAPHS = ("caffe", "torchvision")


def settle(network: nn.Module) -> nn.Module:
    """Norms with statistics and parameters that hide nothing."""
    draw = torch.Generator().manual_seed(7)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in ((part.weight, 0.5, 1.5), (part.bias, -0.2, 0.2), (part.running_mean, -0.2, 0.2)):
                tensor.data.uniform_(low, high, generator=draw)
            part.running_var.uniform_(0.5, 1.5, generator=draw)
    return network.eval()


def small(graph: str, groups=1, depths=(1, 2, 1, 2), seed=0) -> BottleneckResNet:
    torch.manual_seed(seed)
    return settle(BottleneckResNet(8, list(depths), [16, 24, 32, 40], [4, 8, 8, 12], groups, graph))


def maps_of(network: ResNet, images: torch.Tensor) -> torch.Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def normed(x, norm):
    return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def caffe_maps(network: BottleneckResNet, images: torch.Tensor, depths=(1, 2, 1, 2)) -> torch.Tensor:
    """The first release's graph: no padding under the stem's pool, rounding up; the stride in a block's first convolution."""
    x = functional.conv2d(images, network.conv1.weight, stride=2, padding=3)
    x = functional.max_pool2d(functional.relu(normed(x, network.bn1)), 3, stride=2, padding=0, ceil_mode=True)
    for stage, depth in enumerate(depths):
        for number in range(depth):
            block = getattr(network, f"layer{stage + 1}")[number]
            stride = 2 if stage > 0 and number == 0 else 1
            inner = functional.relu(normed(functional.conv2d(x, block.conv1.weight, stride=stride), block.bn1))
            groups = inner.shape[1] // block.conv2.weight.shape[1]
            inner = functional.conv2d(inner, block.conv2.weight, padding=1, groups=groups)
            inner = normed(functional.conv2d(functional.relu(normed(inner, block.bn2)), block.conv3.weight), block.bn3)
            if number == 0:
                x = normed(functional.conv2d(x, block.downsample[0].weight, stride=stride), block.downsample[1])
            x = functional.relu(inner + x)
    return x


@pytest.mark.parametrize("size", [(64, 64), (75, 49)])
def test_the_torchvision_graph_equals_a_torchvision_resnet50(size):
    torch.manual_seed(0)
    theirs = settle(resnet50(weights=None))
    config = VlpVseGridConfig(graph="torchvision", depths=(3, 4, 6, 3))
    ours = VlpVseGridModel(config).eval()
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.resnet.load_state_dict(weights)
    images = torch.randn(1, 3, *size)
    expected = maps_of(theirs, images).detach()
    found = ours(images).last_hidden_state
    assert found.shape == expected.shape == (1, 2048, -(-size[0] // 32), -(-size[1] // 32))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    config = VlpVseGridConfig(graph="caffe", depths=(3, 4, 6, 3))
    caffe = VlpVseGridModel(config).eval()
    caffe.resnet.load_state_dict(weights)  # the weights fit, the maps are others
    assert not torch.allclose(caffe(images).last_hidden_state, expected, atol=0.01 * float(expected.abs().max()))


def test_groups_and_widths_as_in_resnext():
    torch.manual_seed(0)
    theirs = settle(ResNet(Bottleneck, [1, 2, 1, 1], groups=32, width_per_group=8))
    images, maps = torch.randn(2, 3, 48, 64), {}
    for groups in (32, 16):
        hidden = [256, 512, 1024, 2048]
        ours = settle(BottleneckResNet(64, [1, 2, 1, 1], hidden, hidden, groups, "torchvision"))
        if groups == 32:
            ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if not name.startswith("fc.")})
            assert torch.allclose(ours(images), maps_of(theirs, images), rtol=1e-4, atol=1e-4)
        maps[groups] = sum(parameter.numel() for parameter in ours.parameters())
    assert maps[16] > maps[32]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(64, 64), (63, 41), (SMALLEST, SMALLEST + 1), (97, 130)])
def test_the_caffe_graph_equals_its_layers_written_out(size, groups):
    network = small("caffe", groups)
    images = torch.randn(2, 3, *size)
    expected = caffe_maps(network, images).detach()
    assert torch.allclose(network(images), expected, rtol=1e-4, atol=1e-5)
    other = small("torchvision", groups)
    other.load_state_dict(network.state_dict())
    if other(images).shape == expected.shape:
        assert not torch.allclose(other(images), expected, atol=0.01 * float(expected.abs().max()))


def test_where_the_graphs_stride():
    strided = {}
    for graph in GRAPHS:
        network = small(graph)
        convolutions = [(n, part) for n, part in network.named_modules() if isinstance(part, nn.Conv2d)]
        strided[graph] = [name for name, part in convolutions if part.stride == (2, 2)]
        assert not any(part.bias is not None for _, part in convolutions)
    shortcuts = ["layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"]
    for graph, place in (("caffe", "conv1"), ("torchvision", "conv2")):
        blocks = [f"layer{stage}.0.{place}" for stage in (2, 3, 4)]
        assert sorted(strided[graph]) == sorted(["conv1", *blocks, *shortcuts])
    assert small("caffe").maxpool.padding == 0 and small("torchvision").maxpool.padding == 1


@pytest.mark.parametrize("graph", GRAPHS)
def test_odd_sizes_leave_something(graph):
    network = small(graph)
    for size in range(SMALLEST, 70, 3):
        found = network(torch.zeros(1, 3, size, size + 5))
        side = (size + 1) // 2  # behind the stem; the pool without padding, rounding up, is one short where this is odd
        side = side // 2 if graph == "caffe" else (side + 1) // 2
        assert found.shape[1] == 40 and found.shape[2] == -(-side // 8)
    assert network(torch.zeros(1, 3, 512, 512)).shape[2:] == (16, 16)
    tower = VlpVseGridModel(VlpVseGridConfig(graph=graph, depths=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"H and W of 16 or more, got shape \(1, 3, 40, 15\)"):
        tower(torch.zeros(1, 3, 40, 15))
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\].*got shape \(1, 1, 64, 64\)"):
        tower(torch.zeros(1, 1, 64, 64))


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_input_is_not_changed_and_the_gradient_is_that_of_the_layers(graph):
    """Activations in place must not overwrite what the backward pass reads."""
    network = small(graph)
    images = torch.randn(2, 3, 48, 48)
    before = images.clone()
    parameters = list(network.parameters())
    weight = torch.randn(network(images).shape)
    assert torch.equal(images, before)
    for training in (False, True):
        for part in network.modules():
            part.training = training and not isinstance(part, nn.BatchNorm2d)
        ours = torch.autograd.grad((network(images) * weight).sum(), parameters)
        if graph == "caffe":
            expected = torch.autograd.grad((caffe_maps(network, images) * weight).sum(), parameters)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, expected, strict=True))
        assert all(gradient.isfinite().all() and gradient.any() for gradient in ours)


# In the model: what is frozen, and norms that keep their statistics


def tiny_grid(**fields) -> VlpVseGridConfig:
    sizes = {"embedding_size": 8, "hidden_sizes": (16, 16, 24, 32), "bottleneck_sizes": (4, 4, 8, 8)}
    return VlpVseGridConfig(**{**sizes, "depths": (1, 2, 1, 1), **fields})


def grid_model(vision=None, model_class=VlpVseModel, **fields):
    torch.manual_seed(0)
    return model_class(
        VlpVseConfig(text_config=bert_config(), vision_config=vision or tiny_grid(), projection_dim=20, **fields)
    )


def trainable(model, prefix: str = "") -> set[str]:
    base = getattr(model, "vse", model)
    names = (n for n, p in base.vision_model.named_parameters() if p.requires_grad and n.startswith(prefix))
    return {name.split(".layer")[-1].split(".")[0] if ".layer" in name else "stem" for name in names}


@pytest.mark.parametrize("model_class", [VlpVseModel, VlpVseForPreTraining])
@pytest.mark.parametrize("vision", [tiny_grid(), "timm/test_resnet"])
def test_freezing_the_first_stages(model_class, vision):
    model = grid_model(vision, model_class)
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable(model) == {"stem", "1", "2", "3", "4"}
    for stages, left in ((4, set()), (3, {"4"}), (2, {"3", "4"}), (1, {"2", "3", "4"})):
        model.freeze_stages(stages)
        assert trainable(model) == left
        rest = {name for name, p in model.named_parameters() if p.requires_grad and "vision_model" not in name}
        assert rest == {name for name in everything if "vision_model" not in name}
    model.freeze_stages(3)
    model.freeze_stages(2)  # opens the third again
    assert trainable(model) == {"3", "4"}
    model.freeze_stages(0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == everything
    for stages in (-1, 5):
        with pytest.raises(ValueError, match=rf"freeze_stages\({stages}\): the tower has 4 stage"):
            model.freeze_stages(stages)


def test_a_tower_without_stages_is_frozen_whole_or_not_at_all():
    from transformers import ViTConfig

    vit = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    model = grid_model(vit)
    model.freeze_stages(1)
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    model.freeze_stages(0)
    assert all(p.requires_grad for p in model.vision_model.parameters())
    with pytest.raises(ValueError, match=r"freeze_stages\(2\): the tower has 1 stage"):
        model.freeze_stages(2)


def test_a_model_of_regions_has_no_stages():
    model = VlpVseModel(VlpVseConfig(text_config=bert_config(), projection_dim=20, region_size=12))
    for call in (lambda: model.freeze_stages(1), lambda: model.count_cells(64, 64)):
        with pytest.raises(ValueError, match="needs a model that sees pixels"):
            call()


@pytest.mark.parametrize("vision", [tiny_grid(), "timm/test_resnet", tiny_grid(freeze_norms=False)])
def test_norms_keep_their_statistics_in_training_unless_told_otherwise(vision):
    model = grid_model(vision, VlpVseForPreTraining)
    frozen = vision == "timm/test_resnet" or vision.freeze_norms
    norms = [part for part in model.vse.vision_model.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    ids = torch.randint(3, 30, (3, 5))
    assert model.train() is model and model.vse.visual_pooling.training
    assert {norm.training for norm in norms} == {not frozen}
    loss = model(input_ids=ids, pixel_values=torch.randn(3, 3, 64, 64)).loss
    moved = [not torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True)]
    assert all(moved) or frozen
    assert not any(moved) or not frozen
    loss.backward()
    assert all(norm.weight.grad is not None for norm in norms)  # but their parameters are trained
    assert not any(part.training for part in model.eval().modules())


@pytest.mark.parametrize(
    "vision", [tiny_grid(), tiny_grid(graph="torchvision"), tiny_grid(freeze_norms=False), "timm/test_resnet"]
)
def test_counting_cells_leaves_the_model_as_it_was(vision):
    model = grid_model(vision).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    assert [model.count_cells(height, 64) for height in (64, 96, 70)] == [4, 6, 6]
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    cells = as_cells(model.eval().vision_model(torch.randn(2, 3, 64, 64)).last_hidden_state)
    maps = model.vision_model(torch.zeros(2, 3, 64, 64)).last_hidden_state
    assert cells.shape == (2, 4, maps.shape[1])


def test_cells_are_in_raster_order():
    model = grid_model().eval()
    images = torch.randn(1, 3, 64, 96)
    maps = model.vision_model(images).last_hidden_state  # [1, D, 2, 3]
    cells = as_cells(model.vision_model(images).last_hidden_state)
    assert all(torch.equal(cells[0, 3 * y + x], maps[0, :, y, x]) for y in range(2) for x in range(3))
