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
    COUNT_SHAPED,
    ENTROPY,
    FIRST_MOMENT,
    FLAGS,
    LAST,
    MASS,
    NONFINITE_OUTPUT,
    SECOND_MOMENT,
    SPREAD,
    carried,
    recurrence,
)
from csrc_triton.device.attention import store_mean
from csrc_triton.device.handoff import arrive, wait_for
from csrc_triton.device.layout import (
    EMPTY,
    FALLBACK,
    NEGATIVE,
    NONFINITE,
    OUT_OF_RANGE,
    SCORE_MASKED,
    is_inside,
    kept,
    live_bits,
    part_of,
    store_tokens,
    token_mask,
    zero_tokens,
)
from csrc_triton.device.math import LN2, TINY, clamp, log2
from csrc_triton.device.rewards import (
    both_facts,
    chunk_facts,
    chunk_rewards,
    credit_rule,
    facts_of_row,
    no_facts,
    read_facts,
    read_tokens,
    summed_facts,
    there,
)
from csrc_triton.device.scan import (
    AT_ONCE,
    LANES,
    add_lanes,
    add_to_lane,
    affine_before,
    at_token,
    no_carry,
    not_finite,
    sum_of,
    sum_of_products,
)


class Sums(NamedTuple):
    """Over some tokens of a row."""

    count: Any  # of unmasked tokens where the facts do not say it, int32
    entropy: Any  # of the credit, in bits
    spread: Any  # of the redistributed score
    first_moment: Any  # of the advantages, float64
    second_moment: Any


@triton.jit
def no_sums():
    """Of entropy, spread and both moments, lane by lane."""
    single = tl.zeros([LANES], tl.float32)
    double = tl.zeros([LANES], tl.float64)
    return single, single, double, double


@triton.jit
def any_bad(bad):
    return tl.max((bad != bad).to(tl.int32)) != 0


@triton.jit
def shape_tokens(row, facts, rule, job, board, state, state_value, read, k, n_chunks, rules: tl.constexpr):
    """Everything of the ``k``-th of a row's chunks from the right; what it adds to the row, and the carries.

    What is not finite makes all that follows from it so: only the last of that is looked at. The second that
    is returned is NaN where it is so for one of four neighbours, else 0: [N / 4].
    """
    out = job.out
    start = (n_chunks - 1 - k) * rules.CHUNK
    place = part_of(row.place, start)
    j = tl.arange(0, rules.CHUNK)
    numbers = row.numbers
    tokens = there(read, rules)
    bits = tokens.bits
    value = tokens.value
    found = chunk_rewards(row, start, facts, rule, job, tokens, rules)
    entropy = tl.full([], 0.0, tl.float32)
    spread = entropy
    if out.p_stats is not None:
        share = found.credit
        if rules.NORMALIZATION == "none":
            share = share / rule.divisor
        elif rules.NORMALIZATION == "sum_to_length":
            share = share * (1.0 / rule.divisor)
        entropy = -sum_of_products(share, log2(tl.maximum(share, TINY), rules.PTX))
        spread = sum_of(found.spread)
    bad = found.bad
    advantage = found.reward
    last = found.reward
    if (out.p_advantages is not None) or (out.p_returns is not None):
        valued: tl.constexpr = job.inputs.p_values is not None
        reward = found.reward
        if job.inputs.p_bootstrap is not None:
            reward += at_token(facts.last - start, numbers.gamma * numbers.bootstrap, rules.CHUNK)
        step = reward - value
        composed = recurrence(reward, value, bits, numbers.gl, numbers.gamma, valued, rules)
        carry, state = carried(board, state, composed, k, n_chunks, numbers.gl, 0)
        advantage = kept(bits, step + affine_before(composed, carry, rules.UNIT))
        store_tokens(out.p_advantages, place.lo, j, advantage, tokens.inside)
        returned = advantage
        if rules.TWO_RECURRENCES:
            bad = not_finite(advantage, bad)
            gl = numbers.gl_value
            composed = recurrence(reward, value, bits, gl, numbers.gamma, valued, rules)
            carry, state_value = carried(board, state_value, composed, k, n_chunks, gl, 1)
            returned = kept(bits, step + affine_before(composed, carry, rules.UNIT))
        returned += value
        last = returned
        store_tokens(out.p_returns, place.lo, j, returned, tokens.inside)
    first = tl.full([], 0.0, tl.float64)
    second = first
    if out.p_moments is not None:
        exact = advantage.to(tl.float64)
        first = sum_of(exact)
        second = sum_of_products(exact, exact)
    bad = not_finite(last, bad)
    count = 0
    if rules.CREDIT is None:
        count = -tl.sum(bits)
    return Sums(count, entropy, spread, first, second), bad, state, state_value


@triton.jit
def begin_row(row, facts, rule, job, rules: tl.constexpr):
    """Its status before its tokens are looked at, and its mass: to keep more takes registers from them."""
    if job.out.p_stats is not None:
        mass = tl.where((facts.last < 0) | facts.invalid, 0.0, rule.mass)
        tl.store(job.out.p_stats + row.place.row * 4 + 2, mass)
    status = tl.where(facts.invalid, OUT_OF_RANGE, tl.where(facts.last < 0, EMPTY, 0))
    if rules.CREDIT is not None:
        alive = (facts.last >= 0) & (facts.invalid == 0)
        status |= tl.where(alive & (rule.at_live == 0), SCORE_MASKED, 0)
        status |= tl.where(alive & rule.fallback, FALLBACK, 0)
        status |= tl.where(alive & rule.fallback & (rule.mass == -float("inf")), NEGATIVE, 0)
    return status


@triton.jit
def finish_row(row, facts, rule, status, sums, bad, job, rules: tl.constexpr):
    """Status and statistics of a row whose tokens are done."""
    i_b = row.place.row
    empty = facts.last < 0
    lost = facts.invalid & (empty == 0)
    nonfinite = lost | bad
    zeroed = nonfinite & rules.ZERO_NONFINITE
    nan = float("nan")
    if job.out.p_status is not None:
        seen = nonfinite
        if rules.EVEN:
            seen = nonfinite & (empty == 0) & (facts.invalid == 0)
        tl.store(job.out.p_status + i_b, status | tl.where(seen, NONFINITE, 0))
    if job.out.p_stats is not None:
        dropped = empty | facts.invalid
        error = tl.full([], 0.0, tl.float32)
        if job.inputs.p_score is not None:
            error = tl.abs(sums.spread - row.numbers.score)
        last = tl.full([], 0.0, tl.float32)
        if rules.CREDIT is not None:
            tl.debug_barrier()
            p_last = job.out.p_credit + row.place.lo + facts.last
            last = tl.load(p_last, mask=facts.last >= 0, other=0.0, cache_modifier=".cg")
        p_stats = job.out.p_stats + i_b * 4
        tl.store(p_stats, tl.where(dropped, 0.0, sums.entropy * LN2))
        tl.store(p_stats + 1, tl.where(dropped, 0.0, last / rule.divisor))
        tl.store(p_stats + 3, tl.where(dropped, 0.0, error))
    if job.out.p_moments is not None:
        count = (facts.count + sums.count).to(tl.float64)
        mean = sums.first_moment / tl.maximum(count, 1.0)
        m2 = clamp(sums.second_moment - mean * sums.first_moment, 0.0, float("inf"))
        p_moments = job.out.p_moments + i_b * 3
        tl.store(p_moments, count.to(tl.float32))
        tl.store(p_moments + 1, tl.where(zeroed, 0.0, tl.where(lost, nan, mean.to(tl.float32))))
        tl.store(p_moments + 2, tl.where(zeroed, 0.0, tl.where(lost, nan, m2.to(tl.float32))))
    if zeroed | lost:
        tl.debug_barrier()
        fill_row(row.place, job, tl.where(zeroed, 0.0, nan), rules)


@triton.jit
def fill_row(place, job, x, rules: tl.constexpr):
    """``x`` at the row's unmasked tokens, of which all else is written."""
    for start in range(0, place.length, rules.CHUNK):
        j = start + tl.arange(0, rules.CHUNK)
        mask = token_mask(job.response, place, j, is_inside(place, j, rules.WIDE))
        live = live_bits(mask, rules.PTX) != 0
        store_tokens(job.out.p_rewards, place.lo, j, x, live)
        store_tokens(job.out.p_advantages, place.lo, j, x, live)
        store_tokens(job.out.p_returns, place.lo, j, x, live)
        store_tokens(job.out.p_credit, place.lo, j, x, live)
        store_tokens(job.out.p_kl, place.lo, j, x, live)


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
    mass = tl.full([], 0.0, tl.float64)
    if rules.CREDIT is None:
        i_c = n_chunks
        while (i_c > 0) & (last < 0):
            i_c -= 1
            found, _ = chunk_facts(i_c, read_facts(job, row.place, i_c, rules, SOURCE), rules, SOURCE)
            last = tl.max(found.last)
    else:
        found = no_facts(rules)
        masses = tl.zeros([LANES], tl.float64)
        ahead: tl.constexpr = 2 * rules.STAGES if rules.STAGES > 1 else 1  # they are few bytes
        for i_c in tl.range(0, n_chunks, num_stages=ahead):
            read = read_facts(job, row.place, i_c, rules, SOURCE)
            if SOURCE == "groups":
                made, off = store_mean(
                    attended, job.response, row.place, job.out.p_credit, i_c, mean, SOURCE, rules.CHUNK
                )
                read = read[0], made
                outside |= off
            of_chunk, mass_of_chunk = chunk_facts(i_c, read, rules, SOURCE)
            found = both_facts(found, of_chunk)
            masses = add_to_lane(masses, i_c, mass_of_chunk)
        count, last, mass = summed_facts(found, sum_of(masses))
        if SOURCE == "groups":
            tl.debug_barrier()  # the weights are read again
    facts = facts_of_row(row, count, last, mass, outside)
    rule, facts = credit_rule(row, job.response, facts, rules)

    status = begin_row(row, facts, rule, job, rules)
    n_shaped = chunks_to_shape(facts, rules.CHUNK)
    begin = n_shaped * rules.CHUNK
    zero_tokens(job.out, row.place.lo + begin, row.place.length - begin, rules.CHUNK, rules.WIDE)
    state = no_carry()
    state_value = no_carry()
    counted = 0
    bad = tl.full([rules.CHUNK // 4], 0.0, tl.float32)
    entropies, spreads, firsts, seconds = no_sums()
    for i_k in tl.range(0, n_shaped, num_stages=rules.STAGES):
        k = n_shaped * 0 + i_k
        read = read_tokens(job, row.place, (n_shaped - 1 - k) * rules.CHUNK, None, rules)
        added, bad_here, state, state_value = shape_tokens(
            row, facts, rule, job, None, state, state_value, read, k, n_shaped, rules
        )
        counted += added.count
        bad += bad_here
        if job.out.p_stats is not None:
            entropies = add_to_lane(entropies, k, added.entropy)
            spreads = add_to_lane(spreads, k, added.spread)
        if job.out.p_moments is not None:
            firsts = add_to_lane(firsts, k, added.first_moment)
            seconds = add_to_lane(seconds, k, added.second_moment)
    totals = sum_of(entropies), sum_of(spreads), sum_of(firsts), sum_of(seconds)
    finish_row(row, facts, rule, status, Sums(counted, *totals), any_bad(bad), job, rules)


@triton.jit
def chunks_to_shape(facts, CHUNK: tl.constexpr):
    """How many of a row's chunks have more than zeros: none after its last unmasked token.

    None of a row that is out of range, all of which becomes NaN in the end.
    """
    return tl.where(facts.invalid, 0, (facts.last + CHUNK) // CHUNK)


# A row by many programs


@triton.jit
def share_facts(row, board, job, i_c, rules: tl.constexpr, SOURCE: tl.constexpr):
    """The first task of a chunk: its facts, for all programs of the row; and zeros where no token counts."""
    found, mass = chunk_facts(i_c, read_facts(job, row.place, i_c, rules, SOURCE), rules, SOURCE)
    count, last, mass = summed_facts(found, mass)
    tl.store(board.p_doubles + MASS * board.slots + i_c, mass.to(tl.float64))
    tl.store(board.p_ints + COUNT * board.slots + i_c, count)
    tl.store(board.p_ints + LAST * board.slots + i_c, last)
    arrive(board.p_made)
    if last < 0:  # whoever waits does not wait for zeros
        zero_chunk(row, job, i_c, rules)


@triton.jit
def zero_chunk(row, job, i_c, rules: tl.constexpr):
    begin = i_c * rules.CHUNK
    count = tl.minimum(row.place.length - begin, rules.CHUNK)
    zero_tokens(job.out, row.place.lo + begin, count, rules.CHUNK, rules.WIDE)


@triton.jit
def shared_facts(row, board, n_chunks):
    only = tl.arange(0, 1)
    wait_for(board.p_made + only, only == 0, n_chunks)
    count = 0
    last = -1
    masses = tl.zeros([LANES], tl.float64)
    for start in range(0, n_chunks, AT_ONCE):
        o_c = start + tl.arange(0, AT_ONCE)
        there = o_c < n_chunks
        p_ints = board.p_ints + o_c
        counts = tl.load(p_ints + COUNT * board.slots, mask=there, other=0, cache_modifier=".cg")
        latest = tl.load(p_ints + LAST * board.slots, mask=there, other=-1, cache_modifier=".cg")
        masses = add_lanes(masses, board.p_doubles + MASS * board.slots, start, n_chunks)
        count += tl.sum(counts)
        last = tl.maximum(last, tl.max(latest))
    return facts_of_row(row, count, last, sum_of(masses), row.outside)


@triton.jit
def shape_chunk(row, board, job, i_c, n_chunks, rules: tl.constexpr):
    """The second task of a chunk: all the rest. The last one finishes the row."""
    start = i_c * rules.CHUNK
    place = part_of(row.place, start)
    j = tl.arange(0, rules.CHUNK)
    # On their way while others' facts are waited for; of a chunk that has a token to shape.
    mask = token_mask(job.response, place, j, is_inside(place, j, rules.WIDE))
    counting = tl.min(live_bits(mask, rules.PTX)) != 0
    read = read_tokens(job, row.place, start, counting, rules)
    facts = shared_facts(row, board, n_chunks)
    rule, facts = credit_rule(row, job.response, facts, rules)
    n_shaped = chunks_to_shape(facts, rules.CHUNK)
    if i_c < n_shaped:
        k = n_shaped - 1 - i_c
        none = no_carry()  # of its own: what it needs is on the board
        added, bad, _, _ = shape_tokens(row, facts, rule, job, board, none, none, read, k, n_shaped, rules)
        p_doubles = board.p_doubles + k
        tl.store(board.p_ints + COUNT_SHAPED * board.slots + k, added.count)
        tl.store(board.p_ints + NONFINITE_OUTPUT * board.slots + k, any_bad(bad).to(tl.int32))
        tl.store(p_doubles + ENTROPY * board.slots, added.entropy.to(tl.float64))
        tl.store(p_doubles + SPREAD * board.slots, added.spread.to(tl.float64))
        tl.store(p_doubles + FIRST_MOMENT * board.slots, added.first_moment)
        tl.store(p_doubles + SECOND_MOMENT * board.slots, added.second_moment)
    elif counting:
        zero_chunk(row, job, i_c, rules)
    if arrive(board.p_done) == n_chunks - 1:
        sums, bad = sums_of_chunks(board, n_chunks, n_shaped)
        status = begin_row(row, facts, rule, job, rules)
        finish_row(row, facts, rule, status, sums, bad, job, rules)


@triton.jit
def sums_of_chunks(board, n_chunks, n_shaped):
    """Of all chunks of a row that are done, whose counters and flags are 0 then."""
    tl.store(board.p_made, 0)
    tl.store(board.p_done, 0)
    for start in range(0, n_chunks, AT_ONCE):
        o_c = start + tl.arange(0, AT_ONCE)
        for i in tl.static_range(FLAGS):
            tl.store(board.p_flags + i * board.slots + o_c, 0, mask=o_c < n_chunks)
    count = 0
    nonfinite = 0
    entropies, spreads, firsts, seconds = no_sums()
    for start in range(0, n_shaped, AT_ONCE):
        o_c = start + tl.arange(0, AT_ONCE)
        there = o_c < n_shaped
        p_ints = board.p_ints + o_c
        p_doubles = board.p_doubles
        counts = tl.load(p_ints + COUNT_SHAPED * board.slots, mask=there, other=0, cache_modifier=".cg")
        bad = tl.load(p_ints + NONFINITE_OUTPUT * board.slots, mask=there, other=0, cache_modifier=".cg")
        entropies = add_lanes(entropies, p_doubles + ENTROPY * board.slots, start, n_shaped)
        spreads = add_lanes(spreads, p_doubles + SPREAD * board.slots, start, n_shaped)
        firsts = add_lanes(firsts, p_doubles + FIRST_MOMENT * board.slots, start, n_shaped)
        seconds = add_lanes(seconds, p_doubles + SECOND_MOMENT * board.slots, start, n_shaped)
        count += tl.sum(counts)
        nonfinite |= tl.max(bad)
    totals = sum_of(entropies), sum_of(spreads), sum_of(firsts), sum_of(seconds)
    return Sums(count, *totals), nonfinite != 0
