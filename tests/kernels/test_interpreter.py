"""What the tests change in Triton's interpreter: its speed, a scan's order, what may be read and written."""

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from support import fast_interpreter
from torch import Tensor
from triton.runtime.errors import InterpreterError

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


@triton.jit
def copy_kernel(p_x, p_out, from_x, to_out, n, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + to_out + o, tl.load(p_x + from_x + o, mask=o < n), mask=o < n)
    tl.atomic_add(p_out + to_out, 1)


@pytest.mark.parametrize(
    ("from_x", "to_out", "n", "wrong"),
    [
        (0, 0, 6, None),  # what a mask leaves out is no access
        (1, 0, 6, "masked_load at 1 of 6 addresses .* 0 bytes behind"),
        (-2, 0, 6, "masked_load at 2 of 6 addresses"),
        (0, 1, 6, "masked_store at 1 of 6 addresses .* 0 bytes behind"),
        (0, -1, 6, "masked_store at 1 of 6 addresses .* 20 bytes behind"),
        (0, 7, 0, "atomic_rmw at 1 of 1 addresses .* 4 bytes behind"),
    ],
)
def test_who_reads_or_writes_beside_a_tensor_is_stopped(
    from_x: int, to_out: int, n: int, wrong: str | None
) -> None:
    around = torch.zeros(64)
    x, out = around[8:14], around[20:26]
    with nullcontext() if wrong is None else pytest.raises(InterpreterError, match=wrong):
        copy_kernel[(1,)](x, out, from_x, to_out, n, 8)


@triton.jit
def hand_over_kernel(
    p_x, p_out, p_counter, N: tl.constexpr, BEFORE: tl.constexpr, ORDER: tl.constexpr, BEHIND: tl.constexpr
):
    o = tl.arange(0, N)
    i_p = tl.program_id(0)
    tl.store(p_x + i_p * N + o, o + 1.0)
    if BEFORE:
        tl.debug_barrier()
    arrived = tl.atomic_add(p_counter, 1, sem=ORDER, scope="gpu")
    if BEHIND:
        tl.debug_barrier()
    if arrived == 1:
        tl.store(p_out + o, tl.load(p_x + o) + tl.load(p_x + N + o))


@pytest.mark.parametrize(
    ("before", "order", "behind", "wrong"),
    [
        (True, "acq_rel", True, None),
        (False, "acq_rel", True, "a release of what other threads may store later"),
        (True, "relaxed", True, "which did not hand it over"),
        (True, "release", True, "which did not hand it over"),
        (True, "acquire", True, "which did not hand it over"),
        (True, "acq_rel", False, "no barrier behind that"),
    ],
)
def test_who_reads_what_was_not_handed_over_is_stopped(
    before: bool, order: str, behind: bool, wrong: str | None
) -> None:
    x, out, counter = torch.zeros(16), torch.zeros(8), torch.zeros((), dtype=torch.int32)
    with nullcontext() if wrong is None else pytest.raises(InterpreterError, match=wrong):
        hand_over_kernel[(2,)](x, out, counter, 8, before, order, behind)
    if wrong is None:
        assert out.equal(2 * torch.arange(1.0, 9))


@triton.jit
def turned_kernel(p_x, p_out, N: tl.constexpr, BARRIER: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_x + o, tl.load(p_x + o) + 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_out + o, tl.load(p_x + N - 1 - o))


def test_who_reads_what_its_other_threads_may_store_later_is_stopped() -> None:
    x, out = torch.zeros(2, 8)
    turned_kernel[(1,)](x, out, 8, True)
    assert out.equal(torch.ones(8))
    with pytest.raises(InterpreterError, match="of what this program did at that address, with no barrier"):
        turned_kernel[(1,)](x, out, 8, False)
