"""A small causal transformer that predicts the next character at every position."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind LayerNorm (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] -> the same shape."""
        B, T, W = x.shape
        q, k, v = (
            z.view(B, T, self.heads, W // self.heads).transpose(1, 2)
            for z in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, W))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """Token and position embeddings, blocks, linear."""

    def __init__(self, vocab_size: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Characters [B, T] -> logits [B, vocab_size, T]: classes on axis 1, as torch's losses want."""
        places = torch.arange(x.shape[1], device=x.device)
        deep = self.blocks(self.token(x) + self.position(places))
        return self.head(self.norm(deep)).transpose(1, 2)


def build(
    vocab_size: int,
    input_shape: tuple[int],
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
) -> nn.Module:
    """A transformer for windows of the data's own length."""
    if width % heads:
        raise ValueError(f"width {width} must be a multiple of heads {heads}")
    return CharTransformer(vocab_size, input_shape[0], width, heads, layers)
