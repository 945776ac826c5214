"""Tensors read and written where they lie, whatever their dtype and strides, a block of tokens at a time.

A loop is compiled once, not once for each combination of dtypes: it is given places (``place_of``), and its
blocks are float64. What is read is upcast, which is exact; what is written is rounded once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.types.containers import UniTuple
from numba.extending import models, register_model
from torch import Tensor

from attnshape.cpu.jit import called, inner, intrinsic, operation

ADDRESS, KIND, ROW, TOKEN, HEAD, ELEMENT = 0, 1, 2, 3, 4, 5
"""Columns of a table of places: where the first element is, its dtype, and strides in elements."""

F32, F64, BF16, F16, I8, I16, I32, I64, F32_PAST = 1, 2, 3, 4, 5, 6, 7, 8, 9
"""Floats first. ``F32_PAST``: of an output, which is written past the caches."""
KINDS: dict[torch.dtype, int] = {
    torch.float32: F32,
    torch.float64: F64,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.bool: I8,
    torch.uint8: I8,
    torch.int8: I8,
    torch.int16: I16,
    torch.int32: I32,
    torch.int64: I64,
}
SIZES = (0, 4, 8, 2, 2, 1, 2, 4, 8, 4)
"""Bytes of an element, by its kind."""
PAST = 4 << 20
"""Bytes from which on a call's outputs are written past the caches: a cache reads what is written to it."""
COLUMNS = 6
OVERFLOW_F32 = 2.0**128 - 2.0**103
"""From here on a number becomes infinite as float32."""


def place_of(x: Tensor) -> tuple[int, ...]:
    """A row of a table of places; of ``[B, R]``, ``[M]`` or ``[B]``; all 0 without a tensor.

    Whoever passes a place holds the tensor until the loop has ended.
    """
    kind, strides = KINDS[x.dtype], x.stride()
    if len(strides) == 1:
        return x.data_ptr(), kind, 0, strides[0], 0, 0
    return x.data_ptr(), kind, strides[0], strides[1], 0, 0


def place_along(x: Tensor | None, axes: str) -> tuple[int, ...]:
    """A place of a tensor whose axes are, in order, B: rows, T: tokens, H: heads, D: a head's elements."""
    if x is None:
        return (0,) * COLUMNS
    strides = dict(zip(axes, x.stride(), strict=True))
    return x.data_ptr(), KINDS[x.dtype], *(strides.get(axis, 0) for axis in "BTHD")


def counted(mask: Tensor) -> Tensor:
    """A mask of a dtype that the loops read."""
    return mask if mask.dtype in KINDS else mask != 0


def pointer(builder: Any, address: Any, index: Any, element: ir.Type, stored: ir.Type | None = None) -> Any:
    """Where the element at an index is; with ``stored``, as that of such a value, which begins there."""
    base = builder.inttoptr(address, ir.PointerType(element))
    at = builder.gep(base, [index], inbounds=True)
    return at if stored is None else builder.bitcast(at, ir.PointerType(stored))


def _access(dtype: Any, element: ir.Type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``read(address, index)`` and ``write(address, index, value)`` of elements of a dtype."""

    @intrinsic(dtype, types.int64, types.int64)
    def read(builder: Any, address: Any, index: Any) -> Any:
        return builder.load(pointer(builder, address, index, element))

    @intrinsic(types.void, types.int64, types.int64, dtype)
    def write(builder: Any, address: Any, index: Any, value: Any) -> None:
        builder.store(value, pointer(builder, address, index, element))

    return read, write


read_f32, write_f32 = _access(types.float32, ir.FloatType())
read_f64, write_f64 = _access(types.float64, ir.DoubleType())
read_i8, _ = _access(types.int8, ir.IntType(8))
read_i16, _ = _access(types.int16, ir.IntType(16))
read_i32, write_i32 = _access(types.int32, ir.IntType(32))
read_i64, _ = _access(types.int64, ir.IntType(64))


@intrinsic(types.float32, types.int32)
def as_f32(builder: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return builder.bitcast(bits, ir.FloatType())


@intrinsic(types.float64, types.int64)
def as_f64(builder: Any, bits: Any) -> Any:
    """The float64 of these bits."""
    return builder.bitcast(bits, ir.DoubleType())


@intrinsic(types.int64, types.float64)
def bits_of(builder: Any, x: Any) -> Any:
    """The bits of a float64."""
    return builder.bitcast(x, ir.IntType(64))


@intrinsic(types.int64, types.int64, types.int64)
def read_word(builder: Any, address: Any, index: Any) -> Any:
    """Eight bytes, from the one at ``index`` on."""
    return builder.load(pointer(builder, address, index, ir.IntType(8), ir.IntType(64)), align=1)


@intrinsic(types.void, types.int64)
def fetch(builder: Any, address: Any) -> None:
    """Asks for the memory at an address, which need not be there, before it is read or written."""
    i32, byte = ir.IntType(32), ir.PointerType(ir.IntType(8))
    known = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, known, "llvm.prefetch.p0")
    choices = [ir.Constant(i32, x) for x in (0, 3, 1)]  # to read, to keep, of data
    builder.call(function, [builder.inttoptr(address, byte), *choices])


@intrinsic(types.int64, types.int64)
def ones(builder: Any, x: Any) -> Any:
    """How many bits are 1."""
    return builder.ctpop(x)


@inner
def half(bits: Any) -> Any:
    """The number that these bits of a float16 stand for."""
    sign, size = (np.int32(bits) & 0x8000) << 16, np.int32(bits) & 0x7FFF
    normal = as_f32(sign | ((size << 13) + (112 << 23)))
    small = np.float32(size) * np.float32(2.0**-24)
    special = as_f32(sign | (size << 13) | 0x7F800000)
    if size >= 0x7C00:
        return special
    if size >= 0x400:
        return normal
    return -small if sign != 0 else small


@called
def widened(places: Any, name: int, start: int, n: int, padded: int, out: int) -> None:
    """A head's elements to the memory at ``out``, then zeros: float32, of float64 float64."""
    address, kind, stride = places[name, ADDRESS], places[name, KIND], places[name, ELEMENT]
    if kind == F64:
        for t in range(n):
            write_f64(out, t, read_f64(address, start + t * stride))
        for t in range(n, padded):
            write_f64(out, t, 0.0)
        return
    if kind == F32:
        for t in range(n):
            write_f32(out, t, read_f32(address, start + t * stride))
    elif kind == BF16:
        for t in range(n):
            write_f32(out, t, as_f32(np.int32(read_i16(address, start + t * stride)) << 16))
    else:
        for t in range(n):
            write_f32(out, t, half(read_i16(address, start + t * stride)))
    for t in range(n, padded):
        write_f32(out, t, np.float32(0.0))


# Memory that is indexed --------------------------------------------------------------------------------


class _Memory(types.Type):
    """Where some memory begins; in rows of ``columns`` numbers, if they are more than one."""

    def __init__(self, element: Any, columns: int = 1) -> None:
        super().__init__(f"Memory({element} x {columns})")
        self.element, self.columns = element, columns


ELEMENTS = {types.float64: ir.DoubleType(), types.int64: ir.IntType(64)}


@register_model(_Memory)
class _MemoryModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.PointerType(ELEMENTS[fe_type.element]))


def indexed(element: Any, columns: int = 1) -> tuple[Any, Any]:
    """A type, and the function that makes it: of an array, or of the scratch memory from an index on.

    Its indices are taken as they are, none counts from the end: only then are loops with sums of several
    variables as their index vectorised. It is passed as an address, where an array is ten numbers. Nothing
    here holds the array: whoever calls the loop does.
    """
    kind = _Memory(element, columns)
    index = types.int64 if columns == 1 else UniTuple(types.int64, 2)

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def view(typingctx: Any, x: Any, start: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of, (base, first) = signature.args[0], arguments
            if isinstance(of, types.Array):
                base = context.make_array(of)(context, builder, base).data
            base = builder.gep(base, [first], inbounds=True)
            return builder.bitcast(base, ir.PointerType(ELEMENTS[element]))

        return kind(x, types.int64), codegen

    def at(builder: Any, base: Any, index: Any) -> Any:
        if columns > 1:
            row, column = (builder.extract_value(index, i) for i in range(2))
            index = builder.add(builder.mul(row, ir.Constant(row.type, columns)), column)
        return builder.gep(base, [index], inbounds=True)

    @operation(operator.getitem, element, kind, index)
    def get(builder: Any, base: Any, index: Any) -> Any:
        return builder.load(at(builder, base, index))

    @operation(operator.setitem, types.void, kind, index, element)
    def put(builder: Any, base: Any, index: Any, value: Any) -> None:
        builder.store(value, at(builder, base, index))

    return kind, view


SCRATCH, scratch_at = indexed(types.float64)
_, integers_at = indexed(types.int64)
_, places_at = indexed(types.int64, COLUMNS)
