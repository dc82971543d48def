"""Sixteen times sixteen numbers that stay in registers: sums that small products of matrices add to.

They are half of an AVX-512 processor's registers. Only compiled loops can call these functions; see
``lanes`` for what they are made of.
"""

from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.core.extending import models, register_model
from numba.np.arrayobj import make_array

from fedtorch.kernels.vector import (
    WIDTH,
    Lanes,
    intrinsic,
    plus_product,
    read,
    repeated,
    shuffled,
    write,
)

EIGHT, TEN = 8, 10

FITS = bool(binding.get_host_cpu_features().get("avx512f"))
"""Whether this processor has the registers: without them a library's products are as fast."""

ROWS = types.UniTuple(types.uintp, 2)  # type: ignore[attr-defined]
"""Rows of a matrix: the first of those meant, and how many numbers a row has."""


class Tile(types.Type):
    """Sixteen lanes."""

    def __init__(self, dtype: Any) -> None:
        """Of numba's float32 or float64."""
        self.dtype = dtype
        super().__init__(name=f"Tile({dtype})")


@register_model(Tile)
class TileModel(models.PrimitiveModel):  # type: ignore[misc]
    """To the machine: an array of vectors, which the compiler takes apart."""

    def __init__(self, dmm: Any, kind: Any) -> None:
        """Of what the number is to the machine."""
        number = dmm.lookup(kind.dtype).get_value_type()
        super().__init__(dmm, kind, ir.ArrayType(ir.VectorType(number, WIDTH), WIDTH))


@intrinsic
def tile(typing: Any, like: Any) -> Any:
    """A tile of zeros, of the type of the array."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Tile(like.dtype)(like), code


@intrinsic
def crossed(typing: Any, total: Any, u: Any, v: Any, Y: Any, rows: Any, t: Any) -> Any:
    """Add to the tile the products of u, and of v, with those of eight rows of Y from t on.

    ``rows``: the first of the eight, and how many numbers a row has.
    """

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _crossed(context, b, Y, args)

    return total(total, u, v, Y, ROWS, types.uintp), code


@intrinsic
def crossed_some(typing: Any, total: Any, u: Any, v: Any, Y: Any, rows: Any, t: Any, n: Any) -> Any:
    """The same for the first ``n`` of them alone."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _crossed(context, b, Y, args)

    return total(total, u, v, Y, ROWS, types.uintp, types.uintp), code


@intrinsic
def square(typing: Any, x: Any, rows: Any, t: Any) -> Any:
    """Sixteen numbers of each of sixteen rows of x, from t on."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        where, rows, t = args
        total = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for k in range(WIDTH):
            lanes = read(context, b, x, where, b.add(_row(b, rows, k), t))
            total = b.insert_value(total, lanes, k)
        return total

    return Tile(x.dtype)(x, ROWS, types.uintp), code


@intrinsic
def turned(typing: Any, total: Any) -> Any:
    """Rows and columns exchanged."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        total, width = args[0], 1
        while width < WIDTH:  # of a square of squares, the two that are not on the diagonal
            for k in range(WIDTH):
                if k & width:
                    continue
                u, v = (b.extract_value(total, j) for j in (k, k + width))
                low = [j if not j & width else j - width + WIDTH for j in range(WIDTH)]
                high = [j + width if not j & width else j + WIDTH for j in range(WIDTH)]
                total = b.insert_value(total, shuffled(b, u, v, low), k)
                total = b.insert_value(total, shuffled(b, u, v, high), k + width)
            width *= 2
        return total

    return total(total), code


@intrinsic
def sums(typing: Any, total: Any) -> Any:
    """What each of the tile's sixteen adds up to."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        parts = [b.extract_value(args[0], k) for k in range(WIDTH)]
        width = 1
        while width < WIDTH:  # of two at a time every other sum, then every other two, ...
            even = [(k & ~width) + (WIDTH if k & width else 0) for k in range(WIDTH)]
            odd = [k + width for k in even]
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [b.fadd(shuffled(b, u, v, even), shuffled(b, u, v, odd)) for u, v in pairs]
            width *= 2
        return parts[0]

    return Lanes(total.dtype)(total), code


@intrinsic
def spread(typing: Any, total: Any, d: Any, s: Any, v: Any) -> Any:
    """Add to the tile v times each of sixteen numbers of d, from s on."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        total, where, s, v = args
        places = [b.add(s, s.type(k)) for k in range(WIDTH)]
        return _spread(b, total, make_array(d)(context, b, where).data, places, v)

    return total(total, d, types.uintp, v), code


@intrinsic
def grown(typing: Any, total: Any, a: Any, rows: Any, t: Any, v: Any) -> Any:
    """Add to the tile's first ten v times the t-th number of each of ten rows of a.

    Ten sums are enough to be added to one in each cycle, and a batch often has so many rows.
    """

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        total, where, rows, t, v = args
        places = [b.add(_row(b, rows, k), t) for k in range(TEN)]
        return _spread(b, total, make_array(a)(context, b, where).data, places, v)

    return total(total, a, ROWS, types.uintp, v), code


@intrinsic
def every(typing: Any, v: Any) -> Any:
    """A tile that has v sixteen times."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        total = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for k in range(WIDTH):
            total = b.insert_value(total, args[0], k)
        return total

    return Tile(v.dtype)(v), code


@intrinsic
def store_ten(typing: Any, out: Any, rows: Any, t: Any, total: Any, n: Any) -> Any:
    """Write the first ``n`` of each of the tile's first ten to ten rows of out, from t on."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _write_rows(context, b, out, args, TEN)

    return types.void(out, ROWS, types.uintp, total, types.uintp), code


@intrinsic
def store_rows(typing: Any, out: Any, rows: Any, t: Any, total: Any) -> Any:
    """Write the tile to sixteen rows of out, from t on."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _write_rows(context, b, out, args)

    return types.void(out, ROWS, types.uintp, total), code


@intrinsic
def store_some_rows(typing: Any, out: Any, rows: Any, t: Any, total: Any, n: Any) -> Any:
    """The first ``n`` of each row."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _write_rows(context, b, out, args)

    return types.void(out, ROWS, types.uintp, total, types.uintp), code


def _crossed(context: Any, b: Any, kind: Any, args: Any) -> Any:
    total, u, v, Y, rows, t, *n = args
    for k in range(EIGHT):
        at = b.add(_row(b, rows, k), t)
        y = read(context, b, kind, Y, at, *n)
        for j, x in ((k, u), (k + EIGHT, v)):
            total = b.insert_value(total, plus_product(b, b.extract_value(total, j), x, y), j)
    return total


def _spread(b: Any, total: Any, start: Any, places: list[Any], v: Any) -> Any:
    """Add v times the numbers at these places to the first of the tile."""
    for k, at in enumerate(places):
        factor = repeated(b, b.load(b.gep(start, [at])), v.type)
        total = b.insert_value(total, plus_product(b, b.extract_value(total, k), factor, v), k)
    return total


def _write_rows(context: Any, b: Any, kind: Any, args: Any, count: int = WIDTH) -> Any:
    out, rows, t, total, *n = args
    for k in range(count):
        at = b.add(_row(b, rows, k), t)
        write(context, b, kind, out, at, b.extract_value(total, k), *n)
    return context.get_dummy_value()


def _row(b: Any, rows: Any, k: int) -> Any:
    """Where the k-th of these rows begins."""
    first, width = (b.extract_value(rows, i) for i in (0, 1))
    return b.mul(b.add(first, first.type(k)), width)
