"""The FedAvg paper's 2NN: two hidden layers (McMahan et al. 2017, arXiv:1602.05629, sec. 3)."""

from itertools import pairwise

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def build(
    in_features: int, num_outputs: int, hidden: int = 200, layers: int = 2, activation: str = "relu"
) -> nn.Module:
    """Input [B, ...] -> logits [B, num_outputs]."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    widths = [in_features] + [hidden] * layers
    body: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        body += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*body, nn.Linear(widths[-1], num_outputs))
