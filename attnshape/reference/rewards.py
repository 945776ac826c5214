"""From a score to token rewards: KL, redistribution, and all of ``shape_rewards``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnshape.config import KLEstimator, Normalization, ScoreIndex, ShapingConfig
from attnshape.reference.advantages import gae_of_rows
from attnshape.reference.attention import normalize_row, raw_credit
from attnshape.reference.layout import response_rows
from attnshape.reference.whiten import row_moments
from attnshape.types import (
    KL,
    AttentionLayers,
    CreditName,
    Response,
    RowStats,
    ShapedRewards,
    Status,
    TokenInputs,
    compute_dtype,
)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: KLEstimator = "k1",
    input_clip: float | None = None,
    output_clip: float | None = None,
) -> Tensor:
    """KL estimate per token (http://joschu.net/blog/kl-approx.html)."""
    dtype = compute_dtype(logprobs, ref_logprobs)
    k1 = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if input_clip is not None:
        k1 = k1.clamp(-input_clip, input_clip)
    if estimator == "k1":
        kl = k1
    elif estimator == "abs":
        kl = k1.abs()
    elif estimator == "k2":
        kl = k1.square() / 2
    else:
        kl = torch.expm1(-k1) + k1
    return kl if output_clip is None else kl.clamp(-output_clip, output_clip)


def _score_position(live: Tensor, score_index: ScoreIndex | Tensor, b: int) -> int:
    """Token of row ``b`` that carries the score."""
    if isinstance(score_index, Tensor):
        return int(score_index[b])
    return int(live.nonzero().max()) if score_index == "last_unmasked" else len(live) - 1


def _rewards_row(
    score: Tensor,  # [], clamped
    credit: Tensor,  # [R]
    live: Tensor,
    score_index: int,
    dense_share: float,
) -> Tensor:
    """The redistributed score of one row, ``[R]``."""
    on_score = torch.arange(len(live), device=live.device) == score_index
    return torch.where(
        live, dense_share * score * credit + torch.where(on_score, (1 - dense_share) * score, 0.0), 0.0
    )


def redistribute(
    score: Tensor,
    credit: Tensor | CreditName,
    response: Response | Tensor,
    config: ShapingConfig | None = None,
) -> Tensor:
    """``dense_share * score * credit[j] + (1 - dense_share) * score * [j == score_index]``."""
    return shape_rewards(score, credit, response, config=config).rewards


@torch.no_grad()
def shape_rewards(
    score: Tensor,
    credit: Tensor | AttentionLayers | CreditName,
    response: Response | Tensor,
    *,
    values: Tensor | None = None,
    kl: KL | None = None,
    token_rewards: Tensor | None = None,
    terminal_reward: Tensor | None = None,
    bootstrap: Tensor | None = None,
    config: ShapingConfig | None = None,
) -> ShapedRewards:
    """From a score and a source of credit to rewards, advantages and returns."""
    config, response = config or ShapingConfig(), Response.of(response)
    attention = not isinstance(credit, Tensor | str)
    tokens = TokenInputs(values, kl, token_rewards, terminal_reward, bootstrap)
    mask = response.mask
    rows, invalid = response_rows(response)
    if isinstance(credit, Tensor):
        raw = credit
    elif isinstance(credit, str):
        raw = None
    else:
        raw, invalid = raw_credit(credit, response)
    dtype = compute_dtype(score, raw, *tokens.floating)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    score, raw = score.to(dtype).clamp(*config.score_bounds), cast(raw)
    values, token_rewards, bootstrap = cast(values), cast(token_rewards), cast(bootstrap)
    penalty = None if kl is None else torch.where(mask != 0, _estimate(kl, config, dtype), 0.0)
    rewards = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    weights = torch.zeros_like(rewards)
    status = torch.zeros(len(rows), dtype=torch.int32, device=mask.device)
    entropy, last_share, share, error = torch.zeros(4, len(rows), dtype=dtype, device=mask.device)

    for b, row in enumerate(rows):
        live = mask[row] != 0
        n = int(live.sum())
        if n == 0:
            status[b] |= int(Status.OUT_OF_RANGE if invalid[b] else Status.EMPTY)
            continue
        at = _score_position(live, config.score_index, b)
        if invalid[b] or not 0 <= at < len(live):
            status[b] |= int(Status.OUT_OF_RANGE)
            weights[row] = rewards[row] = torch.where(live, math.nan, 0.0)
            continue
        if not live[at]:
            status[b] |= int(Status.SCORE_MASKED)
        if credit == "uniform":
            total = n if config.normalization == "sum_to_length" else 1
            weights[row] = torch.where(live, total / n, 0.0)
        elif raw is None:  # sparse
            zeros = torch.zeros(len(live), dtype=dtype, device=mask.device)
            weights[row], _ = normalize_row(zeros, live, at, _summing(config.normalization))
        else:
            weights[row], fallback = normalize_row(raw[row], live, at, config.normalization)
            status[b] |= int(fallback)
            share[b] = torch.where(live, raw[row], 0.0).sum()
        shaped = _rewards_row(score[b], weights[row], live, at, config.share(credit))
        error[b] = (shaped.sum() - score[b]).abs()
        total_weight = weights[row].sum()
        p = weights[row][weights[row] != 0] / total_weight
        entropy[b] = -(p * p.log()).sum()
        last = int(live.nonzero().max())
        last_share[b] = weights[row][last] / total_weight if total_weight != 0 else 0.0

        if terminal_reward is not None and live[at]:
            shaped[at] += terminal_reward[b].to(dtype)
        if token_rewards is not None:
            shaped = shaped + token_rewards[row]
        if kl is not None and penalty is not None:
            shaped = shaped - torch.as_tensor(kl.coef).to(shaped) * penalty[row]
        rewards[row] = torch.where(live, shaped, 0.0)

    advantages, returns = gae_of_rows(rewards, values, response, config, bootstrap)
    outputs = [x for x in (rewards, advantages, returns, weights, penalty) if x is not None]
    for b, row in enumerate(rows):
        if status[b] & int(Status.OUT_OF_RANGE):
            for x in outputs:
                x[row] = torch.where(mask[row] != 0, math.nan, 0.0)
    # Masked tokens may hold anything under ``carry_masked``.
    sound = torch.stack(outputs).isfinite().all(0) | (mask == 0)
    for b, row in enumerate(rows):
        if not sound[row].all():
            status[b] |= int(Status.NONFINITE)
            if config.on_nan == "zero_row":
                for x in outputs:
                    x[row] = 0.0
    stats = RowStats(torch.stack([entropy, last_share, share, error], 1), attention)
    moments = row_moments(advantages, response)
    return ShapedRewards(rewards, advantages, returns, weights, penalty, status, moments, stats)


def _estimate(kl: KL, config: ShapingConfig, dtype: torch.dtype) -> Tensor:
    if kl.estimate is not None:
        return kl.estimate.to(dtype)
    assert kl.logprobs is not None
    assert kl.ref_logprobs is not None
    pair = kl.logprobs.to(dtype), kl.ref_logprobs.to(dtype)
    return kl_estimate(*pair, config.kl_estimator, config.kl_input_clip, config.kl_output_clip)


def _summing(normalization: Normalization) -> Normalization:
    """``sparse`` has no weights of its own to leave as they are."""
    return "sum_to_one" if normalization == "none" else normalization
