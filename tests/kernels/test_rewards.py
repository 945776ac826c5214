import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnshape import reference
from attnshape.tolerance import CREDIT_SUM, credit_bound, error_fraction, gae_bound, kl_bound, reward_bound
from attnshape.types import MIN_MASS, Response, ShapedRewards, ShapingConfig, Status, float32_rounded
from csrc_triton import Shaped, sweep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING = ("rewards", "advantages", "returns", "credit", "kl", "status", "stats")
TOKENS = EVERYTHING[:5]


def decay(gamma: float, lam: float | Tensor) -> float | Tensor:
    if isinstance(lam, Tensor):
        return (gamma * lam.double()).float()
    return float32_rounded(gamma * lam)


def shape(score, credit, mask, config=None, outputs=EVERYTHING, cu=None, **inputs) -> Shaped:
    """``sweep`` as ``shape_rewards`` is called."""
    config = config or ShapingConfig()
    lam_value = config.lam_value
    return sweep(
        Response(mask, cu_seqlens=cu),
        outputs,
        score=score,
        credit=credit,
        normalization=config.normalization,
        score_index=config.score_index,
        beta=config.beta,
        score_bounds=config.score_bounds,
        kl_estimator=config.kl_estimator,
        kl_input_clip=config.kl_input_clip,
        kl_output_clip=config.kl_output_clip if "kl" not in inputs else None,
        gamma=float32_rounded(config.gamma),
        gl=decay(config.gamma, config.lam),
        gl_value=None if lam_value is None else decay(config.gamma, lam_value),
        skip_masked=config.mask_semantics == "skip",
        zero_nonfinite=config.on_nan == "zero_row",
        min_mass=MIN_MASS,
        **inputs,
    )


def expected(score, credit, mask, config=None, cu=None, **inputs) -> ShapedRewards:
    def exact(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return reference.shape_rewards(
        exact(score),
        exact(credit),
        response_mask=mask,
        response_cu_seqlens=cu,
        config=config,
        **{name: exact(x) for name, x in inputs.items()},
    )


def padded(x: Tensor, cu: Tensor | None) -> Tensor:
    """Rows of a packed tensor, as the bounds want them."""
    if cu is None:
        return x
    return torch.nn.utils.rnn.pad_sequence(x.split(cu.diff().tolist()), batch_first=True)


def assert_close(actual: Shaped, truth: ShapedRewards, config: ShapingConfig, inputs: dict, cu=None) -> None:
    def check(name: str, bound: Tensor) -> None:
        x, y = padded(getattr(actual, name), cu), padded(getattr(truth, name), cu)
        fraction = error_fraction(x, y, bound)
        assert fraction.numel() == 0 or fraction.max() <= 1, name

    def at(x: Tensor) -> Tensor:
        return padded(x.double().nan_to_num(0, 0, 0), cu)

    credit, kl = at(truth.credit), None
    if truth.kl is not None:
        kl = at(truth.kl)
        ratio = kl
        if "logprobs" in inputs:
            ratio = at(inputs["logprobs"].double() - inputs["ref_logprobs"].double())
        check("kl", kl_bound(kl, ratio))
    check("credit", credit_bound(credit))
    terms = [credit * 10, *(at(x) for n, x in inputs.items() if n == "token_rewards")]
    terms += [] if kl is None else [kl]
    check("rewards", reward_bound(at(truth.rewards), *terms))
    for name, lam in (("advantages", config.lam), ("returns", config.lam_value)):
        gap = config.lam if lam is None else lam
        if "values" not in inputs:
            gap = 1.0
        rows = at(getattr(truth, name))
        # What cancels in a reward is no smaller in its sums.
        noise = sum(error.abs().sum(-1, keepdim=True) for error in terms) * 1e-6
        check(name, gae_bound(rows, config.gamma, gap) + noise)
    assert actual.status.tolist() == truth.status.tolist()
    sound = truth.status & int(Status.NONFINITE) == 0
    entropy, last_share, _, error = actual.stats.double()[sound].T
    stats = truth.row_stats
    torch.testing.assert_close(entropy, stats.entropy.double()[sound], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last_share, stats.last_share.double()[sound], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(error, stats.score_error.double()[sound], atol=1e-5, rtol=1e-5)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["csrc_triton.host.attention"], "CHUNK", 16)


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
        beta=draw(st.sampled_from([0.0, 0.8, 1.0])),
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
    actual = shape(score, credit, mask, config, cu=cu, **inputs)
    assert (actual.kl is not None) == ("kl" in inputs or "logprobs" in inputs)
    assert_close(actual, expected(score, credit, mask, config, cu=cu, **inputs), config, inputs, cu)


def problem(width: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    names = ("values", "logprobs", "ref_logprobs", "token_rewards")
    inputs = {name: torch.randn(batch, width, generator=generator).to(DEVICE) for name in names}
    inputs["kl_coef"] = 0.1
    score = torch.randn(batch, generator=generator).to(DEVICE)
    credit = torch.rand(batch, width, generator=generator).to(DEVICE) ** 4
    mask = (torch.rand(batch, width, generator=generator) < 0.8).to(DEVICE)
    return score, credit, mask, inputs


@pytest.mark.parametrize("width", [511, 512, 513])
@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_lengths_around_a_chunk(width: int, lam: float) -> None:
    score, credit, mask, inputs = problem(width)
    config = ShapingConfig(lam=lam, kl_estimator="k3")
    truth = expected(score, credit, mask, config, **inputs)
    assert_close(shape(score, credit, mask, config, **inputs), truth, config, inputs)


@pytest.mark.parametrize("mask_semantics", ["skip", "zero"])
def test_long_rows_at_gamma_and_lam_one(mask_semantics: str) -> None:
    width = 131072
    score, credit, mask, inputs = problem(width)
    config = ShapingConfig(lam=1.0, mask_semantics=mask_semantics)
    truth = expected(score, credit, mask, config, **inputs)
    actual = shape(score, credit, mask, config, **inputs)
    for name in ("advantages", "returns"):
        x, y = getattr(actual, name), getattr(truth, name)
        assert error_fraction(x, y, gae_bound(y, 1.0, 1.0)).max() <= 1
    assert abs(actual.credit.double().sum() - 1) <= CREDIT_SUM
    assert error_fraction(actual.credit, truth.credit, credit_bound(truth.credit)).max() <= 1


def test_the_general_scan_has_the_bits_of_the_unit_one_or_its_accuracy() -> None:
    score, credit, mask, inputs = problem(1100)
    rows = ShapingConfig(lam=torch.ones(1, device=DEVICE))
    number = ShapingConfig(lam=1.0)
    general, unit = (shape(score, credit, mask, config, **inputs) for config in (rows, number))
    truth = expected(score, credit, mask, number, **inputs)
    for name in ("advantages", "returns"):
        y = getattr(truth, name)
        for x in (getattr(general, name), getattr(unit, name)):
            assert error_fraction(x, y, gae_bound(y, 1.0, 1.0)).max() <= 1


@pytest.mark.usefixtures("short_chunks")
def test_bits_do_not_depend_on_padding_neighbours_or_memory() -> None:
    width = 37
    score, credit, mask, inputs = problem(width)
    config = ShapingConfig(gamma=0.99, kl_estimator="k3")
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


def assert_same_pattern(actual: Tensor, truth: Tensor) -> None:
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    assert (same | (actual.isfinite() & truth.isfinite())).all()


def gae(rewards: Tensor, values: Tensor | None, mask: Tensor, gamma: float, lam: float) -> Shaped:
    return sweep(
        Response(mask),
        ("advantages", "returns"),
        token_rewards=rewards,
        values=values,
        gamma=gamma,
        gl=decay(gamma, lam),
        min_mass=MIN_MASS,
    )


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("lam", "left"), [(2.0**-10, math.inf), (0.0, math.nan)])
def test_infinity_reaches_the_left_end_where_powers_underflow(lam: float, left: float) -> None:
    rewards = torch.zeros(1, 200, device=DEVICE)
    rewards[0, 190] = math.inf
    mask = torch.ones(1, 200, device=DEVICE)
    actual = gae(rewards, torch.zeros_like(rewards), mask, 1.0, lam)
    truth, _ = reference.gae(
        rewards.double(), torch.zeros(1, 200), mask, gamma=1.0, lam=lam, mask_semantics="skip"
    )
    assert truth[0, 0] == left or truth[0, 0].isnan()
    assert_same_pattern(actual.advantages, truth)


@pytest.mark.usefixtures("short_chunks")
def test_outputs_that_are_not_wanted_change_nothing() -> None:
    score, credit, mask, inputs = problem(40, batch=2)
    whole = shape(score, credit, mask, **inputs)
    redistributed = shape(score, credit, mask, outputs=("rewards",), **inputs)
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
