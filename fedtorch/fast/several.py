"""Clients of one chunk that were sent different models, as under a pace that waits for nobody.

Each starts from its own, and what they learn adds up all the same: a change is -D^T A whatever it began
from. So they train side by side, and a product with a shared weight becomes one for each model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtorch.fast.chunk_data import Kept, Rows
from fedtorch.fast.ops import Shared
from fedtorch.fast.reader import Linear
from fedtorch.fast.tuning import TALL
from fedtorch.types import Params, Stack


class Models:
    """Some models, and which of them each client starts from."""

    def __init__(self, states: Sequence[Params], of: Sequence[int], kept: Kept) -> None:
        """``of`` [K]: places in ``states``, of which each is somebody's."""
        self.states, self.of, self.kept = states, of, kept

    def runs(self) -> list[tuple[int, int, int]]:
        """Clients from one place to another who have the same model, and which."""
        return runs(self.of)

    def rows(self, names: Sequence[str]) -> Stack:
        """These parameters of each client, [K, ...]."""
        at = torch.tensor(self.of)
        return {n: torch.stack([s[n] for s in self.states])[at] for n in names}

    def layer(self, spec: Linear, half: bool) -> "Weights":
        """Those of a linear layer."""
        biases = [None if spec.bias is None else s[spec.bias] for s in self.states]
        return Weights([s[spec.weight] for s in self.states], biases, self.of, half, self.kept)


class Weights:
    """Weights [out, in] and biases of several models, by which clients' rows are multiplied."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        of: Sequence[int],
        half: bool,
        kept: Kept,
    ) -> None:
        """``of``: which of them is each client's; ``half``: large products in bfloat16."""
        self.weights, self.biases, self.of, self.half = weights, biases, of, half
        self.kept = kept

    def known(self, rows: Rows) -> Tensor:
        """Outputs for all examples, [N, out]: each client's by its own model."""
        if rows.sparse is None:
            near = [rows.near(w) for w in self.weights]
            each = rows.slim.split([*rows.sizes])
            made = [Shared(w, b, self.half) for w, b in zip(near, self.biases, strict=True)]
            return torch.cat([made[n](x) for n, x in zip(self.of, each, strict=True)])
        turned = self.kept.transposed(self.weights)
        parts = zip(self.of, rows.parts, strict=True)
        return torch.cat([p.pair[0].times(turned[n], self.biases[n]) for n, p in parts if p.pair])

    def up(self) -> "Each":
        """Inputs to outputs."""
        pairs = zip(self.weights, self.biases, strict=True)
        return Each([Shared(w, b, self.half) for w, b in pairs], self.of)

    def down(self) -> "Each":
        """Gradients of the outputs to those of the inputs."""
        return Each([Shared(w.T, None, self.half) for w in self.weights], self.of)


class Each:
    """What ``Shared`` is for one model."""

    def __init__(self, parts: Sequence[Shared], of: Sequence[int]) -> None:
        """Runs of clients with the same model go in one product."""
        self.runs = [(i, j, parts[n]) for i, j, n in runs(of)]

    def __call__(self, a: Tensor) -> Tensor:
        """[k, B, p] of the first k clients -> [k, B, q]."""
        k = len(a)
        if any(s.wide is not None for _, _, s in self.runs) or k * a.shape[1] >= 2 * TALL:
            return torch.cat([shared(a[i:j]) for i, j, shared in self.runs if i < k])
        # written where they belong: of so few rows a call counts
        B, rows, first = a.shape[1], a.flatten(0, 1), self.runs[0][2]
        out = rows.new_empty(len(rows), len(first.weight))
        for i, j, shared in self.runs:
            if i >= k:
                break
            some, to, turned = rows[i * B : j * B], out[i * B : j * B], shared.weight.T
            if shared.bias is None:
                torch.mm(some, turned, out=to)
            else:
                torch.addmm(shared.bias, some, turned, out=to)
        return out.view(k, B, out.shape[1])


def runs(of: Sequence[int]) -> list[tuple[int, int, int]]:
    """Begin, end and value of each stretch of equal numbers."""
    ends = [k for k in range(1, len(of) + 1) if k == len(of) or of[k] != of[k - 1]]
    return [(i, j, of[i]) for i, j in zip([0, *ends], ends, strict=False)]
