"""Device functions from credit to rewards, advantages and returns: a whole row, or a chunk of it."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.advantages import (
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
from csrc_triton.device.attention import attention_at
from csrc_triton.device.handoff import arrive, wait_for
from csrc_triton.device.layout import (
    EMPTY,
    FALLBACK,
    NEGATIVE,
    NONFINITE,
    OUT_OF_RANGE,
    SCORE_MASKED,
    store_tokens,
    token_input,
)
from csrc_triton.device.math import clamp, expm1_residual, is_finite
from csrc_triton.device.scan import LANES, add_to_lane, no_carry, sum_lanes

# What a program knows of its row; pointers are at the row's first token, None where there is nothing.


class Tokens(NamedTuple):
    p_mask: Any
    p_weights: Any
    p_values: Any
    p_logprobs: Any
    p_ref_logprobs: Any
    p_kl: Any
    p_token_rewards: Any


class Outputs(NamedTuple):
    """Base pointers, and what they have in common: the place of the row's first token."""

    lo: Any
    p_rewards: Any
    p_advantages: Any
    p_returns: Any
    p_credit: Any
    p_kl: Any


class Results(NamedTuple):
    """At the row's place in outputs per row."""

    p_status: Any
    p_stats: Any  # [4]
    p_moments: Any  # [3]


class Numbers(NamedTuple):
    score: Any
    score_index: Any
    terminal: Any
    bootstrap: Any
    kl_coef: Any
    dense_share: Any
    kl_input_clip: Any
    kl_output_clip: Any
    min_mass: Any
    gamma: Any
    gl: Any
    gl_value: Any


class Rules(NamedTuple):
    """Constants: what is computed, and how. Passed on as it is: an assignment makes tensors of them."""

    ADD: Any  # whether other layers' attention is there already
    G: Any  # query heads of a key head
    H: Any  # heads added at once
    KEYS: Any  # of a chunk
    CHUNK: Any  # tokens
    CREDIT: Any  # None: nothing is redistributed
    EVEN: Any  # whether the score is every token's, and what credit does not spread lies evenly
    NORMALIZATION: Any
    SCORE_INDEX: Any
    KL_ESTIMATOR: Any
    VALUES: Any  # whether there are any
    SKIP: Any  # whether a masked token is the identity
    UNIT: Any  # whether every coefficient of the recurrence is 1
    TWO_RECURRENCES: Any
    ZERO_NONFINITE: Any


class Row(NamedTuple):
    tokens: Any
    out: Any
    results: Any
    numbers: Any
    length: Any
    lost: Any  # whether its bounds are not sound
    outside: Any  # whether another launch found a token outside its row


# What is found out on the way


class Facts(NamedTuple):
    """What the tokens of a row say together."""

    count: Any  # of unmasked tokens
    last: Any  # of them; -1 if there is none
    mass: Any  # of the weights, float64
    invalid: Any


class CreditRule(NamedTuple):
    """How weights become credit."""

    at: Any  # the score's token
    at_live: Any
    total: Any  # what the credit adds up to
    divisor: Any  # what makes shares of it
    mass: Any
    mass_divisor: Any
    each: Any
    fallback: Any


class Sums(NamedTuple):
    """Over some tokens of a row."""

    nonfinite: Any  # whether an output is not finite
    entropy: Any  # of the credit
    last_share: Any  # of it, on the last unmasked token
    spread: Any  # of the redistributed score
    first_moment: Any  # of the advantages, float64
    second_moment: Any


@triton.jit
def fill_gaps(out, p_cu, n_rows, total, N: tl.constexpr):
    """Zeros at packed tokens of no row: those before the lowest bound and after the highest."""
    highest = tl.full([], 0, tl.int64)
    lowest = highest + total
    for start in range(0, n_rows + 1, N):
        o_b = start + tl.arange(0, N)
        bound = tl.load(p_cu + o_b, mask=o_b <= n_rows, other=0).to(tl.int64)
        lowest = tl.minimum(lowest, tl.min(tl.where(o_b <= n_rows, bound, total)))
        highest = tl.maximum(highest, tl.max(tl.where(o_b <= n_rows, bound, 0)))
    zero_tokens(out, 0, tl.maximum(lowest, 0), N)
    zero_tokens(out, highest, total, N)


@triton.jit
def zero_tokens(out, begin, stop, N: tl.constexpr):
    zero = tl.zeros([N], tl.float32)
    for start in range(begin, stop, N):
        j = start + tl.arange(0, N)
        store_tokens(out.p_rewards, out.lo + j, zero, j < stop)
        store_tokens(out.p_advantages, out.lo + j, zero, j < stop)
        store_tokens(out.p_returns, out.lo + j, zero, j < stop)
        store_tokens(out.p_credit, out.lo + j, zero, j < stop)
        store_tokens(out.p_kl, out.lo + j, zero, j < stop)


@triton.jit
def chunk_facts(row, attended, i_c, rules, SOURCE: tl.constexpr):
    """Unmasked tokens of a chunk, the last of them, the sum of their weights, whether one is out of range.

    Weights that are made here are left where the credit will be.
    """
    j = i_c * rules.CHUNK + tl.arange(0, rules.CHUNK)
    outside = 0
    if SOURCE == "groups" or SOURCE == "terms":
        p_credit = row.out.p_credit + row.out.lo
        live, weights, outside = attention_at(
            attended, p_credit, j, SOURCE, rules.ADD, rules.G, rules.H, rules.KEYS
        )
        tl.store(p_credit + j, weights, mask=j < row.length)
        mass = tl.sum(weights)
    else:
        live = tl.load(row.tokens.p_mask + j, mask=j < row.length, other=0) != 0
        mass = tl.full([], 0.0, tl.float32)
        if SOURCE == "weights":
            weights = token_input(row.tokens.p_weights, j, live)
            mass = tl.sum(tl.where(weights < 0.0, -float("inf"), weights))  # whose row falls back
    return tl.sum(live.to(tl.int32)), tl.max(tl.where(live, j, -1)), mass, outside


@triton.jit
def facts_of_row(row, count, last, mass, outside):
    return Facts(count, last, mass, row.lost | ((count != 0) & (outside != 0)))


@triton.jit
def credit_rule(row, facts, rules):
    """How this row's weights become credit, and the row's facts, the score's token considered."""
    empty = facts.count == 0
    invalid = facts.invalid
    at = facts.last
    if rules.SCORE_INDEX == "last_token":
        at = row.length - 1
    elif rules.SCORE_INDEX == "explicit":
        at = row.numbers.score_index
        outside = (at < 0) | (at >= row.length)
        invalid = invalid | ((empty == 0) & outside)
        at = tl.where(outside, -1, at).to(tl.int32)
    at_live = tl.load(row.tokens.p_mask + at, mask=at >= 0, other=0) != 0

    mass = facts.mass.to(tl.float32)
    total = tl.full([], 1.0, tl.float32)
    if rules.NORMALIZATION == "sum_to_length":
        total = facts.count.to(tl.float32)
    fallback = row.length < 0
    weight_sum = total
    if rules.CREDIT == "sparse":
        weight_sum = tl.where(at_live, total, 0.0)
    elif rules.CREDIT == "given":
        if rules.NORMALIZATION == "none":
            fallback = (facts.mass == -float("inf")) & (empty == 0)
            weight_sum = tl.where(fallback, tl.where(at_live, total, 0.0), mass)
        else:
            fallback = (facts.mass < row.numbers.min_mass) & (empty == 0)
            weight_sum = tl.where(fallback & (at_live == 0), 0.0, total)
    rule = CreditRule(
        at,
        at_live,
        total,
        # Divisors whose quotients are selected away.
        tl.where(weight_sum == 0.0, 1.0, weight_sum),
        mass,
        tl.where(fallback | empty, 1.0, mass),
        total / tl.maximum(facts.count, 1).to(tl.float32),
        fallback,
    )
    return rule, Facts(facts.count, facts.last, facts.mass, invalid)


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
def redistributed_score(score, credit, on_score, dense_share):
    return dense_share * score * credit + tl.where(on_score, (1.0 - dense_share) * score, 0.0)


@triton.jit
def even_score(numbers, facts, rule, credit):
    """A completion's score at each of its tokens: what the credit does not spread, all have alike."""
    dense = numbers.dense_share * facts.count.to(tl.float32) * credit
    return tl.where(rule.fallback, numbers.score, numbers.score * (dense + (1.0 - numbers.dense_share)))


@triton.jit
def chunk_rewards(row, facts, rule, j, rules):
    """Rewards of tokens ``j``: stored, and returned with what is unmasked and what became non-finite.

    Then the chunk's entropy, its share on the last token, and the sum of the redistributed score.
    """
    inside = j < row.length
    live = tl.load(row.tokens.p_mask + j, mask=inside, other=0) != 0
    reward = tl.zeros(j.shape, tl.float32)
    nonfinite = live & (row.length < 0)
    entropy = tl.full([], 0.0, tl.float32)
    last_share = entropy
    spread = entropy
    if rules.CREDIT is not None:
        on_score = live & (j == rule.at)
        one_hot = tl.where(on_score, rule.total, 0.0)
        if rules.CREDIT == "given":
            credit = token_input(row.tokens.p_weights, j, live)
            if rules.NORMALIZATION != "none":
                credit = credit / rule.mass_divisor * rule.total
            if rules.EVEN:
                credit = tl.where(rule.fallback, rule.each, credit)
            else:
                credit = tl.where(rule.fallback, one_hot, credit)
        elif rules.CREDIT == "uniform":
            credit = tl.zeros(j.shape, tl.float32) + rule.each
        else:
            credit = one_hot
        credit = tl.where(live, tl.where(facts.invalid, float("nan"), credit), 0.0)
        nonfinite |= is_finite(credit) == 0
        store_tokens(row.out.p_credit, row.out.lo + j, credit, inside)
        if row.results.p_stats is not None:
            share = tl.where(credit == 0.0, 0.0, credit / rule.divisor)
            entropy = -tl.sum(share * tl.log(tl.where(share == 0.0, 1.0, share)))
            last_share = tl.sum(tl.where(j == facts.last, share, 0.0))
        if row.numbers.score is not None:
            if rules.EVEN:
                reward = even_score(row.numbers, facts, rule, credit)
            else:
                reward = redistributed_score(row.numbers.score, credit, on_score, row.numbers.dense_share)
            reward = tl.where(live, reward, 0.0)
            if row.results.p_stats is not None:
                spread = tl.sum(reward)
        if row.numbers.terminal is not None:
            reward = tl.where(on_score, reward + row.numbers.terminal, reward)
    if row.tokens.p_token_rewards is not None:
        reward += token_input(row.tokens.p_token_rewards, j, live)
    if rules.KL_ESTIMATOR is not None:
        if rules.KL_ESTIMATOR == "given":
            kl = token_input(row.tokens.p_kl, j, live)
        else:
            log_ratio = token_input(row.tokens.p_logprobs, j, live)
            log_ratio -= token_input(row.tokens.p_ref_logprobs, j, live)
            clips = row.numbers.kl_input_clip, row.numbers.kl_output_clip
            kl = kl_estimate(log_ratio, clips[0], clips[1], rules.KL_ESTIMATOR)
        kl = tl.where(live, tl.where(facts.invalid, float("nan"), kl), 0.0)
        nonfinite |= is_finite(kl) == 0
        store_tokens(row.out.p_kl, row.out.lo + j, kl, inside)
        reward -= row.numbers.kl_coef * kl
    reward = tl.where(live, tl.where(facts.invalid, float("nan"), reward), 0.0)
    nonfinite |= is_finite(reward) == 0
    store_tokens(row.out.p_rewards, row.out.lo + j, reward, inside)
    return reward, live, nonfinite, entropy, last_share, spread


@triton.jit
def shape_tokens(row, facts, rule, board, state, state_value, k, n_chunks, rules):
    """Everything of the ``k``-th chunk from the right; what it adds to the row, and the carries after it."""
    # Time runs backwards in a block, so that scans run forwards.
    j = (n_chunks - k) * rules.CHUNK - 1 - tl.arange(0, rules.CHUNK)
    inside = j < row.length
    out = row.out
    numbers = row.numbers
    reward, live, bad, entropy, share, spread = chunk_rewards(row, facts, rule, j, rules)
    first = tl.full([], 0.0, tl.float64)
    second = first
    if (out.p_advantages is not None) or (out.p_returns is not None):
        value, reward = ahead(row.tokens, numbers, facts, reward, live, j)
        advantage, state = chunk_advantages(
            reward, value, live, inside, numbers.gl, numbers.gamma, state, board, k, n_chunks, 0, rules
        )
        bad |= is_finite(advantage) == 0
        store_tokens(out.p_advantages, out.lo + j, advantage, inside)
        if row.results.p_moments is not None:
            first, second = chunk_moments(advantage, live)
        if rules.TWO_RECURRENCES:
            gl = numbers.gl_value
            advantage, state_value = chunk_advantages(
                reward, value, live, inside, gl, numbers.gamma, state_value, board, k, n_chunks, 1, rules
            )
        bad |= is_finite(advantage + value) == 0
        store_tokens(out.p_returns, out.lo + j, advantage + value, inside)
    elif row.results.p_moments is not None:
        first, second = chunk_moments(reward, live)
    sums = Sums(tl.max(bad.to(tl.int32)), entropy, share, spread, first, second)
    return sums, state, state_value


@triton.jit
def finish_row(row, facts, rule, sums, rules):
    """Status and statistics of a row whose tokens are done."""
    results = row.results
    nonfinite = sums.nonfinite != 0
    empty = facts.count == 0
    if results.p_status is not None:
        status = tl.where(facts.invalid, OUT_OF_RANGE, tl.where(empty, EMPTY, 0))
        if rules.CREDIT is not None:
            alive = (empty == 0) & (facts.invalid == 0)
            status |= tl.where(alive & (rule.at_live == 0), SCORE_MASKED, 0)
            status |= tl.where(alive & rule.fallback, FALLBACK, 0)
            status |= tl.where(alive & rule.fallback & (rule.mass == -float("inf")), NEGATIVE, 0)
            if rules.EVEN:
                nonfinite = nonfinite & (facts.invalid == 0)
        status |= tl.where(nonfinite, NONFINITE, 0)
        tl.store(results.p_status, status)
    if results.p_stats is not None:
        dropped = empty | facts.invalid
        error = tl.full([], 0.0, tl.float64)
        if row.numbers.score is not None:
            error = tl.abs(sums.spread - row.numbers.score)
        tl.store(results.p_stats, tl.where(dropped, 0.0, sums.entropy.to(tl.float32)))
        tl.store(results.p_stats + 1, tl.where(dropped, 0.0, sums.last_share.to(tl.float32)))
        tl.store(results.p_stats + 2, tl.where(dropped, 0.0, rule.mass))
        tl.store(results.p_stats + 3, tl.where(dropped, 0.0, error.to(tl.float32)))
    zeroed = nonfinite & rules.ZERO_NONFINITE
    if results.p_moments is not None:
        count = facts.count.to(tl.float64)
        mean = sums.first_moment / tl.maximum(count, 1.0)
        tl.store(results.p_moments, facts.count.to(tl.float32))
        tl.store(results.p_moments + 1, tl.where(zeroed, 0.0, mean.to(tl.float32)))
        m2 = clamp(sums.second_moment - mean * sums.first_moment, 0.0, float("inf"))
        tl.store(results.p_moments + 2, tl.where(zeroed, 0.0, m2.to(tl.float32)))
    if rules.ZERO_NONFINITE:  # noqa: SIM102
        if zeroed:
            tl.debug_barrier()
            zero_tokens(row.out, 0, row.length, rules.CHUNK)


# A whole row by one program


@triton.jit
def shape_row(row, attended, rules, SOURCE: tl.constexpr):
    n_chunks = (row.length + rules.CHUNK - 1) // rules.CHUNK
    count = 0
    last = -1
    outside = row.outside
    masses = tl.zeros([LANES], tl.float64)
    for i_c in range(n_chunks):
        n, latest, mass, off = chunk_facts(row, attended, i_c, rules, SOURCE)
        count += n
        last = tl.maximum(last, latest)
        masses = add_to_lane(masses, i_c, mass)
        outside |= off
    if SOURCE == "groups" or SOURCE == "terms":
        tl.debug_barrier()  # weights that other threads left
    facts = facts_of_row(row, count, last, tl.sum(masses), outside)
    rule, facts = credit_rule(row, facts, rules)

    state = no_carry()
    state_value = no_carry()
    nonfinite = 0
    entropies = tl.zeros([LANES], tl.float32)
    shares = tl.zeros([LANES], tl.float32)
    spreads = tl.zeros([LANES], tl.float64)
    firsts = tl.zeros([LANES], tl.float64)
    seconds = tl.zeros([LANES], tl.float64)
    for i_k in range(n_chunks):
        k = row.length * 0 + i_k
        added, state, state_value = shape_tokens(
            row, facts, rule, None, state, state_value, k, n_chunks, rules
        )
        nonfinite |= added.nonfinite
        if row.results.p_stats is not None:
            entropies = add_to_lane(entropies, k, added.entropy)
            shares = add_to_lane(shares, k, added.last_share)
            spreads = add_to_lane(spreads, k, added.spread)
        if row.results.p_moments is not None:
            firsts = add_to_lane(firsts, k, added.first_moment)
            seconds = add_to_lane(seconds, k, added.second_moment)
    sums = Sums(
        nonfinite, tl.sum(entropies), tl.sum(shares), tl.sum(spreads), tl.sum(firsts), tl.sum(seconds)
    )
    finish_row(row, facts, rule, sums, rules)


# A row by many programs


@triton.jit
def share_facts(row, attended, board, i_c, rules, SOURCE: tl.constexpr):
    """The first task of a chunk: its facts, for all programs of the row."""
    count, last, mass, off = chunk_facts(row, attended, i_c, rules, SOURCE)
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
def shape_chunk(row, board, k, rules, FACTS: tl.constexpr):
    """The second task of the ``k``-th chunk from the right: all the rest. The last one finishes the row."""
    n_chunks = tl.maximum((row.length + rules.CHUNK - 1) // rules.CHUNK, 1)
    n_stats = 0
    n_moments = 0
    if FACTS:
        facts = shared_facts(row, board, n_chunks)
    else:
        facts = Facts(1, -1, tl.full([], 0.0, tl.float64), row.lost)
    rule, facts = credit_rule(row, facts, rules)
    none = no_carry()  # of its own: what it needs is on the board
    added, _, _ = shape_tokens(row, facts, rule, board, none, none, k, n_chunks, rules)
    p_doubles = board.p_doubles + k
    if row.results.p_stats is not None:
        n_stats = n_chunks
        tl.store(p_doubles + ENTROPY * board.slots, added.entropy.to(tl.float64))
        tl.store(p_doubles + SHARE * board.slots, added.last_share.to(tl.float64))
        tl.store(p_doubles + SPREAD * board.slots, added.spread.to(tl.float64))
    if row.results.p_moments is not None:
        n_moments = n_chunks
        tl.store(p_doubles + FIRST_MOMENT * board.slots, added.first_moment)
        tl.store(p_doubles + SECOND_MOMENT * board.slots, added.second_moment)
    tl.store(board.p_ints + NONFINITE_TOKENS * board.slots + k, added.nonfinite)

    if arrive(board.p_done) == n_chunks - 1:
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
        sums = Sums(
            nonfinite,
            sum_lanes(p_doubles + ENTROPY * board.slots, n_stats, tl.float32, LANES),
            sum_lanes(p_doubles + SHARE * board.slots, n_stats, tl.float32, LANES),
            sum_lanes(p_doubles + SPREAD * board.slots, n_stats, tl.float64, LANES),
            sum_lanes(p_doubles + FIRST_MOMENT * board.slots, n_moments, tl.float64, LANES),
            sum_lanes(p_doubles + SECOND_MOMENT * board.slots, n_moments, tl.float64, LANES),
        )
        finish_row(row, facts, rule, sums, rules)


@triton.jit
def shape_part(
    row,
    attended,
    board,
    i_part,
    n_parts,
    owned,
    sharing,
    whole,
    rules,
    SOURCE: tl.constexpr,
    FACTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What one program does: a task of the chunk that it owns, or the whole row."""
    if board is not None:
        if owned & sharing:
            share_facts(row, attended, board, i_part, rules, SOURCE)
        if owned & (sharing == 0):
            shape_chunk(row, board, n_parts - 1 - i_part, rules, FACTS)
    if WHOLE:  # noqa: SIM102
        if whole:
            # A row that others would share is lost: it becomes NaN, whatever its weights are.
            shape_row(
                row,
                attended,
                rules,
                "weights" if (board is not None and SOURCE == "terms") else SOURCE,
            )
