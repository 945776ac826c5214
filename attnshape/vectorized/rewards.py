"""From a score to token rewards, advantages and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.types import (
    KL,
    AttentionInputs,
    CreditName,
    Response,
    RowStats,
    ShapedRewards,
    Status,
    TokenInputs,
    compute_dtype,
)
from attnshape.vectorized.advantages import gae_of_rows
from attnshape.vectorized.attention import normalize, raw_credit
from attnshape.vectorized.layout import Mask, Rows, at_column
from attnshape.vectorized.whiten import moments_of


def _estimate(kl: KL, rows: Rows, config: ShapingConfig, dtype: torch.dtype) -> Tensor:
    """KL of each token ``[B, R]``."""
    if kl.estimate is not None:
        return rows.padded(kl.estimate).to(dtype)
    assert kl.logprobs is not None
    assert kl.ref_logprobs is not None
    k1 = rows.padded(kl.logprobs).to(dtype) - rows.padded(kl.ref_logprobs).to(dtype)
    if config.kl_input_clip is not None:
        k1 = k1.clamp(-config.kl_input_clip, config.kl_input_clip)
    if config.kl_estimator == "abs":
        k1 = k1.abs()
    elif config.kl_estimator == "k2":
        k1 = k1.square() / 2
    elif config.kl_estimator == "k3":
        k1 = torch.expm1(-k1) + k1
    clip = config.kl_output_clip
    return k1 if clip is None else k1.clamp(-clip, clip)


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    rows = Rows.of(response)
    mask, raw, invalid = Mask(rows.live), None, rows.invalid
    attention = not isinstance(credit, Tensor | str)
    if isinstance(credit, Tensor):
        raw = rows.padded(credit)
    elif not isinstance(credit, str):
        raw, bad = raw_credit(credit, rows)
        invalid = invalid | bad
    dtype = compute_dtype(score, raw, *tokens.floating)
    width, filled = rows.live.shape[1], mask.count > 0
    if isinstance(config.score_index, Tensor):
        score_at = config.score_index.long()
    else:
        score_at = mask.last if config.score_index == "last_unmasked" else rows.lengths - 1
    inside = (score_at >= 0) & (score_at < rows.lengths)
    at_score = at_column(score_at, width)
    on_score = inside & rows.live.gather(1, at_score).any(1)
    invalid = invalid | (filled & ~inside)
    usable = filled & ~invalid

    def to_score(x: Tensor) -> Tensor:
        """``x`` ([B]) where the score's token is unmasked."""
        return torch.where(on_score, x.to(dtype), 0.0)[:, None]

    mass, fallback = torch.zeros_like(score, dtype=torch.float64), torch.zeros_like(on_score)
    total = (
        mask.count.to(dtype)
        if config.normalization == "sum_to_length"
        else torch.ones_like(score, dtype=dtype)
    )
    if raw is not None:
        weights, mass, fallback = normalize(raw.to(dtype), mask, score_at, on_score, config.normalization)
    elif credit == "uniform":
        weights = mask.select((total / mask.count)[:, None].expand(rows.live.shape))
    else:
        zeros = torch.zeros(rows.live.shape, dtype=dtype, device=score.device)
        weights = zeros.scatter_add(1, at_score, to_score(total))

    score, dense = score.to(dtype).clamp(*config.score_bounds), config.share(credit)
    rewards = (weights * (dense * score)[:, None]).scatter_add(1, at_score, to_score((1 - dense) * score))
    error = (mask.select(rewards).sum(1) - score).abs()
    if tokens.terminal_reward is not None:
        rewards = rewards.scatter_add(1, at_score, to_score(tokens.terminal_reward))
    if tokens.token_rewards is not None:
        rewards = rewards + rows.padded(tokens.token_rewards).to(dtype)
    outputs = [weights]
    if tokens.kl is not None:
        kl = mask.select(_estimate(tokens.kl, rows, config, dtype))
        outputs.append(kl)
        rewards = rewards - kl * torch.as_tensor(tokens.kl.coef, dtype=dtype, device=kl.device)
    rewards = mask.select(rewards)
    values = None if tokens.values is None else rows.padded(tokens.values)
    advantages, returns = gae_of_rows(rewards, values, mask, config, tokens.bootstrap)
    unknown = torch.where(rows.live, math.nan, 0.0).to(dtype)
    outputs = [torch.where(invalid[:, None], unknown, x) for x in (rewards, advantages, returns, *outputs)]
    lost = ~torch.stack([mask.select(x).isfinite().all(1) for x in outputs]).all(0)
    if config.on_nan == "zero_row":
        outputs = [x.masked_fill(lost[:, None], 0.0) for x in outputs]

    flags = {
        Status.FALLBACK: fallback & usable,
        Status.NEGATIVE: fallback & usable & (mass == -math.inf),
        Status.EMPTY: ~filled & ~invalid,
        Status.SCORE_MASKED: usable & ~on_score,
        Status.OUT_OF_RANGE: invalid,
        Status.NONFINITE: lost,
    }
    status = torch.zeros(len(filled), dtype=torch.int32, device=filled.device)
    for flag, which in flags.items():
        status |= which.to(torch.int32) * int(flag)
    whole = weights.sum(1)
    p = weights / whole[:, None]
    entropy = -torch.where(p == 0, 0.0, p * p.log()).sum(1)
    last_share = p.gather(1, at_column(mask.last, width)).sum(1)
    entropy, last_share = (torch.where(whole == 0, 0.0, x) for x in (entropy, last_share))
    stats = torch.stack([x.to(dtype) for x in (entropy, last_share, mass, error)], 1)
    moments = moments_of(mask.select(outputs[1]), mask)
    rewards, advantages, returns, weights, *kls = (rows.restore(x) for x in outputs)
    return ShapedRewards(
        rewards,
        advantages,
        returns,
        weights,
        kls[0] if kls else None,
        status,
        moments,
        RowStats(torch.where(usable[:, None], stats, 0.0), attention),
    )
