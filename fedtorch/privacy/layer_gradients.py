"""Private gradients of a model whose layers are known: what each took, and what autograd brings back to it.

No weight is in autograd's graph, so that the gradients of a batch's weights are never formed. Those of its
examples follow from inputs and outputs, layer by layer (``formulas``), or are not written out (``ghost``).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedtorch import seeds
from fedtorch.privacy import attention, recurrent
from fedtorch.privacy.formulas import CONVOLUTIONAL, GRADIENTS, Grads, unlike, windows
from fedtorch.privacy.ghost import Into, Looked, Product, Seen, pays
from fedtorch.privacy.gradients import PrivateSteps, in_parts, rounded
from fedtorch.privacy.own_parameters import Meetings, own_parameters, uneven
from fedtorch.training.step import Step
from fedtorch.tree import SHORT, exact_sq_norms, rows, size
from fedtorch.types import Params

FLATTENED = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding)
"""Layers of which rows of one example may be taken together again."""


class LayerGradients:
    """One client's, by the formulas of the model's layers.

    Raises NotImplementedError for a layer without one. What it cannot see, as a weight that is used outside
    its layer, is left out: whoever takes it holds it to the gradients of examples one by one.
    """

    def __init__(self, model: nn.Module, losses: Step) -> None:
        self.model, self.losses = model, losses
        self.params: Params = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.layers, self.own = known(model), own_parameters(model)
        self.trained = {m: trained(m, self.params) for m in self.layers}
        self.tables = {m for m in self.layers if isinstance(m, nn.Embedding)}
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def listening(self, steps: PrivateSteps) -> Iterator["LayerGradients"]:
        """To the model's layers, in the ``steps`` of one visit; afterwards the model is as it was."""
        self.steps = steps
        self.shared: set[nn.Module] | None = None
        """Tables in which one row of places is looked up for all examples."""
        self.numbers = sum(p.numel() for p in self.params.values())
        """Written out for each example: all there are at first, and then as many as last time."""
        handles: list[Any] = [
            m.register_forward_pre_hook(self._each, with_kwargs=True) for m in self.tables
        ]
        by_hand = {m: OWN[type(m)][0] for m in self.layers if type(m) in OWN}
        for m in self.layers.keys() - by_hand.keys():
            # before those of others, which may change what comes of it
            handles.append(m.register_forward_hook(self._forward, with_kwargs=True, prepend=True))
        try:
            for m, make in by_hand.items():
                m.forward = make(m, self.anchor, partial(self._heard, m))
            yield self
        finally:
            for m in by_hand:
                vars(m).pop("forward", None)
            for handle in handles:
                handle.remove()

    def backward(self, batch: Any) -> Tensor:
        """The gradient in ``p.grad``, and the mean loss."""
        return in_parts(self.params, self.steps, batch, self.numbers, self._part)

    def _part(self, batch: Any, total: Params) -> Tensor:
        self.many, self.calls = size(batch), list[Call | Grads]()
        if self.shared is None:
            one, two = (self._lengths(batch, n) for n in (1, 2))
            self.shared = {m for m, n in one.items() if n == two.get(m)}
        meetings = Meetings(self.model, self.own, self.params, self.many)
        with hidden(self.params), meetings.listening():
            values = self.losses(self.model, batch)
            if values.requires_grad:  # it may have asked no layer
                values.sum().backward()
        self.calls += meetings.gradients()
        seen, values = apart(self.calls), values.detach()
        self.numbers = sum(s.numbers for s in seen if isinstance(s, Written))
        if seen:
            sq = torch.stack([s.sq_norms() for s in seen]).sum(0)
            weight = rounded(self.steps.factors(sq), values)
            names = {id(p): k for k, p in self.params.items()}
            for s in seen:
                s.add(weight, lambda p: total.get(names.get(id(p), "")))
        return values

    def _forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = taken(args, kwargs).detach()
        if not x.dim() or len(x) % self.many:
            raise NotImplementedError(f"layer {self.layers[layer]} {uneven(x.shape, self.many)}")
        # of a view that is changed in place no hook would be told, but what it is a view of is
        made = out if out._base is None else out._base
        if not out.requires_grad:
            out = made = Awaited.apply(out.clone() if out._is_view() else out, self.anchor)
        elif made.numel() != out.numel() or not (made.is_contiguous() and out.is_contiguous()):
            out = made = out.clone() if out._is_view() else out
        told = partial(self._backward, layer, x, x._version, out.shape)
        cast(Node, made.grad_fn).register_prehook(told)
        return out

    def _backward(
        self, layer: nn.Module, x: Tensor, version: int, shape: torch.Size, found: Any
    ) -> None:
        if x._version != version:
            raise NotImplementedError(f"what layer {self.layers[layer]} took is changed in place")
        call = Call(layer, x, found[0].detach().reshape(shape), self.many, self.trained[layer])
        self.calls.append(call if call.form else call.written())

    def _heard(self, layer: nn.Module, made: dict[str, Callable[[], Tensor]]) -> None:
        """What a layer that is run by hand tells of the gradients of a call."""
        own = self.trained[layer]
        found = {p: made[k]() for k, p in own.items() if k in made}
        for p, g in found.items():
            if len(g) % self.many:
                name, sees = self.layers[layer], uneven(g.shape[:1], self.many)
                raise NotImplementedError(f"layer {name} {sees}")
            found[p] = g.unflatten(0, (self.many, -1)).sum(1) if len(g) != self.many else g
        self.calls.append(found)

    def _each(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """One row looked up for all examples, as positions are in transformers, becomes one for each."""
        index = taken(args, kwargs)
        if index.dim() == 1 and layer in (self.shared or ()):
            index = index[None]
        elif index.dim() < 2 or len(index) > 1:
            return None
        if not torch.is_grad_enabled():
            return None
        return (index.expand(self.many, *index.shape[1:]),), {}

    def _lengths(self, batch: Any, many: int) -> dict[nn.Module, int]:
        """How many rows each table is asked for by a single axis of places, of so many examples."""
        found: dict[nn.Module, int] = {}

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = taken(args, kwargs)
            found[layer] = index.numel() if index.dim() == 1 else -many
            if len(found) == len(self.tables):
                raise Enough

        hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in self.tables]
        try:
            if hooks:
                with torch.no_grad(), seeds.kept():
                    self.losses(self.model, rows(batch, torch.zeros(many, dtype=torch.int64)))
        except Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found


class Enough(Exception):
    """All that was to be looked at was seen."""


class Awaited(torch.autograd.Function):
    """An output that nothing before it asks a gradient for, and that shall have one all the same."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor) -> Tensor:
        """The output itself; ``anchor`` asks for a gradient in its place."""
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[None, None]:
        """Nothing goes further back."""
        return None, None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: what it took, and what came back to what it gave."""

    layer: nn.Module
    x: Tensor
    d: Tensor
    many: int
    """Examples, each with as many rows as any other."""
    trained: dict[str, Tensor]
    """The layer's parameters of which gradients are wanted."""

    @property
    def form(self) -> "type[Product] | type[Looked] | None":
        """By which the gradients need not be written out, if there is one that is less work."""
        m: Any = self.layer
        if isinstance(m, nn.Embedding):
            return Looked
        wide = isinstance(m, nn.Linear) or (type(m) in CONVOLUTIONAL and m.groups == 1)
        if not wide or "weight" not in self.trained:
            return None
        outer = m.weight.shape[0]
        rows = self.d.numel() // (outer * self.many)
        return Product if pays(rows, m.weight.numel() // outer, outer) else None

    def seen(self) -> Seen:
        """In that form, or written out."""
        m, x, d, n = self.layer, self.x, self.d, self.many
        if self.form is None:
            return Written(self.written())
        if self.form is Looked:
            return Looked(m, x.reshape(n, -1), d)
        if not isinstance(m, nn.Linear):
            x, d = windows(m, x), d.flatten(2).mT
        several = d.numel() > n * d.shape[-1]
        x, d = (t.reshape(n, -1, t.shape[-1]) if several else t.reshape(n, -1) for t in (x, d))
        return Product(m, x, d)

    def written(self) -> Grads:
        """By the layer's formula."""
        x, d = self.x, self.d
        if len(x) != self.many and type(self.layer) in FLATTENED:
            x, d = (t.unflatten(0, (self.many, -1)) for t in (x, d))
        found = GRADIENTS[type(self.layer)](self.layer, x, d, self.trained)
        if len(x) != self.many:
            found = {k: g.unflatten(0, (self.many, -1)).sum(1) for k, g in found.items()}
        return {self.trained[k]: g for k, g in found.items()}


class Written:
    """Gradients of examples as they are, of the parameters that have any."""

    def __init__(self, grads: Grads) -> None:
        """By parameter."""
        self.numbers = sum(p.numel() for p in grads)
        rows = [side_by_side(p, g) for p, g in grads.items()]
        self.runs = [([axes], g) for axes, g in rows if g.shape[1] >= SHORT]
        """Parameters and their gradients [n, numbers] side by side, as each would cost its calls."""
        if small := [(axes, g) for axes, g in rows if g.shape[1] < SHORT]:
            self.runs.append(([axes for axes, _ in small], torch.cat([g for _, g in small], 1)))

    def sq_norms(self) -> Tensor:
        """Of all of them together."""
        return exact_sq_norms(*(side for _, side in self.runs))

    def add(self, factors: Tensor, into: Into) -> None:
        """One product for each run."""
        used = None if bool(factors.all()) else factors > 0  # 0 x NaN is NaN
        for run, side in self.runs:
            found = factors @ side if used is None else factors[used] @ side[used]
            for (p, axes), part in zip(run, found.split([p.numel() for p, _ in run]), strict=True):
                if (total := into(p)) is not None:
                    own = total.permute(axes)
                    own += part.view(own.shape)


def side_by_side(p: Tensor, g: Tensor) -> tuple[tuple[Tensor, list[int]], Tensor]:
    """A parameter with its axes in the order in which its gradients [n, ...] lie, and those, [n, numbers].

    In another order they would be copied.
    """
    steps = g.stride()[1:]
    axes = sorted(range(p.dim()), key=lambda k: -steps[k])
    return (p, axes), g.permute(0, *(k + 1 for k in axes)).reshape(len(g), p.numel())


def apart(calls: Sequence[Call | Grads]) -> list[Seen]:
    """What was seen; the gradients of a parameter that was met more than once are added up."""
    met = [[*c.trained.values()] if isinstance(c, Call) else [*c] for c in calls]
    times = Counter(p for some in met for p in some)
    seen: list[Seen] = []
    both: Grads = {}
    for call, some in zip(calls, met, strict=True):
        if isinstance(call, Call) and all(times[p] == 1 for p in some):
            seen.append(call.seen())
            continue
        for p, g in (call.written() if isinstance(call, Call) else call).items():
            both[p] = both[p] + g if p in both else g
    return [*seen, Written(both)] if both else seen


OWN: dict[type[nn.Module], tuple[Callable[..., Any], Callable[[nn.Module], str | None]]] = {
    nn.LSTM: (recurrent.recurrent, recurrent.odd),
    nn.GRU: (recurrent.recurrent, recurrent.odd),
    nn.RNN: (recurrent.recurrent, recurrent.odd),
    nn.MultiheadAttention: (attention.attention, attention.odd),
}
"""Layers that are run by hand: their forward, and why one is not."""


def known(model: nn.Module) -> dict[nn.Module, str]:
    """Layers with parameters to train, and their names; raises NotImplementedError for one not known."""
    found: dict[nn.Module, str] = {}
    by_themselves = own_parameters(model)
    for name, m in model.named_modules():
        own = [k for k, p in m.named_parameters(recurse=False) if p.requires_grad]
        if not own or m in by_themselves:
            continue
        odd = OWN[type(m)][1] if type(m) in OWN else unlike
        if why := odd(m):
            raise NotImplementedError(f"parameter {name}{'.' if name else ''}{own[0]}: {why}")
        if type(m) in OWN and "forward" in vars(m):  # which that by hand would take off
            raise NotImplementedError(f"layer {name} ({m._get_name()}) has a forward of its own")
        found[m] = name or "model"
    return found


def trained(layer: nn.Module, params: Params) -> dict[str, Tensor]:
    """Those of a layer's parameters that are among ``params``."""
    asked = {id(p) for p in params.values()}
    return {k: p for k, p in layer.named_parameters(recurse=False) if id(p) in asked}


def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is given, by place or by name."""
    given: Tensor = args[0] if args else kwargs["input"]
    return given


@contextmanager
def hidden(params: Params) -> Iterator[None]:
    """Autograd does not see that these ask for gradients."""
    for p in params.values():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params.values():
            p.requires_grad_(True)
