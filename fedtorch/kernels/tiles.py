"""Blocks of matrix products whose sums stay in registers, written out for so many rows and columns.

A compiler keeps such sums in memory. However large a block is, each sum is taken in the same order: its
size hangs on how many registers a processor has, and decides nothing but speed.
"""

from collections.abc import Sequence
from functools import partial
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

SIDE = 4
"""Rows of the other matrix that rows are multiplied with at once."""


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

    def registers(self, row: Any, q: Any, t: Any, across: int) -> list[Any]:
        """Places of so many registers, of a row of q numbers and from column t on."""
        first = self.b.add(self.b.mul(row, q), t)
        return [self.after(first, WIDTH * c) for c in range(across)]

    def row(self, array: Any, at: Sequence[Any], m: Any) -> list[Any]:
        """The registers of a row; ``m``: numbers in it, if it is one of fewer than all."""
        return [read(self.context, self.b, self.kind, array, place, m) for place in at]

    def put(self, array: Any, at: Sequence[Any], m: Any, values: Sequence[Any]) -> None:
        """Write them."""
        for place, value in zip(at, values, strict=True):
            write(self.context, self.b, self.kind, array, place, value, m)

    def factors(self, array: Any, at: Any, many: int) -> list[Any]:
        """So many single numbers, each in all lanes."""
        first = make_array(self.kind)(self.context, self.b, array).data
        vector = ir.VectorType(self.context.get_value_type(self.kind.dtype), WIDTH)
        places = [self.b.gep(first, [self.after(at, n)]) for n in range(many)]
        return [repeated(self.b, self.b.load(place), vector) for place in places]

    def add(self, slots: Sequence[Any], factors: Any, values: Sequence[Any]) -> None:
        """To each slot its value times the factor, or its own factor."""
        for slot, value in zip(slots, values, strict=True):
            self.b.store(plus_product(self.b, self.b.load(slot), factors, value), slot)


def backward(rows: int, across: int) -> Any:
    """A block of weights, so many rows and registers; of a row of one register some numbers will do."""

    @operation(
        lambda w, v, d, a, down, B, out, q, o, t, m, keep, passes: types.void(
            w, v, d, a, down, *[types.uintp] * 6, w.dtype, types.boolean
        )
    )
    def block(
        context: Any, b: Any, kind: Any,
        w: Any, v: Any, d: Any, a: Any, down: Any, B: Any, out: Any, q: Any, o: Any, t: Any, m: Any,
        keep: Any, passes: Any,
    ) -> None:  # fmt: skip
        """Row o and column t on of v [out, q], for d [B, out] and a [B, q]: down [B, q] += d v, if wanted.

        And then w <- keep v - d^T a; w may be v.
        """
        code, some = Code(context, b, kind), m if across == 1 else None
        at = partial(code.registers, q=q, t=t, across=across)
        places = [at(code.after(o, r)) for r in range(rows)]
        weights = [code.row(v, place, some) for place in places]
        with b.if_then(passes), cgutils.for_range(b, B, intp=q.type) as loop:
            sums = code.row(down, at(loop.index), some)
            each = code.factors(d, b.add(b.mul(loop.index, out), o), rows)
            for u, row in zip(each, weights, strict=True):
                sums = [plus_product(b, s, u, v) for s, v in zip(sums, row, strict=True)]
            code.put(down, at(loop.index), some, sums)
        times = repeated(b, keep, weights[0][0].type)
        slots = [[cgutils.alloca_once_value(b, b.fmul(times, v)) for v in row] for row in weights]
        with cgutils.for_range(b, B, intp=q.type) as loop:
            seen = code.row(a, at(loop.index), some)
            each = code.factors(d, b.add(b.mul(loop.index, out), o), rows)
            for u, row in zip(each, slots, strict=True):
                code.add(row, b.fneg(u), seen)
        for place, row in zip(places, slots, strict=True):
            code.put(w, place, some, [b.load(slot) for slot in row])

    return block


def outer(rows: int, across: int) -> Any:
    """A block of a gradient, so many rows and registers; of a row of one register some numbers will do."""

    @operation(lambda g, d, a, B, out, q, o, t, m: types.void(g, d, a, *[types.uintp] * 6))
    def block(
        context: Any, b: Any, kind: Any,
        g: Any, d: Any, a: Any, B: Any, out: Any, q: Any, o: Any, t: Any, m: Any,
    ) -> None:  # fmt: skip
        """Row o and column t on of d^T a [out, q], for d [B, out] and a [B, q]: written to g."""
        code, some = Code(context, b, kind), m if across == 1 else None
        at = partial(code.registers, q=q, t=t, across=across)
        zero = ir.Constant(ir.VectorType(context.get_value_type(kind.dtype), WIDTH), None)
        slots = [[cgutils.alloca_once_value(b, zero) for _ in range(across)] for _ in range(rows)]
        with cgutils.for_range(b, B, intp=q.type) as loop:
            seen = code.row(a, at(loop.index), some)
            each = code.factors(d, b.add(b.mul(loop.index, out), o), rows)
            for u, row in zip(each, slots, strict=True):
                code.add(row, u, seen)
        for r, row in enumerate(slots):
            code.put(g, at(code.after(o, r)), some, [b.load(slot) for slot in row])

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

        def add(t: Any, some: Any) -> None:
            seen = code.row(w, [b.add(n, t) for n in met], some)
            for u, row in zip(code.row(x, [b.add(n, t) for n in given], some), slots, strict=True):
                code.add(row, u, seen)

        whole, left = (f(q, code.number(WIDTH)) for f in (b.udiv, b.urem))
        with cgutils.for_range(b, whole, intp=q.type) as loop:
            add(b.mul(loop.index, code.number(WIDTH)), None)
        with b.if_then(b.icmp_unsigned(">", left, code.number(0))):
            add(b.sub(q, left), left)
        for k in range(0, rows, 2):
            two = slots[k], slots[min(k + 1, rows - 1)]
            sums = together(b, [b.load(slot) for row in two for slot in row])
            sums = b.fadd(sums, repeated(b, extra, vector))
            for n in range(min(2, rows - k)):
                turned = [(SIDE * n + lane) % WIDTH for lane in range(WIDTH)]
                to = b.add(b.add(begin, b.mul(code.after(i, k + n), apart)), j)
                code.put(z, [to], m, [shuffled(b, sums, sums, turned)])

    return block
