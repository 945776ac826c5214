"""``attention_row`` and ``attention_credit`` of every backend against the float64 reference."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st
from support.backends import DEVICE, drawn, each_backend, here, there
from support.problems import Problem, assert_within, check_shaped, distant_response, problems, to_float64

import attnshape
from attnshape import AttentionInputs, Status, reference
from attnshape.tolerance import credit_bound


@drawn(problems(), st.integers(1, 2), cpu=40, torch=40, triton=10)
def test_row_and_credit_alone(backend: str, problem: Problem, layers: int) -> None:
    inputs = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(layers)]
    want = reference.attention_row(to_float64(inputs))
    got = here(attnshape.attention_row(there(inputs), backend=backend))
    assert_within("row", got, want, credit_bound(want, problem.max_score))
    want = reference.attention_credit(to_float64(inputs), problem.response)
    got = here(attnshape.attention_credit(there(inputs), there(problem.response), backend=backend))
    for got_row, row in zip(problem.rows(got), problem.rows(want), strict=True):
        assert_within("credit", got_row, row, credit_bound(row, problem.max_score))


@each_backend
@pytest.mark.parametrize("distance", [60.0, 75.0, 300.0])
def test_credit_underflows_where_the_reference_says(backend: str, distance: float) -> None:
    problem = distant_response(distance)
    check_shaped(problem, backend, DEVICE)
    status = there(problem).shaped(attnshape.shape_rewards, backend=backend).status
    assert bool(status & int(Status.FALLBACK)) == (distance > 70)


@each_backend
def test_no_keys_at_all(backend: str) -> None:
    inputs = AttentionInputs(torch.randn(2, 2, 8, device=DEVICE), torch.randn(2, 1, 0, 8, device=DEVICE), 1.0)
    assert attnshape.attention_row(inputs, backend=backend).shape == (2, 0)
