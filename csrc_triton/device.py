"""Device functions that every kernel composes: each formula of the kernels stands here once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # few bits: a multiple of it by a small integer is exact
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
TINY = tl.constexpr(2.0**-126)
MAX_FINITE = tl.constexpr(3.4028234663852886e38)

# Bits of a row's status
FALLBACK = tl.constexpr(1)
EMPTY = tl.constexpr(2)
SCORE_MASKED = tl.constexpr(4)
OUT_OF_RANGE = tl.constexpr(8)
NONFINITE = tl.constexpr(16)


# Elementwise


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def number(p_x):
    return tl.load(p_x).to(tl.float32)


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
# Partial results of a row lie in slots, one per chunk of tokens. Row b owns the slots from slot_base(b)
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


# Attention


@triton.jit
def is_visible(p_mask, mask_offset, stride_mask, t, first, end):
    """Whether the query sees keys ``t`` ([N])."""
    visible = (t >= first) & (t < end)
    if p_mask is not None:
        attended = tl.load(p_mask + mask_offset + t.to(tl.int64) * stride_mask, mask=visible, other=0)
        visible = visible & (attended != 0)
    return visible


@triton.jit
def chunk_scores(
    p_query,  # of this row and key head
    stride_qh,
    p_key,  # of this row and key head, at the chunk's first key
    stride_kt,
    inside,  # [N] which keys may be read
    scale,
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
    STAGES: tl.constexpr,
):
    """Scores of G query heads against a chunk of keys, in units of ``log(2)``: [M, N].

    ``FAR``: keys of a chunk lie so far apart that 32 bits do not count it.

    ``ROLL``: one part of the width after the other, so that the operands fit registers.
    """
    o_g = tl.arange(0, M)
    o_n = tl.arange(0, inside.shape[0])
    if FAR:
        o_n = o_n.to(tl.int64)
    p_q = p_query + o_g[:, None] * stride_qh
    p_k = p_key + o_n[:, None] * stride_kt
    m_q = (o_g < G)[:, None]
    m_k = inside[:, None]
    scores = tl.zeros([M, inside.shape[0]], dtype=tl.float32)
    if ROLL:
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            scores = add_product(scores, p_q, p_k, m_q, m_k, start, D, BLOCK_D, STRIDE_QD, STRIDE_KD, UPCAST)
    else:
        for start in tl.static_range(0, D, BLOCK_D):
            scores = add_product(scores, p_q, p_k, m_q, m_k, start, D, BLOCK_D, STRIDE_QD, STRIDE_KD, UPCAST)
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
    scores,  # [M, N]
    p_q,  # [M, 1]
    p_k,  # [N, 1]
    m_q,  # [M, 1]
    m_k,  # [N, 1]
    start,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds the product over one part of the width."""
    o_d = start + tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    q = tl.load(p_q + o_d[None, :] * STRIDE_QD, mask=m_q & m_d, other=0.0)  # [M, BLOCK_D]
    k = tl.load(
        p_k + o_d[None, :] * STRIDE_KD, mask=m_k & m_d, other=0.0, eviction_policy="evict_first"
    )  # [N, BLOCK_D]
    if UPCAST or q.dtype != k.dtype:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    return tl.dot(q, tl.trans(k), scores, input_precision="ieee")


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
def fold_chunks(
    p_largest,  # [slots, heads]
    p_sum,  # [slots, heads]
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
            chunk = tl.load(p_largest + at, mask=inside, other=-INF, cache_modifier=".cg")
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
            chunk = tl.load(p_largest + at, mask=inside, other=-INF, cache_modifier=".cg")
            sums = tl.load(p_sum + at, mask=inside, other=0.0, cache_modifier=".cg")
            terms += sums * tl.exp2(finite_reference(chunk) - reference[:, None])
        total += tl.sum(terms, axis=1)
    else:
        total += tl.exp2(lse - reference)
    share = tl.where(weight > 0.0, weight / total, 0.0)
    for start in range(0, n_chunks, FOLD):
        at, inside = partials_of(slot, start, n_chunks, heads, o_h, m_h, FOLD)
        chunk = tl.load(p_largest + at, mask=inside, other=-INF, cache_modifier=".cg")
        factor = tl.exp2(finite_reference(chunk) - reference[:, None]) * share[:, None]
        tl.store(p_factor + at, tl.where((weight > 0.0)[:, None], factor, 0.0), mask=inside)


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
    heads,
    G: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the G heads of one key head add to the mean over heads at some keys, [N]; 0 where not ``seen``."""
    mean = tl.zeros(i.shape, dtype=tl.float32)
    chunk = i // CHUNK
    at_term = (chunk - kept) * heads * CHUNK + i % CHUNK
    for start in range(0, G, H):
        o_g = start + tl.arange(0, H)
        read = (o_g < G)[:, None] & seen[None, :]
        terms = tl.load(
            p_terms + (at_term[None, :] + o_g[:, None] * CHUNK), mask=read, other=0.0, cache_modifier=".cg"
        )  # [H, N]
        factor = tl.load(
            p_factor + (chunk[None, :] * heads + o_g[:, None]), mask=read, other=0.0, cache_modifier=".cg"
        )
        # A head that is not chosen must not spread a NaN.
        mean += tl.sum(tl.where(factor == 0.0, 0.0, terms * factor), axis=0)
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
def last_of(x):
    """The last element of ``x`` ([N]); a sum over one element and zeros, so exact."""
    N: tl.constexpr = x.shape[0]
    return tl.sum(tl.where(tl.arange(0, N) == N - 1, x, 0.0))


@triton.jit
def affine_scan(a, b, UNIT: tl.constexpr):
    """``w_i = a_i * w_{i-1} + b_i`` as ``w_i = A_i * carry + B_i``: A and B ([N]), and their last elements.

    ``UNIT``: every ``a`` is 1.
    """
    if UNIT:
        b = tl.cumsum(b, axis=0)
        last_a = tl.full([], 1.0, tl.float64)
    else:
        a, b = tl.associative_scan((a, b), axis=0, combine_fn=compose_affine)
        last_a = last_of(a).to(tl.float64)
    return a, b, last_a, last_of(b).to(tl.float64)


@triton.jit
def affine_before(a, b, carry, UNIT: tl.constexpr):
    """``w_{i-1}`` in float32, of what ``affine_scan`` returns and a float64 carry."""
    N: tl.constexpr = b.shape[0]
    if UNIT:
        w = b.to(tl.float64) + carry
    else:
        w = a.to(tl.float64) * carry + b
    o_i = tl.arange(0, N)
    before = tl.gather(w.to(tl.float32), tl.maximum(o_i - 1, 0), axis=0)
    return tl.where(o_i == 0, carry.to(tl.float32), before)


# Sums over the chunks of a row, in an order that does not depend on who adds: chunk i goes to lane i % LANES.


@triton.jit
def add_to_lane(acc, i, x):
    N: tl.constexpr = acc.shape[0]
    return acc + tl.where((i - tl.arange(0, N)) % N == 0, x, 0.0)


@triton.jit
def sum_lanes(p_x, n, dtype: tl.constexpr, LANES: tl.constexpr):
    """Sum of ``n`` numbers that other programs left, in the order of ``add_to_lane``."""
    acc = tl.zeros([LANES], dtype)
    for start in range(0, n, LANES):
        i = start + tl.arange(0, LANES)
        acc += tl.load(p_x + i, mask=i < n, other=0.0, cache_modifier=".cg").to(dtype)
    return tl.sum(acc)


# Hand-offs between programs of one launch


@triton.jit
def arrive(p_counter):
    """Publishes what this program wrote; how many arrived before, whose writes are then visible."""
    tl.debug_barrier()
    before = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def publish(p_flag):
    """Publishes what this program wrote."""
    tl.debug_barrier()
    tl.atomic_xchg(p_flag, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(p_counters, wanted, count):
    """Until the ``wanted`` counters ([N]) add up to ``count``; what was written before is visible then."""
    seen = count * 0
    while seen < count:
        counted = tl.atomic_add(p_counters, 0, mask=wanted, sem="acquire", scope="gpu")
        seen = tl.sum(tl.where(wanted, counted, 0))
    tl.debug_barrier()
