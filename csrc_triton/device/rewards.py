"""From credit to rewards: what a row's weights say together, and the rewards of a chunk of its tokens."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.layout import (
    as_mask,
    fetch_input,
    first_token,
    is_inside,
    kept,
    live_bits,
    part_of,
    store_tokens,
    token_input,
    token_mask,
)
from csrc_triton.device.math import clamp, expm1_residual, number
from csrc_triton.device.scan import at_token, group_sums, largest, last_of_groups, not_finite, sum_of

NEGATIVE_ZERO = tl.constexpr(1 << 31)  # its bits


class Numbers(NamedTuple):
    """Of a row; 0 where there is none."""

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


class Row(NamedTuple):
    place: Any
    numbers: Any
    lost: Any  # whether its bounds are not sound
    outside: Any  # whether another launch found a token outside its row


class Job(NamedTuple):
    """What all rows have; made where it is used: Triton 3.6 returns no tuple that holds None."""

    response: Any
    inputs: Any
    out: Any


class Facts(NamedTuple):
    """What the tokens of a row say together."""

    count: Any  # of unmasked tokens; 0 where no credit asks for it
    last: Any  # of them; -1 if there is none
    mass: Any  # of the weights, float64
    invalid: Any


class Neighbours(NamedTuple):
    """What four neighbours of one chunk or more say, [N / 4]."""

    count: Any  # of unmasked ones
    last: Any  # of them; -1 if there is none
    bits: Any  # of their weights, the largest as uint32: above those of -0 where one is below 0, or NaN


class CreditRule(NamedTuple):
    """How weights become credit."""

    at: Any  # the score's token; -1 where it is masked
    at_live: Any
    total: Any  # what the credit adds up to
    divisor: Any  # what makes shares of it
    mass: Any
    scale: Any  # from weights to credit
    each: Any
    fallback: Any


class Read(NamedTuple):
    """Inputs of a chunk of tokens, [N], as they are stored: nobody has waited for them."""

    inside: Any
    mask: Any
    weight: Any
    logprob: Any  # or the KL
    ref_logprob: Any
    token_reward: Any
    value: Any


class Tokens(NamedTuple):
    """The same, float32; values are 0 where masked."""

    inside: Any
    bits: Any  # -1 where unmasked, else 0
    weight: Any
    kl: Any  # given, or the log-ratio
    token_reward: Any
    value: Any


class ChunkRewards(NamedTuple):
    """Of a chunk of tokens, [N]."""

    reward: Any
    credit: Any
    spread: Any  # what a token got of the score
    bad: Any  # NaN where a credit is not finite that no reward shows, [N / 4]


@triton.jit
def row_at(place, inputs, settings):
    """What a program knows of its row before it looks at a token."""
    row = place.row
    zero = tl.full([], 0.0, tl.float32)
    score = zero
    if inputs.p_score is not None:
        score = clamp(number(inputs.p_score + row), settings.score_low, settings.score_high)
    score_index = row * 0
    if inputs.p_score_index is not None:
        score_index = tl.load(inputs.p_score_index + row).to(tl.int64)
    terminal = zero
    if inputs.p_terminal is not None:
        terminal = number(inputs.p_terminal + row)
    bootstrap = zero
    if inputs.p_bootstrap is not None:
        bootstrap = number(inputs.p_bootstrap + row)
    outside = tl.full([], 0, tl.int32)
    if inputs.p_row_status is not None:
        outside = tl.load(inputs.p_row_status + row)
    numbers = Numbers(
        score,
        score_index,
        terminal,
        bootstrap,
        settings.kl_coef if settings.p_kl_coef is None else number(settings.p_kl_coef),
        settings.dense_share,
        settings.kl_input_clip,
        settings.kl_output_clip,
        settings.min_mass,
        settings.gamma,
        settings.gl if settings.p_gl is None else number(settings.p_gl + row),
        settings.gl_value if settings.p_gl_value is None else number(settings.p_gl_value + row),
    )
    return Row(place, numbers, place.whole == 0, outside)


@triton.jit
def fetch_tokens(response, inputs, place):
    """Asks for all inputs of a row's tokens before they are read."""
    fetch_input(response.p_mask, response.stride_mask, place)
    fetch_input(response.p_index, response.stride_index, place)
    fetch_input(inputs.p_values, inputs.stride_values, place)
    fetch_input(inputs.p_logprobs, inputs.stride_logprobs, place)
    fetch_input(inputs.p_ref_logprobs, inputs.stride_ref_logprobs, place)
    fetch_input(inputs.p_kl, inputs.stride_kl, place)
    fetch_input(inputs.p_token_rewards, inputs.stride_token_rewards, place)


@triton.jit
def read_facts(job, place, i_c, rules: tl.constexpr, SOURCE: tl.constexpr):
    """The mask of a chunk, and its weights, as they are stored."""
    place = part_of(place, i_c * rules.CHUNK)
    j = tl.arange(0, rules.CHUNK)
    inside = is_inside(place, j, rules.WIDE)
    mask = token_mask(job.response, place, j, inside)
    weights = tl.full(j.shape, 0.0, tl.float32)
    if SOURCE == "weights":
        weights = token_input(job.inputs.p_weights, job.inputs.stride_weights, place, j, inside)
    return mask, weights


@triton.jit
def chunk_facts(i_c, read, rules: tl.constexpr, SOURCE: tl.constexpr):
    """From the mask and weights of a chunk: what four neighbours say, and the sum of the weights.

    Tokens are not counted where no credit asks for it.
    """
    mask, weights = read
    bits = live_bits(mask, rules.PTX)
    largest_bits = tl.full([rules.CHUNK // 4], 0, tl.uint32)
    mass = tl.full([], 0.0, tl.float32)
    if SOURCE is not None:
        weights = kept(bits, weights.to(tl.float32))
        mass = sum_of(weights)
        largest_bits = largest(weights.to(tl.uint32, bitcast=True))
    count = tl.full([rules.CHUNK // 4], 0, tl.int32)
    if rules.CREDIT is not None:
        count = -group_sums(bits)
    return Neighbours(count, last_of_groups(bits, i_c * rules.CHUNK), largest_bits), mass


@triton.jit
def no_facts(rules: tl.constexpr):
    none = tl.full([rules.CHUNK // 4], 0, tl.int32)
    return Neighbours(none, none - 1, none.to(tl.uint32))


@triton.jit
def both_facts(a, b):
    return Neighbours(a.count + b.count, tl.maximum(a.last, b.last), tl.maximum(a.bits, b.bits))


@triton.jit
def summed_facts(found, mass):
    """Unmasked tokens, the last of them, and the sum of their weights: -inf where one is negative."""
    negative = tl.max((found.bits > NEGATIVE_ZERO).to(tl.int32)) != 0
    mass = tl.where(negative, mass - float("inf"), mass)  # whose row falls back
    return tl.sum(found.count), tl.max(found.last), mass


@triton.jit
def facts_of_row(row, count, last, mass, outside):
    return Facts(count, last, mass, row.lost | ((last >= 0) & (outside != 0)))


@triton.jit
def credit_rule(row, response, facts, rules: tl.constexpr):
    """How this row's weights become credit, and the row's facts, the score's token considered."""
    length = row.place.length
    empty = facts.last < 0
    invalid = facts.invalid
    at = facts.last
    if rules.SCORE_INDEX == "last_token":
        at = length - 1
    elif rules.SCORE_INDEX == "explicit":
        at = row.numbers.score_index
        outside = (at < 0) | (at >= length)
        invalid = invalid | ((empty == 0) & outside)
        at = tl.where(outside, -1, at).to(tl.int32)
    if rules.SCORE_INDEX == "last_unmasked":
        at_live = empty == 0
    else:
        p_mask = response.p_mask + first_token(row.place, response.stride_mask)
        at_live = tl.load(p_mask + at, mask=at >= 0, other=0) != 0

    mass = facts.mass.to(tl.float32)
    total = tl.full([], 1.0, tl.float32)
    if rules.NORMALIZATION == "sum_to_length":
        total = facts.count.to(tl.float32)
    fallback = length < 0
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
        tl.where(at_live, at, -1),
        at_live,
        total,
        # Divisors whose quotients are selected away.
        tl.where(weight_sum == 0.0, 1.0, weight_sum),
        mass,
        total / tl.where(fallback | empty, 1.0, mass),
        total / tl.maximum(facts.count, 1).to(tl.float32),
        fallback,
    )
    return rule, Facts(facts.count, facts.last, facts.mass, invalid)


@triton.jit
def kl_estimate(log_ratio, input_clip, output_clip, ESTIMATOR: tl.constexpr):
    k1 = log_ratio if input_clip is None else clamp(log_ratio, -input_clip, input_clip)
    if ESTIMATOR == "k1":
        kl = k1
    elif ESTIMATOR == "abs":
        kl = tl.abs(k1)
    elif ESTIMATOR == "k2":
        kl = k1 * k1 * 0.5
    else:
        kl = expm1_residual(-k1)
    return kl if output_clip is None else clamp(kl, -output_clip, output_clip)


@triton.jit
def redistributed_score(score, credit, at, dense_share):
    on_score = at_token(at, (1.0 - dense_share) * score, credit.shape[0])
    return tl.fma(dense_share * score, credit, on_score)


@triton.jit
def even_score(numbers, facts, rule, credit):
    """A completion's score at each of its tokens: what the credit does not spread, all have alike."""
    dense = numbers.dense_share * facts.count.to(tl.float32) * credit
    return tl.where(rule.fallback, numbers.score, numbers.score * (dense + (1.0 - numbers.dense_share)))


@triton.jit
def read_tokens(job, place, start, wanted, rules: tl.constexpr):
    """All inputs of the chunk that begins at ``start``, on their way at once; anything if not ``wanted``."""
    inputs = job.inputs
    place = part_of(place, start)
    j = tl.arange(0, rules.CHUNK)
    all_inside = is_inside(place, j, rules.WIDE)
    inside = all_inside if wanted is None else all_inside & as_mask(wanted)
    zero = tl.full(j.shape, 0.0, tl.float32)
    weight = zero
    logprob = zero
    ref_logprob = zero
    token_reward = zero
    value = zero
    if rules.CREDIT == "given":
        weight = token_input(inputs.p_weights, inputs.stride_weights, place, j, inside)
    if rules.KL_ESTIMATOR == "given":
        logprob = token_input(inputs.p_kl, inputs.stride_kl, place, j, inside)
    elif rules.KL_ESTIMATOR is not None:
        logprob = token_input(inputs.p_logprobs, inputs.stride_logprobs, place, j, inside)
        ref_logprob = token_input(inputs.p_ref_logprobs, inputs.stride_ref_logprobs, place, j, inside)
        if rules.STAGES == 1:  # who shapes them at once has registers for one of the two
            logprob = logprob.to(tl.float32) - ref_logprob.to(tl.float32)
            ref_logprob = zero
    if inputs.p_token_rewards is not None:
        token_reward = token_input(inputs.p_token_rewards, inputs.stride_token_rewards, place, j, inside)
    if inputs.p_values is not None:
        value = token_input(inputs.p_values, inputs.stride_values, place, j, inside)
    mask = token_mask(job.response, place, j, all_inside)
    return Read(all_inside, mask, weight, logprob, ref_logprob, token_reward, value)


@triton.jit
def there(read, rules: tl.constexpr):
    """The inputs of tokens, waited for."""
    # Triton takes PTX to cost nothing, and computes it twice rather than exchange what follows from it.
    bits = live_bits(read.mask, rules.PTX and not rules.TOGETHER)
    kl = read.logprob.to(tl.float32)
    if rules.KL_ESTIMATOR != "given":
        kl -= read.ref_logprob.to(tl.float32)
    value = kept(bits, read.value.to(tl.float32))
    return Tokens(read.inside, bits, read.weight.to(tl.float32), kl, read.token_reward.to(tl.float32), value)


@triton.jit
def credit_at(rule, at, weight, bits, rules: tl.constexpr):
    """Credit of tokens; 0 where masked."""
    if rules.CREDIT == "given":
        credit = weight
        if rules.NORMALIZATION != "none":
            credit = credit * rule.scale
        if rule.fallback:  # seldom: not a selection at each token
            if rules.EVEN:
                credit = tl.full(bits.shape, 0.0, tl.float32) + rule.each
            else:
                credit = at_token(at, rule.total, rules.CHUNK)
    elif rules.CREDIT == "uniform":
        credit = tl.full(bits.shape, 0.0, tl.float32) + rule.each
    else:
        credit = at_token(at, rule.total, rules.CHUNK)
    return kept(bits, credit)


@triton.jit
def chunk_rewards(row, start, facts, rule, job, tokens, rules: tl.constexpr):
    """Credit, KL and rewards of a chunk from token ``start`` on: stored, and what the rest needs of them."""
    inputs = job.inputs
    out = job.out
    place = part_of(row.place, start)
    numbers = row.numbers
    bits = tokens.bits
    at = rule.at - start
    j = tl.arange(0, rules.CHUNK)
    credit = tl.full(j.shape, 0.0, tl.float32)
    reward = credit
    spread = credit
    bad = tl.full([rules.CHUNK // 4], 0.0, tl.float32)
    if rules.CREDIT is not None:
        credit = credit_at(rule, at, tokens.weight, bits, rules)
        if inputs.p_score is None:
            bad = not_finite(credit, bad)
        store_tokens(out.p_credit, place.lo, j, credit, tokens.inside)
        if inputs.p_score is not None:
            if rules.EVEN:
                spread = kept(bits, even_score(numbers, facts, rule, credit))
            else:
                spread = redistributed_score(numbers.score, credit, at, numbers.dense_share)
            reward = spread
        if inputs.p_terminal is not None:
            reward += at_token(at, numbers.terminal, rules.CHUNK)
    if inputs.p_token_rewards is not None:
        reward = tokens.token_reward if rules.CREDIT is None else reward + tokens.token_reward
    if rules.KL_ESTIMATOR is not None:
        kl = tokens.kl
        if rules.KL_ESTIMATOR != "given":
            estimator: tl.constexpr = rules.KL_ESTIMATOR  # Triton 3.6 passes no plain string
            if rules.KL_CLIPPED:
                kl = kl_estimate(kl, numbers.kl_input_clip, numbers.kl_output_clip, estimator)
            else:
                kl = kl_estimate(kl, None, None, estimator)
        kl = kept(bits, kl)
        store_tokens(out.p_kl, place.lo, j, kl, tokens.inside)
        reward = tl.fma(-numbers.kl_coef, kl, reward)
    reward = kept(bits, reward)
    store_tokens(out.p_rewards, place.lo, j, reward, tokens.inside)
    return ChunkRewards(reward, credit, spread, bad)
