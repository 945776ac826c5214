"""Whitening of a whole batch: moments of its parts, folded to those of all, then one pass."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.launch import kernel


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
