"""fedtorch: federated learning for PyTorch."""

from fedtorch.client import Client, Recipe
from fedtorch.engines import Local
from fedtorch.evaluate import evaluate
from fedtorch.optimizers import (
    ClientOptimizer,
    ServerAdagrad,
    ServerAdam,
    ServerSGD,
    ServerYogi,
)
from fedtorch.participation import Everyone, Poisson, Uniform
from fedtorch.server import Server
from fedtorch.strategies import FedAvg, FedProx, Scaffold, Strategy
from fedtorch.types import ConfigError
from fedtorch.visit import local_update

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ClientOptimizer",
    "ConfigError",
    "Everyone",
    "FedAvg",
    "FedProx",
    "Local",
    "Poisson",
    "Recipe",
    "Scaffold",
    "Server",
    "ServerAdagrad",
    "ServerAdam",
    "ServerSGD",
    "ServerYogi",
    "Strategy",
    "Uniform",
    "evaluate",
    "local_update",
]
