"""Whitening of a whole batch: moments of its parts, folded to those of all, then one pass."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import COMPILER, ceil_div, kernel, processors, row_stride

BLOCK = 2048
"""Tokens a program takes at once."""
PARTS = 1024
"""Parts that tokens are divided into, and parts whose moments are folded at once."""
MAX_PARTS = 4096
"""Parts that every program of the last launch folds for itself; more are folded to fewer before."""

PROGRAMS = 8
"""Of the last launch, per multiprocessor: each folds the moments once."""


class Moments(NamedTuple):
    """Float64."""

    count: Any
    mean: Any
    m2: Any  # sum of squared deviations


@triton.jit
def no_moments():
    zero = tl.full([], 0.0, tl.float64)
    return Moments(zero, zero, zero)


@triton.jit
def merged(a, b):
    """Chan, Golub and LeVeque 1979."""
    count = a.count + b.count
    share = b.count / tl.maximum(count, 1.0)
    gap = b.mean - a.mean
    return Moments(count, a.mean + gap * share, a.m2 + b.m2 + gap * gap * a.count * share)


@triton.jit
def store_moments(p_out, i, moments):
    tl.store(p_out + i * 3, moments.count)
    tl.store(p_out + i * 3 + 1, moments.mean)
    tl.store(p_out + i * 3 + 2, moments.m2)


@triton.jit
def fold_moments(p_moments, begin, end, PARTS: tl.constexpr):
    """Of the parts from ``begin`` to ``end``."""
    folded = no_moments()
    for start in range(begin, end, PARTS):
        i = start + tl.arange(0, PARTS)
        count = tl.load(p_moments + i * 3, mask=i < end, other=0.0).to(tl.float64)
        filled = count > 0.0
        mean = tl.load(p_moments + i * 3 + 1, mask=filled, other=0.0).to(tl.float64)
        m2 = tl.load(p_moments + i * 3 + 2, mask=filled, other=0.0).to(tl.float64)
        total = tl.sum(count)
        centre = tl.sum(count * mean) / tl.maximum(total, 1.0)
        away = tl.where(filled, mean - centre, 0.0)
        folded = merged(folded, Moments(total, centre, tl.sum(m2 + count * away * away)))
    return folded


@triton.jit
def places(start, stride_x, stride_mask, width, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Of tokens from ``start`` on: where they lie in ``x`` and in the mask."""
    if FLAT:
        at_x = start + tl.arange(0, BLOCK)
        at_mask = at_x
    else:
        row = start // width
        column = (start - row * width).to(tl.int32) + tl.arange(0, BLOCK)
        below = column // width
        column -= below * width
        at_x = (row + below) * stride_x + column
        at_mask = (row + below) * stride_mask + column
    return at_x, at_mask


@kernel("p_x", "p_mask")
def moments_kernel(
    p_out,  # [programs, 3] float64
    p_x,  # [n / width, width]
    stride_x,
    p_mask,
    stride_mask,
    width,
    n,  # in UNIT
    blocks,  # of a program
    UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_p = tl.program_id(0)
    n = n.to(tl.int64) * UNIT
    moments = no_moments()
    first = i_p.to(tl.int64) * blocks
    for i_c in range(first, tl.minimum(first + blocks, (n + BLOCK - 1) // BLOCK)):
        start = i_c * BLOCK
        inside = start + tl.arange(0, BLOCK) < n
        at_x, at_mask = places(start, stride_x, stride_mask, width, FLAT, BLOCK)
        live = inside & (tl.load(p_mask + at_mask, mask=inside, other=0) != 0)
        x = tl.load(p_x + at_x, mask=inside, other=0.0).to(tl.float64)
        count = tl.sum(live.to(tl.int32)).to(tl.float64)
        mean = tl.sum(tl.where(live, x, 0.0)) / tl.maximum(count, 1.0)
        away = tl.where(live, x - mean, 0.0)
        moments = merged(moments, Moments(count, mean, tl.sum(away * away)))
    store_moments(p_out, i_p, moments)


@kernel()
def fold_kernel(p_out, p_moments, n, parts, PARTS: tl.constexpr):
    """``parts`` of ``n`` moments to one."""
    i_p = tl.program_id(0)
    begin = i_p * parts
    store_moments(p_out, i_p, fold_moments(p_moments, begin, tl.minimum(begin + parts, n), PARTS))


@kernel("p_out", "p_x", "p_mask")
def whiten_kernel(
    p_out,  # [n] float32
    p_x,  # [n / width, width]
    stride_x,
    p_mask,
    stride_mask,
    width,
    n,  # in UNIT
    blocks,  # of a program
    p_moments,  # [parts, 3]
    parts,
    bessel,
    eps,
    least,
    eps_of_std,
    shift_mean,
    zero_masked,
    UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    n = n.to(tl.int64) * UNIT
    folded = fold_moments(p_moments, 0, parts, PARTS)
    variance = folded.m2 / tl.maximum(folded.count - bessel, 1.0) + eps
    scale = 1.0 / (tl.sqrt(tl.where(variance < least, least, variance)) + eps_of_std)
    kept = tl.where(shift_mean != 0, 0.0, folded.mean)
    first = tl.program_id(0).to(tl.int64) * blocks
    for i_c in range(first, tl.minimum(first + blocks, (n + BLOCK - 1) // BLOCK)):
        start = i_c * BLOCK
        i = start + tl.arange(0, BLOCK)
        at_x, at_mask = places(start, stride_x, stride_mask, width, FLAT, BLOCK)
        live = tl.load(p_mask + at_mask, mask=i < n, other=0) != 0
        x = tl.load(p_x + at_x, mask=i < n, other=0.0).to(tl.float64)
        out = tl.where(live | (zero_masked == 0), (x - folded.mean) * scale + kept, 0.0)
        tl.store(p_out + i, out.to(tl.float32), mask=i < n)


def whiten(
    x: Tensor,
    mask: Tensor,
    moments: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    bessel: bool = True,
    eps: float = 1e-8,
    eps_mode: Literal["add", "clamp", "add_to_std"] = "add",
    shift_mean: bool = True,
    zero_masked: bool = True,
) -> Tensor:
    """``(x - mean) * rsqrt(variance + eps)`` over the unmasked tokens of all of ``x``.

    One launch with ``moments`` of up to ``MAX_PARTS`` parts; one more for more parts, and without.

    Args:
        x: any shape and strides; float32, bfloat16 or float16.
        mask: of its shape, any dtype.
        moments: count, mean and sum of squared deviations, ``[..., 3]``, of parts that together hold the
            unmasked tokens.
        gather: from the moments of all parts, float64 ``[3]``, to those of every process, ``[..., 3]``.

    Returns:
        float32, of the shape of ``x``.
    """
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    flat = x.is_contiguous() and mask.is_contiguous()
    x, mask = _rows(x, flat), _rows(mask, flat)
    unit = 1 if x.numel() % 16 else 16  # what a bound must be a multiple of for wide loads up to it
    block = (x, row_stride(x), mask, row_stride(mask), max(x.shape[1], 1), x.numel() // unit)
    n_blocks = ceil_div(x.numel(), BLOCK)
    options: dict[str, Any] = {"UNIT": unit, "FLAT": flat, "BLOCK": BLOCK, **COMPILER}
    if moments is None:
        blocks = max(ceil_div(n_blocks, PARTS), 1)
        moments = torch.empty(ceil_div(n_blocks, blocks), 3, dtype=torch.float64, device=x.device)
        if n_blocks:
            moments_kernel[(len(moments),)](moments, *block, blocks, **options)
    moments = moments.reshape(-1, 3).contiguous()
    if len(moments) > MAX_PARTS:
        moments = _folded(moments, PARTS)
    if gather is not None:
        moments = gather(_folded(moments, max(len(moments), 1))[0]).contiguous()
    if n_blocks:
        blocks = ceil_div(n_blocks, PROGRAMS * processors(x.device))
        whiten_kernel[(ceil_div(n_blocks, blocks),)](
            out,
            *block,
            blocks,
            moments,
            moments.numel() // 3,
            int(bessel),
            eps if eps_mode == "add" else 0.0,
            eps if eps_mode == "clamp" else -math.inf,
            eps if eps_mode == "add_to_std" else 0.0,
            int(shift_mean),
            int(zero_masked),
            PARTS=PARTS,
            **options,
        )
    return out


def _folded(moments: Tensor, parts: int) -> Tensor:
    """Moments of every ``parts`` parts, float64 ``[n, 3]``; of nothing, one."""
    out = torch.empty(max(ceil_div(len(moments), parts), 1), 3, dtype=torch.float64, device=moments.device)
    fold_kernel[(len(out),)](out, moments, len(moments), parts, PARTS=PARTS, **COMPILER)
    return out


def _rows(x: Tensor, flat: bool) -> Tensor:
    """``[rows, width]``; one row where nothing lies between rows, copied where neighbours lie apart."""
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if flat:
        return x.view(1, -1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])
