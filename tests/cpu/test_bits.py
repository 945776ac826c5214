"""The compiled loops' bits: those of the formulas, each operation rounded as it is written."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cpu import golden
from torch import Tensor

import attnshape
from attnshape import AttentionInputs, Response, ShapingConfig
from attnshape.cpu import arithmetic, lanes, memory
from attnshape.cpu.jit import OPTIONS, entry
from attnshape.cpu.memory import scratch_at
from attnshape.types import decay, float32_rounded


@pytest.mark.parametrize("name", golden.CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
def test_golden_vectors(name: str, packed: bool) -> None:
    """Made from the reference on one machine, met to the bit on this one."""
    config, given = golden.CONFIGS[name], golden.given(torch.float32)
    shape = given["response"].mask.shape
    if packed and config.carry_masked:
        pytest.skip("padded tokens only")
    if packed:
        kl = given["kl"]
        bounds = torch.arange(shape[0] + 1, dtype=torch.int32) * shape[1]
        given = {k: x.flatten() if isinstance(x, Tensor) else x for k, x in given.items()}
        given["kl"] = attnshape.KL(kl.logprobs.flatten(), kl.ref_logprobs.flatten(), kl.coef)
        given["response"] = Response(given["response"].mask.flatten(), cu_seqlens=bounds)
    out = attnshape.shape_rewards(**given, config=config, backend="cpu")
    with np.load(golden.FILE) as recorded:
        for output in golden.OUTPUTS:
            want = recorded[f"{name}.{output}"]
            assert np.array_equal(getattr(out, output).view(want.shape).numpy(), want), output


@pytest.mark.parametrize("name", golden.WHITENINGS)
def test_golden_vectors_of_whitening(name: str) -> None:
    given = golden.given(torch.float32)
    got = attnshape.whiten(given["values"], given["response"], golden.WHITENINGS[name], backend="cpu")
    with np.load(golden.FILE) as recorded:
        assert np.array_equal(got.numpy(), recorded[f"whiten.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", golden.ROWS)
def test_golden_vectors_of_rows(name: str, dtype: torch.dtype) -> None:
    """An exponential is made of sums and products here, so its bits are the same everywhere too."""
    got = attnshape.attention_row(golden.attention(name, dtype), backend="cpu")
    with np.load(golden.FILE) as recorded:
        assert np.array_equal(got.numpy(), recorded[f"row.{name}"])


def test_the_golden_vectors_are_those_of_the_reference() -> None:
    with np.load(golden.FILE) as recorded:
        for name, want in golden.expected():
            np.testing.assert_allclose(recorded[name], want, rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.3)])
@pytest.mark.parametrize("skip", [True, False, None])
def test_the_recurrence_is_python_s_own(gamma: float, lam: float, skip: bool | None) -> None:
    """Python rounds every product and every sum: what contracts them, or takes another order, differs."""
    r, v = golden.numbers(2 * 5000, 5).view(2, 5000)
    mask = golden.numbers(5000, 6) > (-0.7 if skip is not None else -2)  # the latter: no token is masked
    config = ShapingConfig(gamma=gamma, lam=lam, mask_semantics="skip" if skip else "zero")
    got = attnshape.gae(r[None] / 3, v[None] / 7, mask[None], config, backend="cpu")
    gl, g32 = decay(gamma, lam), float32_rounded(gamma)
    assert isinstance(gl, float)
    w, advantages = 0.0, []
    for x, value, live in zip(
        (r / 3).tolist()[::-1], (v / 7).tolist()[::-1], mask.tolist()[::-1], strict=True
    ):
        advantages.append(x - value + w if live else 0.0)
        if live:
            w = gl * w + (gl * x + (g32 - gl) * value)
        elif not skip:
            w = gl * w
    want = torch.tensor(advantages[::-1], dtype=torch.float64).float()
    assert torch.equal(got.advantages[0], want)


@pytest.mark.parametrize("packed", [False, True])
def test_bits_do_not_depend_on_how_tokens_lie(packed: bool) -> None:
    """Neighbours in memory are taken as vectors, backwards, others one by one into a block first."""
    lengths = torch.tensor([1, 7, 8, 127, 128, 129, 250, 255, 256, 300, 0])
    mask = torch.arange(300) < lengths[:, None]
    x = golden.numbers(2 * mask.numel(), 13).view(2, *mask.shape)
    bootstrap, config = golden.numbers(len(lengths), 14), ShapingConfig(gamma=0.99, lam=0.9)
    response: Response | Tensor = mask
    if packed:
        bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        x, response = x[:, mask], Response(mask[mask], cu_seqlens=bounds)
    apart = torch.stack([x, x], -1)[..., 0]
    assert apart.stride(-1) == 2
    side_by_side, one_by_one = (
        attnshape.gae(r, v, response, config, bootstrap=bootstrap, backend="cpu") for r, v in (x, apart)
    )
    assert all(torch.equal(a, b) for a, b in zip(side_by_side, one_by_one, strict=True))


@pytest.mark.parametrize("width", [16, 24, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dot_products_are_sixteen_lanes(width: int, dtype: torch.dtype) -> None:
    """The weights of two keys, one of them 0, tell the product to the bit; lanes are folded by halves."""
    g = torch.Generator().manual_seed(width)
    query, key = (torch.randn(width, generator=g).to(dtype) for _ in range(2))
    work = np.float64 if dtype == torch.float64 else np.float32
    padded = np.zeros((2, -(-width // 16) * 16), work)
    padded[0, :width], padded[1, :width] = query.to(torch.float64), key.to(torch.float64)
    total = np.zeros(16, work)
    for q, k in zip(*padded.reshape(2, -1, 16), strict=True):
        total = total + q * k
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    keys = torch.stack([key, torch.zeros_like(key)])[None, None]
    lse = torch.zeros(1, 1, dtype=torch.float64)
    inputs = AttentionInputs(query[None, None], keys, 2.0**-6, lse=lse)
    row = attnshape.attention_row(inputs, backend="cpu").double()
    want = math.exp(float(total[0]) * 2.0**-6)
    assert row[0, 1] == 1.0
    assert row[0, 0].item() == pytest.approx(want, rel=1e-7 if dtype != torch.float64 else 1e-15)


def test_arithmetic() -> None:
    """Within a few units in the last place of the C library, and what it says of the ends."""

    @entry
    def each(kind: int, x: Any, out: Any) -> None:
        for i in range(len(x)):
            if kind == 0:
                out[i] = arithmetic.exp(x[i])
            elif kind == 1:
                out[i] = arithmetic.expm1(x[i])
            else:
                out[i] = arithmetic.log(x[i])

    g = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.randn(4000, generator=g, dtype=torch.float64) * scale for scale in (1e-9, 1e-3, 1, 300)]
    )
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -800.0, 800.0], dtype=torch.float64)
    for kind, f in enumerate((torch.exp, torch.expm1, torch.log)):
        points = torch.cat([x, ends]) if kind < 2 else torch.cat([x.abs(), ends[2:6]])
        out = np.empty(len(points))
        each(kind, points.numpy(), out)
        got, want = torch.from_numpy(out), f(points)
        want = torch.where((kind == 0) & (want < 2.3e-308), 0.0, want)
        torch.testing.assert_close(got, want, rtol=1e-15 if kind else 4e-16, atol=0, equal_nan=True)


def test_nothing_is_contracted() -> None:
    """``total + x * y`` of lanes, where a fused operation would keep the product's lower half."""
    assert OPTIONS["fastmath"] is False

    @entry
    def products(x: Any, y: Any, out: Any) -> None:
        lanes.products_f64(x.ctypes.data, 32, 1, y.ctypes.data, 0, 32, 1, 32, 1.0, scratch_at(out, 0), 0, 1)

    x = np.zeros(32)
    x[0], x[16] = 1 + 2.0**-30, 1.0
    y = x.copy()
    y[16] = -(1 + 2.0**-29)
    out = np.ones(1)
    products(x, y, out)
    assert out[0] == 0.0  # fused: 2 ** -60


@pytest.mark.parametrize("width", [8, 300, 131])
def test_what_goes_past_the_caches_is_the_same(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin where a vector may be written, and rows that do not; with holes too."""
    x = golden.numbers(4 * 9 * width, 3).view(4, 9, width)
    mask = torch.ones(9, width)
    mask[3, width // 2] = 0

    def computed() -> list[Tensor]:
        out = attnshape.shape_rewards(x[0, :, 0], x[1].abs(), mask, values=x[2], backend="cpu")
        advantages = attnshape.gae(x[0], x[1], mask, backend="cpu")
        white = attnshape.whiten(x[3], mask, backend="cpu")
        return [out.rewards, out.advantages, out.returns, out.credit, *advantages, white]

    want = computed()
    monkeypatch.setattr(memory, "PAST", 0)
    assert all(torch.equal(a, b) for a, b in zip(computed(), want, strict=True))


def test_a_lost_row_leaves_nothing_behind() -> None:
    """Found by the soak: the memory of a row out of range serves the fourth row after it."""
    mask, index = torch.ones(6, 4), torch.tensor([9, 0, -1, 1, 2, 3])
    config = ShapingConfig(score_index=index)
    credit, score = golden.numbers(24, 1).view(6, 4).abs(), golden.numbers(6, 2)
    out = attnshape.shape_rewards(score, credit, mask, config=config, backend="cpu")
    assert out.status.tolist() == [24, 0, 24, 0, 0, 0]
    assert out.rewards[[1, 3, 4, 5]].isfinite().all()


def test_a_row_without_tokens_takes_nothing_over() -> None:
    """Found by the soak: where masked tokens are kept, an empty row is swept too."""
    mask = torch.ones(5, 3)
    mask[4] = 0
    config = ShapingConfig(score_index="last_token", carry_masked=True)
    out = attnshape.shape_rewards(torch.ones(5), "uniform", mask, config=config, backend="cpu")
    assert out.status.tolist() == [0, 0, 0, 0, 2]
    assert not out.rewards[4].any()
    assert not out.credit[4].any()
