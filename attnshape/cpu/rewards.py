"""Section 3 of the specification: from credit and a score to token rewards, a block of a row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnshape.cpu.arithmetic import expm1, fold, log
from attnshape.cpu.jit import inner
from attnshape.cpu.layout import (
    BLOCK,
    CREDIT,
    KL,
    KL_OUT,
    LIVE,
    LOGPROBS,
    RAW,
    REF_LOGPROBS,
    REWARDS,
    SUM,
    SUM_2,
    TOKEN_REWARDS,
)
from attnshape.cpu.memory import load, load_mask, start_of

K1, ABS, K2, K3, GIVEN = 0, 1, 2, 3, 4
"""KL estimators; ``GIVEN`` is the caller's own KL."""


@inner
def clamp(x: float, low: float, high: float) -> float:
    """NaN stays."""
    x = low if x < low else x
    return high if x > high else x


@inner
def mass_of(
    places: Any, mask: int, raw: int, row: int, base: int, first: int, end: int, s: Any, o: int
) -> tuple[float, float, float]:
    """Sums of a row's raw weights ``x``, a negative one as ``-inf``, and of ``x log x``; the last of them."""
    last = 0.0
    for t in range(first, end, BLOCK):
        n = min(BLOCK, end - t)
        load_mask(places, mask, start_of(places, mask, row, base + t), n, s, o + LIVE)
        load(places, raw, start_of(places, raw, row, base + t), n, s, o + RAW)
        last = s[o + RAW + n - 1]
        for j in range(n):
            x = s[o + RAW + j] if s[o + LIVE + j] != 0.0 else 0.0
            s[o + SUM + j] += -np.inf if x < 0.0 else x
            s[o + SUM_2 + j] += x * log(x) if x != 0.0 else 0.0
    return fold(BLOCK, s, o + SUM), fold(BLOCK, s, o + SUM_2), last


@inner
def entropy_of(mass: float, xlogx: float) -> float:
    """``-sum p log p`` of ``p = x / mass``."""
    if mass == 0.0 and xlogx == 0.0:
        return 0.0
    return log(mass) - xlogx / mass


@inner
def credit_of(n: int, scale: float, hot: float, at: int, s: Any, o: int) -> None:
    for t in range(n):
        s[o + CREDIT + t] = s[o + RAW + t] * scale if s[o + LIVE + t] != 0.0 else 0.0
    if 0 <= at < n:
        s[o + CREDIT + at] += hot


@inner
def kl_of(n: int, kind: int, input_clip: float, output_clip: float, s: Any, o: int) -> None:
    """The estimate of a block's tokens, 0 where masked; infinite clips do nothing."""
    for t in range(n):
        x = s[o + LOGPROBS + t] - s[o + REF_LOGPROBS + t]
        x = s[o + KL + t] if kind == GIVEN else clamp(x, -input_clip, input_clip)
        s[o + KL_OUT + t] = x if s[o + LIVE + t] != 0.0 else 0.0
    if kind == ABS:
        for t in range(n):
            s[o + KL_OUT + t] = abs(s[o + KL_OUT + t])
    elif kind == K2:
        for t in range(n):
            s[o + KL_OUT + t] = s[o + KL_OUT + t] * s[o + KL_OUT + t] / 2.0
    elif kind == K3:
        for t in range(n):
            s[o + KL_OUT + t] = expm1(-s[o + KL_OUT + t]) + s[o + KL_OUT + t]
    if kind != GIVEN:
        for t in range(n):
            s[o + KL_OUT + t] = clamp(s[o + KL_OUT + t], -output_clip, output_clip)


@inner
def rewards_of(n: int, share: float, token: float, at: int, kl_coef: float, s: Any, o: int) -> None:
    """``share`` is beta times the score, ``token`` what the score's token gets beside its credit's part."""
    for t in range(n):
        r = share * s[o + CREDIT + t] + s[o + TOKEN_REWARDS + t] - kl_coef * s[o + KL_OUT + t]
        s[o + REWARDS + t] = r if s[o + LIVE + t] != 0.0 else 0.0
    if 0 <= at < n:
        s[o + REWARDS + at] += token
