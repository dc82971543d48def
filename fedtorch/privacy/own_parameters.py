"""Parameters that modules use themselves, as norms of one's own, layer scales, tokens and positions are.

Where one meets what is made of examples, each example is given its own, by torch.vmap over that one call.
Until then, as while it is reshaped, it is one for all. What comes back to the examples' own goes back
through that too, for each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch.privacy.formulas import GRADIENTS, Grads
from fedtorch.tree import leaves, mapped, place
from fedtorch.types import Params

SPREADING = ("expand", "expand_as", "broadcast_to", "repeat", "tile")
"""Calls that make one row into a row for each example."""

IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imatmul__")
"""Operators that change what stands on their left."""

LISTS = (nn.ParameterList, nn.ParameterDict)
"""Modules of torch's that hold parameters for others."""

Owned = Mapping[nn.Module, Params]
"""Modules, and what of their trained parameters they use themselves, by name."""


def own_parameters(model: nn.Module) -> Owned:
    """Trained ones of modules that are none of torch's, and of its lists of parameters."""
    own: dict[nn.Module, Params] = {}
    for m in model.modules():
        of_torch = type(m).__module__.startswith("torch.nn.") or type(m) in GRADIENTS
        if not of_torch or type(m) in LISTS:
            own[m] = {k: p for k, p in m.named_parameters(recurse=False) if p.requires_grad}
    return {m: some for m, some in own.items() if some}


class Used(Tensor):
    """A parameter, or what was made of parameters alone; what it is called with is told to ``told``."""

    told: "Meetings"
    made: Tensor
    """The same to autograd, of which nobody is told."""
    sources: Params
    """The parameters it was made of, by name."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any call of torch's that is given such a tensor."""
        call = Call(function, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return call.used[0].told.called(call)


@dataclass(frozen=True)
class Call:
    """One call of a function of torch's."""

    function: Callable[..., Any]
    given: Any
    """Positional and named arguments."""

    @property
    def used(self) -> list[Used]:
        """Those of the arguments that are parameters."""
        return [t for t in leaves(self.given) if isinstance(t, Used)]

    @property
    def sources(self) -> Params:
        """All parameters that it has to do with."""
        return {k: v for t in self.used for k, v in t.sources.items()}

    @property
    def name(self) -> str:
        """As users know it."""
        return str(getattr(self.function, "__name__", self.function)).strip("_")

    @property
    def in_place(self) -> bool:
        """Whether it changes the first of its arguments, which it gives back."""
        name = self.function.__name__
        return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))

    def on(
        self, change: Callable[[Tensor], Tensor], function: Callable[..., Any] | None = None
    ) -> Any:
        """Its result, or another function's, with each tensor among its arguments changed."""
        args, kwargs = mapped(change, self.given)
        return (function or self.function)(*args, **kwargs)


class Meetings:
    """Where parameters meet examples in one forward: what each example was given, and its gradient.

    Raises NotImplementedError where an example's part cannot be told.
    """

    def __init__(self, model: nn.Module, owned: Owned, params: Params, many: int) -> None:
        """For a batch of ``many`` examples; ``params`` are all that are trained, by name."""
        self.many, self.met = many, list[tuple[Used, Tensor]]()
        names = {p: k for k, p in params.items()} if owned else {}
        self.params = {names[p]: p for some in owned.values() for p in some.values()}
        self.sources = {k: p.detach().requires_grad_() for k, p in self.params.items()}
        self.trained, self.fixed = {place(p) for p in names}, dict[int, Tensor]()
        if owned:
            still = [*model.buffers(), *(p for p in model.parameters() if p not in names)]
            # held here: what a forward takes out of the model would leave its memory to examples
            self.fixed = {place(t): t for t in still}
        used = {self.params[k]: self._used(v, {k: v}) for k, v in self.sources.items()}
        self.owned = {m: {k: used[p] for k, p in some.items()} for m, some in owned.items()}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """To what modules do with their parameters."""
        for m, own in self.owned.items():
            vars(m).update(own)  # before what the module keeps under those names
        try:
            yield
        finally:
            for m, own in self.owned.items():
                for name in own:
                    vars(m).pop(name, None)
            self.owned = {}

    def gradients(self) -> list[Grads]:
        """Those of all meetings."""
        for name, p in self.sources.items():
            if p.grad is not None:
                raise NotImplementedError(
                    f"parameter {name} is used where torch tells nobody, as in an autograd.Function"
                )
        met, self.met = self.met, []  # each of them holds this
        return [self._back(used, each.grad) for used, each in met if each.grad is not None]

    def called(self, call: Call) -> Any:
        """The result of a call with such parameters."""
        if not torch.is_grad_enabled():
            return call.on(_made)
        try:
            if any(self._of_examples(t) for t in leaves(call.given)):
                return self._meet(call)
            made = call.on(_made)
            if call.name in SPREADING:
                return self._spread(made, call)
            return mapped(lambda t: self._used(t, call.sources), made)
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            name, why = next(iter(call.sources)), str(e).strip().partition("\n")[0]
            raise NotImplementedError(
                f"parameter {name} is used in {call.name}, where no example's part can be told: {why}"
            ) from e

    def _of_examples(self, t: Tensor) -> bool:
        """Whether it may be another for each example: it is no number, and not the model's."""
        if isinstance(t, Used) or not t.dim():
            return False
        if place(t) in self.trained:
            raise ValueError("it meets a parameter of another layer")
        return place(t) not in self.fixed

    def _meet(self, call: Call) -> Any:
        """Each example with its own."""
        given = [t for t in leaves(call.given) if isinstance(t, Used) or self._of_examples(t)]
        own = [self._each(t) if isinstance(t, Used) else self._rows(t) for t in given]

        def of_one(*own: Tensor) -> Any:
            one = {id(t): v for t, v in zip(given, own, strict=True)}
            return call.on(lambda t: one.get(id(t), t), FOR_ONE.get(call.function))

        made = torch.vmap(of_one)(*own)
        if call.in_place:
            return leaves(call.given)[0]
        return mapped(lambda t: t.flatten(0, 1), made)

    def _spread(self, made: Tensor, call: Call) -> Tensor:
        """The first axis, which one row or none had before, is that of examples."""
        before, sources = call.used[0], call.sources
        if made.dim() == before.dim() and len(made) == len(before):
            return self._used(made, sources)
        rows = len(self._rows(made)[0])
        return self._each(cast(Used, self._used(made[:rows], sources))).flatten(0, 1)

    def _rows(self, t: Tensor) -> Tensor:
        """Each example's, [n, rows, ...]."""
        if len(t) % self.many:
            raise ValueError(f"it {uneven(t.shape, self.many)}")
        rows: Tensor = t.unflatten(0, (self.many, -1))
        return rows

    def _each(self, used: Used) -> Tensor:
        each = used.made.detach().expand(self.many, *used.shape).requires_grad_()
        self.met.append((used, each))
        return each

    def _used(self, t: Tensor, sources: Params) -> Tensor:
        if not t.requires_grad:
            return t
        used = t.as_subclass(Used)
        used.told, used.made, used.sources = self, t, sources
        return used

    def _back(self, used: Used, d: Tensor) -> Grads:
        """From the gradients of what each example was given to those of parameters."""
        if any(used.made is source for source in used.sources.values()):
            return {self.params[k]: d for k in used.sources}
        found = torch.autograd.grad(
            used.made, [*used.sources.values()], d,
            retain_graph=True, is_grads_batched=True, allow_unused=True,
        )  # fmt: skip
        made = zip(used.sources, found, strict=True)
        return {self.params[k]: g for k, g in made if g is not None}


def looked_up(
    index: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **named: Any
) -> Tensor:
    """An embedding of one example; below vmap torch forgets that its padding has no gradient."""
    out = F.embedding(index, weight, None, *options, **named)
    if padding_idx is None:
        return out
    return torch.where((index == padding_idx % len(weight))[..., None], out.detach(), out)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Tensor:
    """Attention of one example, whose mask may be trained: below vmap torch finds no gradient of it.

    But by its plain formula, which is called by its name: to choose among ways is a switch of the process.
    """
    formula = torch.ops.aten._scaled_dot_product_attention_math
    seen: Tensor = formula(query, key, value, attn_mask, dropout_p, is_causal, **named)[0]
    return seen


FOR_ONE: dict[Any, Callable[..., Any]] = {
    F.embedding: looked_up,
    F.scaled_dot_product_attention: attended,
}
"""Functions that are others where an example has parameters of its own."""


def _made(t: Tensor) -> Tensor:
    return t.made if isinstance(t, Used) else t


def uneven(shape: Sequence[int], many: int) -> str:
    """What is said where the first axis is none of examples."""
    return f"sees {list(shape)} of {many} examples, not as many rows of each"
