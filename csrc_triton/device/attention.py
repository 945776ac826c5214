"""One attention row per sequence, from queries and keys to the mean over heads."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.layout import (
    OUT_OF_RANGE,
    bounds_of_row,
    is_outside,
    is_visible,
    slot_base,
    token_positions,
)
from csrc_triton.device.math import INF, LOG2E, tanh

FEW = tl.constexpr(16)
"""Keys whose terms are relative to one score and are added together."""


class Slots(NamedTuple):
    """Where what the programs of a row leave to each other lies."""

    at_mask: Any  # offset of the row's first visible key in the attention mask
    first: Any  # of the row's first chunk
    term: Any  # of its first kept chunk
    kept: Any  # the first chunk whose terms are kept
    n_kept: Any  # how many may be


class MaskRow(NamedTuple):
    """What a layer's own mask adds to the scores, at the row's first visible key."""

    p_added: Any  # or None
    stride_h: Any
    stride_t: Any


class Tile(NamedTuple):
    """Constants of the product of queries and keys; passed on as it is, like ``Rules``."""

    D: Any
    BLOCK_D: Any  # a part of the width
    STRIDE_QD: Any
    STRIDE_KD: Any
    QUERY_UNIT: Any  # what strides are counted in
    KEY_UNIT: Any
    FAR: Any  # whether keys of a chunk lie so far apart that 32 bits do not count it
    UPCAST: Any
    STAGES: Any  # parts, or chunks, on their way at once, and one


class Terms(NamedTuple):
    p_terms: Any  # [term slots, Hq, CHUNK]
    p_factor: Any  # [slots, Hq]
    p_mask: Any  # the attention mask, or None
    stride_mask: Any
    mask_row: Any
    slots: Any


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
        n_kept = tl.where(bounds_of_row(p_response_cu, n_rows, width, i_b).whole, n_kept, 0)
    if p_response_start is not None:
        start = tl.load(p_response_start + i_b).to(tl.int64)
        kept = tl.maximum(start - keys.first, 0) // CHUNK
    return Slots(at_mask, first, term, kept, n_kept)


@triton.jit
def held_query(p_query, stride_qh, m_q, tile):
    """The heads ``m_q`` ([M]) of a query, [M, BLOCK_D], if one part is their whole width; else nothing."""
    if tile.BLOCK_D >= tile.D:
        held = query_part(p_query, stride_qh, m_q, 0, tile)
    else:
        held = None
    return held


@triton.jit
def query_part(p_query, stride_qh, m_q, start, tile):
    """One part of their width, [M, BLOCK_D]."""
    o_g = tl.arange(0, m_q.shape[0])
    o_d = start + tl.arange(0, tile.BLOCK_D)
    p_q = p_query + o_g.to(tl.int64)[:, None] * stride_qh * tile.QUERY_UNIT + o_d[None, :] * tile.STRIDE_QD
    return tl.load(p_q, mask=m_q[:, None] & (o_d < tile.D)[None, :], other=0.0)


@triton.jit
def chunk_scores(
    held,  # what held_query made of the query
    p_query,  # of this row and key head
    stride_qh,  # in QUERY_UNIT
    p_key,  # of this row and key head, at the chunk's first key
    stride_kt,  # in KEY_UNIT
    m_q,  # [M] which heads there are
    inside,  # [N] which keys may be read
    scale,
    softcap,
    tile,
):
    """Scores of a chunk of keys for the heads that share them, in units of ``log(2)``: [N, M].

    The keys are the many rows of the product, which tensor cores want in its first operand.
    """
    o_n = tl.arange(0, inside.shape[0])
    if tile.FAR:
        o_n = o_n.to(tl.int64)
    p_k = p_key + o_n[:, None] * stride_kt * tile.KEY_UNIT
    scores = tl.zeros([inside.shape[0], m_q.shape[0]], dtype=tl.float32)
    if held is None:
        for start in tl.range(0, tile.D, tile.BLOCK_D, num_stages=tile.STAGES):
            q = query_part(p_query, stride_qh, m_q, start, tile)
            scores = add_product(scores, q, p_k, inside[:, None], start, tile)
    else:
        scores = add_product(scores, held, p_k, inside[:, None], 0, tile)
    return scaled_scores(scores, scale, softcap)


@triton.jit
def scaled_scores(products, scale, softcap):
    """Scores in units of ``log(2)`` of products of queries and keys."""
    if softcap is None:
        scores = products * (scale * LOG2E)
    else:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    return scores


@triton.jit
def add_product(
    scores,  # [N, M]
    q,  # [M, BLOCK_D]
    p_k,  # [N, 1]
    m_k,  # [N, 1]
    start,
    tile,
):
    """Adds the product over one part of the width."""
    o_d = start + tl.arange(0, tile.BLOCK_D)
    k = tl.load(
        p_k + o_d[None, :] * tile.STRIDE_KD,
        mask=m_k & (o_d < tile.D)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )  # [N, BLOCK_D]
    if tile.UPCAST or q.dtype != k.dtype:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    return tl.dot(k, tl.trans(q), scores, input_precision="ieee")


@triton.jit
def mask_values(mask_row, head, i, read):
    """What the layer's mask adds for some heads and keys."""
    offset = head.to(tl.int64) * mask_row.stride_h + i.to(tl.int64) * mask_row.stride_t
    return tl.load(mask_row.p_added + offset, mask=read, other=0.0).to(tl.float32)


@triton.jit
def masked_scores(scores, mask_row, head, i, read):
    """Scores with what the layer's mask adds; -inf where it hides a key, whatever its score."""
    added = mask_values(mask_row, head, i, read)
    return tl.where(added == -INF, -INF, scores + added * LOG2E)


@triton.jit
def softmax_partial(scores, visible):
    """Per FEW keys and head the largest visible score and the sum of ``exp2(score - largest)``; its terms.

    [N / FEW, M] and [N, M]. So few keys lie in one warp, which then waits for no other.
    """
    N: tl.constexpr = scores.shape[0]
    M: tl.constexpr = scores.shape[1]
    scores = tl.reshape(tl.where(visible[:, None], scores, -INF), [N // FEW, FEW, M])
    seen = tl.reshape(tl.broadcast_to(visible[:, None], [N, M]), [N // FEW, FEW, M])
    largest = tl.max(scores, axis=1)
    terms = tl.where(seen, tl.exp2(scores - finite_reference(largest)[:, None, :]), 0.0)
    return largest, tl.sum(terms, axis=1), tl.reshape(terms, [N, M])


@triton.jit
def finite_reference(largest):
    """What scores are compared to: -inf - -inf is no number."""
    return tl.where(largest == -INF, 0.0, largest)


@triton.jit
def attend(
    p_query,  # of this row and key head
    stride_qh,
    p_key,  # of this row and key head, at its first visible key
    stride_kt,
    p_partials,  # [slots, CHUNK // FEW, Hq, 2]: the largest score, the sum of the terms
    keys,
    terms,
    begin,  # first chunk
    stop,
    o_h,  # [M]
    m_h,  # [M]
    heads,
    scaling,
    softcap,
    CHUNK: tl.constexpr,
    tile,
):
    """Softmax partials of some chunks of one key head, and the terms of those that are kept."""
    slots = terms.slots
    o_n = tl.arange(0, CHUNK)
    # A row that sees nothing has no position that its query could be read at.
    held = held_query(p_query, stride_qh, m_h & (begin < stop), tile)
    for i_c in tl.range(begin, stop, num_stages=tile.STAGES):
        i = i_c * CHUNK + o_n  # counted from the first visible key
        visible = is_visible(terms.p_mask, slots.at_mask, terms.stride_mask, i, 0, keys.end - keys.first)
        slot = slots.first + i_c  # int64
        p_chunk = p_key + (slot - slots.first) * CHUNK * stride_kt * tile.KEY_UNIT
        inside = i < keys.end - keys.first
        scores = chunk_scores(
            held, p_query, stride_qh, p_chunk, stride_kt, m_h, inside, scaling, softcap, tile
        )
        if terms.mask_row.p_added is not None:
            read = visible[:, None] & m_h[None, :]
            scores = masked_scores(scores, terms.mask_row, o_h[None, :], i[:, None], read)
        largest, sums, found = softmax_partial(scores, visible)
        at = (slot * (CHUNK // FEW) + tl.arange(0, CHUNK // FEW))[:, None] * heads + o_h[None, :]
        p_partial = p_partials + (at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :])
        tl.store(p_partial, tl.join(largest, sums), mask=m_h[None, :, None])
        kept = (i_c >= slots.kept) & (i_c - slots.kept < slots.n_kept)
        p_kept = terms.p_terms + (slots.term + i_c - slots.kept) * heads * CHUNK
        tl.store(p_kept + (o_h[None, :] * CHUNK + o_n[:, None]), found, mask=m_h[None, :] & kept)


@triton.jit
def fold_chunks(
    p_partials,  # [slots, heads, 2]: as ``attend`` leaves them, a slot for every FEW keys
    p_factor,  # [slots, heads] out
    slot,  # of the first chunk
    n_chunks,
    heads,
    o_h,  # [M]
    m_h,  # [M]
    sink,  # [M], in units of log(2); -inf for none
    lse,  # [M], in units of log(2), or None
    weight,  # [M], of each head in the mean
    FOLD: tl.constexpr,
):
    """Stores, per chunk and head, what makes of a term its share in the mean over heads."""
    largest = sink
    if lse is None:
        highest = tl.full([o_h.shape[0], FOLD], -INF, tl.float32)
        for start in range(0, n_chunks, FOLD):
            at, inside = partials_of(slot, start, n_chunks, heads, o_h, m_h, FOLD)
            chunk = tl.load(p_partials + at * 2, mask=inside, other=-INF, cache_modifier=".cg")
            highest = tl.maximum(highest, chunk)
        largest = tl.maximum(sink, tl.max(highest, axis=1))
    else:
        largest = tl.maximum(largest, lse)
    reference = finite_reference(largest)
    total = tl.exp2(sink - reference)
    if lse is None:
        terms = tl.zeros([o_h.shape[0], FOLD], tl.float32)
        for start in range(0, n_chunks, FOLD):
            at, inside = partials_of(slot, start, n_chunks, heads, o_h, m_h, FOLD)
            chunk = tl.load(p_partials + at * 2, mask=inside, other=-INF, cache_modifier=".cg")
            sums = tl.load(p_partials + at * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
            terms += sums * chunk_factor(chunk, reference)
        total += tl.sum(terms, axis=1)
    else:
        total += tl.exp2(lse - reference)
    share = tl.where(weight > 0.0, weight / total, 0.0)
    for start in range(0, n_chunks, FOLD):
        at, inside = partials_of(slot, start, n_chunks, heads, o_h, m_h, FOLD)
        chunk = tl.load(p_partials + at * 2, mask=inside, other=-INF, cache_modifier=".cg")
        factor = chunk_factor(chunk, reference) * share[:, None]
        tl.store(p_factor + at, tl.where((weight > 0.0)[:, None], factor, 0.0), mask=inside)


@triton.jit
def chunk_factor(largest, reference):
    """From terms relative to each chunk's largest score ([M, FOLD]) to the row's; 0 of chunks without any."""
    return tl.where(largest == -INF, 0.0, tl.exp2(largest - reference[:, None]))


@triton.jit
def partials_of(slot, start, n_chunks, heads, o_h, m_h, FOLD: tl.constexpr):
    """Where the partials of FOLD chunks from ``start`` on lie, [M, FOLD], and which of them are there."""
    o_c = start + tl.arange(0, FOLD)
    return (slot + o_c)[None, :] * heads + o_h[:, None], (o_c < n_chunks)[None, :] & m_h[:, None]


@triton.jit
def group_mean(
    p_terms,  # of this row and group: [term slots, heads, CHUNK]
    p_factor,  # of this row and group: [slots, heads]
    kept,  # the first chunk that has a term slot
    i,  # [N] int32, keys
    seen,  # [N]
    mask_row,
    head,  # the first of them
    heads,
    G: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the G heads of one key head add to the mean over heads at some keys, [N]; 0 where not ``seen``."""
    mean = tl.zeros(i.shape, dtype=tl.float32)
    at_term = (i // CHUNK - kept) * heads * CHUNK + i % CHUNK
    for start in range(0, G, H):
        o_g = start + tl.arange(0, H)
        read = (o_g < G)[:, None] & seen[None, :]
        terms = tl.load(
            p_terms + (at_term[None, :] + o_g[:, None] * CHUNK), mask=read, other=0.0, cache_modifier=".cg"
        )  # [H, N]
        factor = tl.load(
            p_factor + ((i // FEW)[None, :] * heads + o_g[:, None]),
            mask=read,
            other=0.0,
            cache_modifier=".cg",
        )
        if mask_row.p_added is not None:
            hidden = mask_values(mask_row, (head + o_g)[:, None], i[None, :], read) == -INF
            factor = tl.where(hidden, 0.0, factor)
        # A head that is not chosen must not spread a NaN.
        mean += tl.sum(tl.where(factor == 0.0, 0.0, terms * factor), axis=0)
    return mean


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
    p_factor = terms.p_factor + slots.first * (CHUNK // FEW) * heads + head
    return group_mean(p_terms, p_factor, kept, i, seen, terms.mask_row, head, heads, G, H, CHUNK)


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


class Attended(NamedTuple):
    """The attention that credit is made of, of a row whose keys were read."""

    keys: Any
    terms: Any
    response: Any
    p_groups: Any
    total: Any
    kv_heads: Any


@triton.jit
def attention_at(
    attended,
    p_before,
    j,
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Mean over heads of the attention at tokens ``j``, on top of other layers' where ``ADD``.

    Also which tokens count, and whether one of them lies outside its row's keys.
    """
    keys = attended.keys
    live, t = token_positions(attended.response, j)
    outside = is_outside(attended.response, keys, live, t) | (keys.sound == 0)
    if SOURCE == "groups":
        p_groups = attended.p_groups + attended.response.place.lo
        mean = mean_of_groups(p_groups, attended.total, attended.kv_heads, j, live)
    else:
        mean = mean_of_terms(attended.terms, keys, live, t, attended.kv_heads, G, H, KEYS)
    if ADD:
        mean = tl.load(p_before + j, mask=live, other=0.0) + mean
    mean = tl.where(live, tl.where(keys.sound, mean, float("nan")), 0.0)
    return live, mean, tl.max(outside.to(tl.int32))


@triton.jit
def store_means(
    p_out,
    p_status,
    attended,
    begin,
    stop,
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``attention_at`` some chunks of a row's tokens, and whether the row is out of range."""
    for i_c in range(begin, stop):
        j = i_c * CHUNK + tl.arange(0, CHUNK)
        _, mean, outside = attention_at(attended, p_out, j, SOURCE, ADD, G, H, KEYS)
        tl.store(p_out + j, mean, mask=j < attended.response.place.length)
        if p_status is not None:
            tl.store(p_status, OUT_OF_RANGE, mask=outside != 0)
