"""Networks of W6 to W10 that fedtorch does not bring with it, and what Opacus wants of them."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch.privacy.models import fixed
from fedtorch.run.zoo import maker_of

RANK = 4


def transformer(vocab_size: int, input_shape: tuple[int]) -> nn.Module:
    """W8: the zoo's with four layers, 128 wide."""
    model: nn.Module = maker_of("transformer")(vocab_size, input_shape, width=128, layers=4)
    return model


def adapted(vocab_size: int, input_shape: tuple[int]) -> nn.Module:
    """The same with all weights frozen, and adapters on the linear layers of its blocks."""
    model = transformer(vocab_size, input_shape).requires_grad_(False)
    for block in model.get_submodule("blocks").children():
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, Adapter(block.get_submodule(name)))
    return model


class Adapter(nn.Module):
    """A linear layer and a trainable product of rank 4 (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        outer, inner = base.get_parameter("weight").shape
        self.base, self.down = base, nn.Linear(inner, RANK, bias=False)
        self.up = nn.Linear(RANK, outer, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output and the product's."""
        return self.base(x) + self.up(self.down(x))


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm and a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inner, outer, 3, stride), nn.BatchNorm2d(outer)
        self.conv2, self.norm2 = conv(outer, outer, 3, 1), nn.BatchNorm2d(outer)
        other = nn.Sequential(conv(inner, outer, 1, stride), nn.BatchNorm2d(outer))
        self.short = nn.Identity() if inner == outer and stride == 1 else other

    def forward(self, x: Tensor) -> Tensor:
        """[B, inner, H, W] -> [B, outer, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


def conv(inner: int, outer: int, size: int, stride: int) -> nn.Conv2d:
    """A convolution without bias that keeps the image's size, but for the stride."""
    return nn.Conv2d(inner, outer, size, stride, size // 2, bias=False)


class ResNet18(nn.Module):
    """W10: 11.2 million parameters, as for CIFAR."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.stem, self.norm = conv(in_channels, 64, 3, 1), nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        stages = [
            (BasicBlock(i, o, 1 + (i != o)), BasicBlock(o, o, 1)) for i, o in pairwise(widths)
        ]
        self.blocks = nn.Sequential(*(block for stage in stages for block in stage))
        self.head = nn.Linear(512, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> logits."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def for_opacus(model: nn.Module) -> nn.Module:
    """A twin whose layers Opacus can look into: its own LSTM, and positions for each example."""
    twin = fixed(model)
    if not hasattr(twin, "position"):
        return twin

    def forward(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).repeat(x.shape[0], 1)
        deep = twin.get_submodule("blocks")(twin.token(x) + twin.position(places))
        return twin.head(twin.norm(deep)).transpose(1, 2)

    twin.forward = forward
    return twin
