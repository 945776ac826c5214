"""What the tests change in Triton's interpreter changes nothing but its speed and a scan's order."""

import pytest
import torch
import triton
import triton.language as tl
from support import fast_interpreter
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")


@triton.jit
def first_last_and_sum(first, last, total, next_first, next_last, next_total):
    """Neither commutative nor rounded."""
    return first, next_last, total + next_total


@triton.jit
def scan_kernel(p_x, p_out, A: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    o = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    x = tl.load(p_x + o)
    first, last, total = tl.associative_scan((x, x, x), AXIS, first_last_and_sum, reverse=REVERSE)
    tl.store(p_out + o, first)
    tl.store(p_out + A * B + o, last)
    tl.store(p_out + 2 * A * B + o, total)


def scanned(x: Tensor, axis: int, reverse: bool) -> Tensor:
    out = torch.empty(3, *x.shape, dtype=x.dtype)
    scan_kernel[(1,)](x, out, *x.shape, axis, reverse)
    return out


@pytest.mark.parametrize("shape", [(1, 16), (8, 4), (2, 1)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_by_doubling_are_those_one_by_one(shape: tuple[int, int], axis: int, reverse: bool) -> None:
    x = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(0))
    forward = x.flip(axis) if reverse else x
    first = forward.narrow(axis, 0, 1).expand_as(x)
    truth = torch.stack([first, forward, forward.cumsum(axis)])
    truth = truth.flip(axis + 1) if reverse else truth
    assert scanned(x, axis, reverse).equal(truth)
    with fast_interpreter.original_scan():
        assert scanned(x, axis, reverse).equal(truth)


@triton.jit
def numbers_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o)
    tl.store(p_out + o, x + 3)
    tl.store(p_out + N + o, 3 - x)
    tl.store(p_out + 2 * N + o, x / 4)
    tl.store(p_out + 3 * N + o, tl.where(x > 2, x, 1))
    tl.store(p_out + 4 * N + o, x * 2.5)
    tl.store(p_out + 5 * N + o, x * tl.load(p_x + 1))
    tl.store(p_out + 6 * N + o, tl.sum(x[:, None] * (o[:, None] == o[None, :]) * True, axis=0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32])
def test_numbers_and_tensors_meet_as_in_torch(dtype: torch.dtype) -> None:
    """The second time with what was remembered from the first."""
    for start in (0, 3):
        x = torch.arange(start, start + 8).to(dtype)
        out = torch.empty(7, 8)
        numbers_kernel[(1,)](x, out, 8)
        v = x.double()
        want = [v + 3, 3 - v, v / 4, torch.where(v > 2, v, 1.0), v * 2.5, v * v[1], v]
        if dtype == torch.uint8:  # wraps
            want[1] %= 256
        for got, expected in zip(out.double(), want, strict=True):
            assert got.equal(expected)


def test_an_interpreter_that_is_not_known_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    before, scan = vars(interpreter).copy(), interpreter.ScanOps.generic_scan
    monkeypatch.setattr(fast_interpreter, "digest", lambda: "another")
    assert "as it is, slowly: its interpreter (another) is not known" in fast_interpreter.install()
    assert vars(interpreter) == before
    assert interpreter.ScanOps.generic_scan is scan
