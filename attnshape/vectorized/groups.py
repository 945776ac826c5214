"""Advantages of groups of completions, without a critic, and their spread over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnshape.config import GroupConfig, ShapingConfig
from attnshape.types import (
    MIN_MASS,
    AttentionInputs,
    GroupAdvantages,
    Response,
    ShapedRewards,
    Status,
    TokenInputs,
    compute_dtype,
)
from attnshape.vectorized.attention import normalize
from attnshape.vectorized.layout import Mask, Rows
from attnshape.vectorized.rewards import shape_rewards
from attnshape.vectorized.whiten import moments_of

Weights = Tensor | Sequence[AttentionInputs] | None
"""What spreads one reward: given weights, attention, or None for all tokens alike."""


def completion_advantages(
    score: Tensor, group: int | Tensor, config: GroupConfig, weights: Tensor | None
) -> Tensor:
    """``a_k[i]`` of ``K`` rewards of ``B`` completions, float64 ``[B, K]``; ``A[i]`` is their sum."""
    parts = (score if score.ndim == 2 else score[:, None]).double()
    given = parts.isfinite()
    parts = torch.where(given, parts if weights is None else parts * weights.double(), 0.0)
    scored = given.any(1, keepdim=True)
    of_group = _sums_of_groups(group, parts.device)
    count = of_group(scored.double())
    lone = count == 1
    if config.baseline == "leave_one_out":
        baseline = (of_group(parts) - parts) / (count - 1).clamp(min=1)
    elif config.baseline == "mean":
        baseline = (of_group(parts) / count.clamp(min=1)).masked_fill(lone, 0.0)
    elif config.baseline == "batch":
        baseline = _sum_of_batch(parts) / _sum_of_batch(scored.double()).clamp(min=1)
    else:
        baseline = torch.zeros_like(parts)
    out = parts - baseline
    if config.scale != "none":
        sums = of_group if config.scale == "group" else _sum_of_batch
        total, n = parts.sum(1, keepdim=True), sums(scored.double()).clamp(min=1)
        deviation = torch.where(scored, total - sums(total) / n, 0.0)
        std = (sums(deviation.square()) / (n - int(config.bessel)).clamp(min=1)).sqrt()
        if config.scale == "group":
            std = std.masked_fill(lone, 1.0)
        out = out / (std + config.eps)
    if config.lone == "zero" and config.baseline in ("mean", "leave_one_out"):
        out = out.masked_fill(lone, 0.0)
    return out.masked_fill(~scored, 0.0)


def _sums_of_groups(group: int | Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From ``[B, K]`` to the sum over each row's group, ``[B, K]``."""
    if isinstance(group, Tensor):
        together = (group[:, None] == group).to(device, torch.float64)  # [B, B]: no synchronisation
        return lambda x: together @ x
    return lambda x: x.view(-1, group, x.shape[1]).sum(1).repeat_interleave(group, 0)


def _sum_of_batch(x: Tensor) -> Tensor:
    """``[B, K]`` to ``[1, K]``."""
    return x.sum(0, keepdim=True)


def turned(weights: Tensor, rows: Tensor, response: Response) -> Tensor:
    """``weights`` of the response's tokens with other signs in ``rows``, bool ``[B]``."""
    layout = Rows.of(response)
    padded = layout.padded(weights)
    return layout.restore(torch.where(rows[:, None], -padded, padded))


def spread(
    parts: Tensor,
    credits: Sequence[Weights],
    response: Response,
    config: GroupConfig,
    shape_rewards: Callable[..., ShapedRewards] = shape_rewards,
) -> GroupAdvantages:
    """Each of ``parts [B, K]`` over the tokens of its completion, by its own weights.

    Attention is read by ``shape_rewards``, some backend's.
    """
    rows = Rows.of(response)
    live, mask = rows.live, Mask(rows.live)
    count = mask.count.double()[:, None]
    weights, invalid = [], rows.invalid
    for x in credits:
        if x is not None and not isinstance(x, Tensor):
            score = torch.zeros(len(live), device=live.device)
            shaped = shape_rewards(score, x, TokenInputs(), response, ShapingConfig(normalization="none"))
            invalid = invalid | (shaped.status & int(Status.OUT_OF_RANGE) != 0)
            x = shaped.credit
        weights.append(x)
    dtype = compute_dtype(parts, *weights)
    advantages = torch.zeros(live.shape, dtype=torch.float64, device=live.device)
    first = torch.zeros_like(advantages)
    status = torch.zeros(len(live), dtype=torch.int32, device=live.device)
    for k, given in enumerate(weights):
        share = (live / count.clamp(min=1)).to(torch.float64)  # uniform
        if given is not None:
            raw = rows.padded(given).double()
            if config.signed:
                w = mask.select(raw)
                mass = w.abs().sum(1)
                fallback, negative = mass < MIN_MASS, torch.zeros_like(mass, dtype=torch.bool)
                w = w / mass[:, None]
                credit = torch.where(live, w - w.sum(1, keepdim=True) / count + 1 / count, 0.0)
            else:
                nowhere = torch.zeros_like(status, dtype=torch.bool)
                credit, mass, fallback = normalize(raw, mask, mask.last, nowhere, "sum_to_one")
                negative = mass == -math.inf
            share = torch.where(fallback[:, None], share, credit)
            status |= fallback * int(Status.FALLBACK) | negative * int(Status.NEGATIVE)
        if k == 0:
            first = share
        dense = config.dense_share * count * share + (1 - config.dense_share)
        advantages = advantages + parts[:, k : k + 1].double() * dense
    advantages = mask.select(advantages)
    filled = mask.count > 0
    lost = live & invalid[:, None]
    advantages, first = (x.masked_fill(lost, math.nan) for x in (advantages, first))
    status = status.masked_fill(invalid | ~filled, 0)
    status |= invalid * int(Status.OUT_OF_RANGE) | (~filled & ~invalid) * int(Status.EMPTY)
    unsound = ~advantages.isfinite().all(1) & filled & ~invalid
    status |= (unsound * int(Status.NONFINITE)).to(status.dtype)
    return GroupAdvantages(
        rows.restore(advantages.to(dtype)),
        parts.sum(1).to(dtype),
        rows.restore(first.to(dtype)),
        status.to(torch.int32),
        moments_of(advantages.to(dtype), mask).to(dtype),
    )
