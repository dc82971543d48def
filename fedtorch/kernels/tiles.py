"""Blocks of matrix products whose sums stay in registers, written out for so many rows and columns.

A compiler keeps such sums in memory. However large a block is, each sum is taken in the same order: its
size hangs on how many registers a processor has, and decides nothing but speed.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.np.arrayobj import make_array

from fedtorch.kernels.vector import (
    HALVES,
    WIDTH,
    operation,
    plus_product,
    read,
    repeated,
    shuffled,
    together,
    write,
)

ROWS, ACROSS = (2, 2) if HALVES else (5, 4)
"""Rows of a block and registers of each: with what they meet they fill AVX-512's 32, or AVX2's 16."""

HALF = WIDTH // 2

listing = types.Array(types.uintp, 1, "C")

SIDE = 4
"""Rows of the other matrix that rows are multiplied with at once."""


class Span(NamedTuple):
    """A register of a row."""

    column: int
    lanes: int = WIDTH
    some: bool = False
    """Whether only the first numbers of it are there."""


def spans(across: int, more: bool = False) -> list[Span]:
    """So many registers, of a single one some numbers; ``more``: some of half a register behind them."""
    whole = [Span(WIDTH * c, WIDTH, across == 1) for c in range(across)]
    return whole + ([Span(WIDTH * across, HALF, True)] if more else [])


class Code(NamedTuple):
    """Where code is being written, for arrays of one kind."""

    context: Any
    b: Any
    kind: Any

    def number(self, n: int) -> Any:
        """A place, or a distance."""
        return self.context.get_constant(types.uintp, n)

    def after(self, place: Any, n: int) -> Any:
        """The place so much further on."""
        return self.b.add(place, self.number(n))

    def registers(self, row: Any, q: Any, t: Any, spans: Sequence[Span]) -> list[Any]:
        """Places of the registers of a row of q numbers and from column t on."""
        first = self.b.add(self.b.mul(row, q), t)
        return [self.after(first, span.column) for span in spans]

    def row(self, array: Any, at: Sequence[Any], m: Any, spans: Sequence[Span]) -> list[Any]:
        """The registers of a row; ``m``: numbers in one of which only some are there."""
        every = zip(at, spans, strict=True)
        given = self.context, self.b, self.kind, array
        return [read(*given, place, m if s.some else None, s.lanes) for place, s in every]

    def put(
        self, array: Any, at: Sequence[Any], m: Any, values: Sequence[Any], spans: Sequence[Span]
    ) -> None:
        """Write them."""
        for place, value, span in zip(at, values, spans, strict=True):
            some = m if span.some else None
            write(self.context, self.b, self.kind, array, place, value, some)

    def factors(self, array: Any, at: Sequence[Any]) -> list[Any]:
        """Single numbers, each in all lanes."""
        first = make_array(self.kind)(self.context, self.b, array).data
        vector = ir.VectorType(self.context.get_value_type(self.kind.dtype), WIDTH)
        places = [self.b.gep(first, [place]) for place in at]
        return [repeated(self.b, self.b.load(place), vector) for place in places]

    def add(self, slots: Sequence[Any], factors: Any, values: Sequence[Any]) -> None:
        """To each slot its value times the factor, or its own factor."""
        for slot, value in zip(slots, values, strict=True):
            total = self.b.load(slot)
            self.b.store(plus_product(self.b, total, self.narrow(factors, value), value), slot)

    def narrow(self, v: Any, like: Any) -> Any:
        """As many lanes of v as there are in another register."""
        many = like.type.count
        return v if many == WIDTH else shuffled(self.b, v, v, [*range(many)])


def backward(rows: int, across: int, more: bool = False) -> Any:
    """A block of weights, so many rows and registers, as ``spans`` has them."""
    wide = spans(across, more)

    @operation(
        lambda w, v, d, a, down, of, B, out, q, o, t, m, keep, passes: types.void(
            w, v, d, a, down, of, *[types.uintp] * 6, w.dtype, types.boolean
        )
    )
    def block(
        context: Any, b: Any, kind: Any,
        w: Any, v: Any, d: Any, a: Any, down: Any, of: Any, B: Any, out: Any, q: Any, o: Any, t: Any,
        m: Any, keep: Any, passes: Any,
    ) -> None:  # fmt: skip
        """Rows from column t on of v [out, q], for d [B, out] and a [B, q]: down [B, q] += d v, if wanted.

        And then w <- keep v - d^T a; w may be v. The rows are those that ``of`` names from its o-th on.
        """
        code = Code(context, b, kind)
        at = partial(code.registers, q=q, t=t, spans=wide)
        listed = make_array(listing)(context, b, of).data
        own = [b.load(b.gep(listed, [code.after(o, r)])) for r in range(rows)]
        places = [at(row) for row in own]
        weights = [code.row(v, place, m, wide) for place in places]
        with b.if_then(passes), cgutils.for_range(b, B, intp=q.type) as loop:
            sums = code.row(down, at(loop.index), m, wide)
            each = code.factors(d, [b.add(b.mul(loop.index, out), row) for row in own])
            for u, row in zip(each, weights, strict=True):
                both = zip(sums, row, strict=True)
                sums = [plus_product(b, s, code.narrow(u, v), v) for s, v in both]
            code.put(down, at(loop.index), m, sums, wide)
        slots = [[cgutils.alloca_once_value(b, v) for v in row] for row in weights]
        with b.if_then(b.fcmp_unordered("!=", keep, ir.Constant(keep.type, 1.0))):
            times = repeated(b, keep, weights[0][0].type)
            for slot, v in zip(chain(*slots), chain(*weights), strict=True):
                b.store(b.fmul(code.narrow(times, v), v), slot)
        with cgutils.for_range(b, B, intp=q.type) as loop:
            seen = code.row(a, at(loop.index), m, wide)
            each = code.factors(d, [b.add(b.mul(loop.index, out), row) for row in own])
            for u, row in zip(each, slots, strict=True):
                code.add(row, b.fneg(u), seen)
        for place, row in zip(places, slots, strict=True):
            code.put(w, place, m, [b.load(slot) for slot in row], wide)

    return block


def outer(rows: int, across: int) -> Any:
    """A block of a gradient, so many rows and registers, as ``spans`` has them."""
    wide = spans(across)

    @operation(lambda g, d, a, B, out, q, o, t, m: types.void(g, d, a, *[types.uintp] * 6))
    def block(
        context: Any, b: Any, kind: Any,
        g: Any, d: Any, a: Any, B: Any, out: Any, q: Any, o: Any, t: Any, m: Any,
    ) -> None:  # fmt: skip
        """Row o and column t on of d^T a [out, q], for d [B, out] and a [B, q]: written to g."""
        code = Code(context, b, kind)
        at = partial(code.registers, q=q, t=t, spans=wide)
        zero = ir.Constant(ir.VectorType(context.get_value_type(kind.dtype), WIDTH), None)
        slots = [[cgutils.alloca_once_value(b, zero) for _ in range(across)] for _ in range(rows)]
        with cgutils.for_range(b, B, intp=q.type) as loop:
            seen = code.row(a, at(loop.index), m, wide)
            first = b.add(b.mul(loop.index, out), o)
            each = code.factors(d, [code.after(first, r) for r in range(rows)])
            for u, row in zip(each, slots, strict=True):
                code.add(row, u, seen)
        for r, row in enumerate(slots):
            code.put(g, at(code.after(o, r)), m, [b.load(slot) for slot in row], wide)

    return block


def dots(rows: int) -> Any:
    """Products of so many rows of a matrix with ``SIDE`` of another."""

    @operation(
        lambda x, w, z, begin, apart, q, i, j, e, m, extra: types.void(
            x, w, z, *[types.uintp] * 7, z.dtype
        )
    )
    def block(
        context: Any, b: Any, kind: Any,
        x: Any, w: Any, z: Any, begin: Any, apart: Any, q: Any, i: Any, j: Any, e: Any, m: Any, extra: Any,
    ) -> None:  # fmt: skip
        """Rows of x [B, q] from i on with those of w [e, q] from j on, plus ``extra``: written to z.

        Its first row begins at ``begin``, the next ``apart`` from there; ``m`` columns of these four.
        """
        code, last = Code(context, b, kind), b.sub(e, context.get_constant(types.uintp, 1))
        others = [code.after(j, n) for n in range(SIDE)]
        # where there are fewer, the last of them comes again
        others = [b.select(b.icmp_unsigned("<", n, e), n, last) for n in others]
        given = [b.mul(code.after(i, n), q) for n in range(rows)]
        met = [b.mul(n, q) for n in others]
        vector = ir.VectorType(context.get_value_type(kind.dtype), WIDTH)
        zero = ir.Constant(vector, None)
        slots = [[cgutils.alloca_once_value(b, zero) for _ in met] for _ in given]

        def add(t: Any, left: Any = None) -> None:
            some = Span(0, WIDTH, left is not None)
            seen, own = (
                code.row(of, [b.add(n, t) for n in at], left, [some] * len(at))
                for of, at in ((w, met), (x, given))
            )
            for u, row in zip(own, slots, strict=True):
                code.add(row, u, seen)

        whole, left = (f(q, code.number(WIDTH)) for f in (b.udiv, b.urem))
        with cgutils.for_range(b, whole, intp=q.type) as loop:
            add(b.mul(loop.index, code.number(WIDTH)))
        with b.if_then(b.icmp_unsigned(">", left, code.number(0))):
            add(b.sub(q, left), left)
        whole = b.icmp_unsigned("==", m, code.number(SIDE))
        for k in range(0, rows, 2):
            both = [[b.load(slot) for slot in slots[min(k + n, rows - 1)]] for n in (0, 1)]
            sums = together(b, both)
            sums = b.fadd(sums, repeated(b, extra, sums.type))
            for n in range(min(2, rows - k)):
                own = shuffled(b, sums, sums, [SIDE * n + lane for lane in range(SIDE)])
                to = b.add(b.add(begin, b.mul(code.after(i, k + n), apart)), j)
                with b.if_else(whole) as (every, fewer):
                    with every:
                        code.put(z, [to], m, [own], [Span(0, SIDE)])
                    with fewer:
                        code.put(z, [to], m, [own], [Span(0, SIDE, True)])

    return block
