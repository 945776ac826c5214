"""Blocks of a row's tokens: read into the scratch memory as float64, and written from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnshape.cpu import lanes, memory
from attnshape.cpu.jit import called, inner
from attnshape.cpu.lanes import WIDTH, get, put, splat
from attnshape.cpu.memory import ADDRESS, KIND, ROW, TOKEN

LINE = 64
"""Bytes that memory is fetched by."""


@inner
def start_of(places: Any, name: int, row: int, token: int) -> Any:
    """Index of a token's element: of a row of ``[B, R]``, or of ``[M]``, whose rows have no stride."""
    return row * places[name, ROW] + token * places[name, TOKEN]


@called
def load(places: Any, name: int, start: int, n: int, s: Any, o: int) -> None:
    """``s[o : o + n]``, float64, becomes the elements of a float tensor from ``start`` on; 0 without one."""
    address, kind, stride = places[name, ADDRESS], places[name, KIND], places[name, TOKEN]
    if address == 0:
        for t in range(n):
            s[o + t] = 0.0
    elif kind == memory.F32 and stride == 1:
        whole = n - n % WIDTH
        for t in range(whole, n):
            s[o + t] = memory.read_f32(address, start + t)
        for i in range(0, whole, WIDTH):  # backwards, as a row is read
            t = whole - WIDTH - i
            put(s, o + t, lanes.read_f32s(address, start + t))
    elif kind == memory.F32:
        for t in range(n):
            s[o + t] = memory.read_f32(address, start + t * stride)
    elif kind == memory.F64:
        for t in range(n):
            s[o + t] = memory.read_f64(address, start + t * stride)
    elif kind == memory.BF16:
        for t in range(n):
            s[o + t] = memory.as_f32(np.int32(memory.read_i16(address, start + t * stride)) << 16)
    else:
        for t in range(n):
            s[o + t] = memory.half(memory.read_i16(address, start + t * stride))


# Masks -----------------------------------------------------------------------------------------------


def _mask_loader(read: Any) -> Any:
    @inner
    def load_as(address: int, start: int, stride: int, n: int, bits: int, s: Any, o: int) -> int:
        count = 0
        for t in range(n):
            live = read(address, start + t * stride) & bits != 0
            s[o + t] = live
            count += live
        return count

    return load_as


_load_i8, _load_i16, _load_i32, _load_i64 = (
    _mask_loader(read) for read in (memory.read_i8, memory.read_i16, memory.read_i32, memory.read_i64)
)


@called
def load_mask(places: Any, name: int, start: int, n: int, s: Any, o: int) -> Any:
    """``s[o : o + n]`` becomes 1 where the mask is not zero, else 0; how many are 1."""
    address, kind, stride = places[name, ADDRESS], places[name, KIND], places[name, TOKEN]
    size, bits = memory.SIZES[kind], -1
    if kind <= memory.F16:  # a zero may have a sign
        bits = 0x7FFFFFFFFFFFFFFF >> 8 * (8 - size)
    if size == 1:
        return _load_i8(address, start, stride, n, bits, s, o)
    if size == 8:
        return _load_i64(address, start, stride, n, bits, s, o)
    if size == 4:
        return _load_i32(address, start, stride, n, bits, s, o)
    return _load_i16(address, start, stride, n, bits, s, o)


@called
def count_live(places: Any, name: int, start: int, n: int, s: Any, o: int) -> Any:
    """How many of ``n`` tokens are unmasked; ``s[o : o + n]`` is of no use afterwards."""
    if places[name, KIND] != memory.I8 or places[name, TOKEN] != 1:
        return load_mask(places, name, start, n, s, o)
    address, count, whole = places[name, ADDRESS], 0, n - n % 8
    for t in range(0, whole, 8):  # the highest bit of each byte that is not 0
        x = memory.read_word(address, start + t)
        count += memory.ones(((x & 0x7F7F7F7F7F7F7F7F) + 0x7F7F7F7F7F7F7F7F | x) & -0x7F7F7F7F7F7F7F80)
    for t in range(whole, n):
        count += memory.read_i8(address, start + t) != 0
    return count


@inner
def load_index(places: Any, name: int, row: int, token: int) -> Any:
    """Element of a tensor of int32 or int64, ``[B]`` or ``[B, R]``."""
    at = start_of(places, name, row, token)
    if places[name, KIND] == memory.I64:
        return memory.read_i64(places[name, ADDRESS], at)
    return np.int64(memory.read_i32(places[name, ADDRESS], at))


@called
def fetch_block(places: Any, name: int, row: int, token: int, n: int) -> None:
    """Asks for tokens that lie side by side before they are needed."""
    if places[name, ADDRESS] == 0 or places[name, TOKEN] != 1:
        return
    size = memory.SIZES[places[name, KIND]]
    first = places[name, ADDRESS] + size * start_of(places, name, row, token)
    for at in range(first, first + n * size, LINE):
        memory.fetch(at)


@inner
def highest(places: Any, name: int) -> float:
    """What is smaller than this is finite once it is written."""
    return np.inf if places[name, KIND] == memory.F64 else memory.OVERFLOW_F32


@called
def store(places: Any, name: int, start: int, n: int, s: Any, o: int) -> bool:
    """Writes ``s[o : o + n]``, rounded once, from the element at ``start`` on; outputs are contiguous.

    Whether what was written is finite.
    """
    address, whole = places[name, ADDRESS], n - n % WIDTH
    limit, fine, lost = highest(places, name), lanes.all_true(), 0
    for t in range(whole, n):
        store_one(places, name, start + t, s[o + t])
        lost += not abs(s[o + t]) < limit
    is_f64 = places[name, KIND] == memory.F64
    past = places[name, KIND] == memory.F32_PAST and (address + 4 * start) % lanes.ALIGNED == 0
    for i in range(0, whole, WIDTH):
        t = whole - WIDTH - i
        x = get(s, o + t)
        if is_f64:
            lanes.write_f64s(address, start + t, x)
        elif past:
            lanes.write_f32s_past(address, start + t, x)
        else:
            lanes.write_f32s(address, start + t, x)
        fine = fine & (lanes.absolute(x) < splat(limit))
    return lost == 0 and lanes.all_of(fine)


@inner
def store_one(places: Any, name: int, index: int, x: float) -> None:
    if places[name, KIND] == memory.F64:
        memory.write_f64(places[name, ADDRESS], index, x)
    else:
        memory.write_f32(places[name, ADDRESS], index, np.float32(x))


@called
def fill(places: Any, name: int, start: int, n: int, x: float) -> None:
    address = places[name, ADDRESS]
    if address == 0:
        return
    if places[name, KIND] == memory.F64:
        for t in range(n):
            memory.write_f64(address, start + t, x)
    else:
        for t in range(n):
            memory.write_f32(address, start + t, np.float32(x))
