"""Numbers that are computed with at once, as many whatever the machine's vectors hold: the same bits on all.

Sixteen lanes for dot products, eight of float64 for what is done to the tokens of a block.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.types.containers import UniTuple
from numba.extending import models, register_model

from attnshape.cpu.jit import inner, intrinsic, operation
from attnshape.cpu.memory import SCRATCH, pointer

LANES, WIDTH = 16, 8
ALIGNED = 32
"""What addresses written past the caches are a multiple of."""
ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: ir.IntType(1)}


class _Lanes(types.Type):
    def __init__(self, element: Any, count: int) -> None:
        super().__init__(f"Lanes({element} x {count})")
        self.element, self.count = element, count

    @property
    def vector(self) -> ir.Type:
        return ir.VectorType(ELEMENTS[self.element], self.count)


LANES_F32, LANES_F64 = _Lanes(types.float32, LANES), _Lanes(types.float64, LANES)
TOKENS, FLAGS = _Lanes(types.float64, WIDTH), _Lanes(types.boolean, WIDTH)
STORED_F32 = ir.VectorType(ir.FloatType(), WIDTH)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


for _lanes in (TOKENS, LANES_F32, LANES_F64):
    operation(operator.add, _lanes, _lanes, _lanes)(lambda builder, x, y: builder.fadd(x, y))
    operation(operator.mul, _lanes, _lanes, _lanes)(lambda builder, x, y: builder.fmul(x, y))
operation(operator.sub, TOKENS, TOKENS, TOKENS)(lambda builder, x, y: builder.fsub(x, y))
operation(operator.ne, FLAGS, TOKENS, TOKENS)(lambda builder, x, y: builder.fcmp_unordered("!=", x, y))
operation(operator.lt, FLAGS, TOKENS, TOKENS)(lambda builder, x, y: builder.fcmp_ordered("<", x, y))
operation(operator.and_, FLAGS, FLAGS, FLAGS)(lambda builder, x, y: builder.and_(x, y))


# Tokens of a block --------------------------------------------------------------------------------------


@intrinsic(TOKENS, FLAGS, TOKENS, TOKENS)
def where(builder: Any, condition: Any, x: Any, y: Any) -> Any:
    return builder.select(condition, x, y)


@intrinsic(types.boolean, FLAGS)
def all_of(builder: Any, flags: Any) -> Any:
    bits = ir.IntType(WIDTH)
    return builder.icmp_unsigned("==", builder.bitcast(flags, bits), ir.Constant(bits, 2**WIDTH - 1))


@intrinsic(FLAGS)
def all_true(builder: Any) -> Any:
    return ir.Constant(FLAGS.vector, [1] * WIDTH)


@intrinsic(TOKENS, types.float64)
def splat(builder: Any, x: Any) -> Any:
    """The same number in all lanes."""
    i32 = ir.IntType(32)
    one = builder.insert_element(ir.Constant(TOKENS.vector, ir.Undefined), x, ir.Constant(i32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, WIDTH), [0] * WIDTH))


@intrinsic(TOKENS, TOKENS)
def absolute(builder: Any, x: Any) -> Any:
    i64 = ir.VectorType(ir.IntType(64), WIDTH)
    bits = builder.and_(builder.bitcast(x, i64), ir.Constant(i64, [2**63 - 1] * WIDTH))
    return builder.bitcast(bits, TOKENS.vector)


@intrinsic(TOKENS, SCRATCH, types.int64)
def get(builder: Any, scratch: Any, index: Any) -> Any:
    """Eight numbers of the scratch memory."""
    at = builder.gep(scratch, [index], inbounds=True)
    return builder.load(builder.bitcast(at, ir.PointerType(TOKENS.vector)), align=8)


@intrinsic(types.void, SCRATCH, types.int64, TOKENS)
def put(builder: Any, scratch: Any, index: Any, x: Any) -> None:
    at = builder.gep(scratch, [index], inbounds=True)
    builder.store(x, builder.bitcast(at, ir.PointerType(TOKENS.vector)), align=8)


@intrinsic(TOKENS, types.int64, types.int64)
def read_f32s(builder: Any, address: Any, index: Any) -> Any:
    """Eight neighbours."""
    at = pointer(builder, address, index, ir.FloatType(), STORED_F32)
    return builder.fpext(builder.load(at, align=4), TOKENS.vector)


@intrinsic(types.void, types.int64, types.int64, TOKENS)
def write_f32s(builder: Any, address: Any, index: Any, x: Any) -> None:
    at = pointer(builder, address, index, ir.FloatType(), STORED_F32)
    builder.store(builder.fptrunc(x, STORED_F32), at, align=4)


@intrinsic(types.void, types.int64, types.int64, TOKENS)
def write_f32s_past(builder: Any, address: Any, index: Any, x: Any) -> None:
    """Without reading their memory first, which lies at a multiple of ``ALIGNED``."""
    at = pointer(builder, address, index, ir.FloatType(), STORED_F32)
    store = builder.store(builder.fptrunc(x, STORED_F32), at, align=ALIGNED)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@intrinsic(types.void, types.int64, types.int64, TOKENS)
def write_f64s(builder: Any, address: Any, index: Any, x: Any) -> None:
    builder.store(x, pointer(builder, address, index, ir.DoubleType(), TOKENS.vector), align=8)


@intrinsic(types.void)
def fence(builder: Any) -> None:
    """What was written past the caches is there for other threads, before anything that follows."""
    builder.fence("seq_cst")


# Dot products -------------------------------------------------------------------------------------------


def _vector(element: ir.Type) -> ir.Type:
    return ir.VectorType(element, LANES)


def _splat(value: Any, element: ir.Type) -> ir.Constant:
    return ir.Constant(_vector(element), [value] * LANES)


def _as_it_is(builder: Any, x: Any) -> Any:
    return x


def _from_bfloat16(builder: Any, x: Any) -> Any:
    i32 = ir.IntType(32)
    bits = builder.shl(builder.zext(x, _vector(i32)), _splat(16, i32))
    return builder.bitcast(bits, _vector(ir.FloatType()))


def _from_float16(builder: Any, x: Any) -> Any:
    i32, f32 = ir.IntType(32), ir.FloatType()
    bits = builder.zext(x, _vector(i32))
    sign = builder.shl(builder.and_(bits, _splat(0x8000, i32)), _splat(16, i32))
    size = builder.and_(bits, _splat(0x7FFF, i32))
    shifted = builder.shl(size, _splat(13, i32))
    normal = builder.add(shifted, _splat(112 << 23, i32))
    special = builder.or_(shifted, _splat(0x7F800000, i32))
    small = builder.fmul(builder.uitofp(size, _vector(f32)), _splat(2.0**-24, f32))
    small = builder.bitcast(small, _vector(i32))
    found = builder.select(builder.icmp_unsigned(">=", size, _splat(0x7C00, i32)), special, normal)
    found = builder.select(builder.icmp_unsigned("<", size, _splat(0x400, i32)), small, found)
    return builder.bitcast(builder.or_(found, sign), _vector(f32))


def _reader(lanes: _Lanes, stored: ir.Type, decode: Callable[[Any, Any], Any], size: int) -> Any:
    """``read(address, index)``: sixteen elements from ``index`` on."""

    @intrinsic(lanes, types.int64, types.int64)
    def read(builder: Any, address: Any, index: Any) -> Any:
        at = pointer(builder, address, index, stored, _vector(stored))
        return decode(builder, builder.load(at, align=size))

    return read


def _halves(builder: Any, x: Any, y: Any, width: int) -> Any:
    """``x`` and ``y``, each of parts of ``2 * width`` lanes, with each part's halves added: x's, then y's."""
    count, i32 = x.type.count, ir.IntType(32)
    starts = range(0, 2 * count, 2 * width)
    low, high = (
        ir.Constant(ir.VectorType(i32, count), [start + shift + j for start in starts for j in range(width)])
        for shift in (0, width)
    )
    return builder.fadd(builder.shuffle_vector(x, y, low), builder.shuffle_vector(x, y, high))


def _four_dots(lanes: _Lanes, read_one: Any, read_four: Any) -> Any:
    """``dots(one, i, four, at, width)``: products of what begins at ``i`` with what begins at each of ``at``.

    ``width`` is a multiple of 16. Every product and every sum is rounded.
    """

    @intrinsic(lanes)
    def zero(builder: Any) -> Any:
        return ir.Constant(lanes.vector, [0.0] * LANES)

    @intrinsic(UniTuple(types.float64, 4), lanes, lanes, lanes, lanes)
    def folded(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        """The sum of the lanes of each, halves onto each other."""
        x = _halves(builder, _halves(builder, a, b, 8), _halves(builder, c, d, 8), 4)
        for width in (2, 1):
            x = _halves(builder, x, ir.Constant(x.type, ir.Undefined), width)
        if a.type.element == ir.FloatType():
            x = builder.fpext(x, ir.VectorType(ir.DoubleType(), LANES))
        sums = ir.Constant(ir.ArrayType(ir.DoubleType(), 4), ir.Undefined)
        for i in range(4):
            sums = builder.insert_value(sums, builder.extract_element(x, ir.Constant(ir.IntType(32), i)), i)
        return sums

    @inner
    def dots(one: int, i: int, four: int, at: Any, width: int) -> Any:
        a, b, c, d = zero(), zero(), zero(), zero()
        for j in range(0, width, LANES):
            x = read_one(one, i + j)
            a = a + x * read_four(four, at[0] + j)
            b = b + x * read_four(four, at[1] + j)
            c = c + x * read_four(four, at[2] + j)
            d = d + x * read_four(four, at[3] + j)
        return folded(a, b, c, d)

    return dots


def _products(lanes: _Lanes, read_query: Any, read_key: Any) -> Any:
    """Scaled products of queries with the keys of a tile: four queries with a key, or a query with four keys.

    Args: address of the queries, elements from one to the next, their number; address of the keys, index of
    the first, elements from one to the next, their number; a width that is a multiple of 16; where the first
    product goes, and how far apart those of two queries are.
    """
    of_key, of_query = _four_dots(lanes, read_key, read_query), _four_dots(lanes, read_query, read_key)

    @inner
    def products(
        queries: int, between: int, count: int, keys: int, key: int, step: int, n: int, width: int,
        scaling: float, s: Any, o: int, apart: int,
    ) -> None:  # fmt: skip
        fours = count - count % 4
        for h in range(0, fours, 4):
            q, to = h * between, o + h * apart
            for t in range(n):
                at = (q, q + between, q + 2 * between, q + 3 * between)
                sums = of_key(keys, key + t * step, queries, at, width)
                for j in range(4):
                    s[to + j * apart + t] = scaling * sums[j]
        for h in range(fours, count):
            to = o + h * apart
            for t in range(0, n, 4):
                k, last = key + t * step, n - 1 - t
                at = (k, k + min(1, last) * step, k + min(2, last) * step, k + min(3, last) * step)
                sums = of_query(queries, h * between, keys, at, width)
                for j in range(min(4, n - t)):
                    s[to + t + j] = scaling * sums[j]

    return products


_read_f32 = _reader(LANES_F32, ir.FloatType(), _as_it_is, 4)
_read_f64 = _reader(LANES_F64, ir.DoubleType(), _as_it_is, 8)
_read_bf16 = _reader(LANES_F32, ir.IntType(16), _from_bfloat16, 2)
_read_f16 = _reader(LANES_F32, ir.IntType(16), _from_float16, 2)

products_f32 = _products(LANES_F32, _read_f32, _read_f32)
products_f64 = _products(LANES_F64, _read_f64, _read_f64)
products_bf16 = _products(LANES_F32, _read_f32, _read_bf16)
products_f16 = _products(LANES_F32, _read_f32, _read_f16)
