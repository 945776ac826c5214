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
    as_mask,
    attended_range,
    is_live,
    is_visible,
    keys_of_row,
    place_of_row,
    position_of,
    row_of_slot,
    tokens_of_chunk,
)
from csrc_triton.device.math import INF, LOG2E

NOWHERE = tl.constexpr(2**31 - 1)  # position of a key that no query sees


class RowEntries(NamedTuple):
    """Of one row."""

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
    return RowEntries(
        tl.load(p_row),
        tl.load(p_row + 1).to(tl.int32),
        tl.load(p_row + 2).to(tl.int32),
        tl.load(p_row + 3),
        tl.load(p_row + 4).to(tl.int32),
        tl.load(p_row + 5).to(tl.int32),
        tl.load(p_row + 6).to(tl.int32),
    )


@triton.jit
def positions_of(entries, own, i, inside):
    """Position of a row's ``own`` entries ``i`` ([N]) among its keys; 0 where not ``inside``."""
    if entries.p_order is None:
        t = tl.where(inside, own.first + i, 0)
    else:
        t = tl.load(entries.p_order + own.base + i, mask=inside, other=0)
    return t


@triton.jit
def queries_of(entries, own, i):
    """Of entries ``i`` ([N]): the query's position, weight, and whether it has any."""
    asked = (i >= own.asked_from) & (i < own.asked_to)
    weight = tl.where(asked, 1.0, 0.0)
    if entries.p_weight is not None:
        weight = tl.load(entries.p_weight + own.base + i, mask=asked, other=0.0)
        asked = asked & (weight != 0.0)
    return positions_of(entries, own, i, asked), weight, asked


class Operand(NamedTuple):
    """Rows of queries or keys, to be multiplied with others."""

    pointers: Any  # [N, 1]
    inside: Any  # [N]


@triton.jit
def query_rows(layer, own, row, head, t, asked, tiles: tl.constexpr):
    """One head's queries at positions ``t``."""
    p_query = layer.p_query + row * layer.stride_qb * tiles.QUERY_UNIT
    p_query += head * layer.stride_qh * tiles.QUERY_UNIT
    return Operand(p_query + (own.bos + t)[:, None] * layer.stride_qt * tiles.QUERY_UNIT, asked)


@triton.jit
def key_rows(layer, own, row, head, t, inside, tiles: tl.constexpr):
    """The keys at positions ``t`` that query head ``head`` sees."""
    p_key = layer.p_key + row * layer.stride_kb * tiles.KEY_UNIT
    p_key += head // tiles.G * layer.stride_kh * tiles.KEY_UNIT
    return Operand(p_key + (own.bos + t)[:, None] * layer.stride_kt * tiles.KEY_UNIT, inside)


@triton.jit
def load_part(operand, start, STRIDE: tl.constexpr, tiles: tl.constexpr):
    """Elements ``start`` to ``start + BLOCK_D`` of some rows: [N, BLOCK_D]."""
    o_d = start + tl.arange(0, tiles.BLOCK_D)
    inside = operand.inside[:, None] & (o_d < tiles.D)[None, :]
    return tl.load(operand.pointers + o_d[None, :] * STRIDE, mask=inside, other=0.0)


@triton.jit
def held_part(operand, STRIDE: tl.constexpr, tiles: tl.constexpr):
    """The rows themselves if one part is all of them, else nothing."""
    if tiles.BLOCK_D >= tiles.D:
        held = load_part(operand, 0, STRIDE, tiles)
    else:
        held = None
    return held


@triton.jit
def tile_scores(
    held,  # what held_part made of the first
    first,
    second,
    layer,
    STRIDE_FIRST: tl.constexpr,
    STRIDE_SECOND: tl.constexpr,
    tiles: tl.constexpr,
):
    """Scores of all pairs, in units of ``log(2)``: [first, second]."""
    products = tl.zeros([first.inside.shape[0], second.inside.shape[0]], dtype=tl.float32)
    for start in tl.range(0, tiles.D, tiles.BLOCK_D):
        if held is None:
            a = load_part(first, start, STRIDE_FIRST, tiles)
        else:
            a = held
        b = load_part(second, start, STRIDE_SECOND, tiles)
        if tiles.UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return scaled_scores(products, layer.scaling, layer.softcap)


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
def first_key(own, row, axis):
    """The row's first position among those of all rows."""
    if axis.p_cu is None:
        at = row * axis.width
    else:
        at = own.bos
    return at


@triton.jit
def sum_heads(
    per_head,
    at,  # [N]
    seen,  # [N]
    weights,  # of keys and heads, or None
    row,
    t,  # [N], where the weights are
    MEAN: tl.constexpr,
    H: tl.constexpr,
):
    """Mean, or sum, over the chosen heads, weighted per key and head if asked: [N]; 0 where not ``seen``."""
    out = tl.zeros(at.shape, dtype=tl.float32)
    for start in range(0, per_head.heads, H):
        o_h = start + tl.arange(0, H)
        share = head_weights(per_head.p_head_mask, o_h, o_h < per_head.heads, per_head.heads, 1)[:, None]
        read = (share > 0.0) & seen[None, :]
        head = o_h.to(tl.int64)[:, None]
        x = tl.load(per_head.p_x + head * per_head.total + at[None, :], mask=read, other=0.0)
        if weights is not None:
            offset = row * weights.stride_wb + head * weights.stride_wh + t[None, :] * weights.stride_wt
            x = x * tl.load(weights.p_w + offset, mask=read, other=0.0).to(tl.float32)
        if MEAN:
            x = x * share
        out += tl.sum(x, axis=0)
    return out


@triton.jit
def response_kernel(response, found, SHIFT: tl.constexpr, SCAN: tl.constexpr):
    """Which tokens of a row count, and where they lie; NaN in a row whose bounds are not sound."""
    i_b = tl.program_id(0)
    place = place_of_row(response, i_b)
    n_live = i_b * 0
    lowest = place.row * 0
    highest = place.row * 0 - 1
    p_order = found.p_order + place.lo
    for j0 in range(0, place.length, SCAN):
        j = j0 + tl.arange(0, SCAN)
        inside = j < place.length
        live = is_live(response, place, j)
        t = position_of(response, place, j, live)
        rank = n_live + tl.cumsum(live.to(tl.int32), axis=0) - 1
        lowest = tl.minimum(lowest, tl.min(tl.where(live, t, 0)))
        highest = tl.maximum(highest, tl.max(tl.where(live, t, -1)))
        n_live += tl.sum(live.to(tl.int32))
        if place.whole:
            tl.store(found.p_rank + place.lo + j, tl.where(live, rank, -1), mask=inside)
            tl.store(p_order + rank, t.to(tl.int32), mask=live)
        else:
            tl.store(found.p_out + place.lo + j, tl.where(live, float("nan"), 0.0), mask=inside)
    tl.debug_barrier()
    last = tl.load(p_order + n_live - 1, mask=place.whole & (n_live > 0), other=0)
    asked = tl.load(p_order + n_live - 1 - SHIFT, mask=place.whole & (n_live > SHIFT), other=0)
    p_fact = found.p_facts + place.row * 5
    tl.store(p_fact, tl.where(place.whole, n_live, 0))
    tl.store(p_fact + 1, lowest)
    tl.store(p_fact + 2, highest)
    tl.store(p_fact + 3, last)
    tl.store(p_fact + 4, asked)
    tl.store(found.p_status + place.row, tl.where(place.whole, 0, OUT_OF_RANGE))


@triton.jit
def entries_kernel(
    axis, response, found,
    p_rows,  # [B, 7] out
    p_asked,  # [B] out: position of the last query asked, or None
    p_top,  # [B]: position at which a rollout starts, or None; out if p_carried is given
    p_carried,  # [keys] out: 1 there
    CAUSAL: tl.constexpr, LAST_RESPONSE: tl.constexpr,
    LOWEST: tl.constexpr, SHIFT: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """The entries of a row, and whether an index of the row is out of range: below LOWEST, or no key."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    keys = keys_of_row(axis, i_b, CAUSAL, 1)
    first = keys.first
    position = keys.position
    if axis.p_mask is not None:
        mask_offset = row * axis.stride_mb + keys.bos * axis.stride_mt
        first, last = attended_range(axis.p_mask, mask_offset, axis.stride_mt, keys.first, keys.length, SCAN)
        if axis.p_position is None:
            position = tl.maximum(last, 0)
    p_fact = found.p_facts + row * 5
    n_live = tl.load(p_fact)
    if LAST_RESPONSE:
        position = tl.load(p_fact + 3)
    valid = keys.sound & (tl.load(p_fact + 1) >= LOWEST) & (tl.load(p_fact + 2) < keys.length)
    status = tl.load(found.p_status + row) | tl.where((n_live > 0) & (valid == 0), OUT_OF_RANGE, 0)
    tl.store(found.p_status + row, status)

    busy = valid & (n_live > 0) & (status == 0)
    at_key = first_key(keys, row, axis)
    if p_top is None:
        base = row * response.width
        if response.p_cu is not None:
            base = tl.load(response.p_cu + row).to(tl.int64)
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


@triton.jit
def normalizer_kernel(
    p_normalizer,  # [Hq, total] out: log2 of the softmax's denominator
    p_moved,  # [Hq, total] out: sum over keys of attention and their weights, or None
    axis,
    layer,
    entries,
    weights,
    tiles: tl.constexpr,
    STRIDE_WT: tl.constexpr,
):
    """BLOCK queries of one head against every key that one of them sees."""
    # Late queries see most keys and go first; the heads that share keys run side by side.
    heads = layer.kv_heads * tiles.G
    i_h = tl.program_id(0) % heads
    i_slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    i_b, i_c = row_of_slot(i_slot, entries.p_cu, entries.n_rows, entries.slots_per_row, tiles.BLOCK)
    row = i_b.to(tl.int64)
    head = i_h.to(tl.int64)
    own = entries_of_row(entries.p_rows, row)
    if (i_c < 0) | (i_c * tiles.BLOCK >= own.asked_to):
        return
    i = (i_c * tiles.BLOCK).to(tl.int32) + tl.arange(0, tiles.BLOCK)
    position, _, asked = queries_of(entries, own, i)
    if (tl.max(asked.to(tl.int32)) == 0) | (is_chosen(layer.p_head_mask, i_h) == 0):
        return

    largest = tl.full([tiles.BLOCK], -INF, tl.float32)
    total_sum = tl.full([tiles.BLOCK], 0.0, tl.float32)
    moved = tl.full([tiles.BLOCK], 0.0, tl.float32)
    if (layer.p_lse is None) or (p_moved is not None):
        queries = query_rows(layer, own, row, head, position, asked, tiles)
        held = held_part(queries, tiles.STRIDE_QD, tiles)
        at_query = tl.where(asked, position, -1)
        latest = tl.max(at_query)
        end = latest + 1
        if not tiles.CAUSAL:
            end = own.end
            if axis.window is not None:
                end = tl.minimum(end, latest + axis.window)
        start = own.first
        if axis.window is not None:
            earliest = tl.min(tl.where(asked, position, NOWHERE)) - axis.window + 1
            start += tl.maximum(earliest - start, 0).to(tl.int32) // tiles.STEP * tiles.STEP
        for t0 in range(start, end, tiles.STEP):
            t = t0 + tl.arange(0, tiles.STEP)
            visible = is_visible_key(axis, own, row, t, end)
            keys = key_rows(layer, own, row, head, t, t < end, tiles)
            scores = tile_scores(held, queries, keys, layer, tiles.STRIDE_QD, tiles.STRIDE_KD, tiles)
            at_key = tl.where(visible, t, NOWHERE)
            seen = is_seen(at_query[:, None], at_key[None, :], axis.window, tiles.CAUSAL)
            scores = tl.where(seen, scores, -INF)
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            reference = finite_reference(larger)
            terms = tl.exp2(scores - reference[:, None])
            shrunk = tl.exp2(largest - reference)
            total_sum = total_sum * shrunk + tl.sum(terms, axis=1)
            if p_moved is not None:
                offset = row * weights.stride_wb + head * weights.stride_wh + (own.bos + t) * STRIDE_WT
                norm = tl.load(weights.p_w + offset, mask=visible, other=0.0).to(tl.float32)
                moved = moved * shrunk + tl.sum(tl.where(seen, terms * norm[None, :], 0.0), axis=1)
            largest = larger

    at = head * entries.total + own.base + i
    if layer.p_lse is None:
        normalizer = finite_reference(largest) + tl.log2(total_sum)
    else:
        p_row_lse = layer.p_lse + row * layer.stride_lb + head * layer.stride_lh
        lse = tl.load(p_row_lse + (own.bos + position) * layer.stride_lt, mask=asked, other=0.0)
        normalizer = lse.to(tl.float32) * LOG2E
    if layer.p_sinks is not None:
        normalizer = added_log2(normalizer, tl.load(layer.p_sinks + i_h).to(tl.float32) * LOG2E)
    tl.store(p_normalizer + at, normalizer, mask=asked)
    if p_moved is not None:
        moved = moved * tl.exp2(finite_reference(largest) - normalizer)
        tl.store(p_moved + at, tl.where(total_sum == 0.0, 0.0, moved), mask=asked)


@triton.jit
def is_visible_key(axis, own, row, t, end):
    """Whether keys ``t`` ([N]) before ``end`` are no padding."""
    offset = row * axis.stride_mb + own.bos * axis.stride_mt
    return is_visible(axis.p_mask, offset, axis.stride_mt, t, own.first, end)


@triton.jit
def column_kernel(
    p_columns,  # [Hq, total] out
    p_normalizer,  # [Hq, total]
    axis,
    layer,
    entries,
    tiles: tl.constexpr,
    ORDERED: tl.constexpr,  # whether positions rise with the entries
    LATER: tl.constexpr,  # whether a key counts only for queries from its own entry on
):
    """What BLOCK keys get of one head's queries."""
    heads = layer.kv_heads * tiles.G
    i_h = tl.program_id(0) % heads
    i_slot = tl.program_id(0) // heads
    i_b, i_c = row_of_slot(i_slot, entries.p_cu, entries.n_rows, entries.slots_per_row, tiles.BLOCK)
    row = i_b.to(tl.int64)
    head = i_h.to(tl.int64)
    own = entries_of_row(entries.p_rows, row)
    if (i_c < 0) | (i_c * tiles.BLOCK >= own.count):
        return
    if is_chosen(layer.p_head_mask, i_h) == 0:
        return
    j0 = (i_c * tiles.BLOCK).to(tl.int32)
    j = j0 + tl.arange(0, tiles.BLOCK)
    inside = j < own.count
    t = positions_of(entries, own, j, inside)
    at_key = tl.where(inside & is_visible_key(axis, own, row, t, own.end), t, NOWHERE)
    keys = key_rows(layer, own, row, head, t, inside, tiles)
    held = held_part(keys, tiles.STRIDE_KD, tiles)
    p_row_normalizer = p_normalizer + head * entries.total + own.base
    start = own.asked_from // tiles.STEP * tiles.STEP
    stop = own.asked_to
    if LATER:
        start = tl.maximum(start, j0)
    elif axis.window is not None:
        earliest = tl.maximum(j0 - axis.window + 1, 0).to(tl.int32)
        start = tl.maximum(start, earliest // tiles.STEP * tiles.STEP)
    if ORDERED:  # noqa: SIM102
        if axis.window is not None:
            stop = tl.minimum(stop, j0 + (tiles.BLOCK - 1) + axis.window).to(tl.int32)
    column = tl.full([tiles.BLOCK], 0.0, tl.float32)
    for i0 in range(start, stop, tiles.STEP):
        i = i0 + tl.arange(0, tiles.STEP)
        position, weight, asked = queries_of(entries, own, i)
        queries = query_rows(layer, own, row, head, position, asked, tiles)
        # Loaded before the product, whose time hides it.
        normalizer = tl.load(p_row_normalizer + i, mask=asked, other=0.0)
        scores = tile_scores(held, keys, queries, layer, tiles.STRIDE_KD, tiles.STRIDE_QD, tiles)
        at_query = tl.where(asked, position, -1)
        seen = is_seen(at_query[None, :], at_key[:, None], axis.window, tiles.CAUSAL)
        if LATER and not (ORDERED and tiles.CAUSAL):
            seen = seen & (j[:, None] <= i[None, :])
        terms = tl.exp2(scores - normalizer[None, :])
        if entries.p_weight is not None:
            terms = terms * weight[None, :]
        column += tl.sum(tl.where(seen, terms, 0.0), axis=1)
    tl.store(p_columns + head * entries.total + own.base + j, column, mask=inside)


@triton.jit
def at_response_kernel(
    axis, response, found,
    per_head,  # columns, with MEAN
    p_x,  # [keys]: what lies at the tokens' keys
    p_poison, p_rows,
    MEAN: tl.constexpr, SHIFT: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What CHUNK response tokens get: the mean of those who asked about it, or what lies at its position."""
    slots_per_row = (response.width + CHUNK - 1) // CHUNK
    i_b, i_c = row_of_slot(tl.program_id(0), response.p_cu, response.n_rows, slots_per_row, CHUNK)
    row = i_b.to(tl.int64)
    n_live = tl.load(found.p_facts + row * 5).to(tl.int32)
    status = tl.load(found.p_status + row)
    if (status != 0) & (n_live == 0):
        return
    place = place_of_row(response, i_b)
    j = tokens_of_chunk(i_c.to(tl.int64), CHUNK)
    inside = (j >= 0) & (j < place.length)
    rank = tl.load(found.p_rank + place.lo + j, mask=inside, other=-1)
    source = rank - SHIFT
    wanted = (rank >= 0) & (source >= 0) & as_mask(status == 0)
    if MEAN:
        at = place.lo + source
        x = sum_heads(per_head, at, wanted, None, row, at, True, H)
        x = x / tl.maximum(n_live - SHIFT - source, 1).to(tl.float32)
    else:
        own = entries_of_row(p_rows, row)
        t = tl.load(found.p_order + place.lo + source, mask=wanted, other=-1)
        x = tl.load(p_x + first_key(own, row, axis) + t, mask=t >= 0, other=0.0)
        if p_poison is not None:
            x = tl.where((t >= 0) & (tl.load(p_poison + row) != 0), float("nan"), x)
    x = tl.where((rank >= 0) & (status != 0), float("nan"), x)
    tl.store(found.p_out + place.lo + j, x, mask=inside)
