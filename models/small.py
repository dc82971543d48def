"""One hidden layer of tanh units: small on purpose, for private training.

The noise of a private step grows with the square root of the number of weights, and bounded activations
keep gradients below the clipping norm (Papernot et al. 2021, arXiv:2007.14191).
"""

from torch import nn


def build(in_features: int, num_outputs: int, hidden: int = 128) -> nn.Module:
    """Input [B, ...] -> logits [B, num_outputs]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_features, hidden), nn.Tanh(), nn.Linear(hidden, num_outputs)
    )
