"""Federated algorithms: one file each, client half and server half together."""

from fedtorch.strategies.base import Correction, FedAvg, Strategy
from fedtorch.strategies.fedbn import FedBN
from fedtorch.strategies.feddyn import FedDyn
from fedtorch.strategies.fedexp import FedExP
from fedtorch.strategies.fednova import FedNova
from fedtorch.strategies.fedper import FedPer
from fedtorch.strategies.fedprox import FedProx
from fedtorch.strategies.lora import FedExLoRA, FFALoRA, RoLoRA
from fedtorch.strategies.scaffold import Scaffold

__all__ = [
    "Correction",
    "FFALoRA",
    "FedAvg",
    "FedBN",
    "FedDyn",
    "FedExLoRA",
    "FedExP",
    "FedNova",
    "FedPer",
    "FedProx",
    "RoLoRA",
    "Scaffold",
    "Strategy",
]
