import ast
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support import ptx
from support.kernels import kernels
from torch import Tensor

import csrc_triton
from csrc_triton.device import math as device_math
from csrc_triton.device.layout import live_bits
from csrc_triton.device.rewards import kl_estimate
from csrc_triton.device.scan import at_token

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def apply_kernel(p_x, p_out, n, FUNCTION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o, mask=o < n, other=0.0)
    tl.store(p_out + o, FUNCTION(x), mask=o < n)


@triton.jit
def k3(x):
    return kl_estimate(x, float("inf"), float("inf"), "k3")


def apply(function, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    apply_kernel[(1,)](x, out, x.numel(), function, triton.next_power_of_2(x.numel()))
    return out


ARGUMENTS = torch.tensor(
    [0.0, *(s * 2.0**e * m for s in (1, -1) for e in range(-30, 7) for m in (1, 1.3, 1.9))],
    device=DEVICE,
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (device_math.expm1_residual, lambda x: torch.expm1(x) - x),
        (device_math.tanh, torch.tanh),
        (k3, lambda x: torch.expm1(-x) + x),
    ],
)
def test_relative_accuracy(function, truth) -> None:
    wanted = truth(ARGUMENTS.double())
    if truth is not torch.tanh:
        # float64 cancels, too, where the series begins with x**2 / 2.
        small = ARGUMENTS.double().abs() < 1e-3
        x = ARGUMENTS.double() * (-1 if function is k3 else 1)
        wanted = torch.where(small, x**2 / 2 + x**3 / 6 + x**4 / 24, wanted)
    actual = apply(function, ARGUMENTS).double()
    overflown = wanted.abs() > 3.4e38
    assert (actual[overflown] == math.inf).all()
    error = (actual - wanted).abs()[~overflown] / wanted.abs().clamp(min=1e-300)[~overflown]
    assert error.max() < 1e-6


@triton.jit
def bits_kernel(p_mask, p_out, N: tl.constexpr, PTX: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, live_bits(tl.load(p_mask + o), PTX))


@pytest.mark.parametrize("by_ptx", [False, True])
def test_every_byte_but_0_is_unmasked(by_ptx: bool) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(256, (1024,), generator=g) * (torch.rand(1024, generator=g) < 0.5)
    mask = mask.to(DEVICE, torch.uint8)
    bits = torch.empty(1024, dtype=torch.int32, device=DEVICE)
    with ptx.executed() if by_ptx and DEVICE.type == "cpu" else nullcontext():
        bits_kernel[(1,)](mask, bits, 1024, by_ptx)
    assert mask.unique().numel() > 200
    assert torch.equal(bits, torch.where(mask != 0, -1, 0).int())


@triton.jit(do_not_specialize=["at"])
def at_token_kernel(p_out, at, N: tl.constexpr):
    tl.store(p_out + tl.arange(0, N), at_token(at, 3.0, N))


@pytest.mark.parametrize("at", [-(2**31), -513, -512, -1, 0, 1, 6, 510, 511, 512, 2**31 - 1])
def test_a_number_at_one_token_of_a_chunk(at: int) -> None:
    """Counted from the chunk's first: another chunk's is before or behind it."""
    out = torch.full((512,), torch.nan, device=DEVICE)
    at_token_kernel[(1,)](out, at, 512)
    assert out.nonzero().flatten().tolist() == [at] * (0 <= at < 512)
    assert out.sum() == 3 * (0 <= at < 512)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_non_finite_arguments() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf], device=DEVICE)
    for function, truth in ((device_math.tanh, torch.tanh), (k3, lambda x: torch.expm1(-x) + x)):
        torch.testing.assert_close(apply(function, x), truth(x), equal_nan=True)


def test_no_device_function_returns_a_tuple_with_none() -> None:
    """Triton 3.6 compiles none that does; later ones, and the interpreter, take it."""
    returns = []
    for path in Path(csrc_triton.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(
                ast.unparse, function.decorator_list
            ):
                returns += [x.value for x in ast.walk(function) if isinstance(x, ast.Return) and x.value]
    parts = [part for x in returns for part in getattr(x, "elts", getattr(x, "args", []))]
    assert len(parts) > 50
    for part in parts:
        chosen = [part.body, part.orelse] if isinstance(part, ast.IfExp) else [part]
        assert not any(ast.unparse(x) == "None" for x in chosen), ast.unparse(part)


def test_a_kernels_signature_is_read_at_a_glance() -> None:
    long = {}
    for path in Path(csrc_triton.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name in kernels():
                long[function.name] = function.body[0].lineno - function.lineno
    assert long.keys() == kernels()
    assert {name: lines for name, lines in long.items() if lines > 10} == {}
