"""A character LSTM that predicts the next character at every position.

The FedAvg paper's has an embedding of 8 and two layers of 256 (McMahan et al. 2017, sec. 3);
``hidden`` and ``layers`` make it that.
"""

import torch
from torch import nn


class CharLSTM(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self, vocab_size: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Characters [B, T] -> logits [B, vocab_size, T]: classes on axis 1, as torch's losses want."""
        return self.head(self.lstm(self.embed(x))[0]).transpose(1, 2)


def build(vocab_size: int, embedding: int = 32, hidden: int = 128, layers: int = 1) -> nn.Module:
    """A character LSTM."""
    return CharLSTM(vocab_size, embedding, hidden, layers)
