"""Small models, whose whole visits one compiled loop takes: a client after the other, in a core's cache.

Each client has a copy of all parameters, in one row of memory. In lock-step their layers are so many calls
for so few numbers that a round waits for the calls.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.dual import costs
from fedtorch.fast.layer_table import Activation
from fedtorch.fast.layers import Rule
from fedtorch.fast.linear import Steps
from fedtorch.fast.loss import CrossEntropy
from fedtorch.fast.memory import Memory
from fedtorch.fast.ops import MakesClips, Visits
from fedtorch.fast.reader import Chain, Linear
from fedtorch.fast.schedule import LockstepOrder
from fedtorch.fast.several import Models
from fedtorch.fast.tuning import CALLS, OWN_PRODUCTS, RATE_WHOLE, SPARSE_RATE, STACKED_BYTES
from fedtorch.privacy.gradients import PrivateSteps, rounded
from fedtorch.tree import split
from fedtorch.types import Params, Stack


class Whole:
    """How far the parameters of K clients have moved, [K, numbers], once they have been visited."""

    def __init__(
        self, chain: Chain, state: Params, rule: Rule, memory: Memory, clients: int
    ) -> None:
        """They start from the shared ones in ``state``."""
        specs = linear(chain)
        names = {n for s in specs for n in (s.weight, s.bias)}
        self.shapes = {n: v.shape for n, v in state.items() if n in names}
        self.start = torch.cat([state[n].flatten() for n in self.shapes])
        self.room, self.keep = memory.room(self.start, clients), rule.keep
        self.change = self.room[:, : len(self.start)]
        ends = accumulate((s.numel() for s in self.shapes.values()), initial=0)
        begin = dict(zip(self.shapes, ends, strict=False))
        places = [(*s.shape, begin[s.weight], begin[s.bias] if s.bias else -1) for s in specs]
        self.layers = np.array(places, np.int64)

    def visit(
        self,
        rows: Rows,
        order: LockstepOrder,
        head: CrossEntropy,
        steps: Tensor,
        who: slice = slice(None),
    ) -> None:
        """All local steps; ``steps`` [K]: of each client; ``who``: whose of the chunk these are."""
        head.check(int(self.layers[-1, 0]))
        own, inputs = (self.room, self.start, self.keep), (rows.flat, order.index[who])
        given = head.y[who], head.scale[who], head.factor[who], head.losses[who]
        visits = cast(Visits, rows.ops.visits)
        self.squares = visits(own, self.layers, inputs, given, (steps[who], order.batch))

    def visit_privately(
        self,
        rows: Rows,
        order: LockstepOrder,
        head: CrossEntropy,
        steps: Tensor,
        rate: float,
        private: PrivateSteps,
    ) -> None:
        """The same of DP-SGD: a client's weights, its gradient and its noise stay in a core's cache.

        Each example is clipped by its norm over all layers; their sum, with noise on it, over the public
        batch size is the gradient. One that is not finite counts as nothing.
        """
        head.check(int(self.layers[-1, 0]))
        inputs = rows.flat, order.index, rows.sq_lengths
        make, given = cast(MakesClips, rows.ops.clips), (head.y, head.losses)
        clips, gradient = (
            make(self.layers, inputs, given, order.batch),
            torch.empty_like(self.start),
        )
        factor, found = -rate / private.divisor, []
        for k, own in enumerate(self.change):
            own.copy_(self.start)
            for t, n in enumerate(order.counts[: int(steps[k]), k].tolist()):
                squares = clips.norms(own, k, t * order.batch, n)
                clips.sums(rounded(private.factors(squares), gradient), gradient)
                if not private.noisy(gradient, k, onto=(own, factor)):
                    own.add_(gradient, alpha=factor)
            found.append(clips.moved(own, self.start))
        self.squares = torch.tensor(found, dtype=torch.float64)

    def stack(self) -> Stack:
        """The clients' parameters."""
        return split(self.change + self.start, self.shapes)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of all parameters together; added up in float64, where no square vanishes."""
        if not upper:
            return self.squares
        return self.squares * (1 + len(self.start) * 2.0**-52)

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Likewise; who has weight 0 may hold NaN, which times 0 is NaN again."""
        on = weight != 0
        total = weight @ self.change if bool(on.all()) else weight[on] @ self.change[on]
        return split(total, self.shapes)


class Wholes:
    """The same of clients that start from several models: runs of clients with the same one."""

    def __init__(self, chain: Chain, models: Models, memory: Memory) -> None:
        """As above; their steps are plain."""
        self.runs = models.runs()
        made = [Whole(chain, models.states[n], Rule(0.0), memory, j - i) for i, j, n in self.runs]
        self.each = made

    def visit(self, rows: Rows, order: LockstepOrder, head: CrossEntropy, steps: Tensor) -> None:
        """As above."""
        for own, (i, j, _) in zip(self.each, self.runs, strict=True):
            own.visit(rows, order, head, steps, slice(i, j))

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


def pays(chain: Chain, steps: Steps, rows: Rows, order: LockstepOrder) -> bool:
    """Whether whole visits are known and the faster way.

    They are of linear layers in float32 with ReLU between them, and of steps along the gradient, with or
    without weight decay.
    """
    specs = linear(chain)
    if not (rows.ops.visits and known(chain, steps, rows)):
        return False
    numbers = weights(specs)
    if numbers * rows.tables[0].element_size() > STACKED_BYTES:
        return False
    (first, *behind), taken = specs, order.index.shape[1]
    cost = (6 * numbers - 2 * first.shape[0] * first.shape[1]) * taken / RATE_WHOLE
    others = taken * sum(min(costs(taken, s.shape)) for s in behind)
    others += CALLS * len(specs) * len(order.live)
    seen = min(costs(taken, first.shape, rows.most))
    # zeros are looked for where it matters alone
    return cost < others + seen / SPARSE_RATE or (cost < others + seen and rows.sparse is None)


def pays_privately(chain: Chain, steps: Steps, rows: Rows) -> bool:
    """The same of steps that are noised, each by all of its parameters: no decay, and not too few."""
    many = weights(linear(chain)) >= OWN_PRODUCTS
    return bool(many and rows.ops.clips and known(chain, steps, rows) and steps.rule.keep == 1.0)


def known(chain: Chain, steps: Steps, rows: Rows) -> bool:
    """Whether loops know such layers and steps."""
    inner = [s.name for s in chain.layers[1::2] if isinstance(s, Activation)]
    plain = chain.front is None and isinstance(chain.layers[0], Linear) and set(inner) <= {"ReLU"}
    plain = plain and len(inner) == len(linear(chain)) - 1 == len(chain.layers) // 2
    simple = not (steps.own or steps.rule.momentum or steps.rule.pull)
    return plain and simple and rows.tables[0].dtype == torch.float32


def weights(specs: Sequence[Linear]) -> int:
    """All of them, without biases."""
    return sum(out * into for out, into in (s.shape for s in specs))


def linear(chain: Chain) -> list[Linear]:
    """The linear layers."""
    return [s for s in chain.layers if isinstance(s, Linear)]
