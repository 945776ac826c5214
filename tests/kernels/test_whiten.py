"""The whitening kernels against the float64 reference: interpreted on a CPU, compiled on a GPU."""

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnshape
from attnshape import Response, Whitening, reference
from attnshape.reference.whiten import row_moments
from csrc_triton import whiten as launcher
from csrc_triton.host.whiten import BLOCK, MAX_PARTS, PARTS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULE = sys.modules["csrc_triton.host.whiten"]
OPTIONS = st.fixed_dictionaries(
    {
        "bessel": st.booleans(),
        "eps": st.sampled_from([1e-8, 0.5]),
        "eps_mode": st.sampled_from(["add", "clamp", "add_to_std"]),
        "shift_mean": st.booleans(),
        "whiten_masked": st.booleans(),
    }
)


def check(x: Tensor, mask: Tensor, moments: Tensor | None = None, **options: Any) -> Tensor:
    got = launcher(x.to(DEVICE), mask.to(DEVICE), None if moments is None else moments.to(DEVICE), **options)
    assert got.dtype == torch.float32
    want = reference.whiten(x.double(), mask, Whitening(**options))
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
    return got


def drawn(*shape: int, live: float = 0.8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g) * 3 + 100, torch.rand(shape, generator=g) < live


LAYOUTS = {
    "flat": lambda x: x,
    "rows apart": lambda x: torch.cat([x, torch.full_like(x, 77)], -1)[..., : x.shape[-1]],
    "neighbours apart": lambda x: torch.stack([x, torch.full_like(x, 77)], -1)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_full((1,), 77), x.flatten()])[1:].view(x.shape),
}


@settings(max_examples=60)
@given(
    st.sampled_from([(1, 1), (3, 7), (2, 3, 5), (40,), (), (16, 16), (5, BLOCK + 3), (BLOCK + 3, 2)]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.bool, torch.int64, torch.float32]),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from([0.0, 0.1, 0.8, 1.0]),
    st.booleans(),
    OPTIONS,
)
def test_whiten_is_the_reference(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mask_dtype: torch.dtype,
    layout: str,
    mask_layout: str,
    live: float,
    given_moments: bool,
    options: dict[str, Any],
) -> None:
    x, mask = drawn(*shape, live=live)
    x = x.to(dtype)
    moments = None
    if given_moments:
        moments = row_moments(x.double().reshape(1, -1), Response(mask.reshape(1, -1)))
    if x.ndim:
        x, mask = LAYOUTS[layout](x), LAYOUTS[mask_layout](mask.to(mask_dtype))
    check(x, mask, moments, **options)


def test_moments_of_rows_of_few_and_of_many() -> None:
    for rows in (1, PARTS, PARTS + 1, MAX_PARTS + 1):
        x, mask = drawn(rows, 3)
        moments = row_moments(x, Response(mask))
        rounded = check(x, mask, moments)
        exact = check(x, mask, moments.double().view(rows, 1, 3))
        torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "PARTS", 16)
    monkeypatch.setattr(MODULE, "processors", lambda device: 1)
    check(*drawn(20, 2000))
    check(*drawn(1, 20 * BLOCK))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_non_finite_spreads_from_unmasked_tokens_only(value: float) -> None:
    x, mask = drawn(4, 9)
    x[1, 2], mask[1, 2] = value, False
    assert check(x, mask).isfinite().all()
    mask[1, 2] = True
    assert check(x, mask)[mask.to(DEVICE)].isnan().all()


def test_parts_of_nothing_have_no_mean() -> None:
    x, mask = drawn(2, 5)
    moments = torch.cat([row_moments(x, Response(mask)), torch.tensor([[0.0, math.nan, math.nan]])])
    check(x, mask, moments)


def test_what_a_process_group_gathers() -> None:
    (x, mask), (other, other_mask) = drawn(3, 5), drawn(4, 5)
    together = reference.whiten(torch.cat([x, other]).double(), torch.cat([mask, other_mask]))
    theirs = row_moments(other.double().view(1, -1), Response(other_mask.view(1, -1))).to(DEVICE)
    for moments in (None, row_moments(x, Response(mask)).to(DEVICE)):
        got = launcher(
            x.to(DEVICE), mask.to(DEVICE), moments, lambda ours: torch.cat([ours[None], theirs]).contiguous()
        )
        torch.testing.assert_close(got.cpu().double(), together[:3], rtol=1e-5, atol=1e-5)
    nothing = torch.empty(0, 5, device=DEVICE)
    gathered = []
    assert launcher(nothing, nothing, None, lambda ours: gathered.append(ours) or ours).shape == (0, 5)
    assert gathered[0].tolist() == [0.0, 0.0, 0.0]


def test_the_same_bits_every_time() -> None:
    x, mask = (t.to(DEVICE) for t in drawn(6, 2000))
    first = launcher(x, mask)
    assert all(torch.equal(launcher(x, mask), first) for _ in range(3))


def test_launches(launches: list[str]) -> None:
    x, mask = (t.to(DEVICE) for t in drawn(8, 8))

    def started(moments: Tensor | None) -> list[str]:
        launches.clear()
        launcher(x, mask, moments)
        return launches

    assert started(None) == ["moments_kernel", "whiten_kernel"]
    assert started(torch.ones(MAX_PARTS, 3, device=DEVICE)) == ["whiten_kernel"]
    assert started(torch.ones(MAX_PARTS + 1, 3, device=DEVICE)) == ["fold_kernel", "whiten_kernel"]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    assert launcher(x, x).shape == shape


def test_advantages_are_whitened_by_their_own_moments() -> None:
    x, mask = (t.to(DEVICE) for t in drawn(3, 700))
    advantages, _, moments = attnshape.gae(x, None, mask, backend="triton")
    got = attnshape.whiten(advantages, mask, moments=moments, backend="triton")
    want = reference.whiten(advantages.cpu().double(), mask.cpu())
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
