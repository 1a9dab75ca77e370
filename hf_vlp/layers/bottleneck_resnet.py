"""ResNets of 1x1, 3x3, 1x1 bottlenecks in the two graphs that carry published weights.

"Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, table 1; with groups, "Aggregated Residual
Transformations for Deep Neural Networks", https://arxiv.org/abs/1611.05431. The graphs differ in where a stage strides and how
the stem pools: "caffe" is the first release's, "torchvision" the one that torchvision and timm train.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

SMALLEST = 16  # pixels along a side that both graphs leave something of


class StridedBottleneck(GradientCheckpointingLayer):
    """1x1, 3x3 and 1x1 convolutions, each with batch norm, around a shortcut; names as in torchvision.

    Args:
        in_size, bottleneck_size, out_size: channels before, within and after. stride: in the first convolution ("caffe") or the
            second ("torchvision"). groups: of the 3x3 convolution.
    """

    def __init__(self, in_size: int, bottleneck_size: int, out_size: int, stride: int, groups: int, graph: str):
        super().__init__()
        first, second = (stride, 1) if graph == "caffe" else (1, stride)
        self.conv1 = nn.Conv2d(in_size, bottleneck_size, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(bottleneck_size)
        self.conv2 = nn.Conv2d(
            bottleneck_size, bottleneck_size, 3, stride=second, padding=1, groups=groups, bias=False
        )
        self.bn2 = nn.BatchNorm2d(bottleneck_size)
        self.conv3 = nn.Conv2d(bottleneck_size, out_size, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_size)
        self.downsample = None
        if stride > 1 or in_size != out_size:
            shortcut = nn.Conv2d(in_size, out_size, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, h, w] -> [B, out, h / stride, w / stride]."""
        residual = x if self.downsample is None else self.downsample(x)
        x = nn.functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = nn.functional.relu(self.bn2(self.conv2(x)), inplace=True)
        return nn.functional.relu(self.bn3(self.conv3(x)) + residual, inplace=True)


class BottleneckResNet(nn.Module):
    """Stem and stages without pooling or classifier; every stage after the first halves the map.

    Args:
        embedding_size: channels of the stem. depths: bottlenecks of each stage. hidden_sizes, bottleneck_sizes: channels after and
            within the bottlenecks of each stage. groups: of the 3x3 convolutions. graph: "caffe" or "torchvision".
    """

    def __init__(
        self,
        embedding_size: int,
        depths: list[int],
        hidden_sizes: list[int],
        bottleneck_sizes: list[int],
        groups: int = 1,
        graph: str = "caffe",
        num_channels: int = 3,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, embedding_size, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(embedding_size)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=0 if graph == "caffe" else 1, ceil_mode=graph == "caffe")
        self.depth, channels = len(depths), embedding_size
        for stage, (depth, size, inner) in enumerate(zip(depths, hidden_sizes, bottleneck_sizes)):
            blocks = []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(StridedBottleneck(channels, inner, size, stride, groups, graph))
                channels = size
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, hidden_sizes[-1], h, w]."""
        x = pixel_values.to(self.conv1.weight.dtype)
        if not self.training:
            x = x.contiguous(memory_format=torch.channels_last)  # faster, and every layer hands the layout on
        x = self.maxpool(nn.functional.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in range(self.depth):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x
