"""From a row's weights to all of its outputs: by one program, or by as many as it has chunks.

``shape_tokens`` is the one step of a chunk, whoever has the row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.advantages import (
    COUNT,
    ENTROPY,
    FIRST_MOMENT,
    FLAGS,
    LAST,
    MASS,
    NONFINITE_TOKENS,
    OUTSIDE,
    SECOND_MOMENT,
    SHARE,
    SPREAD,
    ahead,
    chunk_advantages,
    chunk_moments,
)
from csrc_triton.device.handoff import arrive, wait_for
from csrc_triton.device.layout import (
    EMPTY,
    FALLBACK,
    NEGATIVE,
    NONFINITE,
    OUT_OF_RANGE,
    SCORE_MASKED,
    store_tokens,
)
from csrc_triton.device.math import clamp, is_finite
from csrc_triton.device.rewards import Facts, chunk_facts, chunk_rewards, credit_rule, facts_of_row
from csrc_triton.device.scan import LANES, add_to_lane, no_carry, sum_lanes


class Sums(NamedTuple):
    """Over some tokens of a row."""

    nonfinite: Any  # whether an output is not finite
    entropy: Any  # of the credit
    last_share: Any  # of it, on the last unmasked token
    spread: Any  # of the redistributed score
    first_moment: Any  # of the advantages, float64
    second_moment: Any


@triton.jit
def shape_tokens(row, facts, rule, job, board, state, state_value, k, n_chunks, rules: tl.constexpr):
    """Everything of the ``k``-th chunk from the right; what it adds to the row, and the carries after it."""
    # Time runs backwards in a block, so that scans run forwards.
    j = (n_chunks - k) * rules.CHUNK - 1 - tl.arange(0, rules.CHUNK)
    lo = row.place.lo
    inside = j < row.place.length
    numbers = row.numbers
    found = chunk_rewards(row, facts, rule, job, j, job.out.p_stats is not None, rules)
    live = found.live
    bad = found.nonfinite
    first = tl.full([], 0.0, tl.float64)
    second = first
    if (job.out.p_advantages is not None) or (job.out.p_returns is not None):
        value, reward = ahead(row, facts, job.inputs, found.reward, live, j)
        valued: tl.constexpr = job.inputs.p_values is not None
        gl = numbers.gl
        advantage, state = chunk_advantages(
            reward, value, live, inside, gl, numbers.gamma, state, board, k, n_chunks, valued, 0, rules
        )
        bad |= is_finite(advantage) == 0
        store_tokens(job.out.p_advantages, lo + j, advantage, inside)
        if job.out.p_moments is not None:
            first, second = chunk_moments(advantage, live)
        if rules.TWO_RECURRENCES:
            gl = numbers.gl_value
            advantage, state_value = chunk_advantages(
                reward,
                value,
                live,
                inside,
                gl,
                numbers.gamma,
                state_value,
                board,
                k,
                n_chunks,
                valued,
                1,
                rules,
            )
        bad |= is_finite(advantage + value) == 0
        store_tokens(job.out.p_returns, lo + j, advantage + value, inside)
    elif job.out.p_moments is not None:
        first, second = chunk_moments(found.reward, live)
    sums = Sums(tl.max(bad.to(tl.int32)), found.entropy, found.last_share, found.spread, first, second)
    return sums, state, state_value


@triton.jit
def finish_row(row, facts, rule, sums, job, rules: tl.constexpr):
    """Status and statistics of a row whose tokens are done."""
    i_b = row.place.row
    nonfinite = sums.nonfinite != 0
    empty = facts.count == 0
    if job.out.p_status is not None:
        tl.store(job.out.p_status + i_b, status_of(facts, rule, nonfinite, rules))
    if job.out.p_stats is not None:
        dropped = empty | facts.invalid
        error = tl.full([], 0.0, tl.float64)
        if job.inputs.p_score is not None:
            error = tl.abs(sums.spread - row.numbers.score)
        p_stats = job.out.p_stats + i_b * 4
        tl.store(p_stats, tl.where(dropped, 0.0, sums.entropy.to(tl.float32)))
        tl.store(p_stats + 1, tl.where(dropped, 0.0, sums.last_share.to(tl.float32)))
        tl.store(p_stats + 2, tl.where(dropped, 0.0, rule.mass))
        tl.store(p_stats + 3, tl.where(dropped, 0.0, error.to(tl.float32)))
    zeroed = nonfinite & rules.ZERO_NONFINITE
    if job.out.p_moments is not None:
        count = facts.count.to(tl.float64)
        mean = sums.first_moment / tl.maximum(count, 1.0)
        m2 = clamp(sums.second_moment - mean * sums.first_moment, 0.0, float("inf"))
        p_moments = job.out.p_moments + i_b * 3
        tl.store(p_moments, facts.count.to(tl.float32))
        tl.store(p_moments + 1, tl.where(zeroed, 0.0, mean.to(tl.float32)))
        tl.store(p_moments + 2, tl.where(zeroed, 0.0, m2.to(tl.float32)))
    if rules.ZERO_NONFINITE:  # noqa: SIM102
        if zeroed:
            tl.debug_barrier()
            zero_tokens(job.out, row.place.lo, row.place.lo + row.place.length, rules.CHUNK)


@triton.jit
def status_of(facts, rule, nonfinite, rules: tl.constexpr):
    empty = facts.count == 0
    status = tl.where(facts.invalid, OUT_OF_RANGE, tl.where(empty, EMPTY, 0))
    if rules.CREDIT is not None:
        alive = (empty == 0) & (facts.invalid == 0)
        status |= tl.where(alive & (rule.at_live == 0), SCORE_MASKED, 0)
        status |= tl.where(alive & rule.fallback, FALLBACK, 0)
        status |= tl.where(alive & rule.fallback & (rule.mass == -float("inf")), NEGATIVE, 0)
        if rules.EVEN:
            nonfinite = nonfinite & alive
    return status | tl.where(nonfinite, NONFINITE, 0)


@triton.jit
def zero_tokens(out, begin, stop, N: tl.constexpr):
    zero = tl.zeros([N], tl.float32)
    for start in range(begin, stop, N):
        j = start + tl.arange(0, N)
        store_tokens(out.p_rewards, j, zero, j < stop)
        store_tokens(out.p_advantages, j, zero, j < stop)
        store_tokens(out.p_returns, j, zero, j < stop)
        store_tokens(out.p_credit, j, zero, j < stop)
        store_tokens(out.p_kl, j, zero, j < stop)


@triton.jit
def fill_gaps(response, out, N: tl.constexpr):
    """Zeros at packed tokens of no row: those before the lowest bound and after the highest."""
    highest = tl.full([], 0, tl.int64)
    lowest = highest + response.width
    for start in range(0, response.n_rows + 1, N):
        o_b = start + tl.arange(0, N)
        there = o_b <= response.n_rows
        bound = tl.load(response.p_cu + o_b, mask=there, other=0).to(tl.int64)
        lowest = tl.minimum(lowest, tl.min(tl.where(there, bound, response.width)))
        highest = tl.maximum(highest, tl.max(tl.where(there, bound, 0)))
    zero_tokens(out, tl.full([], 0, tl.int64), tl.maximum(lowest, 0), N)
    zero_tokens(out, highest, tl.full([], 0, tl.int64) + response.width, N)


# A whole row by one program


@triton.jit
def shape_row(row, attended, job, mean: tl.constexpr, rules: tl.constexpr, SOURCE: tl.constexpr):
    n_chunks = (row.place.length + rules.CHUNK - 1) // rules.CHUNK
    count = 0
    last = -1
    outside = row.outside
    masses = tl.zeros([LANES], tl.float64)
    for i_c in range(n_chunks):
        n, latest, mass, off = chunk_facts(row, attended, job, i_c, mean, rules, SOURCE)
        count += n
        last = tl.maximum(last, latest)
        masses = add_to_lane(masses, i_c, mass)
        outside |= off
    if SOURCE == "groups" or SOURCE == "terms":
        tl.debug_barrier()  # weights that other threads left
    facts = facts_of_row(row, count, last, tl.sum(masses), outside)
    rule, facts = credit_rule(row, job.response, facts, rules)

    state = no_carry()
    state_value = no_carry()
    nonfinite = 0
    entropies = tl.zeros([LANES], tl.float32)
    shares = tl.zeros([LANES], tl.float32)
    spreads = tl.zeros([LANES], tl.float64)
    firsts = tl.zeros([LANES], tl.float64)
    seconds = tl.zeros([LANES], tl.float64)
    for i_k in range(n_chunks):
        k = row.place.length * 0 + i_k
        added, state, state_value = shape_tokens(
            row, facts, rule, job, None, state, state_value, k, n_chunks, rules
        )
        nonfinite |= added.nonfinite
        if job.out.p_stats is not None:
            entropies = add_to_lane(entropies, k, added.entropy)
            shares = add_to_lane(shares, k, added.last_share)
            spreads = add_to_lane(spreads, k, added.spread)
        if job.out.p_moments is not None:
            firsts = add_to_lane(firsts, k, added.first_moment)
            seconds = add_to_lane(seconds, k, added.second_moment)
    sums = Sums(
        nonfinite, tl.sum(entropies), tl.sum(shares), tl.sum(spreads), tl.sum(firsts), tl.sum(seconds)
    )
    finish_row(row, facts, rule, sums, job, rules)


# A row by many programs


@triton.jit
def share_facts(
    row, attended, board, job, i_c, mean: tl.constexpr, rules: tl.constexpr, SOURCE: tl.constexpr
):
    """The first task of a chunk: its facts, for all programs of the row."""
    count, last, mass, off = chunk_facts(row, attended, job, i_c, mean, rules, SOURCE)
    tl.store(board.p_doubles + MASS * board.slots + i_c, mass.to(tl.float64))
    tl.store(board.p_ints + COUNT * board.slots + i_c, count)
    tl.store(board.p_ints + LAST * board.slots + i_c, last)
    tl.store(board.p_ints + OUTSIDE * board.slots + i_c, row.outside | off)
    arrive(board.p_made)


@triton.jit
def shared_facts(row, board, n_chunks):
    only = tl.arange(0, 1)
    wait_for(board.p_made + only, only == 0, n_chunks)
    count = 0
    last = -1
    outside = 0
    for start in range(0, n_chunks, LANES):
        o_c = start + tl.arange(0, LANES)
        there = o_c < n_chunks
        p_ints = board.p_ints + o_c
        count += tl.sum(tl.load(p_ints + COUNT * board.slots, mask=there, other=0, cache_modifier=".cg"))
        latest = tl.load(p_ints + LAST * board.slots, mask=there, other=-1, cache_modifier=".cg")
        last = tl.maximum(last, tl.max(latest))
        off = tl.load(p_ints + OUTSIDE * board.slots, mask=there, other=0, cache_modifier=".cg")
        outside |= tl.max(off)
    mass = sum_lanes(board.p_doubles + MASS * board.slots, n_chunks, tl.float64, LANES)
    return facts_of_row(row, count, last, mass, outside)


@triton.jit
def shape_chunk(row, board, job, k, rules: tl.constexpr, FACTS: tl.constexpr):
    """The second task of the ``k``-th chunk from the right: all the rest. The last one finishes the row."""
    n_chunks = tl.maximum((row.place.length + rules.CHUNK - 1) // rules.CHUNK, 1)
    if FACTS:
        facts = shared_facts(row, board, n_chunks)
    else:
        facts = Facts(1, -1, tl.full([], 0.0, tl.float64), row.lost)
    rule, facts = credit_rule(row, job.response, facts, rules)
    none = no_carry()  # of its own: what it needs is on the board
    added, _, _ = shape_tokens(row, facts, rule, job, board, none, none, k, n_chunks, rules)
    p_doubles = board.p_doubles + k
    if job.out.p_stats is not None:
        tl.store(p_doubles + ENTROPY * board.slots, added.entropy.to(tl.float64))
        tl.store(p_doubles + SHARE * board.slots, added.last_share.to(tl.float64))
        tl.store(p_doubles + SPREAD * board.slots, added.spread.to(tl.float64))
    if job.out.p_moments is not None:
        tl.store(p_doubles + FIRST_MOMENT * board.slots, added.first_moment)
        tl.store(p_doubles + SECOND_MOMENT * board.slots, added.second_moment)
    tl.store(board.p_ints + NONFINITE_TOKENS * board.slots + k, added.nonfinite)
    if arrive(board.p_done) == n_chunks - 1:
        sums = sums_of_chunks(board, n_chunks, job.out.p_stats is not None, job.out.p_moments is not None)
        finish_row(row, facts, rule, sums, job, rules)


@triton.jit
def sums_of_chunks(board, n_chunks, WITH_STATS: tl.constexpr, WITH_MOMENTS: tl.constexpr):
    """Of all chunks of a row that are done, whose counters and flags are 0 then."""
    tl.store(board.p_made, 0)
    tl.store(board.p_done, 0)
    nonfinite = 0
    for start in range(0, n_chunks, LANES):
        o_c = start + tl.arange(0, LANES)
        there = o_c < n_chunks
        for i in tl.static_range(FLAGS):
            tl.store(board.p_flags + i * board.slots + o_c, 0, mask=there)
        p_bad = board.p_ints + NONFINITE_TOKENS * board.slots + o_c
        nonfinite |= tl.max(tl.load(p_bad, mask=there, other=0, cache_modifier=".cg"))
    p_doubles = board.p_doubles
    n_stats = n_chunks if WITH_STATS else 0
    n_moments = n_chunks if WITH_MOMENTS else 0
    return Sums(
        nonfinite,
        sum_lanes(p_doubles + ENTROPY * board.slots, n_stats, tl.float32, LANES),
        sum_lanes(p_doubles + SHARE * board.slots, n_stats, tl.float32, LANES),
        sum_lanes(p_doubles + SPREAD * board.slots, n_stats, tl.float64, LANES),
        sum_lanes(p_doubles + FIRST_MOMENT * board.slots, n_moments, tl.float64, LANES),
        sum_lanes(p_doubles + SECOND_MOMENT * board.slots, n_moments, tl.float64, LANES),
    )
