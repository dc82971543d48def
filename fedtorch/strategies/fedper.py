"""FedPer: a head of each client's own on a body that all share."""

from dataclasses import dataclass

from fedtorch.strategies.base import Strategy


@dataclass(frozen=True, kw_only=True)
class FedPer(Strategy):
    """FedAvg of the body; a client keeps its head (Arivazhagan et al. 2019, arXiv:1912.00818, Alg. 1)."""

    personal: tuple[str, ...] = ("head.*",)
    """The head's weights, by name."""
