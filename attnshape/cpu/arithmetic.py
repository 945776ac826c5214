"""exp, log and sums in plain float64 arithmetic: vectorised, and the same bits on every machine.

A C library's would be neither. Within a few units in the last place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnshape.cpu.jit import inner
from attnshape.cpu.memory import as_f64, bits_of

ROUND = 1.5 * 2.0**52  # adding it rounds to an integer, which then stands in the lowest bits
ROUND_BITS = 0x4338000000000000
LOG2_E = 1 / math.log(2)
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10  # the first has 32 bits
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


@inner
def least(x: int, y: int) -> int:
    """Python's own ``min`` would be compiled by itself too, as if somebody called it: a tenth of a second."""
    return x if x < y else y


@inner
def most(x: int, y: int) -> int:
    return x if x > y else y


@inner
def _reduced(x: float) -> tuple[float, float]:
    """``2 ** k`` and ``exp(x - k ln 2) - 1``, with ``x - k ln 2`` at most half of ln 2."""
    shifted = x * LOG2_E + ROUND
    k = shifted - ROUND
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 1 / 2.0
    p = p * r * r + r
    return as_f64((bits_of(shifted) - ROUND_BITS + 1023) << 52), p


@inner
def exp(x: float) -> float:
    """0 below the smallest normal number."""
    scale, p = _reduced(x)
    y = scale * p + scale
    y = 0.0 if x < -708.0 else y
    return np.inf if x > 709.0 else y


@inner
def expm1(x: float) -> float:
    scale, p = _reduced(x)
    y = scale * p + (scale - 1.0)
    y = -1.0 if x < -708.0 else y
    return np.inf if x > 709.0 else y


@inner
def log(x: float) -> float:
    """Of a positive normal number or infinity; NaN of a negative one."""
    bits = bits_of(x)
    e = (bits - SQRT_HALF_BITS) >> 52
    m = as_f64(bits - (e << 52))
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1 / 19.0
    p = p * z + 1 / 17.0
    p = p * z + 1 / 15.0
    p = p * z + 1 / 13.0
    p = p * z + 1 / 11.0
    p = p * z + 1 / 9.0
    p = p * z + 1 / 7.0
    p = p * z + 1 / 5.0
    p = p * z + 1 / 3.0
    y = np.float64(e) * math.log(2) + (2.0 * s + 2.0 * s * z * p)
    y = x if x == np.inf else y
    return y if x > 0.0 else np.nan


@inner
def fold(n: int, s: Any, o: int) -> Any:
    """Sum of ``s[o : o + n]``, halves onto each other; ``n`` is a power of two. They are 0 afterwards."""
    width = n // 2
    while width > 0:
        for j in range(width):
            s[o + j] += s[o + width + j]
        width //= 2
    total = s[o]
    for j in range(n):
        s[o + j] = 0.0
    return total
