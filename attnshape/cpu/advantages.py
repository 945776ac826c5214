"""Section 4 of the specification: the recurrence of GAE, backwards over a row.

``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``. What does not need ``W``
is computed for a whole block first; the chain itself is one product and one sum a token, and several rows'
chains run side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnshape.cpu import lanes
from attnshape.cpu.arithmetic import fold
from attnshape.cpu.jit import called, inner
from attnshape.cpu.lanes import ALIGNED, WIDTH, get, put, splat, where
from attnshape.cpu.layout import ADDEND, BLOCK, HELD, LIVE, REWARDS, SUM, SUM_2, VALUES
from attnshape.cpu.memory import OVERFLOW_F32, fetch, read_f32, write_f32

WAYS = 8
"""Rows whose chains run side by side: while one waits for its sum, the others go on."""
LINE = 16
"""Numbers of float32 that memory is fetched by."""


@inner
def add_terms(gamma: float, gl: float, addend: int, s: Any, o: int) -> None:
    """What a token adds to ``W``, from its reward and its value: 0 where masked."""
    none, by_reward, by_value = splat(0.0), splat(gl), splat(gamma - gl)
    for t in range(0, BLOCK, WIDTH):
        live = get(s, o + LIVE + t) != none
        r, v = where(live, get(s, o + REWARDS + t), none), where(live, get(s, o + VALUES + t), none)
        put(s, o + addend + t, by_reward * r + by_value * v)


@inner
def add_terms_of_memory(
    gamma: float, gl: float, rewards: int, at_reward: int, values: int, at_value: int, n: int, s: Any, o: int
) -> None:
    """The same of unmasked tokens that lie in memory as float32; rewards become rewards without values.

    Backwards, as a row is read, and asks for the block before: more rows are in flight than a CPU foresees.
    """
    by_reward, by_value, whole = splat(gl), splat(gamma - gl), n - n % WIDTH
    for i in range(0, whole, WIDTH):
        t = whole - WIDTH - i
        if t % LINE == 0:
            fetch(rewards + 4 * (at_reward + t - BLOCK))
            fetch(values + 4 * (at_value + t - BLOCK))
        r, v = lanes.read_f32s(rewards, at_reward + t), lanes.read_f32s(values, at_value + t)
        put(s, o + ADDEND + t, by_reward * r + by_value * v)
        put(s, o + REWARDS + t, r - v)
    for t in range(whole, n):
        add_term_of_memory(gamma, gl, rewards, at_reward, values, at_value, 0.0, t, s, o)
    for t in range(n, BLOCK):
        s[o + ADDEND + t] = 0.0


@inner
def add_term_of_memory(
    gamma: float, gl: float, rewards: int, at_reward: int, values: int, at_value: int, more: float, t: int,
    s: Any, o: int,
) -> None:  # fmt: skip
    """The same of one token, whose reward is ``more`` than stands there."""
    r, v = read_f32(rewards, at_reward + t) + more, np.float64(read_f32(values, at_value + t))
    s[o + ADDEND + t] = gl * r + (gamma - gl) * v
    s[o + REWARDS + t] = r - v


@inner
def subtract_values(s: Any, o: int) -> None:
    """Rewards become rewards without values, 0 where masked."""
    none = splat(0.0)
    for t in range(0, BLOCK, WIDTH):
        x = get(s, o + REWARDS + t) - get(s, o + VALUES + t)
        put(s, o + REWARDS + t, where(get(s, o + LIVE + t) != none, x, none))


@inner
def set_factors(n: int, gl: float, masked: float, factor: int, s: Any, o: int) -> None:
    """``gl``, and ``masked`` where a token is masked; the identity past the block."""
    for t in range(n):
        s[o + factor + t] = gl if s[o + LIVE + t] != 0.0 else masked
    for t in range(n, BLOCK):
        s[o + factor + t] = 1.0


@inner
def passed(factor: float, addend: int, w: Any, s: Any) -> Any:
    """``W`` of a token; the one that enters it takes the place of what the token adds."""
    x = s[addend]
    s[addend] = w
    return factor * w + x


@called
def carry(factor: int, addend: int, s: Any, w: int) -> None:
    """Replaces what each token adds by the ``W`` that enters the token from the next, in all rows.

    ``w``: where in the scratch memory stand, of each row, what enters the block, and then what leaves it.
    """
    w0, w1, w2, w3 = s[w], s[w + 1], s[w + 2], s[w + 3]
    w4, w5, w6, w7 = s[w + 4], s[w + 5], s[w + 6], s[w + 7]
    for i in range(BLOCK):
        f, a = factor + BLOCK - 1 - i, addend + BLOCK - 1 - i
        w0 = passed(s[f], a, w0, s)
        w1 = passed(s[f + HELD], a + HELD, w1, s)
        w2 = passed(s[f + 2 * HELD], a + 2 * HELD, w2, s)
        w3 = passed(s[f + 3 * HELD], a + 3 * HELD, w3, s)
        w4 = passed(s[f + 4 * HELD], a + 4 * HELD, w4, s)
        w5 = passed(s[f + 5 * HELD], a + 5 * HELD, w5, s)
        w6 = passed(s[f + 6 * HELD], a + 6 * HELD, w6, s)
        w7 = passed(s[f + 7 * HELD], a + 7 * HELD, w7, s)
    s[w], s[w + 1], s[w + 2], s[w + 3] = w0, w1, w2, w3
    s[w + 4], s[w + 5], s[w + 6], s[w + 7] = w4, w5, w6, w7


@inner
def settle(of_returns: int, s: Any, o: int) -> None:
    """Advantages and returns, 0 where masked, from the ``W`` that stands in the addends.

    ``of_returns``: the addends that the returns' recurrence has left.
    """
    none = splat(0.0)
    for t in range(0, BLOCK, WIDTH):
        live, x = get(s, o + LIVE + t) != none, get(s, o + REWARDS + t)
        a, r = x + get(s, o + ADDEND + t), x + get(s, o + of_returns + t) + get(s, o + VALUES + t)
        put(s, o + REWARDS + t, where(live, a, none))
        put(s, o + ADDEND + t, where(live, r, none))


@inner
def settle_into_memory(
    past: bool, advantages: int, returns: int, start: int, values: int, at_value: int, n: int, near: float,
    s: Any, o: int,
) -> Any:  # fmt: skip
    """``settle`` and ``add_moments`` of unmasked tokens whose values and outputs are float32 in memory.

    ``past``: what is written goes past the caches. Whether all of it is finite.
    """
    base, limit, fine, whole = splat(near), splat(OVERFLOW_F32), lanes.all_true(), n - n % WIDTH
    lost = 0
    for t in range(whole, n):
        a = s[o + REWARDS + t] + s[o + ADDEND + t]
        r = a + read_f32(values, at_value + t)
        write_f32(advantages, start + t, np.float32(a))
        write_f32(returns, start + t, np.float32(r))
        lost += not (abs(a) < OVERFLOW_F32 and abs(r) < OVERFLOW_F32)
        d = a - near
        s[o + SUM + t - whole] += d
        s[o + SUM_2 + t - whole] += d * d
    total, squares = get(s, o + SUM), get(s, o + SUM_2)
    past = past and (advantages + 4 * start) % ALIGNED == 0 and (returns + 4 * start) % ALIGNED == 0
    for i in range(0, whole, WIDTH):
        t = whole - WIDTH - i
        a = get(s, o + REWARDS + t) + get(s, o + ADDEND + t)
        r = a + lanes.read_f32s(values, at_value + t)
        if past:
            lanes.write_f32s_past(advantages, start + t, a)
            lanes.write_f32s_past(returns, start + t, r)
        else:
            lanes.write_f32s(advantages, start + t, a)
            lanes.write_f32s(returns, start + t, r)
        fine = fine & (lanes.absolute(a) < limit) & (lanes.absolute(r) < limit)
        d = a - base
        total = total + d
        squares = squares + d * d
    put(s, o + SUM, total)
    put(s, o + SUM_2, squares)
    return lost == 0 and lanes.all_of(fine)


@called
def settle_all(
    n: int, of_returns: int, skip: bool, advantage: float, without_value: float, s: Any, o: int
) -> tuple[float, float]:
    """``settle``, with what the recurrence carries past masked tokens left there.

    Given what the next unmasked token has, of advantages and of returns without their value; returns what
    the block's first has.
    """
    for i in range(n):
        t = n - 1 - i
        live, v = s[o + LIVE + t] != 0.0, s[o + VALUES + t]
        if live or not skip:
            advantage = s[o + REWARDS + t] + s[o + ADDEND + t]
            without_value = s[o + REWARDS + t] + s[o + of_returns + t]
        s[o + REWARDS + t] = advantage
        s[o + ADDEND + t] = without_value + (v if live or skip else 0.0)
    return advantage, without_value


@inner
def add_moments(near: float, s: Any, o: int) -> None:
    """Adds deviations of unmasked advantages from ``near``, and their squares, to the lanes of the sums."""
    none, base = splat(0.0), splat(near)
    total, squares = get(s, o + SUM), get(s, o + SUM_2)
    for i in range(0, BLOCK, WIDTH):
        t = BLOCK - WIDTH - i
        d = where(get(s, o + LIVE + t) != none, get(s, o + REWARDS + t) - base, none)
        total = total + d
        squares = squares + d * d
    put(s, o + SUM, total)
    put(s, o + SUM_2, squares)


@called
def moments_of(count: int, near: float, s: Any, o: int) -> tuple[float, float]:
    """Mean and sum of squared deviations, by the sums of ``add_moments``, which are 0 afterwards."""
    total, squares = fold(WIDTH, s, o + SUM), fold(WIDTH, s, o + SUM_2)
    if count == 0:
        return 0.0, 0.0
    m2 = squares - total * (total / count)
    return near + total / count, 0.0 if m2 < 0.0 else m2
