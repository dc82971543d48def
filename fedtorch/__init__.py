"""fedtorch: federated learning for PyTorch."""

import sys

from fedtorch.interrupts import reading

with reading():
    from fedtorch.client import Client, Recipe
    from fedtorch.engines import Local
    from fedtorch.rounds import history
    from fedtorch.rounds.participation import Everyone, Poisson, Uniform
    from fedtorch.run.evaluate import evaluate
    from fedtorch.server import Server
    from fedtorch.strategies import Correction, FedAvg, FedProx, Scaffold, Strategy
    from fedtorch.training import losses
    from fedtorch.training.local_update import local_update
    from fedtorch.training.optimizer import (
        ClientOptimizer,
        ServerAdagrad,
        ServerAdam,
        ServerSGD,
        ServerYogi,
    )
    from fedtorch.types import ConfigError

# where they stood before there were rooms
sys.modules |= {"fedtorch.losses": losses, "fedtorch.history": history}

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ClientOptimizer",
    "ConfigError",
    "Correction",
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
