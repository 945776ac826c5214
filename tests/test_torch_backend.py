"""The vectorised PyTorch backend against the float64 reference."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import (
    Problem,
    assert_within,
    check_shaped,
    distant_response,
    make_problem,
    mapped,
    pack,
    problems,
    rows_of,
    to_float64,
)

import attnshape
from attnshape import AttentionInputs, ShapingConfig, Status, reference
from attnshape.tolerance import credit_bound, gae_bound

F64 = torch.float64


@settings(max_examples=150)
@given(problems())
def test_shape_rewards(problem: Problem) -> None:
    check_shaped(problem, "torch")


@settings(max_examples=40)
@given(problems(), st.integers(1, 2))
def test_row_and_credit_alone(problem: Problem, layers: int) -> None:
    inputs = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(layers)]
    want = reference.attention_row(to_float64(inputs))
    got = attnshape.attention_row(inputs, backend="torch")
    assert_within("row", got, want, credit_bound(want, problem.max_score))
    names = ("response_mask", "response_start", "response_index", "response_cu_seqlens")
    kwargs = {name: problem.kwargs[name] for name in names if name in problem.kwargs}
    want = reference.attention_credit(to_float64(inputs), **kwargs)
    got = attnshape.attention_credit(inputs, **kwargs, backend="torch")
    for got_row, row in zip(rows_of(got, kwargs), rows_of(want, kwargs), strict=True):
        assert_within("credit", got_row, row, credit_bound(row, problem.max_score))


def response_arguments(problem: Problem) -> dict[str, Any]:
    names = ("response_mask", "response_start", "response_index", "response_cu_seqlens")
    return {name: problem.kwargs[name] for name in names if name in problem.kwargs}


@settings(max_examples=50)
@given(
    problems(whole_query=True, use_index=False), st.sampled_from(["mean", "last"]), st.sampled_from([0, 1])
)
def test_column_credit(problem: Problem, variant: str, shift: int) -> None:
    kwargs = response_arguments(problem) | {"variant": variant, "shift": shift}
    want = reference.attention_column_credit(to_float64(problem.inputs), **kwargs)
    got = attnshape.attention_column_credit(problem.inputs, **kwargs, backend="torch")
    for got_row, row in zip(rows_of(got, kwargs), rows_of(want, kwargs), strict=True):
        assert_within("credit", got_row, row, credit_bound(row, problem.max_score))


@settings(max_examples=40)
@given(problems(whole_query=True), st.booleans(), st.integers(1, 3))
def test_rollout(problem: Problem, weighted: bool, count: int) -> None:
    torch.manual_seed(0)
    layers = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(count)]
    kwargs = response_arguments(problem)
    if weighted:
        shape = problem.inputs.key.shape
        heads = problem.inputs.query.shape[1]
        packed = problem.inputs.packed
        norms = (shape[0], heads) if packed else (shape[0], heads, shape[2])
        residual = shape[:1] if packed else (shape[0], shape[2])
        layers = [
            dataclasses.replace(x, value_norm=torch.rand(norms), residual_norm=torch.rand(residual) + 0.5)
            for x in layers
        ]
    want = reference.attention_rollout(to_float64(layers), **to_float64(kwargs))
    got = attnshape.attention_rollout(layers, **kwargs, backend="torch")
    for got_row, row in zip(rows_of(got, kwargs), rows_of(want, kwargs), strict=True):
        assert_within("credit", got_row, row, count * credit_bound(row, problem.max_score))


def test_columns_and_rollout_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(3, whole_query=True, keys=40, width=30)
    kwargs = response_arguments(problem)
    columns = attnshape.attention_column_credit(problem.inputs, **kwargs)
    rollout = attnshape.attention_rollout([problem.inputs] * 2, **kwargs)
    row = attnshape.attention_row(problem.inputs)
    monkeypatch.setattr("attnshape.torch_backend.SCORE_ELEMENTS", 3 * 4 * 40 * 7)
    monkeypatch.setattr("attnshape.torch_backend.KEY_CHUNK", 16)
    torch.testing.assert_close(attnshape.attention_column_credit(problem.inputs, **kwargs), columns)
    torch.testing.assert_close(attnshape.attention_rollout([problem.inputs] * 2, **kwargs), rollout)
    torch.testing.assert_close(attnshape.attention_row(problem.inputs), row)


def gae_problem(rows: int, width: int, holes: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(width + holes)
    mask = torch.ones(rows, width, dtype=torch.bool)
    if holes:
        mask = torch.rand(rows, width, generator=g) > 0.1
    return {
        "rewards": torch.randn(rows, width, generator=g),
        "values": torch.randn(rows, width, generator=g),
        "response_mask": mask,
        "bootstrap": torch.randn(rows, generator=g),
    }


DECAYS = [(1.0, 1.0), (1.0, 0.95), (0.9999, 1.0), (0.5, 0.25), (0.9, 0.0)]


@pytest.mark.parametrize("width", [1, 31, 32, 33, 1024, 1025, 5000])
@pytest.mark.parametrize(("gamma", "lam"), DECAYS)
@pytest.mark.parametrize("semantics", ["skip", "zero"])
@pytest.mark.parametrize("holes", [True, False])
def test_gae_is_exact_at_any_length(
    width: int, gamma: float, lam: float, semantics: str, holes: bool
) -> None:
    check_gae(gae_problem(2, width, holes), gamma, lam, semantics)


@pytest.mark.parametrize(("gamma", "lam"), DECAYS[:3])
def test_gae_is_exact_at_131072_tokens(gamma: float, lam: float) -> None:
    check_gae(gae_problem(1, 131072, True), gamma, lam, "skip")
    problem = gae_problem(1, 131072, True)
    problem["rewards"] = problem["rewards"] / 10 + 1  # sums that grow, and with them a float32 carry's errors
    check_gae(problem, gamma, lam, "zero")


def check_gae(problem: dict[str, Any], gamma: float, lam: float, semantics: str) -> None:
    kwargs = {"gamma": gamma, "lam": lam, "mask_semantics": semantics}
    got = attnshape.gae(**problem, **kwargs, backend="torch")
    want = reference.gae(**to_float64(problem), **kwargs)
    for name, x, expected in zip(("advantages", "returns"), got, want, strict=True):
        assert_within(name, x, expected, gae_bound(expected, gamma, lam))


@pytest.mark.parametrize("lam", [1.0, 0.95, "per row"])
@pytest.mark.parametrize("holes", [False, True])
def test_bits_of_a_row_depend_on_nothing_else(
    lam: float | str, holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in any batch, however it is padded, however many rows are shaped at once."""
    rows, width = 7, 300
    g = torch.Generator().manual_seed(int(holes))
    lengths = torch.tensor([300, 1, 31, 33, 64, 65, 257])
    mask = torch.arange(width) < lengths[:, None]
    if holes:
        mask &= torch.rand(rows, width, generator=g) > 0.2
    names = ("credit", "values", "logprobs", "ref_logprobs", "token_rewards", "response_mask")
    tokens = dict(zip(names, torch.randn(6, rows, width, generator=g), strict=True))
    tokens |= {"credit": tokens["credit"].abs(), "response_mask": mask.float()}
    score, lams = torch.randn(rows, generator=g), torch.linspace(0.5, 1.0, rows)

    def shaped(which: slice, padding: int = 0) -> list[torch.Tensor]:
        padded = {name: torch.nn.functional.pad(x[which], (0, padding)) for name, x in tokens.items()}
        config = ShapingConfig(lam=lams[which] if isinstance(lam, str) else lam)
        out = attnshape.shape_rewards(score[which], **padded, kl_coef=0.1, config=config)
        return [x[:, :width] for x in (out.rewards, out.advantages, out.returns, out.credit, out.kl)]

    whole = shaped(slice(0, rows))
    for b in range(rows):
        for padding in (0, 1, 20, 700):
            for x, alone in zip(whole, shaped(slice(b, b + 1), padding), strict=True):
                assert torch.equal(x[b : b + 1], alone)
    monkeypatch.setattr("attnshape.torch_backend.BLOCK", 2 * width)
    assert all(torch.equal(x, y) for x, y in zip(whole, shaped(slice(0, rows)), strict=True))


def test_any_strides() -> None:
    g = torch.Generator().manual_seed(0)
    names = ("credit", "values", "logprobs", "ref_logprobs", "token_rewards", "response_mask")
    tokens = {name: torch.rand(5, 128, generator=g) for name in names}
    score = torch.randn(5, generator=g)

    def strided(x: torch.Tensor, how: int) -> torch.Tensor:
        wide = torch.full((5, 256), float("nan"))
        places = (wide.t().contiguous().t()[:, :128], wide[:, ::2], wide[:, 1:129])
        return places[how].copy_(x)

    want = attnshape.shape_rewards(score, **tokens, kl_coef=0.1)
    plain = {"gamma": 1.0, "lam": 0.9, "mask_semantics": "skip"}
    rewards, mask = tokens["token_rewards"], torch.ones(5, 128)
    wanted = attnshape.gae(rewards, None, mask, **plain)
    for how in range(3):
        places = {name: strided(x, how) for name, x in tokens.items()}
        out = attnshape.shape_rewards(score, **places, kl_coef=0.1)
        for name in ("rewards", "advantages", "returns", "credit", "kl"):
            assert torch.equal(getattr(out, name), getattr(want, name))
        got = attnshape.gae(strided(rewards, how), None, strided(mask, how), **plain)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_gae_per_row_lam_and_decoupled() -> None:
    problem = gae_problem(4, 700, True)
    kwargs = {
        "gamma": 0.99,
        "lam": torch.tensor([0.0, 0.01, 0.95, 1.0]),
        "lam_value": torch.tensor([1.0, 0.0, 1.0, 0.5]),
        "mask_semantics": "skip",
    }
    got = attnshape.gae(**problem, **kwargs, backend="torch")
    want = reference.gae(**to_float64(problem), **to_float64(kwargs))
    for name, x, expected, lam in zip(
        ("advantages", "returns"), got, want, ("lam", "lam_value"), strict=True
    ):
        assert_within(name, x, expected, gae_bound(expected, 0.99, kwargs[lam]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.01, 0.0])
@pytest.mark.parametrize("semantics", ["skip", "zero"])
def test_gae_carries_the_non_finite_as_the_recurrence_does(value: float, lam: float, semantics: str) -> None:
    problem = gae_problem(3, 2000, True)
    problem["response_mask"][:, 1900] = True
    problem["rewards"][0, 1900] = value
    problem["values"][1, 1900] = value
    kwargs = {"gamma": 1.0, "lam": lam, "mask_semantics": semantics}
    got = attnshape.gae(**problem, **kwargs, backend="torch")
    want = reference.gae(**to_float64(problem), **kwargs)
    for name, x, expected in zip(("advantages", "returns"), got, want, strict=True):
        assert_within(name, x, expected, gae_bound(expected, 1.0, lam))
    assert got[0][2].isfinite().all()


@pytest.mark.parametrize("where", ["key", "query", "score", "values", "logprobs", "token_rewards"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("on_nan", ["propagate", "zero_row"])
def test_non_finite_inputs_stay_in_their_row(where: str, value: float, on_nan: str) -> None:
    problem = make_problem(5, batch=3, holes=False, config=ShapingConfig(on_nan=on_nan))
    problem.kwargs["response_mask"][1, 0] = 1
    key = problem.inputs.key.clone()
    if where == "key":
        key[1, 0, int(problem.kwargs["response_start"][1])] = value
    problem.inputs = dataclasses.replace(problem.inputs, key=key)
    if where == "query":
        problem.inputs.query[1, 0, 0] = value
    elif where == "score":
        problem.score[1] = value
    elif where != "key":
        problem.kwargs[where][1, 0] = value
    check_shaped(problem, "torch")
    out = attnshape.shape_rewards(problem.score, problem.inputs, config=problem.config, **problem.kwargs)
    assert out.rewards[[0, 2]].isfinite().all()
    assert out.metrics["nan_rows"] == (out.status & int(Status.NONFINITE) != 0).sum()
    if on_nan == "zero_row":
        assert out.advantages.isfinite().all()


def with_row(x: torch.Tensor, value: int) -> torch.Tensor:
    x = x.clone()
    x[1] = value
    return x


@pytest.mark.parametrize("value", [-1, -(2**31), 23, 24, 2**31 - 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        "response_start",
        "response_index",
        "query_position",
        "key_start",
        "score_index",
        "cu_seqlens",
        "response_cu_seqlens",
    ],
)
def test_indices_out_of_range(where: str, value: int, packed: bool) -> None:
    use_index = where == "response_index"
    problem = make_problem(7, holes=False, attention_mask=False, use_index=use_index)
    problem.kwargs["response_mask"][:, :2] = 1
    if packed or "cu_seqlens" in where:
        problem = pack(problem)
    if where in ("response_start", "response_cu_seqlens"):
        problem.kwargs[where] = with_row(problem.kwargs[where], value)
    elif where == "response_index":
        problem.kwargs[where] = problem.kwargs[where].clone()
        problem.kwargs[where].view(3, -1)[1, 0] = value
    elif where == "score_index":
        index = torch.tensor([0, value, 0])
        problem.config = ShapingConfig(score_index=index)
    else:
        replaced = with_row(getattr(problem.inputs, where), value)
        problem.inputs = dataclasses.replace(problem.inputs, **{where: replaced})
    check_shaped(problem, "torch")
    row = attnshape.attention_row(problem.inputs)
    want = reference.attention_row(problem.inputs)
    torch.testing.assert_close(row, want, equal_nan=True)
    gae = {"gamma": 1.0, "lam": 0.9, "mask_semantics": "skip"}
    gae |= {"response_cu_seqlens": problem.kwargs.get("response_cu_seqlens")}
    arguments = (problem.kwargs["values"], None, problem.kwargs["response_mask"])
    got, want = attnshape.gae(*arguments, **gae), reference.gae(*arguments, **gae)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    batch = shape[0]
    inputs = AttentionInputs(torch.randn(batch, 2, 8), torch.randn(batch, 1, 5, 8), 1.0)
    out = attnshape.shape_rewards(
        torch.randn(batch),
        inputs,
        values=torch.randn(shape),
        response_mask=torch.ones(shape),
        response_start=torch.zeros(batch, dtype=torch.int32),
    )
    assert out.rewards.shape == out.advantages.shape == out.credit.shape == shape
    assert out.status.tolist() == [Status.EMPTY] * batch
    assert all(value.isfinite() for value in out.metrics.values())
    assert attnshape.attention_row(inputs).shape == (batch, 5)
    assert attnshape.whiten(out.advantages, torch.ones(shape)).shape == shape


@pytest.mark.parametrize("distance", [60.0, 75.0, 300.0])
def test_credit_underflows_where_the_reference_says(distance: float) -> None:
    check_shaped(distant_response(distance), "torch")
    fell_back = attnshape.shape_rewards(
        torch.ones(1), distant_response(distance).inputs, **distant_response(distance).kwargs
    ).status
    assert bool(fell_back & int(Status.FALLBACK)) == (distance > 70)


def test_no_output_shares_memory_with_another() -> None:
    ones = torch.ones(2, 40)
    out = attnshape.shape_rewards(torch.ones(2), "uniform", response_mask=ones)
    pointers = {x.data_ptr() for x in (out.rewards, out.advantages, out.returns, out.credit, ones)}
    assert len(pointers) == 5


def test_no_keys_at_all() -> None:
    inputs = AttentionInputs(torch.randn(2, 2, 8), torch.randn(2, 1, 0, 8), 1.0)
    assert attnshape.attention_row(inputs).shape == (2, 0)


def test_outputs_are_detached() -> None:
    problem = make_problem(0)
    query = problem.inputs.query.requires_grad_()
    values = problem.kwargs["values"].requires_grad_()
    out = attnshape.shape_rewards(problem.score, problem.inputs, **problem.kwargs)
    assert query.requires_grad
    assert values.requires_grad
    assert not out.rewards.requires_grad
    assert not out.advantages.requires_grad


@settings(max_examples=40)
@given(problems(), st.sampled_from([torch.float32, F64]))
def test_moments_are_those_of_the_advantages(problem: Problem, dtype: torch.dtype) -> None:
    kwargs = mapped(problem.kwargs, lambda x: x.to(dtype) if x.is_floating_point() else x)
    score, place = problem.score.to(dtype), (kwargs["response_mask"], kwargs.get("response_cu_seqlens"))
    out = attnshape.shape_rewards(score, "uniform", config=to_float64(problem.config), **kwargs)
    moments = out.row_stats.advantage_moments
    assert moments.dtype == dtype
    want = reference.row_moments(out.advantages.double(), *place)
    torch.testing.assert_close(moments.double(), want, rtol=1e-5, atol=1e-5)
    options = {"gamma": 1.0, "lam": 0.9, "mask_semantics": "skip", "response_cu_seqlens": place[1]}
    rewards = out.rewards.masked_fill(place[0] == 0, float("nan"))
    advantages, returns, moments = attnshape.gae(rewards, None, place[0], **options, return_moments=True)
    torch.testing.assert_close(
        moments.double(), reference.row_moments(advantages.double(), *place), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(returns, attnshape.gae(rewards, None, place[0], **options)[1])
    whitened = attnshape.whiten(advantages, place[0], moments=moments)
    torch.testing.assert_close(whitened, attnshape.whiten(advantages, place[0]), rtol=1e-5, atol=1e-5)


def test_moments_of_lost_and_of_zeroed_rows() -> None:
    values = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    for on_nan, (mean, m2) in (("propagate", (float("nan"),) * 2), ("zero_row", (0.0, 0.0))):
        out = attnshape.shape_rewards(
            torch.ones(2),
            "sparse",
            values=values,
            response_mask=torch.ones(2, 2),
            config=ShapingConfig(on_nan=on_nan),
        )
        want = torch.tensor([2.0, mean, m2])
        torch.testing.assert_close(out.row_stats.advantage_moments[0], want, equal_nan=True)
        assert out.row_stats.advantage_moments[1].isfinite().all()


@pytest.mark.parametrize("bessel", [True, False])
@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_whiten(bessel: bool, eps_mode: str, shift_mean: bool, count: int) -> None:
    g = torch.Generator().manual_seed(count)
    x = torch.randn(5, 8, generator=g) * 3 + 100
    mask = torch.zeros(40)
    mask[torch.randperm(40, generator=g)[:count]] = 1
    mask = mask.view(5, 8)
    kwargs = {"bessel": bessel, "eps_mode": eps_mode, "shift_mean": shift_mean}
    got = attnshape.whiten(x.masked_fill(mask == 0, float("nan")), mask, **kwargs)
    want = reference.whiten(x.double(), mask, **kwargs)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    moments = reference.row_moments(x.double(), mask)
    folded = attnshape.whiten(x.masked_fill(mask == 0, float("nan")), mask, moments=moments, **kwargs)
    torch.testing.assert_close(folded, got)
    kept = attnshape.whiten(x, mask, zero_masked=False, **kwargs)
    want = reference.whiten(x.double(), mask, zero_masked=False, **kwargs)
    torch.testing.assert_close(kept.double(), want, rtol=1e-6, atol=1e-6)
