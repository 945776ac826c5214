"""One attention row per sequence, from queries and keys to the mean over heads."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.handoff import together
from csrc_triton.device.layout import (
    OUT_OF_RANGE,
    as_mask,
    bounds_of_row,
    is_live,
    is_outside,
    is_visible,
    position_of,
    slot_base,
    tokens_of_chunk,
)
from csrc_triton.device.math import INF, LOG2E, tanh

FEW = tl.constexpr(16)
"""Keys whose terms are relative to one score and are added together."""


class Slots(NamedTuple):
    """Where what the programs of a row leave to each other lies."""

    first: Any  # of the row's first chunk
    score: Any  # of its first kept chunk
    kept: Any  # the first chunk whose scores are kept
    n_kept: Any  # how many may be


class Heads(NamedTuple):
    """The query heads of one key head, [M]."""

    i_h: Any  # the key head
    first: Any
    o_h: Any
    m_h: Any  # which there are
    n: Any  # of all key heads
    weight: Any  # in the mean over heads


class Attended(NamedTuple):
    """The keys of a row, and what was left of them."""

    axis: Any
    layer: Any
    left: Any
    keys: Any
    slots: Any


@triton.jit
def slots_of_row(axis, left, response, keys, i_b, mean: tl.constexpr):
    first = slot_base(axis.p_cu, i_b, left.slots_per_row, 1, mean.KEYS)
    spare = mean.SPARE
    score = slot_base(left.p_score_cu, i_b, left.score_slots_per_row, spare, mean.KEYS)
    n_kept = slot_base(left.p_score_cu, i_b + 1, left.score_slots_per_row, spare, mean.KEYS) - score
    # A row that does not own its tokens does not own slots either.
    whole = keys.whole
    if response.p_cu is not None:
        whole = whole & bounds_of_row(response.p_cu, response.n_rows, response.width, i_b).whole
    n_kept = tl.where(whole, tl.minimum(n_kept, keys.n_chunks), 0)
    score = tl.where(whole, score, 0)
    kept = keys.n_chunks * 0
    if response.p_start is not None:
        start = tl.load(response.p_start + i_b).to(tl.int64)
        kept = tl.minimum(tl.maximum(start - keys.first, 0) // mean.KEYS, keys.n_chunks).to(tl.int32)
    return Slots(first, score, kept, n_kept.to(tl.int32))


@triton.jit
def heads_of(layer, i_h, product: tl.constexpr):
    """The query heads of key head ``i_h``."""
    heads = layer.kv_heads * product.G
    first = i_h * product.G
    o_g = tl.arange(0, product.M)
    o_h = first + o_g
    m_h = o_g < product.G
    weight = head_weights(layer.p_head_mask, o_h, m_h, heads, layer.n_layers)
    return Heads(i_h, first, o_h, m_h, heads, weight)


@triton.jit
def is_attended(attended, i, n):
    """Whether the query sees keys ``i`` ([N]), counted from the first visible one, of ``n``."""
    axis = attended.axis
    keys = attended.keys
    at_mask = keys.row * axis.stride_mb + (keys.bos + keys.first) * axis.stride_mt
    return is_visible(axis.p_mask, at_mask, axis.stride_mt, i, 0, n)


@triton.jit
def mask_values(attended, head, i, read):
    """What the layer's mask adds for some heads and keys ``i``, counted from the first visible one."""
    layer = attended.layer
    keys = attended.keys
    first = keys.row * layer.stride_ab + (keys.bos + keys.first) * layer.stride_at
    offset = head.to(tl.int64) * layer.stride_ah + i.to(tl.int64) * layer.stride_at
    return tl.load(layer.p_mask_row + first + offset, mask=read, other=0.0).to(tl.float32)


@triton.jit
def held_query(p_query, stride_qh, m_q, product: tl.constexpr):
    """The heads ``m_q`` ([M]) of a query, [M, BLOCK_D], if one part is their whole width; else nothing."""
    if product.BLOCK_D >= product.D:
        held = query_part(p_query, stride_qh, m_q, 0, product)
    else:
        held = None
    return held


@triton.jit
def query_part(p_query, stride_qh, m_q, start, product: tl.constexpr):
    """One part of their width, [M, BLOCK_D]."""
    o_g = tl.arange(0, m_q.shape[0])
    o_d = start + tl.arange(0, product.BLOCK_D)
    p_q = p_query + o_g.to(tl.int64)[:, None] * stride_qh * product.QUERY_UNIT
    return tl.load(
        p_q + o_d[None, :] * product.STRIDE_QD, mask=m_q[:, None] & (o_d < product.D)[None, :], other=0.0
    )


@triton.jit
def chunk_scores(
    held,  # what held_query made of the query
    p_query,  # of this row and key head
    p_key,  # of this row and key head, at the chunk's first key
    m_q,  # [M] which heads there are
    o_n,  # [N] which keys, counted from the chunk's first
    layer,
    product: tl.constexpr,
):
    """Scores of a chunk of keys for the heads that share them, in units of ``log(2)``: [N, M].

    The keys are the many rows of the product, which tensor cores want in its first operand.
    """
    if product.FAR:
        o_n = o_n.to(tl.int64)
    p_k = p_key + o_n[:, None] * layer.stride_kt * product.KEY_UNIT
    scores = tl.zeros([o_n.shape[0], m_q.shape[0]], dtype=tl.float32)
    if held is None:
        for start in tl.range(0, product.D, product.BLOCK_D, num_stages=product.STAGES):
            q = query_part(p_query, layer.stride_qh, m_q, start, product)
            scores = add_product(scores, q, p_k, start, product)
    else:
        scores = add_product(scores, held, p_k, 0, product)
    return scaled_scores(scores, layer.scaling, layer.softcap)


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
    start,
    product: tl.constexpr,
):
    """Adds the product over one part of the width."""
    o_d = start + tl.arange(0, product.BLOCK_D)
    p_k = p_k + o_d[None, :] * product.STRIDE_KD
    if product.D % product.BLOCK_D == 0:
        k = tl.load(p_k, eviction_policy="evict_first")  # [N, BLOCK_D]
    else:
        k = tl.load(p_k, mask=(o_d < product.D)[None, :], other=0.0, eviction_policy="evict_first")
    if product.UPCAST or q.dtype != k.dtype:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    return tl.dot(k, tl.trans(q), scores, input_precision="ieee")


@triton.jit
def softmax_partial(scores):
    """Per FEW keys and head the largest score and the sum of ``exp2(score - largest)``: [N / FEW, M].

    So few keys lie in one warp, which then waits for no other.
    """
    N: tl.constexpr = scores.shape[0]
    M: tl.constexpr = scores.shape[1]
    scores = tl.reshape(scores, [N // FEW, FEW, M])
    largest = tl.max(scores, axis=1)
    terms = tl.exp2(scores - finite_reference(largest)[:, None, :])
    return largest, tl.sum(terms, axis=1)


@triton.jit
def finite_reference(largest):
    """What scores are compared to: -inf - -inf is no number."""
    return tl.where(largest == -INF, 0.0, largest)


@triton.jit
def attend(attended, heads, begin, stop, product: tl.constexpr, CHUNK: tl.constexpr):
    """Softmax partials of the chunks from ``begin`` to ``stop``, and the scores of those that are kept."""
    layer = attended.layer
    left = attended.left
    keys = attended.keys
    slots = attended.slots
    # Products with 64 bits from the left, the unit last: a stride itself may need them.
    head = heads.i_h.to(tl.int64)
    at_query = keys.row * layer.stride_qb * product.QUERY_UNIT
    at_query += (keys.bos + keys.position) * layer.stride_qt * product.QUERY_UNIT
    p_query = layer.p_query + at_query + head * product.G * layer.stride_qh * product.QUERY_UNIT
    at_key = keys.row * layer.stride_kb * product.KEY_UNIT + head * layer.stride_kh * product.KEY_UNIT
    p_key = layer.p_key + at_key + (keys.bos + keys.first) * layer.stride_kt * product.KEY_UNIT
    o_h = heads.o_h
    m_h = heads.m_h
    o_n = tl.arange(0, CHUNK)
    o_f = tl.arange(0, CHUNK // FEW)
    n = (keys.end - keys.first).to(tl.int32)
    p_partials = partials_of_head(left, o_h) + slots.first * (CHUNK // FEW) * 2
    p_chunk = p_key + begin.to(tl.int64) * CHUNK * layer.stride_kt * product.KEY_UNIT
    p_kept = left.p_scores + (slots.score + begin - slots.kept) * heads.n * CHUNK
    p_kept = p_kept + (o_h[None, :] * CHUNK + o_n[:, None])
    # A row that sees nothing has no position that its query could be read at.
    held = held_query(p_query, layer.stride_qh, m_h & as_mask(begin < stop), product)
    for i_c in tl.range(begin, stop, num_stages=product.STAGES):
        i = i_c * CHUNK + o_n  # counted from the first visible key
        visible = is_attended(attended, i, n)
        # What is behind the last key reads the last again: no load has a condition of its own.
        here = tl.minimum(o_n, n - 1 - i_c * CHUNK)
        scores = chunk_scores(held, p_query, p_chunk, m_h, here, layer, product)
        if layer.p_mask_row is not None:
            added = mask_values(attended, o_h[None, :], i[:, None], visible[:, None] & m_h[None, :])
            # -inf hides a key, whatever its score.
            scores = tl.where(added == -INF, -INF, scores + added * LOG2E)
        scores = tl.where(visible[:, None], scores, -INF)
        largest, sums = softmax_partial(scores)
        p_few = p_partials[None, :] + (o_f + i_c * (CHUNK // FEW))[:, None] * 2
        store_from_here(p_few, largest, sums, m_h[None, :], product.PTX)
        kept = (i_c >= slots.kept) & (i_c - slots.kept < slots.n_kept)
        store_from_here(p_kept, scores, None, m_h[None, :] & as_mask(kept), product.PTX)
        p_kept += heads.n * CHUNK
        p_chunk += CHUNK * layer.stride_kt.to(tl.int64) * product.KEY_UNIT


@triton.jit
def store_from_here(p_x, x, y, mask, PTX: tl.constexpr):
    """Stores ``x`` (float32), and ``y`` behind it if there is one, each by a thread that has it.

    ``tl.store`` hands numbers on first, through shared memory and behind two barriers, so that neighbours are
    stored by neighbours. What a warp has of a product fills sectors of 32 bytes as it is.
    """
    if PTX:
        p_x = p_x.to(tl.int64)
        mask = mask.to(tl.int32)
        if y is None:
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.f32 [$1], $2; mov.b32 $0, 0; }",
                "=r,l,f,r",
                [p_x, x, mask],
                tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.global.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }",
                "=r,l,f,f,r",
                [p_x, x, y, mask],
                tl.int32,
                is_pure=False,
                pack=1,
            )
    else:
        tl.store(p_x, x, mask=mask)
        if y is not None:
            tl.store(p_x + 1, y, mask=mask)


@triton.jit
def partials_of_head(left, o_h):
    return tl.multiple_of(left.p_partials, 16) + o_h.to(tl.int64) * left.slots * 2


@triton.jit
def fold_partials(attended, heads, CHUNK: tl.constexpr, FOLD: tl.constexpr):
    """Stores, per head, what makes of a score its share in the mean over heads."""
    layer = attended.layer
    left = attended.left
    sink = tl.full([heads.o_h.shape[0]], -INF, tl.float32)
    if layer.p_sinks is not None:
        sink = tl.load(layer.p_sinks + heads.o_h, mask=heads.m_h, other=0.0).to(tl.float32) * LOG2E
    if layer.p_lse is None:
        n = attended.keys.n_chunks * (CHUNK // FEW)
        # A head that is not there reads the first one's: no load depends on a condition of its own.
        p_head = partials_of_head(left, tl.where(heads.m_h, heads.o_h, heads.first))
        p_head += attended.slots.first * (CHUNK // FEW) * 2
        highest = tl.full([heads.o_h.shape[0], FOLD], -INF, tl.float32)
        terms = tl.zeros([heads.o_h.shape[0], FOLD], tl.float32)
        for start in range(0, n, FOLD):
            o_f = start + tl.arange(0, FOLD)
            p_few = p_head[:, None] + tl.minimum(o_f, n - 1)[None, :] * 2
            p_pair = p_few[:, :, None] + tl.arange(0, 2)[None, None, :]
            largest, sums = tl.split(tl.load(p_pair, cache_modifier=".cg"))
            largest = tl.where((o_f < n)[None, :], largest, -INF)
            higher = tl.maximum(highest, largest)
            reference = finite_reference(higher)
            terms = terms * tl.exp2(highest - reference) + sums * tl.exp2(largest - reference)
            highest = higher
        largest = tl.maximum(sink, tl.max(highest, axis=1))
        reference = finite_reference(largest)
        total = tl.sum(terms * tl.exp2(highest - reference[:, None]), axis=1)
        total += tl.exp2(sink - reference)
    else:
        lse = known_lse(attended, heads)
        largest = tl.maximum(sink, lse)
        reference = finite_reference(largest)
        total = tl.exp2(sink - reference) + tl.exp2(lse - reference)
    counting = (heads.weight > 0.0) & (total != 0.0)  # 0 of a head that sees nothing; a NaN stays one
    share = tl.where(counting, heads.weight / total, 0.0)
    p_head = left.p_heads + (attended.keys.row * heads.n + heads.o_h) * 2
    p_head = p_head[:, None] + tl.arange(0, 2)[None, :]
    tl.store(p_head, tl.join(reference, share), mask=heads.m_h[:, None])


@triton.jit
def known_lse(attended, heads):
    """The layer's own log-sum-exp of the row's query, [M], in units of log(2)."""
    layer = attended.layer
    keys = attended.keys
    p_lse = layer.p_lse + keys.row * layer.stride_lb + (keys.bos + keys.position) * layer.stride_lt
    lse = tl.load(p_lse + heads.o_h * layer.stride_lh, mask=heads.m_h & as_mask(keys.end > 0), other=0.0)
    return lse.to(tl.float32) * LOG2E


@triton.jit
def mean_of_group(attended, live, t, i_h, mean: tl.constexpr):
    """What the heads of key head ``i_h`` add to the mean over heads at positions ``t``, [N].

    What is not seen reads the row's first score, and selects it away: all loads are on their way at once,
    since none depends on a condition of its own.
    """
    left = attended.left
    keys = attended.keys
    slots = attended.slots
    seen = (t >= keys.first) & (t < keys.end)
    i = tl.where(seen, t - keys.first, 0).to(tl.int32)
    i_c = i // mean.KEYS - slots.kept
    seen = seen & (i_c >= 0) & (i_c < slots.n_kept)
    heads = attended.layer.kv_heads * mean.G
    first = i_h * mean.G
    at = tl.where(seen, i_c * (heads * mean.KEYS) + i % mean.KEYS, 0)
    p_scores = left.p_scores + (slots.score * heads + first) * mean.KEYS
    p_heads = left.p_heads + (keys.row * heads + first) * 2
    out = tl.zeros(at.shape, dtype=tl.float32)
    H: tl.constexpr = mean.H
    for start in range(0, mean.G, H):
        scores = ()
        for k in tl.static_range(H):
            g = tl.minimum(start + k, mean.G - 1)
            scores = scores + (tl.load(p_scores + g * mean.KEYS + at, cache_modifier=".cg"),)  # noqa: RUF005
        together()
        for k in tl.static_range(H):
            g = tl.minimum(start + k, mean.G - 1)
            score = scores[k]
            reference = tl.load(p_heads + g * 2, cache_modifier=".cg")
            share = tl.load(p_heads + g * 2 + 1, cache_modifier=".cg")
            share = tl.where(start + k < mean.G, share, 0.0)
            # A head that is not chosen must not spread a NaN, nor a row's NaN reach a key that is hidden.
            term = tl.where(score == -INF, 0.0, tl.exp2(score - reference) * share)
            out += tl.where(share == 0.0, 0.0, term)
    return tl.where(live & seen, out, 0.0)


@triton.jit
def mean_of_scores(attended, live, t, mean: tl.constexpr):
    """Mean over heads at positions ``t``, [N]."""
    out = tl.zeros(t.shape, dtype=tl.float32)
    for i_h in range(attended.layer.kv_heads):
        out += mean_of_group(attended, live, t, i_h, mean)
    return out


@triton.jit
def mean_of_groups(attended, response, place, j, live):
    """The same from what the programs of each key head left, at the row's tokens ``j``."""
    kv_heads = attended.layer.kv_heads
    p_groups = attended.left.p_groups + place.lo
    at = tl.where(j < place.length, j, 0)
    out = tl.zeros(j.shape, dtype=tl.float32)
    for start in range(0, kv_heads, 8):
        for i in tl.static_range(8):
            p_group = p_groups + tl.minimum(start + i, kv_heads - 1) * all_tokens(response, place)
            found = tl.load(p_group + at, cache_modifier=".cg")
            out += tl.where(start + i < kv_heads, found, 0.0)
    return tl.where(live, out, 0.0)


@triton.jit
def all_tokens(response, place):
    """Response tokens of all rows, int64."""
    total = place.row * 0 + response.width
    if response.p_cu is None:
        total = total * response.n_rows
    return total


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
def leave_group(attended, response, place, i_h, mean: tl.constexpr, TOKENS: tl.constexpr):
    """Leaves what key head ``i_h`` adds to the mean over heads at the row's response tokens."""
    p_out = attended.left.p_groups + i_h.to(tl.int64) * all_tokens(response, place) + place.lo
    for start in range(0, place.length, TOKENS):
        j = start + tl.arange(0, TOKENS)
        live = is_live(response, place, j)
        t = position_of(response, place, j, j < place.length)
        tl.store(p_out + j, mean_of_group(attended, live, t, i_h, mean), mask=j < place.length)


@triton.jit
def store_mean(
    attended, response, place, p_out, i_c, mean: tl.constexpr, SOURCE: tl.constexpr, CHUNK: tl.constexpr
):
    """Mean over heads of the attention at a chunk of a row's tokens, on top of other layers' where ``ADD``.

    Also whether one of the tokens that count lies outside its row's keys.
    """
    keys = attended.keys
    j = tokens_of_chunk(i_c, CHUNK)
    live = is_live(response, place, j)
    t = position_of(response, place, j, live)
    outside = is_outside(response, keys, live, t) | (keys.sound == 0)
    if SOURCE == "groups":
        found = mean_of_groups(attended, response, place, j, live)
    else:
        found = mean_of_scores(attended, live, t, mean)
    if mean.ADD:
        found = tl.load(p_out + place.lo + j, mask=live, other=0.0) + found
    found = tl.where(live, tl.where(keys.sound, found, float("nan")), 0.0)
    tl.store(p_out + place.lo + j, found, mask=j < place.length)
    return found, tl.max(outside.to(tl.int32))


@triton.jit
def store_means(
    attended,
    response,
    place,
    p_out,
    p_status,
    begin,
    stop,
    mean: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The same of some chunks, and whether the row is out of range."""
    for i_c in range(begin, stop):
        _, outside = store_mean(attended, response, place, p_out, i_c, mean, SOURCE, CHUNK)
        if p_status is not None:
            tl.store(p_status + place.row, OUT_OF_RANGE, mask=outside != 0)
