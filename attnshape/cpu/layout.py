"""Where a row's tokens lie, which of them count, and what is held of them while they are swept."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from attnshape.cpu.jit import inner
from attnshape.cpu.memory import load_mask, start_of

BLOCK = 128
"""Tokens that are held at once, as float64, while a row is swept; counted from its first unmasked token."""

# Fields of the scratch memory: token ``t`` of a block is at ``o + FIELD + t``, with ``o`` the row's place.
# As they are read, as they are written, of the recurrence, and sums over blocks: a lane for each place.
LIVE, RAW, VALUES, LOGPROBS, REF_LOGPROBS, KL, TOKEN_REWARDS = (i * BLOCK for i in range(7))
REWARDS, CREDIT, KL_OUT, ADVANTAGES, RETURNS = (i * BLOCK for i in range(7, 12))
DELTA, FACTOR, ADDEND, FACTOR_VALUE, ADDEND_VALUE = (i * BLOCK for i in range(12, 17))
SUM, SUM_2 = (i * BLOCK for i in range(17, 19))
HELD = 19 * BLOCK
"""Numbers held of a row."""


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
def survey(
    places: Any, mask: int, row: int, base: int, length: int, at: int, s: Any, o: int
) -> tuple[int, int, int, int]:
    """The row's first unmasked token, the one after the last unmasked, how many are, whether ``at`` is."""
    first, end, count, at_live = -1, 0, 0, 0
    for t in range(0, length, BLOCK):
        n = min(BLOCK, length - t)
        found = load_mask(places, mask, start_of(places, mask, row, base + t), n, s, o)
        if found == 0:
            continue
        count += found
        if t <= at < t + n:
            at_live = 1 if s[o + at - t] != 0.0 else 0
        if first < 0:
            first = t
            while s[o + first - t] == 0.0:
                first += 1
        end = t + n
        while s[o + end - 1 - t] == 0.0:
            end -= 1
    return max(first, 0), end, count, at_live
