"""``attention_rollout`` of every backend against the float64 reference."""

import dataclasses

import torch
from hypothesis import strategies as st
from support.backends import drawn, here, there
from support.problems import Problem, assert_within, problems, to_float64

import attnshape
from attnshape import reference
from attnshape.tolerance import credit_bound


@drawn(problems(whole_query=True), st.booleans(), st.integers(1, 3), torch=40, triton=8)
def test_rollout(backend: str, problem: Problem, weighted: bool, count: int) -> None:
    torch.manual_seed(0)
    layers = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(count)]
    if weighted:
        shape, heads, packed = problem.inputs.key.shape, problem.inputs.query.shape[1], problem.inputs.packed
        norms = (shape[0], heads) if packed else (shape[0], heads, shape[2])
        residual = shape[:1] if packed else (shape[0], shape[2])
        layers = [
            dataclasses.replace(x, value_norm=torch.rand(norms), residual_norm=torch.rand(residual) + 0.5)
            for x in layers
        ]
    want = reference.attention_rollout(to_float64(layers), problem.response)
    got = here(attnshape.attention_rollout(there(layers), there(problem.response), backend=backend))
    for got_row, row in zip(problem.rows(got), problem.rows(want), strict=True):
        assert_within("credit", got_row, row, count * credit_bound(row, problem.max_score))
