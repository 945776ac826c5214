"""Column sums of attention over many queries: credit from a response's own attention, and rollout.

A row's entries are its unmasked response tokens, numbered as they follow each other, or its keys from the
first visible one on. Entry ``i`` is a query and a key at once, at one position among the row's keys.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.attention_row import (
    Response,
    attended_range,
    head_weights,
    keys_of_row,
    place_of_row,
    token_positions,
)
from csrc_triton.device import (
    INF,
    LOG2E,
    OUT_OF_RANGE,
    finite_reference,
    is_finite,
    is_visible,
    row_of_slot,
    scaled_scores,
)
from csrc_triton.fused import SCAN, Layer, attention_row
from csrc_triton.launch import (
    COMPILER,
    ceil_div,
    interpreted,
    kernel,
    padded,
    registers,
    row_stride,
    stride_unit,
    tokens,
)

CHUNK = 256
"""Tokens a program takes where nothing is multiplied."""
MEAN_HEADS = 8
"""Heads whose columns are added together."""
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


class Rows(NamedTuple):
    """Rows of queries or keys, to be multiplied with others."""

    pointers: Any  # [N, 1]
    inside: Any  # [N]


@triton.jit
def load_part(rows, start, D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_D: tl.constexpr):
    """Elements ``start`` to ``start + BLOCK_D`` of some rows: [N, BLOCK_D]."""
    o_d = start + tl.arange(0, BLOCK_D)
    return tl.load(
        rows.pointers + o_d[None, :] * STRIDE_D,
        mask=rows.inside[:, None] & (o_d < D)[None, :],
        other=0.0,
    )


@triton.jit
def held_part(rows, D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_D: tl.constexpr):
    """The rows themselves if one part is all of them, else nothing."""
    if BLOCK_D >= D:
        held = load_part(rows, 0, D, BLOCK_D, STRIDE_D)
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
def is_seen(query, key, window):
    """Whether the query at a position sees the key at another."""
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
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


class Positions(NamedTuple):
    """CHUNK positions of a row."""

    entries: Any
    row: Any
    t: Any  # [N]
    inside: Any  # [N]
    listed: Any  # [N] whether one is an entry
    at: Any  # [N] among those of all rows


@triton.jit
def positions_of_program(p_rows, p_cu, n_rows, keys_width, CHUNK: tl.constexpr):
    i_b, i_c = row_of_slot(tl.program_id(0), p_cu, n_rows, (keys_width + CHUNK - 1) // CHUNK, CHUNK)
    row = i_b.to(tl.int64)
    entries = entries_of_row(p_rows, row)
    t = i_c.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = (t >= 0) & (t < entries.end)
    listed = inside & (t >= entries.first) & (t < entries.first + entries.count)
    return Positions(entries, row, t, inside, listed, first_key(entries, row, p_cu, keys_width) + t)


@triton.jit
def first_key(entries, row, p_cu, keys_width):
    """The row's first position among those of all rows."""
    if p_cu is None:
        at = row * keys_width
    else:
        at = entries.bos
    return at


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
    response = Response(p_mask, p_index, place)
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
        if place.sound:
            inside = j < place.length
            tl.store(p_rank + place.lo + j, tl.where(live, rank, -1), mask=inside)
            tl.store(p_order + place.lo + rank, t.to(tl.int32), mask=live)
        else:
            tl.store(p_out + place.lo + j, tl.where(live, float("nan"), 0.0), mask=j < place.length)
    tl.debug_barrier()
    p_last = p_order + place.lo + n_live - 1
    last = tl.load(p_last, mask=place.sound & (n_live > 0), other=0)
    asked = tl.load(p_last - SHIFT, mask=place.sound & (n_live > SHIFT), other=0)
    p_fact = p_facts + row * 5
    tl.store(p_fact, tl.where(place.sound, n_live, 0))
    tl.store(p_fact + 1, lowest)
    tl.store(p_fact + 2, highest)
    tl.store(p_fact + 3, last)
    tl.store(p_fact + 4, asked)
    tl.store(p_status + row, tl.where(place.sound, 0, OUT_OF_RANGE))


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
    LAST_RESPONSE: tl.constexpr,
    LOWEST: tl.constexpr,  # position a response token may have
    SHIFT: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The entries of a row, and whether an index of the row is out of range."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    keys = keys_of_row(p_cu, n_rows, keys_width, p_key_start, p_position, None, i_b, 1)
    first = keys.first
    position = keys.end - 1
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
        count = tl.where(busy, tl.maximum(position + 1 - first, 0), 0)
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
        queries = Rows(
            p_query
            + row * (stride_qb * QUERY_UNIT)
            + head * (stride_qh * QUERY_UNIT)
            + (entries.bos + position)[:, None] * (stride_qt * QUERY_UNIT),
            asked,
        )
        held = held_part(queries, D, BLOCK_D, STRIDE_QD)
        p_row_key = p_key + row * (stride_kb * KEY_UNIT) + head // G * (stride_kh * KEY_UNIT)
        at_query = tl.where(asked, position, -1)
        end = tl.max(at_query) + 1
        start = entries.first
        if window is not None:
            earliest = tl.min(tl.where(asked, position, NOWHERE)) - window + 1
            start += tl.maximum(earliest - start, 0).to(tl.int32) // STEP * STEP
        for t0 in range(start, end, STEP):
            t = t0 + tl.arange(0, STEP)
            mask_offset = row * stride_mb + entries.bos * stride_mt
            visible = is_visible(p_mask, mask_offset, stride_mt, t, entries.first, end)
            keys = Rows(p_row_key + (entries.bos + t)[:, None] * (stride_kt * KEY_UNIT), t < end)
            scores = tile_scores(
                held, queries, keys, scaling, softcap, D, BLOCK_D, STRIDE_QD, STRIDE_KD, UPCAST
            )
            at_key = tl.where(visible, t, NOWHERE)
            seen = is_seen(at_query[:, None], at_key[None, :], window)
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
    """What BLOCK keys get of one head's queries from their own entry on."""
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
    keys = Rows(
        p_key
        + row * (stride_kb * KEY_UNIT)
        + head // G * (stride_kh * KEY_UNIT)
        + (entries.bos + t)[:, None] * (stride_kt * KEY_UNIT),
        inside,
    )
    held = held_part(keys, D, BLOCK_D, STRIDE_KD)
    p_row_query = p_query + row * (stride_qb * QUERY_UNIT) + head * (stride_qh * QUERY_UNIT)
    p_row_normalizer = p_normalizer + head * total + entries.base
    start = tl.maximum(j0, entries.asked_from // STEP * STEP)
    stop = entries.asked_to
    if ORDERED:  # noqa: SIM102
        if window is not None:
            stop = tl.minimum(stop, j0 + (BLOCK - 1) + window).to(tl.int32)
    column = tl.zeros([BLOCK], tl.float32)
    for i0 in range(start, stop, STEP):
        i = i0 + tl.arange(0, STEP)
        position, weight, asked = queries_of(entries, p_order, p_weight, i)
        queries = Rows(p_row_query + (entries.bos + position)[:, None] * (stride_qt * QUERY_UNIT), asked)
        # Loaded before the product, whose time hides it.
        normalizer = tl.load(p_row_normalizer + i, mask=asked, other=0.0)
        scores = tile_scores(held, keys, queries, scaling, softcap, D, BLOCK_D, STRIDE_KD, STRIDE_QD, UPCAST)
        seen = is_seen(tl.where(asked, position, -1)[None, :], at_key[:, None], window)
        if not ORDERED:
            seen = seen & (j[:, None] <= i[None, :])
        terms = tl.exp2(scores - normalizer[None, :])
        if p_weight is not None:
            terms = terms * weight[None, :]
        column += tl.sum(tl.where(seen, terms, 0.0), axis=1)
    tl.store(p_columns + head * total + entries.base + j, column, mask=inside)


@kernel()
def share_kernel(
    p_share,  # [keys] out
    p_poison,  # [B] out: whether a share is not finite
    p_carried,  # [keys]
    p_moved,  # [Hq, total]
    p_residual,
    stride_xb,
    stride_xt,
    p_rows,
    p_cu,
    n_rows,
    keys_width,
    total,
    p_head_mask,
    heads,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What each position carries over the length of all that was moved to it."""
    here = positions_of_program(p_rows, p_cu, n_rows, keys_width, CHUNK)
    carried = tl.load(p_carried + here.at, mask=here.inside, other=0.0)
    asked = here.inside & (carried != 0.0)
    length = sum_heads(
        p_moved, total, here.at, asked & here.listed, None, 0, 0, here.t, p_head_mask, heads, False, H
    )
    offset = here.row * stride_xb + (here.entries.bos + here.t) * stride_xt
    length += tl.load(p_residual + offset, mask=asked, other=0.0).to(tl.float32)
    share = tl.where(asked, carried / tl.where(asked, length, 1.0), 0.0)
    tl.store(p_share + here.at, share, mask=here.inside)
    if tl.max((is_finite(share) == 0).to(tl.int32)) != 0:
        tl.store(p_poison + here.row, 1)


@kernel()
def carry_kernel(
    p_below,  # [keys] out
    p_poison,  # [B] out: whether what is carried on is not finite; None below the lowest layer
    p_above,  # [keys]: what each position carries, or its share of what it is made of
    p_columns,  # [Hq, total]
    p_key_weight,
    stride_wb,
    stride_wh,
    stride_wt,
    p_residual,
    stride_xb,
    stride_xt,
    p_rows,
    p_mask,
    stride_mb,
    stride_mt,
    p_cu,
    n_rows,
    keys_width,
    total,
    p_head_mask,
    heads,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One layer down: what each position gets from the later ones and keeps of its own."""
    here = positions_of_program(p_rows, p_cu, n_rows, keys_width, CHUNK)
    above = tl.load(p_above + here.at, mask=here.inside, other=0.0)
    bos = here.entries.bos
    mask_offset = here.row * stride_mb + bos * stride_mt
    attended = here.listed & is_visible(
        p_mask, mask_offset, stride_mt, here.t, here.entries.first, here.entries.end
    )
    if p_key_weight is None:
        below = sum_heads(
            p_columns, total, here.at, attended, None, 0, 0, here.t, p_head_mask, heads, True, H
        )
        below = (below + above) * 0.5
    else:
        p_row_weight = p_key_weight + here.row * stride_wb + bos * stride_wt
        below = sum_heads(
            p_columns,
            total,
            here.at,
            attended,
            p_row_weight,
            stride_wh,
            stride_wt,
            here.t,
            p_head_mask,
            heads,
            False,
            H,
        )
        offset = here.row * stride_xb + (bos + here.t) * stride_xt
        kept = tl.load(p_residual + offset, mask=here.inside & (above != 0.0), other=0.0).to(tl.float32)
        below += tl.where(above == 0.0, 0.0, above * kept)
    tl.store(p_below + here.at, below, mask=here.inside)
    if p_poison is not None:  # noqa: SIM102
        if tl.max((here.inside & (is_finite(below) == 0)).to(tl.int32)) != 0:
            tl.store(p_poison + here.row, 1)


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
    lo = row * responses
    length = row * 0 + responses
    if p_response_cu is not None:
        lo = tl.load(p_response_cu + row).to(tl.int64)
        length = tl.load(p_response_cu + row + 1).to(tl.int64) - lo
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


class _Axis(NamedTuple):
    """A token axis: of the keys, or of the response tokens."""

    cu_seqlens: Tensor | None
    batch: int
    width: int  # per row, or in all when packed

    @property
    def total(self) -> int:
        return self.batch * self.width if self.cu_seqlens is None else self.width

    def slots(self, chunk: int) -> int:
        """Chunks that may be some row's."""
        if self.cu_seqlens is None:
            return self.batch * ceil_div(self.width, chunk)
        return self.width // chunk + self.batch


class _Response:
    """The response tokens, and what one launch finds out about them."""

    def __init__(
        self,
        mask: Tensor,
        start: Tensor | None,
        index: Tensor | None,
        cu_seqlens: Tensor | None,
        lowest: int,
        shift: int,
    ) -> None:
        batch = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.axis = _Axis(cu_seqlens, batch, mask.shape[-1])
        self.ordered, self.lowest, self.shift = index is None, lowest, shift
        # Packed tokens may belong to no row.
        new = torch.empty if cu_seqlens is None else torch.zeros
        self.out = new(mask.shape, dtype=torch.float32, device=mask.device)
        self.status = torch.empty(batch, dtype=torch.int32, device=mask.device)
        self.facts = torch.empty(batch, 5, dtype=torch.int64, device=mask.device)
        self.rank, self.order = torch.empty(2, self.axis.total, dtype=torch.int32, device=mask.device)
        if batch:
            index = tokens(index)
            response_kernel[(batch,)](
                self.facts,
                self.status,
                self.rank,
                self.order,
                self.out,
                tokens(mask),
                row_stride(tokens(mask)),
                _contiguous(start),
                index,
                row_stride(index),
                cu_seqlens,
                batch,
                self.axis.width,
                SHIFT=shift,
                SCAN=SCAN,
                **COMPILER,
            )

    def entries(
        self,
        layer: Layer,
        asked: Tensor | None = None,
        top: Tensor | None = None,
        carried: Tensor | None = None,
    ) -> Tensor:
        """The entries of each row: its unmasked tokens, or with ``top`` its keys; int64 ``[B, 7]``."""
        position, axis = layer.query_position, _axis(layer)
        rows = torch.empty(axis.batch, 7, dtype=torch.int64, device=self.out.device)
        if axis.batch:
            rows_kernel[(axis.batch,)](
                rows,
                self.status,
                asked,
                top,
                carried,
                self.facts,
                self.axis.cu_seqlens,
                self.axis.width,
                *axis,
                _contiguous(layer.key_start),
                _contiguous(position) if isinstance(position, Tensor) else None,
                *_per_position(layer.attention_mask),
                LAST_RESPONSE=position == "last_response",
                LOWEST=self.lowest,
                SHIFT=self.shift,
                SCAN=SCAN,
                **COMPILER,
            )
        return rows

    def read(self, layer: Layer, rows: Tensor, x: Tensor, poison: Tensor | None = None) -> None:
        """Fills ``out``: with what lies at the tokens' keys, ``[keys]``, or from columns ``[Hq, tokens]``."""
        slots, axis = self.axis.slots(CHUNK), _axis(layer)
        if slots:
            at_response_kernel[(slots,)](
                self.out,
                x,
                poison,
                self.rank,
                self.order,
                self.facts,
                self.status,
                rows,
                *self.axis,
                axis.cu_seqlens,
                axis.width,
                self.axis.total,
                tokens(layer.head_mask),
                layer.query.shape[1],
                MEAN=x.ndim == 2,
                SHIFT=self.shift,
                H=MEAN_HEADS,
                CHUNK=CHUNK,
                **COMPILER,
                **registers(128),
            )


def column_credit_raw(
    layer: Layer,
    response_mask: Tensor,
    *,
    variant: Literal["mean", "last"],
    shift: Literal[0, 1],
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the queries of a response's unmasked tokens give each of them, and each row's status.

    Args:
        layer: as ``attnshape.AttentionInputs``, with every query; any strides.
        response_mask: ``[B, R]``, or ``[M]`` with ``response_cu_seqlens``; any dtype.
        variant: the mean over a token and those after it, or what the last one gives.
        shift: 1 writes what a token gets at the one after it; the last one then asks nothing.
        response_start: ``[B]``; or else ``response_index`` ``[B, R]`` or ``[M]``.

    Returns:
        ``[B, R]`` (or ``[M]``) float32, 0 at masked tokens, NaN in a row with an index out of range; and
        int32 ``[B]``, ``OUT_OF_RANGE`` for such a row.
    """
    response = _Response(response_mask, response_start, response_index, response_cu_seqlens, 0, shift)
    asked = torch.empty_like(response.status)
    rows = response.entries(layer, asked=asked)
    if variant == "last":
        # The same dataclass, whichever it is.
        at_asked: Layer = dataclasses.replace(layer, query_position=asked)  # type: ignore[type-var]
        response.read(layer, rows, attention_row([at_asked]).flatten())
    else:
        axis, order = response.axis, response.order
        normalizer, _ = _normalizer(layer, rows, axis, order)
        response.read(layer, rows, _columns(layer, rows, axis, normalizer, order, ordered=response.ordered))
    return response.out, response.status


def rollout_raw(
    layers: Sequence[Layer],
    response_mask: Tensor,
    *,
    value_norms: Sequence[Tensor] | None = None,
    residual_norms: Sequence[Tensor] | None = None,
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the highest layer's query position carries down to the response tokens, and each row's status.

    Args:
        layers: from the lowest to the highest, as for ``column_credit_raw``.
        value_norms: per layer ``[B, Hq, S]``, packed ``[N, Hq]``: weights of keys and heads.
        residual_norms: per layer ``[B, S]``, packed ``[N]``: what a position weighs itself.

    Other arguments and returns as for ``column_credit_raw``; a ``response_index`` may be -1, nowhere.
    """
    lowest = 0 if response_index is None else -1
    response = _Response(response_mask, response_start, response_index, response_cu_seqlens, lowest, 0)
    axis = _axis(layers[-1])
    carried = torch.zeros(axis.total, dtype=torch.float32, device=response.out.device)
    poison = torch.zeros_like(response.status)
    top = torch.empty(axis.batch, dtype=torch.int64, device=response.out.device)
    rows = torch.empty(0)
    for i in reversed(range(len(layers))):
        layer = layers[i]
        rows = response.entries(layer, top=top, carried=carried if i == len(layers) - 1 else None)
        norms = None if value_norms is None else value_norms[i]
        residual = _per_position(None if residual_norms is None else residual_norms[i])
        heads = (axis.total, tokens(layer.head_mask), layer.query.shape[1])
        options = {"H": MEAN_HEADS, "CHUNK": CHUNK, **COMPILER}
        slots = axis.slots(CHUNK)
        normalizer, moved = _normalizer(layer, rows, axis, weight=carried, norms=norms)
        if moved is not None and slots:
            share = torch.zeros_like(carried)
            share_kernel[(slots,)](share, poison, carried, moved, *residual, rows, *axis, *heads, **options)
            carried = share
        columns = _columns(layer, rows, axis, normalizer, weight=carried)
        below = torch.zeros_like(carried)
        if slots:
            carry_kernel[(slots,)](
                below,
                poison if i else None,
                carried,
                columns,
                *_per_head(norms, axis),
                *residual,
                rows,
                *_per_position(layer.attention_mask),
                *axis,
                *heads,
                **options,
            )
        carried = below
    response.read(layers[-1], rows, carried, poison)
    return response.out, response.status


def _normalizer(
    layer: Layer,
    rows: Tensor,
    axis: _Axis,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per head and query, ``[Hq, entries]``: log2 of the softmax's denominator; the sum of ``norms``."""
    heads, tiles = layer.query.shape[1], _tiles(layer, 128)
    normalizer = torch.empty(heads, axis.total, dtype=torch.float32, device=layer.key.device)
    moved = None if norms is None else torch.empty_like(normalizer)
    slots = axis.slots(tiles["BLOCK"])
    operands, layout = _operands(layer)
    *norm_strides, stride = _per_head(norms, _axis(layer))
    if slots:
        normalizer_kernel[(slots * heads,)](
            normalizer,
            moved,
            *operands,
            rows,
            order,
            weight,
            *_per_position(layer.attention_mask),
            *norm_strides,
            *_per_head(layer.lse, _axis(layer)),
            _contiguous(layer.sinks),
            tokens(layer.head_mask),
            axis.cu_seqlens,
            axis.batch,
            ceil_div(axis.width, tiles["BLOCK"]),
            axis.total,
            heads,
            float(layer.scaling),
            layer.softcap,
            layer.sliding_window,
            STRIDE_WT=stride,
            **layout,
            **tiles,
        )
    return normalizer, moved


def _columns(
    layer: Layer,
    rows: Tensor,
    axis: _Axis,
    normalizer: Tensor,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    ordered: bool = True,
) -> Tensor:
    """Per head, what every entry gets from the queries from it on, ``[Hq, entries]``."""
    heads, tiles = layer.query.shape[1], _tiles(layer, None if weight is None else 255, order)
    columns = torch.empty_like(normalizer)
    slots = axis.slots(tiles["BLOCK"])
    operands, layout = _operands(layer)
    if slots:
        column_kernel[(slots * heads,)](
            columns,
            normalizer,
            *operands,
            rows,
            order,
            weight,
            *_per_position(layer.attention_mask),
            tokens(layer.head_mask),
            axis.cu_seqlens,
            axis.batch,
            ceil_div(axis.width, tiles["BLOCK"]),
            axis.total,
            heads,
            float(layer.scaling),
            layer.softcap,
            layer.sliding_window,
            ORDERED=ordered,
            **layout,
            **tiles,
        )
    return columns


def _operands(layer: Layer) -> tuple[list[Any], dict[str, Any]]:
    """Queries and keys with their strides, and what the kernels are specialised on."""
    axis = _axis(layer)
    query, *query_strides = _per_head(layer.query, axis)
    key, *key_strides = _per_head(layer.key, axis)
    query_unit, key_unit = stride_unit(*query_strides), stride_unit(*key_strides)
    operands = [query, *(x // query_unit for x in query_strides), key, *(x // key_unit for x in key_strides)]
    return operands, {
        "G": query.shape[1] // key.shape[1],
        "D": key.shape[-1],
        "STRIDE_QD": query.stride(-1),
        "STRIDE_KD": key.stride(-1),
        "QUERY_UNIT": query_unit,
        "KEY_UNIT": key_unit,
        "UPCAST": interpreted(),
    }


def _tiles(layer: Layer, most: int | None, ordered_by: Tensor | None = None) -> dict[str, Any]:
    """Rows a program holds and rows it streams, in parts of the head width, and how it is compiled.

    E.g. 128 rows of width 128 in bfloat16 (32 KB) held, and 3 tiles of 64 on their way (48 KB). ``most``
    registers, or as ptxas chooses: two programs share a multiprocessor where nothing spills.
    """
    width = max(16, padded(layer.key.shape[-1]))
    if layer.key.element_size() == 4:
        # Parts on their way in registers, where loads are not aligned, spill.
        tiles = {"BLOCK": 64, "STEP": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}
        return COMPILER | tiles | registers(168)
    # Positions that are read first take a stage for each one that their rows are ahead.
    stages = 3 if ordered_by is None else 5
    if width > 128:
        tiles = {"BLOCK": 64, "STEP": 32, "BLOCK_D": width, "num_warps": 4, "num_stages": stages}
        return COMPILER | tiles | registers(255)
    tiles = {"BLOCK": 128, "STEP": 64, "BLOCK_D": width, "num_warps": 8, "num_stages": stages}
    if layer.softcap:
        most = 255
    return COMPILER | tiles | ({} if most is None else registers(most))


def _axis(layer: Layer) -> _Axis:
    cu = layer.cu_seqlens
    if cu is None:
        return _Axis(None, layer.key.shape[0], layer.key.shape[2])
    return _Axis(cu, cu.shape[0] - 1, layer.key.shape[0])


def _per_position(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """``[B, S]``, or ``[N]``, and its strides per row and position."""
    if x is None:
        return None, 0, 0
    return x.view(torch.uint8) if x.dtype == torch.bool else x, row_stride(x), x.stride(-1)


def _per_head(x: Tensor | None, axis: _Axis) -> tuple[Any, int, int, int]:
    """``[B, H, S, ...]``, or ``[N, H, ...]``, and its strides per row, head and position."""
    if x is None:
        return None, 0, 0, 0
    if axis.cu_seqlens is None:
        return x, x.stride(0), x.stride(1), x.stride(2)
    return x, 0, x.stride(1), x.stride(0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
