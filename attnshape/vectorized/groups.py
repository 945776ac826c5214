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
from attnshape.vectorized.attention import normalize, raw_credit
from attnshape.vectorized.layout import Mask, Rows
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
    of_group, of_batch = _sums_over(group, len(parts), parts.device)
    count = of_group(scored.double())
    lone = count == 1
    if config.baseline == "leave_one_out":
        baseline = (of_group(parts) - parts) / (count - 1).clamp(min=1)
    elif config.baseline == "mean":
        baseline = (of_group(parts) / count.clamp(min=1)).masked_fill(lone, 0.0)
    elif config.baseline == "batch":
        baseline = of_batch(parts) / of_batch(scored.double()).clamp(min=1)
    else:
        baseline = torch.zeros_like(parts)
    out = parts - baseline
    if config.scale != "none":
        sums = of_group if config.scale == "group" else of_batch
        total, n = parts.sum(1, keepdim=True), sums(scored.double()).clamp(min=1)
        deviation = torch.where(scored, total - sums(total) / n, 0.0)
        std = (sums(deviation.square()) / (n - int(config.bessel)).clamp(min=1)).sqrt()
        if config.scale == "group":
            std = std.masked_fill(lone, 1.0)
        out = out / (std + config.eps)
    if config.lone == "zero" and config.baseline in ("mean", "leave_one_out"):
        out = out.masked_fill(lone, 0.0)
    return out.masked_fill(~scored, 0.0)


def _sums_over(
    group: int | Tensor, batch: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From ``[B, K]`` to the sum over each row's group, and over the batch, both ``[B, K]``."""

    def of_batch(x: Tensor) -> Tensor:
        return x.sum(0, keepdim=True).expand_as(x)

    if isinstance(group, int):
        size = group

        def of_equal_groups(x: Tensor) -> Tensor:
            return x.view(-1, size, x.shape[1]).sum(1).repeat_interleave(size, 0)

        return of_equal_groups, of_batch
    together = (group[:, None] == group).to(device, torch.float64)  # [B, B]: no synchronisation

    def of_groups(x: Tensor) -> Tensor:
        return together @ x

    return of_groups, of_batch


def turned(weights: Tensor, rows: Tensor, response: Response) -> Tensor:
    """``weights`` of the response's tokens with other signs in ``rows``, bool ``[B]``."""
    layout = Rows.of(response)
    padded = layout.padded(weights)
    return layout.restore(torch.where(rows[:, None], -padded, padded))


def with_weights(
    credits: Sequence[Weights], response: Response, shape_rewards: Callable[..., ShapedRewards]
) -> tuple[list[Tensor | None], Tensor]:
    """The same sources with a backend's raw attention in place of queries and keys; rows out of range."""
    score = torch.zeros(response.batch_size, device=response.mask.device)
    invalid, weights = torch.zeros_like(score, dtype=torch.bool), []
    for x in credits:
        if x is None or isinstance(x, Tensor):
            weights.append(x)
            continue
        shaped = shape_rewards(score, x, TokenInputs(), response, ShapingConfig(normalization="none"))
        weights.append(shaped.credit)
        invalid |= shaped.status & int(Status.OUT_OF_RANGE) != 0
    return weights, invalid


def spread(
    parts: Tensor,
    credits: Sequence[Weights],
    response: Response,
    config: GroupConfig,
    invalid: Tensor | None = None,
) -> GroupAdvantages:
    """Each of ``parts [B, K]`` over the tokens of its completion, by its own weights."""
    rows = Rows.of(response)
    live, mask = rows.live, Mask(rows.live)
    count = mask.count.double()[:, None]
    invalid = rows.invalid if invalid is None else rows.invalid | invalid
    dtype = compute_dtype(parts, *[x for x in credits if isinstance(x, Tensor)])
    advantages = torch.zeros(live.shape, dtype=torch.float64, device=live.device)
    first = torch.zeros_like(advantages)
    status = torch.zeros(len(live), dtype=torch.int32, device=live.device)
    for k, weights in enumerate(credits):
        share = (live / count.clamp(min=1)).to(torch.float64)  # uniform
        if weights is not None:
            if isinstance(weights, Tensor):
                padded = rows.pad(weights)
                assert padded is not None
                raw = padded.double()
            else:
                found, outside = raw_credit(weights, rows)
                raw, invalid = found.double(), invalid | outside
            if config.signed:
                w = mask.select(raw)
                mass = w.abs().sum(1)
                fallback, negative = mass < MIN_MASS, torch.zeros_like(mass, dtype=torch.bool)
                w = w / mass[:, None]
                given = torch.where(live, w - w.sum(1, keepdim=True) / count + 1 / count, 0.0)
            else:
                nowhere = torch.zeros_like(status, dtype=torch.bool)
                given, mass, fallback = normalize(raw, mask, mask.last, nowhere, "sum_to_one")
                negative = mass == -math.inf
            share = torch.where(fallback[:, None], share, given)
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
