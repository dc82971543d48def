"""What users hand over as data, made a dataset whose examples are taken by their places."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    TensorDataset,
    default_collate,
)

from fedtorch.options import fit
from fedtorch.training.batches import Collate, Collated, len_of
from fedtorch.tree import leaves
from fedtorch.types import ConfigError


@dataclass(frozen=True)
class Loader:
    """A DataLoader taken apart; raises ConfigError where a part cannot be kept."""

    dataset: Any
    collate: Collate | None
    num_workers: int
    batch_size: int
    drop_last: bool
    sampler: Sampler[int] | None
    """None: all examples, in whatever order."""
    shuffled: bool


def taken_apart(loader: DataLoader[Any], owner: str) -> Loader:
    """The parts of a DataLoader that make a difference."""
    drawn = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError(_stream(owner))
    if drawn is None:
        raise ConfigError(
            f"{owner}: its DataLoader has batch_size None, so its dataset gives whole batches: give a "
            "dataset of single examples"
        )
    if type(drawn) is not BatchSampler:
        raise ConfigError(
            f"{owner}: its DataLoader has a batch_sampler of its own, {type(drawn).__name__}, and here "
            "the recipe cuts batches: give the dataset, sampler=fn(seed, round), and Recipe(batch_size=)"
        )
    if loader.worker_init_fn is not None:
        raise ConfigError(
            f"{owner}: worker_init_fn of its DataLoader would not be called: leave it out (each batch is "
            "seeded here), or do its work in the dataset"
        )
    order = cast(Any, drawn.sampler)
    shuffled = type(order) is RandomSampler and not order.replacement
    whole = type(order) is SequentialSampler or (shuffled and len(order) == len_of(loader.dataset))
    collate = None if loader.collate_fn is default_collate else loader.collate_fn
    return Loader(
        loader.dataset,
        collate,
        loader.num_workers,
        drawn.batch_size,
        drawn.drop_last,
        None if whole else order,
        shuffled,
    )


def as_dataset(
    data: Any,
    owner: str,
    collate: Collate | None = None,
    num_workers: int = 0,
    empty: bool = False,
) -> Dataset[Any]:
    """Data of any kind -> a map-style dataset of known, positive length.

    ``data``: a map-style dataset, also Hugging Face's; a list of examples; a tuple, list or dict of
    tensors, NumPy arrays, DataFrames and Series with one row for each example, nested or not; a DataLoader,
    whose dataset, collate_fn and num_workers are kept. No number changes its type: floats of NumPy and
    pandas are float64 unless given as float32. Raises ConfigError naming ``owner``, the fault and the fix;
    one without examples is let through where it may be ``empty``.
    """
    if fit(f"num_workers of {owner}", num_workers, int) < 0:
        raise ConfigError(f"num_workers of {owner} must be at least 0, got {num_workers}")
    if isinstance(data, DataLoader):
        loader = taken_apart(data, owner)
        if collate is not None and loader.collate is not None:
            raise ConfigError(
                f"{owner}: collate is given, and its DataLoader has a collate_fn: give one"
            )
        if loader.sampler is not None or loader.drop_last:
            what = "drop_last" if loader.drop_last else f"sampler {type(loader.sampler).__name__}"
            raise ConfigError(
                f"{owner}: {what} of its DataLoader leaves examples out or takes some twice, which would "
                "change the figure: give the dataset alone (loader.dataset)"
            )
        data, collate = loader.dataset, collate or loader.collate
        num_workers = num_workers or loader.num_workers
    if isinstance(data, Collated):
        collate, num_workers = collate or data.collate, num_workers or data.num_workers
        data = data.data
    if isinstance(data, str | bytes | PurePath):
        raise ConfigError(f"{owner}: {str(data)[:60]!r} names data and is none: read it first")
    made = _dataset(data, owner, collate is not None)
    try:
        n = len_of(made)
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"{owner}: its dataset has no length that is a number ({e}): give it __len__"
        ) from e
    if n == 0 and not empty:
        raise ConfigError(f"{owner} has no examples; leave it out")
    ahead = num_workers and not isinstance(made, TensorDataset)  # of which nothing has to be read
    return Collated(made, collate, num_workers) if collate or ahead else made


def _dataset(data: Any, owner: str, collated: bool) -> Dataset[Any]:
    if isinstance(data, IterableDataset) or (
        hasattr(data, "__iter__") and not hasattr(data, "__getitem__")
    ):
        raise ConfigError(_stream(owner))
    if hasattr(data, "column_names") and hasattr(data, "with_format"):
        data = _hugging_face(data, owner, collated)
    elif isinstance(data, (tuple, Mapping, np.ndarray, Tensor)) or _is_table(data):
        data = _of_rows(data, owner)
    elif isinstance(data, list) and all(_is_row(part) for part in data):
        data = _of_rows(tuple(data), owner)
    if isinstance(data, TensorDataset | StackDataset):
        data = _detached(data, owner)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ConfigError(
            f"{owner}: {type(data).__name__} is not map-style (it needs __len__ and __getitem__)"
        )
    return cast(Dataset[Any], data)


def _stream(owner: str) -> str:
    return (
        f"{owner}: an IterableDataset, or another stream, is not map-style: no round could choose "
        "among its examples; give list(data) where it fits into memory, or a dataset with __len__ and "
        "__getitem__ (Hugging Face: load_dataset without streaming)"
    )


def _of_rows(data: Any, owner: str) -> Any:
    """Tensors, or a nesting of such, with one row for each example -> a dataset of the rows."""
    if _is_table(data) and hasattr(data, "columns"):
        raise ConfigError(
            f"{owner}: a DataFrame alone does not say what is to be learned: give (df[inputs], df[target])"
        )
    parts = _tensors(data, owner)
    kinds = (
        ", ".join(type(v).__name__ for v in data)
        if isinstance(data, tuple)
        else type(data).__name__
    )
    found = leaves(parts)
    if any(t.is_nested for t in found):
        raise ConfigError(
            f"{owner}: its tensors are nested: give a list of examples, and collate=, which pads them"
        )
    if any(t.layout is not torch.strided for t in found):
        raise ConfigError(f"{owner}: its tensors are sparse: give them dense, x.to_dense()")
    if not found or not all(t.dim() for t in found):
        raise ConfigError(f"{owner}: data must be tensors (x, y) with one row each, got {kinds}")
    if len({*map(len, found)}) != 1:
        raise ConfigError(
            f"{owner}: tensors of different lengths {[len(t) for t in found]}: give each a row for each "
            "example"
        )
    _same_index(data, owner)
    return _stacked(parts)


def _stacked(parts: Any) -> Any:
    if isinstance(parts, Tensor):
        return parts
    if isinstance(parts, tuple) and all(isinstance(p, Tensor) for p in parts):
        return TensorDataset(*parts)
    if isinstance(parts, dict):
        return StackDataset(**{k: _stacked(v) for k, v in parts.items()})
    return StackDataset(*map(_stacked, parts))


def _tensors(data: Any, owner: str, name: str = "data") -> Any:
    """The same nesting with a tensor in the place of each array, Series or DataFrame."""
    if isinstance(data, Mapping):
        return {str(k): _tensors(v, owner, f"{k!r}") for k, v in data.items()}
    if isinstance(data, tuple) or (isinstance(data, list) and all(_is_row(v) for v in data)):
        return tuple(_tensors(v, owner, name) for v in data)
    if isinstance(data, Tensor):
        return data
    if _is_table(data):
        columns = getattr(data, "columns", None)
        if columns is None:
            return _column(data, owner, getattr(data, "name", None) or name)
        return torch.from_numpy(np.column_stack([_column(data[c], owner, c) for c in columns]))
    if isinstance(data, np.ndarray):
        return _tensor(data, owner, name)
    if hasattr(data, "toarray"):
        raise ConfigError(
            f"{owner}: {name} is sparse ({type(data).__name__}): give it dense, toarray(), as float32"
        )
    raise ConfigError(
        f"{owner}: data must be tensors (x, y) with one row each, or arrays, DataFrames and Series, got "
        f"{type(data).__name__}; a dataset of examples needs __len__ and __getitem__"
    )


def _column(column: Any, owner: str, name: object) -> Tensor:
    found = _tensor(column.to_numpy(), owner, f"column {name!r}")
    if found.is_floating_point() and bool(found.isnan().any()):
        raise ConfigError(
            f"{owner}: column {name!r} has missing values: fill or drop them (fillna, dropna), or give "
            "to_numpy() to a model that knows NaN"
        )
    return found


def _tensor(array: Any, owner: str, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise ConfigError(f"{owner}: {name} is a masked array: fill it first (array.filled(...))")
    if array.dtype.kind in "OSUV":
        raise ConfigError(
            f"{owner}: {name} holds {array.dtype} (text, mixed objects or missing values), not numbers: "
            "encode it as numbers, or leave it out"
        )
    if array.dtype.kind in "mM":
        raise ConfigError(
            f"{owner}: {name} holds dates ({array.dtype}): make numbers of them first"
        )
    try:
        own = array.astype(array.dtype.newbyteorder("="))  # a copy, in rows and ours to keep
        return torch.from_numpy(np.ascontiguousarray(own) if array.ndim else own)
    except TypeError as e:
        raise ConfigError(
            f"{owner}: {name} is {array.dtype}, which torch has not: give it as float32 or int64 (astype)"
        ) from e


def _same_index(data: Any, owner: str) -> None:
    """Refuse columns whose labels say that they belong to other rows than their places do."""
    tables = [v for v in data if _is_table(v)] if isinstance(data, tuple) else []
    labels = [v.index for v in tables if hasattr(getattr(v, "index", None), "equals")]
    if any(not labels[0].equals(other) for other in labels[1:]):
        raise ConfigError(
            f"{owner}: its DataFrames and Series differ in their index labels: align them, or give "
            "reset_index(drop=True) of each where rows stand in the right places"
        )


def _detached(data: Any, owner: str) -> Any:
    """Nothing asks for the gradient of data."""
    tables = [*data.tensors] if isinstance(data, TensorDataset) else []
    if type(data) is not TensorDataset or not any(t.requires_grad for t in tables):
        return data
    if not all(t.is_leaf for t in tables):
        raise ConfigError(
            f"{owner}: its data requires grad, and what it was computed from is not trained here: give "
            "x.detach()"
        )
    return TensorDataset(*(t.detach() for t in tables))


def _hugging_face(data: Any, owner: str, collated: bool) -> Any:
    """A Dataset of Hugging Face, whose examples are tensors unless a collate takes them as they are."""
    if isinstance(data, Mapping):
        raise ConfigError(f"{owner}: a DatasetDict has parts ({', '.join(data)}): give one of them")
    if collated or data.format["type"] is not None:
        return data
    texts = [
        k for k, f in data.features.items() if getattr(f, "dtype", "") in ("string", "large_string")
    ]
    if texts:
        raise ConfigError(
            f"{owner}: column {texts[0]!r} holds text, not numbers: tokenize it and give "
            f"data.remove_columns({texts[0]!r}), or a collate of your own"
        )
    return data.with_format("torch")


def _is_table(part: Any) -> bool:
    """A DataFrame or a Series, of pandas or one like it."""
    return hasattr(part, "to_numpy") and hasattr(
        part, "dtypes" if hasattr(part, "columns") else "dtype"
    )


def _is_row(part: Any) -> bool:
    return isinstance(part, Tensor | np.ndarray) or _is_table(part)
