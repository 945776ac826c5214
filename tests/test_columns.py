"""``attention_column_credit`` of every backend against the float64 reference."""

import pytest
from hypothesis import strategies as st
from support.backends import drawn, here, there
from support.problems import Problem, assert_within, make_problem, problems, to_float64
from torch.testing import assert_close

import attnshape
from attnshape import reference
from attnshape.tolerance import credit_bound


@drawn(
    problems(whole_query=True, use_index=False),
    st.sampled_from(["mean", "last"]),
    st.sampled_from([0, 1]),
    torch=50,
    triton=12,
)
def test_column_credit(backend: str, problem: Problem, variant: str, shift: int) -> None:
    options = {"variant": variant, "shift": shift, "normalization": problem.config.normalization}
    want = reference.attention_column_credit(to_float64(problem.inputs), problem.response, **options)
    inputs, response = there([problem.inputs, problem.response])
    got = here(attnshape.attention_column_credit(inputs, response, **options, backend=backend))
    for got_row, row in zip(problem.rows(got), problem.rows(want), strict=True):
        assert_within("credit", got_row, row, credit_bound(row, problem.max_score))


def test_chunks_of_queries_and_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(3, whole_query=True, keys=40, width=30)
    arguments = (problem.inputs, problem.response)

    def computed() -> list[object]:
        return [
            attnshape.attention_column_credit(*arguments, backend="torch"),
            attnshape.attention_rollout([problem.inputs] * 2, problem.response, backend="torch"),
            attnshape.attention_row(problem.inputs, backend="torch"),
        ]

    whole = computed()
    monkeypatch.setattr("attnshape.vectorized.attention.SCORE_ELEMENTS", 3 * 4 * 40 * 7)
    monkeypatch.setattr("attnshape.vectorized.attention.KEY_CHUNK", 16)
    for got, want in zip(computed(), whole, strict=True):
        assert_close(got, want)
