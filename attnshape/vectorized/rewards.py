"""From a score to token rewards, advantages and returns."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnshape import masked
from attnshape.config import ScoreIndex, ShapingConfig
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
from attnshape.vectorized.layout import Mask, Rows, at_column, in_blocks
from attnshape.vectorized.whiten import moments_of


def _estimate(kl: KL, config: ShapingConfig, mask: Mask, out: Tensor) -> Tensor:
    if kl.estimate is not None:
        return mask.select(kl.estimate.to(out.dtype), out)
    assert kl.logprobs is not None
    assert kl.ref_logprobs is not None
    k1 = torch.sub(kl.logprobs.to(out.dtype), kl.ref_logprobs.to(out.dtype), out=out)
    if config.kl_input_clip is not None:
        k1.clamp_(-config.kl_input_clip, config.kl_input_clip)
    if config.kl_estimator == "abs":
        k1.abs_()
    elif config.kl_estimator == "k2":
        k1.square_().div_(2)
    elif config.kl_estimator == "k3":
        k1.add_(torch.expm1(-k1))
    if config.kl_output_clip is not None:
        k1.clamp_(-config.kl_output_clip, config.kl_output_clip)
    return mask.select(k1, out)


class _Shaped(NamedTuple):
    """What is found of some rows."""

    rewards: Tensor  # [n, R]
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    kl: Tensor  # [n, 0] without a KL input
    mass: Tensor  # [n], as all that follows
    tokens: Tensor
    inside: Tensor  # the score's token is among the row's
    on_score: Tensor  # and is unmasked
    fallback: Tensor
    surely_finite: Tensor
    error: Tensor
    entropy: Tensor
    last_share: Tensor
    moments: Tensor  # [n, 3]

    @classmethod
    def empty(cls, mask: Tensor, dtype: torch.dtype, has_kl: bool) -> _Shaped:
        rows, width = mask.shape
        shapes = [(rows, width)] * 4 + [(rows, width if has_kl else 0)] + [(rows,)] * 9 + [(rows, 3)]
        dtypes = [dtype] * 5 + [torch.float64, torch.int32] + [torch.bool] * 4 + [torch.float64] * 4
        return cls(*(mask.new_empty(x, dtype=y) for x, y in zip(shapes, dtypes, strict=True)))


def _shape_rows(
    outputs: Sequence[Tensor],
    mask: Tensor,
    lengths: Tensor,
    score: Tensor,
    raw: Tensor | None,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    score_index: ScoreIndex | Tensor,
    values: Tensor | None,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    estimate: Tensor | None,
    token_rewards: Tensor | None,
    terminal_reward: Tensor | None,
    bootstrap: Tensor | None,
    *,
    kl_coef: float | Tensor,
    config: ShapingConfig,
    source: object,
) -> None:
    out = _Shaped(*outputs)
    rewards, weights, width, dtype = out.rewards, out.weights, mask.shape[1], out.rewards.dtype
    live = Mask(mask.bool())
    if isinstance(score_index, Tensor):
        score_at = score_index.long()
    else:
        score_at = live.last if score_index == "last_unmasked" else lengths - 1
    inside = (score_at >= 0) & (score_at < lengths)
    at_score = at_column(score_at, width)
    on_score = inside & live.live.gather(1, at_score).any(1)

    def to_score(x: Tensor) -> Tensor:
        """``x`` ([n]) where the score's token is unmasked."""
        return x.to(dtype).masked_fill(~on_score, 0.0)[:, None]

    if raw is not None:
        _, mass, fallback = normalize(
            raw.to(dtype), live, score_at, on_score, config.normalization, out=weights
        )
    else:
        mass, fallback = torch.zeros_like(score), torch.zeros_like(on_score)
        total = live.count if config.normalization == "sum_to_length" else torch.ones_like(live.count)
        if source == "uniform":
            live.select((total / live.count).to(dtype)[:, None].expand(mask.shape), weights)
        else:
            weights.zero_().scatter_add_(1, at_score, to_score(total))

    score = score.to(dtype).clamp(*config.score_bounds)
    dense = config.share(source)
    torch.mul(weights, (dense * score)[:, None], out=rewards)
    rewards.scatter_add_(1, at_score, to_score((1 - dense) * score))
    error = (rewards.sum(1) - score).abs()
    if terminal_reward is not None:
        rewards.scatter_add_(1, at_score, to_score(terminal_reward))
    if token_rewards is not None:
        rewards += token_rewards.to(dtype)
    if estimate is not None or logprobs is not None:
        kl = _estimate(KL(logprobs, ref_logprobs, kl_coef, estimate), config, live, out.kl)
        if isinstance(kl_coef, Tensor):
            rewards.addcmul_(kl, kl_coef.to(kl), value=-1)
        else:
            rewards.sub_(kl, alpha=kl_coef)
    live.select(rewards, rewards)
    gae_of_rows(
        (out.advantages, out.returns),
        live,
        rewards,
        values,
        bootstrap,
        config.gamma,
        lam,
        lam_value,
        config.mask_semantics,
    )
    moments = moments_of(out.advantages, live)
    # What is not finite makes advantages so; sums may overflow, and returns of a recurrence of their own.
    surely_finite = moments[:, 1].isfinite()
    if lam_value is not None:
        surely_finite &= out.returns.sum(1).isfinite()
    total = weights.sum(1)
    logs = weights.clamp(min=torch.finfo(dtype).tiny).log_()
    entropy = total.log() - logs.mul_(weights).sum(1) / total
    last_share = weights.gather(1, at_column(live.last, width)).sum(1) / total
    entropy, last_share = (x.masked_fill(total == 0, 0.0) for x in (entropy, last_share))
    of_rows = (
        mass,
        live.count,
        inside,
        on_score,
        fallback,
        surely_finite,
        error,
        entropy,
        last_share,
        moments,
    )
    for row_output, x in zip(out[5:], of_rows, strict=True):
        row_output.copy_(x)


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    rows = Rows.of(response)
    raw, invalid = None, rows.invalid
    if isinstance(credit, Tensor):
        raw = rows.pad(credit)
    elif not isinstance(credit, str):
        raw, bad = raw_credit(credit, rows)
        invalid = invalid | bad
    dtype = compute_dtype(score, raw, *tokens.floating)
    kl = tokens.kl or KL(None, None, 0.0)
    of_tokens = (tokens.values, kl.logprobs, kl.ref_logprobs, kl.estimate, tokens.token_rewards)
    padded = [rows.pad(x) for x in of_tokens]
    compute = functools.partial(_shape_rows, config=config, source=credit, kl_coef=kl.coef)
    per_row = (config.lam, config.lam_value, config.score_index)
    given = (*per_row, *padded, tokens.terminal_reward, tokens.bootstrap)
    x = _Shaped.empty(rows.mask, dtype, tokens.kl is not None)
    in_blocks(compute, x, rows.mask, rows.lengths, score, raw, *given)

    filled = x.tokens > 0
    invalid = invalid | (filled & ~x.inside)
    usable = filled & ~invalid
    outputs = [*x[:4], *([x.kl] if tokens.kl is not None else [])]
    lost = ~x.surely_finite | (filled & invalid)
    if lost.any():
        suspects, live = lost.clone(), rows.live[lost]
        unknown = live & invalid[lost][:, None]
        found = [out[lost].masked_fill(~live, 0.0).masked_fill(unknown, math.nan) for out in outputs]
        finite = torch.stack([y.isfinite().all(1) for y in found]).all(0)
        for out, y in zip(outputs, found, strict=True):
            out[suspects] = y if config.on_nan == "propagate" else y.masked_fill(~finite[:, None], 0.0)
        lost[suspects] = ~finite
        x.moments[suspects] = moments_of(x.advantages[suspects], Mask(live))
    flags = {
        Status.FALLBACK: x.fallback & usable,
        Status.NEGATIVE: x.fallback & usable & (x.mass == -math.inf),
        Status.EMPTY: ~filled & ~invalid,
        Status.SCORE_MASKED: usable & ~x.on_score,
        Status.OUT_OF_RANGE: invalid,
        Status.NONFINITE: lost,
    }
    status = torch.zeros(len(filled), dtype=torch.int32, device=filled.device)
    for flag, which in flags.items():
        status |= which.to(torch.int32) * int(flag)
    stats = [y.to(dtype).masked_fill(~usable, 0.0) for y in (x.entropy, x.last_share, x.mass, x.error)]
    attention = not isinstance(credit, Tensor | str)
    restored = [rows.restore(y) for y in outputs]
    shaped = ShapedRewards(
        rewards=restored[0],
        advantages=restored[1],
        returns=restored[2],
        credit=restored[3],
        kl=restored[4] if len(restored) == 5 else None,
        status=status,
        moments=x.moments.to(dtype),
        row_stats=RowStats(
            entropy=stats[0],
            last_share=stats[1],
            response_share=stats[2] if attention else None,
            score_error=stats[3],
        ),
    )
    return masked.filled(shaped, tokens.values, response.mask, config)
