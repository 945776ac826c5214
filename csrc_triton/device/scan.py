"""Linear recurrences over the tokens of a row, and sums over its chunks, in one order whoever adds."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.handoff import wait_for
from csrc_triton.device.math import TINY

LANES = tl.constexpr(128)
"""Chunks whose sums are added together."""
GROUP = tl.constexpr(16)
"""Chunks whose recurrences are composed before they meet the carry."""


@triton.jit
def compose_affine(a1, b1, a2, b2):
    # A positive coefficient must not underflow: 0 * inf is NaN where the serial recurrence has inf.
    a = tl.maximum(a1 * a2, tl.minimum(tl.minimum(a1, a2), TINY))
    return a, a2 * b1 + b2


@triton.jit
def affine_scan(a, b, UNIT: tl.constexpr):
    """``w_i = a_i * w_{i+1} + b_i`` as ``w_i = A_i * carry + B_i``: A and B ([N]), from the right.

    ``UNIT``: every ``a`` is 1.
    """
    if UNIT:
        b = tl.cumsum(b, axis=0, reverse=True)
    else:
        a, b = tl.associative_scan((a, b), axis=0, combine_fn=compose_affine, reverse=True)
    return a, b


@triton.jit
def affine_before(a, b, carry, UNIT: tl.constexpr):
    """``w_{i+1}`` in float32, of what ``affine_scan`` returns and a float64 carry from the right."""
    N: tl.constexpr = b.shape[0]
    if UNIT:
        w = b.to(tl.float64) + carry
    else:
        w = a.to(tl.float64) * carry + b
    o_i = tl.arange(0, N)
    before = tl.gather(w.to(tl.float32), tl.minimum(o_i + 1, N - 1), axis=0)
    return tl.where(o_i == N - 1, carry.to(tl.float32), before)


@triton.jit
def first_two(a, b):
    """The first elements of two times [N], float64: sums of one element and zeros, so exact."""
    first = tl.arange(0, a.shape[0]) == 0
    return two_sums(tl.where(first, a, 0.0), tl.where(first, b, 0.0))


# Several sums by one reduction, whose threads then wait for each other once.


@triton.jit
def two_sums(a, b):
    """Sums of two times [N], float32, as float64."""
    a, b = tl.split(tl.sum(tl.join(neighbours(a), neighbours(b)), axis=0).to(tl.float64))
    return a, b


@triton.jit
def four_sums(a, b, c, d):
    """Sums of four times [N], float64."""
    pairs = tl.join(tl.join(neighbours(a), neighbours(b)), tl.join(neighbours(c), neighbours(d)))
    first, second = tl.split(tl.sum(pairs, axis=0))
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def neighbours(x):
    """Sums of four neighbours, [N / 4], which one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), axis=1)


# The carry of the recurrence from chunk to chunk, right to left: GROUP chunks are composed, then meet the
# carry of the groups before. A serial program and one that looks back at what others published do the same
# arithmetic.


class Carry(NamedTuple):
    """All float64."""

    carry: Any  # into the next chunk
    group: Any  # into its group
    a: Any  # of its group's chunks so far, composed
    b: Any


@triton.jit
def no_carry():
    zero = tl.full([], 0.0, tl.float64)
    return Carry(zero, zero, zero + 1.0, zero)


@triton.jit
def advance(state, a, b, k):
    """The carry after the ``k``-th chunk from the right, ``w = a * carry + b``."""
    carry = a * state.carry + b
    composed_a, composed_b = compose_affine(state.a, state.b, a, b)
    full = k % GROUP == GROUP - 1
    group = tl.where(full, composed_a * state.group + composed_b, state.group)
    return Carry(
        tl.where(full, group, carry),
        group,
        tl.where(full, 1.0, composed_a),
        tl.where(full, 0.0, composed_b),
    )


@triton.jit
def composed_group(p_a, p_b, p_flags, k):
    """The chunks of the ``k``-th chunk's group right of it, composed; ``k`` is the last of its group."""
    o_g = tl.arange(0, GROUP)
    start = k // GROUP * GROUP
    wait_for(p_flags - start - o_g, start + o_g < k, k - start)
    composed_a = tl.full([], 1.0, tl.float64)
    composed_b = tl.full([], 0.0, tl.float64)
    for i in tl.static_range(GROUP - 1):
        a = tl.load(p_a - start - i, cache_modifier=".cg")
        b = tl.load(p_b - start - i, cache_modifier=".cg")
        composed_a, composed_b = compose_affine(composed_a, composed_b, a, b)
    return composed_a, composed_b


@triton.jit
def look_back(p_a, p_b, p_flags, p_group_a, p_group_b, p_group_flags, k):
    """The carry into the ``k``-th chunk from the right, from what the chunks right of it published.

    Pointers are at the row's rightmost chunk; the next chunk to the left is one below. A group's are at its
    leftmost chunk.
    """
    o_g = tl.arange(0, GROUP)
    n_groups = k // GROUP
    group = tl.full([], 0.0, tl.float64)
    for first in range(0, n_groups, GROUP):
        ends = (first + o_g) * GROUP + GROUP - 1
        wait_for(p_group_flags - ends, first + o_g < n_groups, tl.minimum(n_groups - first, GROUP))
        for i in tl.static_range(GROUP):
            end = (first + i) * GROUP + GROUP - 1
            there = first + i < n_groups
            a = tl.load(p_group_a - end, mask=there, other=1.0, cache_modifier=".cg")
            b = tl.load(p_group_b - end, mask=there, other=0.0, cache_modifier=".cg")
            group = tl.where(there, a * group + b, group)
    start = n_groups * GROUP
    wait_for(p_flags - start - o_g, start + o_g < k, k - start)
    carry = group
    for i in tl.static_range(GROUP - 1):
        there = start + i < k
        a = tl.load(p_a - start - i, mask=there, other=1.0, cache_modifier=".cg")
        b = tl.load(p_b - start - i, mask=there, other=0.0, cache_modifier=".cg")
        carry = tl.where(there, a * carry + b, carry)
    return carry


# Sums over the chunks of a row, in an order that does not depend on who adds: chunk i goes to lane i % LANES.


@triton.jit
def add_to_lane(acc, i, x):
    N: tl.constexpr = acc.shape[0]
    return acc + tl.where((i - tl.arange(0, N)) % N == 0, x, 0.0)


@triton.jit
def lane_sums(p_x, n, LANES: tl.constexpr):
    """Sums of ``n`` numbers that other programs left, by lane, in the order of ``add_to_lane``."""
    acc = tl.zeros([LANES], tl.float64)
    for start in range(0, n, LANES):
        i = start + tl.arange(0, LANES)
        acc += tl.load(p_x + i, mask=i < n, other=0.0, cache_modifier=".cg")
    return acc
