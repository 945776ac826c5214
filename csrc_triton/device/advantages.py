"""Device functions from rewards and values to advantages, returns and their moments."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.device.handoff import publish
from csrc_triton.device.scan import (
    GROUP,
    advance,
    affine_scan,
    compose_affine,
    composed_group,
    look_back,
)

# What the programs of a row leave on its board, per chunk: float64
MASS = tl.constexpr(0)
AGGREGATE = tl.constexpr(1)  # a, b, then its group's a, b; then the same of the second recurrence
ENTROPY = tl.constexpr(9)
SHARE = tl.constexpr(10)
SPREAD = tl.constexpr(11)
FIRST_MOMENT = tl.constexpr(12)
SECOND_MOMENT = tl.constexpr(13)
NONFINITE_TOKENS = tl.constexpr(14)
DOUBLES = 15
# int32
COUNT = tl.constexpr(0)
LAST = tl.constexpr(1)
OUTSIDE = tl.constexpr(2)
INTS = 3
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
def recurrence(reward, value, live, inside, gl, gamma, WITH_VALUES: tl.constexpr, rules: tl.constexpr):
    """The recurrence of a chunk as far as it needs no carry: what ``affine_scan`` gives."""
    if rules.SKIP:
        decays = live
    else:
        decays = inside
    added = gl * reward
    if WITH_VALUES:
        added += (gamma - gl) * value
    return affine_scan(tl.where(decays, gl, 1.0), tl.where(live, added, 0.0), rules.UNIT)


@triton.jit
def carried(board, state, a, b, k, n_chunks, UNIT: tl.constexpr, SECOND: tl.constexpr):
    """The carry into the ``k``-th chunk from the right, which composes to ``a`` and ``b``, and into the next.

    It is in ``state``, or on the ``board`` where other programs shape the other chunks.
    """
    if UNIT:
        a = tl.full([], 1.0, tl.float64)
    if board is None:
        carry = state.carry
        state = advance(state, a, b, k)
    else:
        carry = carry_into(board, a, b, k, n_chunks, SECOND)
    return carry, state


@triton.jit
def carry_into(board, a, b, k, n_chunks, SECOND: tl.constexpr):
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
    if k % GROUP == GROUP - 1:
        # Before this program waits for other groups, or each would wait for the one before it.
        group_a, group_b = composed_group(p_a, p_b, p_flags, k)
        group_a, group_b = compose_affine(group_a, group_b, a, b)
        tl.store(p_group_a - k, group_a)
        tl.store(p_group_b - k, group_b)
        publish(p_group_flags - k)
    return look_back(p_a, p_b, p_flags, p_group_a, p_group_b, p_group_flags, k)
