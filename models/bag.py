"""A classifier of texts that ignores the order of words: the mean of their embeddings, then linear.

As fastText's (Joulin et al. 2016, sec. 2), without n-grams. 0 fills up short texts and counts for nothing.
"""

import torch
from torch import nn


class Bag(nn.Module):
    """Embedding, mean, linear."""

    def __init__(self, vocab_size: int, num_outputs: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers of words [B, T] -> logits [B, num_outputs]."""
        there = (x != 0).unsqueeze(-1).float()
        mean = (self.embed(x) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.head(mean)


def build(vocab_size: int, num_outputs: int, width: int = 64) -> nn.Module:
    """A bag of words."""
    return Bag(vocab_size, num_outputs, width)
