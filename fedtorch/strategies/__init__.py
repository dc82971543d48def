"""Federated algorithms: one file each, client half and server half together."""

from typing import TYPE_CHECKING

from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.strategies.apfl import APFL
    from fedtorch.strategies.base import Correction, FedAvg, Strategy
    from fedtorch.strategies.ditto import Ditto
    from fedtorch.strategies.fedbabu import FedBABU
    from fedtorch.strategies.fedbn import FedBN
    from fedtorch.strategies.feddyn import FedDyn
    from fedtorch.strategies.fedexp import FedExP
    from fedtorch.strategies.fednova import FedNova
    from fedtorch.strategies.fedper import FedPer
    from fedtorch.strategies.fedprox import FedProx
    from fedtorch.strategies.fedrep import FedRep
    from fedtorch.strategies.ifca import IFCA
    from fedtorch.strategies.lg import LGFedAvg
    from fedtorch.strategies.lora import FedExLoRA, FFALoRA, RoLoRA
    from fedtorch.strategies.momentum import ClientMomentum
    from fedtorch.strategies.moon import MOON
    from fedtorch.strategies.pfedme import PFedMe
    from fedtorch.strategies.qfedavg import QFedAvg
    from fedtorch.strategies.scaffold import Scaffold
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = [
    "APFL",
    "IFCA",
    "MOON",
    "ClientMomentum",
    "Correction",
    "Ditto",
    "FFALoRA",
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
    "LGFedAvg",
    "PFedMe",
    "QFedAvg",
    "RoLoRA",
    "Scaffold",
    "Strategy",
]
