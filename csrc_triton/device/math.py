"""Numbers: what every kernel computes with."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693359375)  # few bits: a multiple of it by a small integer is exact
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
TINY = tl.constexpr(2.0**-126)
MAX_FINITE = tl.constexpr(3.4028234663852886e38)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def number(p_x):
    return tl.load(p_x).to(tl.float32)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= MAX_FINITE


@triton.jit
def log2(x, PTX: tl.constexpr):
    """Of positive ``x``, not subnormal; with ``PTX`` to 2**-22, absolute within [0.5, 2], else relative."""
    if PTX:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def expm1_residual(x):
    """``exp(x) - 1 - x``, to float32 accuracy also where it is tiny."""
    y = clamp(x, -40.0, 89.0)
    k = tl.floor(y * LOG2E + 0.5)
    r = y - k * LN2_HIGH - k * LN2_LOW
    q = r * (1.0 / 40320) + 1.0 / 5040
    q = q * r + 1.0 / 720
    q = q * r + 1.0 / 120
    q = q * r + 1.0 / 24
    q = q * r + 1.0 / 6
    q = (q * r + 0.5) * r * r
    # Half of 2**k, so that k = 128 does not overflow before the product does.
    bits = tl.where(k == k, k, 0.0).to(tl.int32) + 126
    half = (bits << 23).to(tl.float32, bitcast=True)
    full = (half * (r + q) + (half - 0.5)) * 2.0 - x
    return tl.where(k == 0.0, q, full)


@triton.jit
def tanh(x):
    size = clamp(tl.abs(x), 0.0, 20.0)
    e = expm1_residual(2.0 * size) + 2.0 * size
    magnitude = e / (e + 2.0)
    return tl.where(x < 0.0, -magnitude, magnitude)
