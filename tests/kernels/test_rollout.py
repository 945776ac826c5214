"""Rollout in Triton against the float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.columns import check_rollout, layouts, norms_of, rollout
from support.problems import Problem, make_problem

from csrc_triton.host import rollout as launches


@settings(max_examples=8)
@given(layouts(), st.booleans(), st.integers(1, 3))
def test_rollout_is_the_reference(problem: Problem, weighted: bool, count: int) -> None:
    layers = [replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(count)]
    check_rollout(layers, problem, norms_of(problem, count) if weighted else {})


def test_layers_of_a_rollout_may_differ() -> None:
    sizes = {"batch": 2, "keys": 140, "width": 70, "heads": 2, "kv_heads": 1}
    problem = make_problem(3, **sizes, whole_query=True, left_padding=True)
    assert problem.inputs.attention_mask is not None
    sparser = problem.inputs.attention_mask * (torch.arange(140) % 3 != 1)
    layers = [
        replace(problem.inputs, sliding_window=50),
        replace(problem.inputs, attention_mask=sparser, softcap=3.0),
        replace(problem.inputs, key_start=torch.tensor([90, 2]), attention_mask=None),
        replace(problem.inputs, query_position="last_response"),
    ]
    layers = [replace(x, key=problem.inputs.key.nan_to_num(0.5)) for x in layers]
    for norms in ({}, norms_of(problem, 4)):
        check_rollout(layers, problem, norms)


def test_tiles_without_a_query_that_counts_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 tiles of queries only the one that holds the position is asked in a rollout's highest layer."""
    sizes = {"batch": 1, "keys": 300, "width": 20, "heads": 1, "kv_heads": 1}
    problem = make_problem(2, **sizes, holes=False, whole_query=True)
    problem.credit = replace(problem.inputs, key=problem.inputs.key.nan_to_num(0.5), attention_mask=None)
    problem.credit = replace(problem.inputs, query_position=torch.tensor([290]), query=problem.inputs.query)
    filled = []
    normalizer = launches.row_normalizers

    def spied(*args: Any, **kwargs: Any) -> Any:
        out = normalizer(*args, **kwargs)
        filled.append(out[0][0].isfinite().cpu())
        return out

    monkeypatch.setattr(launches, "row_normalizers", spied)
    rollout([problem.inputs], problem)
    # What no program wrote is NaN.
    assert filled[0].nonzero().flatten().tolist() == [290]
