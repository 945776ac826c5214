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
    carried,
    recurrence,
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
    zero_tokens,
)
from csrc_triton.device.math import clamp, is_finite
from csrc_triton.device.rewards import chunk_facts, chunk_rewards, credit_rule, facts_of_row, read_tokens
from csrc_triton.device.scan import (
    LANES,
    add_to_lane,
    affine_before,
    first_two,
    four_sums,
    lane_sums,
    no_carry,
    two_sums,
)


class Sums(NamedTuple):
    """Over some tokens of a row, float64."""

    nonfinite: Any  # tokens with an output that is not finite
    entropy: Any  # of the credit
    last_share: Any  # of it, on the last unmasked token
    spread: Any  # of the redistributed score
    first_moment: Any  # of the advantages
    second_moment: Any


@triton.jit
def shape_tokens(row, facts, rule, job, board, state, state_value, k, n_chunks, rules: tl.constexpr):
    """Everything of the ``k``-th of a row's chunks from the right; what it adds to the row, and the carries.

    Loads first, then what is of each token, then sums, which wait for all threads: four at a time.
    """
    out = job.out
    place = row.place
    numbers = row.numbers
    j = (n_chunks - 1 - k) * rules.CHUNK + tl.arange(0, rules.CHUNK)
    read = read_tokens(job, place, j, rules)
    live = read.live
    found = chunk_rewards(row, facts, rule, job, read, j, rules)
    bad = found.nonfinite
    advantage = found.reward
    if (out.p_advantages is not None) or (out.p_returns is not None):
        valued: tl.constexpr = job.inputs.p_values is not None
        reward = found.reward
        if job.inputs.p_bootstrap is not None:
            reward = tl.where(j == facts.last, reward + numbers.gamma * numbers.bootstrap, reward)
        step = reward - read.value
        a, b = recurrence(reward, read.value, live, read.inside, numbers.gl, numbers.gamma, valued, rules)
        of_a, of_b = first_two(a, b)
        carry, state = carried(board, state, of_a, of_b, k, n_chunks, rules.UNIT, 0)
        advantage = tl.where(live, step + affine_before(a, b, carry, rules.UNIT), 0.0)
        bad |= is_finite(advantage) == 0
        store_tokens(out.p_advantages, place.lo, j, advantage, read.inside)
        returned = advantage
        if rules.TWO_RECURRENCES:
            gl = numbers.gl_value
            a, b = recurrence(reward, read.value, live, read.inside, gl, numbers.gamma, valued, rules)
            of_a, of_b = first_two(a, b)
            carry, state_value = carried(board, state_value, of_a, of_b, k, n_chunks, rules.UNIT, 1)
            returned = tl.where(live, step + affine_before(a, b, carry, rules.UNIT), 0.0)
        returned += read.value
        bad |= is_finite(returned) == 0
        store_tokens(out.p_returns, place.lo, j, returned, read.inside)
    nothing = tl.full(j.shape, 0.0, tl.float64)
    exact = nothing
    if out.p_moments is not None:
        exact = advantage.to(tl.float64)
    n_bad, first, second, spread = four_sums(
        bad.to(tl.float64), exact, exact * exact, found.spread.to(tl.float64)
    )
    entropy = tl.full([], 0.0, tl.float64)
    last_share = entropy
    if out.p_stats is not None:
        share = tl.where(found.credit == 0.0, 0.0, found.credit / rule.divisor)
        surprise = -share * tl.log(tl.where(share == 0.0, 1.0, share))
        entropy, last_share = two_sums(surprise, tl.where(j == facts.last, share, 0.0))
    return Sums(n_bad, entropy, last_share, spread, first, second), state, state_value


@triton.jit
def finish_row(row, facts, rule, sums, job, rules: tl.constexpr):
    """Status and statistics of a row whose tokens are done."""
    i_b = row.place.row
    nonfinite = sums.nonfinite != 0.0
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
            zero_tokens(job.out, row.place.lo, row.place.length, rules.CHUNK, rules.WIDE)


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
    zero_tokens(out, tl.full([], 0, tl.int64), tl.maximum(lowest, 0), N, False)
    zero_tokens(out, highest, response.width - highest, N, False)


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
    facts = facts_of_row(row, count, last, tl.sum(masses), outside)
    rule, facts = credit_rule(row, job.response, facts, rules)

    # After its last unmasked token a row has nothing but zeros.
    n_shaped = (facts.last + rules.CHUNK) // rules.CHUNK
    begin = n_shaped * rules.CHUNK
    zero_tokens(job.out, row.place.lo + begin, row.place.length - begin, rules.CHUNK, rules.WIDE)
    state = no_carry()
    state_value = no_carry()
    nonfinite = tl.full([], 0.0, tl.float64)
    entropies = tl.zeros([LANES], tl.float64)
    shares = tl.zeros([LANES], tl.float64)
    spreads = tl.zeros([LANES], tl.float64)
    firsts = tl.zeros([LANES], tl.float64)
    seconds = tl.zeros([LANES], tl.float64)
    for i_k in range(n_shaped):
        k = n_shaped * 0 + i_k
        added, state, state_value = shape_tokens(
            row, facts, rule, job, None, state, state_value, k, n_shaped, rules
        )
        nonfinite += added.nonfinite
        if job.out.p_stats is not None:
            entropies = add_to_lane(entropies, k, added.entropy)
            shares = add_to_lane(shares, k, added.last_share)
            spreads = add_to_lane(spreads, k, added.spread)
        if job.out.p_moments is not None:
            firsts = add_to_lane(firsts, k, added.first_moment)
            seconds = add_to_lane(seconds, k, added.second_moment)
    entropy, share, spread, first = four_sums(entropies, shares, spreads, firsts)
    second = tl.sum(seconds)
    finish_row(row, facts, rule, Sums(nonfinite, entropy, share, spread, first, second), job, rules)


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
    mass = tl.sum(lane_sums(board.p_doubles + MASS * board.slots, n_chunks, LANES))
    return facts_of_row(row, count, last, mass, outside)


@triton.jit
def shape_chunk(row, board, job, i_c, n_chunks, rules: tl.constexpr):
    """The second task of a chunk: all the rest. The last one finishes the row."""
    facts = shared_facts(row, board, n_chunks)
    rule, facts = credit_rule(row, job.response, facts, rules)
    n_shaped = (facts.last + rules.CHUNK) // rules.CHUNK
    if i_c < n_shaped:
        k = n_shaped - 1 - i_c
        none = no_carry()  # of its own: what it needs is on the board
        added, _, _ = shape_tokens(row, facts, rule, job, board, none, none, k, n_shaped, rules)
        p_doubles = board.p_doubles + k
        tl.store(p_doubles + NONFINITE_TOKENS * board.slots, added.nonfinite)
        tl.store(p_doubles + ENTROPY * board.slots, added.entropy)
        tl.store(p_doubles + SHARE * board.slots, added.last_share)
        tl.store(p_doubles + SPREAD * board.slots, added.spread)
        tl.store(p_doubles + FIRST_MOMENT * board.slots, added.first_moment)
        tl.store(p_doubles + SECOND_MOMENT * board.slots, added.second_moment)
    else:
        begin = i_c * rules.CHUNK
        count = tl.minimum(row.place.length - begin, rules.CHUNK)
        zero_tokens(job.out, row.place.lo + begin, count, rules.CHUNK, rules.WIDE)
    if arrive(board.p_done) == n_chunks - 1:
        sums = sums_of_chunks(board, n_chunks, n_shaped)
        finish_row(row, facts, rule, sums, job, rules)


@triton.jit
def sums_of_chunks(board, n_chunks, n_shaped):
    """Of all chunks of a row that are done, whose counters and flags are 0 then."""
    tl.store(board.p_made, 0)
    tl.store(board.p_done, 0)
    for start in range(0, n_chunks, LANES):
        o_c = start + tl.arange(0, LANES)
        for i in tl.static_range(FLAGS):
            tl.store(board.p_flags + i * board.slots + o_c, 0, mask=o_c < n_chunks)
    p_doubles = board.p_doubles
    entropy, share, spread, first = four_sums(
        lane_sums(p_doubles + ENTROPY * board.slots, n_shaped, LANES),
        lane_sums(p_doubles + SHARE * board.slots, n_shaped, LANES),
        lane_sums(p_doubles + SPREAD * board.slots, n_shaped, LANES),
        lane_sums(p_doubles + FIRST_MOMENT * board.slots, n_shaped, LANES),
    )
    second = tl.sum(lane_sums(p_doubles + SECOND_MOMENT * board.slots, n_shaped, LANES))
    nonfinite = tl.sum(lane_sums(p_doubles + NONFINITE_TOKENS * board.slots, n_shaped, LANES))
    return Sums(nonfinite, entropy, share, spread, first, second)
