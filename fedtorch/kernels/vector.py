"""Sixteen numbers at a time, for compiled loops that must keep their sums in registers.

A compiler turns a simple loop into vector code by itself, but keeps a sum that an outer loop adds to in
memory, which costs more than the sum. These are the few operations with which a loop says what it wants;
processors whose registers are shorter take two or four steps for each. Only compiled loops can call them.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, extending, types
from numba.core.extending import models, register_model
from numba.np.arrayobj import make_array

WIDTH = 16

# as numba types it, the functions could not be called from loops
intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic


class Lanes(types.Type):
    """Sixteen numbers of one type."""

    def __init__(self, dtype: Any) -> None:
        """Of numba's float32 or float64."""
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    """What they are to the machine: one value."""

    def __init__(self, dmm: Any, kind: Any) -> None:
        """A vector of what the number is to the machine."""
        number = dmm.lookup(kind.dtype).get_value_type()
        super().__init__(dmm, kind, ir.VectorType(number, WIDTH))


@intrinsic
def none(typing: Any, like: Any) -> Any:
    """Zeros, of the type of the array."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Lanes(like.dtype)(like), code


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """Those of a flat array from ``at`` on."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return read(context, b, array, *args)

    return Lanes(array.dtype)(array, types.uintp), code


@intrinsic
def load_some(typing: Any, array: Any, at: Any, n: Any) -> Any:
    """The first ``n`` of them, and zeros: what comes after is not touched."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return read(context, b, array, *args)

    return Lanes(array.dtype)(array, types.uintp, types.uintp), code


@intrinsic
def store(typing: Any, array: Any, at: Any, v: Any) -> Any:
    """Write them from ``at`` on."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        write(context, b, array, *args)
        return context.get_dummy_value()

    return types.void(array, types.uintp, v), code


@intrinsic
def store_some(typing: Any, array: Any, at: Any, n: Any, v: Any) -> Any:
    """Write the first ``n`` of them."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        where, at, n, value = args
        write(context, b, array, where, at, value, n)
        return context.get_dummy_value()

    return types.void(array, types.uintp, types.uintp, v), code


@intrinsic
def scaled(typing: Any, total: Any, factor: Any, v: Any) -> Any:
    """What there is, plus factor v, for one factor."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return plus_product(b, args[0], repeated(b, args[1], args[2].type), args[2])

    return total(total, v.dtype, v), code


@intrinsic
def multiplied(typing: Any, total: Any, u: Any, v: Any) -> Any:
    """What there is, plus u v, number by number."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return plus_product(b, *args)

    return total(total, u, v), code


@intrinsic
def added(typing: Any, v: Any) -> Any:
    """Their sum, one number."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        kind = ir.FunctionType(vector.element, [vector.element, vector])
        reduce = _declared(b, kind, f"llvm.vector.reduce.fadd.{_name(vector)}")
        return b.call(reduce, [ir.Constant(vector.element, -0.0), args[0]], fastmath=("reassoc",))

    return v.dtype(v), code


@intrinsic
def plus(typing: Any, u: Any, v: Any) -> Any:
    """Two of them added, number by number."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.fadd(*args)

    return u(u, v), code


@intrinsic
def upper(typing: Any, v: Any) -> Any:
    """The last eight of them, in the first eight places."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return shuffled(b, args[0], args[0], [(k + WIDTH // 2) % WIDTH for k in range(WIDTH)])

    return v(v), code


@intrinsic
def nonzero(typing: Any, v: Any) -> Any:
    """Whether any of them is not 0."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        found = b.fcmp_unordered("!=", args[0], ir.Constant(args[0].type, None))
        bits = ir.IntType(WIDTH)
        return b.icmp_unsigned("!=", b.bitcast(found, bits), bits(0))

    return types.boolean(v), code


def read(context: Any, b: Any, kind: Any, array: Any, at: Any, n: Any = None) -> Any:
    """Those of an array of this kind from ``at`` on, or the first n of them and zeros."""
    where, align, vector = _pointer(context, b, kind, array, at)
    if n is None:
        return b.load(where, align=align)
    mask = _first(b, n)
    form = ir.FunctionType(vector, [where.type, ir.IntType(32), mask.type, vector])
    masked = _declared(b, form, f"llvm.masked.load.{_name(vector)}.p0")
    return b.call(masked, [where, ir.IntType(32)(align), mask, ir.Constant(vector, None)])


def write(context: Any, b: Any, kind: Any, array: Any, at: Any, value: Any, n: Any = None) -> None:
    """Write them there, or the first n of them."""
    where, align, vector = _pointer(context, b, kind, array, at)
    if n is None:
        b.store(value, where, align=align)
        return
    mask = _first(b, n)
    form = ir.FunctionType(ir.VoidType(), [vector, where.type, ir.IntType(32), mask.type])
    masked = _declared(b, form, f"llvm.masked.store.{_name(vector)}.p0")
    b.call(masked, [value, where, ir.IntType(32)(align), mask])


def _pointer(context: Any, b: Any, kind: Any, array: Any, at: Any) -> tuple[Any, int, Any]:
    """Where an array's numbers from ``at`` on are, how far that is aligned, and what is there."""
    vector = ir.VectorType(context.get_value_type(kind.dtype), WIDTH)
    start = make_array(kind)(context, b, array).data
    return b.bitcast(b.gep(start, [at]), vector.as_pointer()), kind.dtype.bitwidth // 8, vector


def plus_product(b: Any, total: Any, u: Any, v: Any) -> Any:
    """What there is, plus u v, number by number and rounded once."""
    return b.fadd(total, b.fmul(u, v, flags=("contract",)), flags=("contract",))


def shuffled(b: Any, u: Any, v: Any, lanes: list[int]) -> Any:
    """Those of u, and after them those of v, in another order."""
    return b.shuffle_vector(u, v, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), lanes))


def repeated(b: Any, number: Any, vector: Any) -> Any:
    """One number, sixteen times."""
    nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), None)
    return b.shuffle_vector(b.insert_element(nothing, number, first), nothing, lanes)


def _first(b: Any, n: Any) -> Any:
    """Yes for the first n lanes."""
    vector = ir.VectorType(n.type, WIDTH)
    return b.icmp_unsigned("<", ir.Constant(vector, list(range(WIDTH))), repeated(b, n, vector))


def _name(vector: Any) -> str:
    return f"v{WIDTH}{'f32' if isinstance(vector.element, ir.FloatType) else 'f64'}"


def _declared(b: Any, kind: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(b.module, kind, name)
