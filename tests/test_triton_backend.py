"""The Triton backend against the float64 reference: interpreted on a CPU, compiled on a GPU."""

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
import csrc_triton
from attnshape import AttentionInputs, ShapingConfig, Status, reference, triton_backend
from attnshape.tolerance import credit_bound, gae_bound

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@settings(max_examples=30)
@given(problems())
def test_shape_rewards(problem: Problem) -> None:
    check_shaped(problem, "triton", DEVICE)


@settings(max_examples=10)
@given(problems())
def test_row_and_credit_alone(problem: Problem) -> None:
    layers = [problem.inputs, dataclasses.replace(problem.inputs, scaling=0.15)]
    there = mapped(layers, lambda x: x.to(DEVICE))
    want = reference.attention_row(to_float64(layers))
    got = attnshape.attention_row(there, backend="triton").cpu()
    assert_within("row", got, want, credit_bound(want, problem.max_score))
    names = ("response_mask", "response_start", "response_index", "response_cu_seqlens")
    kwargs = {name: problem.kwargs[name] for name in names if name in problem.kwargs}
    want = reference.attention_credit(to_float64(layers), **kwargs)
    kwargs_there = mapped(kwargs, lambda x: x.to(DEVICE))
    got = attnshape.attention_credit(there, **kwargs_there, backend="triton").cpu()
    for got_row, row in zip(rows_of(got, kwargs), rows_of(want, kwargs), strict=True):
        assert_within("credit", got_row, row, credit_bound(row, problem.max_score))


@pytest.mark.parametrize("width", [1, 511, 512, 513, 3000])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.0)])
@pytest.mark.parametrize("semantics", ["skip", "zero"])
def test_gae(width: int, gamma: float, lam: float, semantics: str) -> None:
    g = torch.Generator().manual_seed(width)
    arguments: dict[str, Any] = {
        "rewards": torch.randn(2, width, generator=g) + 1,
        "values": torch.randn(2, width, generator=g),
        "response_mask": torch.rand(2, width, generator=g) > 0.1,
        "bootstrap": torch.randn(2, generator=g),
    }
    kwargs: dict[str, Any] = {"gamma": gamma, "lam": lam, "mask_semantics": semantics}
    there = mapped(arguments, lambda x: x.to(DEVICE))
    got = attnshape.gae(**there, **kwargs, backend="triton")
    want = reference.gae(**to_float64(arguments), **kwargs)
    for name, x, expected in zip(("advantages", "returns"), got, want, strict=True):
        assert_within(name, x.cpu(), expected, gae_bound(expected, gamma, lam))


def test_gae_of_131072_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    arguments = {
        "rewards": torch.randn(1, 131072, generator=g) + 1,
        "values": torch.randn(1, 131072, generator=g),
        "response_mask": torch.ones(1, 131072),
    }
    there = mapped(arguments, lambda x: x.to(DEVICE))
    got = attnshape.gae(**there, gamma=1.0, lam=1.0, mask_semantics="skip", backend="triton")
    want = reference.gae(**to_float64(arguments), gamma=1.0, lam=1.0, mask_semantics="skip")
    for name, x, expected in zip(("advantages", "returns"), got, want, strict=True):
        assert_within(name, x.cpu(), expected, gae_bound(expected, 1.0, 1.0))


@pytest.mark.parametrize("where", ["key", "score", "values", "logprobs", "token_rewards"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("on_nan", ["propagate", "zero_row"])
def test_non_finite_inputs_stay_in_their_row(where: str, value: float, on_nan: str) -> None:
    problem = make_problem(5, batch=3, holes=False, config=ShapingConfig(on_nan=on_nan))
    problem.kwargs["response_mask"][1, 0] = 1
    if where == "key":
        key = problem.inputs.key.clone()
        key[1, 0, int(problem.kwargs["response_start"][1])] = value
        problem.inputs = dataclasses.replace(problem.inputs, key=key)
    elif where == "score":
        problem.score[1] = value
    else:
        problem.kwargs[where][1, 0] = value
    check_shaped(problem, "triton", DEVICE)


@pytest.mark.parametrize("value", [-1, -(2**31), 23, 24, 2**31 - 1])
@pytest.mark.parametrize(
    "where", ["response_start", "response_index", "query_position", "score_index", "response_cu_seqlens"]
)
def test_indices_out_of_range(where: str, value: int) -> None:
    problem = make_problem(7, holes=False, attention_mask=False, use_index=where == "response_index")
    problem.kwargs["response_mask"][:, :2] = 1
    if where == "response_cu_seqlens":
        problem = pack(problem)
    if where == "score_index":
        problem.config = ShapingConfig(score_index=torch.tensor([0, value, 0]))
    elif where == "query_position":
        assert isinstance(problem.inputs.query_position, torch.Tensor)
        problem.inputs.query_position[1] = value
    else:
        problem.kwargs[where][1] = value
    check_shaped(problem, "triton", DEVICE)


@pytest.mark.parametrize("distance", [60.0, 75.0, 300.0])
def test_credit_underflows_where_the_reference_says(distance: float) -> None:
    check_shaped(distant_response(distance), "triton", DEVICE)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    batch = shape[0]
    out = attnshape.shape_rewards(
        torch.randn(batch, device=DEVICE),
        AttentionInputs(
            torch.randn(batch, 2, 8, device=DEVICE), torch.randn(batch, 1, 5, 8, device=DEVICE), 1.0
        ),
        values=torch.randn(shape, device=DEVICE),
        response_mask=torch.ones(shape, device=DEVICE),
        response_start=torch.zeros(batch, dtype=torch.int32, device=DEVICE),
        backend="triton",
    )
    assert out.rewards.shape == out.advantages.shape == shape
    assert out.status.tolist() == [Status.EMPTY] * batch


def test_what_the_kernels_cannot_do_goes_elsewhere() -> None:
    def reason(heads: int, width: int, dtype: torch.dtype = torch.float32) -> str | None:
        query, key = (torch.zeros(1, h, 2, width, dtype=dtype, device=DEVICE) for h in (heads, 1))
        return triton_backend.unsupported([AttentionInputs(query, key, 1.0)])

    assert reason(64, 256) is None
    assert reason(1, 264) == "the head width is 264, the kernels' limit 256"
    assert reason(65, 8) == "65 query heads share a key head, the kernels' limit is 64"
    assert "float64" in str(reason(1, 8, torch.float64))


def test_auto_is_triton_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = triton_backend.gae
    monkeypatch.setattr(triton_backend, "gae", lambda *args: (called.append(1), original(*args))[1])
    ones = torch.ones(1, 3, device=DEVICE)
    attnshape.gae(ones, ones, ones, gamma=1.0, lam=1.0, mask_semantics="skip")
    assert bool(called) == (DEVICE.type == "cuda")
    attnshape.gae(ones, ones, ones, gamma=1.0, lam=1.0, mask_semantics="skip", backend="triton")
    assert called


def response_of(problem: Problem) -> dict[str, Any]:
    names = ("response_mask", "response_start", "response_index", "response_cu_seqlens")
    return {name: problem.kwargs[name] for name in names if name in problem.kwargs}


@settings(max_examples=12)
@given(
    problems(whole_query=True, use_index=False), st.sampled_from(["mean", "last"]), st.sampled_from([0, 1])
)
def test_column_credit(problem: Problem, variant: str, shift: int) -> None:
    kwargs = response_of(problem)
    options = {"variant": variant, "shift": shift, "normalization": problem.config.normalization}
    want = reference.attention_column_credit(to_float64(problem.inputs), **kwargs, **options)
    inputs, there = mapped([problem.inputs, kwargs], lambda x: x.to(DEVICE))
    got = attnshape.attention_column_credit(inputs, **there, **options, backend="triton").cpu()
    for got_row, row in zip(rows_of(got, kwargs), rows_of(want, kwargs), strict=True):
        assert_within("credit", got_row, row, credit_bound(row, problem.max_score))


@settings(max_examples=8)
@given(problems(whole_query=True), st.integers(1, 2))
def test_rollout(problem: Problem, count: int) -> None:
    kwargs = response_of(problem)
    layers = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(count)]
    want = reference.attention_rollout(to_float64(layers), **kwargs)
    there, kwargs_there = mapped([layers, kwargs], lambda x: x.to(DEVICE))
    got = attnshape.attention_rollout(there, **kwargs_there, backend="triton").cpu()
    for got_row, row in zip(rows_of(got, kwargs), rows_of(want, kwargs), strict=True):
        assert_within("credit", got_row, row, count * credit_bound(row, problem.max_score))


def test_columns_and_rollout_run_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("column_credit_raw", "rollout_raw"):
        function = getattr(csrc_triton, name)
        monkeypatch.setattr(
            csrc_triton, name, lambda *a, f=function, **k: (called.append(f.__name__), f(*a, **k))[1]
        )
    problem = make_problem(0, batch=1, whole_query=True)
    inputs, kwargs = mapped([problem.inputs, response_of(problem)], lambda x: x.to(DEVICE))
    attnshape.attention_column_credit(inputs, **kwargs, backend="triton")
    attnshape.attention_rollout([inputs], **kwargs, backend="triton")
    assert called == ["column_credit_raw", "rollout_raw"]
