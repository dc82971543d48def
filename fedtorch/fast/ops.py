"""The operations that compiled loops may take over, each as torch does it, which says what it means.

``fedtorch.kernels.loops`` has the same methods. Which of the two a visit uses is asked once, by
``ops_for``; nobody else knows that there are loops. Without numba and on accelerators it is torch.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtorch.fast.tuning import LARGE, TALL
from fedtorch.kernels.compile import loops


class Matrix(Protocol):
    """A matrix [N, n] that is multiplied again and again."""

    def times(self, dense: Tensor, start: Tensor | None = None) -> Tensor:
        """The product with [n, q], [N, q]; ``start`` [q] is added to each row."""


class Lean(Matrix, Protocol):
    """One without its zeros."""

    def add_to(self, out: Tensor, dense: Tensor) -> None:
        """Add the product to ``out``."""


class Coefficients:
    """A row of numbers for each example of K clients, all 0 at first: early steps meet few others."""

    def __init__(self, z: Tensor, G: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """Outputs z [N, q] of all clients' examples, and products G [K, n, m] of each client's own.

        ``places``: the examples of each step, [K, T], as rows of z and as rows of the client's G.
        """
        self.z, self.G, (self.index, self.local) = z, G, places
        self.rows = z.new_zeros(len(G), G.shape[2], z.shape[1])
        """[K, m, q]."""

    def outputs(
        self, s: int, k: int, B: int, keep: float = 1.0, rate: float = 1.0, end: str = ""
    ) -> Tensor:
        """Of k clients' B examples from s on: keep z - rate G rows, [k, B, q]; ``end`` as in ``append``."""
        at = slice(s, s + B)
        own = self.G.take_along_dim(self.local[:, at, None], 1)[:k]
        z = torch.baddbmm(self.z[self.index[:k, at]], own, self.rows[:k], beta=keep, alpha=-rate)
        return z.relu_() if end else z

    def add(self, s: int, d: Tensor) -> None:
        """Add rows d [k, B, q] to those of the examples from s on, of which some may be the same."""
        at = self.local[: len(d), s : s + d.shape[1], None].expand_as(d)
        self.rows[: len(d)].scatter_add_(1, at, d)

    def count_all(self, k: int) -> None:
        """Of client k any row may be something else than 0 from now on."""


class Visits(Protocol):
    """Whole visits of clients, one after another."""

    def __call__(
        self,
        own: tuple[Tensor, Tensor, float],
        places: tuple[np.ndarray, int, int],
        inputs: tuple[Tensor, Tensor],
        given: tuple[Tensor, Tensor, Tensor],
        steps: tuple[Tensor, int],
    ) -> tuple[Tensor, Tensor]:
        """All steps of each client's linear layers, ReLU between them, before cross entropy.

        ``own``: room for the change of each client's parameters, [K, at least so many], those it began with
        [numbers], and what a step keeps of them. Returns the changes' squared norms, and the mean over
        steps of the mean losses of their examples, [K] each, float64.
        ``places``: layers [n, 4], which are outputs, inputs, and where weights and biases begin (-1: there
        are none), all their inputs, and the most in- or outputs of one; ``inputs``: examples [N, in] and
        those of each step, [K, T]; ``given``: their classes [N], and scale and factor of each step as
        ``loss.CrossEntropy`` has them; ``steps`` of each client, [K], and examples in each.
        """


class Behind(Protocol):
    """The same behind a first layer of which nobody has a copy, with a ReLU after it."""

    def __call__(
        self,
        own: tuple[Tensor, Tensor],
        places: tuple[np.ndarray, int, int],
        first: Any,
        given: tuple[Tensor, Tensor, Tensor],
        steps: tuple[Tensor, int],
    ) -> tuple[Tensor, Tensor]:
        """As above, of the layers behind; steps keep all of the weights.

        ``first``: ``Coefficients`` of the same maker, to whose rows gradients are added.
        """


class Clips(Protocol):
    """Steps of DP-SGD of one client after another but for the noise: linear layers, ReLU between them."""

    def sums(self, own: Tensor, k: int, s: int, n: int, clip: float, into: Tensor) -> None:
        """Write the sum of the clipped gradients of client k's n examples from s on to ``into`` [numbers].

        ``own``: its parameters [numbers]. Each example is scaled as ``PrivateSteps.factors`` says; one that
        is not finite may hold anything, and what comes out so small that it loses digits is 0.
        """

    def moved(self, own: Tensor, start: Tensor) -> float:
        """Take ``start`` from parameters; returns the squared norm of what is left."""


class MakesClips(Protocol):
    """What makes them."""

    def __call__(
        self,
        layers: np.ndarray,
        inputs: tuple[Tensor, Tensor, Tensor],
        given: tuple[Tensor, Tensor],
        most: int,
        first: tuple[Any, float] | None = None,
    ) -> Clips:
        """For steps of at most so many examples; ``layers`` as in ``Visits``.

        ``inputs``: examples [N, in], those of each step, [K, T], and of these the squared lengths, float64,
        and one more if the first layer has a bias; ``given``, each [K, T, 1]: labels, and where the log of
        the label's share is written. ``first``: ``Coefficients`` of the same maker and their rate, of a
        layer before ``layers`` with a ReLU after it: they take the clipped rows of its gradient.
        """


class Ops:
    """What a visit may ask of loops, by torch."""

    def append(
        self,
        z: Tensor,
        x: Tensor,
        known: tuple[Tensor, Tensor, Tensor],
        s: int,
        one: float,
        keep: float = 1.0,
        end: str = "",
    ) -> Tensor:
        """Write rows x [k, B, p] to X [K, T, p] from s on, and x X^T + one to G [K, T, T], up to there.

        ``known``: X, G and Y [K, T, q]. Returns keep z - G Y [k, B, q], in z's memory, for the rows of Y
        before s. ``end`` "relu": 0 where that is negative; "mask": 0 where Y's rows from s on are not
        positive.
        """
        (X, G, Y), k, e = known, len(x), s + x.shape[1]
        X[:k, s:e] = x
        G[:k, s:e, :e] = x.bmm(X[:k, :e].mT).add_(one)
        z = z.baddbmm_(G[:k, s:e, :s], Y[:k, :s], beta=keep, alpha=-1) if s else z
        return masked(z, Y[:k, s:e]) if end == "mask" else z.relu_() if end else z

    def coefficients(self, z: Tensor, G: Tensor, places: tuple[Tensor, Tensor]) -> Coefficients:
        """Rows for examples, and what they take off the outputs: see there."""
        return Coefficients(z, G, places)

    def closing(
        self,
        a: Tensor,
        layer: tuple[Tensor, Tensor | None],
        given: tuple[Tensor, Tensor, Tensor, Tensor],
        s: int,
        keep: float,
        end: str,
    ) -> Tensor:
        """A step of the last ``layer``, weights [K, C, p] and bias [K, 1, C], before cross entropy.

        ``given``, each [K, T, 1]: labels, scale and factor as ``loss.CrossEntropy`` has them, and where the
        log of the label's share is written. For inputs a [k, B, p] of rows from s on: weights
        <- keep times themselves minus the gradient times factor. Returns the gradient of a, which with
        ``end`` "mask" is 0 where a is not positive.
        """
        (weight, bias), (y, scale, factor, losses), k = layer, given, len(a)
        at, w = slice(s, s + a.shape[1]), weight[:k]
        z = a.bmm(w.mT) if bias is None else bias[:k].baddbmm(a, w.mT)
        logs = z.log_softmax(-1)
        losses[:k, at] = torch.where(scale[:k, at] > 0, logs.gather(2, y[:k, at]), 0)
        d = logs.exp().scatter_add(2, y[:k, at], -torch.ones_like(scale[:k, at]))
        d = torch.where(scale[:k, at] > 0, d * factor[:k, at], 0)
        down = d.bmm(w)
        w.baddbmm_(d.mT, a, beta=keep, alpha=-1)
        if bias is not None:
            bias[:k].mul_(keep).sub_(d.sum(1, keepdim=True))
        return masked(down, a) if end == "mask" else down

    def outputs(self, a: Tensor, weight: Tensor, bias: Tensor | None, counts: np.ndarray) -> Tensor:
        """Rows a [k, B, p] by their clients' own weights [K, q, p], plus biases [K, 1, q]: [k, B, q].

        Of a client the first ``counts`` rows are examples; what comes of the others nobody looks at.
        """
        w = weight[: len(a)].mT
        return a.bmm(w) if bias is None else bias[: len(a)].baddbmm(a, w)

    def inputs(self, d: Tensor, weight: Tensor, counts: np.ndarray) -> Tensor:
        """Gradient [k, B, q] of those outputs -> that of the rows, [k, B, p]."""
        return d.bmm(weight[: len(d)])

    def sums(
        self, d: Tensor, a: Tensor, counts: np.ndarray, weight: Tensor, bias: Tensor | None
    ) -> Callable[[int], None]:
        """What writes a client's d^T a to ``weight`` [q, p], and the sum of its d to ``bias``, if any."""
        # all clients' views by one call each: of the few rows of one a call costs as much as the product
        sizes = [n for count in counts.tolist() for n in (count, d.shape[1] - count)]
        columns = d.flatten(0, 1).T.split_with_sizes(sizes, 1)[::2]
        rows = a.flatten(0, 1).split_with_sizes(sizes)[::2]

        def write(k: int) -> None:
            torch.mm(columns[k], rows[k], out=weight)
            if bias is not None:
                torch.sum(columns[k], 1, out=bias)

        return write

    visits: ClassVar[Visits | None] = None
    """Whole visits in one call; none: by torch that would be what the layers do, step by step."""

    behind: ClassVar[Behind | None] = None
    """Likewise."""

    clips: ClassVar[MakesClips | None] = None
    """Steps of one client after another; none: by torch a client's few rows are too many calls."""

    def sparse(self, x: Tensor, most: float) -> Lean | None:
        """The matrix x [N, n] without its zeros; None: more than ``most`` are not 0, or nobody can."""
        return None


def ops_for(like: Tensor) -> Ops:
    """The operations for tensors like this one: loops where there are any, else torch."""
    known = like.is_cpu and like.dtype in (torch.float32, torch.float64)
    found: Any = loops("fedtorch.kernels.loops") if known else None
    return cast(Ops, found.Loops()) if found else Ops()


def masked(d: Tensor, a: Tensor) -> Tensor:
    """The gradient of a ReLU that put out ``a``, in d's memory."""
    torch.ops.aten.threshold_backward.grad_input(d, a, 0, grad_input=d)
    return d


def large(rows: int, weight: Tensor) -> bool:
    """Whether a product of so many rows and this weight is worth the way to bfloat16 and back."""
    return rows * weight.numel() >= LARGE


class Shared:
    """A weight [q, p] and a bias [q], if there is one, by which all clients' rows are multiplied."""

    def __init__(self, weight: Tensor, bias: Tensor | None, half: bool = False) -> None:
        """``half``: in bfloat16 where that is worth it."""
        self.weight, self.bias = weight, bias
        self.wide = weight.bfloat16() if half else None

    def __call__(self, a: Tensor) -> Tensor:
        """[..., p] -> [..., q]."""
        rows = a.flatten(0, -2)
        if self.wide is not None and large(len(rows), self.weight):
            out = (rows.bfloat16() @ self.wide.T).float()
            out = out if self.bias is None else out.add_(self.bias)
        elif len(rows) < 2 * TALL:
            out = F.linear(rows, self.weight, self.bias)
        else:
            out = rows.new_empty(len(rows), len(self.weight))
            for some, into in zip(rows.split(TALL), out.split(TALL), strict=True):
                torch.mm(some, self.weight.T, out=into)
            out = out if self.bias is None else out.add_(self.bias)
        return out.view(*a.shape[:-1], len(self.weight))
