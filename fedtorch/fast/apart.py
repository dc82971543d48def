"""What each client's weights have in them beside the shared ones and products of its rows.

FedDyn and SCAFFOLD shift each client's gradients by an S of its own, Ditto's second pass starts at a V of
its own. Either way a client's weights are b w0 + c U - D^T A in every step, with one b and one c for all.
So nobody reads and writes copies of the weights in every step, and a first layer's examples meet U once in
a visit, however many steps follow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtorch.fast.layers import squares
from fedtorch.fast.linear import Steps
from fedtorch.fast.reader import Linear
from fedtorch.types import Params, Stack


class Apart:
    """U of one layer, and how much of it there is."""

    def __init__(self, spec: Linear, steps: Steps, clients: int) -> None:
        """U is where clients start or, where that is at the shared weights, what shifts their gradients."""
        named = steps.start or steps.shift
        self.spec, self.rule, self.starts = spec, steps.rule, bool(steps.start)
        self.weight, self.bias = named[spec.weight], named.get(spec.bias or "")
        """[K, out, in] and [K, out]."""
        self.now = float(self.starts)
        self.each = self.weight.new_full((clients,), self.now)

    def step(self, clients: int) -> None:
        """One shift more, or less of the start, for the first ``clients``; the others have stopped."""
        self.now = self.rule.keep * self.now - (0.0 if self.starts else self.rule.lr)
        self.each[:clients] = self.now

    def met(self, x: Tensor, client: int) -> Tensor:
        """Outputs of a client's U for its examples [n, in]."""
        out = x @ self.weight[client].T
        return out if self.bias is None else out.add_(self.bias[client])

    def add_outputs(self, z: Tensor, a: Tensor) -> None:
        """Add c times those for inputs [k, B, in] to z [k, B, out]."""
        z.baddbmm_(a, self.weight[: len(a)].mT, alpha=self.now)
        if self.bias is not None:
            z.add_(self.bias[: len(a), None], alpha=self.now)

    def written(
        self, rows: tuple[Tensor, Sequence[Tensor]], shared: tuple[Tensor, Tensor | None, Tensor]
    ) -> Stack:
        """For each client b w0 + c U - D^T A; ``rows``: D [K, n, out] and A; ``shared``: w0 and b [K]."""
        (D, A), (w0, b0, b) = rows, shared
        made, c = torch.empty_like(self.weight, memory_format=torch.contiguous_format), self.each
        for k, (a, left, own) in enumerate(zip(A, b.tolist(), c.tolist(), strict=True)):
            # client after client: each one's are in the cache
            torch.addmm(self.weight[k], D[k, : len(a)].T, a, beta=own, alpha=-1, out=made[k])
            if left:
                made[k].add_(w0, alpha=left)
        bias = None if b0 is None else b0 * b[:, None] - D.sum(1)
        if bias is not None and self.bias is not None:
            bias.add_(self.bias * c[:, None])
        return self.spec.named(made, bias)


def norms_of(changes: Stack, upper: bool) -> Tensor:
    """Squared norm of each client's change, [K]."""
    return torch.stack([squares(v.flatten(1), upper) for v in changes.values()]).sum(0)


def sum_of(changes: Stack, weight: Tensor) -> Params:
    """Their weighted sum; who has weight 0 may hold NaN, which times 0 is NaN again."""
    on = weight != 0
    found = changes if bool(on.all()) else {n: v[on] for n, v in changes.items()}
    return {n: torch.tensordot(weight[on], v, 1) for n, v in found.items()}
