"""The fast path: models made of known layers, trained client beside client without autograd."""

from fedtorch.fast.solver import Fast
from fedtorch.fast.trial import offer

__all__ = ["Fast", "offer"]
