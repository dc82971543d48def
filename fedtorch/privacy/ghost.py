"""Layers whose examples' gradients are never written out (Goodfellow 2015, arXiv:1510.01799).

Of a linear layer that sees one row of each example, an example's gradient is the outer product of what came
back and what went in: its norm is the product of their norms, and the clipped sum one product of matrices
(Bu et al. 2023, arXiv:2210.00038). An embedding's gradient has as many rows as the example looked up. The
norm and the sum are taken from the same numbers: a second backward pass would round in another way, and
where large numbers cancel in it, what it rounds is all there is.

Of a layer that sees several rows of an example, as at the places of a sequence or of an image, the squared
norm is the sum of (a_s a_t)(d_s d_t) over pairs of rows s, t. It is less work than the gradient where rows
are few and the layer is wide; where terms cancel the gradient is written out after all.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedtorch.tree import exact_sq_norms, scaled_rows

LAYERS = (nn.Linear, nn.Embedding)

PAIRS = 16
"""Products of pairs of rows that cost as much as a number that is written out, normed and summed up."""

CANCELLED = 2.0**-10
"""Share of the largest squared norm that rows of their lengths could have, from which on it is exact."""

ROUNDED = 8
"""Rounding of a sum over pairs of rows, in units of a number's last place of that largest one."""


Into = Callable[[Tensor], Tensor | None]
"""Of a parameter, where sums of its gradients go; None: it is not trained."""


class Seen(Protocol):
    """Inputs and gradients of one layer for a batch."""

    def sq_norms(self) -> Tensor:
        """Squared norm of each example's gradient, [n], float64."""

    def add(self, factors: Tensor, into: Into) -> None:
        """Add the sum of the gradients, each times its factor [n], to ``into`` of each parameter."""


class Ghosts:
    """Listens to the layers of a model that have such a form."""

    def __init__(self, model: nn.Module) -> None:
        """Until ``close``."""
        self.layers = [m for m in model.modules() if apart(m)]
        self.seen: list[Seen] = []
        self._met: set[nn.Module] = set()
        self._handles = [
            m.register_forward_hook(self._on_forward, prepend=True) for m in self.layers
        ]

    def sq_norms(self) -> list[Tensor]:
        """Squared norms of each layer's gradients, [n], float64."""
        return [s.sq_norms() for s in self.seen]

    def forget(self) -> None:
        """Before another batch."""
        self.seen, self._met = [], set()

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def _on_forward(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        if layer in self._met:
            raise NotImplementedError("a layer that is used twice has no such form")
        self._met.add(layer)
        kind = Looked if isinstance(layer, nn.Embedding) else Product
        a = inputs[0].detach()
        if kind is Product and a.dim() != 2:
            raise NotImplementedError(
                "a linear layer over several rows of an example has no such form in this mode"
            )
        output.register_hook(lambda d: self.seen.append(kind(layer, a, d.detach())))


def apart(layer: nn.Module) -> bool:
    """Whether examples' gradients of this layer need not be written out."""
    own = any(p.requires_grad for p in layer.parameters(recurse=False))
    plain = not getattr(layer, "scale_grad_by_freq", False)
    return own and plain and type(layer) in LAYERS


def pays(rows: int, inner: int, outer: int) -> bool:
    """Whether pairs of an example's rows are less work than its gradient [outer, inner] written out."""
    return rows == 1 or rows * rows * (inner + outer) < PAIRS * inner * outer


class Product:
    """What a linear layer takes, or a convolution at each place: rows of examples."""

    def __init__(self, layer: nn.Module, a: Tensor, d: Tensor) -> None:
        """Inputs [n, in] and gradients of the outputs [n, out], or several rows, [n, rows, in].

        Of a convolution the inputs are windows, with channels innermost.
        """
        self.layer, self.a, self.d = cast(nn.Linear, layer), a.to(d.dtype), d

    def sq_norms(self) -> Tensor:
        """|d|^2 (|a|^2 + 1), the 1 for the bias; of several rows the sum over pairs of them."""
        weight, bias = self.layer.weight, self.layer.bias
        own = weight.requires_grad, bias is not None and bias.requires_grad
        if self.d.dim() == 3:
            return self._of_pairs(*own)
        squares = exact_sq_norms(self.d)
        lengths = torch.zeros_like(squares)
        if own[0]:
            lengths += exact_sq_norms(self.a)
        return squares * (lengths + own[1])

    def _of_pairs(self, weight: bool, bias: bool) -> Tensor:
        """Guarantee: no less than it is. What rounding may have taken away is added."""
        a, d = self.a, self.d
        met = a.bmm(a.mT) if weight else d.new_zeros(())
        found = (d.bmm(d.mT) * (met + bias)).flatten(1).sum(1).double()
        kind, most = torch.finfo(d.dtype), longest(a, d, weight, bias).double()
        # numbers that are alike are all rounded one way, in as many sums as a product has lanes, 8 or more
        alike = (a.shape[2] + d.shape[2]) / 16
        found += (ROUNDED + alike) * kind.eps * most**2
        exact = found.isfinite() & (found > CANCELLED * most**2)
        # what may have vanished in each product of two rows, by what it is multiplied by
        a_most, d_most = (torch.linalg.vector_norm(t, dim=2).amax(1).double() for t in (a, d))
        lost = 1 + a.shape[2] * d_most**2 + d.shape[2] * (a_most**2 + 1)
        exact &= most**2 > d.shape[1] ** 2 * lost * kind.tiny / kind.eps
        for k in (~exact).nonzero().flatten().tolist():
            parts = [d[k].T @ a[k]] * weight + [d[k].sum(0)] * bias
            written = exact_sq_norms(*(p[None] for p in parts))[0].sqrt()
            most[k] = longest(a[k].double(), d[k].double(), weight, bias)
            found[k] = (written + ROUNDED * kind.eps * most[k]) ** 2
        return found

    def add(self, factors: Tensor, into: Into) -> None:
        """One product for all examples."""
        a, on = self.a, factors
        if self.d.dim() == 3:
            a, on = a.flatten(0, 1), factors[:, None].expand(self.d.shape[:2]).flatten()
        d = scaled_rows(self.d.flatten(0, -2), on)
        if (weight := into(self.layer.weight)) is not None:
            a = a if bool(factors.all()) else torch.where(on[:, None] > 0, a, 0)
            if weight.dim() == 2:
                weight.addmm_(d.T, a)
            else:
                own = weight.movedim(1, -1)  # channels are innermost in windows
                own.add_((d.T @ a).view(own.shape))
        if self.layer.bias is not None and (bias := into(self.layer.bias)) is not None:
            bias += d.sum(0)


def longest(a: Tensor, d: Tensor, weight: bool, bias: bool) -> Tensor:
    """Norm of the gradient of rows [..., rows, in] and [..., rows, out] if all of them pointed one way."""
    lengths = torch.linalg.vector_norm(a, dim=-1) if weight else torch.zeros_like(d[..., 0])
    lengths = lengths.hypot(torch.ones_like(lengths)) if bias else lengths
    found: Tensor = torch.linalg.vector_norm(d, dim=-1) * lengths
    return found.sum(-1)


class Looked:
    """Rows of an embedding: those that an example looked up more than once are added up first."""

    def __init__(self, layer: nn.Module, index: Tensor, d: Tensor) -> None:
        """Numbers of rows [n, ...] and gradients of the outputs [n, ..., width]."""
        layer = cast(nn.Embedding, layer)
        n, count = len(index), layer.num_embeddings
        self.layer, self.n = layer, n
        d = d.reshape(-1, d.shape[-1])
        if layer.padding_idx is not None:
            d = torch.where(index.reshape(-1, 1) == layer.padding_idx, 0, d)
        own = torch.arange(n, device=index.device)[:, None] * count
        pairs, place = (index.reshape(n, -1) + own).flatten().unique(return_inverse=True)
        self.rows = d.new_zeros(len(pairs), d.shape[1]).index_add_(0, place, d)
        self.example, self.row = pairs // count, pairs % count

    def sq_norms(self) -> Tensor:
        """Of an example's rows together."""
        squares = exact_sq_norms(self.rows)
        return squares.new_zeros(self.n).index_add_(0, self.example.to(squares.device), squares)

    def add(self, factors: Tensor, into: Into) -> None:
        """Each row to its own."""
        if (weight := into(self.layer.weight)) is not None:
            weight.index_add_(0, self.row, scaled_rows(self.rows, factors[self.example]))
