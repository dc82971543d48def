"""Which examples a client sees, in which order: the only place data order is decided."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from multiprocessing import current_process
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    StackDataset,
    TensorDataset,
    default_collate,
)

from fedtorch import seeds
from fedtorch.options import TrainingOptions
from fedtorch.tree import Apart, mapped, rows

Collate = Callable[[list[Any]], Any]
"""Examples, as the dataset gives them, -> one batch."""

Drawn = Callable[[int, int], Any] | Sampler[int]
"""``fn(seed, round)`` -> places of the examples that a pass takes, in order; or a sampler of torch."""


class Collated(Dataset[Any]):
    """A dataset with its own way to make a batch of examples, and processes that read ahead."""

    def __init__(
        self, data: Dataset[Any], collate: Collate | None = None, num_workers: int = 0
    ) -> None:
        """``collate``: none, as DataLoader does; ``num_workers``: none, read as training needs it."""
        self.data, self.collate, self.num_workers = data, collate, num_workers

    def __len__(self) -> int:
        """Number of examples."""
        return len_of(self.data)

    def __getitem__(self, k: int) -> Any:
        """One example, not collated."""
        return self.data[k]


def len_of(data: Dataset) -> int:
    """Number of examples of a map-style dataset."""
    return len(cast(Any, data))


class Cut(NamedTuple):
    """How passes over some examples become local steps."""

    whole: bool
    """Every step takes all of them."""
    used: int
    """Of a pass; the others are left out."""
    taken: int
    """Of a step: a batch, or as many batches as are accumulated."""
    passes: int
    steps: int

    @classmethod
    def of(cls, n: int, order: TrainingOptions) -> "Cut":
        """Of ``n`` examples."""
        size = min(order.batch_size or n, n)
        used, steps = n // size * size if order.drop_last else n, steps_of(n, order)
        taken = min(size * order.accumulate, used)
        return cls(size == n, used, taken, -(-steps // -(-used // taken)), steps)


def batch_order(n: int, order: TrainingOptions, seed: int) -> Tensor:
    """What local steps take of ``n`` examples, shuffled, [steps, examples], padded with -1 at the end.

    That is a batch, or as many batches as are accumulated.
    """
    return batch_orders([n], order, [seed])[0]


def batch_orders(sizes: Sequence[int], order: TrainingOptions, seed: Sequence[int]) -> list[Tensor]:
    """The same of each of K clients, which has so many examples and a seed of its own."""
    cuts, draw = {n: Cut.of(n, order) for n in {*sizes}}, torch.Generator()
    return [shuffled(n, cuts[n], draw.manual_seed(s)) for n, s in zip(sizes, seed, strict=True)]


def shuffled(n: int, cut: Cut, draw: torch.Generator) -> Tensor:
    """The same of one client, cut so: [steps, examples]."""
    whole, used, taken, passes, steps = cut
    if whole:  # every step sees everything: shuffling would only reorder the sum
        return torch.arange(n).expand(steps, n)
    found = []
    for _ in range(passes):
        perm = torch.randperm(n, generator=draw)
        if used < n:
            perm = perm[:used]
        if short := -used % taken:
            perm = F.pad(perm, (0, short), value=-1)
        found.append(perm.view(-1, taken))
    rows = torch.cat(found) if passes > 1 else found[0]
    return rows[:steps] if len(rows) > steps else rows


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


def drawn(sampler: Drawn, n: int, seed: int, round: int) -> Tensor:
    """Places that a sampler gives for one pass; raises ValueError where they are none of ``n`` examples.

    Global generators are seeded meanwhile, so that one that draws from them repeats.
    """
    with seeds.seeded(seed):
        given = sampler if isinstance(sampler, Sampler) else sampler(seed, round)
        given = given if isinstance(given, (Tensor, np.ndarray)) else [*given]
    if not len(given):
        raise ValueError("its sampler gives no examples")
    index = torch.as_tensor(given)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        kind = f"{str(index.dtype).removeprefix('torch.')} of {index.dim()} axes"
        raise ValueError(f"its sampler must give a list of whole numbers (places), not {kind}")
    if len(odd := index[(index < 0) | (index >= n)]):
        raise ValueError(f"its sampler gives place {int(odd[0])}, but it has places 0 to {n - 1}")
    return index.long()


def sampled_order(n: int, order: TrainingOptions, sampler: Drawn, seed: int, round: int) -> Tensor:
    """What local steps take of what ``sampler`` gives for each pass, [steps, examples], padded with -1."""
    found: list[Tensor] = []
    for k in count():
        index = drawn(sampler, n, seeds.derive(seed, "pass", k), round)
        size = min(order.batch_size or len(index), len(index))
        used = index[: len(index) // size * size] if order.drop_last else index
        found += used.split(size * order.accumulate)
        if len(found) >= order.steps if order.steps else k + 1 == order.epochs:
            break
    steps = found[: order.steps]
    widest = max(map(len, steps))
    return torch.stack([F.pad(s, (0, widest - len(s)), value=-1) for s in steps])


def fetch(data: Dataset, index: Tensor, apart: bool = False) -> Any:
    """The examples at ``index`` as one batch: rows of tables, or what a DataLoader would collate.

    ``apart``: where a dataset has its own way to collate, each example is a batch of its own.
    """
    if isinstance(data, TensorDataset):
        return tuple(_pick(t, index) for t in data.tensors)
    if isinstance(cast(Any, data), Tensor):
        return _pick(cast(Any, data), index)
    if type(data) is StackDataset and all(isinstance(d, TABLES) for d in _inside(data)):
        each = [fetch(d, index) for d in _inside(data)]
        return (
            dict(zip(data.datasets, each, strict=True)) if isinstance(data.datasets, dict) else each
        )
    if isinstance(data, Collated) and data.collate:
        collate = data.collate
        if apart:
            return Apart(collate([item]) for item in _items(data.data, index))
    else:
        collate = default_collate
    if len(index) == 0:  # a Poisson batch may be empty, but nothing cannot be collated
        return rows(fetch(data, torch.tensor([0])), slice(0))
    return collate(_items(data, index))


def uncollated(error: Exception) -> str:
    """The fix, where torch's own collate cannot put these examples together."""
    if not any(words in str(error) for words in ("equal size", "default_collate")):
        return ""
    return (
        "; such examples need a collate of their own, as a DataLoader has: Client(..., collate=fn)"
    )


TABLES = Tensor, TensorDataset, StackDataset
"""What rows can be picked from without a look at single examples."""


def _inside(data: StackDataset) -> list[Any]:
    return [*(data.datasets.values() if isinstance(data.datasets, dict) else data.datasets)]


def _items(data: Any, index: Tensor) -> list[Any]:
    data = data.data if isinstance(data, Collated) else data
    if hasattr(data, "__getitems__"):
        return [*data.__getitems__(index.tolist())]
    return [data[i] for i in index.tolist()]


def _pick(table: Tensor, index: Tensor) -> Tensor:
    # the same rows in a third of the time; indexing also crosses devices and keeps a memory format
    if table.is_contiguous() and table.device == index.device:
        with suppress(NotImplementedError):  # of uint16
            return table.index_select(0, index)
    return table[index]


def batches(data: Dataset, plan: Tensor, apart: bool = False) -> Iterator[Any]:
    """One client's batches in order. Tensors are gathered a pass at a time, not batch by batch.

    ``apart``: as ``fetch`` has it.
    """
    full = bool(plan.min() >= 0)
    counts = [plan.shape[1]] * len(plan) if full else (plan >= 0).sum(1).tolist()
    if not isinstance(data, TensorDataset):
        each = [index[:count] for index, count in zip(plan, counts, strict=True)]
        if isinstance(data, Collated) and data.num_workers:
            yield from _ahead(data, each, apart)
        else:
            yield from (fetch(data, index, apart) for index in each)
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


def in_order(data: Dataset, size: int) -> Iterator[tuple[Tensor, Any]]:
    """All examples in batches of ``size``: their places, and what they are."""
    each = [*torch.arange(len_of(data)).split(size)]
    if isinstance(data, Collated) and data.num_workers and each:
        return zip(each, _ahead(data, each, False), strict=True)
    return ((index, fetch(data, index)) for index in each)


def _ahead(data: Collated, each: list[Tensor], apart: bool) -> Iterator[Any]:
    """Batches that other processes make while training goes on.

    A batch is seeded by its number, so that whoever makes it a dataset that draws gives the same; a
    worker process may have no children, and makes each as it is needed.
    """
    jobs = Jobs(data, each, apart, torch.initial_seed())
    if current_process().daemon:
        yield from (jobs[k] for k in range(len(each)))
        return
    # a generator of its own: the loader would draw from the one that masks of dropout come from
    own = torch.Generator().manual_seed(0)
    yield from DataLoader(
        jobs, None, num_workers=data.num_workers, collate_fn=_as_it_is, generator=own
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class Jobs(Dataset[Any]):
    """A visit's batches by number, each made under a seed of its own."""

    def __init__(self, data: Dataset[Any], each: list[Tensor], apart: bool, seed: int) -> None:
        self.data, self.each, self.apart, self.seed = data, each, apart, seed

    def __len__(self) -> int:
        """How many."""
        return len(self.each)

    def __getitem__(self, k: int) -> Any:
        """One of them."""
        with seeds.seeded(seeds.derive(self.seed, "ahead", k)):
            return fetch(self.data, self.each[k], self.apart)


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
