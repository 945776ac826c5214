"""Section 3 of the specification: from credit and a score to token rewards, a block of a row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnshape.cpu.arithmetic import expm1, fold, least, log
from attnshape.cpu.blocks import load, load_mask, start_of
from attnshape.cpu.jit import called, inner
from attnshape.cpu.lanes import WIDTH, get, put, splat, where
from attnshape.cpu.layout import ADDEND, BLOCK, CREDIT, KL, LIVE, REWARDS, SUM, SUM_2

K1, ABS, K2, K3, GIVEN = 0, 1, 2, 3, 4
"""KL estimators; ``GIVEN`` is the caller's own KL."""


@inner
def clamp(x: float, low: float, high: float) -> float:
    """NaN stays."""
    x = low if x < low else x
    return high if x > high else x


@called
def mass_of(
    places: Any, mask: int, raw: int, row: int, base: int, first: int, end: int, s: Any, o: int
) -> tuple[float, float, float]:
    """Sums of a row's raw weights ``x``, a negative one as ``-inf``, and of ``x log x``; the last of them."""
    last, none, lowest = 0.0, splat(0.0), splat(-np.inf)
    total = splat(0.0)
    for t in range(first, end, BLOCK):
        n = least(BLOCK, end - t)
        load_mask(places, mask, start_of(places, mask, row, base + t), n, s, o + LIVE)
        load(places, raw, start_of(places, raw, row, base + t), n, s, o + CREDIT)
        last = s[o + CREDIT + n - 1]
        for j in range(n, BLOCK):
            s[o + LIVE + j] = 0.0
        for j in range(0, BLOCK, WIDTH):
            x = where(get(s, o + LIVE + j) != none, get(s, o + CREDIT + j), none)
            total = total + where(x < none, lowest, x)
            put(s, o + CREDIT + j, x)
        for j in range(BLOCK):
            x = s[o + CREDIT + j]
            s[o + SUM_2 + j] += x * log(x) if x != 0.0 else 0.0
    put(s, o + SUM, total)
    return fold(WIDTH, s, o + SUM), fold(BLOCK, s, o + SUM_2), last


@inner
def entropy_of(mass: float, xlogx: float) -> float:
    """``-sum p log p`` of ``p = x / mass``."""
    if mass == 0.0 and xlogx == 0.0:
        return 0.0
    return log(mass) - xlogx / mass


@inner
def credit_of(n: int, scale: float, hot: float, at: int, s: Any, o: int) -> None:
    """Raw weights become credit."""
    for t in range(n):
        s[o + CREDIT + t] = s[o + CREDIT + t] * scale if s[o + LIVE + t] != 0.0 else 0.0
    if 0 <= at < n:
        s[o + CREDIT + at] += hot


@called
def kl_of(n: int, kind: int, input_clip: float, output_clip: float, s: Any, o: int) -> None:
    """Log-probabilities become the estimate, 0 where masked; infinite clips do nothing."""
    for t in range(n):
        x = s[o + KL + t]
        x = x if kind == GIVEN else clamp(x - s[o + ADDEND + t], -input_clip, input_clip)
        s[o + KL + t] = x if s[o + LIVE + t] != 0.0 else 0.0
    if kind == ABS:
        for t in range(n):
            s[o + KL + t] = abs(s[o + KL + t])
    elif kind == K2:
        for t in range(n):
            s[o + KL + t] = s[o + KL + t] * s[o + KL + t] / 2.0
    elif kind == K3:
        for t in range(n):
            s[o + KL + t] = expm1(-s[o + KL + t]) + s[o + KL + t]
    if kind != GIVEN:
        for t in range(n):
            s[o + KL + t] = clamp(s[o + KL + t], -output_clip, output_clip)


@inner
def rewards_of(n: int, share: float, token: float, at: int, kl_coef: float, s: Any, o: int) -> None:
    """Token rewards become rewards.

    ``share`` is beta times the score, ``token`` what the score's token gets beside its credit's part.
    """
    for t in range(n):
        r = share * s[o + CREDIT + t] + s[o + REWARDS + t] - kl_coef * s[o + KL + t]
        s[o + REWARDS + t] = r if s[o + LIVE + t] != 0.0 else 0.0
    if 0 <= at < n:
        s[o + REWARDS + at] += token
