"""Generalised advantage estimation (arXiv 1506.02438), as a scan by doubling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """Advantages and returns ``[n, R]``; 0 where masked, or what the recurrence carries past there.

    ``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``; to skip a masked token
    is the identity. Rewards are 0 where masked.
    """
    dtype, gamma = rewards.dtype, float32_rounded(config.gamma)
    if bootstrap is not None and rewards.shape[1]:
        after = torch.where(mask.last < 0, 0.0, gamma * bootstrap.to(dtype))
        rewards = rewards.scatter_add(1, at_column(mask.last, rewards.shape[1]), after[:, None])
    given = torch.zeros_like(rewards) if values is None else values.to(dtype)
    v, skip = mask.select(given), config.mask_semantics == "skip"

    def advantages(lam: float | Tensor) -> Tensor:
        gl = decay(config.gamma, lam)
        gl = gl.to(dtype)[:, None] if isinstance(gl, Tensor) else torch.full_like(rewards[:, :1], gl)
        w = _suffix_scan(
            torch.where(mask.live, gl, 1.0 if skip else gl), mask.select(gl * rewards + (gamma - gl) * v)
        )
        found = rewards - v + torch.nn.functional.pad(w[:, 1:], (0, 1))
        if config.carry_masked and not skip:
            return found
        found = mask.select(found)
        return mask.following(found) if config.carry_masked else found

    if values is None:
        found = advantages(1.0)
        return found, found.clone()
    found = advantages(config.lam)
    added = given if config.carry_masked and skip else v
    return found, (found if config.lam_value is None else advantages(config.lam_value)) + added


def with_carried(
    computed: Advantages,
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    config: ShapingConfig,
    bootstrap: Tensor | None,
) -> Advantages:
    """What the recurrence carries past masked tokens, put where another backend has left 0, if asked for."""
    if not config.carry_masked:
        return computed
    mask = Mask(response.mask != 0)
    values = None if values is None else values.double()
    carried = gae_of_rows(mask.select(rewards.double()), values, mask, config, bootstrap)
    advantages, returns = (
        torch.where(mask.live, x, y.to(x.dtype)) for x, y in zip(computed[:2], carried, strict=True)
    )
    return Advantages(advantages, returns, computed.moments)


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
    values = None if values is None else rows.padded(values)
    advantages, returns = gae_of_rows(padded, values, mask, config, bootstrap)
    lost = rows.live & rows.invalid[:, None]
    advantages, returns = (x.masked_fill(lost, math.nan) for x in (advantages, returns))
    moments = moments_of(mask.select(advantages), mask).to(dtype)
    return Advantages(rows.restore(advantages), rows.restore(returns), moments)
