"""CLIP's modified ResNet and its attention pooling ("Learning Transferable Visual Models...", section 2.4).

Against a torchvision ResNet: a stem of three 3x3 convolutions, average pooling instead of strided convolutions in the
bottlenecks and on the shortcuts, and attention pooling in place of the global average.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_vlp.layers.attention import Attention
from hf_vlp.layers.patch_embedding import resize_position_table

OUTPUT_STRIDE = 32  # pixels of one cell of the last map, along each side


def convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


class Bottleneck(GradientCheckpointingLayer):
    """1x1, 3x3, average pooling, 1x1, each with batch norm; expansion 4; the shortcut is pooled before its 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1, self.bn1 = convolution(in_channels, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = convolution(planes, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(convolution(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, h, w] -> [B, 4 * planes, h / stride, w / stride]."""
        residual = x if self.downsample is None else self.downsample(self.pool(x))
        x = nn.functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = nn.functional.relu(self.bn2(self.conv2(x)), inplace=True)
        return nn.functional.relu(self.bn3(self.conv3(self.pool(x))) + residual, inplace=True)


class ModifiedResNet(nn.Module):
    """The convolutional trunk: output stride 32, 32 * width channels.

    Args:
        layers: bottlenecks in each of the four stages.
        width: channels after the stem.
    """

    def __init__(self, layers: list[int] | tuple[int, ...], width: int, num_channels: int = 3):
        super().__init__()
        self.conv1, self.bn1 = convolution(num_channels, width // 2, 3, stride=2), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = convolution(width // 2, width // 2, 3), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = convolution(width // 2, width, 3), nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(2)
        channels = width
        for stage, depth in enumerate(layers):
            planes = width * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(channels, planes, stride=2 if stage and not block else 1))
                channels = planes * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def stages(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] -> the maps after the stem (stride 4) and after each stage (strides 4, 8, 16, 32)."""
        x = pixel_values.to(self.conv1.weight.dtype)
        if not self.training:
            # Faster, and every layer hands the layout on. In training it follows the weights', `model.to(memory_format=...)`:
            # batch norm over few cells magnifies the other order of summation into differences from the released code.
            x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nn.functional.relu(norm(conv(x)), inplace=True)
        maps = [self.pool(x)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, 32 * width, H / 32, W / 32]."""
        return self.stages(pixel_values)[-1]


class AttentionPool(nn.Module):
    """One multi-head attention whose only query is the mean token; keys and values are the mean and all cells.

    Args:
        config: configuration with the attention implementation.
        grid: side g of the map the position table is made for.
        hidden_size: channels D of the map.
        num_heads: attention heads.
        out_size: width E of the result.
    """

    def __init__(self, config, grid: int, hidden_size: int, num_heads: int, out_size: int):
        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(1 + grid * grid, hidden_size))
        self.attention = Attention(config, hidden_size, num_heads, out_size=out_size)

    def forward(self, features: torch.Tensor, **kwargs) -> torch.Tensor:
        """`features` [B, D, h, w] -> [B, E]."""
        tokens = features.flatten(2).transpose(1, 2)  # [B, h*w, D]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # [B, 1 + h*w, D]
        positions = resize_position_table(self.position_embedding, features.shape[-2:])
        tokens = tokens + positions.to(tokens.dtype)
        return self.attention(tokens[:, :1], None, tokens, **kwargs)[0].squeeze(1)
