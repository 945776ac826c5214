"""Linear recurrences over the tokens of a row, and sums over its chunks, in one order whoever adds."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.handoff import wait_for
from csrc_triton.device.layout import kept
from csrc_triton.device.math import TINY

LANES = tl.constexpr(32)
"""Chunks whose sums are added together."""
AT_ONCE = tl.constexpr(256)
"""Chunks about which what other programs left is on its way at once."""
GROUP = tl.constexpr(16)
"""Chunks whose recurrences are composed before they meet the carry."""


@triton.jit
def compose_affine(a1, b1, a2, b2, floor):
    """The step ``a1, b1``, then the step ``a2, b2``; ``floor`` is what ``least_coefficient`` says."""
    a = a1 * a2
    if a.dtype == tl.float64:  # of which `maximum` takes ten instructions
        a = tl.where(a < floor, floor, a)
    else:
        a = tl.maximum(a, floor)
    return a, tl.fma(a2, b1, b2)


@triton.jit
def least_coefficient(gl):
    """What no product of coefficients, each ``gl`` or 1, falls below.

    A positive one must not underflow: 0 * inf is NaN where the serial recurrence has inf.
    """
    return tl.minimum(gl, TINY)


# A chunk is cut into runs of 16 tokens, four groups of four: what a thread holds where a warp has 512. All
# additions are of two numbers that are written out here, so that their order is not the layout's.


class Composed(NamedTuple):
    """What the recurrence over a chunk comes to before its carry is known."""

    tokens: Any  # last three of each group, from the right: a, b, a, b, a, b; [N / 4] each
    groups: Any  # of each run, composed, likewise; [N / 16] each
    a: Any  # of all runs right of each, composed, [N / 16]
    b: Any
    whole_a: Any  # of the chunk
    whole_b: Any


@triton.jit
def quarters(x):
    """``x`` ([N]) as four times [N / 4]: the first of each four neighbours, the second, and so on."""
    N: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [N // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def quarters_of_both(x, y):
    """``quarters`` of two in turns: the first of both, the second of both; lanes exchange them at once."""
    N: tl.constexpr = x.shape[0]
    both = tl.permute(tl.reshape(tl.join(x, y), [N // 4, 2, 2, 2]), (0, 3, 1, 2))
    even, odd = tl.split(both)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    x0, y0 = tl.split(first)
    x1, y1 = tl.split(second)
    x2, y2 = tl.split(third)
    x3, y3 = tl.split(fourth)
    return x0, y0, x1, y1, x2, y2, x3, y3


@triton.jit
def interleaved(first, second, third, fourth):
    """What ``quarters`` took apart."""
    N: tl.constexpr = 4 * first.shape[0]
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [N])


@triton.jit
def at_token(at, x, N: tl.constexpr):
    """``x`` at token ``at``, 0 at the others of ``N``; ``at`` may be any.

    A comparison for each four neighbours, and by bits: a thread has 16 tokens and seven conditions.
    """
    group = tl.where(at < 0, 0x7FFFFFFC, at & -4)
    here = ((4 * tl.arange(0, N // 4) ^ group) - 1) >> 31
    return interleaved(
        kept(here, tl.where((at & 3) == 0, x, 0.0)),
        kept(here, tl.where((at & 3) == 1, x, 0.0)),
        kept(here, tl.where((at & 3) == 2, x, 0.0)),
        kept(here, tl.where((at & 3) == 3, x, 0.0)),
    )


@triton.jit
def composed_quarters(a, b, floor, UNIT: tl.constexpr, TOGETHER: tl.constexpr):
    """Of each four neighbours the last three, and all four composed."""
    if UNIT:
        b0, b1, b2, b3 = quarters(b)
        b = ((b3 + b2) + b1) + b0
        a, a1, a2, a3 = b, b1, b2, b3  # not looked at
    else:
        if TOGETHER:
            a0, b0, a1, b1, a2, b2, a3, b3 = quarters_of_both(a, b)
        else:
            a0, a1, a2, a3 = quarters(a)
            b0, b1, b2, b3 = quarters(b)
        b = tl.fma(a0, tl.fma(a1, tl.fma(a2, b3, b2), b1), b0)
        a = tl.maximum(((a3 * a2) * a1) * a0, floor)  # at the end: none is above 1
    return (a3, b3, a2, b2, a1, b1), a, b


@triton.jit
def affine_scan(a, b, floor, UNIT: tl.constexpr, TOGETHER: tl.constexpr):
    """``w_i = a_i * w_{i+1} + b_i`` ([N]) as far as it needs no carry. ``UNIT``: every ``a`` is 1.

    ``TOGETHER``: as of the rules.
    """
    tokens, a, b = composed_quarters(a, b, floor, UNIT, TOGETHER)
    groups, a, b = composed_quarters(a, b, floor, UNIT, TOGETHER)
    N: tl.constexpr = b.shape[0]
    o = tl.arange(0, N)
    for i in tl.static_range(16):
        if 1 << i < N:
            right_b = from_right(b, o, 1 << i, 0.0)
            if UNIT:
                b += right_b
            else:
                a, b = compose_affine(from_right(a, o, 1 << i, 1.0), right_b, a, b, floor)
    whole_b = element(b, o, 0).to(tl.float64)
    whole_a = tl.full([], 1.0, tl.float64)
    if not UNIT:
        whole_a = element(a, o, 0).to(tl.float64)
        a = from_right(a, o, 1, 1.0)
    return Composed(tokens, groups, a, from_right(b, o, 1, 0.0), whole_a, whole_b)


@triton.jit
def from_right(x, o, N: tl.constexpr, other):
    """``x`` of the N-th to the right; ``other`` where there is none."""
    last: tl.constexpr = x.shape[0] - 1
    return tl.where(o + N <= last, tl.gather(x, tl.minimum(o + N, last), axis=0), other)


@triton.jit
def element(x, o, i):
    """One element of ``x`` (float32), by its bits."""
    bits = tl.where(o == i, x.to(tl.int32, bitcast=True), -(2**31))
    return tl.max(bits).to(tl.float32, bitcast=True)


@triton.jit
def affine_before(composed, carry, UNIT: tl.constexpr):
    """``w_{i+1}`` in float32, of what ``affine_scan`` returns and a float64 carry from the right."""
    if UNIT:
        right = carry + composed.b
    else:
        right = tl.fma(composed.a.to(tl.float64), carry, composed.b.to(tl.float64))
    first, second, third, fourth = expanded(composed.groups, right, UNIT)
    groups = interleaved(
        first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32)
    )
    first, second, third, fourth = expanded(composed.tokens, groups, UNIT)
    return interleaved(first, second, third, fourth)


@triton.jit
def expanded(steps, carry, UNIT: tl.constexpr):
    """``w`` right of each of four neighbours, from that right of all four."""
    a3, b3, a2, b2, a1, b1 = steps
    if UNIT:
        third = carry + b3
        second = third + b2
        first = second + b1
    else:
        third = tl.fma(a3, carry, b3)
        second = tl.fma(a2, third, b2)
        first = tl.fma(a1, second, b1)
    return first, second, third, carry


@triton.jit
def sum_of(x):
    """Sum of [N]: of neighbours, then of the quarters, then of halves."""
    return sum_of_groups(group_sums(x))


@triton.jit
def sum_of_products(x, y):
    """The same of ``x * y``."""
    x0, x1, x2, x3 = quarters(x)
    y0, y1, y2, y3 = quarters(y)
    return sum_of_groups(tl.fma(x0, y0, x1 * y1) + tl.fma(x2, y2, x3 * y3))


@triton.jit
def group_sums(x):
    """Sums of four neighbours, [N / 4]."""
    first, second, third, fourth = quarters(x)
    return (first + second) + (third + fourth)


@triton.jit
def sum_of_groups(x):
    N: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.permute(tl.reshape(x, [2, 2, N // 4]), (2, 0, 1)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    x = (first + second) + (third + fourth)
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2]), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def largest(x):
    """Of four neighbours, [N / 4]."""
    first, second, third, fourth = quarters(x)
    return tl.maximum(tl.maximum(tl.maximum(first, second), third), fourth)  # Hopper takes three at once


@triton.jit
def last_of_groups(bits, start):
    """The last of four neighbours whose bits are -1, where the first of all is ``start``; -1 if none."""
    first, second, third, fourth = quarters(bits)
    last = tl.maximum(tl.maximum(tl.maximum(~first, 1 | ~second), 2 | ~third), 3 | ~fourth)
    return last | (start + 4 * tl.arange(0, last.shape[0]))


@triton.jit
def not_finite(x, bad):
    """NaN where ``bad`` is, or one of four neighbours in ``x`` is not finite; else 0, [N / 4]."""
    first, second, third, fourth = quarters(x)
    return tl.fma(first, 0.0, tl.fma(second, 0.0, tl.fma(third, 0.0, tl.fma(fourth, 0.0, bad))))


# The carry of the recurrence from chunk to chunk, right to left: GROUP chunks are composed, then meet the
# carry of the groups before. A serial program and one that looks back at what others published do the same
# arithmetic.


class Carry(NamedTuple):
    """All float64."""

    group: Any  # into the group of the next chunk
    a: Any  # of its group's chunks so far, composed
    b: Any


@triton.jit
def no_carry():
    zero = tl.full([], 0.0, tl.float64)
    return Carry(zero, zero + 1.0, zero)


@triton.jit
def carry_of(state):
    """Into the next chunk."""
    return tl.fma(state.a, state.group, state.b)


@triton.jit
def advance(state, a, b, k, floor):
    """After the ``k``-th chunk from the right, ``w = a * carry + b``."""
    a, b = compose_affine(state.a, state.b, a, b, floor)
    full = k % GROUP == GROUP - 1
    group = tl.where(full, tl.fma(a, state.group, b), state.group)
    return Carry(group, tl.where(full, 1.0, a), tl.where(full, 0.0, b))


@triton.jit
def composed_right(p_a, p_b, p_flags, k, floor):
    """The chunks of the ``k``-th chunk's group right of it, composed, once others have published them."""
    o_g = tl.arange(0, GROUP)
    start = k // GROUP * GROUP
    wait_for(p_flags - start - o_g, start + o_g < k, k - start)
    # What is not there is read of the chunk itself. They are float32 as they were found.
    at = tl.minimum(start + tl.arange(0, 2 * GROUP) // 2, k)
    found = pairs_at(p_a, p_b, at).to(tl.float32)
    composed_a = tl.full([2 * GROUP], 1.0, tl.float64)
    composed_b = tl.full([2 * GROUP], 0.0, tl.float64)
    for i in tl.static_range(GROUP - 1):
        a, b = pair_of(found, i)
        a, b = compose_affine(composed_a, composed_b, a, b, floor)
        composed_a = tl.where(start + i < k, a, composed_a)
        composed_b = tl.where(start + i < k, b, composed_b)
    return any_of(composed_a), any_of(composed_b)


@triton.jit
def carry_of_groups(p_a, p_b, p_flags, n_groups):
    """The carry into the chunk after so many groups, from what these published.

    Pointers are at the row's rightmost chunk; a group's are at its leftmost.
    """
    o_g = tl.arange(0, GROUP)
    carry = tl.full([2 * GROUP], 0.0, tl.float64)
    for first in range(0, n_groups, GROUP):
        ends = (first + o_g) * GROUP + GROUP - 1
        wait_for(p_flags - ends, first + o_g < n_groups, tl.minimum(n_groups - first, GROUP))
        group = tl.minimum(first + tl.arange(0, 2 * GROUP) // 2, n_groups - 1)
        found = pairs_at(p_a, p_b, group * GROUP + GROUP - 1)
        for i in tl.static_range(GROUP):
            a, b = pair_of(found, i)
            carry = tl.where(first + i < n_groups, tl.fma(a, carry, b), carry)
    return any_of(carry)


# Lanes take turns in what they loaded at once: of so many loads ptxas would have each wait for the last.


@triton.jit
def pairs_at(p_a, p_b, at):
    """What lies so many places before two pointers: of the first in even lanes, of the second in odd."""
    even = tl.arange(0, at.shape[0]) % 2 == 0
    return tl.load(tl.where(even, p_a, p_b) - at, cache_modifier=".cg")


@triton.jit
def pair_of(pairs, i):
    """The ``i``-th of them, in every lane, float64."""
    o_n = tl.arange(0, pairs.shape[0])
    a = tl.gather(pairs, o_n * 0 + 2 * i, axis=0)
    b = tl.gather(pairs, o_n * 0 + (2 * i + 1), axis=0)
    return a.to(tl.float64), b.to(tl.float64)


@triton.jit
def any_of(x):
    """One element of ``x`` (float64), all of which are the same."""
    return tl.max(x.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)


# Sums over the chunks of a row, in an order that does not depend on who adds: chunk i goes to lane i % LANES.


@triton.jit
def add_to_lane(acc, i, x):
    N: tl.constexpr = acc.shape[0]
    return acc + tl.where((i - tl.arange(0, N)) % N == 0, x, 0.0)


@triton.jit
def add_lanes(acc, p_x, start, n):
    """``AT_ONCE`` numbers from ``start`` on of ``n`` that other programs left, in ``add_to_lane``'s order."""
    N: tl.constexpr = acc.shape[0]
    for i in tl.static_range(AT_ONCE // N):
        o = start + i * N + tl.arange(0, N)
        acc += tl.load(p_x + o, mask=o < n, other=0.0, cache_modifier=".cg").to(acc.dtype)
    return acc
