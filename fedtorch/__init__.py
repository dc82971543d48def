"""fedtorch: federated learning for PyTorch."""

import sys

from fedtorch.run.interrupts import reading

with reading():
    from fedtorch.aggregation.mean import Mean
    from fedtorch.aggregation.robust import Median
    from fedtorch.aggregation.rows import Robust
    from fedtorch.channel.base import Stage
    from fedtorch.channel.topk import TopK
    from fedtorch.client import Client
    from fedtorch.data.tables import from_pandas
    from fedtorch.engines import Local
    from fedtorch.recipe import Recipe
    from fedtorch.rounds.observers import Observer
    from fedtorch.rounds.participation import Everyone, Poisson, Uniform
    from fedtorch.run.setup import divide
    from fedtorch.server import Server
    from fedtorch.strategies import Correction, FedAvg, FedBN, FedPer, FedProx, Scaffold, Strategy
    from fedtorch.training.evaluate import evaluate
    from fedtorch.training.local_update import local_update
    from fedtorch.training.optimizer import (
        ClientOptimizer,
        ServerAdagrad,
        ServerAdam,
        ServerSGD,
        ServerYogi,
    )
    from fedtorch.types import ConfigError

# where they stood before there were rooms: scripts, configs and pages name them so
OLD = {
    "history": "rounds.history",
    "losses": "training.losses",
    "optimizers": "training.optimizer",
    "participation": "rounds.participation",
    "schedules": "rounds.schedules",
    "solvers": "training.stacked",
    "visit": "training.local_update",
}
sys.modules |= {f"fedtorch.{old}": sys.modules[f"fedtorch.{new}"] for old, new in OLD.items()}

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ClientOptimizer",
    "ConfigError",
    "Correction",
    "Everyone",
    "FedAvg",
    "FedBN",
    "FedPer",
    "FedProx",
    "Local",
    "Mean",
    "Median",
    "Observer",
    "Poisson",
    "Recipe",
    "Robust",
    "Scaffold",
    "Server",
    "ServerAdagrad",
    "ServerAdam",
    "ServerSGD",
    "ServerYogi",
    "Stage",
    "Strategy",
    "TopK",
    "Uniform",
    "divide",
    "evaluate",
    "from_pandas",
    "local_update",
]
