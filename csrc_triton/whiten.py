"""Whitening of a whole batch: moments of its parts, folded to those of all, then one pass."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
def tokens_from(batch, start, n, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK tokens from ``start`` on, float64: which are there, which are unmasked, and they themselves."""
    inside = start + tl.arange(0, BLOCK) < n
    if FLAT:
        at_x = start + tl.arange(0, BLOCK)
        at_mask = at_x
    else:
        row = start // batch.width
        column = (start - row * batch.width).to(tl.int32) + tl.arange(0, BLOCK)
        below = column // batch.width
        column -= below * batch.width
        at_x = (row + below) * batch.stride_x + column
        at_mask = (row + below) * batch.stride_mask + column
    live = inside & (tl.load(batch.p_mask + at_mask, mask=inside, other=0) != 0)
    return inside, live, tl.load(batch.p_x + at_x, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def moments_kernel(p_out, batch, UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Moments of a part of the tokens, to ``p_out`` ([programs, 3] float64)."""
    i_p = tl.program_id(0)
    n = batch.n.to(tl.int64) * UNIT
    moments = no_moments()
    first = i_p.to(tl.int64) * batch.blocks
    for i_c in range(first, tl.minimum(first + batch.blocks, (n + BLOCK - 1) // BLOCK)):
        _, live, x = tokens_from(batch, i_c * BLOCK, n, FLAT, BLOCK)
        count = tl.sum(live.to(tl.int32)).to(tl.float64)
        mean = tl.sum(tl.where(live, x, 0.0)) / tl.maximum(count, 1.0)
        away = tl.where(live, x - mean, 0.0)
        moments = merged(moments, Moments(count, mean, tl.sum(away * away)))
    store_moments(p_out, i_p, moments)


@triton.jit
def fold_kernel(p_out, p_moments, n, parts, PARTS: tl.constexpr):
    """``parts`` of ``n`` moments to one."""
    i_p = tl.program_id(0)
    begin = i_p * parts
    store_moments(p_out, i_p, fold_moments(p_moments, begin, tl.minimum(begin + parts, n), PARTS))


@triton.jit
def whiten_kernel(
    p_out, batch, of, UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """A part of the tokens by the moments ``of`` all, to ``p_out`` ([n] float32)."""
    n = batch.n.to(tl.int64) * UNIT
    folded = fold_moments(of.p_moments, 0, of.parts, PARTS)
    variance = folded.m2 / tl.maximum(folded.count - of.bessel, 1.0) + of.eps
    scale = 1.0 / (tl.sqrt(tl.where(variance < of.least, of.least, variance)) + of.eps_of_std)
    kept = tl.where(of.shift_mean != 0, 0.0, folded.mean)
    first = tl.program_id(0).to(tl.int64) * batch.blocks
    for i_c in range(first, tl.minimum(first + batch.blocks, (n + BLOCK - 1) // BLOCK)):
        start = i_c * BLOCK
        inside, live, x = tokens_from(batch, start, n, FLAT, BLOCK)
        out = tl.where(live | (of.whiten_masked != 0), (x - folded.mean) * scale + kept, 0.0)
        tl.store(p_out + start + tl.arange(0, BLOCK), out.to(tl.float32), mask=inside)
