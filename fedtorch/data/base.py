"""What a dataset is once loaded: train and test examples, and the facts a model is built from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedtorch.training.batches import Collated
from fedtorch.training.datasets import as_dataset


@dataclass(frozen=True)
class Preparation:
    """How files became tensors; ``predict`` does the same to other files."""

    classes: tuple[Any, ...] = ()
    """Names of the classes in the order of the outputs; none: their numbers, 0, 1, ... as in the file."""
    scale: float = 1.0
    """Divisor of whole-numbered pixels."""
    pixels: bool = False
    """Inputs are images in 0..1, as pictures are given to ``predict``."""
    channels_last: bool = False
    """Images came as [N, rows, columns, channels]."""
    columns: tuple[str, ...] = ()
    """Features of a table, in order."""
    categories: tuple[tuple[str, ...], ...] = ()
    """Of each column; empty ones are numbers. None at all: every column is one."""
    missing: str = ""
    """What was done with missing values; empty: there may be none."""
    fill: tuple[float | None, ...] = ()
    """What stands for a missing number of each column."""
    header: tuple[str, ...] = ()
    """Names of the columns of a file that has no line of them."""
    separator: str = ""
    encoding: str = ""
    na: tuple[str, ...] = ()
    """Further spellings of a missing value."""
    target: str = ""
    client: str = ""
    dropped: tuple[str, ...] = ()
    decimal: str = "."
    text: str = ""
    """Column with the texts, where each has a class."""
    vocabulary: str = ""
    """What their numbers stand for: bytes, hashed:4096 (words), or words."""
    words: tuple[str, ...] = ()
    """Words of the vocabulary, from 2 on; 1 is any other, 0 fills up."""
    resize: int = 0
    """Length that the shorter side of a picture gets before its middle is cut out; 0: it is stretched."""
    background: str = ""
    """Colour behind what is see-through in a picture."""
    mean: tuple[float, ...] = ()
    """Subtracted from each column, where a table was scaled."""
    deviation: tuple[float, ...] = ()
    scaled: str = ""
    """How it was scaled, in words."""
    dtype: str = ""
    """NumPy's name of the type that inputs were stored in; empty: a table of text, or not known."""
    numbers: str = ""
    """Kind of the inputs' numbers before preparation; see ``fedtorch.data.units``."""
    notes: tuple[str, ...] = ()
    """Further steps of the preparation, in words."""
    remarks: tuple[str, ...] = ()
    """What looks odd in the rows; as it tells of them, a strict run keeps it back."""
    found: tuple[str, ...] = ()
    """Columns whose categories are those that the rows held."""
    derived: tuple[str, ...] = ()
    """Steps whose numbers were taken from the rows, which no noise covers, and what to give instead."""


@dataclass(frozen=True)
class Asks:
    """Columns that wait for statistics which a privacy plan releases; see ``fedtorch.privacy.columns``."""

    columns: tuple[str, ...]
    """Their names."""
    rows: np.ndarray
    """Of the training examples, [N, columns], NaN where a value is missing."""
    bounds: tuple[tuple[float, float], ...]
    """Public: what lies beyond counts as the bound."""
    kind: str
    """``quartiles`` or ``sums``."""
    answer: Callable[[Sequence[float], Sequence[float], str], "Data"]
    """Centers and widths of the columns, and what is to be said of them -> the data, scaled."""
    settled: Callable[[Preparation], "Data"]
    """The preparation of an earlier run -> the data as they were then."""


@dataclass(frozen=True)
class Data:
    """Real examples, ready to be cut into clients."""

    name: str
    train: Dataset
    test: Dataset
    kind: str
    """``classification``, ``binary`` or ``regression``: decides the default loss and metric."""
    outputs: int
    """Classes, or numbers to predict."""
    labels: Tensor | None = None
    """Class of each training example, [N]; none where label skew has no meaning."""
    keys: Sequence[str] | None = None
    """Natural owner of each training example (a writer, a speaker, a hospital)."""
    persons: Sequence[str] | None = field(default=None, kw_only=True)
    """Whose each training example is, where one person may have several; none: nobody says."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that a model may ask for by name: input_shape, in_features, in_channels, vocab_size, ..."""
    preparation: Preparation = Preparation()
    asks: Asks | None = None
    """What is still to be released before the data are as they will be; none: nothing."""

    def __post_init__(self) -> None:
        """Take examples in whatever a client may be given them; raises ConfigError for anything else."""
        for part, empty in (("train", False), ("test", True)):
            found = as_dataset(getattr(self, part), f"{self.name}, {part} examples", empty=empty)
            object.__setattr__(self, part, found)


def from_tensors(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    kind: str,
    outputs: int,
    keys: Sequence[str] | None = None,
    preparation: Preparation = Preparation(),
    **facts: Any,
) -> Data:
    """Data from ``(x, y)`` pairs, with the usual facts filled in."""
    usual = facts_of(tuple(train[0].shape[1:]), outputs, kind)
    labels = train[1] if kind != "regression" and train[1].dim() == 1 else None
    return Data(
        name,
        TensorDataset(*train),
        TensorDataset(*test),
        kind,
        outputs,
        None if labels is None else labels.long(),
        keys,
        usual | facts,
        preparation,
    )


def facts_of(shape: tuple[int, ...], outputs: int, kind: str) -> dict[str, Any]:
    """Facts that a model may ask for, from the shape of one example and the number of outputs."""
    return {
        "input_shape": shape,
        "in_features": math.prod(shape),
        "in_channels": shape[0] if len(shape) == 3 else 1,
        "num_classes": outputs,
        "num_outputs": 1 if kind == "binary" else outputs,
        "out_features": 1 if kind == "binary" else outputs,
    }


def subset(data: Dataset, index: Tensor) -> Dataset:
    """Some examples of a dataset; tensors stay tensors, so that batches stay cheap."""
    if isinstance(data, TensorDataset):
        return TensorDataset(*(t[index] for t in data.tensors))
    if isinstance(data, Collated):
        return Collated(subset(data.data, index), data.collate, data.num_workers)
    return Subset(data, index.tolist())
