"""Section 4 of the specification: the recurrence of GAE, backwards over a row.

``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``. What does not need ``W``
is computed for a whole block first; the chain itself is one product and one sum a token, and several rows'
chains run side by side.
"""

from __future__ import annotations

from typing import Any

from attnshape.cpu.jit import inner
from attnshape.cpu.layout import (
    ADDEND,
    ADDEND_VALUE,
    ADVANTAGES,
    BLOCK,
    DELTA,
    FACTOR,
    FACTOR_VALUE,
    HELD,
    LIVE,
    RETURNS,
    REWARDS,
    SUM,
    SUM_2,
    VALUES,
)

WAYS = 4
"""Rows whose chains run side by side."""


@inner
def prepare(
    n: int, gamma: float, gl: float, gl_value: float, chains: int, skip: bool, s: Any, o: int
) -> None:  # fmt: skip
    """``r - V``, and ``W_t = factor_t W_{t+1} + addend_t`` of advantages; of returns, if theirs is another.

    The identity past the block, and at masked tokens that are skipped.
    """
    masked = 1.0 if skip else gl
    for t in range(n):
        s[o + DELTA + t] = s[o + REWARDS + t] - (s[o + VALUES + t] if s[o + LIVE + t] != 0.0 else 0.0)
    for t in range(n):
        live = s[o + LIVE + t] != 0.0
        v = s[o + VALUES + t] if live else 0.0
        s[o + ADDEND + t] = gl * s[o + REWARDS + t] + (gamma - gl) * v
        s[o + FACTOR + t] = gl if live else masked
    for t in range(n, BLOCK):
        s[o + ADDEND + t] = 0.0
        s[o + FACTOR + t] = 1.0
    if chains == 1:
        return
    masked = 1.0 if skip else gl_value
    for t in range(n):
        live = s[o + LIVE + t] != 0.0
        v = s[o + VALUES + t] if live else 0.0
        s[o + ADDEND_VALUE + t] = gl_value * s[o + REWARDS + t] + (gamma - gl_value) * v
        s[o + FACTOR_VALUE + t] = gl_value if live else masked
    for t in range(n, BLOCK):
        s[o + ADDEND_VALUE + t] = 0.0
        s[o + FACTOR_VALUE + t] = 1.0


@inner
def carry(s: Any, w: Any, k: int) -> None:
    """Replaces each token's addend by the ``W`` that enters the token from the next, in all rows.

    ``w[k]``, ``[WAYS]``, is what enters the block, and then what leaves it.
    """
    factor, addend = FACTOR + 2 * k * BLOCK, ADDEND + 2 * k * BLOCK
    w0, w1, w2, w3 = w[k, 0], w[k, 1], w[k, 2], w[k, 3]
    for i in range(BLOCK):
        t = BLOCK - 1 - i
        n0 = s[factor + t] * w0 + s[addend + t]
        n1 = s[HELD + factor + t] * w1 + s[HELD + addend + t]
        n2 = s[2 * HELD + factor + t] * w2 + s[2 * HELD + addend + t]
        n3 = s[3 * HELD + factor + t] * w3 + s[3 * HELD + addend + t]
        s[addend + t], s[HELD + addend + t] = w0, w1
        s[2 * HELD + addend + t], s[3 * HELD + addend + t] = w2, w3
        w0, w1, w2, w3 = n0, n1, n2, n3
    w[k, 0], w[k, 1], w[k, 2], w[k, 3] = w0, w1, w2, w3


@inner
def settle(n: int, decoupled: bool, s: Any, o: int) -> None:
    """Advantages and returns, 0 where masked, from the ``W`` that stands in the addends."""
    for t in range(n):
        live, v = s[o + LIVE + t] != 0.0, s[o + VALUES + t]
        a = s[o + DELTA + t] + s[o + ADDEND + t]
        s[o + ADVANTAGES + t] = a if live else 0.0
        s[o + RETURNS + t] = a + v if live else 0.0
    if decoupled:
        for t in range(n):
            live, v = s[o + LIVE + t] != 0.0, s[o + VALUES + t]
            a = s[o + DELTA + t] + s[o + ADDEND_VALUE + t]
            s[o + RETURNS + t] = a + v if live else 0.0


@inner
def settle_all(n: int, decoupled: bool, skip: bool, later: Any, s: Any, o: int) -> None:
    """The same, with what the recurrence carries past masked tokens left there.

    ``later`` is what the next unmasked token has, of advantages and of returns without their value.
    """
    advantage, without_value, of_returns = later[0], later[1], o + (ADDEND_VALUE if decoupled else ADDEND)
    for i in range(n):
        t = n - 1 - i
        live, v = s[o + LIVE + t] != 0.0, s[o + VALUES + t]
        if live or not skip:
            advantage, without_value = (
                s[o + DELTA + t] + s[o + ADDEND + t],
                s[o + DELTA + t] + s[of_returns + t],
            )
        s[o + ADVANTAGES + t] = advantage
        s[o + RETURNS + t] = without_value + (v if live or skip else 0.0)
    later[0], later[1] = advantage, without_value


@inner
def add_moments(n: int, near: float, s: Any, o: int) -> None:
    """Adds deviations of unmasked advantages from ``near``, and their squares, to the lanes."""
    for t in range(n):
        d = s[o + ADVANTAGES + t] - near if s[o + LIVE + t] != 0.0 else 0.0
        s[o + SUM + t] += d
        s[o + SUM_2 + t] += d * d
