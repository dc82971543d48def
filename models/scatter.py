"""Fixed wavelet features and one trained linear layer: the strongest small model for private images.

Scattering coefficients of orders 0 to 2 (Bruna & Mallat 2013; for private training Tramer & Boneh 2021,
arXiv:2011.11660): smoothed moduli of convolutions with oriented wavelets at two scales. Nothing of them is
learned, so noise falls on the linear layer alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wavelets(size: int, scale: float, angles: int) -> Tensor:
    """Morlet wavelets, real and imaginary parts, [2 angles, 1, size, size], each of zero mean."""
    at = torch.arange(size) - size // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    parts = []
    for k in range(angles):
        theta = math.pi * k / angles
        along = x * math.cos(theta) + y * math.sin(theta)
        across = -x * math.sin(theta) + y * math.cos(theta)
        window = torch.exp(-(along**2 + across**2 / 4) / (2 * (0.8 * scale) ** 2))
        phase = 3 * math.pi / 4 / scale * along
        for wave in (torch.cos(phase), torch.sin(phase)):
            parts.append(window * (wave - (window * wave).sum() / window.sum()))
    bank = torch.stack(parts)[:, None]
    return bank / bank.abs().sum((1, 2, 3), keepdim=True)


class Scatter(nn.Module):
    """Orders 0 to 2 over two scales, each coefficient map normalised, then a linear layer."""

    def __init__(self, in_channels: int, size: int, num_outputs: int, angles: int) -> None:
        super().__init__()
        self.register_buffer("fine", wavelets(7, 1.0, angles))
        self.register_buffer("coarse", wavelets(11, 2.0, angles))
        maps = in_channels * (1 + 2 * angles + angles * angles)
        side = len(range(0, size, 4))
        self.norm = nn.GroupNorm(
            in_channels * (1 + 2 * angles + angles * angles), maps, affine=False
        )
        self.head = nn.Linear(maps * side * side, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_outputs]."""
        one = modulus(x, self.fine)
        orders = [x, one, modulus(x, self.coarse), modulus(one, self.coarse)]
        maps = torch.cat([F.avg_pool2d(m, 4, ceil_mode=True) for m in orders], 1)
        return self.head(self.norm(maps).flatten(1))


def modulus(x: Tensor, bank: Tensor) -> Tensor:
    """|x * wavelet|, each map with each wavelet, [B, maps wavelets, H, W]."""
    b, c, h, w = x.shape
    both = F.conv2d(x.reshape(b * c, 1, h, w), bank, padding=bank.shape[-1] // 2)
    return both.view(b, -1, 2, h, w).square().sum(2).add(1e-12).sqrt()


def build(input_shape: tuple[int, int, int], num_outputs: int, angles: int = 6) -> nn.Module:
    """For square images of 8 pixels or more."""
    channels, rows, columns = input_shape
    if rows != columns or rows < 8:
        raise ValueError(f"square images of 8 pixels or more are needed, not {rows} x {columns}")
    return Scatter(channels, rows, num_outputs, angles)
