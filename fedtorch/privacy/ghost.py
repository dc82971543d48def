"""Layers whose examples' gradients are never written out (Goodfellow 2015, arXiv:1510.01799).

Of a linear layer that sees one row of each example, an example's gradient is the outer product of what came
back and what went in: its norm is the product of their norms, and the clipped sum one product of matrices
(Bu et al. 2023, arXiv:2210.00038). An embedding's gradient has as many rows as the example looked up. The
norm and the sum are taken from the same numbers: a second backward pass would round in another way, and
where large numbers cancel in it, what it rounds is all there is.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedtorch.tree import exact_sq_norms, scaled_rows

LAYERS = (nn.Linear, nn.Embedding)


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
        self._handles = [m.register_forward_hook(self._on_forward) for m in self.layers]

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
        output.register_hook(lambda d: self.seen.append(kind(layer, a, d.detach())))


def apart(layer: nn.Module) -> bool:
    """Whether examples' gradients of this layer need not be written out."""
    own = any(p.requires_grad for p in layer.parameters(recurse=False))
    plain = not getattr(layer, "scale_grad_by_freq", False)
    return own and plain and type(layer) in LAYERS


class Product:
    """A linear layer's rows."""

    def __init__(self, layer: nn.Module, a: Tensor, d: Tensor) -> None:
        """Inputs [n, in] and gradients of the outputs [n, out]."""
        if a.dim() != 2:
            raise NotImplementedError(
                "a linear layer over several rows of an example has no such form"
            )
        self.layer, self.a, self.d = cast(nn.Linear, layer), a.to(d.dtype), d

    def sq_norms(self) -> Tensor:
        """|d|^2 (|a|^2 + 1), the 1 for the bias."""
        weight, bias = self.layer.weight, self.layer.bias
        squares = exact_sq_norms(self.d)
        lengths = torch.zeros_like(squares)
        if weight.requires_grad:
            lengths += exact_sq_norms(self.a)
        if bias is not None and bias.requires_grad:
            lengths += 1
        return squares * lengths

    def add(self, factors: Tensor, into: Into) -> None:
        """One product for all examples."""
        d = scaled_rows(self.d, factors)
        if (weight := into(self.layer.weight)) is not None:
            a = self.a if bool(factors.all()) else torch.where(factors[:, None] > 0, self.a, 0)
            weight.addmm_(d.T, a)
        if self.layer.bias is not None and (bias := into(self.layer.bias)) is not None:
            bias += d.sum(0)


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
