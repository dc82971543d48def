"""A step of DP-SGD in lock-step: no example's gradient is ever built.

An example's gradient in a linear layer is the outer product of d and a, whose norm is the product of their
norms. So rows of d are scaled by the clip, one product sums them, and noise goes on the sum. Noise in every
step makes each client's weights a full matrix of its own; all of a client's parameters lie one after
another in one row of memory, so that a client's sum, noise and step pass through the cache once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.copies import Own
from fedtorch.fast.dropout import Coins, Drop
from fedtorch.fast.example_gradients import Examples
from fedtorch.fast.layer_table import Activation
from fedtorch.fast.layers import Act, Given, Layer, Leaf, Rule, Weights, passed_down, squares
from fedtorch.fast.memory import Memory
from fedtorch.fast.ops import Ops
from fedtorch.fast.projected import Projected
from fedtorch.fast.reader import DensePart, Linear
from fedtorch.privacy.gradients import PrivateSteps, rounded
from fedtorch.tree import exact_sq_norms, scaled_rows, split
from fedtorch.types import Params, Stack


class Flat:
    """The parameters of all clients, [K, numbers], and memory for one client's gradient."""

    def __init__(
        self,
        specs: Sequence[DensePart],
        front: Sequence[str],
        state: Params,
        rule: Rule,
        shift: Params,
        memory: tuple[Memory, int],
    ) -> None:
        """``front``: names of parameters before the dense part's; ``memory`` for so many clients.

        Noise comes in the model's order.
        """
        self.specs, self.rule = specs, rule
        names = {*front, *(n for s in specs if isinstance(s, Linear) for n in (s.weight, s.bias))}
        self.shapes = {n: v.shape for n, v in state.items() if n in names}
        name = next(iter(state))  # a projected first layer may be all there is
        start = torch.cat([state[name][:0].flatten(), *(state[n].flatten() for n in self.shapes)])
        moved = torch.cat([shift[n].flatten(1) for n in self.shapes], 1) if shift else None
        self.leaf = Leaf(start, 0, rule, moved, memory[0].rows(start, memory[1]))
        self.gradient = torch.empty_like(start)
        self.into = split(self.gradient, self.shapes)
        """The same by name."""

    def held(self, layers: Sequence[Layer]) -> list[Weights]:
        """What is left of a visit through these layers: most of their parameters are here."""
        return [self, *(m.done() for m in layers if isinstance(m, Projected))]

    def stack(self) -> Stack:
        """The copies."""
        return split(self.leaf.value, self.shapes)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of all parameters together; client after client, so that no change is kept."""
        changes = (self._change(value)[None] for value in self.leaf.value)
        return torch.cat([squares(change, upper) for change in changes])

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Likewise; who has weight 0 may hold NaN, which times 0 is NaN again."""
        total = torch.zeros_like(self.leaf.start)
        for w, value in zip(weight.cpu().tolist(), self.leaf.value, strict=True):
            if w:
                total.add_(self._change(value), alpha=w)
        return split(total, self.shapes)

    def _change(self, value: Tensor) -> Tensor:
        return torch.sub(value, self.leaf.start, out=self.gradient)

    def leaves(self, names: Sequence[str]) -> dict[str, Leaf]:
        """Some of the parameters."""
        own, start = (split(t, self.shapes) for t in (self.leaf.value, self.leaf.start))
        return {n: Leaf(start[n], 0, self.rule, None, own[n]) for n in names}

    def layers(self, rows: Rows | None, coins: Coins, ops: Ops) -> list[Layer]:
        """The layers on these parameters; ``rows`` if the first of them is the model's first."""
        own, start = (split(t, self.shapes) for t in (self.leaf.value, self.leaf.start))
        given = rows and not isinstance(self.specs[0], Linear)
        layers: list[Layer] = [Given(rows.flat)] if rows and given else []
        for spec in self.specs:
            if not isinstance(spec, Linear):
                layers.append(Act(spec) if isinstance(spec, Activation) else Drop(spec, coins))
                continue
            weight = Leaf(start[spec.weight], 0, self.rule, None, own[spec.weight])
            bias = None
            if spec.bias:
                bias = Leaf(start[spec.bias][None], 0, self.rule, None, own[spec.bias][:, None])
            inputs = None if layers else rows
            layers.append(Own(spec, weight, bias, coins.order, inputs, ops))
        return layers


def noised(flat: Flat, layers: Sequence[Layer], d: Tensor, private: PrivateSteps) -> None:
    """Clip each example by its norm over all layers, sum, add noise, move; client after client.

    ``d`` [k, B, ...]: gradient of each example's own loss, 0 where there is none. An example that is not
    finite counts as nothing.
    """
    grads, first = passed_down(layers, d), layers[0]
    known = [(m, g) for m, g in zip(layers, grads, strict=True) if isinstance(m, (Own, Projected))]
    written: list[Params] = [{} for _ in d]
    if isinstance(first, Examples):
        written = [first.gradients(j, g) for j, g in enumerate(grads[0])]
    factors = scales(known, written, private)
    clean, into = bool(factors.all()), flat.into
    dense: list[Callable[[int], None]] = []
    for m, g in known:
        scaled = scaled_rows(g, factors, clean)
        if isinstance(m, Own):
            a = m.a if clean else torch.where(factors[..., None] > 0, m.a, 0)
            bias = into[m.spec.bias] if m.spec.bias else None
            dense.append(m.ops.sums(scaled, a, m.counts, into[m.spec.weight], bias))
        else:
            m.step(scaled)
    for k in range(len(d)):
        for write in dense:
            write(k)
        for name, g in written[k].items():
            into[name].copy_(clipped(g, factors[k, : len(g)]))
        at, scale = slice(k, k + 1), 1 / private.divisor
        if not private.noisy(flat.gradient, k, onto=flat.leaf.plain(k, scale)):
            flat.leaf.move(flat.gradient[None], at, scale)


def scales(
    known: Sequence[tuple[Own | Projected, Tensor]],
    written: Sequence[Params],
    private: PrivateSteps,
) -> Tensor:
    """What each example's gradient is multiplied by, [k, B], from its norm over all layers."""
    squares = torch.stack([m.example_sq_norms(g) for m, g in known]).sum(0)
    for row, own in zip(squares, written, strict=True):
        if own:
            found = exact_sq_norms(*own.values())
            row[: len(found)] += found
    return rounded(private.factors(squares), known[0][1])


def clipped(gradients: Tensor, factors: Tensor) -> Tensor:
    """Sum of [n, ...] with factors [n]; who has factor 0 may hold NaN, which times 0 is NaN again."""
    on = factors > 0
    if not bool(on.all()):
        factors, gradients = factors[on], gradients[on]
    total: Tensor = torch.tensordot(factors, gradients, 1)
    return total
