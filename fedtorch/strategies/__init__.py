"""Federated algorithms: one file each, client half and server half together."""

from fedtorch.strategies.base import Correction, FedAvg, Strategy
from fedtorch.strategies.fedprox import FedProx
from fedtorch.strategies.scaffold import Scaffold

__all__ = ["Correction", "FedAvg", "FedProx", "Scaffold", "Strategy"]
