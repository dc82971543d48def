"""Datasets and how to cut them into clients."""

from typing import TYPE_CHECKING

from fedtorch.data.partition import partition  # its module has its name
from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.data.base import Data, from_tensors
    from fedtorch.data.content import split
    from fedtorch.data.folders import ImageFolder
    from fedtorch.data.hub import Custom, HuggingFace
    from fedtorch.data.idx import Idx
    from fedtorch.data.images import Digits
    from fedtorch.data.labelled import LabelledText
    from fedtorch.data.npz import Npz
    from fedtorch.data.partition import (
        Dirichlet,
        Iid,
        Natural,
        Partition,
        QuantitySkew,
        Shards,
    )
    from fedtorch.data.tables import Csv, from_pandas
    from fedtorch.data.text import Text
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = [
    "Csv",
    "Custom",
    "Data",
    "Digits",
    "Dirichlet",
    "HuggingFace",
    "Idx",
    "Iid",
    "ImageFolder",
    "LabelledText",
    "Natural",
    "Npz",
    "Partition",
    "QuantitySkew",
    "Shards",
    "Text",
    "from_pandas",
    "from_tensors",
    "partition",
    "split",
]
