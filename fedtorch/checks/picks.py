"""Whether a model picks rows by what is in them: their places then say nothing of whose they are.

Without padding, sorted by length or sent to an expert, as many rows as ever may belong to others. Made-up
examples have no padding, so that trials would find each row where it should be.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fedtorch import seeds
from fedtorch.checks.calls import Calls
from fedtorch.recipe import Recipe
from fedtorch.tree import leaves, place, rows, size

PICKS = ("index_select", "take", "masked_select", "embedding")
"""Calls that take rows of their first argument, at places that another one says."""

PUTS = ("index_copy", "index_add", "index_reduce", "masked_scatter")
"""Calls that put rows of one argument into places that another one says."""

ALONG = ("scatter", "scatter_add", "scatter_reduce")
"""Calls that put numbers along an axis: rows stay where that is not the first."""

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
"""Calls that add up along an axis; where that is the examples', one that is made of them may move rows."""

OUT = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Calls that give numbers to Python of which the dispatcher hears nothing."""


BRANCHES = 8
"""Questions about examples of which the other answer is tried, each by itself."""


def picks(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """The call by which rows are picked, or None; ``batch`` is of some, of which two are tried too.

    Where the model asks if something is true of examples, what it does if it were not is tried as well.
    """
    both = rows(batch, slice(0, 2)), batch
    seen = [_watched(model, some, recipe) for some in both]
    why = _found(*seen)
    for k in range(min(seen[1].asked, BRANCHES)):
        why = why or _found(*(_watched(model, some, recipe, k) for some in both))
    return why


def _found(few: "_Watch", many: "_Watch") -> str | None:
    each = "numbers taken to Python for each" if many.read > few.read else None
    met = zip(few.added, many.added, strict=False)
    product = "product" if any(a * many.many == b * few.many and a != b for a, b in met) else None
    return many.picked or few.picked or each or product


def _watched(model: nn.Module, batch: Any, recipe: Recipe, other: int | None = None) -> "_Watch":
    watch = _Watch(batch, other)
    # it may have asked if they are what they have to be, and ends there
    failing = () if other is None else (Exception,)
    with suppress(*failing), torch.no_grad(), seeds.seeded(0), watch, _Read(watch):
        recipe.tried(model, batch)
    return watch


class _Watch(Calls):
    """Follows what is made of examples, or drawn, by the memory where it lies."""

    def __init__(self, batch: Any, other: int | None = None) -> None:
        """``other``: which question gets the other answer."""
        super().__init__()
        self.picked: str | None = None
        self.read, self.asked, self.other = 0, 0, other
        self.many, self.added = size(batch), list[int]()
        """How many examples, and how many numbers each product of what was made of them adds up."""
        self.places: dict[int, StorageWeakRef] = {}
        """Where all lies that was made of examples, until it is let go: then the memory is another's."""
        self._mark(leaves(batch))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Any call; of those that pick or put it is asked what they go by."""
        given = leaves((args, kwargs or {}))
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        if self._picks(name, args):
            self.picked = self.picked or name
        if name in PRODUCTS and all(map(self.made, args[-2:])):
            self.added.append(args[-2].shape[-1])
        found = func(*args, **(kwargs or {}))
        if name == "_local_scalar_dense" and self.made(args[0]):
            self.read += 1
            if isinstance(found, bool):
                self.asked += 1
                return found != (self.asked - 1 == self.other)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn or any(map(self.made, given)):
            self._mark(leaves(found))
        return found

    def made(self, t: Any) -> bool:
        """Whether it was made of them."""
        if not isinstance(t, Tensor):
            return False
        return t.layout != torch.strided or self._lies(place(t))

    def _lies(self, at: int) -> bool:
        """Whether something lies there that was made of them, and that somebody still holds."""
        return at in self.places and not self.places[at].expired()

    def _mark(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if t.numel() and t.layout == torch.strided and not self._lies(place(t)):
                self.places[place(t)] = StorageWeakRef(t.untyped_storage())

    def _picks(self, name: str, args: Sequence[Any]) -> bool:
        if name in ("index", "index_put"):
            moved, at = args[0 if name == "index" else 2], args[1]
            # places in a row that comes by its own number are that row's alone
            own = isinstance(at[0], Tensor) and not self.made(at[0])
            return self.made(moved) and not own and any(map(self.made, at))
        if name in ("gather", *ALONG) and args[1] % max(args[0].dim(), 1):
            return False
        if name in (*PUTS, *ALONG):
            return sum(map(self.made, leaves(args[1:]))) > 1
        return name in (*PICKS, "gather") and all(map(self.made, leaves(args)))


class _Read(TorchFunctionMode):
    """Counts numbers that go to Python past the dispatcher."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call of torch's."""
        if func in OUT and self.watch.made(args[0]):
            self.watch.read += args[0].numel()
        return func(*args, **(kwargs or {}))
