"""Where a row's tokens lie: padded or packed, masked, and cut into chunks."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

# Bits of a row's status
FALLBACK = tl.constexpr(1)
EMPTY = tl.constexpr(2)
SCORE_MASKED = tl.constexpr(4)
OUT_OF_RANGE = tl.constexpr(8)
NONFINITE = tl.constexpr(16)
NEGATIVE = tl.constexpr(32)


class Bounds(NamedTuple):
    """Where a row's tokens lie on their axis."""

    lo: Any  # packed: of the first among those of all rows; padded: 0
    length: Any
    whole: Any  # whether the bounds are sound and no other row's lie inside


class Keys(NamedTuple):
    """The keys that the query of a row may see: ``[first, end)`` of ``length``, counted from ``bos``."""

    row: Any  # int64
    bos: Any
    length: Any
    first: Any
    end: Any
    position: Any  # of the query
    n_chunks: Any
    whole: Any  # as of the bounds
    sound: Any  # and its indices inside them


class Place(NamedTuple):
    """Where the response tokens of a row are."""

    row: Any  # int64
    bos: Any  # packed: its first token among those of all rows; padded: 0
    start: Any  # position of the first among the row's keys
    lo: Any  # offset of the first in a contiguous tensor of [B, R] or [M]
    length: Any
    whole: Any


@triton.jit
def first_token(place, stride):
    """Offset of a row's first token in a tensor of [B, R] with this stride, or of [M], whose stride is 0."""
    return place.row * stride + place.bos


@triton.jit
def bounds_of_row(p_cu, n_rows, width, i_b):
    """Of row ``i_b`` of ``width`` tokens, or packed among ``width`` of all rows."""
    lo = i_b.to(tl.int64) * 0
    length = lo + width
    whole = lo == 0
    if p_cu is not None:
        begin = tl.load(p_cu + i_b).to(tl.int64)
        end = tl.load(p_cu + i_b + 1).to(tl.int64)
        wrong = ((begin < 0) | (begin > end) | (end > width)).to(tl.int32)
        for start in range(0, n_rows + 1, 256):
            o_b = start + tl.arange(0, 256)
            inside = o_b <= n_rows
            bound = tl.load(p_cu + o_b, mask=inside, other=0).to(tl.int64)
            crossing = ((o_b <= i_b) & (bound > begin)) | ((o_b > i_b) & (bound < end))
            wrong += tl.sum((inside & crossing).to(tl.int32))
        whole = wrong == 0
        # Of a row that is not whole, the tokens that are there: they become NaN.
        lo = tl.minimum(tl.maximum(tl.minimum(begin, end), 0), width)
        length = tl.minimum(tl.maximum(tl.maximum(begin, end), 0), width) - lo
    return Bounds(lo, length, whole)


# Partial results of a row lie in slots, one per chunk of tokens. Row b owns the slots from slot_base(b)
# to slot_base(b + 1). When packed, these follow from cu_seqlens[b] alone, with `spare` slots to round up.


@triton.jit
def slot_base(p_cu, i_b, slots_per_row, spare, chunk):
    if p_cu is None:
        base = i_b.to(tl.int64) * slots_per_row
    else:
        base = tl.load(p_cu + i_b).to(tl.int64) // chunk + spare * i_b
    return base


@triton.jit
def row_of_slot(i_slot, p_cu, n_rows, slots_per_row, chunk):
    """The row that owns a slot, and the slot's place in it; outside the row's chunks if nobody owns it."""
    if p_cu is None:
        row = i_slot // slots_per_row
    else:
        row = i_slot * 0
        above = row + n_rows
        while above - row > 1:
            middle = (row + above) // 2
            owned = slot_base(p_cu, middle, slots_per_row, 1, chunk) <= i_slot
            row = tl.where(owned, middle, row)
            above = tl.where(owned, above, middle)
    return row, i_slot - slot_base(p_cu, row, slots_per_row, 1, chunk)


@triton.jit
def keys_of_row(axis, i_b, CAUSAL: tl.constexpr, CHUNK: tl.constexpr):
    row = i_b.to(tl.int64)
    bounds = bounds_of_row(axis.p_cu, axis.n_rows, axis.width, i_b)
    length = tl.where(bounds.whole, bounds.length, 0)
    start = row * 0
    if axis.p_start is not None:
        start = tl.load(axis.p_start + row).to(tl.int64)
    position = length - 1
    if axis.p_position is not None:
        position = tl.load(axis.p_position + row).to(tl.int64)
    sound = bounds.whole & (start >= 0) & (start <= length)
    sound = sound & ((length == 0) | ((position >= 0) & (position < length)))
    position = tl.where(sound, position, -1)
    end = position + 1
    if not CAUSAL:
        end = tl.where(sound, length, 0)
    end = tl.minimum(end, length)
    first = tl.where(sound, start, 0)
    if axis.window is not None:
        first = tl.maximum(first, position + 1 - axis.window)
        end = tl.minimum(end, tl.maximum(position + axis.window, 0))
    n_chunks = (tl.maximum(end - first, 0) + CHUNK - 1) // CHUNK
    return Keys(row, bounds.lo, length, first, end, position, n_chunks.to(tl.int32), bounds.whole, sound)


@triton.jit
def is_visible(p_mask, mask_offset, stride_mask, t, first, end):
    """Whether the query sees keys ``t`` ([N])."""
    visible = (t >= first) & (t < end)
    if p_mask is not None:
        attended = tl.load(p_mask + mask_offset + t.to(tl.int64) * stride_mask, mask=visible, other=0)
        visible = visible & (attended != 0)
    return visible


@triton.jit
def attended_range(p_mask, mask_offset, stride_mask, start, length, SCAN: tl.constexpr):
    """First and last position from ``start`` on that a mask attends to; ``length`` and -1 without one."""
    lowest = length
    last = length * 0 - 1
    for t0 in range(start // SCAN * SCAN, length, SCAN):
        t = t0 + tl.arange(0, SCAN)
        attended = is_visible(p_mask, mask_offset, stride_mask, t, start, length)
        lowest = tl.minimum(lowest, tl.min(tl.where(attended, t, length)))
        last = tl.maximum(last, tl.max(tl.where(attended, t, -1)))
    return lowest, last


@triton.jit
def place_of_row(response, i_b):
    row = i_b.to(tl.int64)
    bounds = bounds_of_row(response.p_cu, response.n_rows, response.width, i_b)
    lo = bounds.lo
    if response.p_cu is None:
        lo = row * response.width
    start = row * 0
    if response.p_start is not None:
        start = tl.load(response.p_start + row).to(tl.int64)
    return Place(row, bounds.lo, start, lo, bounds.length.to(tl.int32), bounds.whole)


@triton.jit
def is_live(response, place, j):
    """Whether response tokens ``j`` ([N]) are unmasked tokens of the row."""
    live = j < place.length
    if response.p_mask is not None:
        p_mask = response.p_mask + first_token(place, response.stride_mask)
        live = live & (tl.load(p_mask + j, mask=live, other=0) != 0)
    return live


@triton.jit
def position_of(response, place, j, live):
    """Position of response tokens ``j`` among the row's keys; -1 where an index says nowhere."""
    if response.p_index is None:
        t = place.start + j
    else:
        p_index = response.p_index + first_token(place, response.stride_index)
        t = tl.load(p_index + j, mask=live, other=-1).to(tl.int64)
    return t


@triton.jit
def is_outside(response, keys, live, t):
    """Which tokens have a position outside the row's keys."""
    outside = (t < 0) | (t >= keys.length)
    if response.p_index is not None:
        outside = outside & (t != -1)
    return live & outside


@triton.jit
def tokens_of_chunk(i_c, CHUNK: tl.constexpr):
    return i_c * CHUNK + tl.arange(0, CHUNK)


@triton.jit
def part_of(place, start):
    """What of a row is left from token ``start`` on, as a row of its own.

    A chunk's tokens are counted from its first: so addresses of a thread differ by constants.
    """
    bos, position, lo = place.bos + start, place.start + start, place.lo + start
    return Place(place.row, bos, position, lo, place.length - start, place.whole)


# Chunks of tokens in tensors of [B, R] or [M], of which a thread has four neighbours: so it is said that rows
# begin at multiples of as many bytes, whether they do or not. How wide they are read and written follows from
# their bound, of which only ``WIDE`` says that 4 divides it.


@constexpr_function
def bytes_of_four(dtype: Any) -> int:
    """Of as many tokens as a thread reads at once, whatever size they have; 16 at most."""
    size: int = 4 * dtype.primitive_bitwidth // 8
    return min(16, size)


@triton.jit
def is_inside(place, j, WIDE: tl.constexpr):
    length = place.length
    if WIDE:
        length = length // 4 * 4
    return j < length


@triton.jit
def token_input(p_x, stride, place, j, inside):
    """One input at tokens ``j`` of a row, as it is stored; anything at masked ones: a mask is no bound."""
    p_row = tl.multiple_of(p_x + first_token(place, stride), bytes_of_four(p_x.dtype.element_ty))
    return tl.load(p_row + j, mask=inside)


@triton.jit
def token_mask(response, place, j, inside):
    """The mask at tokens ``j`` of a row, as it is stored."""
    p_mask = response.p_mask
    p_row = p_mask + first_token(place, response.stride_mask)
    p_row = tl.multiple_of(p_row, bytes_of_four(p_mask.dtype.element_ty))
    return tl.load(p_row + j, mask=inside, other=0)


@triton.jit
def fetch_input(p_x, stride, place):
    """Asks for one input of a row, to be in the second-level cache when it is read: by PTX."""
    if p_x is not None:
        LINE: tl.constexpr = 1024 // p_x.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
        p_row = p_x + first_token(place, stride)
        for start in range(0, place.length, 128 * LINE):
            j = start + tl.arange(0, 128) * LINE
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l,r",
                [(p_row + j).to(tl.int64), (j < place.length).to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def live_bits(mask, PTX: tl.constexpr):
    """-1 where tokens are unmasked, 0 where masked."""
    if PTX and mask.dtype == tl.uint8:
        # Four bytes at once: the sign of each where it is not 0, then made as wide as a token.
        bits = tl.inline_asm_elementwise(
            """{
            .reg .b32 x;
            and.b32 x, $4, 0x7f7f7f7f;
            add.u32 x, x, 0x7f7f7f7f;
            or.b32 x, x, $4;
            prmt.b32 $0, x, 0, 0x8888;
            prmt.b32 $1, x, 0, 0x9999;
            prmt.b32 $2, x, 0, 0xaaaa;
            prmt.b32 $3, x, 0, 0xbbbb;
            }""",
            "=r,=r,=r,=r,r",
            [mask],
            tl.int32,
            is_pure=True,
            pack=4,
        )
    elif mask.dtype == tl.uint8:
        bits = (0 - (mask.to(tl.int32) << 16)) >> 24
    else:
        bits = tl.where(mask != 0, -1, 0)
    return bits


@triton.jit
def as_mask(condition):
    """A condition of the whole program, to be part of the mask of a load or store: compiled, it is itself.

    Triton 3.9's interpreter would spread a comparison over a vector as numbers, which are no mask.
    """
    return tl.where(condition, True, False)


# Selections by bits: a thread has 16 tokens, and registers for seven conditions.


@triton.jit
def kept(bits, x):
    """``x`` (float32) where ``bits`` are -1, 0 where they are 0."""
    return (x.to(tl.int32, bitcast=True) & bits).to(tl.float32, bitcast=True)


@triton.jit
def chosen(bits, x, y):
    """``x`` (float32) where ``bits`` are -1, ``y`` where they are 0."""
    x = x.to(tl.int32, bitcast=True)
    y = y.to(tl.int32, bitcast=True)
    return ((x & bits) | (y & ~bits)).to(tl.float32, bitcast=True)


@triton.jit
def store_tokens(p_x, lo, j, x, inside):
    """Stores ``x`` at tokens ``j`` from ``lo`` on among those of all rows, if it is asked for."""
    if p_x is not None:
        tl.store(tl.multiple_of(p_x + lo, 16) + j, x, mask=inside)


@triton.jit
def zero_tokens(out, lo, count, N: tl.constexpr, WIDE: tl.constexpr):
    """Zeros at ``count`` tokens from ``lo`` on among those of all rows."""
    if WIDE:
        count = count // 4 * 4
    zero = tl.full([N], 0.0, tl.float32)
    j = tl.arange(0, N)
    for start in range(0, count, N):
        inside = j < count - start
        store_tokens(out.p_rewards, lo + start, j, zero, inside)
        store_tokens(out.p_advantages, lo + start, j, zero, inside)
        store_tokens(out.p_returns, lo + start, j, zero, inside)
        store_tokens(out.p_credit, lo + start, j, zero, inside)
        store_tokens(out.p_kl, lo + start, j, zero, inside)
