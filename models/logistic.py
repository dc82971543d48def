"""Logistic (or linear) regression: one linear layer on the flattened input."""

from torch import nn


def build(in_features: int, num_outputs: int) -> nn.Module:
    """Input [B, ...] -> logits [B, num_outputs]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_outputs))
