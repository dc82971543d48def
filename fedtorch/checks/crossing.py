"""Whether a row that a layer takes, gives or is given back hangs on other examples than its own.

A way to gradients that listens to layers clips each row as its example's. So one example's numbers are
made NaN where they come in, behind every layer and in its loss, and whoever has a part of them is NaN too:
through a permutation by a product that moves nothing as yet, and behind a gate that is shut, as 0 x NaN is
NaN. What does not hold NaN, as whole numbers, is tried with zeros in examples' places.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fedtorch import seeds
from fedtorch.checks.calls import Calls
from fedtorch.checks.company import Near, far
from fedtorch.checks.held import same_draws
from fedtorch.checks.picks import BRANCHES
from fedtorch.checks.precise import another
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.layer_gradients import OWN
from fedtorch.privacy.noise.streams import stream
from fedtorch.recipe import Recipe
from fedtorch.training.module import forward, undropped
from fedtorch.training.outline import untouched
from fedtorch.tree import leaves, mapped, rows, size

MANY = 5
"""Examples that are tried together."""

MARKED = 1
"""The one that is NaN: some are before and some behind it, and it is not in the middle."""

ALL, FIRST, LAST = slice(None), slice(0, 1), slice(1, None)

EMPTIED = [({}, {1: ALL, 3: LAST}), (dict.fromkeys(range(MANY), FIRST), {1: slice(0), 3: ALL})]
"""Halves of which examples are zero, as what fills up is, at first; and of which others then: of some that
are full, and of the longest among short ones."""

CHOOSING = ("where", "masked_fill", "nan_to_num", "fmax", "fmin")
"""Calls that may leave out a number that is NaN."""

NEAR = Near(1e-3, 1e-6)
"""How far a row's length and sum may be from what they were."""


class Row(NamedTuple):
    """What was seen of all examples in one place."""

    where: str
    """Name of the layer, or what else it is."""
    seen: Tensor
    """Of each example, [n, 2], length and sum of its numbers."""


@dataclass(frozen=True)
class Noting(PrivateSteps):
    """Steps that note how long each example's gradient is."""

    met: list[Row] = field(default_factory=list)

    def factors(self, sq_norms: Tensor) -> Tensor:
        """As ever."""
        self.met.append(Row("the gradient of an example", sq_norms.cpu()[:, None].expand(-1, 2)))
        return super().factors(sq_norms)


def crosses(model: nn.Module, batch: Any, recipe: Recipe, mode: str) -> str | None:
    """Where a row of another example was met by the way ``mode``, in words; None: nowhere.

    The model is left as it was. What fails with NaN, or with zeros, is held to the rest.
    """
    few = rows(batch, torch.arange(MANY) % size(batch))
    usual = _step(model, few, recipe, mode)
    for given in (mapped(_marked, few), few):
        with suppress(Exception):
            kept = _Kept()
            if where := _first(usual, _step(model, given, recipe, mode, kept), _lost, (MARKED,)):
                return where
            break
    for k in range(min(kept.asked, BRANCHES)):
        with suppress(Exception):  # it may have asked if they are what they have to be
            found = _step(model, given, recipe, mode, _Kept(k))
            if where := _first(usual, found, _lost, (MARKED,)):
                return where
    for before, changed in EMPTIED:
        with suppress(Exception):
            both = (mapped(partial(_emptied, halves=h), few) for h in (before, before | changed))
            one, other = (_step(model, b, recipe, mode) for b in both)
            if where := _first(one, other, partial(far, near=NEAR), (*changed,)):
                return where
    return None


def loss_crosses(model: nn.Module, batch: Any, recipe: Recipe) -> bool:
    """Whether a loss of outputs makes something of other examples than each its own, likewise."""
    x, y = rows(batch, torch.arange(MANY) % size(batch))
    with undropped(model), untouched(model), seeds.seeded(0), torch.no_grad():
        output = forward(model, x)
    found = [_slopes(another(recipe), output, y)]
    with suppress(Exception), _Kept():  # where it does not take NaN, other trials have to tell
        found.append(_slopes(another(recipe), mapped(_marked, output), y))
    return _first(found[0], found[-1], _lost, (MARKED,)) is not None


def _slopes(recipe: Recipe, output: Any, y: Any) -> list[Row]:
    """A loss of outputs, and its gradient by them."""

    def given(t: Tensor) -> Tensor:
        own = t.is_floating_point() and t.dim() and len(t) == MANY
        return t.detach().requires_grad_(bool(own))

    part = mapped(given, output)
    with seeds.seeded(0), same_draws(MANY):
        values = recipe.loss(part, y)
        values.sum().backward()
    grads = [t.grad for t in leaves(part) if t.grad is not None]
    return [Row("the loss", _digest(t)) for t in (values, *grads)]


def _first(
    usual: Sequence[Row],
    found: Sequence[Row],
    other: Callable[[Tensor, Tensor], bool],
    changed: Sequence[int],
) -> str | None:
    """The first place in which examples that were not ``changed`` have other numbers."""
    rest = [k for k in range(MANY) if k not in changed]
    for one, two in zip(usual, found, strict=False):
        if one.where != two.where:  # another way through the model: ``picks`` has tried it
            return None
        if other(one.seen[rest], two.seen[rest]):
            return one.where
    return None


def _lost(usual: Tensor, found: Tensor) -> bool:
    return bool((usual.isfinite() & ~found.isfinite()).any())


def _emptied(t: Tensor, halves: Mapping[int, slice]) -> Tensor:
    """Zeros in some examples, or in halves of them."""
    if not t.dim() or len(t) != MANY:
        return t
    own = t.reshape(MANY, -1).clone()
    for k, which in halves.items():
        for half in own[k].tensor_split(2)[which]:
            half.zero_()
    return own.view(t.shape)


def _step(
    model: nn.Module, batch: Any, recipe: Recipe, mode: str, kept: "_Kept | None" = None
) -> list[Row]:
    """What is met in one step, in order; with ``kept`` one example's is NaN behind layers."""
    from fedtorch.privacy.one_client import private_gradients  # few visits are private

    met: list[Row] = []
    own, heard = another(recipe), _Heard(met, kept is not None)
    steps = Noting(1.0, 0.0, 1.0, [stream("aes", 0, "probe")], mode, met=met)
    weight = torch.ones(MANY)
    weight = _marked(weight) if kept else weight

    def losses(model: nn.Module, batch: Any) -> Tensor:
        heard.on = size(batch) == MANY
        with kept.asking() if kept else nullcontext():
            values = own.losses(model, batch)
        if not heard.on or not values.dim():
            return values
        met.append(Row("the loss", _digest(values)))
        return values * weight.to(values)

    with (
        untouched(model), undropped(model), seeds.seeded(0), same_draws(MANY),
        kept or nullcontext(),
        private_gradients(model, losses, steps) as gradients, heard.listening(model),
    ):  # fmt: skip
        gradients.backward(batch)
    return met


def _marked(t: Tensor) -> Tensor:
    """NaN in the place of one example's numbers, if they are of its own."""
    if not t.is_floating_point() or not t.dim() or len(t) % MANY:
        return t
    mark = torch.zeros(MANY, len(t) // MANY, dtype=t.dtype, device=t.device)
    mark[MARKED] = torch.nan
    return t + mark.view(-1, *[1] * (t.dim() - 1))


def _digest(t: Tensor) -> Tensor:
    own = t.detach().reshape(MANY, -1).double()
    return torch.stack([own.norm(dim=1), own.sum(1)], 1).cpu()


class _Heard:
    """What layers with trained parameters take, give and are given back; whether they are marked."""

    def __init__(self, met: list[Row], mark: bool) -> None:
        self.met, self.mark, self.on = met, mark, False

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """But for layers that are run by hand, seen by what follows, and what makes weights of others."""
        handles = [
            m.register_forward_hook(partial(self._forward, f"layer {name or 'model'}"))
            for name, m in model.named_modules()
            if type(m) not in (*OWN, ParametrizationList)
            and any(p.requires_grad for p in m.parameters(recurse=False))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, name: str, layer: nn.Module, args: Any, out: Any) -> Any:
        if not self.on:
            return None
        for t in leaves(args):
            self._note(name, t)
        found = mapped(partial(self._given, name), out)
        return found if self.mark else None

    def _given(self, name: str, out: Tensor) -> Tensor:
        self._note(name, out)
        out = _marked(out) if self.mark else out
        if out.requires_grad:
            out.register_hook(partial(self._note, name))
        return out

    def _note(self, name: str, t: Tensor) -> None:
        if t.dim() and len(t) and len(t) % MANY == 0:
            self.met.append(Row(name, _digest(t)))


class _Kept(Calls):
    """Calls that choose between numbers give NaN wherever one of them is."""

    def __init__(self, other: int | None = None) -> None:
        """``other``: which question gets the other answer: if something is true of numbers, or how many.

        A count is one more then, as of places by which rows are moved.
        """
        super().__init__()
        self.asked, self.other, self.on = 0, other, False

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What is asked meanwhile is asked by the model or its loss."""
        self.on = True
        yield
        self.on = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Any call."""
        name = func._schema.name.rpartition("::")[2]
        chooses = name.rstrip("_") in CHOOSING
        own = [
            t for t in leaves((args, kwargs or {})) if chooses and t.dim() and t.is_floating_point()
        ]
        lost = [torch.where(t.isnan(), torch.nan, 0.0) for t in own]
        found = func(*args, **(kwargs or {}))
        if self.on and name == "_local_scalar_dense" and isinstance(found, int):
            self.asked += 1
            other = self.asked - 1 == self.other
            return found != other if isinstance(found, bool) else found + other
        for mark in lost:
            found = found.add_(mark) if name.endswith("_") else found + mark.to(found)
        return found
