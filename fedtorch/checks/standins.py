"""Made-up examples in place of a client's own, for what is tried before private training.

Whatever is decided by looking at an example, or said of it, would tell of that example: nothing here
depends on a number in the data. Only shapes and types are the data's own.
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds
from fedtorch.checks.outputs import CLASSES
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import Collated, fetch, len_of, uncollated
from fedtorch.training.losses import cross_entropy
from fedtorch.training.module import forward, to, training
from fedtorch.training.outline import untouched
from fedtorch.training.own_update import VisitBatches, own_update
from fedtorch.tree import parts, rebuilt
from fedtorch.types import ConfigError

COUNT = 16
"""Made-up examples of a dataset."""

BOUND = 10.0
"""Where made-up examples mean nothing to a model, those of the data, no larger than this."""


class Shown(Client):
    """A client as trials see it: as large as it is, with data that is made up."""

    def __init__(self, client: Client, data: Dataset) -> None:
        """``data`` in place of the client's own."""
        super().__init__(client.id, data, sampler=client.sampler)
        self.size = len(client)

    def __len__(self) -> int:
        """The client's own number of examples."""
        return self.size


def shown(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> Sequence[Client]:
    """The clients, or stand-ins for them under a plan; raises ConfigError where data give no pairs."""
    if not recipe.privacy.claims:
        return clients
    standins = _all(clients, made)
    classes = _class_count(model, standins[0], recipe)
    if classes > 2:  # a loss may look at some of them alone
        many = _all(clients, partial(made, classes=classes))
        if _takes_examples(model, many[0], recipe):
            return many
    return standins if _takes_examples(model, standins[0], recipe) else _all(clients, limited)


def _all(clients: Sequence[Client], make: Any) -> list[Shown]:
    known: dict[object, Dataset] = {}
    found = []
    for c in clients:
        try:
            found.append(Shown(c, _once(known, c.data, make)))
        except Exception as e:  # the owner's own code gives examples, whatever they are
            raise ConfigError(
                f"client {c.id}: taking the first examples of its dataset failed ({type(e).__name__}: {e})"
                f"{uncollated(e)}"
            ) from e
    return found


def made(data: Dataset, classes: int = 2) -> Dataset:
    """Examples of the shapes and types of the first: numbers in (0, 1), and integers 0 or 1.

    Targets are numbers of ``classes``.
    """
    if isinstance(data, Collated):
        return Collated(_unlike(data.data, classes), data.collate)
    if isinstance(data, TensorDataset):
        tables = [
            _drawn(t[:1].expand(COUNT, *t.shape[1:]), k == 0, classes)
            for k, t in enumerate(data.tensors)
        ]
        return TensorDataset(*(_laid(new, t) for new, t in zip(tables, data.tensors, strict=True)))
    fetch(data, torch.tensor([0, len_of(data) - 1]))  # fails where they are of unequal size
    return Items([_like(data[0], k, classes) for k in range(COUNT)])


def _unlike(data: Dataset, classes: int) -> Dataset:
    """The same of the shapes of several: what a collate makes of unequal ones has to be tried."""
    n = len_of(data)
    places = torch.linspace(0, n - 1, min(n, COUNT)).long().tolist()
    return Items([_like(data[places[k % len(places)]], k, classes) for k in range(COUNT)])


def labels(classes: int) -> list[int]:
    """Of the made-up examples: each class twice, in pairs by turns, of many those that lie apart."""
    if classes <= 2:
        return [k % 2 for k in range(COUNT)]
    # the first are looked at most, and class 0 is what some losses leave out
    first = [1, classes - 1, 0]
    apart = [round(k * (classes - 1) / (COUNT // 2 - 1)) for k in range(COUNT // 2)]
    kinds = [*dict.fromkeys([*first, *apart, *range(classes)])][: COUNT // 2]
    kinds = list(islice(cycle(kinds), COUNT // 2))
    pairs = zip(kinds[::2], kinds[1::2], strict=True)
    return [k for pair in pairs for k in (*pair, *pair)]


def limited(data: Dataset) -> Dataset:
    """The first examples, with nothing in them that is not finite or larger than ``BOUND``."""
    n = min(COUNT, len_of(data))
    if isinstance(data, Collated):
        return Collated(limited(data.data), data.collate)
    if isinstance(data, TensorDataset):
        return TensorDataset(*(_bounded(t[:n]) for t in data.tensors))
    return Items([_mapped(data[k], _bounded) for k in range(n)])


class Items(Dataset):
    """A list as a dataset."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        """How many."""
        return len(self.items)

    def __getitem__(self, k: int) -> Any:
        """One of them."""
        return self.items[k]


def _once(known: dict[object, Dataset], data: Dataset, make: Any) -> Dataset:
    # thousands of clients have one kind of table
    key: object = id(data)
    if isinstance(data, TensorDataset) and make is not limited:
        key = tuple((t.shape[1:], t.dtype, t.device, t.is_contiguous()) for t in data.tensors)
    if key not in known:
        known[key] = make(data)
    return known[key]


def _class_count(model: nn.Module, client: Client, recipe: Recipe) -> int:
    """As many classes as the model has outputs on axis 1 for targets that are whole numbers; else 0.

    A loss that is not torch's or ours may have them on another axis: then as many as fit on any.
    """
    try:
        with untouched(model), torch.no_grad(), seeds.seeded(0):
            x, y = to(fetch(client.data, torch.arange(2)), next(model.parameters()).device)
            output = forward(training(model), x)
            whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
            if not (whole and output.is_floating_point() and output.dim() == y.dim() + 1):
                return 0
            known = recipe.loss is cross_entropy or isinstance(recipe.loss, CLASSES)
            counts = output.shape[1:2] if known else output.shape[1:]
            return int(min(*counts, torch.iinfo(y.dtype).max))
    except Exception:
        return 0


def _takes_examples(model: nn.Module, client: Client, recipe: Recipe) -> bool:
    """Whether model and loss take made-up examples at all, whatever their targets."""
    try:
        with untouched(model), torch.no_grad(), seeds.seeded(0):
            if recipe.local is not None:
                place = torch.arange(COUNT)[None]
                visit = VisitBatches(client.data, place, next(model.parameters()).device)
                own_update(recipe.local, training(model), visit, recipe.learning_rate)
                return True
            batch = fetch(client.data, torch.arange(COUNT))
            recipe.tried(training(model), to(batch, next(model.parameters()).device))
    except Exception:
        return False
    return True


def _drawn(
    like: Tensor, inputs: bool, classes: int = 2, draw: torch.Generator | None = None
) -> Tensor:
    draw = draw or seeds.generator(0, "stand-ins", *like.shape, inputs)
    if like.is_complex() or (inputs and like.is_floating_point()):
        # not quite 0, of which a model may take the logarithm
        uniform = torch.rand(like.shape, generator=draw, dtype=torch.float64).clamp(min=1e-3)
        return uniform.to(like.device, like.dtype)
    if not inputs and like.dim() == 1:
        return torch.tensor(labels(classes)).to(like.device, like.dtype)
    numbers = torch.randint(0, 2 if inputs else max(2, classes), like.shape, generator=draw)
    return numbers.to(like.device, like.dtype)


def _laid(new: Tensor, like: Tensor) -> Tensor:
    """In another order in memory than row by row, where the data is."""
    if like.is_contiguous() or like.dim() < 2:
        return new
    return new.transpose(0, -1).contiguous().transpose(0, -1)


def _like(item: Any, k: int, classes: int = 2) -> Any:
    """An example like this one, the k-th that is made up."""
    draw = seeds.generator(0, "stand-in", k)

    def target(v: Tensor) -> Tensor:
        return _drawn(v, False, classes, draw) if v.dim() else v * 0 + labels(classes)[k]

    def either(v: Tensor) -> Tensor:  # a number for a whole example may be its class
        whole = not (v.dim() or v.is_floating_point() or v.is_complex())
        return target(v) if whole else _drawn(v, True, draw=draw)

    if not isinstance(item, (tuple, list)):
        return _mapped(item, either)
    x, *others = item
    return rebuilt(
        item,
        [_mapped(x, lambda v: _drawn(v, True, draw=draw)), *(_mapped(v, target) for v in others)],
    )


def _mapped(value: Any, fn: Any) -> Any:
    """``fn`` of all numbers in an example, whatever they are in; words stay as they are."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return fn(torch.from_numpy(value)).numpy()
    if isinstance(value, (bool, int, float, np.number)):
        return type(value)(fn(torch.tensor(value)).item())
    inside = parts(value)
    return value if inside is None else rebuilt(value, [_mapped(v, fn) for v in inside])


def _bounded(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.nan_to_num(0.0, BOUND, -BOUND).clamp(-BOUND, BOUND)
