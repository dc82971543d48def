"""fedtorch: federated learning for PyTorch."""

import sys

from fedtorch.run.interrupts import Reading

with Reading():  # what every round needs; the rest is imported when it is asked for
    from typing import TYPE_CHECKING

    from fedtorch import server as server
    from fedtorch.lazy import Renamed, offers

if TYPE_CHECKING:
    from fedtorch.aggregation import (
        Bulyan,
        CentredClip,
        FLTrust,
        GeometricMedian,
        Krum,
        Mean,
        Median,
        MultiKrum,
        NormBound,
        Robust,
        TrimmedMean,
    )
    from fedtorch.channel.base import Stage
    from fedtorch.channel.lowrank import PowerSGD
    from fedtorch.channel.quantise import QSGD, Sign
    from fedtorch.channel.topk import RandomK, TopK
    from fedtorch.client import Client
    from fedtorch.data.tables import from_pandas
    from fedtorch.engines import Local
    from fedtorch.recipe import Recipe
    from fedtorch.rounds.observers import Observer
    from fedtorch.rounds.participation import Everyone, Poisson, Uniform
    from fedtorch.run.audited import Audit
    from fedtorch.run.callbacks import BestModel, Checkpoint, EarlyStopping
    from fedtorch.run.recorded import Record
    from fedtorch.run.resume import resume
    from fedtorch.run.setup import divide
    from fedtorch.run.shown import report
    from fedtorch.saved import Trained, load
    from fedtorch.secure.aggregator import Secure
    from fedtorch.secure.he import HE
    from fedtorch.server import Server
    from fedtorch.strategies import (
        APFL,
        IFCA,
        MOON,
        ClientMomentum,
        Correction,
        Ditto,
        FedAvg,
        FedBABU,
        FedBN,
        FedDyn,
        FedExLoRA,
        FedExP,
        FedNova,
        FedPer,
        FedProx,
        FedRep,
        FFALoRA,
        LGFedAvg,
        PFedMe,
        QFedAvg,
        RoLoRA,
        Scaffold,
        Strategy,
    )
    from fedtorch.training.evaluate import evaluate
    from fedtorch.training.local_update import local_update
    from fedtorch.training.optimizer import (
        ClientOptimizer,
        ServerAdagrad,
        ServerAdam,
        ServerLAMB,
        ServerSGD,
        ServerYogi,
    )
    from fedtorch.types import ConfigError
else:
    __getattr__, __dir__ = offers(__name__, __file__)

# where they stood before there were rooms: scripts, configs and pages name them so
OLD = {
    "checkpoint": "run.checkpoint",
    "history": "rounds.history",
    "losses": "training.losses",
    "optimizers": "training.optimizer",
    "participation": "rounds.participation",
    "privacy.checks": "privacy.models",
    "privacy.gaussian": "privacy.accounting.gaussian",
    "privacy.keystream": "privacy.noise.keystream",
    "privacy.ledger": "privacy.accounting.ledger",
    "privacy.streams": "privacy.noise.streams",
    "schedules": "rounds.schedules",
    "solvers": "training.stacked",
    "visit": "training.local_update",
}
sys.meta_path.append(Renamed({f"fedtorch.{o}": f"fedtorch.{new}" for o, new in OLD.items()}))

__version__ = "0.1.0"

__all__ = [
    "APFL",
    "HE",
    "IFCA",
    "MOON",
    "QSGD",
    "Audit",
    "BestModel",
    "Bulyan",
    "CentredClip",
    "Checkpoint",
    "Client",
    "ClientMomentum",
    "ClientOptimizer",
    "ConfigError",
    "Correction",
    "Ditto",
    "EarlyStopping",
    "Everyone",
    "FFALoRA",
    "FLTrust",
    "FedAvg",
    "FedBABU",
    "FedBN",
    "FedDyn",
    "FedExLoRA",
    "FedExP",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "GeometricMedian",
    "Krum",
    "LGFedAvg",
    "Local",
    "Mean",
    "Median",
    "MultiKrum",
    "NormBound",
    "Observer",
    "PFedMe",
    "Poisson",
    "PowerSGD",
    "QFedAvg",
    "RandomK",
    "Recipe",
    "Record",
    "RoLoRA",
    "Robust",
    "Scaffold",
    "Secure",
    "Server",
    "ServerAdagrad",
    "ServerAdam",
    "ServerLAMB",
    "ServerSGD",
    "ServerYogi",
    "Sign",
    "Stage",
    "Strategy",
    "TopK",
    "Trained",
    "TrimmedMean",
    "Uniform",
    "divide",
    "evaluate",
    "from_pandas",
    "load",
    "local_update",
    "report",
    "resume",
]
