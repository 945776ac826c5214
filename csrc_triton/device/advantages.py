"""Device functions from rewards and values to advantages, returns and their moments."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.handoff import publish
from csrc_triton.device.layout import chosen
from csrc_triton.device.scan import (
    GROUP,
    advance,
    affine_scan,
    carry_of,
    carry_of_groups,
    compose_affine,
    composed_right,
    least_coefficient,
)

# What the programs of a row leave on its board, per chunk: float64
MASS = tl.constexpr(0)
AGGREGATE = tl.constexpr(1)  # a, b, then its group's a, b; then the same of the second recurrence
ENTROPY = tl.constexpr(9)
SPREAD = tl.constexpr(10)
FIRST_MOMENT = tl.constexpr(11)
SECOND_MOMENT = tl.constexpr(12)
DOUBLES = 13
# int32
COUNT = tl.constexpr(0)
LAST = tl.constexpr(1)
COUNT_SHAPED = tl.constexpr(2)
NONFINITE_OUTPUT = tl.constexpr(3)
INTS = 4
FLAGS = tl.constexpr(4)
"""Per recurrence: chunks, and groups, whose aggregates are there."""


class Board(NamedTuple):
    """What the programs of a row tell each other, at the row's first slot."""

    p_doubles: Any  # float64 [DOUBLES, slots]
    p_ints: Any  # int32 [INTS, slots]
    slots: Any
    p_flags: Any  # int32 [FLAGS, slots], 0 between launches
    p_made: Any  # int32, chunks whose facts are there, 0 between launches
    p_done: Any  # int32, chunks that are done, 0 between launches


@triton.jit
def recurrence(reward, value, bits, gl, gamma, WITH_VALUES: tl.constexpr, rules: tl.constexpr):
    """The recurrence of a chunk as far as it needs no carry: what ``affine_scan`` gives.

    Behind a row's end the carry is 0, whatever the coefficients are.
    """
    a = tl.full(bits.shape, 0.0, tl.float32) + gl
    if rules.SKIP:
        a = chosen(bits, a, tl.full([], 1.0, tl.float32))
    b = gl * reward
    if WITH_VALUES:
        b = tl.fma(gamma - gl, value, b)
    return affine_scan(a, b, least_coefficient(gl), rules.UNIT, rules.TOGETHER)


@triton.jit
def carried(board, state, composed, k, n_chunks, gl, SECOND: tl.constexpr):
    """The carry into the ``k``-th chunk from the right, ``composed`` as it is, and into the next.

    It is in ``state``, or on the ``board`` where other programs shape the other chunks.
    """
    floor = least_coefficient(gl)
    if board is None:
        carry = carry_of(state)
        state = advance(state, composed.whole_a, composed.whole_b, k, floor)
    else:
        carry = carry_into(board, composed.whole_a, composed.whole_b, k, n_chunks, floor, SECOND)
    return carry, state


@triton.jit
def carry_into(board, a, b, k, n_chunks, floor, SECOND: tl.constexpr):
    """The carry into this chunk, whose aggregate is published, and its group's if it is the last of one."""
    right = n_chunks - 1
    p_a = board.p_doubles + (AGGREGATE + 4 * SECOND) * board.slots + right
    p_b = p_a + board.slots
    p_group_a = p_b + board.slots
    p_group_b = p_group_a + board.slots
    p_flags = board.p_flags + 2 * SECOND * board.slots + right
    p_group_flags = p_flags + board.slots
    tl.store(p_a - k, a)
    tl.store(p_b - k, b)
    publish(p_flags - k)
    right_a, right_b = composed_right(p_a, p_b, p_flags, k, floor)
    if k % GROUP == GROUP - 1:
        # Before this program waits for other groups, or each would wait for the one before it.
        group_a, group_b = compose_affine(right_a, right_b, a, b, floor)
        tl.store(p_group_a - k, group_a)
        tl.store(p_group_b - k, group_b)
        publish(p_group_flags - k)
    group = carry_of_groups(p_group_a, p_group_b, p_group_flags, k // GROUP)
    return tl.fma(right_a, group, right_b)
