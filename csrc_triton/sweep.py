"""Device functions from credit to rewards, advantages and returns: a whole row, or a chunk of it."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.attention_row import is_outside, mean_of_groups, mean_of_terms, token_positions
from csrc_triton.device import (
    EMPTY,
    FALLBACK,
    NONFINITE,
    OUT_OF_RANGE,
    SCORE_MASKED,
    add_to_lane,
    affine_before,
    affine_scan,
    arrive,
    clamp,
    compose_affine,
    is_finite,
    kl_estimate,
    publish,
    redistributed_score,
    sum_lanes,
    wait_for,
)

LANES = tl.constexpr(128)
"""Chunks whose sums are added together."""
GROUP = tl.constexpr(16)
"""Chunks whose recurrences are composed before they meet the carry."""


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
    terminal: Any
    bootstrap: Any
    kl_coef: Any
    beta: Any
    kl_input_clip: Any
    kl_output_clip: Any
    gamma: Any
    gl: Any
    gl_value: Any


class Facts(NamedTuple):
    """What the tokens of a row say together."""

    count: Any  # of unmasked tokens
    last: Any  # of them; -1 if there is none
    mass: Any  # of the weights, float64
    invalid: Any


class Credit(NamedTuple):
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
    """Over a row's tokens, float64."""

    entropy: Any  # of the credit
    last_share: Any  # of it, on the last unmasked token
    spread: Any  # of the redistributed score
    first_moment: Any  # of the advantages
    second_moment: Any


class Source(NamedTuple):
    """Where weights come from if they are not given."""

    keys: Any
    terms: Any
    response: Any
    p_groups: Any
    total: Any
    kv_heads: Any


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
def token_input(p_x, j, live):
    """One input at tokens ``j``, float32, 0 where not ``live``."""
    return tl.load(p_x + j, mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(p_x, j, x, inside):
    if p_x is not None:
        tl.store(p_x + j, x, mask=inside)


@triton.jit
def attention_at(
    source,
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
    live, t = token_positions(source.response, j)
    outside = is_outside(source.response, source.keys, live, t) | (source.keys.sound == 0)
    if SOURCE == "groups":
        p_groups = source.p_groups + source.response.place.lo
        mean = mean_of_groups(p_groups, source.total, source.kv_heads, j, live)
    else:
        mean = mean_of_terms(source.terms, source.keys, live, t, source.kv_heads, G, H, KEYS)
    if ADD:
        mean = tl.load(p_before + j, mask=live, other=0.0) + mean
    mean = tl.where(live, tl.where(source.keys.sound, mean, float("nan")), 0.0)
    return live, mean, tl.max(outside.to(tl.int32))


@triton.jit
def store_means(
    p_out,
    p_status,
    source,
    row,
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
        _, mean, outside = attention_at(source, p_out, j, SOURCE, ADD, G, H, KEYS)
        tl.store(p_out + j, mean, mask=j < source.response.place.length)
        if p_status is not None:
            tl.store(p_status + row, OUT_OF_RANGE, mask=outside != 0)


@triton.jit
def chunk_facts(
    tokens,
    out,
    source,
    j,
    length,
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Unmasked tokens among ``j``, the last of them, the sum of their weights, whether one is out of range.

    Weights that are made here are left where the credit will be.
    """
    outside = 0
    if SOURCE == "groups" or SOURCE == "terms":
        live, weights, outside = attention_at(source, out.p_credit + out.lo, j, SOURCE, ADD, G, H, KEYS)
        tl.store(out.p_credit + out.lo + j, weights, mask=j < length)
        mass = tl.sum(weights)
    else:
        live = tl.load(tokens.p_mask + j, mask=j < length, other=0) != 0
        mass = tl.full([], 0.0, tl.float32)
        if SOURCE == "weights":
            mass = tl.sum(token_input(tokens.p_weights, j, live))
    return tl.sum(live.to(tl.int32)), tl.max(tl.where(live, j, -1)), mass, outside


@triton.jit
def credit_rule(
    facts,
    tokens,
    length,
    p_score_index,
    row,
    min_mass,
    CREDIT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    SCORE_INDEX: tl.constexpr,
):
    """How this row's weights become credit, and the row's facts, the score's token considered."""
    empty = facts.count == 0
    invalid = facts.invalid
    at = facts.last
    if SCORE_INDEX == "last_token":
        at = length - 1
    elif SCORE_INDEX == "explicit":
        at = tl.load(p_score_index + row).to(tl.int64)
        outside = (at < 0) | (at >= length)
        invalid = invalid | ((empty == 0) & outside)
        at = tl.where(outside, -1, at).to(tl.int32)
    at_live = tl.load(tokens.p_mask + at, mask=at >= 0, other=0) != 0

    mass = facts.mass.to(tl.float32)
    total = tl.full([], 1.0, tl.float32)
    if NORMALIZATION == "sum_to_length":
        total = facts.count.to(tl.float32)
    fallback = length < 0
    weight_sum = total
    if CREDIT == "sparse":
        weight_sum = tl.where(at_live, total, 0.0)
    elif CREDIT == "given":
        if NORMALIZATION == "none":
            weight_sum = mass
        else:
            fallback = (facts.mass < min_mass) & (empty == 0)
            weight_sum = tl.where(fallback & (at_live == 0), 0.0, total)
    credit = Credit(
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
    return credit, Facts(facts.count, facts.last, facts.mass, invalid)


@triton.jit
def chunk_rewards(
    tokens,
    out,
    numbers,
    facts,
    rule,
    j,
    length,
    CREDIT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    STATS: tl.constexpr,
):
    """Rewards of tokens ``j``: stored, and returned with what is unmasked and what became non-finite.

    Then the chunk's entropy, its share on the last token, and the sum of the redistributed score.
    """
    inside = j < length
    live = tl.load(tokens.p_mask + j, mask=inside, other=0) != 0
    reward = tl.zeros(j.shape, tl.float32)
    nonfinite = live & (length < 0)
    entropy = tl.full([], 0.0, tl.float32)
    last_share = entropy
    spread = entropy
    if CREDIT is not None:
        on_score = live & (j == rule.at)
        one_hot = tl.where(on_score, rule.total, 0.0)
        if CREDIT == "given":
            credit = token_input(tokens.p_weights, j, live)
            if NORMALIZATION != "none":
                credit = tl.where(rule.fallback, one_hot, credit / rule.mass_divisor * rule.total)
        elif CREDIT == "uniform":
            credit = tl.zeros(j.shape, tl.float32) + rule.each
        else:
            credit = one_hot
        credit = tl.where(live, tl.where(facts.invalid, float("nan"), credit), 0.0)
        nonfinite |= is_finite(credit) == 0
        store_tokens(out.p_credit, out.lo + j, credit, inside)
        if STATS:
            share = tl.where(credit == 0.0, 0.0, credit / rule.divisor)
            entropy = -tl.sum(share * tl.log(tl.where(share == 0.0, 1.0, share)))
            last_share = tl.sum(tl.where(j == facts.last, share, 0.0))
        if numbers.score is not None:
            redistributed = redistributed_score(numbers.score, credit, on_score, numbers.beta)
            reward = tl.where(live, redistributed, 0.0)
            if STATS:
                spread = tl.sum(reward)
        if numbers.terminal is not None:
            reward = tl.where(on_score, reward + numbers.terminal, reward)
    if tokens.p_token_rewards is not None:
        reward += token_input(tokens.p_token_rewards, j, live)
    if KL_ESTIMATOR is not None:
        if KL_ESTIMATOR == "given":
            kl = token_input(tokens.p_kl, j, live)
        else:
            log_ratio = token_input(tokens.p_logprobs, j, live) - token_input(tokens.p_ref_logprobs, j, live)
            kl = kl_estimate(log_ratio, numbers.kl_input_clip, numbers.kl_output_clip, KL_ESTIMATOR)
        kl = tl.where(live, tl.where(facts.invalid, float("nan"), kl), 0.0)
        nonfinite |= is_finite(kl) == 0
        store_tokens(out.p_kl, out.lo + j, kl, inside)
        reward -= numbers.kl_coef * kl
    reward = tl.where(live, tl.where(facts.invalid, float("nan"), reward), 0.0)
    nonfinite |= is_finite(reward) == 0
    store_tokens(out.p_rewards, out.lo + j, reward, inside)
    return reward, live, nonfinite, entropy, last_share, spread


@triton.jit
def ahead(tokens, numbers, facts, reward, live, j):
    """What the recurrence needs besides rewards: values, and the bootstrap on the last unmasked token."""
    if numbers.bootstrap is not None:
        reward = tl.where(j == facts.last, reward + numbers.gamma * numbers.bootstrap, reward)
    value = tl.zeros(j.shape, tl.float32)
    if tokens.p_values is not None:
        value = token_input(tokens.p_values, j, live)
    return value, reward


@triton.jit
def recurrence(
    reward, value, live, inside, gl, gamma, VALUES: tl.constexpr, SKIP: tl.constexpr, UNIT: tl.constexpr
):
    """``affine_scan`` of what each token passes on to the tokens before it."""
    if SKIP:
        decays = live
    else:
        decays = inside
    added = gl * reward
    if VALUES:
        added += (gamma - gl) * value
    return affine_scan(tl.where(decays, gl, 1.0), tl.where(live, added, 0.0), UNIT)


# The carry of the recurrence from chunk to chunk, right to left: GROUP chunks are composed, then meet the
# carry of the groups before. A serial program and one that looks back at what others published do the same
# arithmetic.


class Carry(NamedTuple):
    """All float64."""

    carry: Any  # into the next chunk
    group: Any  # into its group
    a: Any  # of its group's chunks so far, composed
    b: Any


@triton.jit
def no_carry():
    zero = tl.full([], 0.0, tl.float64)
    return Carry(zero, zero, zero + 1.0, zero)


@triton.jit
def advance(state, a, b, k):
    """The carry after the ``k``-th chunk from the right, ``w = a * carry + b``."""
    carry = a * state.carry + b
    composed_a, composed_b = compose_affine(state.a, state.b, a, b)
    full = k % GROUP == GROUP - 1
    group = tl.where(full, composed_a * state.group + composed_b, state.group)
    return Carry(
        tl.where(full, group, carry),
        group,
        tl.where(full, 1.0, composed_a),
        tl.where(full, 0.0, composed_b),
    )


@triton.jit
def look_back(p_a, p_b, p_flags, p_group_a, p_group_b, p_group_flags, k):
    """The carry into the ``k``-th chunk from the right, from what the chunks right of it published.

    Pointers are at the row's rightmost chunk; the next chunk to the left is one below. A group's are at its
    leftmost chunk.
    """
    o_g = tl.arange(0, GROUP)
    n_groups = k // GROUP
    group = tl.full([], 0.0, tl.float64)
    for first in range(0, n_groups, GROUP):
        ends = (first + o_g) * GROUP + GROUP - 1
        wait_for(p_group_flags - ends, first + o_g < n_groups, tl.minimum(n_groups - first, GROUP))
        for i in tl.static_range(GROUP):
            end = (first + i) * GROUP + GROUP - 1
            there = first + i < n_groups
            a = tl.load(p_group_a - end, mask=there, other=1.0, cache_modifier=".cg")
            b = tl.load(p_group_b - end, mask=there, other=0.0, cache_modifier=".cg")
            group = tl.where(there, a * group + b, group)
    start = n_groups * GROUP
    wait_for(p_flags - start - o_g, start + o_g < k, k - start)
    carry = group
    composed_a = tl.full([], 1.0, tl.float64)
    composed_b = tl.full([], 0.0, tl.float64)
    for i in tl.static_range(GROUP - 1):
        there = start + i < k
        a = tl.load(p_a - start - i, mask=there, other=1.0, cache_modifier=".cg")
        b = tl.load(p_b - start - i, mask=there, other=0.0, cache_modifier=".cg")
        next_a, next_b = compose_affine(composed_a, composed_b, a, b)
        carry = tl.where(there, a * carry + b, carry)
        composed_a = tl.where(there, next_a, composed_a)
        composed_b = tl.where(there, next_b, composed_b)
    return Carry(carry, group, composed_a, composed_b)


@triton.jit
def advantages_of(reward, value, live, a, b, carry, UNIT: tl.constexpr):
    return tl.where(live, reward - value + affine_before(a, b, carry, UNIT), 0.0)


@triton.jit
def chunk_moments(advantage, live):
    """Sum of the unmasked advantages and of their squares (by way of their mean), float64."""
    count = tl.maximum(tl.sum(live.to(tl.int32)), 1).to(tl.float32)
    mean = tl.sum(advantage) / count
    away = tl.where(live, advantage - mean, 0.0)
    mean = mean.to(tl.float64)
    count = count.to(tl.float64)
    return mean * count, tl.sum(away * away).to(tl.float64) + mean * mean * count


@triton.jit
def finish_row(
    results,
    out,
    numbers,
    facts,
    rule,
    sums,
    length,
    nonfinite,
    CREDIT: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    N: tl.constexpr,
):
    """Status and statistics of a row whose tokens are done."""
    empty = facts.count == 0
    if results.p_status is not None:
        status = tl.where(facts.invalid, OUT_OF_RANGE, tl.where(empty, EMPTY, 0))
        if CREDIT is not None:
            alive = (empty == 0) & (facts.invalid == 0)
            status |= tl.where(alive & (rule.at_live == 0), SCORE_MASKED, 0)
            status |= tl.where(alive & rule.fallback, FALLBACK, 0)
        status |= tl.where(nonfinite, NONFINITE, 0)
        tl.store(results.p_status, status)
    if results.p_stats is not None:
        dropped = empty | facts.invalid
        error = tl.full([], 0.0, tl.float64)
        if numbers.score is not None:
            error = tl.abs(sums.spread - numbers.score)
        tl.store(results.p_stats, tl.where(dropped, 0.0, sums.entropy.to(tl.float32)))
        tl.store(results.p_stats + 1, tl.where(dropped, 0.0, sums.last_share.to(tl.float32)))
        tl.store(results.p_stats + 2, tl.where(dropped, 0.0, rule.mass))
        tl.store(results.p_stats + 3, tl.where(dropped, 0.0, error.to(tl.float32)))
    zeroed = nonfinite & ZERO_NONFINITE
    if results.p_moments is not None:
        count = facts.count.to(tl.float64)
        mean = sums.first_moment / tl.maximum(count, 1.0)
        tl.store(results.p_moments, facts.count.to(tl.float32))
        tl.store(results.p_moments + 1, tl.where(zeroed, 0.0, mean.to(tl.float32)))
        m2 = clamp(sums.second_moment - mean * sums.first_moment, 0.0, float("inf"))
        tl.store(results.p_moments + 2, tl.where(zeroed, 0.0, m2.to(tl.float32)))
    if ZERO_NONFINITE:  # noqa: SIM102
        if zeroed:
            tl.debug_barrier()
            zero_tokens(out, 0, length, N)


# A whole row by one program


@triton.jit
def shape_row(
    results,
    tokens,
    out,
    source,
    numbers,
    p_score_index,
    row,
    length,
    invalid,
    outside,  # whether another launch found a token outside its row
    min_mass,
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    CREDIT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    SCORE_INDEX: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    SKIP: tl.constexpr,
    UNIT: tl.constexpr,
    TWO_RECURRENCES: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    o_i = tl.arange(0, CHUNK)
    n_chunks = (length + CHUNK - 1) // CHUNK
    count = 0
    last = -1
    masses = tl.zeros([LANES], tl.float64)
    for i_c in range(n_chunks):
        n, latest, mass, off = chunk_facts(
            tokens, out, source, i_c * CHUNK + o_i, length, SOURCE, ADD, G, H, KEYS
        )
        count += n
        last = tl.maximum(last, latest)
        masses = add_to_lane(masses, i_c, mass)
        outside |= off
    if SOURCE == "groups":
        tl.debug_barrier()
    facts = Facts(count, last, tl.sum(masses), invalid | ((count != 0) & (outside != 0)))
    rule, facts = credit_rule(
        facts, tokens, length, p_score_index, row, min_mass, CREDIT, NORMALIZATION, SCORE_INDEX
    )

    state = no_carry()
    state_value = no_carry()
    nonfinite = 0
    entropies = tl.zeros([LANES], tl.float32)
    shares = tl.zeros([LANES], tl.float32)
    spreads = tl.zeros([LANES], tl.float64)
    firsts = tl.zeros([LANES], tl.float64)
    seconds = tl.zeros([LANES], tl.float64)
    for i_k in range(n_chunks):
        k = length * 0 + i_k
        # Time runs backwards in a block, so that scans run forwards.
        j = (n_chunks - k) * CHUNK - 1 - o_i
        reward, live, bad, entropy, share, spread = chunk_rewards(
            tokens,
            out,
            numbers,
            facts,
            rule,
            j,
            length,
            CREDIT,
            NORMALIZATION,
            KL_ESTIMATOR,
            results.p_stats is not None,
        )
        if results.p_stats is not None:
            entropies = add_to_lane(entropies, k, entropy)
            shares = add_to_lane(shares, k, share)
            spreads = add_to_lane(spreads, k, spread)
        if (out.p_advantages is not None) or (out.p_returns is not None):
            value, reward = ahead(tokens, numbers, facts, reward, live, j)
            VALUES: tl.constexpr = tokens.p_values is not None
            a, b, last_a, last_b = recurrence(
                reward, value, live, j < length, numbers.gl, numbers.gamma, VALUES, SKIP, UNIT
            )
            advantage = advantages_of(reward, value, live, a, b, state.carry, UNIT)
            state = advance(state, last_a, last_b, k)
            bad |= is_finite(advantage) == 0
            store_tokens(out.p_advantages, out.lo + j, advantage, j < length)
            if results.p_moments is not None:
                first, second = chunk_moments(advantage, live)
                firsts = add_to_lane(firsts, k, first)
                seconds = add_to_lane(seconds, k, second)
            if TWO_RECURRENCES:
                a, b, last_a, last_b = recurrence(
                    reward, value, live, j < length, numbers.gl_value, numbers.gamma, VALUES, SKIP, UNIT
                )
                advantage = advantages_of(reward, value, live, a, b, state_value.carry, UNIT)
                state_value = advance(state_value, last_a, last_b, k)
            bad |= is_finite(advantage + value) == 0
            store_tokens(out.p_returns, out.lo + j, advantage + value, j < length)
        nonfinite |= tl.max(bad.to(tl.int32))
    finish_row(
        results,
        out,
        numbers,
        facts,
        rule,
        Sums(tl.sum(entropies), tl.sum(shares), tl.sum(spreads), tl.sum(firsts), tl.sum(seconds)),
        length,
        nonfinite != 0,
        CREDIT,
        ZERO_NONFINITE,
        CHUNK,
    )


# A row by many programs


MASS = tl.constexpr(0)
AGGREGATE = tl.constexpr(1)  # a, b, then its group's a, b; then the same of the second recurrence
ENTROPY = tl.constexpr(9)
SHARE = tl.constexpr(10)
SPREAD = tl.constexpr(11)
FIRST_MOMENT = tl.constexpr(12)
SECOND_MOMENT = tl.constexpr(13)
DOUBLES = 14

COUNT = tl.constexpr(0)
LAST = tl.constexpr(1)
OUTSIDE = tl.constexpr(2)
NONFINITE_TOKENS = tl.constexpr(3)
INTS = 4

FLAGS = tl.constexpr(4)
"""Per recurrence: chunks, and groups, whose aggregates are there."""


class Board(NamedTuple):
    """What the programs of a row tell each other, at the row's first slot."""

    p_doubles: Any  # float64 [DOUBLES, slots]
    p_ints: Any  # int32 [INTS, slots]
    slots: Any
    p_flags: Any  # int32 [FLAGS, slots], 0 between launches
    p_made: Any  # int32, chunks whose facts are there, 0 between launches
    p_done: Any  # int32, chunks that are done, 0 between launches


@triton.jit
def share_facts(
    board,
    tokens,
    out,
    source,
    i_c,
    length,
    outside,
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first task of a chunk: its facts, for all programs of the row."""
    j = i_c * CHUNK + tl.arange(0, CHUNK)
    count, last, mass, off = chunk_facts(tokens, out, source, j, length, SOURCE, ADD, G, H, KEYS)
    tl.store(board.p_doubles + MASS * board.slots + i_c, mass.to(tl.float64))
    tl.store(board.p_ints + COUNT * board.slots + i_c, count)
    tl.store(board.p_ints + LAST * board.slots + i_c, last)
    tl.store(board.p_ints + OUTSIDE * board.slots + i_c, outside | off)
    arrive(board.p_made)


@triton.jit
def shared_facts(board, n_chunks, invalid):
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
    return Facts(count, last, mass, invalid | ((count != 0) & (outside != 0)))


@triton.jit
def carry_into(board, a, b, k, n_chunks, SECOND: tl.constexpr):
    """The carry into this chunk, whose aggregate is published, and its group's if it is the last of one."""
    right = n_chunks - 1
    p_a = board.p_doubles + (AGGREGATE + 4 * SECOND) * board.slots + right
    p_b = p_a + board.slots
    p_group_a = p_b + board.slots
    p_group_b = p_group_a + board.slots
    p_flags = board.p_flags + 2 * SECOND * board.slots + right
    p_group_flags = p_flags + board.slots
    tl.store(p_a - k, a)
    tl.store(p_b - k, b)
    publish(p_flags - k)
    state = look_back(p_a, p_b, p_flags, p_group_a, p_group_b, p_group_flags, k)
    if k % GROUP == GROUP - 1:
        group_a, group_b = compose_affine(state.a, state.b, a, b)
        tl.store(p_group_a - k, group_a)
        tl.store(p_group_b - k, group_b)
        publish(p_group_flags - k)
    return state.carry


@triton.jit
def shape_chunk(
    results,
    tokens,
    out,
    numbers,
    board,
    p_score_index,
    row,
    length,
    invalid,
    k,  # counted from the right
    min_mass,
    FACTS: tl.constexpr,
    CREDIT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    SCORE_INDEX: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    SKIP: tl.constexpr,
    UNIT: tl.constexpr,
    TWO_RECURRENCES: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The second task of a chunk: all the rest. The last program of the row finishes the row."""
    n_chunks = tl.maximum((length + CHUNK - 1) // CHUNK, 1)
    n_stats = 0
    n_moments = 0
    j = (n_chunks - k) * CHUNK - 1 - tl.arange(0, CHUNK)
    if FACTS:
        facts = shared_facts(board, n_chunks, invalid)
    else:
        facts = Facts(1, -1, tl.full([], 0.0, tl.float64), invalid)
    rule, facts = credit_rule(
        facts, tokens, length, p_score_index, row, min_mass, CREDIT, NORMALIZATION, SCORE_INDEX
    )
    reward, live, bad, entropy, share, spread = chunk_rewards(
        tokens,
        out,
        numbers,
        facts,
        rule,
        j,
        length,
        CREDIT,
        NORMALIZATION,
        KL_ESTIMATOR,
        results.p_stats is not None,
    )
    p_doubles = board.p_doubles + k
    if results.p_stats is not None:
        n_stats = n_chunks
        tl.store(p_doubles + ENTROPY * board.slots, entropy.to(tl.float64))
        tl.store(p_doubles + SHARE * board.slots, share.to(tl.float64))
        tl.store(p_doubles + SPREAD * board.slots, spread.to(tl.float64))
    if (out.p_advantages is not None) or (out.p_returns is not None):
        value, reward = ahead(tokens, numbers, facts, reward, live, j)
        VALUES: tl.constexpr = tokens.p_values is not None
        a, b, last_a, last_b = recurrence(
            reward, value, live, j < length, numbers.gl, numbers.gamma, VALUES, SKIP, UNIT
        )
        carry = carry_into(board, last_a, last_b, k, n_chunks, 0)
        advantage = advantages_of(reward, value, live, a, b, carry, UNIT)
        bad |= is_finite(advantage) == 0
        store_tokens(out.p_advantages, out.lo + j, advantage, j < length)
        if results.p_moments is not None:
            n_moments = n_chunks
            first, second = chunk_moments(advantage, live)
            tl.store(p_doubles + FIRST_MOMENT * board.slots, first)
            tl.store(p_doubles + SECOND_MOMENT * board.slots, second)
        if TWO_RECURRENCES:
            a, b, last_a, last_b = recurrence(
                reward, value, live, j < length, numbers.gl_value, numbers.gamma, VALUES, SKIP, UNIT
            )
            carry = carry_into(board, last_a, last_b, k, n_chunks, 1)
            advantage = advantages_of(reward, value, live, a, b, carry, UNIT)
        bad |= is_finite(advantage + value) == 0
        store_tokens(out.p_returns, out.lo + j, advantage + value, j < length)
    tl.store(board.p_ints + NONFINITE_TOKENS * board.slots + k, tl.max(bad.to(tl.int32)))

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
            sum_lanes(p_doubles + ENTROPY * board.slots, n_stats, tl.float32, LANES),
            sum_lanes(p_doubles + SHARE * board.slots, n_stats, tl.float32, LANES),
            sum_lanes(p_doubles + SPREAD * board.slots, n_stats, tl.float64, LANES),
            sum_lanes(p_doubles + FIRST_MOMENT * board.slots, n_moments, tl.float64, LANES),
            sum_lanes(p_doubles + SECOND_MOMENT * board.slots, n_moments, tl.float64, LANES),
        )
        finish_row(
            results,
            out,
            numbers,
            facts,
            rule,
            sums,
            length,
            nonfinite != 0,
            CREDIT,
            ZERO_NONFINITE,
            CHUNK,
        )
