"""LG-FedAvg: each client has lower layers of its own below a head that all share."""

from dataclasses import dataclass

from fedtorch.strategies.base import Strategy


@dataclass(frozen=True, kw_only=True)
class LGFedAvg(Strategy):
    """FedAvg of the head; a client keeps its lower layers (Liang et al. 2020, arXiv:2001.01523, Alg. 1)."""

    personal: tuple[str, ...] = ("body.*",)
    """The lower layers' weights, by name."""
