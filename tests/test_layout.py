"""Where rows lie: what every backend does with indices that point outside, and with nothing."""

import dataclasses

import pytest
import torch
from support.backends import BACKENDS, DEVICE, each_backend, each_backend_with, here, there
from support.problems import check_shaped, make_problem, pack

import attnshape
from attnshape import AttentionInputs, Response, ShapingConfig, Status, reference

SKIP = ShapingConfig(lam=0.9)


def with_row(x: torch.Tensor, value: int) -> torch.Tensor:
    x = x.clone()
    x.view(3, -1)[1, 0] = value
    return x


def with_bound(x: torch.Tensor, value: int) -> torch.Tensor:
    x = x.clone()
    x[1] = value
    return x


@pytest.mark.usefixtures("crossing_rows")
@each_backend_with(
    value=[-1, -(2**31), 23, 24, 2**31 - 1],
    packed=[False, True],
    where=[
        "start",
        "index",
        "query_position",
        "key_start",
        "score_index",
        "cu_seqlens",
        "response.cu_seqlens",
    ],
)
def test_indices_out_of_range(backend: str, where: str, value: int, packed: bool) -> None:
    problem = make_problem(7, holes=False, attention_mask=False, use_index=where == "index")
    problem.response.mask[:, :2] = 1
    if packed or "cu_seqlens" in where:
        problem = pack(problem)
    response, inputs = problem.response, problem.inputs
    if where in ("start", "index"):
        replaced = with_row(getattr(response, where), value)
        problem.response = dataclasses.replace(response, **{where: replaced})
    elif where == "response.cu_seqlens":
        assert response.cu_seqlens is not None
        problem.response = dataclasses.replace(response, cu_seqlens=with_bound(response.cu_seqlens, value))
    elif where == "score_index":
        problem.config = ShapingConfig(score_index=torch.tensor([0, value, 0]))
    else:
        replaced = with_bound(getattr(inputs, where), value)
        problem.credit = dataclasses.replace(inputs, **{where: replaced})
    check_shaped(problem, backend, DEVICE)
    row = attnshape.attention_row(there(problem.inputs), backend=backend)
    torch.testing.assert_close(here(row), reference.attention_row(problem.inputs), equal_nan=True)
    values, place = (
        problem.given["values"],
        Response(problem.response.mask, cu_seqlens=problem.response.cu_seqlens),
    )
    got = attnshape.gae(there(values), None, there(place), SKIP, backend=backend)
    want = reference.gae(values, None, place, SKIP)
    torch.testing.assert_close(here(got)[:2], want[:2], equal_nan=True)


@each_backend
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    batch = shape[0]
    inputs = AttentionInputs(torch.randn(batch, 2, 8), torch.randn(batch, 1, 5, 8), 1.0)
    response = Response(torch.ones(shape), start=torch.zeros(batch, dtype=torch.int32))
    score, inputs, response, values = there([torch.randn(batch), inputs, response, torch.randn(shape)])
    out = attnshape.shape_rewards(score, inputs, response, values=values, backend=backend)
    assert out.rewards.shape == out.advantages.shape == out.credit.shape == shape
    assert out.status.tolist() == [Status.EMPTY] * batch
    assert all(value.isfinite() for value in out.metrics.values())
    assert attnshape.attention_row(inputs, backend=backend).shape == (batch, 5)
    assert attnshape.whiten(out.advantages, response, backend=backend).shape == shape


def test_every_backend_is_tried() -> None:
    assert {*BACKENDS, "auto"} == set(attnshape.checks.CHOICES["backend"])
