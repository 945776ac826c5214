"""Where a row's tokens lie, which of them count, and what is held of them while they are swept."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from attnshape.cpu.arithmetic import least, most
from attnshape.cpu.blocks import count_live, load_mask, start_of
from attnshape.cpu.jit import called, inner

BLOCK = 128
"""Tokens that are held at once, as float64, while a row is swept; counted from its first unmasked token."""

# Fields of the scratch memory: token ``t`` of a block is at ``o + FIELD + t``, with ``o`` the row's place.
# Few of them, each used for one thing after another, so that several rows fit into a CPU's nearest cache.
LIVE = 0  # 1 where unmasked, else 0; 0 past the block's tokens
CREDIT = BLOCK  # raw weights, then credit
VALUES = 2 * BLOCK
KL = 3 * BLOCK  # log-probabilities, then the penalty
REWARDS = 4 * BLOCK  # token rewards, then rewards, then rewards without values, then advantages
ADDEND = 5 * BLOCK  # the reference's log-probabilities, then what the recurrence adds, then W, then returns
SUM, SUM_2 = 6 * BLOCK, 7 * BLOCK  # sums over blocks, in lanes
FACTOR, ADDEND_VALUE = 8 * BLOCK, 10 * BLOCK  # factors of both recurrences; what that of returns adds
HELD = 11 * BLOCK
"""Numbers held of a row."""
NO_BOUNDS = np.empty((0, 2), np.int64)
"""Those of padded rows."""


def bounds_of(cu_seqlens: Tensor, total: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and length of each packed row, int64 ``[B, 2]``, and ``[B]`` uint8: out of range.

    Out of range is also what lies between the bounds of another row.
    """
    bounds = cu_seqlens.numpy().astype(np.int64)
    low, high = bounds[:-1], bounds[1:]
    highest_before = np.maximum.accumulate(bounds)[:-1]
    lowest_after = np.minimum.accumulate(bounds[::-1])[::-1][1:]
    lost = (low < 0) | (low > high) | (high > total) | (highest_before > low) | (lowest_after < high)
    first, end = (x.clip(0, total) for x in (np.minimum(low, high), np.maximum(low, high)))
    return np.stack([first, end - first], 1), lost.astype(np.uint8)


@inner
def extent(bounds: Any, b: int, length: int) -> tuple[int, int]:
    """First token and number of tokens of a row; padded rows have no bounds."""
    if len(bounds) > 0:
        return bounds[b, 0], bounds[b, 1]
    return 0, length


@called
def survey(
    places: Any, mask: int, row: int, base: int, length: int, at: int, s: Any, o: int
) -> tuple[int, int, int, int]:
    """The row's first unmasked token, the one after the last unmasked, how many are, whether ``at`` is."""
    first, end, count, at_live = -1, 0, 0, 0
    for t in range(0, length, BLOCK):
        n = least(BLOCK, length - t)
        start = start_of(places, mask, row, base + t)
        found = count_live(places, mask, start, n, s, o)
        count += found
        if found > 0:
            before, after = 0, n
            if found < n:
                load_mask(places, mask, start, n, s, o)
                while s[o + before] == 0.0:
                    before += 1
                while s[o + after - 1] == 0.0:
                    after -= 1
            first, end = t + before if first < 0 else first, t + after
    if 0 <= at < length and count > 0:
        at_live = load_mask(places, mask, start_of(places, mask, row, base + at), 1, s, o)
    return most(first, 0), end, count, at_live
