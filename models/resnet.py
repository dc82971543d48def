"""A small residual network with GroupNorm in place of BatchNorm.

GroupNorm keeps no statistics of the data, which suits unequal clients (Hsieh et al. 2020,
arXiv:1910.00189) and private training.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(min(8, outer), outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(min(8, outer), outer)
        same = stride == 1 and inner == outer
        self.shortcut = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inner, H, W] -> [B, outer, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of ``depth`` blocks; each stage halves the image and doubles the channels."""

    def __init__(self, in_channels: int, num_outputs: int, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(min(8, width), width)
        blocks, inner = [], width
        for stage in range(3):
            outer = width * 2**stage
            for i in range(depth):
                blocks.append(Block(inner, outer, 2 if stage and not i else 1))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inner, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [B, channels, H, W] -> logits [B, num_outputs]."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def build(in_channels: int, num_outputs: int, width: int = 16, depth: int = 1) -> nn.Module:
    """A ResNet for images of any size from 4x4."""
    return ResNet(in_channels, num_outputs, width, depth)
