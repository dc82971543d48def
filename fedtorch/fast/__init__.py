"""The fast path: models made of known layers, trained client beside client without autograd."""

from fedtorch.fast.offer import offer
from fedtorch.fast.solve import Fast

__all__ = ["Fast", "offer"]
