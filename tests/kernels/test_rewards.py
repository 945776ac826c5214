"""From credit to rewards and advantages in Triton against the float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shaping import (
    DEVICE,
    EVERYTHING,
    TOKENS,
    assert_same_pattern,
    check_shape,
    expected,
    gae,
    problem,
    shape,
)
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.types import MIN_MASS, Status
from csrc_triton.host import attention


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK", 16)


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    mask = torch.rand(batch, width, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    cu = None
    tokens: tuple[int, ...] = (batch, width)
    if draw(st.booleans()):
        lengths = torch.randint(0, width + 1, (batch,), generator=generator)
        cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        mask = mask[torch.arange(width) < lengths[:, None]]
        tokens = (len(mask),)
    lams = st.sampled_from([0.0, 0.5, 0.95, 1.0, "rows"])
    lam, lam_value = draw(lams), draw(st.one_of(st.none(), lams))
    lam = torch.rand(batch, generator=generator) if lam == "rows" else lam
    lam_value = torch.rand(batch, generator=generator) if lam_value == "rows" else lam_value
    score_index = draw(st.sampled_from(["last_unmasked", "last_token", "rows"]))
    if score_index == "rows":
        score_index = torch.randint(-1, width + 1, (batch,), generator=generator).to(DEVICE)
    config = ShapingConfig(
        dense_share=draw(st.sampled_from([0.0, 0.8, 1.0])),
        gamma=draw(st.sampled_from([1.0, 0.99, 0.5])),
        lam=lam.to(DEVICE) if isinstance(lam, Tensor) else lam,
        lam_value=lam_value.to(DEVICE) if isinstance(lam_value, Tensor) else lam_value,
        mask_semantics=draw(st.sampled_from(["skip", "zero"])),
        normalization=draw(st.sampled_from(["sum_to_one", "sum_to_length", "none"])),
        score_index=score_index,
        score_clip=draw(st.sampled_from([None, 0.5, (-0.1, 1.0)])),
        kl_estimator=draw(st.sampled_from(["k1", "abs", "k2", "k3"])),
        kl_input_clip=draw(st.sampled_from([None, 0.7])),
        kl_output_clip=draw(st.sampled_from([None, 0.6])),
        on_nan=draw(st.sampled_from(["propagate", "zero_row"])),
    )
    credit = draw(st.sampled_from(["uniform", "sparse", "weights", "zeros"]))
    if credit in ("weights", "zeros"):
        credit = (torch.rand(tokens, generator=generator) * (credit == "weights")).to(DEVICE)
    inputs = {}
    for name in ("values", "token_rewards"):
        if draw(st.booleans()):
            inputs[name] = randn(*tokens)
    for name in ("terminal_reward", "bootstrap"):
        if draw(st.booleans()):
            inputs[name] = randn(batch)
    kl = draw(st.sampled_from(["none", "given", "logprobs"]))
    if kl == "given":
        inputs["kl"] = randn(*tokens)
    elif kl == "logprobs":
        inputs["logprobs"], inputs["ref_logprobs"] = randn(*tokens), randn(*tokens)
    inputs["kl_coef"] = draw(st.sampled_from([0.0, 0.3, torch.tensor(0.2, device=DEVICE)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.ndim:
            if x.shape == mask.shape:
                x[~mask] = float("nan")
            inputs[name] = x.to(DEVICE, dtype)
    mask = mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))) * 2
    cu = None if cu is None else cu.to(DEVICE)
    return (randn(batch).to(DEVICE), credit, mask.to(DEVICE), config, cu), inputs


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=150)
@given(problems())
def test_sweep_is_the_reference(problem: tuple) -> None:
    (score, credit, mask, config, cu), inputs = problem
    actual = check_shape(score, credit, mask, config, cu=cu, **inputs)
    assert (actual.kl is not None) == ("kl" in inputs or "logprobs" in inputs)


@pytest.mark.parametrize("width", [511, 512, 513])
@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_lengths_around_a_chunk(width: int, lam: float) -> None:
    score, credit, mask, inputs = problem(width)
    config = ShapingConfig(lam=lam, kl_estimator="k3")
    check_shape(score, credit, mask, config, **inputs)


@pytest.mark.usefixtures("short_chunks")
def test_bits_do_not_depend_on_padding_neighbours_or_memory() -> None:
    width = 37
    score, credit, mask, inputs = problem(width)
    config = ShapingConfig(gamma=0.99, lam=0.95, kl_estimator="k3")
    alone = shape(score, credit, mask, config, **inputs)

    def wider(x: Tensor, fill: float) -> Tensor:
        """Row 1 of three, in the middle of a larger, misaligned buffer."""
        out = torch.full((3, width + 12), fill, device=DEVICE, dtype=x.dtype)[:, 1:]
        out[1, :width] = x[0]
        return out

    nan = float("nan")
    tokens = {n: wider(x, nan) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    batch = shape(score.expand(3), wider(credit, nan), wider(mask, 0), config, **tokens)
    for name in TOKENS:
        assert getattr(batch, name)[1, :width].equal(getattr(alone, name)[0])
        assert (getattr(batch, name)[1, width:] == 0).all()
    assert batch.stats[1].equal(alone.stats[0])
    assert batch.status.tolist() == [int(Status.EMPTY), 0, int(Status.EMPTY)]
    packed = {n: x[0] if isinstance(x, Tensor) else x for n, x in inputs.items()}
    cu = torch.tensor([0, width], device=DEVICE, dtype=torch.int32)
    flat = shape(score, credit[0], mask[0], config, cu=cu, **packed)
    for name in TOKENS:
        assert getattr(flat, name).equal(getattr(alone, name)[0])


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["credit", "values", "logprobs", "token_rewards", "score", "bootstrap"])
@pytest.mark.parametrize(("lam", "on_nan"), [(0.0, "propagate"), (0.01, "propagate"), (1.0, "zero_row")])
def test_non_finite_inputs_have_the_references_pattern(
    bad: float, name: str, lam: float, on_nan: str
) -> None:
    score, credit, mask, inputs = problem(24, batch=2)
    inputs["bootstrap"] = torch.ones(2, device=DEVICE)
    mask[0, 18:22] = True
    config = ShapingConfig(lam=lam, on_nan=on_nan, kl_estimator="k3", kl_input_clip=3.0)
    fine = shape(score, credit, mask, config, **inputs)
    tensor = {"credit": credit, "score": score}.get(name, inputs.get(name))
    tensor[(0, 20) if tensor.ndim == 2 else 0] = bad
    actual = shape(score, credit, mask, config, **inputs)
    truth = expected(score, credit, mask, config, **inputs)
    assert actual.status.tolist() == truth.status.tolist()
    for output in TOKENS:
        assert_same_pattern(getattr(actual, output)[0], getattr(truth, output)[0])
        assert getattr(actual, output)[1].equal(getattr(fine, output)[1])


@pytest.mark.usefixtures("short_chunks")
def test_outputs_that_are_not_wanted_change_nothing() -> None:
    score, credit, mask, inputs = problem(40, batch=2)
    config = ShapingConfig(lam=0.95)
    whole = shape(score, credit, mask, config, **inputs)
    redistributed = shape(score, credit, mask, config, outputs=("rewards",), **inputs)
    assert redistributed.rewards.equal(whole.rewards)
    assert [name for name in EVERYTHING if getattr(redistributed, name) is not None] == ["rewards"]
    shaped = gae(whole.rewards, inputs["values"], mask, 1.0, 0.95)
    assert shaped.advantages.equal(whole.advantages)
    assert shaped.returns.equal(whole.returns)


def test_credit_falls_back_below_the_least_mass_only() -> None:
    score, mask = torch.ones(2, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    least = torch.full((2, 4), MIN_MASS / 4, device=DEVICE)
    least[1, 0] = 0
    out = shape(score, least, mask)
    assert out.status.tolist() == [0, int(Status.FALLBACK)]
    assert out.credit.tolist() == [[0.25] * 4, [0, 0, 0, 1]]
    length = shape(score, least, mask, ShapingConfig(normalization="sum_to_length"))
    assert length.credit.tolist() == [[1] * 4, [0, 0, 0, 4]]


def test_rows_may_lie_anywhere_in_memory() -> None:
    score, credit, mask, inputs = problem(20, batch=3)
    plain = shape(score, credit, mask, **inputs)
    tokens = {n: x.T.contiguous().T if isinstance(x, Tensor) else x for n, x in inputs.items()}
    logits = torch.stack([score, score + 1], 1)
    moved = shape(logits[:, 0], credit.T.contiguous().T, mask.T.contiguous().T, **tokens)
    for name in TOKENS:
        assert getattr(moved, name).equal(getattr(plain, name))


@pytest.mark.parametrize("index", [5, -1, 2**31 - 1, -(2**31), 2**62, -(2**62)])
def test_score_index_out_of_range(index: int) -> None:
    score, credit, mask, inputs = problem(5, batch=3)
    mask[0] = mask[2] = True
    mask[0, 2] = mask[1] = False
    at = torch.tensor([index, index, 1], device=DEVICE)
    out = shape(score, credit, mask, ShapingConfig(score_index=at), **inputs)
    bad = Status.OUT_OF_RANGE | Status.NONFINITE
    assert out.status.tolist() == [int(bad), int(Status.EMPTY), 0]
    for name in TOKENS:
        assert getattr(out, name)[0].isnan().equal(mask[0])
        assert (getattr(out, name)[1] == 0).all()


def test_rows_that_are_already_out_of_range_stay_so() -> None:
    score, credit, mask, inputs = problem(5, batch=2)
    mask[:] = True
    row_status = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
    out = shape(score, credit, mask, row_status=row_status, **inputs)
    assert out.status.tolist() == [0, int(Status.OUT_OF_RANGE | Status.NONFINITE)]
    assert all(getattr(out, name)[1].isnan().all() for name in TOKENS)


@pytest.mark.usefixtures("crossing_rows")
@pytest.mark.parametrize(
    ("bounds", "sound"),
    [
        ([0, 10, 5, 20, 30], [3]),
        ([-5, 10, 20, 30, 31], [1, 2]),
        ([0, 10, 20, 2**31 - 1, 30], [0, 1]),
        ([2**31 - 1, -(2**31), 2**31 - 1, 3, 1], []),
    ],
)
def test_response_cu_seqlens_out_of_range(bounds: list[int], sound: list[int]) -> None:
    score, credit, mask, inputs = problem(30)
    tokens = {n: x[0] if isinstance(x, Tensor) else x for n, x in inputs.items()}
    mask[:] = True
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    out = shape(score.expand(4), credit[0], mask[0], cu=cu, **tokens)
    owned = torch.zeros(30, dtype=torch.bool)
    for b in range(4):
        lo, hi = bounds[b], bounds[b + 1]
        if b not in sound:
            assert out.status[b] & int(Status.OUT_OF_RANGE)
            continue
        owned[lo:hi] = True
        part = {n: x[:, lo:hi] if isinstance(x, Tensor) else x for n, x in inputs.items()}
        alone = shape(score, credit[:, lo:hi], mask[:, lo:hi], **part)
        assert out.rewards[lo:hi].equal(alone.rewards[0])
        assert out.advantages[lo:hi].equal(alone.advantages[0])
    stray = out.rewards[~owned]
    assert (stray.isnan() | (stray == 0)).all()


@pytest.mark.parametrize(("batch", "width"), [(0, 3), (2, 0)])
def test_empty_shapes(batch: int, width: int) -> None:
    score, credit, mask, inputs = problem(width, batch)
    out = shape(score, credit, mask, **inputs)
    assert out.rewards.shape == (batch, width)
    assert out.status.tolist() == [int(Status.EMPTY)] * batch
    assert (out.stats == 0).all()
