"""Generalised advantage estimation (arXiv 1506.02438), as a scan by doubling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnshape import masked
from attnshape.config import ShapingConfig
from attnshape.types import Advantages, Response, compute_dtype, decay, float32_rounded
from attnshape.vectorized.layout import Mask, Rows, at_column
from attnshape.vectorized.whiten import moments_of


def _suffix_scan(factor: Tensor, x: Tensor) -> Tensor:
    """``W_t = x_t + factor_t W_{t+1}`` along the rows of ``[n, R]``."""
    tiny = torch.finfo(x.dtype).tiny
    reach = 1
    while reach < x.shape[1]:
        x, later = x.clone(), x[:, reach:]
        x[:, :-reach] += factor[:, :-reach] * later
        products = factor.clone()
        # What underflows would make NaN of an infinity that the recurrence carries as it is.
        product = factor[:, :-reach] * factor[:, reach:]
        products[:, :-reach] = torch.where(factor[:, :-reach] > 0, product.clamp(min=tiny), 0.0)
        factor, reach = products, 2 * reach
    return x


def gae_of_rows(
    rewards: Tensor, values: Tensor | None, mask: Mask, config: ShapingConfig, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``[n, R]``, 0 where masked.

    ``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``; to skip a masked token
    is the identity. Rewards are 0 where masked.
    """
    dtype, gamma = rewards.dtype, float32_rounded(config.gamma)
    if bootstrap is not None and rewards.shape[1]:
        after = torch.where(mask.last < 0, 0.0, gamma * bootstrap.to(dtype))
        rewards = rewards.scatter_add(1, at_column(mask.last, rewards.shape[1]), after[:, None])
    v = torch.zeros_like(rewards) if values is None else mask.select(values.to(dtype))

    def advantages(lam: float | Tensor) -> Tensor:
        gl = decay(config.gamma, lam)
        gl = gl.to(dtype)[:, None] if isinstance(gl, Tensor) else torch.full_like(rewards[:, :1], gl)
        factor = torch.where(mask.live, gl, 1.0 if config.mask_semantics == "skip" else gl)
        w = _suffix_scan(factor, mask.select(gl * rewards + (gamma - gl) * v))
        return mask.select(rewards - v + torch.nn.functional.pad(w[:, 1:], (0, 1)))

    if values is None:
        found = advantages(1.0)
        return found, found.clone()
    found = advantages(config.lam)
    return found, (found if config.lam_value is None else advantages(config.lam_value)) + v


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    config: ShapingConfig,
    bootstrap: Tensor | None,
) -> Advantages:
    rows = Rows.of(response)
    mask, dtype = Mask(rows.live), compute_dtype(rewards, values, bootstrap)
    padded = torch.where(rows.live, rows.padded(rewards).to(dtype), 0.0)
    advantages, returns = gae_of_rows(padded, rows.pad(values), mask, config, bootstrap)
    lost = rows.live & rows.invalid[:, None]
    advantages, returns = (x.masked_fill(lost, math.nan) for x in (advantages, returns))
    moments = moments_of(advantages, mask).to(dtype)
    out = Advantages(rows.restore(advantages), rows.restore(returns), moments)
    return masked.carried(out, values, response.mask, config)
