"""Linear layers of which no client has a copy.

After some steps a client's weight is w0 - D^T A, where the rows of A are the inputs it has seen and the
rows of D the scaled gradients that came back. So it puts out, and passes down,

    a W^T = a w0^T - (a A^T) D        d W = d w0 - (d D^T) A

The first term is one large product for all clients together; the second needs only small Gram matrices.
The bias is a column of ones in A, hence a 1 added to them. This is exact, not an approximation, and it
pays while a client takes fewer rows than the layer is wide. ``docs/fast-path-math.md`` derives it.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from fedtorch.fast.apart import Apart, norms_of, sum_of
from fedtorch.fast.chunk_data import Rows, taken
from fedtorch.fast.layers import Rule
from fedtorch.fast.ops import Ops, Shared, large, masked
from fedtorch.fast.reader import Linear
from fedtorch.fast.several import Each
from fedtorch.fast.several import Weights as Several
from fedtorch.fast.tuning import RATE_ALL, RATE_COPIES, RATE_MET, RATE_WRITTEN
from fedtorch.tree import exact_sq_norms
from fedtorch.types import Params, Stack


class Share:
    """How much of w0 is left in the clients' weights: weight decay and the proximal pull take from it."""

    def __init__(self, rule: Rule, weight: Tensor, clients: int, now: float = 1.0) -> None:
        """So much (``now``) of w0 is in the ``weight`` of so many clients before the first step."""
        self.rule, self.now, self.each = rule, now, weight.new_full((clients,), now)

    def step(self, clients: int) -> None:
        """One step of the first ``clients``; the others have stopped."""
        if self.rule.keep != 1.0:
            self.now = self.rule.keep * self.now + self.rule.lr * self.rule.pull
            self.each[:clients] = self.now


class Dual:
    """What both kinds have in common: w0, and what is left of the visit in the end."""

    def __init__(
        self,
        spec: Linear,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        clients: int,
        half: bool,
        own: Apart | None = None,
    ) -> None:
        """``half``: large products in bfloat16; ``own``: what each client has beside w0."""
        self.spec, self.w0, self.b0, self.rule, self.own = spec, weight, bias, rule, own
        self.share = Share(rule, weight, clients, 0.0 if own and own.starts else 1.0)
        self.half = half
        self.s = 0
        """Rows so far."""
        self.end = ""
        """ "relu" if one follows, which comes cheaper here than as a layer of its own."""
        self.mask = ""
        """ "mask" if the layer before ends in one."""

    def known(self, rows: Rows) -> Tensor:
        """Outputs for all examples of w0, [N, out]."""
        if rows.sparse is None:
            return Shared(rows.near(self.w0), self.b0, self.half)(rows.slim)
        return rows.sparse[0].times(self.w0.T, self.b0)

    def coarse(self, rows: int, exact: bool) -> bool:
        """Whether the sum over so many rows is taken in bfloat16."""
        return self.half and not exact and large(rows, self.w0)

    def released(self, total: Tensor, bias: Tensor, weight: Tensor) -> Params:
        """Sums of weighted -D^T A and of its rows -> the sum of the clients' changes by name."""
        if self.rule.keep != 1.0:
            lost = float((weight * (self.share.each - 1)).sum())
            total.add_(self.w0, alpha=lost)
            bias = bias if self.b0 is None else bias.add_(self.b0, alpha=lost)
        return self.spec.named(total, None if self.b0 is None else bias)

    def stepped(self, clients: int, rows: int) -> None:
        """So many clients have taken so many rows more."""
        self.share.step(clients)
        if self.own:
            self.own.step(clients)
        self.s += rows

    def beside(self, own: Apart, pairs: tuple[Tensor, Sequence[Tensor]], less: float) -> Stack:
        """The copies after all, less ``less`` times w0, where clients have something of their ``own``.

        ``pairs``: D [K, n, out], and each client's A.
        """
        return own.written(pairs, (self.w0, self.b0, self.share.each - less))

    def copies(self, change: Tensor, D: Tensor) -> Stack:
        """D^T A for each client -> the copies after all, for a strategy that wants to see them."""
        left = self.share.each[:, None, None]
        bias = None if self.b0 is None else self.b0 * left[:, 0] - D.sum(1)
        return self.spec.named(self.w0 * left - change, bias)

    def bounded(self, norms: Tensor, a: Tensor, d: Tensor) -> Tensor:
        """Squared norms [K] as they came out -> what they are at most, for |a|^2 and |d|^2 [K, T].

        Products of n numbers err by at most n 2^-24 times the lengths multiplied, which bounds the
        whole sum however much cancels in it; and what vanished of them was below the smallest number.
        """
        out, inputs = (n * torch.finfo(self.w0.dtype).tiny for n in self.w0.shape)
        a, d = a.double().clamp(min=0) + inputs, d.double().clamp(min=0) + out
        most = (a * d).sqrt().sum(1).square()
        lost = out * a.sqrt().sum(1).square() + inputs * d.sqrt().sum(1).square()
        rows = d.shape[1] + sum(self.w0.shape)
        return norms.double().clamp(min=0) + most * rows * 2.0**-24 + lost

    def built_norms(self, copies: Stack) -> Tensor:
        """Squared norms of changes that had to be built: with decay no product of the visit bounds them."""
        start = self.spec.named(self.w0, self.b0)
        return torch.stack([exact_sq_norms(v - start[n]) for n, v in copies.items()]).sum(0)

    def lost_norms(self, outputs: Tensor, D: Tensor) -> Tensor:
        """What weight decay adds to the squared norms: the change has a part (share - 1) w0 as well."""
        lost = self.share.each - 1
        size = self.w0.square().sum() + (0 if self.b0 is None else self.b0.square().sum())
        return lost * lost * size - 2 * lost * (outputs * D).sum((1, 2))


class First(Dual):
    """The first layer, whose inputs are the clients' examples, known before the visit starts.

    The product with w0 is taken once for each example however many epochs follow, the Gram matrices are
    those of the data, and the rows of D belong to examples, not to steps.
    """

    def __init__(
        self,
        spec: Linear,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        rows: Rows,
        known: tuple[Tensor, tuple[Tensor, Tensor]],
        half: bool,
        each: Apart | Several | None = None,
    ) -> None:
        """``known``: Gram matrices [K, n, n], and the examples of each step, [K, T], as rows of x and as
        rows of the client's.
        """
        grams, places = known
        own, several = parted(each)
        super().__init__(spec, weight, bias, rule, len(grams), half, own)
        self.rows, self.grams = rows, grams
        self.outputs = several.known(rows) if several else self.known(rows)
        self.seen = rows.ops.coefficients(self.outputs, grams, places)
        self.D = self.seen.rows
        if own:  # each example meets it once, however many steps follow
            self.met = torch.cat([own.met(x, k) for k, x in enumerate(self.inputs)])

    def forward(self, a: Tensor) -> Tensor:
        """``a`` [k, B] are the rows of this step."""
        k, B = a.shape
        if not self.own:
            return self.seen.outputs(self.s, k, B, keep=self.share.now, end=self.end)
        z = self.seen.outputs(self.s, k, B, keep=self.share.now)
        z.add_(taken(self.met, a), alpha=self.own.now)
        return z.relu_() if self.end else z

    def step(self, d: Tensor) -> None:
        """Add the rows to those of their examples; with decay those before count less."""
        k, B = d.shape[:2]
        if self.rule.keep != 1.0:
            self.D[:k].mul_(self.rule.keep)
        self.seen.add(self.s, d)
        self.stepped(k, B)

    def written(self, less: float = 0.0) -> Stack:
        """Rows belong to examples."""
        return self.beside(cast(Apart, self.own), (self.D, self.inputs), less)

    @property
    def inputs(self) -> Sequence[Tensor]:
        """Each client's examples."""
        return torch.split(self.rows.flat, [*self.rows.sizes])

    @cached_property
    def changes(self) -> Stack:
        """Of each client, written down: who has something of its own keeps what becomes of it."""
        return self.written(1.0)

    def stack(self) -> Stack:
        """The copies."""
        if self.own:
            return self.written()
        return self.copies(self.D.mT.bmm(self.rows.spread(self.rows.flat)), self.D)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """|D^T X|^2 = sum of (X X^T) * (D D^T): the change is not built for its norm."""
        if self.own:
            return norms_of(self.changes, upper)
        if upper and self.rule.keep != 1.0:
            return self.built_norms(self.stack())
        norms = (self.grams * self.D.bmm(self.D.mT)).sum((1, 2))
        if upper:
            lengths = torch.linalg.vecdot(self.D, self.D)
            norms = self.bounded(norms, self.grams.diagonal(0, 1, 2), lengths)
        if self.rule.keep != 1.0:
            norms += self.lost_norms(self.rows.spread(self.outputs), self.D)
        return norms

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """One product for all clients; who stays out may hold NaN, which times 0 is NaN again."""
        if self.own:
            return sum_of(self.changes, weight)
        D, bias = weighed(self.D, weight)
        on, stay = weight != 0, None
        if not bool(on.all()):
            stay = on.repeat_interleave(torch.tensor(self.rows.sizes, device=on.device))
        D = self.rows.gather(D)
        total = self.rows.back(D, self.coarse(len(D), exact), stay)
        return self.released(total, bias, weight)


class Hidden(Dual):
    """A later layer, whose inputs are written down as they come: A [K, T, in], D [K, T, out].

    The products that a step needs are those that the norm needs in the end, so they are kept as well.
    """

    def __init__(
        self,
        spec: Linear,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        size: tuple[int, int],
        half: bool,
        ops: Ops,
        each: Apart | Several | None = None,
    ) -> None:
        """``size``: clients and rows they take."""
        own, several = parted(each)
        super().__init__(spec, weight, bias, rule, size[0], half, own)
        self.A = weight.new_zeros(*size, weight.shape[1])
        self.D = weight.new_zeros(*size, weight.shape[0])
        self.grams, self.products = (weight.new_zeros(*size, size[1]) for _ in range(2))
        self.one, self.B = float(bias is not None), size[1]
        self.up: Shared | Each = several.up() if several else Shared(weight, bias, half)
        self.down: Shared | Each = several.down() if several else Shared(weight.T, None, half)
        self.ops = ops

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] -> [k, B, out]."""
        self.B = a.shape[1]
        known, now = (self.A, self.grams, self.D), self.share.now
        if not self.own:
            return self.ops.append(self.up(a), a, known, self.s, self.one, now, self.end)
        z = self.ops.append(self.shared(self.up(a)), a, known, self.s, self.one, now)
        self.own.add_outputs(z, a)
        return z.relu_() if self.end else z

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]; the rows are written down here already, for their products."""
        known, now = (self.D, self.products, self.A), self.share.now
        if not self.own:
            return self.ops.append(self.down(d), d, known, self.s, 0.0, now, self.mask)
        t = self.ops.append(self.shared(self.down(d)), d, known, self.s, 0.0, now)
        t.baddbmm_(d, self.own.weight[: len(d)], alpha=self.own.now)
        return masked(t, self.A[: len(d), self.s : self.s + self.B]) if self.mask else t

    def shared(self, z: Tensor) -> Tensor:
        """Products with w0 for ``append``, which counts on the first of them to be whole."""
        return z if self.s else z.mul_(self.share.now)

    def step(self, d: Tensor) -> None:
        """With decay the rows before these count less."""
        k = len(d)
        if self.rule.keep != 1.0:
            self.D[:k, : self.s].mul_(self.rule.keep)
        self.stepped(k, d.shape[1])

    def written(self, less: float = 0.0) -> Stack:
        """Rows as they came."""
        return self.beside(cast(Apart, self.own), (self.D, self.A.unbind()), less)

    @cached_property
    def changes(self) -> Stack:
        """Likewise."""
        return self.written(1.0)

    def stack(self) -> Stack:
        """The copies."""
        if self.own:
            return self.written()
        return self.copies(self.D.mT.bmm(self.A), self.D)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """As above, from the products of the steps where there is no decay, which changes D."""
        if self.own:
            return norms_of(self.changes, upper)
        if upper and self.rule.keep != 1.0:
            return self.built_norms(self.stack())
        if self.rule.keep != 1.0:
            products = self.A.bmm(self.A.mT).add_(self.one) * self.D.bmm(self.D.mT)
            norms = products.sum((1, 2)) + self.lost_norms(self.up(self.A), self.D)
        else:  # each pair of rows of different steps is there once, and counts twice
            products = self.grams * self.products
            blocks = products.unflatten(2, (-1, self.B)).unflatten(1, (-1, self.B))
            same = blocks.diagonal(0, 1, 3).sum((1, 2, 3))
            norms = 2 * products.sum((1, 2)) - same
        if not upper:
            return norms
        return self.bounded(norms, *(g.diagonal(0, 1, 2) for g in (self.grams, self.products)))

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """One product for all clients; who stays out may hold NaN, which times 0 is NaN again."""
        if self.own:
            return sum_of(self.changes, weight)
        D, bias = weighed(self.D, weight)
        A, on = self.A, weight != 0
        if not bool(on.all()):
            A, D = A[on], D[on]
        A, D = A.flatten(0, 1), D.flatten(0, 1)
        half = self.coarse(len(D), exact)
        total = (D.bfloat16().T @ A.bfloat16()).float() if half else D.T @ A
        return self.released(total, bias, weight)


def parted(each: Apart | Several | None) -> tuple[Apart | None, Several | None]:
    """What each client has beside the shared weights, or weights that several of them share."""
    if isinstance(each, Several):
        return None, each
    return each, None


def weighed(D: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Clients' rows D [K, n, q] -> -weight[k] D[k] and their sum [q]; a weight of 0 makes 0 of anything."""
    out = D * -weight[:, None, None]
    if not bool(weight.all()):
        out[weight == 0] = 0
    return out, out.sum((0, 1))


def pays(rows: int, shape: tuple[int, int], examples: int | None = None) -> bool:
    """Whether a layer is cheaper without copies."""
    without, copies = costs(rows, shape, examples)
    return without < copies


def costs(rows: int, shape: tuple[int, int], examples: int | None = None) -> tuple[float, float]:
    """Without copies and with them, in nanoseconds a client at rates measured on one core.

    ``rows`` a client takes in a visit, each of its ``examples`` perhaps several times; those are known
    of the first layer only, which computes with each example once and needs no gradient of its inputs.
    Of other layers it is a row's share.
    """
    out, inputs = shape
    if examples is not None:
        # in the first pass a row meets, on average, half of the others
        others = (rows - min(rows, examples) / 2) * examples
        met = 4 * inputs * out * examples / RATE_ALL + 2 * others * out / RATE_MET
        return met, 4 * inputs * out * rows / RATE_COPIES
    written = 6 * inputs * out / RATE_ALL + 2 * rows * (inputs + out) / RATE_WRITTEN
    return written, 6 * inputs * out / RATE_COPIES
