"""Sixteen numbers at a time, for compiled loops that must keep their sums in registers.

A compiler turns a simple loop into vector code by itself, but keeps a sum that an outer loop adds to in
memory, which costs more than the sum. These are the few operations with which a loop says what it wants;
processors whose registers are shorter take two or four steps for each. Only compiled loops can call them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config, extending, types
from numba.core.extending import models, register_model
from numba.np.arrayobj import make_array

WIDTH = 16

HOST = binding.get_host_cpu_features().flatten()
HALVES = "+avx512f" not in (HOST if config.CPU_FEATURES is None else config.CPU_FEATURES)
"""Whether sixteen numbers take several registers: then half as many sums at a time stay in them."""

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


def operation(typed: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a builder of machine code an operation that loops can call.

    ``typed``: types of its arguments -> its signature. The builder gets numba's context, the code so far,
    the first argument's type and the arguments, and returns the result; None: there is none.
    """

    def made(build: Callable[..., Any]) -> Any:
        def define(typing: Any, *kinds: Any) -> Any:
            def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
                found = build(context, b, kinds[0], *args)
                return context.get_dummy_value() if found is None else found

            return typed(*kinds), code

        given = ["typing", *[*inspect.signature(build).parameters][3:]]
        names = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in given]
        define.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        define.__name__ = define.__qualname__ = build.__name__
        return intrinsic(define)

    return made


@operation(lambda like: Lanes(like.dtype)(like))
def none(context: Any, b: Any, kind: Any, like: Any) -> Any:
    """Zeros, of the type of the array."""
    return ir.Constant(context.get_value_type(Lanes(kind.dtype)), None)


@operation(lambda array, at: Lanes(array.dtype)(array, types.uintp))
def load(context: Any, b: Any, kind: Any, array: Any, at: Any) -> Any:
    """Those of a flat array from ``at`` on."""
    return read(context, b, kind, array, at)


@operation(lambda array, at, n: Lanes(array.dtype)(array, types.uintp, types.uintp))
def load_some(context: Any, b: Any, kind: Any, array: Any, at: Any, n: Any) -> Any:
    """The first ``n`` of them, and zeros: what comes after is not touched."""
    return read(context, b, kind, array, at, n)


@operation(lambda array, at, v: types.void(array, types.uintp, v))
def store(context: Any, b: Any, kind: Any, array: Any, at: Any, v: Any) -> Any:
    """Write them from ``at`` on."""
    write(context, b, kind, array, at, v)


@operation(lambda array, at, n, v: types.void(array, types.uintp, types.uintp, v))
def store_some(context: Any, b: Any, kind: Any, array: Any, at: Any, n: Any, v: Any) -> Any:
    """Write the first ``n`` of them."""
    write(context, b, kind, array, at, v, n)


@operation(lambda total, factor, v: total(total, v.dtype, v))
def scaled(context: Any, b: Any, kind: Any, total: Any, factor: Any, v: Any) -> Any:
    """What there is, plus factor v, for one factor."""
    return plus_product(b, total, repeated(b, factor, v.type), v)


def together(b: Any, rows: Any) -> Any:
    """The sums of four registers of a row, and of four of another one: eight numbers, row by row.

    Each is taken by halves. Only what lies in one half of a register, or in a quarter, is moved at a time,
    which processors do fastest.
    """
    low, high = [*range(8)], [*range(8, WIDTH)]
    halves = [[_plus(b, v, v, low, high) for v in row] for row in rows]
    # quarters of both rows side by side, and then of a row's four
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    quarters = [_plus(b, u, v, low, high) for u, v in zip(*halves, strict=True)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    two = zip(quarters[::2], quarters[1::2], strict=True)
    first, second = (_plus(b, u, v, low, high) for u, v in two)
    return _plus(b, first, second, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])


def read(
    context: Any, b: Any, kind: Any, array: Any, at: Any, n: Any = None, many: int = WIDTH
) -> Any:
    """So many of an array of this kind from ``at`` on, or the first n of them and zeros."""
    where, align, vector = _pointer(context, b, kind, array, at, many)
    if n is None:
        return b.load(where, align=align)
    mask = _first(b, n, many)
    form = ir.FunctionType(vector, [where.type, ir.IntType(32), mask.type, vector])
    masked = _declared(b, form, f"llvm.masked.load.{_name(vector)}.p0")
    return b.call(masked, [where, ir.IntType(32)(align), mask, ir.Constant(vector, None)])


def write(context: Any, b: Any, kind: Any, array: Any, at: Any, value: Any, n: Any = None) -> None:
    """Write them there, or the first n of them."""
    where, align, vector = _pointer(context, b, kind, array, at, value.type.count)
    if n is None:
        b.store(value, where, align=align)
        return
    mask = _first(b, n, vector.count)
    form = ir.FunctionType(ir.VoidType(), [vector, where.type, ir.IntType(32), mask.type])
    masked = _declared(b, form, f"llvm.masked.store.{_name(vector)}.p0")
    b.call(masked, [value, where, ir.IntType(32)(align), mask])


def _pointer(
    context: Any, b: Any, kind: Any, array: Any, at: Any, many: int = WIDTH
) -> tuple[Any, int, Any]:
    """Where an array's numbers from ``at`` on are, how far that is aligned, and what is there."""
    vector = ir.VectorType(context.get_value_type(kind.dtype), many)
    start = make_array(kind)(context, b, array).data
    return b.bitcast(b.gep(start, [at]), vector.as_pointer()), kind.dtype.bitwidth // 8, vector


def plus_product(b: Any, total: Any, u: Any, v: Any) -> Any:
    """What there is, plus u v, number by number and rounded once."""
    return b.fadd(total, b.fmul(u, v, flags=("contract",)), flags=("contract",))


def repeated(b: Any, number: Any, vector: Any) -> Any:
    """One number in all lanes."""
    nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    return b.shuffle_vector(b.insert_element(nothing, number, first), nothing, lanes)


def _plus(b: Any, u: Any, v: Any, low: list[int], high: list[int]) -> Any:
    """Lanes ``low`` of two registers, each plus one of ``high``."""
    return b.fadd(shuffled(b, u, v, low), shuffled(b, u, v, high))


def shuffled(b: Any, u: Any, v: Any, lanes: list[int]) -> Any:
    """These lanes of two registers, counted through both."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return b.shuffle_vector(u, v, mask)


def _first(b: Any, n: Any, many: int) -> Any:
    """Yes for the first n of so many lanes."""
    vector = ir.VectorType(n.type, many)
    return b.icmp_unsigned("<", ir.Constant(vector, list(range(many))), repeated(b, n, vector))


def _name(vector: Any) -> str:
    return f"v{vector.count}{'f32' if isinstance(vector.element, ir.FloatType) else 'f64'}"


def _declared(b: Any, kind: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(b.module, kind, name)
