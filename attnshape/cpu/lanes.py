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
from attnshape.cpu.memory import SCRATCH

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


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


# Tokens of a block --------------------------------------------------------------------------------------


operation(operator.add, TOKENS, TOKENS, TOKENS)(lambda builder, x, y: builder.fadd(x, y))
operation(operator.sub, TOKENS, TOKENS, TOKENS)(lambda builder, x, y: builder.fsub(x, y))
operation(operator.mul, TOKENS, TOKENS, TOKENS)(lambda builder, x, y: builder.fmul(x, y))
operation(operator.ne, FLAGS, TOKENS, TOKENS)(lambda builder, x, y: builder.fcmp_unordered("!=", x, y))
operation(operator.lt, FLAGS, TOKENS, TOKENS)(lambda builder, x, y: builder.fcmp_ordered("<", x, y))
operation(operator.and_, FLAGS, FLAGS, FLAGS)(lambda builder, x, y: builder.and_(x, y))


@intrinsic
def where(typingctx: Any, condition: Any, x: Any, y: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return TOKENS(FLAGS, TOKENS, TOKENS), codegen


@intrinsic
def all_of(typingctx: Any, flags: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = ir.IntType(WIDTH)
        return builder.icmp_unsigned(
            "==", builder.bitcast(arguments[0], bits), ir.Constant(bits, 2**WIDTH - 1)
        )

    return types.boolean(FLAGS), codegen


@intrinsic
def all_true(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(FLAGS.vector, [1] * WIDTH)

    return FLAGS(), codegen


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """The same number in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, i32 = ir.Constant(TOKENS.vector, ir.Undefined), ir.IntType(32)
        one = builder.insert_element(one, arguments[0], ir.Constant(i32, 0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, WIDTH), [0] * WIDTH))

    return TOKENS(types.float64), codegen


@intrinsic
def absolute(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64 = ir.VectorType(ir.IntType(64), WIDTH)
        bits = builder.and_(builder.bitcast(arguments[0], i64), ir.Constant(i64, [2**63 - 1] * WIDTH))
        return builder.bitcast(bits, TOKENS.vector)

    return TOKENS(TOKENS), codegen


@intrinsic
def get(typingctx: Any, scratch: Any, index: Any) -> Any:
    """Eight numbers of the scratch memory."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.gep(arguments[0], [arguments[1]], inbounds=True)
        return builder.load(builder.bitcast(at, ir.PointerType(TOKENS.vector)), align=8)

    return TOKENS(SCRATCH, types.int64), codegen


@intrinsic
def put(typingctx: Any, scratch: Any, index: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.gep(arguments[0], [arguments[1]], inbounds=True)
        builder.store(arguments[2], builder.bitcast(at, ir.PointerType(TOKENS.vector)), align=8)
        return context.get_dummy_value()

    return types.void(SCRATCH, types.int64, TOKENS), codegen


def _access(element: ir.Type, size: int) -> tuple[Any, Any]:
    """``read(address, index)`` and ``write(address, index, x)`` of eight neighbours of a dtype."""
    stored = ir.VectorType(element, WIDTH)

    def pointer(builder: Any, address: Any, index: Any) -> Any:
        base = builder.inttoptr(address, ir.PointerType(element))
        return builder.bitcast(builder.gep(base, [index], inbounds=True), ir.PointerType(stored))

    @intrinsic
    def read(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x = builder.load(pointer(builder, *arguments), align=size)
            return x if size == 8 else builder.fpext(x, TOKENS.vector)

        return TOKENS(types.int64, types.int64), codegen

    @intrinsic
    def write(typingctx: Any, address: Any, index: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, x = arguments
            builder.store(
                x if size == 8 else builder.fptrunc(x, stored), pointer(builder, address, index), align=size
            )
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, TOKENS), codegen

    return read, write


@intrinsic
def write_f32s_past(typingctx: Any, address: Any, index: Any, x: Any) -> Any:
    """Eight neighbours, without reading their memory first, which lies at a multiple of ``ALIGNED``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, x = arguments
        stored, i32 = ir.VectorType(ir.FloatType(), WIDTH), ir.IntType(32)
        at = builder.gep(builder.inttoptr(address, ir.PointerType(ir.FloatType())), [index], inbounds=True)
        store = builder.store(
            builder.fptrunc(x, stored), builder.bitcast(at, ir.PointerType(stored)), align=ALIGNED
        )
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(i32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, TOKENS), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """What was written past the caches is there for other threads, before anything that follows."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


read_f32s, write_f32s = _access(ir.FloatType(), 4)
_, write_f64s = _access(ir.DoubleType(), 8)


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

    @intrinsic
    def read(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index = arguments
            base = builder.inttoptr(address, ir.PointerType(stored))
            at = builder.bitcast(builder.gep(base, [index], inbounds=True), ir.PointerType(_vector(stored)))
            return decode(builder, builder.load(at, align=size))

        return lanes(types.int64, types.int64), codegen

    return read


@intrinsic
def multiply_add(typingctx: Any, total: Any, x: Any, y: Any) -> Any:
    """``total + x * y``, rounded twice."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, x, y = arguments
        return builder.fadd(total, builder.fmul(x, y))

    return total(total, total, total), codegen


def _halves(builder: Any, x: Any, y: Any, width: int) -> Any:
    """``x`` and ``y``, each of parts of ``2 * width`` lanes, with each part's halves added: x's, then y's."""
    count, i32 = x.type.count, ir.IntType(32)
    starts = range(0, 2 * count, 2 * width)
    low, high = (
        ir.Constant(ir.VectorType(i32, count), [start + shift + j for start in starts for j in range(width)])
        for shift in (0, width)
    )
    return builder.fadd(builder.shuffle_vector(x, y, low), builder.shuffle_vector(x, y, high))


@intrinsic
def fold_four(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sum of the lanes of each, halves onto each other, as float64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c, d = arguments
        x = _halves(builder, _halves(builder, a, b, 8), _halves(builder, c, d, 8), 4)
        for width in (2, 1):
            x = _halves(builder, x, ir.Constant(x.type, ir.Undefined), width)
        if a.type.element == ir.FloatType():
            x = builder.fpext(x, ir.VectorType(ir.DoubleType(), LANES))
        sums = [builder.extract_element(x, ir.Constant(ir.IntType(32), i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, sums)

    return UniTuple(types.float64, 4)(a, a, a, a), codegen


def _zero(lanes: _Lanes) -> Any:
    @intrinsic
    def zero(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return ir.Constant(lanes.vector, [0.0] * LANES)

        return lanes(), codegen

    return zero


def _products(read_query: Any, read_key: Any, zero: Any) -> Any:
    """Scaled products of queries with the keys of a tile: four queries with a key, or a query with four keys.

    Args: address of the queries, elements from one to the next, their number; address of the keys, index of
    the first, elements from one to the next, their number; a width that is a multiple of 16; where the first
    product goes, and how far apart those of two queries are.
    """

    @inner
    def products(
        queries: int, between: int, count: int, keys: int, key: int, step: int, n: int, width: int,
        scaling: float, s: Any, o: int, apart: int,
    ) -> None:  # fmt: skip
        for h in range(0, count - count % 4, 4):
            q, to = h * between, o + h * apart
            for t in range(n):
                k = key + t * step
                a, b, c, d = zero(), zero(), zero(), zero()
                for i in range(0, width, LANES):
                    x = read_key(keys, k + i)
                    a = multiply_add(a, read_query(queries, q + i), x)
                    b = multiply_add(b, read_query(queries, q + between + i), x)
                    c = multiply_add(c, read_query(queries, q + 2 * between + i), x)
                    d = multiply_add(d, read_query(queries, q + 3 * between + i), x)
                sums = fold_four(a, b, c, d)
                s[to + t], s[to + apart + t] = scaling * sums[0], scaling * sums[1]
                s[to + 2 * apart + t], s[to + 3 * apart + t] = scaling * sums[2], scaling * sums[3]
        for h in range(count - count % 4, count):
            q, to = h * between, o + h * apart
            for t in range(0, n, 4):
                k0 = key + t * step
                k1, k2 = key + min(t + 1, n - 1) * step, key + min(t + 2, n - 1) * step
                k3 = key + min(t + 3, n - 1) * step
                a, b, c, d = zero(), zero(), zero(), zero()
                for i in range(0, width, LANES):
                    x = read_query(queries, q + i)
                    a = multiply_add(a, x, read_key(keys, k0 + i))
                    b = multiply_add(b, x, read_key(keys, k1 + i))
                    c = multiply_add(c, x, read_key(keys, k2 + i))
                    d = multiply_add(d, x, read_key(keys, k3 + i))
                sums = fold_four(a, b, c, d)
                for j in range(min(4, n - t)):
                    s[to + t + j] = scaling * sums[j]

    return products


_zero_f32, _zero_f64 = _zero(LANES_F32), _zero(LANES_F64)
_read_f32 = _reader(LANES_F32, ir.FloatType(), _as_it_is, 4)
_read_f64 = _reader(LANES_F64, ir.DoubleType(), _as_it_is, 8)
_read_bf16 = _reader(LANES_F32, ir.IntType(16), _from_bfloat16, 2)
_read_f16 = _reader(LANES_F32, ir.IntType(16), _from_float16, 2)

products_f32 = _products(_read_f32, _read_f32, _zero_f32)
products_f64 = _products(_read_f64, _read_f64, _zero_f64)
products_bf16 = _products(_read_f32, _read_bf16, _zero_f32)
products_f16 = _products(_read_f32, _read_f16, _zero_f32)
