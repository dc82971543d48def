"""Small models, whose whole visits one compiled loop takes: a client after the other, in a core's cache.

Each client has a copy of all parameters, in one row of memory. In lock-step their layers are so many calls
for so few numbers that a round waits for the calls.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedtorch.fast import dual
from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.dual import First, costs
from fedtorch.fast.layer_table import Activation
from fedtorch.fast.layers import Rule
from fedtorch.fast.linear import Steps
from fedtorch.fast.loss import CrossEntropy
from fedtorch.fast.memory import Memory
from fedtorch.fast.ops import Behind, MakesClips, Visits
from fedtorch.fast.projected import Projected
from fedtorch.fast.reader import Chain, Linear
from fedtorch.fast.schedule import LockstepOrder
from fedtorch.fast.several import Models
from fedtorch.fast.tuning import CALLS, CLOSING, RATE_WHOLE, SPARSE_RATE, STACKED_BYTES
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.tree import split
from fedtorch.types import Params, Stack


@dataclass(frozen=True)
class Form:
    """Linear layers with nothing but ReLU between them, whose parameters stand in one row."""

    specs: tuple[Linear, ...]
    shapes: dict[str, torch.Size]
    """Of the parameters, in the model's order: noise is drawn for them as they stand."""
    places: tuple[np.ndarray, int, int]
    """As ``ops.Visits`` has them."""
    weights: int
    """How many there are, without biases."""

    @classmethod
    def of(cls, chain: Chain, names: Iterable[str]) -> "Form | None":
        """For a model with parameters of these names; None where a chain is more than that."""
        specs = tuple(s for s in chain.layers if isinstance(s, Linear))
        inner = [s.name for s in chain.layers[1::2] if isinstance(s, Activation)]
        known = chain.front is None and isinstance(chain.layers[0], Linear)
        known = known and len(inner) == len(specs) - 1 == len(chain.layers) // 2
        if not known or not set(inner) <= {"ReLU"} or chain.squeezed:
            return None
        return cls.laid(specs, names)

    @classmethod
    def laid(cls, specs: tuple[Linear, ...], names: Iterable[str]) -> "Form":
        """Of these layers, whose parameters stand in the order of ``names``."""
        own = {n: s.shape[:d] for s in specs for n, d in ((s.weight, 2), (s.bias, 1)) if n}
        shapes = {n: torch.Size(own[n]) for n in names if n in own}
        ends = accumulate((s.numel() for s in shapes.values()), initial=0)
        begin = dict(zip(shapes, ends, strict=False))
        layers = [(*s.shape, begin[s.weight], begin[s.bias] if s.bias else -1) for s in specs]
        taken, widest = sum(s.shape[1] for s in specs), max(max(s.shape) for s in specs)
        weights = sum(out * into for out, into in (s.shape for s in specs))
        return cls(specs, shapes, (np.array(layers, np.int64), taken, widest), weights)

    @cached_property
    def behind(self) -> "Form | None":
        """The same without the first layer; none: there is no other."""
        specs = self.specs[1:]
        return Form.laid(specs, self.shapes) if specs else None


class Whole:
    """How far the parameters of K clients have moved, [K, numbers], once they have been visited."""

    def __init__(self, form: Form, state: Params, rule: Rule, memory: Memory, clients: int) -> None:
        """They start from the shared ones in ``state``."""
        self.form, self.keep = form, rule.keep
        self.start = torch.cat([state[n].flatten() for n in form.shapes])
        self.room = memory.room(self.start, clients)
        self.change = self.room[:, : len(self.start)]

    def visit(self, rows: Rows, order: LockstepOrder, factor: Tensor, steps: Tensor) -> None:
        """All local steps; ``steps`` [K]: of each client."""
        own, inputs = (self.room, self.start, self.keep), (rows.flat, order.index)
        given, visits = (rows.y, order.scale, factor), cast(Visits, rows.ops.visits)
        told = visits(own, self.form.places, inputs, given, (steps, order.batch))
        self.squares, self.loss = told

    def visit_behind(
        self, first: First, rows: Rows, order: LockstepOrder, factor: Tensor, steps: Tensor
    ) -> None:
        """The same behind a ``first`` layer, which takes its steps meanwhile."""
        given, behind = (rows.y, order.scale, factor), cast(Behind, rows.ops.behind)
        own = self.room, self.start
        told = behind(own, self.form.places, first.seen, given, (steps, order.batch))
        self.squares, self.loss = told

    def visit_privately(
        self,
        rows: Rows,
        order: LockstepOrder,
        head: CrossEntropy,
        steps: Tensor,
        by: tuple[float, PrivateSteps],
        first: Projected | None = None,
    ) -> None:
        """The same of DP-SGD: a client's weights, its gradient and its noise stay in a core's cache.

        ``by``: the rate, and clip and noise; ``first``: the layer before these, whose noise is projected.
        Each example is clipped by its norm over all layers; their sum, with noise on it, over the public
        batch size is the gradient. One that is not finite counts as nothing.
        """
        layers, *_ = self.form.places
        head.check(int(layers[-1, 0]))
        made, given = cast(MakesClips, rows.ops.clips), (head.y, head.losses)
        if first:
            known, lengths = (first.seen, first.rate), first.lengths
        else:
            known, lengths = None, rows.sq_lengths[order.index] + float(layers[0, 3] >= 0)
        clips = made(layers, (rows.flat, order.index, lengths), given, order.batch, known)
        (rate, private), gradient, found = by, torch.empty_like(self.start), []
        factor = -rate / private.divisor
        for k, own in enumerate(self.change):
            own.copy_(self.start)
            for t, n in enumerate(order.counts[: int(steps[k]), k].tolist()):
                clips.sums(own, k, t * order.batch, n, private.clip, gradient)
                if first:
                    first.noise(k)
                if not private.noisy(gradient, k, onto=(own, factor)):
                    own.add_(gradient, alpha=factor)
            found.append(clips.moved(own, self.start))
        self.squares = torch.tensor(found, dtype=torch.float64)

    def stack(self) -> Stack:
        """The clients' parameters."""
        return split(self.change + self.start, self.form.shapes)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of all parameters together; added up in float64, where no square vanishes."""
        if not upper:
            return self.squares
        return self.squares * (1 + len(self.start) * 2.0**-52)

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Likewise; who has weight 0 may hold NaN, which times 0 is NaN again."""
        change = self.change
        if not bool(weight.all()):
            on = weight != 0
            weight, change = weight[on], change[on]
        total = weight @ change
        return split(total, self.form.shapes)


class Wholes:
    """The same of clients that start from several models: runs of clients with the same one."""

    def __init__(self, form: Form, models: Models, memory: Memory) -> None:
        """As above; their steps are plain."""
        self.runs = models.runs()
        made = [Whole(form, models.states[n], Rule(0.0), memory, j - i) for i, j, n in self.runs]
        self.each = made

    def visit(self, rows: Rows, order: LockstepOrder, factor: Tensor, steps: Tensor) -> None:
        """As above."""
        for own, (i, j, _) in zip(self.each, self.runs, strict=True):
            some = replace(order, index=order.index[i:j], scale=order.scale[i:j])
            own.visit(rows, some, factor[i:j], steps[i:j])
        self.loss = torch.cat([own.loss for own in self.each])

    def stack(self) -> Stack:
        """The clients' parameters."""
        stacks = [own.stack() for own in self.each]
        return {n: torch.cat([s[n] for s in stacks]) for n in stacks[0]}

    def sq_norms(self, upper: bool = False) -> Tensor:
        """One run's after the other's."""
        return torch.cat([own.sq_norms(upper) for own in self.each])

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Over all of them."""
        parts = zip(self.each, self.runs, strict=True)
        sums = [own.weighted_sum(weight[i:j], exact) for own, (i, j, _) in parts]
        return {n: torch.stack([s[n] for s in sums]).sum(0) for n in sums[0]}


def pays(form: Form, steps: Steps, rows: Rows, order: LockstepOrder) -> bool:
    """Whether whole visits are the faster way.

    They are of float32 numbers before cross entropy of classes, and of steps along the gradient, with or
    without weight decay.
    """
    if not (rows.ops.visits and known(steps, rows)):
        return False
    if not 0 < rows.classes <= form.specs[-1].shape[0]:  # a loop would read whatever is there
        return False
    if form.weights * rows.tables[0].element_size() > STACKED_BYTES:
        return False
    (first, *behind), taken = form.specs, order.index.shape[1]
    cost = (6 * form.weights - 2 * first.shape[0] * first.shape[1]) * taken / RATE_WHOLE
    others = taken * sum(min(costs(taken, s.shape)) for s in behind)
    others += CALLS * len(form.specs) * len(order.live)
    seen = min(costs(taken, first.shape, rows.most))
    # zeros are looked for where it matters alone
    return cost < others + seen / SPARSE_RATE or (cost < others + seen and rows.sparse is None)


def pays_behind(form: Form, steps: Steps, rows: Rows, order: LockstepOrder) -> Form | None:
    """What of it pays behind a first layer without copies, whose examples are known before; None: nothing.

    As above, of steps that keep all of the weights.
    """
    (first, *behind), rest, taken = form.specs, form.behind, order.index.shape[1]
    if not (rest and rows.ops.behind and known(steps, rows) and steps.rule.keep == 1.0):
        return None
    if not 0 < rows.classes <= behind[-1].shape[0] or not dual.pays(taken, first.shape, rows.most):
        return None
    if rest.weights * rows.tables[0].element_size() > STACKED_BYTES:
        return None
    if len(behind) == 1 and rest.weights <= CLOSING:  # whose steps one call takes side by side
        return None
    others = taken * sum(min(costs(taken, s.shape)) for s in behind)
    others += CALLS * len(behind) * len(order.live)
    return rest if 6 * rest.weights * taken / RATE_WHOLE < others else None


def pays_privately(form: Form, steps: Steps, rows: Rows) -> bool:
    """The same of steps that are noised, each by all of its parameters: those without decay."""
    return bool(rows.ops.clips and known(steps, rows) and steps.rule.keep == 1.0)


def known(steps: Steps, rows: Rows) -> bool:
    """Whether loops know such steps."""
    simple = not (steps.own or steps.rule.momentum or steps.rule.pull)
    return simple and rows.tables[0].dtype == torch.float32
