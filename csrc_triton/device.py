"""Device functions that every kernel composes: each formula of the kernels stands here once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # few bits: a multiple of it by a small integer is exact
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
TINY = tl.constexpr(2.0**-126)
MAX_FINITE = tl.constexpr(3.4028234663852886e38)


# Elementwise


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= MAX_FINITE


@triton.jit
def expm1_residual(x):
    """``exp(x) - 1 - x``, to float32 accuracy also where it is tiny."""
    y = clamp(x, -40.0, 89.0)
    k = tl.floor(y * LOG2E + 0.5)
    r = y - k * LN2_HIGH - k * LN2_LOW
    q = r * (1.0 / 40320) + 1.0 / 5040
    q = q * r + 1.0 / 720
    q = q * r + 1.0 / 120
    q = q * r + 1.0 / 24
    q = q * r + 1.0 / 6
    q = (q * r + 0.5) * r * r
    # Half of 2**k, so that k = 128 does not overflow before the product does.
    bits = tl.where(k == k, k, 0.0).to(tl.int32) + 126
    half = (bits << 23).to(tl.float32, bitcast=True)
    full = (half * (r + q) + (half - 0.5)) * 2.0 - x
    return tl.where(k == 0.0, q, full)


@triton.jit
def tanh(x):
    size = clamp(tl.abs(x), 0.0, 20.0)
    e = expm1_residual(2.0 * size) + 2.0 * size
    magnitude = e / (e + 2.0)
    return tl.where(x < 0.0, -magnitude, magnitude)


# Rows, segments and the chunks they are cut into
#
# Partial results of a row lie in slots, one per chunk of CHUNK tokens. Row b owns the slots from slot_base(b)
# to slot_base(b + 1). When packed, these follow from cu_seqlens[b] alone, with `spare` slots to round up.


@triton.jit
def segment(p_cu, i_b, n_rows, total):
    """Bounds of packed row ``i_b`` among ``total`` tokens, and whether they are sound and overlap no row."""
    lo = tl.load(p_cu + i_b).to(tl.int64)
    hi = tl.load(p_cu + i_b + 1).to(tl.int64)
    wrong = ((lo < 0) | (lo > hi) | (hi > total)).to(tl.int32)
    for start in range(0, n_rows + 1, 256):
        o_b = start + tl.arange(0, 256)
        inside = o_b <= n_rows
        bound = tl.load(p_cu + o_b, mask=inside, other=0).to(tl.int64)
        crossing = ((o_b <= i_b) & (bound > lo)) | ((o_b > i_b) & (bound < hi))
        wrong += tl.sum((inside & crossing).to(tl.int32))
    return lo, hi, wrong == 0


@triton.jit
def slot_base(p_cu, i_b, slots_per_row, spare: tl.constexpr, CHUNK: tl.constexpr):
    if p_cu is None:
        base = i_b.to(tl.int64) * slots_per_row
    else:
        base = tl.load(p_cu + i_b).to(tl.int64) // CHUNK + spare * i_b
    return base


@triton.jit
def row_of_slot(i_slot, p_cu, n_rows, slots_per_row, CHUNK: tl.constexpr):
    """The row that owns a slot, and the slot's place in it; outside the row's chunks if nobody owns it."""
    if p_cu is None:
        row = i_slot // slots_per_row
    else:
        row = i_slot * 0
        above = row + n_rows
        while above - row > 1:
            middle = (row + above) // 2
            owned = slot_base(p_cu, middle, slots_per_row, 1, CHUNK) <= i_slot
            row = tl.where(owned, middle, row)
            above = tl.where(owned, above, middle)
    return row, i_slot - slot_base(p_cu, row, slots_per_row, 1, CHUNK)


# Attention


@triton.jit
def is_visible(p_mask, mask_offset, stride_mask, t, first, end):
    """Whether the query sees keys ``t`` ([N])."""
    visible = (t >= first) & (t < end)
    if p_mask is not None:
        attended = tl.load(p_mask + mask_offset + t * stride_mask, mask=visible, other=0)
        visible = visible & (attended != 0)
    return visible


@triton.jit
def chunk_scores(
    p_query,  # of this row and key head
    stride_qh,
    p_key,  # of this row and key head
    stride_kt,
    t,  # [N] int64
    inside,  # [N] which keys may be read
    scale,
    softcap,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of G query heads against a chunk of keys, in units of ``log(2)``: [M, N]."""
    o_g = tl.arange(0, M)
    scores = tl.zeros([M, t.shape[0]], dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=2):
        o_d = start + tl.arange(0, BLOCK_D)
        q = tl.load(
            p_query + o_g[:, None] * stride_qh + o_d[None, :] * STRIDE_QD,
            mask=(o_g < G)[:, None] & (o_d < D)[None, :],
            other=0.0,
        )  # [M, BLOCK_D]
        k = tl.load(
            p_key + t[:, None] * stride_kt + o_d[None, :] * STRIDE_KD,
            mask=inside[:, None] & (o_d < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )  # [N, BLOCK_D]
        if UPCAST or q.dtype != k.dtype:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    if softcap is None:
        scores = scores * (scale * LOG2E)
    else:
        scores = tanh(scores * (scale / softcap)) * (softcap * LOG2E)
    return scores


@triton.jit
def softmax_partial(scores, visible):
    """Per head, the largest visible score [M], the sum of ``exp2(score - largest)`` [M], its terms [M, N]."""
    largest = tl.max(tl.where(visible[None, :], scores, -INF), axis=1)
    terms = tl.where(visible[None, :], tl.exp2(scores - finite_reference(largest)[:, None]), 0.0)
    return largest, tl.sum(terms, axis=1), terms


@triton.jit
def finite_reference(largest):
    """What scores are compared to: -inf - -inf is no number."""
    return tl.where(largest == -INF, 0.0, largest)


@triton.jit
def fold_partials(
    p_largest,  # [slots, heads]
    p_sum,  # [slots, heads]
    p_factor,  # [slots, heads]
    base,
    n_chunks,
    heads,
    o_h,  # [H]
    sink,  # [H], in units of log(2); -inf for none
    lse,  # [H], in units of log(2), or None
    H: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Stores, per chunk and head, what makes of a term its share in the mean over heads."""
    m_h = o_h < heads
    largest = sink
    if lse is None:
        for start in range(0, n_chunks, FOLD):
            o_c = start + tl.arange(0, FOLD)
            inside = (o_c < n_chunks)[None, :] & m_h[:, None]
            at = (base + o_c)[None, :] * heads + o_h[:, None]
            chunk = tl.load(p_largest + at, mask=inside, other=-INF)
            largest = tl.maximum(largest, tl.max(chunk, axis=1))
    else:
        largest = tl.maximum(largest, lse)
    reference = finite_reference(largest)
    total = tl.exp2(sink - reference)
    if lse is None:
        for start in range(0, n_chunks, FOLD):
            o_c = start + tl.arange(0, FOLD)
            inside = (o_c < n_chunks)[None, :] & m_h[:, None]
            at = (base + o_c)[None, :] * heads + o_h[:, None]
            chunk = tl.load(p_largest + at, mask=inside, other=-INF)
            sums = tl.load(p_sum + at, mask=inside, other=0.0)
            total += tl.sum(sums * tl.exp2(finite_reference(chunk) - reference[:, None]), axis=1)
    else:
        total += tl.exp2(lse - reference)
    divisor = tl.where(m_h, total * heads, 1.0)
    for start in range(0, n_chunks, FOLD):
        o_c = start + tl.arange(0, FOLD)
        inside = (o_c < n_chunks)[None, :] & m_h[:, None]
        at = (base + o_c)[None, :] * heads + o_h[:, None]
        chunk = tl.load(p_largest + at, mask=inside, other=-INF)
        factor = tl.exp2(finite_reference(chunk) - reference[:, None]) / divisor[:, None]
        tl.store(p_factor + at, factor, mask=inside)


@triton.jit
def head_mean(p_terms, p_factor, term_slot, slot, place, seen, heads, H: tl.constexpr, CHUNK: tl.constexpr):
    """Mean over heads of the attention at some keys, [N]; 0 where not ``seen``."""
    mean = tl.zeros(place.shape, dtype=tl.float32)
    for start in range(0, heads, H):
        o_h = start + tl.arange(0, H)
        read = (o_h < heads)[:, None] & seen[None, :]
        terms = tl.load(
            p_terms + (term_slot[None, :] * heads + o_h[:, None]) * CHUNK + place[None, :],
            mask=read,
            other=0.0,
        )
        factor = tl.load(p_factor + slot[None, :] * heads + o_h[:, None], mask=read, other=0.0)
        mean += tl.sum(terms * factor, axis=0)
    return mean


# Rewards and advantages


@triton.jit
def kl_estimate(log_ratio, input_clip, output_clip, ESTIMATOR: tl.constexpr):
    k1 = clamp(log_ratio, -input_clip, input_clip)
    if ESTIMATOR == "k1":
        kl = k1
    elif ESTIMATOR == "abs":
        kl = tl.abs(k1)
    elif ESTIMATOR == "k2":
        kl = k1 * k1 * 0.5
    else:
        kl = expm1_residual(-k1)
    return clamp(kl, -output_clip, output_clip)


@triton.jit
def redistributed_score(score, credit, on_score, beta):
    return beta * score * credit + tl.where(on_score, (1.0 - beta) * score, 0.0)


@triton.jit
def compose_affine(a1, b1, a2, b2):
    # A positive coefficient must not underflow: 0 * inf is NaN where the serial recurrence has inf.
    a = tl.maximum(a1 * a2, tl.minimum(tl.minimum(a1, a2), TINY))
    return a, a2 * b1 + b2


@triton.jit
def affine_chunk(a, b, carry, UNIT: tl.constexpr):
    """A chunk of ``w_i = a_i * w_{i-1} + b_i`` after ``carry``: ``w_{i-1}`` in float32, and the next carry.

    The carry is float64. ``UNIT``: every ``a`` is 1.
    """
    N: tl.constexpr = b.shape[0]
    if UNIT:
        w = tl.cumsum(b, axis=0).to(tl.float64) + carry
    else:
        a, b = tl.associative_scan((a, b), axis=0, combine_fn=compose_affine)
        w = a.to(tl.float64) * carry + b
    o_i = tl.arange(0, N)
    before = tl.gather(w.to(tl.float32), tl.maximum(o_i - 1, 0), axis=0)
    before = tl.where(o_i == 0, carry.to(tl.float32), before)
    return before, tl.sum(tl.where(o_i == N - 1, w, 0.0))
