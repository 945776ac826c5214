"""Column sums of attention over many queries: credit from a response's own attention, and what rollout needs.

A row's entries are its unmasked response tokens, numbered as they follow each other, or its keys from the
first visible one on. Entry ``i`` is a query and a key at once, at one position among the row's keys.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.attention import finite_reference, head_weights, scaled_scores
from csrc_triton.device.layout import (
    OUT_OF_RANGE,
    ResponseTokens,
    attended_range,
    bounds_of_row,
    is_visible,
    keys_of_row,
    place_of_row,
    row_of_slot,
    token_positions,
)
from csrc_triton.device.math import INF, LOG2E
from csrc_triton.launch import kernel

NOWHERE = tl.constexpr(2**31 - 1)  # position of a key that no query sees


class Entries(NamedTuple):
    """What a program knows of its row."""

    bos: Any  # first key of the row among the keys of all rows
    first: Any  # first visible key; where the entries are keys, the first entry
    end: Any  # keys in all; 0 where nothing is to be done
    base: Any  # first entry of the row among the entries of all rows
    count: Any
    asked_from: Any  # entries whose queries may carry weight
    asked_to: Any


@triton.jit
def entries_of_row(p_rows, row):
    p_row = p_rows + row * 7
    return Entries(
        tl.load(p_row),
        tl.load(p_row + 1).to(tl.int32),
        tl.load(p_row + 2).to(tl.int32),
        tl.load(p_row + 3),
        tl.load(p_row + 4).to(tl.int32),
        tl.load(p_row + 5).to(tl.int32),
        tl.load(p_row + 6).to(tl.int32),
    )


@triton.jit
def positions_of(entries, p_order, i, inside):
    """Position of entries ``i`` ([N]) among the row's keys; 0 where not ``inside``."""
    if p_order is None:
        t = tl.where(inside, entries.first + i, 0)
    else:
        t = tl.load(p_order + entries.base + i, mask=inside, other=0)
    return t


@triton.jit
def queries_of(entries, p_order, p_weight, i):
    """Of entries ``i`` ([N]): the query's position, weight, and whether it has any."""
    asked = (i >= entries.asked_from) & (i < entries.asked_to)
    weight = tl.where(asked, 1.0, 0.0)
    if p_weight is not None:
        weight = tl.load(p_weight + entries.base + i, mask=asked, other=0.0)
        asked = asked & (weight != 0.0)
    return positions_of(entries, p_order, i, asked), weight, asked


class Operand(NamedTuple):
    """Rows of queries or keys, to be multiplied with others."""

    pointers: Any  # [N, 1]
    inside: Any  # [N]


@triton.jit
def load_part(operand, start, D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_D: tl.constexpr):
    """Elements ``start`` to ``start + BLOCK_D`` of some rows: [N, BLOCK_D]."""
    o_d = start + tl.arange(0, BLOCK_D)
    return tl.load(
        operand.pointers + o_d[None, :] * STRIDE_D,
        mask=operand.inside[:, None] & (o_d < D)[None, :],
        other=0.0,
    )


@triton.jit
def held_part(operand, D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_D: tl.constexpr):
    """The rows themselves if one part is all of them, else nothing."""
    if BLOCK_D >= D:
        held = load_part(operand, 0, D, BLOCK_D, STRIDE_D)
    else:
        held = None
    return held


@triton.jit
def tile_scores(
    held,  # what held_part made of the first
    first,
    second,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_FIRST: tl.constexpr,
    STRIDE_SECOND: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of all pairs, in units of ``log(2)``: [first, second]."""
    products = tl.zeros([first.inside.shape[0], second.inside.shape[0]], dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        if held is None:
            a = load_part(first, start, D, BLOCK_D, STRIDE_FIRST)
        else:
            a = held
        b = load_part(second, start, D, BLOCK_D, STRIDE_SECOND)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return scaled_scores(products, scale, softcap)


@triton.jit
def is_seen(query, key, window, CAUSAL: tl.constexpr):
    """Whether the query at a position (none: -1) sees the key at another (none: NOWHERE)."""
    if CAUSAL:
        seen = key <= query
    else:
        seen = (query >= 0) & (key < NOWHERE)
    if window is not None:
        seen = seen & (query - key < window)
        if not CAUSAL:
            seen = seen & (key - query < window)
    return seen


@triton.jit
def added_log2(a, b):
    """``log2(2**a + 2**b)``."""
    reference = finite_reference(tl.maximum(a, b))
    return reference + tl.log2(tl.exp2(a - reference) + tl.exp2(b - reference))


@triton.jit
def is_chosen(p_head_mask, i_h):
    chosen = i_h >= 0
    if p_head_mask is not None:
        chosen = tl.load(p_head_mask + i_h) != 0
    return chosen


@triton.jit
def first_key(entries, row, p_cu, keys_width):
    """The row's first position among those of all rows."""
    if p_cu is None:
        at = row * keys_width
    else:
        at = entries.bos
    return at


@triton.jit
def sum_heads(
    p_x,  # [Hq, total]
    total,
    at,  # [N]
    seen,  # [N]
    p_key_weight,  # of this row, or None
    stride_wh,
    stride_wt,
    t,  # [N]
    p_head_mask,
    heads,
    MEAN: tl.constexpr,
    H: tl.constexpr,
):
    """Mean, or sum, over the chosen heads, weighted per key and head if asked: [N]; 0 where not ``seen``."""
    out = tl.zeros(at.shape, dtype=tl.float32)
    for start in range(0, heads, H):
        o_h = start + tl.arange(0, H)
        share = head_weights(p_head_mask, o_h, o_h < heads, heads, 1)[:, None]
        read = (share > 0.0) & seen[None, :]
        x = tl.load(p_x + o_h.to(tl.int64)[:, None] * total + at[None, :], mask=read, other=0.0)
        if p_key_weight is not None:
            offset = o_h.to(tl.int64)[:, None] * stride_wh + t[None, :] * stride_wt
            x = x * tl.load(p_key_weight + offset, mask=read, other=0.0).to(tl.float32)
        if MEAN:
            x = x * share
        out += tl.sum(x, axis=0)
    return out


@kernel()
def response_kernel(
    p_facts,  # [B, 5] out: unmasked tokens; position: lowest, highest, of the last, of the last that asks
    p_status,  # [B] out
    p_rank,  # [tokens] out: place among the unmasked tokens of the row, or -1
    p_order,  # [tokens] out: position of the unmasked tokens of the row, one after the other
    p_out,  # filled where the row's bounds are not sound
    p_mask,
    stride_mask,
    p_start,
    p_index,
    stride_index,
    p_cu,
    n_rows,
    width,  # R, or M
    SHIFT: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Which tokens of a row count, and where they lie."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    place = place_of_row(stride_mask, p_start, stride_index, p_cu, n_rows, width, i_b)
    response = ResponseTokens(p_mask, p_index, place)
    n_live = i_b * 0
    lowest = row * 0
    highest = row * 0 - 1
    for j0 in range(0, place.length, SCAN):
        j = j0 + tl.arange(0, SCAN)
        live, t = token_positions(response, j)
        rank = n_live + tl.cumsum(live.to(tl.int32), axis=0) - 1
        lowest = tl.minimum(lowest, tl.min(tl.where(live, t, 0)))
        highest = tl.maximum(highest, tl.max(tl.where(live, t, -1)))
        n_live += tl.sum(live.to(tl.int32))
        if place.whole:
            inside = j < place.length
            tl.store(p_rank + place.lo + j, tl.where(live, rank, -1), mask=inside)
            tl.store(p_order + place.lo + rank, t.to(tl.int32), mask=live)
        else:
            tl.store(p_out + place.lo + j, tl.where(live, float("nan"), 0.0), mask=j < place.length)
    tl.debug_barrier()
    p_last = p_order + place.lo + n_live - 1
    last = tl.load(p_last, mask=place.whole & (n_live > 0), other=0)
    asked = tl.load(p_last - SHIFT, mask=place.whole & (n_live > SHIFT), other=0)
    p_fact = p_facts + row * 5
    tl.store(p_fact, tl.where(place.whole, n_live, 0))
    tl.store(p_fact + 1, lowest)
    tl.store(p_fact + 2, highest)
    tl.store(p_fact + 3, last)
    tl.store(p_fact + 4, asked)
    tl.store(p_status + row, tl.where(place.whole, 0, OUT_OF_RANGE))


@kernel()
def rows_kernel(
    p_rows,  # [B, 7] out
    p_status,  # [B] in and out
    p_asked,  # [B] out: position of the last query asked, or None
    p_top,  # [B]: position at which a rollout starts, or None; out if p_carried is given
    p_carried,  # [keys] out: 1 there
    p_facts,  # [B, 5]
    p_response_cu,
    responses,  # R, or M
    p_cu,
    n_rows,
    keys_width,  # S, or N
    p_key_start,
    p_position,
    p_mask,
    stride_mb,
    stride_mt,
    CAUSAL: tl.constexpr,
    LAST_RESPONSE: tl.constexpr,
    LOWEST: tl.constexpr,  # position a response token may have
    SHIFT: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The entries of a row, and whether an index of the row is out of range."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    keys = keys_of_row(p_cu, n_rows, keys_width, p_key_start, p_position, None, i_b, CAUSAL, 1)
    first = keys.first
    position = keys.position
    if p_mask is not None:
        mask_offset = row * stride_mb + keys.bos * stride_mt
        first, last = attended_range(p_mask, mask_offset, stride_mt, keys.first, keys.length, SCAN)
        if p_position is None:
            position = tl.maximum(last, 0)
    p_fact = p_facts + row * 5
    n_live = tl.load(p_fact)
    if LAST_RESPONSE:
        position = tl.load(p_fact + 3)
    valid = keys.sound & (tl.load(p_fact + 1) >= LOWEST) & (tl.load(p_fact + 2) < keys.length)
    status = tl.load(p_status + row) | tl.where((n_live > 0) & (valid == 0), OUT_OF_RANGE, 0)
    tl.store(p_status + row, status)

    busy = valid & (n_live > 0) & (status == 0)
    at_key = row * keys_width
    if p_cu is not None:
        at_key = keys.bos
    if p_top is None:
        base = row * responses
        if p_response_cu is not None:
            base = tl.load(p_response_cu + row).to(tl.int64)
        count = tl.where(busy, n_live, 0)
        asked_from = count * 0
        asked_to = count - SHIFT
        tl.store(p_asked + row, tl.where(busy, tl.load(p_fact + 4), 0).to(tl.int32))
    else:
        if p_carried is not None:
            asked_from = tl.maximum(position - first, 0)
            tl.store(p_top + row, position)
            tl.store(p_carried + at_key + position, 1.0, mask=busy)
        else:
            asked_from = position * 0
            position = tl.load(p_top + row)
        base = at_key + first
        end = position + 1
        if not CAUSAL:
            end = keys.length
        count = tl.where(busy, tl.maximum(end - first, 0), 0)
        asked_to = count
    p_row = p_rows + row * 7
    tl.store(p_row, keys.bos)
    tl.store(p_row + 1, first)
    tl.store(p_row + 2, tl.where(busy, keys.length, 0))
    tl.store(p_row + 3, base)
    tl.store(p_row + 4, count)
    tl.store(p_row + 5, asked_from)
    tl.store(p_row + 6, asked_to)


@kernel("p_query", "p_key")
def normalizer_kernel(
    p_normalizer,  # [Hq, total] out: log2 of the softmax's denominator
    p_moved,  # [Hq, total] out: sum over keys of attention and p_key_weight, or None
    p_query,
    stride_qb,
    stride_qh,
    stride_qt,
    p_key,
    stride_kb,
    stride_kh,
    stride_kt,
    p_rows,
    p_order,
    p_weight,
    p_mask,
    stride_mb,
    stride_mt,
    p_key_weight,
    stride_wb,
    stride_wh,
    p_lse,
    stride_lb,
    stride_lh,
    stride_lt,
    p_sinks,
    p_head_mask,
    p_cu,  # of the entries
    n_rows,
    slots_per_row,
    total,
    heads,
    scaling,
    softcap,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    STRIDE_WT: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """BLOCK queries of one head against every key that one of them sees."""
    # Late queries see most keys and go first; the heads that share keys run side by side.
    i_h = tl.program_id(0) % heads
    i_slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    i_b, i_c = row_of_slot(i_slot, p_cu, n_rows, slots_per_row, BLOCK)
    row = i_b.to(tl.int64)
    head = i_h.to(tl.int64)
    entries = entries_of_row(p_rows, row)
    if (i_c < 0) | (i_c * BLOCK >= entries.asked_to):
        return
    i = (i_c * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    position, _, asked = queries_of(entries, p_order, p_weight, i)
    if (tl.max(asked.to(tl.int32)) == 0) | (is_chosen(p_head_mask, i_h) == 0):
        return

    largest = tl.full([BLOCK], -INF, tl.float32)
    total_sum = tl.zeros([BLOCK], tl.float32)
    moved = tl.zeros([BLOCK], tl.float32)
    if (p_lse is None) or (p_moved is not None):
        queries = Operand(
            p_query
            + row * stride_qb * QUERY_UNIT
            + head * stride_qh * QUERY_UNIT
            + (entries.bos + position)[:, None] * stride_qt * QUERY_UNIT,
            asked,
        )
        held = held_part(queries, D, BLOCK_D, STRIDE_QD)
        p_row_key = p_key + row * stride_kb * KEY_UNIT + head // G * stride_kh * KEY_UNIT
        at_query = tl.where(asked, position, -1)
        latest = tl.max(at_query)
        end = latest + 1
        if not CAUSAL:
            end = entries.end
            if window is not None:
                end = tl.minimum(end, latest + window)
        start = entries.first
        if window is not None:
            earliest = tl.min(tl.where(asked, position, NOWHERE)) - window + 1
            start += tl.maximum(earliest - start, 0).to(tl.int32) // STEP * STEP
        for t0 in range(start, end, STEP):
            t = t0 + tl.arange(0, STEP)
            mask_offset = row * stride_mb + entries.bos * stride_mt
            visible = is_visible(p_mask, mask_offset, stride_mt, t, entries.first, end)
            keys = Operand(p_row_key + (entries.bos + t)[:, None] * stride_kt * KEY_UNIT, t < end)
            scores = tile_scores(
                held, queries, keys, scaling, softcap, D, BLOCK_D, STRIDE_QD, STRIDE_KD, UPCAST
            )
            at_key = tl.where(visible, t, NOWHERE)
            seen = is_seen(at_query[:, None], at_key[None, :], window, CAUSAL)
            scores = tl.where(seen, scores, -INF)
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            reference = finite_reference(larger)
            terms = tl.exp2(scores - reference[:, None])
            shrunk = tl.exp2(largest - reference)
            total_sum = total_sum * shrunk + tl.sum(terms, axis=1)
            if p_moved is not None:
                offset = row * stride_wb + head * stride_wh + (entries.bos + t) * STRIDE_WT
                norm = tl.load(p_key_weight + offset, mask=visible, other=0.0).to(tl.float32)
                moved = moved * shrunk + tl.sum(tl.where(seen, terms * norm[None, :], 0.0), axis=1)
            largest = larger

    at = head * total + entries.base + i
    if p_lse is None:
        normalizer = finite_reference(largest) + tl.log2(total_sum)
    else:
        p_row_lse = p_lse + row * stride_lb + head * stride_lh
        lse = tl.load(p_row_lse + (entries.bos + position) * stride_lt, mask=asked, other=0.0)
        normalizer = lse.to(tl.float32) * LOG2E
    if p_sinks is not None:
        normalizer = added_log2(normalizer, tl.load(p_sinks + i_h).to(tl.float32) * LOG2E)
    tl.store(p_normalizer + at, normalizer, mask=asked)
    if p_moved is not None:
        moved = moved * tl.exp2(finite_reference(largest) - normalizer)
        tl.store(p_moved + at, tl.where(total_sum == 0.0, 0.0, moved), mask=asked)


@kernel("p_query", "p_key")
def column_kernel(
    p_columns,  # [Hq, total] out
    p_normalizer,  # [Hq, total]
    p_query,
    stride_qb,
    stride_qh,
    stride_qt,
    p_key,
    stride_kb,
    stride_kh,
    stride_kt,
    p_rows,
    p_order,
    p_weight,
    p_mask,
    stride_mb,
    stride_mt,
    p_head_mask,
    p_cu,
    n_rows,
    slots_per_row,
    total,
    heads,
    scaling,
    softcap,
    window,
    ORDERED: tl.constexpr,  # whether positions rise with the entries
    LATER: tl.constexpr,  # whether a key counts only for queries from its own entry on
    CAUSAL: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """What BLOCK keys get of one head's queries."""
    i_h = tl.program_id(0) % heads
    i_b, i_c = row_of_slot(tl.program_id(0) // heads, p_cu, n_rows, slots_per_row, BLOCK)
    row = i_b.to(tl.int64)
    head = i_h.to(tl.int64)
    entries = entries_of_row(p_rows, row)
    if (i_c < 0) | (i_c * BLOCK >= entries.count):
        return
    if is_chosen(p_head_mask, i_h) == 0:
        return
    j0 = (i_c * BLOCK).to(tl.int32)
    j = j0 + tl.arange(0, BLOCK)
    inside = j < entries.count
    t = positions_of(entries, p_order, j, inside)
    mask_offset = row * stride_mb + entries.bos * stride_mt
    visible = inside & is_visible(p_mask, mask_offset, stride_mt, t, entries.first, entries.end)
    at_key = tl.where(visible, t, NOWHERE)
    keys = Operand(
        p_key
        + row * stride_kb * KEY_UNIT
        + head // G * stride_kh * KEY_UNIT
        + (entries.bos + t)[:, None] * stride_kt * KEY_UNIT,
        inside,
    )
    held = held_part(keys, D, BLOCK_D, STRIDE_KD)
    p_row_query = p_query + row * stride_qb * QUERY_UNIT + head * stride_qh * QUERY_UNIT
    p_row_normalizer = p_normalizer + head * total + entries.base
    start = entries.asked_from // STEP * STEP
    stop = entries.asked_to
    if LATER:
        start = tl.maximum(start, j0)
    elif window is not None:
        start = tl.maximum(start, tl.maximum(j0 - window + 1, 0).to(tl.int32) // STEP * STEP)
    if ORDERED:  # noqa: SIM102
        if window is not None:
            stop = tl.minimum(stop, j0 + (BLOCK - 1) + window).to(tl.int32)
    column = tl.zeros([BLOCK], tl.float32)
    for i0 in range(start, stop, STEP):
        i = i0 + tl.arange(0, STEP)
        position, weight, asked = queries_of(entries, p_order, p_weight, i)
        queries = Operand(p_row_query + (entries.bos + position)[:, None] * stride_qt * QUERY_UNIT, asked)
        # Loaded before the product, whose time hides it.
        normalizer = tl.load(p_row_normalizer + i, mask=asked, other=0.0)
        scores = tile_scores(held, keys, queries, scaling, softcap, D, BLOCK_D, STRIDE_KD, STRIDE_QD, UPCAST)
        seen = is_seen(tl.where(asked, position, -1)[None, :], at_key[:, None], window, CAUSAL)
        if LATER and not (ORDERED and CAUSAL):
            seen = seen & (j[:, None] <= i[None, :])
        terms = tl.exp2(scores - normalizer[None, :])
        if p_weight is not None:
            terms = terms * weight[None, :]
        column += tl.sum(tl.where(seen, terms, 0.0), axis=1)
    tl.store(p_columns + head * total + entries.base + j, column, mask=inside)


@kernel()
def at_response_kernel(
    p_out,  # [tokens] out
    p_x,  # [keys], or [Hq, total] with MEAN
    p_poison,
    p_rank,
    p_order,
    p_facts,
    p_status,
    p_rows,
    p_response_cu,
    n_rows,
    responses,  # R, or M
    p_cu,
    keys_width,
    total,
    p_head_mask,
    heads,
    MEAN: tl.constexpr,
    SHIFT: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What CHUNK response tokens get: the mean of those who asked about it, or what lies at its position."""
    slots_per_row = (responses + CHUNK - 1) // CHUNK
    i_b, i_c = row_of_slot(tl.program_id(0), p_response_cu, n_rows, slots_per_row, CHUNK)
    row = i_b.to(tl.int64)
    n_live = tl.load(p_facts + row * 5).to(tl.int32)
    status = tl.load(p_status + row)
    if (status != 0) & (n_live == 0):
        return
    bounds = bounds_of_row(p_response_cu, n_rows, responses, i_b)
    lo = bounds.lo
    length = bounds.length
    if p_response_cu is None:
        lo = row * responses
    j = i_c.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = (j >= 0) & (j < length)
    rank = tl.load(p_rank + lo + j, mask=inside, other=-1)
    source = rank - SHIFT
    wanted = (rank >= 0) & (source >= 0) & (status == 0)
    if MEAN:
        at = lo + source
        x = sum_heads(p_x, total, at, wanted, None, 0, 0, at, p_head_mask, heads, True, H)
        x = x / tl.maximum(n_live - SHIFT - source, 1).to(tl.float32)
    else:
        entries = entries_of_row(p_rows, row)
        t = tl.load(p_order + lo + source, mask=wanted, other=-1)
        x = tl.load(p_x + first_key(entries, row, p_cu, keys_width) + t, mask=t >= 0, other=0.0)
        if p_poison is not None:
            x = tl.where((t >= 0) & (tl.load(p_poison + row) != 0), float("nan"), x)
    x = tl.where((rank >= 0) & (status != 0), float("nan"), x)
    tl.store(p_out + lo + j, x, mask=inside)
