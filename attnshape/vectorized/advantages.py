"""Generalised advantage estimation (arXiv 1506.02438), as scans."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnshape import masked
from attnshape.config import MaskSemantics, ShapingConfig
from attnshape.types import Advantages, Response, compute_dtype, decay, float32_rounded
from attnshape.vectorized.layout import Mask, Rows, at_column, in_blocks, product_dtype
from attnshape.vectorized.whiten import moments_of

SCAN_CHUNK = 32
"""Tokens of the recurrence that one triangular product covers."""


def _triangle(gl: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each token of a chunk (``[n, C, C]``), and the one after it (``[n, 1, C]``), add to its tokens."""
    i = torch.arange(SCAN_CHUNK, dtype=torch.float64, device=gl.device)
    distance = i[:, None] - i
    within = (gl[:, None, None] ** distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
    return within.to(dtype), (gl[:, None, None] ** (SCAN_CHUNK - i)).to(dtype)


@functools.lru_cache(maxsize=64)
def _triangle_of_number(gl: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    within, carried = _triangle(torch.tensor([gl], dtype=torch.float64, device=device), dtype)
    return within[0], carried


def _suffix_scan(x: Tensor, gl: float | Tensor, out: Tensor | None = None) -> Tensor:
    """``G_t = x_t + gl * G_{t+1}`` along the rows of ``[n, R]``; in ``out`` if that needs no padding.

    Within a chunk a triangular product, between chunks the same scan over their first values: no sum is
    longer than a chunk, so float32 is enough at any length. Rows are made whole pairs of chunks: BLAS
    multiplies a single vector in another order than the rows of a matrix.
    """
    width, padding = x.shape[1], -x.shape[1] % (2 * SCAN_CHUNK)
    x = torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    out = torch.empty_like(x) if padding or out is None else out
    chunks = out.view(len(x), -1, SCAN_CHUNK)
    if isinstance(gl, Tensor):
        within, carried = _triangle(gl, x.dtype)
        torch.bmm(x.view(chunks.shape), within, out=chunks)
    else:
        within, carried = _triangle_of_number(gl, x.dtype, x.device)
        torch.mm(x.view(-1, SCAN_CHUNK), within, out=out.view(-1, SCAN_CHUNK))
    first = chunks[:, :, 0]
    if chunks.shape[1] > 2:
        first = _suffix_scan(first, gl**SCAN_CHUNK)
    chunks[:, :-1].addcmul_(first[:, 1:, None], carried)
    return out[:, :width]


def _returns(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    gl: float | Tensor,
    scratch: Tensor,
    out: Tensor | None,
) -> Tensor:
    """``G_t = A_t + V_t = r_t + (gamma - gl) V_{t+1} + gl G_{t+1}``, ``[n, R]``; in ``out`` if it can be."""
    if values is None:
        return _suffix_scan(rewards, gl, out)
    later = values[:, 1:]
    scratch[:, -1] = rewards[:, -1]
    if isinstance(gl, Tensor):
        torch.addcmul(rewards[:, :-1], (gamma - gl)[:, None].to(later.dtype), later, out=scratch[:, :-1])
    else:
        torch.add(rewards[:, :-1], later, alpha=gamma - gl, out=scratch[:, :-1])
    return _suffix_scan(scratch, gl, out)


def _non_finite_returns(rewards: Tensor, values: Tensor | None, gamma: float, gl: float | Tensor) -> Tensor:
    """As ``_returns``; NaN and infinity go where the recurrence carries them, nowhere else.

    What a value is to its own token is left out: ``A_t`` has it, once.
    """
    values = torch.zeros_like(rewards) if values is None else values
    scratch = torch.empty_like(rewards)
    column = torch.as_tensor(gl, dtype=rewards.dtype, device=rewards.device).view(-1, 1)
    finite = rewards.isfinite() & values.isfinite()
    poison = (column * rewards + (gamma - column) * values).masked_fill(finite, 0.0)

    def later(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, 1:], (0, 1))

    carried = poison.flip(1).cumsum(1).flip(1)
    carried = torch.where(column == 0, poison + 0.0 * later(carried), carried)
    returns = _returns(
        rewards.masked_fill(~finite, 0.0), values.masked_fill(~finite, 0.0), gamma, gl, scratch, None
    )
    return returns + rewards.masked_fill(finite, 0.0) + later(carried)


def gae_of_rows(
    outputs: tuple[Tensor, Tensor],
    mask: Mask,
    rewards: Tensor,  # 0 where masked
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    mask_semantics: MaskSemantics,
) -> None:
    """Writes advantages and returns ``[n, R]``, 0 where masked."""
    if not rewards.numel():
        return
    advantages, returns = outputs
    work = product_dtype(rewards.dtype, rewards.device)
    lams = [1.0] if values is None else [lam] if lam_value is None else [lam, lam_value]
    decays = [gl.double() if isinstance(gl, Tensor) else gl for gl in (decay(gamma, x) for x in lams)]
    gamma = float32_rounded(gamma)
    rewards = rewards.to(work)
    if bootstrap is not None:
        after = (gamma * bootstrap.to(work)).masked_fill(mask.last < 0, 0.0)
        rewards = rewards.scatter_add(1, at_column(mask.last, rewards.shape[1]), after[:, None])
    values = None if values is None else mask.select(values.to(work))
    # To skip masked tokens is to move the others together; where nothing decays it makes no difference.
    rank, r, v = None, rewards, values
    decaying = any(isinstance(gl, Tensor) or gl < 1 for gl in decays)
    if mask_semantics == "skip" and decaying and mask.interrupted:
        rank = mask.live.cumsum(1).sub_(1).clamp_(min=0)
        r = torch.zeros_like(r).scatter_add_(1, rank, r)
        v = None if v is None else torch.zeros_like(v).scatter_add_(1, rank, v)
    in_place = work == returns.dtype
    scratch = advantages if in_place else torch.empty_like(r)
    place = [None] * (len(decays) - 1) + [returns if in_place else None]
    found = [_returns(r, v, gamma, gl, scratch, out) for gl, out in zip(decays, place, strict=True)]
    # A token that is not finite makes the first of its row so.
    probe = found[0][:, 0] + found[-1][:, 0]
    if v is not None:
        probe -= v[:, 0]
    lost = None if math.isfinite(probe.sum()) else ~probe.isfinite()
    if lost is not None:
        lost_v = None if v is None else v[lost]
        for x, gl in zip(found, decays, strict=True):
            x[lost] = _non_finite_returns(r[lost], lost_v, gamma, gl[lost] if isinstance(gl, Tensor) else gl)
    if rank is not None:
        found = [x.gather(1, rank) for x in found]
    mask.select(found[-1].to(returns.dtype), returns)
    if values is None:
        advantages.copy_(returns)
        return
    torch.sub(returns if len(found) == 1 else mask.select(found[0]), values, out=advantages)
    if lost is not None:
        returns.masked_fill_(~values.isfinite(), math.nan)


def _gae_rows(
    outputs: Sequence[Tensor],
    mask: Tensor,
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    *,
    gamma: float,
    mask_semantics: MaskSemantics,
) -> None:
    advantages, returns, moments = outputs
    live, dtype = Mask(mask.bool()), advantages.dtype
    rewards = live.select(rewards.to(dtype))
    values = None if values is None else values.to(dtype)
    gae_of_rows(
        (advantages, returns), live, rewards, values, bootstrap, gamma, lam, lam_value, mask_semantics
    )
    moments.copy_(moments_of(advantages, live))


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    config: ShapingConfig,
    bootstrap: Tensor | None,
) -> Advantages:
    rows = Rows.of(response)
    dtype = compute_dtype(rewards, values, bootstrap)
    advantages, returns = (rows.mask.new_empty(rows.mask.shape, dtype=dtype) for _ in range(2))
    moments = rows.mask.new_empty((len(rows.mask), 3), dtype=torch.float64)
    compute = functools.partial(_gae_rows, gamma=config.gamma, mask_semantics=config.mask_semantics)
    given = (rows.pad(rewards), rows.pad(values), bootstrap, config.lam, config.lam_value)
    in_blocks(compute, [advantages, returns, moments], rows.mask, *given)
    if rows.packing is not None:
        lost = rows.live & rows.invalid[:, None]
        advantages, returns = (x.masked_fill(lost, math.nan) for x in (advantages, returns))
        moments = moments.masked_fill(lost.any(1, keepdim=True), math.nan)
    out = Advantages(rows.restore(advantages), rows.restore(returns), moments.to(dtype))
    return masked.carried(out, values, response.mask, config)
