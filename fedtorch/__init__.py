"""fedtorch: federated learning for PyTorch."""

import sys
from pathlib import Path

try:
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
except (
    KeyboardInterrupt
):  # reading torch takes seconds; of a command, stopping it is no error to trace
    if sys.argv[:1] != ["-m"] and Path(sys.argv[0]).name not in ("fedtorch", "train.py"):
        raise
    sys.stderr.write("fedtorch: stopped\n")
    raise SystemExit(130) from None

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
