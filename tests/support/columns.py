"""Columns and rollouts by the kernels, and the same by the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from support.problems import Problem, assert_within, make_problem, mapped, pack, to_float64
from torch import Tensor

from attnshape import AttentionInputs, Status, reference
from attnshape.tolerance import credit_bound
from attnshape.types import Response
from csrc_triton import column_credit_raw, rollout_raw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def response_of(problem: Problem) -> Response:
    response: Response = mapped(problem.response, lambda x: x.to(DEVICE))
    return response


def columns(problem: Problem, variant: str = "mean", shift: int = 0) -> tuple[Tensor, Tensor]:
    """Raw credit and status of each row."""
    there = mapped(problem.inputs, lambda x: x.to(DEVICE))
    raw, status = column_credit_raw(there, response_of(problem), variant=variant, shift=shift)
    return raw.cpu(), status.cpu()


def rollout(layers: list[AttentionInputs], problem: Problem, **norms: Any) -> tuple[Tensor, Tensor]:
    layers, norms = mapped([layers, norms], lambda x: x.to(DEVICE))
    raw, status = rollout_raw(layers, response_of(problem), **norms)
    return raw.cpu(), status.cpu()


def check(problem: Problem, got: Tensor, want: Tensor, factor: int = 1) -> None:
    for got_row, row in zip(problem.rows(got), problem.rows(want), strict=True):
        assert_within("raw", got_row, row, factor * credit_bound(row, problem.max_score))


def check_columns(problem: Problem, variant: str = "mean", shift: int = 0) -> Tensor:
    raw, status = columns(problem, variant, shift)
    options = {"variant": variant, "shift": shift, "normalization": "none"}
    want = reference.attention_column_credit(to_float64(problem.inputs), problem.response, **options)
    check(problem, raw, want)
    lost = torch.tensor([bool(row.isnan().any()) for row in problem.rows(want)])
    assert (status[lost] == Status.OUT_OF_RANGE).all()
    return raw


def norms_of(problem: Problem, count: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    key, heads = problem.inputs.key, problem.inputs.query.shape[1]
    tokens = key.shape[:1] if problem.inputs.packed else (key.shape[0], key.shape[2])
    shape = (*tokens[:1], heads, *tokens[1:])
    return {
        "value_norms": [torch.rand(shape, generator=generator) for _ in range(count)],
        "residual_norms": [torch.rand(tokens, generator=generator) + 0.5 for _ in range(count)],
    }


def check_rollout(layers: list[AttentionInputs], problem: Problem, norms: dict[str, Any]) -> Tensor:
    raw, _ = rollout(layers, problem, **norms)
    if norms:
        pairs = zip(layers, norms["value_norms"], norms["residual_norms"], strict=True)
        layers = [replace(x, value_norm=v, residual_norm=r) for x, v, r in pairs]
    want = reference.attention_rollout(to_float64(layers), problem.response, normalization="none")
    check(problem, raw, want, len(layers))
    return raw


@st.composite
def layouts(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Layers with every query, around the sizes of a tile."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    kv_heads, group = pick((1, 1), (2, 2), (1, 5))
    keys = pick(1, 40, 129, 160)
    dtype = pick(torch.float32, torch.float16, torch.bfloat16)
    arguments = {
        "batch": pick(1, 2),
        "keys": keys,
        "width": pick(keys, (keys + 1) // 2),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": pick(8, 24, 80, 192),
        "left_padding": draw(st.booleans()),
        "holes": draw(st.booleans()),
        "attention_mask": draw(st.booleans()),
        "softcap": pick(None, 5.0),
        "sliding_window": pick(None, 1, 30, 150),
        "sinks": draw(st.booleans()),
        "lse": draw(st.booleans()),
        "head_mask": draw(st.booleans()),
        "dtype": dtype,
    }
    if draw(st.booleans()):  # keys of padding are only hidden by a mask
        arguments |= {"causal": False, "lse": False, "attention_mask": True}
    problem = make_problem(draw(st.integers(0, 2**16)), whole_query=True, **(arguments | fixed))
    return pack(problem) if draw(st.booleans()) else problem


def assert_same_pattern(problem: Problem, raw: Tensor) -> None:
    want = reference.attention_column_credit(
        to_float64(problem.inputs), problem.response, normalization="none"
    )
    assert raw.isnan().equal(want.isnan())
