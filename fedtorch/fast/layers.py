"""The arithmetic of many clients' linear layers in lock-step: no autograd, no gradient that is kept.

All clients of a chunk do their t-th local step together. In each step a layer is asked three things:
``forward`` (inputs a -> outputs z), ``backward`` (gradient d of z -> gradient of a) and ``step`` (move the
weights). Tensors are [k, B, ...]: the k clients still training, B examples each. Rows of ``d`` come
multiplied by learning rate and 1 / batch size already, so that a plain step is ``w <- w - d^T a``.

A parameter of which every client has its own copy is a ``Leaf``, and its step one ``baddbmm_`` into it; the
gradient itself is never written. ``copies`` has layers of such parameters, ``dual`` does without, ``front``
holds what is not linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from fedtorch.fast.chunk_data import taken
from fedtorch.fast.layer_table import Activation
from fedtorch.tree import dots, exact_sq_norms
from fedtorch.types import Params, Stack


@dataclass(frozen=True)
class Rule:
    """One step of SGD: v <- momentum v + g + decay w + pull (w - w0) + shift;  w <- w - lr v."""

    lr: float
    momentum: float = 0.0
    decay: float = 0.0
    """Weight decay."""
    pull: float = 0.0
    """Of a strategy's correction, as is the shift."""

    @property
    def keep(self) -> float:
        """What a step without momentum leaves of w, before the gradient."""
        return 1 - self.lr * (self.decay + self.pull)


class Layer(Protocol):
    """What the lock-step asks of anything between input and output."""

    def forward(self, a: Tensor) -> Tensor:
        """Inputs of this step [k, B, ...] -> outputs."""

    def step(self, d: Tensor) -> None:
        """Move the weights, if there are any, by the gradient d^T a of this step's inputs."""


class Inner(Layer, Protocol):
    """A layer behind another one, which wants to know the gradient of what it put out."""

    def backward(self, d: Tensor) -> Tensor:
        """Gradient of the outputs -> gradient of the inputs."""


class Weights(Protocol):
    """What is left of a layer with parameters after the visit."""

    def stack(self) -> Stack:
        """The clients' weights by name, [K, ...]."""

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each client's change, [K]; not finite where the change is not.

        ``upper``: never less than the norm is, whatever float32 rounded away.
        """

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Sum over clients of ``weight[k]`` times the change; a client of weight 0 stays out.

        ``exact``: in float32 throughout, where large products may otherwise be in bfloat16.
        """


class Leaf:
    """One parameter of which every client has its own copy, [K, ...]."""

    def __init__(
        self,
        start: Tensor,
        clients: int,
        rule: Rule,
        shift: Tensor | None,
        value: Tensor | None = None,
    ) -> None:
        """``value``: memory that others move, in place of copies of ``start``."""
        self.start, self.rule = start, rule
        if value is None:  # a transposed weight too, row by row: loops count on it
            value = start.expand(clients, *start.shape).clone(memory_format=torch.contiguous_format)
        self.value = value
        self.shift = None if shift is None else shift.reshape(self.value.shape)
        self.velocity = torch.zeros_like(self.value) if rule.momentum else None
        self.drift: Tensor | None = None
        self.moved: Tensor | None = None

    def step(self, x: Tensor, y: Tensor) -> None:
        """Move by the gradient x @ y, without writing it down (times lr already, unless momentum)."""
        k, rule = len(x), self.rule
        w = self.value[:k]
        if self.velocity is None:
            w.baddbmm_(x, y, beta=rule.keep, alpha=-1)
            self._drifts(w, slice(k))
            return
        v = self.velocity[:k].baddbmm_(x, y, beta=rule.momentum)
        self._follow(w, v, slice(k))

    def plain(self, k: int, scale: float) -> tuple[Tensor, float] | None:
        """Client k's numbers and what a gradient is multiplied by before it is added, if that is all."""
        rule = self.rule
        only = not rule.momentum and rule.keep == 1.0 and not rule.pull and self.shift is None
        return (self.value[k], -rule.lr * scale) if only else None

    def move(self, g: Tensor, clients: slice, scale: float = 1.0) -> None:
        """The same step of some clients for a gradient that had to be written out, times ``scale``."""
        rule, w = self.rule, self.value[clients]
        if self.velocity is None:
            if rule.keep != 1.0:
                w.mul_(rule.keep)
            w.add_(g, alpha=-rule.lr * scale)
            self._drifts(w, clients)
            return
        v = self.velocity[clients].mul_(rule.momentum).add_(g, alpha=scale)
        self._follow(w, v, clients)

    def _drifts(self, w: Tensor, clients: slice) -> None:
        """What a step adds whatever the gradient is."""
        lr, pull = self.rule.lr, self.rule.pull
        if pull and self.shift is not None:
            if self.drift is None:  # one pass in place of two
                self.drift = (self.start * (lr * pull)).sub(self.shift, alpha=lr)
            w.add_(self.drift[clients])
        elif pull:
            w.add_(self.start, alpha=lr * pull)
        elif self.shift is not None:
            w.add_(self.shift[clients], alpha=-lr)

    def _follow(self, w: Tensor, v: Tensor, clients: slice) -> None:
        # the velocity has the gradient in it already; what depends on the weights is missing
        rule = self.rule
        if rule.decay or rule.pull:
            v.add_(w, alpha=rule.decay + rule.pull)
        if rule.pull:
            v.add_(self.start, alpha=-rule.pull)
        if self.shift is not None:
            v.add_(self.shift[clients])
        w.add_(v, alpha=-rule.lr)

    def change(self) -> Tensor:
        """Weights minus start, [K, numbers], once the visit is over."""
        if self.moved is None:
            self.moved = (self.value - self.start).flatten(1)
        return self.moved

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Of the changes; who has weight 0 may hold NaN, which times 0 is NaN again."""
        on, change = weight != 0, self.change()
        return (weight[on] @ (change if on.all() else change[on])).view(self.value.shape[1:])


class Leaves:
    """Layers of which every client has its own copies of all parameters."""

    def __init__(self, leaves: dict[str, Leaf]) -> None:
        """By the model's names."""
        self.leaves = leaves

    def stack(self) -> Stack:
        """The copies."""
        return {n: leaf.value for n, leaf in self.leaves.items()}

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of all of them together."""
        return torch.stack([squares(m.change(), upper) for m in self.leaves.values()]).sum(0)

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Of each."""
        return {n: leaf.weighted_sum(weight) for n, leaf in self.leaves.items()}


class Act:
    """An activation between two layers."""

    def __init__(self, spec: Activation) -> None:
        self.spec = spec

    def forward(self, a: Tensor) -> Tensor:
        """Of each number."""
        self.z = a
        self.a = self.spec.forward(a)
        return self.a

    def backward(self, d: Tensor) -> Tensor:
        """Chain rule."""
        return self.spec.backward(d, self.z, self.a)

    def step(self, d: Tensor) -> None:
        """Nothing to move."""


class Given:
    """The examples themselves, where they are not what the first linear layer takes."""

    def __init__(self, data: Tensor) -> None:
        """[N, in]."""
        self.data = data

    def forward(self, a: Tensor) -> Tensor:
        """Row numbers [k, B] of the data -> the rows."""
        return taken(self.data, a)

    def step(self, d: Tensor) -> None:
        """Nothing to move."""


def passed_down(layers: Sequence[Layer], d: Tensor) -> list[Tensor]:
    """Gradient of the last layer's outputs -> that of each layer's outputs, in the layers' order."""
    grads = [d]
    for layer in reversed(layers[1:]):
        grads.append(cast(Inner, layer).backward(grads[-1]))
    return grads[::-1]


def squares(rows: Tensor, upper: bool = False) -> Tensor:
    """Squared norm of each row, float64, by sums in its own precision; ``upper``: never less than it is.

    A float32 sum of millions of squares can come out a hundredth too small.
    """
    return exact_sq_norms(rows) if upper else dots(rows).double()
