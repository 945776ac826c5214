"""Generalised advantage estimation (arXiv 1506.02438)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnshape.config import MaskSemantics, ShapingConfig
from attnshape.reference.layout import response_rows
from attnshape.reference.whiten import row_moments
from attnshape.types import Advantages, Response, compute_dtype, float32_rounded


def _recurrence(
    rewards: Tensor,  # [R], bootstrap already in the last unmasked one
    values: Tensor,  # [R]
    live: Tensor,
    gamma: float,
    gl: float,
    mask_semantics: MaskSemantics,
    carry_masked: bool,
) -> Tensor:
    """``A`` of one row, ``[R]``; the loop runs in float64 whatever the dtype.

    ``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``: with
    ``W_t = gamma V_t + gl A_t`` this is ``A_t = r_t + gamma V_{t+1} - V_t + gl A_{t+1}``.
    """
    w, a, out = 0.0, 0.0, []
    for r, v, m in zip(
        reversed(rewards.tolist()), reversed(values.tolist()), reversed(live.tolist()), strict=True
    ):
        if m or mask_semantics == "zero":
            a = r - v + w
        out.append(a if m or carry_masked else 0.0)
        if m:
            w = gl * w + gl * r + (gamma - gl) * v
        elif mask_semantics == "zero":
            w = gl * w
    return torch.tensor(out[::-1], dtype=torch.float64, device=rewards.device).to(rewards.dtype)


def _lam_of_row(lam: float | Tensor, gamma: float, b: int) -> float:
    """``gl`` of row ``b``: gamma * lam, rounded to float32 once."""
    value = lam[b].item() if isinstance(lam, Tensor) else lam
    return float32_rounded(gamma * value)


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
    return Advantages(advantages, returns, row_moments(advantages, response))
