"""Generalised advantage estimation (arXiv 1506.02438), and advantages of groups without a critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnshape.config import GroupConfig, MaskSemantics, ShapingConfig
from attnshape.reference.attention import normalize_row, raw_credit
from attnshape.reference.layout import response_rows
from attnshape.reference.whiten import row_moments
from attnshape.types import (
    MIN_MASS,
    Advantages,
    AttentionLayers,
    GroupAdvantages,
    Response,
    Status,
    compute_dtype,
    float32_rounded,
)


def _walk(
    rewards: Sequence[float],  # [R], bootstrap already in the last unmasked one
    values: Sequence[float],  # [R]
    live: Sequence[bool],
    out: list[float],
    gamma: float,
    gl: float,
    mask_semantics: MaskSemantics,
    carry_masked: bool,
) -> None:
    """Writes ``A`` of one row, ``[R]``, to ``out``.

    ``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``: with
    ``W_t = gamma V_t + gl A_t`` this is ``A_t = r_t + gamma V_{t+1} - V_t + gl A_{t+1}``.
    """
    w = a = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        r, v, m = rewards[t], values[t], live[t]
        if m or mask_semantics == "zero":
            a = r - v + w
        out[t] = a if m or carry_masked else 0.0
        if m:
            w = gl * w + gl * r + (gamma - gl) * v
        elif mask_semantics == "zero":
            w = gl * w


def _recurrence(rewards: Tensor, values: Tensor, live: Tensor, *settings: Any) -> Tensor:
    """``A`` of one row, ``[R]``; the loop runs in float64 whatever the dtype."""
    out = [0.0] * len(live)
    _walk(rewards.tolist(), values.tolist(), live.tolist(), out, *settings)
    return torch.tensor(out, dtype=torch.float64, device=rewards.device).to(rewards.dtype)


def _lam_of_row(lam: float | Tensor, gamma: float, b: int) -> float:
    """``gl`` of row ``b``: gamma * lam, rounded to float32 once."""
    value = lam[b].item() if isinstance(lam, Tensor) else lam
    return float32_rounded(gamma * value)


def gae_of_rows(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    config: ShapingConfig,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns."""
    semantics, carry = config.mask_semantics, config.carry_masked
    dtype = compute_dtype(rewards, values, bootstrap)
    advantages = torch.zeros(response.mask.shape, dtype=dtype, device=rewards.device)
    returns = torch.zeros_like(advantages)
    gamma32 = float32_rounded(config.gamma)
    rows, invalid = response_rows(response)
    for b, row in enumerate(rows):
        live = response.mask[row] != 0
        if invalid[b]:
            advantages[row] = returns[row] = torch.where(live, math.nan, 0.0).to(dtype)
            continue
        r = torch.where(live, rewards[row].to(dtype), 0.0)
        if bootstrap is not None and live.any():
            r[live.nonzero().max()] += gamma32 * bootstrap[b].to(dtype)
        if values is None:
            advantages[row] = _recurrence(r, torch.zeros_like(r), live, gamma32, gamma32, semantics, carry)
            returns[row] = advantages[row]
            continue
        v = torch.where(live, values[row].to(dtype), 0.0)
        gl = _lam_of_row(config.lam, config.gamma, b)
        gl_value = gl if config.lam_value is None else _lam_of_row(config.lam_value, config.gamma, b)
        advantages[row] = _recurrence(r, v, live, gamma32, gl, semantics, carry)
        returns[row] = _recurrence(r, v, live, gamma32, gl_value, semantics, carry)
        returns[row] += values[row].to(dtype) if carry and semantics == "skip" else v
    return advantages, returns


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response | Tensor,
    config: ShapingConfig | None = None,
    *,
    bootstrap: Tensor | None = None,
) -> Advantages:
    """Advantages, returns, and the moments of the advantages."""
    config, response = config or ShapingConfig(), Response.of(response)
    advantages, returns = gae_of_rows(rewards, values, response, config, bootstrap)
    return Advantages(advantages, returns, row_moments(advantages, response))


def completion_advantages(
    score: Tensor, group: int | Tensor, config: GroupConfig, weights: Tensor | None = None
) -> Tensor:
    """``a_k[i]`` of ``K`` rewards of ``B`` completions, ``[B, K]``; ``A[i]`` is their sum.

    A reward that is not finite was not given: it counts as 0, and a completion without any has advantage 0
    and is left out of every mean.
    """
    parts = score if score.ndim == 2 else score[:, None]
    given = parts.isfinite()
    parts = torch.where(given, parts if weights is None else parts * weights.to(parts), 0.0)
    scored, total = given.any(1), parts.sum(1)
    ids = torch.arange(len(score), device="cpu") // group if isinstance(group, int) else group.cpu()
    out = torch.zeros_like(parts)
    for i in range(len(parts)):
        members = [j for j in range(len(parts)) if ids[j] == ids[i] and scored[j]]
        batch = [j for j in range(len(parts)) if scored[j]]
        if not scored[i]:
            continue
        lone = len(members) == 1
        if config.baseline == "mean":
            baseline = parts[members].mean(0) * (not lone)
        elif config.baseline == "leave_one_out":
            baseline = (
                parts[[j for j in members if j != i]].mean(0) if not lone else torch.zeros_like(parts[i])
            )
        elif config.baseline == "batch":
            baseline = parts[batch].mean(0)
        else:
            baseline = torch.zeros_like(parts[i])
        if lone and config.lone == "zero" and config.baseline in ("mean", "leave_one_out"):
            continue
        out[i] = parts[i] - baseline
        over = members if config.scale == "group" else batch
        if config.scale == "group" and lone:
            out[i] /= 1 + config.eps
        elif config.scale != "none":
            correction = int(config.bessel and len(over) > 1)
            out[i] /= total[over].std(correction=correction) + config.eps
    return out


def group_advantages(
    score: Tensor,
    credit: Tensor | AttentionLayers | str | Sequence[Tensor | AttentionLayers | str | None] | None,
    response: Response | Tensor,
    *,
    group: int | Tensor,
    weights: Tensor | None = None,
    config: GroupConfig | None = None,
) -> GroupAdvantages:
    """``A[i, t]`` from groups of completions, each reward spread by its own credit."""
    config, response = config or GroupConfig(), Response.of(response)
    rows, invalid = response_rows(response)
    credits: Sequence[Tensor | AttentionLayers | str | None] = [credit] if score.ndim == 1 else credit  # type: ignore[assignment, list-item]
    raws: list[Tensor | None] = []
    for one in credits:
        if isinstance(one, Tensor) or one is None or isinstance(one, str):
            raws.append(one if isinstance(one, Tensor) else None)
        else:
            found, outside = raw_credit(one, response)
            raws.append(found)
            invalid = invalid | outside
    dtype = compute_dtype(score, *raws)
    parts = completion_advantages(score.to(dtype), group, config, weights)
    share, mask = config.dense_share, response.mask
    advantages = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    first = torch.zeros_like(advantages)
    status = torch.zeros(len(rows), dtype=torch.int32, device=mask.device)
    for b, row in enumerate(rows):
        live = mask[row] != 0
        n = int(live.sum())
        if n == 0 or invalid[b]:
            status[b] |= int(Status.OUT_OF_RANGE if invalid[b] else Status.EMPTY)
            advantages[row] = first[row] = torch.where(live, math.nan, 0.0).to(dtype)
            continue
        for k, raw in enumerate(raws):
            spread = torch.where(live, torch.ones_like(advantages[row]) / n, 0.0)
            if raw is not None and config.signed:
                w = torch.where(live, raw[row].to(dtype), 0.0)
                of_score = config.signed == "score" and isinstance(credits[k], Tensor)
                w = -w if of_score and parts[b, k] < 0 else w
                mass = w.abs().sum()
                if mass < MIN_MASS:
                    status[b] |= int(Status.FALLBACK)
                else:
                    w = w / mass
                    spread = torch.where(live, (w - w.sum() / n) + 1 / n, 0.0)
            elif raw is not None:
                found, fallback = normalize_row(raw[row].to(dtype), live, 0, "sum_to_one")
                status[b] |= int(fallback)
                spread = spread if fallback else found
            if k == 0:
                first[row] = spread
            advantages[row] += torch.where(live, parts[b, k] * (share * n * spread + 1 - share), 0.0)
        if not (score[b].isfinite().any() and advantages[row].isfinite().all()):
            status[b] |= int(Status.NONFINITE)
    return GroupAdvantages(advantages, parts.sum(1), first, status, row_moments(advantages, response))
