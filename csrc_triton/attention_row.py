"""Device functions of one attention row per sequence, from queries and keys to the mean over heads."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device import (
    chunk_scores,
    group_mean,
    is_visible,
    segment,
    slot_base,
    softmax_partial,
)

# What a program knows of its row


class Keys(NamedTuple):
    """The keys that the query of a row sees: ``[first, end)`` of ``length``, counted from ``bos``."""

    bos: Any
    length: Any
    first: Any
    end: Any
    n_chunks: Any
    whole: Any  # whether its bounds are sound and no other row's lie inside
    sound: Any  # and its indices inside them


class Place(NamedTuple):
    """Where the response tokens of a row are."""

    start: Any  # position of the first among the row's keys
    at_mask: Any  # offset of the row's first token in a tensor of [B, R] or [M]
    at_index: Any
    lo: Any  # and in contiguous ones
    length: Any
    sound: Any  # whether the row's bounds are sound and no other row's lie inside


class Response(NamedTuple):
    p_mask: Any  # None: every token counts
    p_index: Any  # position of each token among the row's keys, or None
    place: Any


class Slots(NamedTuple):
    """Where what the programs of a row leave to each other lies."""

    at_mask: Any  # offset of the row's first visible key in the attention mask
    first: Any  # of the row's first chunk
    term: Any  # of its first kept chunk
    kept: Any  # the first chunk whose terms are kept
    n_kept: Any  # how many may be


class Terms(NamedTuple):
    p_terms: Any  # [term slots, Hq, CHUNK]
    p_factor: Any  # [slots, Hq]
    p_mask: Any  # the attention mask, or None
    stride_mask: Any
    slots: Any


@triton.jit
def keys_of_row(p_cu, n_rows, keys, p_key_start, p_position, window, i_b, CHUNK: tl.constexpr):
    row = i_b.to(tl.int64)
    bos = row * 0
    eos = bos + keys
    whole = eos >= bos
    if p_cu is not None:
        bos, eos, whole = segment(p_cu, i_b, n_rows, keys)
    length = tl.where(whole, eos - bos, 0)
    start = row * 0
    if p_key_start is not None:
        start = tl.load(p_key_start + row).to(tl.int64)
    position = length - 1
    if p_position is not None:
        position = tl.load(p_position + row).to(tl.int64)
    sound = whole & (start >= 0) & (start <= length)
    sound = sound & ((length == 0) | ((position >= 0) & (position < length)))
    end = tl.where(sound, tl.minimum(position + 1, length), 0)
    first = tl.where(sound, start, 0)
    if window is not None:
        first = tl.maximum(first, end - window)
    n_chunks = (tl.maximum(end - first, 0) + CHUNK - 1) // CHUNK
    return Keys(bos, length, first, end, n_chunks.to(tl.int32), whole, sound)


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
def place_of_row(stride_mask, p_start, stride_index, p_cu, n_rows, width, i_b):
    row = i_b.to(tl.int64)
    lo = row * width
    length = row * 0 + width
    at_mask = row * stride_mask
    at_index = row * stride_index
    sound = row >= 0
    if p_cu is not None:
        lo, hi, sound = segment(p_cu, i_b, n_rows, width)
        low = tl.minimum(tl.maximum(tl.minimum(lo, hi), 0), width)
        length = tl.minimum(tl.maximum(tl.maximum(lo, hi), 0), width) - low
        lo = low
        at_mask = low
        at_index = low
    start = row * 0
    if p_start is not None:
        start = tl.load(p_start + row).to(tl.int64)
    return Place(start, at_mask, at_index, lo, length.to(tl.int32), sound)


@triton.jit
def slots_of_row(
    stride_mb,
    stride_mt,
    p_cu,
    slots_per_row,
    p_term_cu,
    term_slots_per_row,
    keys,
    p_response_start,
    p_response_cu,
    n_rows,
    width,
    i_b,
    TERM_SPARE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    at_mask = (keys.bos + keys.first) * stride_mt
    if p_cu is None:
        at_mask += i_b.to(tl.int64) * stride_mb
    first = slot_base(p_cu, i_b, slots_per_row, 1, CHUNK)
    term = slot_base(p_term_cu, i_b, term_slots_per_row, TERM_SPARE, CHUNK)
    n_kept = slot_base(p_term_cu, i_b + 1, term_slots_per_row, TERM_SPARE, CHUNK) - term
    kept = keys.first * 0
    if p_response_cu is not None:
        # A row that does not own its tokens does not own slots either.
        _, _, whole = segment(p_response_cu, i_b, n_rows, width)
        n_kept = tl.where(whole, n_kept, 0)
    if p_response_start is not None:
        start = tl.load(p_response_start + i_b).to(tl.int64)
        kept = tl.maximum(start - keys.first, 0) // CHUNK
    return Slots(at_mask, first, term, kept, n_kept)


@triton.jit
def token_positions(response, j):
    """Of response tokens ``j``: whether each counts, and its position among the row's keys; -1 for none."""
    live = j < response.place.length
    if response.p_mask is not None:
        live = live & (tl.load(response.p_mask + response.place.at_mask + j, mask=live, other=0) != 0)
    if response.p_index is None:
        t = response.place.start + j
    else:
        t = tl.load(response.p_index + response.place.at_index + j, mask=live, other=-1).to(tl.int64)
    return live, t


@triton.jit
def is_outside(response, keys, live, t):
    """Which tokens have a position outside the row's keys."""
    outside = (t < 0) | (t >= keys.length)
    if response.p_index is not None:
        outside = outside & (t != -1)
    return live & outside


@triton.jit
def mean_of_group(terms, keys, live, t, i_h, heads, G: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr):
    """What key head ``i_h`` adds to the mean over heads at positions ``t``, [N]."""
    slots = terms.slots
    seen = live & (t >= keys.first) & (t < keys.end)
    i = tl.where(seen, t - keys.first, 0).to(tl.int32)
    kept = slots.kept.to(tl.int32)
    seen = seen & is_visible(terms.p_mask, slots.at_mask, terms.stride_mask, i, 0, keys.end - keys.first)
    seen = seen & (i // CHUNK - kept < slots.n_kept)
    head = i_h * G
    p_terms = terms.p_terms + (slots.term * heads + head) * CHUNK
    return group_mean(p_terms, terms.p_factor + slots.first * heads + head, kept, i, seen, heads, G, H, CHUNK)


@triton.jit
def mean_of_terms(terms, keys, live, t, kv_heads, G: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr):
    """Mean over heads at positions ``t``, [N]."""
    mean = tl.zeros(t.shape, dtype=tl.float32)
    for i_h in range(kv_heads):
        mean += mean_of_group(terms, keys, live, t, i_h, kv_heads * G, G, H, CHUNK)
    return mean


@triton.jit
def mean_of_groups(p_groups, total, kv_heads, j, live):
    """The same from what the programs of each key head left, ``total`` apart, at the row's tokens ``j``."""
    mean = tl.zeros(j.shape, dtype=tl.float32)
    for start in range(0, kv_heads, 4):
        for i in tl.static_range(4):
            there = live & (start + i < kv_heads)
            mean += tl.load(p_groups + (start + i) * total + j, mask=there, other=0.0, cache_modifier=".cg")
    return mean


@triton.jit
def head_weights(p_head_mask, o_h, m_h, heads, n_layers):
    """Weight of heads ``o_h`` in the mean over chosen heads and layers."""
    weight = tl.where(m_h, 1.0, 0.0)
    n_chosen = heads
    if p_head_mask is not None:
        weight = tl.where(tl.load(p_head_mask + o_h, mask=m_h, other=0) != 0, 1.0, 0.0)
        n_chosen = 0
        for start in range(0, heads, 64):
            o_a = start + tl.arange(0, 64)
            chosen = tl.load(p_head_mask + o_a, mask=o_a < heads, other=0) != 0
            n_chosen += tl.sum(chosen.to(tl.int32))
        n_chosen = tl.maximum(n_chosen, 1)
    return weight / (n_chosen * n_layers).to(tl.float32)


@triton.jit
def attend(
    p_query,  # of this row and key head
    stride_qh,
    p_key,  # of this row and key head, at its first visible key
    stride_kt,
    p_largest,  # [slots, Hq]
    p_sum,  # [slots, Hq]
    keys,
    terms,
    begin,  # first chunk
    stop,
    o_h,  # [M]
    m_h,  # [M]
    heads,
    scaling,
    softcap,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROLL: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    FAR: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax partials of some chunks of one key head, and the terms of those that are kept."""
    slots = terms.slots
    o_n = tl.arange(0, CHUNK)
    for i_c in tl.range(begin, stop, num_stages=STAGES):
        i = i_c * CHUNK + o_n  # counted from the first visible key
        visible = is_visible(terms.p_mask, slots.at_mask, terms.stride_mask, i, 0, keys.end - keys.first)
        slot = slots.first + i_c  # int64
        scores = chunk_scores(
            p_query,
            stride_qh,
            p_key + (slot - slots.first) * CHUNK * stride_kt,
            stride_kt,
            i < keys.end - keys.first,
            scaling,
            softcap,
            G,
            M,
            D,
            BLOCK_D,
            ROLL,
            STRIDE_QD,
            STRIDE_KD,
            FAR,
            UPCAST,
            STAGES,
        )
        largest, sums, found = softmax_partial(scores, visible)
        tl.store(p_largest + slot * heads + o_h, largest, mask=m_h)
        tl.store(p_sum + slot * heads + o_h, sums, mask=m_h)
        kept = (i_c >= slots.kept) & (i_c - slots.kept < slots.n_kept)
        p_kept = terms.p_terms + (slots.term + i_c - slots.kept) * heads * CHUNK
        tl.store(p_kept + (o_h[:, None] * CHUNK + o_n[None, :]), found, mask=m_h[:, None] & kept)


@triton.jit
def group_means(
    p_groups,  # [Hkv, total]
    total,
    keys,
    terms,
    response,
    i_h,
    heads,
    G: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Leaves what key head ``i_h`` adds to the mean over heads at the row's response tokens."""
    p_out = p_groups + i_h.to(tl.int64) * total + response.place.lo
    for start in range(0, response.place.length, TOKENS):
        j = start + tl.arange(0, TOKENS)
        live, t = token_positions(response, j)
        mean = mean_of_group(terms, keys, live, t, i_h, heads, G, H, CHUNK)
        tl.store(p_out + j, mean, mask=j < response.place.length)
