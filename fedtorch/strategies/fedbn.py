"""FedBN: normalising layers stay with their client."""

from dataclasses import dataclass

from fedtorch.strategies.base import Strategy


@dataclass(frozen=True, kw_only=True)
class FedBN(Strategy):
    """FedAvg of all but the BatchNorm layers (Li et al. 2021, arXiv:2102.07623, Alg. 1).

    Their scales, shifts and running statistics are each client's own. A model without such layers is
    refused before any training.
    """

    personal: tuple[str, ...] = ("@BatchNorm",)
    """Which layers, by kind or name."""
