"""From score and credit to rewards, advantages and returns: one program per row."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.device import (
    NAN,
    affine_chunk,
    clamp,
    is_finite,
    kl_estimate,
    redistributed_score,
    segment,
)
from csrc_triton.launch import COMPILER, kernel, registers, row_stride, tokens

CHUNK = 512
"""Tokens a program shapes at once."""


@triton.jit
def token_input(p_x, offset, j, live):
    """One input at tokens ``j``, float32, 0 where not ``live``."""
    return tl.load(p_x + offset + j, mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(p_x, offset, j, x, inside):
    if p_x is not None:
        tl.store(p_x + offset + j, x, mask=inside)


@kernel()
def sweep_kernel(
    p_rewards,  # outputs [B, R], or None
    p_advantages,
    p_returns,
    p_credit_out,
    p_kl_out,
    p_status,  # [B]
    p_stats,  # [B, 4]
    p_mask,  # tokens' inputs
    stride_mask,
    p_weights,
    stride_weights,
    p_values,
    stride_values,
    p_logprobs,
    stride_logprobs,
    p_ref_logprobs,
    stride_ref_logprobs,
    p_kl,
    stride_kl,
    p_token_rewards,
    stride_token_rewards,
    p_score,  # rows' inputs
    p_score_index,
    p_terminal,
    p_bootstrap,
    p_row_status,
    p_cu,
    n_rows,
    width,  # R, or M
    p_kl_coef,
    kl_coef,
    beta,
    score_low,
    score_high,
    kl_input_clip,
    kl_output_clip,
    min_mass,
    gamma,
    p_gl,
    gl,
    p_gl_value,
    gl_value,
    CREDIT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    SCORE_INDEX: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    SKIP: tl.constexpr,
    UNIT: tl.constexpr,
    TWO_RECURRENCES: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    FALLBACK: tl.constexpr,
    EMPTY: tl.constexpr,
    SCORE_MASKED: tl.constexpr,
    OUT_OF_RANGE: tl.constexpr,
    NONFINITE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    lo = row * width
    length = i_b * 0 + width
    invalid = length < 0
    offset_mask = row * stride_mask
    offset_weights = row * stride_weights
    offset_values = row * stride_values
    offset_logprobs = row * stride_logprobs
    offset_ref_logprobs = row * stride_ref_logprobs
    offset_kl = row * stride_kl
    offset_token_rewards = row * stride_token_rewards
    if p_cu is not None:
        start, stop, sound = segment(p_cu, i_b, n_rows, width)
        invalid = sound == 0
        lo = tl.minimum(tl.maximum(tl.minimum(start, stop), 0), width)
        length = (tl.minimum(tl.maximum(tl.maximum(start, stop), 0), width) - lo).to(tl.int32)
        offset_mask = lo
        offset_weights = lo
        offset_values = lo
        offset_logprobs = lo
        offset_ref_logprobs = lo
        offset_kl = lo
        offset_token_rewards = lo
    o_i = tl.arange(0, CHUNK)

    # What the whole row says: unmasked tokens, the last of them, mass of the credit.
    count = tl.full([], 0, tl.int32)
    last = tl.full([], -1, tl.int32)
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, length, CHUNK):
        j = start + o_i
        live = tl.load(p_mask + offset_mask + j, mask=j < length, other=0) != 0
        count += tl.sum(live.to(tl.int32))
        last = tl.maximum(last, tl.max(tl.where(live, j, -1)))
        if CREDIT == "given":
            mass += tl.sum(token_input(p_weights, offset_weights, j, live)).to(tl.float64)
    empty = count == 0
    if p_row_status is not None:
        invalid = invalid | (tl.load(p_row_status + row) != 0)

    at = last
    if SCORE_INDEX == "last_token":
        at = length - 1
    elif SCORE_INDEX == "explicit":
        at = tl.load(p_score_index + row).to(tl.int64)
        outside = (at < 0) | (at >= length)
        invalid = invalid | ((empty == 0) & outside)
        at = tl.where(outside, -1, at).to(tl.int32)
    at_live = tl.load(p_mask + offset_mask + at, mask=at >= 0, other=0) != 0

    raw_mass = mass.to(tl.float32)
    total = tl.full([], 1.0, tl.float32)
    if NORMALIZATION == "sum_to_length":
        total = count.to(tl.float32)
    fallback = length < 0
    weight_sum = total
    if CREDIT == "sparse":
        weight_sum = tl.where(at_live, total, 0.0)
    elif CREDIT == "given":
        if NORMALIZATION == "none":
            weight_sum = raw_mass
        else:
            fallback = (mass < min_mass) & (empty == 0)
            weight_sum = tl.where(fallback & (at_live == 0), 0.0, total)
    # Divisors whose quotients are selected away.
    divisor = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    mass_divisor = tl.where(fallback | empty, 1.0, raw_mass)
    each = total / tl.maximum(count, 1).to(tl.float32)

    if p_score is not None:
        score = clamp(tl.load(p_score + row).to(tl.float32), score_low, score_high)
    if p_terminal is not None:
        terminal = tl.load(p_terminal + row).to(tl.float32)
    if p_kl_coef is not None:
        kl_coef = tl.load(p_kl_coef).to(tl.float32)
    if p_gl is not None:
        gl = tl.load(p_gl + row).to(tl.float32)
    if p_gl_value is not None:
        gl_value = tl.load(p_gl_value + row).to(tl.float32)

    carry = tl.full([], 0.0, tl.float64)
    carry_value = carry
    spread_sum = carry
    entropy = tl.full([], 0.0, tl.float32)
    last_share = entropy
    nonfinite = tl.zeros([CHUNK], tl.int32)
    for i_c in range((length + CHUNK - 1) // CHUNK):
        # Time runs backwards in a block, so that scans run forwards.
        j = ((length + CHUNK - 1) // CHUNK - i_c) * CHUNK - 1 - o_i
        inside = j < length
        live = tl.load(p_mask + offset_mask + j, mask=inside, other=0) != 0

        reward = tl.zeros([CHUNK], tl.float32)
        if CREDIT is not None:
            on_score = live & (j == at)
            one_hot = tl.where(on_score, total, 0.0)
            if CREDIT == "given":
                credit = token_input(p_weights, offset_weights, j, live)
                if NORMALIZATION != "none":
                    credit = tl.where(fallback, one_hot, credit / mass_divisor * total)
            elif CREDIT == "uniform":
                credit = tl.zeros([CHUNK], tl.float32) + each
            else:
                credit = one_hot
            credit = tl.where(live, tl.where(invalid, NAN, credit), 0.0)
            nonfinite |= (is_finite(credit) == 0).to(tl.int32)
            store_tokens(p_credit_out, lo, j, credit, inside)
            if p_stats is not None:
                share = tl.where(credit == 0.0, 0.0, credit / divisor)
                entropy -= tl.sum(share * tl.log(tl.where(share == 0.0, 1.0, share)))
                last_share += tl.sum(tl.where(j == last, share, 0.0))
            if p_score is not None:
                reward = tl.where(live, redistributed_score(score, credit, on_score, beta), 0.0)
                spread_sum += tl.sum(reward).to(tl.float64)
            if p_terminal is not None:
                reward = tl.where(on_score, reward + terminal, reward)
        if p_token_rewards is not None:
            reward += token_input(p_token_rewards, offset_token_rewards, j, live)
        if KL_ESTIMATOR is not None:
            if KL_ESTIMATOR == "given":
                kl = token_input(p_kl, offset_kl, j, live)
            else:
                log_ratio = token_input(p_logprobs, offset_logprobs, j, live) - token_input(
                    p_ref_logprobs, offset_ref_logprobs, j, live
                )
                kl = kl_estimate(log_ratio, kl_input_clip, kl_output_clip, KL_ESTIMATOR)
            kl = tl.where(live, tl.where(invalid, NAN, kl), 0.0)
            nonfinite |= (is_finite(kl) == 0).to(tl.int32)
            store_tokens(p_kl_out, lo, j, kl, inside)
            reward -= kl_coef * kl
        reward = tl.where(live, tl.where(invalid, NAN, reward), 0.0)
        nonfinite |= (is_finite(reward) == 0).to(tl.int32)
        store_tokens(p_rewards, lo, j, reward, inside)

        if (p_advantages is not None) or (p_returns is not None):
            if p_bootstrap is not None:
                bootstrap = tl.load(p_bootstrap + row).to(tl.float32)
                reward = tl.where(j == last, reward + gamma * bootstrap, reward)
            value = tl.zeros([CHUNK], tl.float32)
            if p_values is not None:
                value = token_input(p_values, offset_values, j, live)
            if SKIP:
                decays = live
            else:
                decays = inside
            added = gl * reward
            if p_values is not None:
                added += (gamma - gl) * value
            later, carry = affine_chunk(tl.where(decays, gl, 1.0), tl.where(live, added, 0.0), carry, UNIT)
            advantage = tl.where(live, reward - value + later, 0.0)
            nonfinite |= (is_finite(advantage) == 0).to(tl.int32)
            store_tokens(p_advantages, lo, j, advantage, inside)
            if TWO_RECURRENCES:
                added = gl_value * reward + (gamma - gl_value) * value
                later, carry_value = affine_chunk(
                    tl.where(decays, gl_value, 1.0), tl.where(live, added, 0.0), carry_value, UNIT
                )
                advantage = tl.where(live, reward - value + later, 0.0)
            returns = advantage + value
            nonfinite |= (is_finite(returns) == 0).to(tl.int32)
            store_tokens(p_returns, lo, j, returns, inside)

    any_nonfinite = tl.max(nonfinite) != 0
    if p_status is not None:
        status = tl.where(invalid, OUT_OF_RANGE, tl.where(empty, EMPTY, 0))
        if CREDIT is not None:
            alive = (empty == 0) & (invalid == 0)
            status |= tl.where(alive & (at_live == 0), SCORE_MASKED, 0)
            status |= tl.where(alive & fallback, FALLBACK, 0)
        status |= tl.where(any_nonfinite, NONFINITE, 0)
        tl.store(p_status + row, status)
    if p_stats is not None:
        dropped = empty | invalid
        error = tl.full([], 0.0, tl.float32)
        if p_score is not None:
            error = tl.abs(spread_sum - score).to(tl.float32)
        tl.store(p_stats + row * 4, tl.where(dropped, 0.0, entropy))
        tl.store(p_stats + row * 4 + 1, tl.where(dropped, 0.0, last_share))
        tl.store(p_stats + row * 4 + 2, tl.where(dropped, 0.0, raw_mass))
        tl.store(p_stats + row * 4 + 3, tl.where(dropped, 0.0, error))
    if ZERO_NONFINITE:  # noqa: SIM102
        if any_nonfinite:
            tl.debug_barrier()
            for start in range(0, length, CHUNK):
                j = start + o_i
                zero = tl.zeros([CHUNK], tl.float32)
                store_tokens(p_rewards, lo, j, zero, j < length)
                store_tokens(p_advantages, lo, j, zero, j < length)
                store_tokens(p_returns, lo, j, zero, j < length)
                store_tokens(p_credit_out, lo, j, zero, j < length)
                store_tokens(p_kl_out, lo, j, zero, j < length)


class StatusBits(NamedTuple):
    fallback: int
    empty: int
    score_masked: int
    out_of_range: int
    nonfinite: int


class Swept(NamedTuple):
    """What was asked for; the rest is None. ``[B, R]`` (packed ``[M]``) float32."""

    rewards: Tensor | None
    advantages: Tensor | None
    returns: Tensor | None
    credit: Tensor | None
    kl: Tensor | None
    status: Tensor | None
    """int32 ``[B]``."""
    stats: Tensor | None
    """float32 ``[B, 4]``: entropy of the credit (nats), its share on the last unmasked token, raw mass, and
    ``|sum of the redistributed score - score|``."""


Output = Literal["rewards", "advantages", "returns", "credit", "kl", "status", "stats"]


def sweep(
    response_mask: Tensor,
    outputs: tuple[Output, ...],
    *,
    response_cu_seqlens: Tensor | None = None,
    score: Tensor | None = None,
    credit: Tensor | Literal["uniform", "sparse"] | None = None,
    normalization: Literal["sum_to_one", "sum_to_length", "none"] = "sum_to_one",
    row_status: Tensor | None = None,
    score_index: Tensor | Literal["last_unmasked", "last_token"] = "last_unmasked",
    beta: float = 1.0,
    score_bounds: tuple[float, float] = (-math.inf, math.inf),
    terminal_reward: Tensor | None = None,
    token_rewards: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1",
    kl_input_clip: float | None = None,
    kl_output_clip: float | None = None,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    gl: float | Tensor = 1.0,
    gl_value: float | Tensor | None = None,
    skip_masked: bool = True,
    zero_nonfinite: bool = False,
    min_mass: float,
    status_bits: StatusBits,
) -> Swept:
    """Shapes every row in one launch; ``outputs`` names what is wanted.

    Args:
        response_mask: ``[B, R]``, or ``[M]`` with ``response_cu_seqlens``; any dtype. Other inputs per
            token have its shape, inputs per row are ``[B]``; any floating dtype.
        credit: raw weights; None where nothing is redistributed. It must be given where ``score`` is.
        row_status: int32 ``[B]``; a row that has one is out of range.
        gl: ``gamma * lam``, a float or float32 ``[B]``; ignored without ``values``.
        gl_value: the same for the returns, where it differs.
        skip_masked: a masked token is the identity, not a step with reward and value 0.
        zero_nonfinite: a row with a non-finite output becomes 0.
        min_mass: credit that sums to less falls back to one-hot at the score's token.
        status_bits: what ``status`` is made of.
    """
    if response_cu_seqlens is None:
        batch, width = response_mask.shape
    else:
        batch, width = response_cu_seqlens.shape[0] - 1, response_mask.shape[0]
    device = response_mask.device
    # Packed tokens may belong to no row.
    new = torch.empty if response_cu_seqlens is None else torch.zeros
    out: dict[str, Tensor] = {}
    for name in outputs:
        if name == "status":
            out[name] = torch.empty(batch, dtype=torch.int32, device=device)
        elif name == "stats":
            out[name] = torch.empty(batch, 4, dtype=torch.float32, device=device)
        else:
            out[name] = new(response_mask.shape, dtype=torch.float32, device=device)
    swept = Swept(*(out.get(name) for name in Swept._fields))
    if batch == 0:
        return swept
    weights = tokens(credit) if isinstance(credit, Tensor) else None
    inputs = [
        tokens(response_mask),
        weights,
        *map(tokens, (values, logprobs, ref_logprobs, kl, token_rewards)),
    ]
    estimator: str | None = None if logprobs is None else kl_estimator
    if kl is not None:
        estimator = "given"
    if values is None:
        gl, gl_value = gamma, None
    second = gl_value is not None
    if gl_value is None:
        gl_value = gl
    sweep_kernel[(batch,)](
        *swept,
        *(y for x in inputs for y in (x, row_stride(x))),
        _row(score),
        _row(score_index),
        _row(terminal_reward),
        _row(bootstrap),
        row_status,
        response_cu_seqlens,
        batch,
        width,
        *_number(kl_coef),
        float(beta),
        *map(float, score_bounds),
        math.inf if kl_input_clip is None else float(kl_input_clip),
        math.inf if kl_output_clip is None else float(kl_output_clip),
        float(min_mass),
        float(gamma),
        *_number(gl),
        *_number(gl_value),
        CREDIT="given" if weights is not None else credit,
        NORMALIZATION=normalization,
        SCORE_INDEX=score_index if isinstance(score_index, str) else "explicit",
        KL_ESTIMATOR=estimator,
        SKIP=skip_masked,
        UNIT=all(isinstance(x, float | int) and x == 1 for x in (gl, gl_value)),
        TWO_RECURRENCES=second and "returns" in outputs,
        ZERO_NONFINITE=zero_nonfinite,
        FALLBACK=status_bits.fallback,
        EMPTY=status_bits.empty,
        SCORE_MASKED=status_bits.score_masked,
        OUT_OF_RANGE=status_bits.out_of_range,
        NONFINITE=status_bits.nonfinite,
        CHUNK=CHUNK,
        **COMPILER,
        **registers(128 if response_cu_seqlens is None else 136),
    )
    return swept


def _row(x: Tensor | str | None) -> Tensor | None:
    return x.contiguous() if isinstance(x, Tensor) else None


def _number(x: float | Tensor) -> tuple[Tensor | None, float]:
    """A tensor to be read on the device, or a number."""
    return (x.contiguous(), 0.0) if isinstance(x, Tensor) else (None, float(x))
