"""Which examples a client sees, in which order: the only place data order is decided."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from fedtorch.options import TrainingOptions
from fedtorch.tree import mapped, rows


def len_of(data: Dataset) -> int:
    """Number of examples of a map-style dataset."""
    return len(cast(Any, data))


def batch_order(n: int, order: TrainingOptions, seed: int) -> Tensor:
    """What local steps take of ``n`` examples, shuffled, [steps, examples], padded with -1 at the end.

    That is a batch, or as many batches as are accumulated.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(order.batch_size or n, n)
    used = n // size * size if order.drop_last else n
    taken = min(size * order.accumulate, used)
    per_epoch = -(-used // taken)
    steps = steps_of(n, order)
    if size == n:  # every step sees everything: shuffling would only reorder the sum
        return torch.arange(n).expand(steps, n)
    passes = []
    for _ in range(-(-steps // per_epoch)):
        perm = torch.randperm(n, generator=generator)[:used]
        if short := per_epoch * taken - used:
            perm = F.pad(perm, (0, short), value=-1)
        passes.append(perm.view(-1, taken))
    return (torch.cat(passes) if len(passes) > 1 else passes[0])[:steps]


def steps_of(n: int, order: TrainingOptions) -> int:
    """Local steps of a visit to ``n`` examples."""
    size = min(order.batch_size or n, n)
    many = n // size if order.drop_last else -(-n // size)
    return order.steps or order.epochs * -(-many // order.accumulate)


def least(n: int, order: TrainingOptions) -> int:
    """Size of the smallest batch that a client of ``n`` examples takes in a visit."""
    size = min(order.batch_size or n, n)
    rest = 0 if order.drop_last else n % size
    comes = order.steps is None or order.steps * order.accumulate > n // size
    return rest if rest and comes else size


def fetch(data: Dataset, index: Tensor) -> Any:
    """The examples at ``index`` as one batch: tables' rows, or what a DataLoader would collate of them."""
    if isinstance(data, TensorDataset):
        return tuple(_pick(t, index) for t in data.tensors)
    if len(index) == 0:  # a Poisson batch may be empty, but nothing cannot be collated
        return rows(fetch(data, torch.tensor([0])), slice(0))
    if hasattr(data, "__getitems__"):
        items = data.__getitems__(index.tolist())
    else:
        items = [data[i] for i in index.tolist()]
    return default_collate(items)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    # the same rows in a third of the time; indexing also crosses devices and keeps a memory format
    if table.is_contiguous() and table.device == index.device:
        return table.index_select(0, index)
    return table[index]


def batches(data: Dataset, plan: Tensor) -> Iterator[Any]:
    """One client's batches in order. Tensors are gathered a pass at a time, not batch by batch."""
    full = bool(plan.min() >= 0)
    counts = [plan.shape[1]] * len(plan) if full else (plan >= 0).sum(1).tolist()
    if not isinstance(data, TensorDataset):
        for index, count in zip(plan, counts, strict=True):
            yield fetch(data, index[:count])
        return
    per_gather = max(1, len_of(data) // plan.shape[1])
    for t in range(0, len(plan), per_gather):
        steps, sizes = plan[t : t + per_gather], counts[t : t + per_gather]
        tables = fetch(data, steps.flatten() if full else steps[steps >= 0])
        yield from zip(*(table.split(sizes) for table in tables), strict=True)


def in_parts(data: Dataset, plan: Tensor, size: int) -> Iterator[Iterator[tuple[Any, float]]]:
    """Each step's batches of at most ``size``, to be taken in turn, and their shares of its examples."""
    parts = F.pad(plan, (0, -plan.shape[1] % size), value=-1).view(len(plan), -1, size)
    counts = (parts >= 0).sum(2)
    shares = (counts.double() / counts.sum(1, keepdim=True))[counts > 0].tolist()
    both = zip(batches(data, parts[counts > 0]), shares, strict=True)
    for many in (counts > 0).sum(1).tolist():
        yield islice(both, many)


def alike(plans: Sequence[Tensor]) -> bool:
    """Whether in every step all clients take equally many examples, so that none needs filling up."""
    real = [p >= 0 for p in plans]
    return all(r.shape == real[0].shape and torch.equal(r, real[0]) for r in real[1:])


def side_by_side(
    datasets: Sequence[Dataset], plans: Sequence[Tensor], cut: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """Step by step, K clients' batches as one: tensors [K, B, ...] in a batch's nesting, mask [K, B].

    Where a client has no example (a short batch, or its steps are over) the mask is False and one of
    its own examples stands in, so that every row is real data of that client. With ``cut`` a step is
    no longer than its longest batch, so that of clients with ``alike`` plans every row is an example.
    """
    steps, size = max(len(p) for p in plans), max(p.shape[1] for p in plans)
    index = torch.stack(
        [F.pad(p, (0, size - p.shape[1], 0, steps - len(p)), value=-1) for p in plans]
    )
    longest = (index >= 0).sum(2).amax(0).tolist() if cut else [size] * steps
    if all(isinstance(d, TensorDataset) for d in datasets):
        tables = [d.tensors for d in datasets if isinstance(d, TensorDataset)]
        whole = [torch.cat(t) for t in zip(*tables, strict=True)]
        sizes = torch.tensor([len(t[0]) for t in tables])
        start = (sizes.cumsum(0) - sizes)[:, None]
        for t in range(steps):
            i = index[:, t, : longest[t]]
            at = start + i.clamp(min=0)
            yield tuple(table[at] for table in whole), i >= 0
    else:
        for t in range(steps):
            i = index[:, t, : longest[t]]
            each = [fetch(d, i[k].clamp(min=0)) for k, d in enumerate(datasets)]
            yield mapped(lambda *tensors: torch.stack(tensors), *each), i >= 0
