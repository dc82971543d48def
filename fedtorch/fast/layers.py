"""The arithmetic of many clients' linear layers in lock-step: no autograd, no gradient that is kept.

All clients of a chunk do their t-th local step together. In each step a layer is asked three things:
``forward`` (inputs a -> outputs z), ``backward`` (gradient d of z -> gradient of a) and ``step`` (move the
weights). Tensors are [k, B, ...]: the k clients still training, B examples each. Rows of ``d`` come
multiplied by learning rate and 1 / batch size already, so that a plain step is ``w <- w - d^T a``.

There are two ways to hold a linear layer's weights:

* ``Own``: each client has a copy [K, out, in]. The step is one ``baddbmm_`` into the weights; the gradient
  itself is never written.
* ``Dual``: nobody has a copy. After some steps a client's weight is w0 - D^T A, where the rows of A are the
  inputs it has seen and the rows of D the scaled gradients that came back. So it puts out, and passes down,

      a W^T = a w0^T - (a A^T) D        d W = d w0 - (d D^T) A

  The first term is one large product for all clients together; the second needs only small Gram matrices.
  The bias is a column of ones in A, hence the + 1. This is exact, not an approximation, and it pays while
  a client takes fewer rows than the layer is wide. ``docs/fast-path.md`` derives it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedtorch.fast.read import Linear
from fedtorch.types import Params, Stack


@dataclass(frozen=True)
class Rule:
    """One step of SGD: v <- momentum v + g + decay w + pull (w - w0) + shift;  w <- w - lr v."""

    lr: float
    momentum: float = 0.0
    decay: float = 0.0
    """Weight decay."""
    pull: float = 0.0
    """FedProx's mu."""

    @property
    def keep(self) -> float:
        """What a step without momentum leaves of w, before the gradient."""
        return 1 - self.lr * (self.decay + self.pull)


class Layer(Protocol):
    """What the lock-step asks of anything between input and output."""

    def forward(self, a: Tensor) -> Tensor:
        """Inputs of this step [k, B, ...] -> outputs."""

    def backward(self, d: Tensor) -> Tensor:
        """Gradient of the outputs -> gradient of the inputs."""

    def step(self, d: Tensor) -> None:
        """Move the weights, if there are any, by the gradient d^T a of this step's inputs."""


class Weights(Layer, Protocol):
    """What is left of a layer with parameters after the visit."""

    def stack(self) -> Stack:
        """The clients' weights by name, [K, ...]."""

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each client's change, [K]; not finite where the change is not.

        ``upper``: never less than the norm is, whatever float32 rounded away.
        """

    def weighted_sum(self, weight: Tensor) -> Params:
        """Sum over clients of ``weight[k]`` times the change; a client of weight 0 stays out."""


class Leaf:
    """One parameter of which every client has its own copy, [K, rows, columns]."""

    def __init__(self, start: Tensor, clients: int, rule: Rule, shift: Tensor | None) -> None:
        self.start, self.rule = start, rule
        self.value = start.expand(clients, *start.shape).clone()
        self.shift = None if shift is None else shift.reshape(self.value.shape)
        self.velocity = torch.zeros_like(self.value) if rule.momentum else None

    def step(self, x: Tensor, y: Tensor) -> None:
        """Move by the gradient x @ y (times lr already, unless there is momentum)."""
        k, rule = len(x), self.rule
        w, shift = self.value[:k], None if self.shift is None else self.shift[:k]
        if self.velocity is None:
            w.baddbmm_(x, y, beta=rule.keep, alpha=-1)
            if rule.pull:
                w.add_(self.start, alpha=rule.lr * rule.pull)
            if shift is not None:
                w.add_(shift, alpha=-rule.lr)
            return
        v = self.velocity[:k].baddbmm_(x, y, beta=rule.momentum)
        if rule.decay or rule.pull:
            v.add_(w, alpha=rule.decay + rule.pull)
        if rule.pull:
            v.add_(self.start, alpha=-rule.pull)
        if shift is not None:
            v.add_(shift)
        w.add_(v, alpha=-rule.lr)

    def move(self, g: Tensor) -> None:
        """The same step for a gradient that had to be written out, because noise was added to it."""
        rule, w = self.rule, self.value
        g = g.view(w.shape)
        if rule.decay or rule.pull:
            g = g.add(w, alpha=rule.decay + rule.pull)
        if rule.pull:
            g.add_(self.start, alpha=-rule.pull)
        if self.shift is not None:
            g = g + self.shift
        if self.velocity is not None:
            g = self.velocity.mul_(rule.momentum).add_(g)
        w.add_(g, alpha=-rule.lr)

    def change(self) -> Tensor:
        """Weights minus start, [K, numbers]."""
        return (self.value - self.start).flatten(1)


class Own:
    """A linear layer of which every client has its own copy."""

    def __init__(
        self, spec: Linear, weight: Leaf, bias: Leaf | None, data: Tensor | None = None
    ) -> None:
        """A first layer gets the ``data``, [N, in], of which its inputs are rows."""
        self.spec, self.weight, self.bias, self.data = spec, weight, bias, data

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] (or row numbers [k, B] of the data) -> [k, B, out]."""
        self.a = a = a if self.data is None else self.data[a]
        w = self.weight.value[: len(a)].mT
        return a.bmm(w) if self.bias is None else torch.baddbmm(self.bias.value[: len(a)], a, w)

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]."""
        return d.bmm(self.weight.value[: len(d)])

    def step(self, d: Tensor) -> None:
        """The step, fused into the product that would have been the gradient."""
        self.weight.step(d.mT, self.a)
        if self.bias is not None:
            self.bias.step(d.new_ones(1, 1, 1).expand(len(d), 1, d.shape[1]), d)

    def example_sq_norms(self, d: Tensor) -> Tensor:
        """Squared norm of each example's own gradient d a^T, [K, B], which is never built."""
        return d.square().sum(2) * (self.a.square().sum(2) + (self.bias is not None))

    def sums(self, d: Tensor, used: Tensor) -> Stack:
        """Sum of the examples' gradients, [K, ...]; examples not ``used`` may hold NaN."""
        a = self.a if used.all() else torch.where(used[..., None], self.a, 0)
        return self.spec.named(d.mT.bmm(a), d.sum(1))

    def move(self, grads: Stack) -> None:
        """Step by gradients that are clipped and noised."""
        self.weight.move(grads[self.spec.weight])
        if self.bias is not None:
            self.bias.move(grads[self.spec.bias or ""])

    def stack(self) -> Stack:
        """The copies."""
        bias = None if self.bias is None else self.bias.value[:, 0]
        return self.spec.named(self.weight.value, bias)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of weight and bias together."""
        leaves = [self.weight, *([self.bias] if self.bias else [])]
        norms = torch.stack([leaf.change().square().sum(1) for leaf in leaves]).sum(0)
        return norms * (1 + 1e-5) if upper else norms

    def weighted_sum(self, weight: Tensor) -> Params:
        """Clients left out may hold anything, NaN too, so they are not multiplied by 0."""
        on = weight != 0

        def total(leaf: Leaf) -> Tensor:
            change = leaf.change() if on.all() else leaf.change()[on]
            return (weight[on] @ change).view(leaf.start.shape)

        bias = None if self.bias is None else total(self.bias)[0]
        return self.spec.named(total(self.weight), bias)


class Seen:
    """Inputs of a hidden layer, written down as they come: A, [K, T, in]."""

    def __init__(self, clients: int, rows: int, like: Tensor, bias: bool) -> None:
        self.A = like.new_zeros(clients, rows, like.shape[1])
        self.one, self.size = float(bias), (clients, rows)

    def outputs(self, a: Tensor, s: int, w0: Tensor, b0: Tensor | None) -> Tensor:
        """What w0 alone gives for this step's inputs: one product over all clients."""
        self.a = a
        self.A[: len(a), s : s + a.shape[1]] = a
        return affine(a, w0, b0)

    def gram(self, s: int) -> Tensor:
        """This step's inputs times those of the ``s`` rows before, [k, B, s]."""
        return self.a.bmm(self.A[: len(self.a), :s].mT).add_(self.one)

    def grams(self) -> Tensor:
        """All inputs times each other, [K, T, T]."""
        return self.A.bmm(self.A.mT).add_(self.one)

    def rows(self) -> Tensor:
        """All inputs, [K, T, in]."""
        return self.A

    def outer(self, D: Tensor) -> Tensor:
        """Sum over clients of D^T A, [out, in]."""
        return D.flatten(0, 1).T @ self.A.flatten(0, 1)


class Known:
    """Inputs of a first layer: the data, there before the visit starts.

    So the product with w0 is taken once for every example, however many epochs follow, and the Gram
    matrices depend on a client's data alone and may be kept from round to round.
    """

    def __init__(self, x: Tensor, index: Tensor, grams: Tensor) -> None:
        """Examples of all clients [N, in], rows that each takes [K, T], their products [K, T, T]."""
        self.x, self.index, self.all = x, index, grams
        self.size = index.shape
        self.z: Tensor | None = None

    def outputs(self, a: Tensor, s: int, w0: Tensor, b0: Tensor | None) -> Tensor:
        """``a`` is the index of this step's rows, of which only the shape matters here."""
        if self.z is None:
            self.z = affine(self.x, w0, b0)[self.index]
        self.k, self.e = len(a), s + a.shape[1]
        return self.z[: self.k, s : self.e]

    def gram(self, s: int) -> Tensor:
        """Looked up."""
        return self.all[: self.k, s : self.e, :s]

    def grams(self) -> Tensor:
        """Known from the start."""
        return self.all

    def rows(self) -> Tensor:
        """The examples in the order they were taken."""
        return self.x[self.index]

    def outer(self, D: Tensor) -> Tensor:
        """Rows of the same example are added up first."""
        total = D.new_zeros(len(self.x), D.shape[2])
        return total.index_add_(0, self.index.flatten(), D.flatten(0, 1)).T @ self.x


class Dual:
    """A linear layer of which nobody has a copy: w0, the inputs A, and every client's rows D."""

    def __init__(
        self, spec: Linear, weight: Tensor, bias: Tensor | None, inputs: Seen | Known, rule: Rule
    ) -> None:
        self.spec, self.w0, self.b0, self.rule = spec, weight, bias, rule
        self.inputs = inputs
        K, T = inputs.size
        self.D = weight.new_zeros(K, T, weight.shape[0])
        self.s = 0
        """Rows so far."""
        self.kept, self.live = [1.0], [K]
        """After each step: the share of w0 left in the weights, and how many clients went on."""

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] -> [k, B, out]."""
        z = self.inputs.outputs(a, self.s, self.w0, self.b0)
        if self.kept[-1] != 1.0:
            z = z * self.kept[-1]
        if not self.s:
            return z
        return torch.baddbmm(z, self.inputs.gram(self.s), self.D[: len(z), : self.s], alpha=-1)

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]."""
        k, s = len(d), self.s
        t: Tensor = (d.flatten(0, 1) @ self.w0).unflatten(0, d.shape[:2])
        if self.kept[-1] != 1.0:
            t.mul_(self.kept[-1])
        if not s:
            return t
        return t.baddbmm_(d.bmm(self.D[:k, :s].mT), self.inputs.rows()[:k, :s], alpha=-1)

    def step(self, d: Tensor) -> None:
        """Write the rows down; with decay those before count less."""
        k, s, rule = len(d), self.s, self.rule
        if rule.keep != 1.0:
            self.D[:k, :s].mul_(rule.keep)
        self.kept.append(rule.keep * self.kept[-1] + rule.lr * rule.pull)
        self.live.append(k)
        self.s = s + d.shape[1]
        self.D[:k, s : self.s] = d

    def stack(self) -> Stack:
        """The copies after all, for a strategy that wants to see them."""
        share = self._share()[:, None, None]
        bias = None if self.b0 is None else self.b0 * share[:, 0] - self.D.sum(1)
        return self.spec.named(self.w0 * share - self.D.mT.bmm(self.inputs.rows()), bias)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """|D^T A|^2 = sum of (A A^T) * (D D^T): the change is not built for its norm either.

        Products of n numbers err by at most n 2^-24 times the lengths multiplied, which bounds the
        whole sum however much cancels in it.
        """
        A, D = self.inputs.grams(), self.D.bmm(self.D.mT)
        norms = (A * D).sum((1, 2))
        if upper:
            most = (A.diagonal(0, 1, 2) * D.diagonal(0, 1, 2)).clamp(min=0).sqrt().sum(1).square()
            norms = norms.clamp(min=0) + most * (sum(self.w0.shape) + len(A[0])) * 2.0**-24
        if self.kept[-1] != 1.0:  # then the change has a part (share - 1) w0 as well
            lost = self._share() - 1
            size = self.w0.square().sum() + (0 if self.b0 is None else self.b0.square().sum())
            outputs = affine(self.inputs.rows(), self.w0, self.b0)
            norms += lost * lost * size - 2 * lost * (outputs * self.D).sum((1, 2))
        return norms

    def weighted_sum(self, weight: Tensor) -> Params:
        """One large product for all clients."""
        on = weight != 0
        D = self.D * weight[:, None, None]
        if on.all():
            total = self.inputs.outer(D)
        else:  # who stays out may hold NaN, which times 0 is NaN again
            D = D[on]
            total = D.flatten(0, 1).T @ self.inputs.rows()[on].flatten(0, 1)
        lost = float((weight * (self._share() - 1)).sum())
        bias = None if self.b0 is None else (self.b0 * lost).sub_(D.sum((0, 1)))
        return self.spec.named(total.neg_().add_(self.w0, alpha=lost), bias)

    def _share(self) -> Tensor:
        # a client that stopped earlier kept more of w0
        share = self.w0.new_ones(len(self.D))
        for k, kept in zip(self.live, self.kept, strict=True):
            share[:k] = kept
        return share


def affine(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """A w^T + b over all leading axes as one product."""
    flat = a.reshape(-1, a.shape[-1])
    z = flat @ w.T if b is None else torch.addmm(b, flat, w.T)
    return z.view(*a.shape[:-1], len(w))
