"""Column sums of attention in Triton against the float64 reference, and what rollouts share with them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.columns import (
    DEVICE,
    assert_same_pattern,
    check,
    check_columns,
    check_rollout,
    columns,
    layouts,
    norms_of,
    rollout,
)
from support.memory import far_apart
from support.problems import Problem, make_problem, pack, to_float64
from torch import Tensor

from attnshape import AttentionInputs, Status, reference
from attnshape.types import Response
from csrc_triton import column_credit_raw, rollout_raw

NAN = float("nan")
HUGE = 2**31 - 1
SMALL = {"keys": 30, "width": 20, "heads": 1, "kv_heads": 1}
CHOICES = [(variant, shift) for variant in ("mean", "last") for shift in (0, 1)]


@settings(max_examples=16)
@given(layouts(), st.sampled_from(CHOICES))
def test_columns_are_the_reference(problem: Problem, choice: tuple[str, int]) -> None:
    check_columns(problem, *choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_positions_in_any_order(choice: tuple[str, int]) -> None:
    sizes = {"batch": 2, "keys": 150, "width": 140, "heads": 2, "kv_heads": 1}
    problem = make_problem(5, **sizes, whole_query=True)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 75, (2, 140), generator=generator)
    problem.response = Response((torch.rand(2, 140, generator=generator) > 0.3).int(), index=index)
    problem.credit = replace(problem.inputs, key=problem.inputs.key.nan_to_num(0.5), attention_mask=None)
    problem.credit = replace(problem.inputs, query_position=None)
    check_columns(problem, *choice)


def raw_alone(length: int, dtype: torch.dtype) -> tuple[Problem, Tensor, Tensor]:
    """One sequence, its columns and its rollout."""
    sizes = {"batch": 1, "keys": length, "width": length // 2, "heads": 2, "kv_heads": 1}
    problem = make_problem(length, **sizes, holes=False, dtype=dtype, whole_query=True)
    problem.credit = replace(problem.inputs, key=problem.inputs.key.nan_to_num(0.5), attention_mask=None)
    problem.credit = replace(problem.inputs, query_position=None)
    problem.response.mask[:] = 1
    problem.response.mask[:, 3] = 0
    problem.response.start[:] = length // 3
    return problem, columns(problem)[0], rollout([problem.inputs] * 2, problem)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_do_not_depend_on_padding_neighbours_or_memory(dtype: torch.dtype) -> None:
    alone, expected, carried = raw_alone(150, dtype)
    query, key = alone.inputs.query, alone.inputs.key
    mask, start = alone.response.mask, alone.response.start
    for left in (77,):
        wide = {"query": query, "key": key}
        for name, x in wide.items():
            wide[name] = torch.full((2, x.shape[1], 150 + left + 5, x.shape[3]), NAN, dtype=dtype)
            wide[name][1, :, left : left + 150] = x[0]
        # Heads of a token side by side, and a base that is not aligned.
        moved = wide["key"].transpose(1, 2)
        moved = torch.empty(moved.numel() + 1, dtype=dtype)[1:].view(moved.shape).copy_(moved).transpose(1, 2)
        begin, end = torch.tensor([9, left]), torch.tensor([11, left + 149])
        attended = torch.zeros(2, 155 + left)
        attended[1, left : left + 150] = 1
        response = Response(
            torch.cat([torch.zeros(1, 80), torch.nn.functional.pad(mask, (0, 5))]),
            start=torch.tensor([3, left + int(start)]),
        )
        for inputs in (
            AttentionInputs(wide["query"], wide["key"], 0.3, key_start=begin, query_position=end),
            AttentionInputs(wide["query"], moved, 0.3, attention_mask=attended),
        ):
            padded = Problem(alone.score, inputs, response)
            assert columns(padded)[0][1, :75].equal(expected[0])
            assert rollout([inputs] * 2, padded)[0][1, :75].equal(carried[0])
    one = pack(alone)
    other = torch.ones(11, 2, 16, dtype=dtype)
    inputs = AttentionInputs(
        torch.cat([other, one.inputs.query]),
        torch.cat([other[:, :1], one.inputs.key]),
        0.3,
        cu_seqlens=torch.tensor([0, 11, 161], dtype=torch.int32),
    )
    response = Response(
        torch.cat([torch.ones(2, dtype=torch.int32), one.response.mask]),
        start=torch.tensor([4, int(start)]),
        cu_seqlens=torch.tensor([0, 2, 77], dtype=torch.int32),
    )
    packed = Problem(alone.score, inputs, response)
    assert columns(packed)[0][2:].equal(expected[0])
    assert rollout([inputs] * 2, packed)[0][2:].equal(carried[0])


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(where: str, bad: float) -> None:
    sizes = {"batch": 2, "keys": 150, "width": 70, "heads": 1, "kv_heads": 1}
    problem = make_problem(1, **sizes, whole_query=True)
    problem.response.mask[:, :60] = 1
    clean, _ = columns(problem)
    clean_rollout, _ = rollout([problem.inputs] * 2, problem)
    at = int(problem.response.start[0]) + 5
    x = getattr(problem.inputs, where).clone()
    x[0, 0, at] = bad
    problem.credit = replace(problem.inputs, **{where: x})
    raw, _ = columns(problem)
    assert_same_pattern(problem, raw)
    assert raw[1].equal(clean[1])
    carried, _ = rollout([problem.inputs] * 2, problem)
    want = reference.attention_rollout(
        to_float64([problem.inputs] * 2), problem.response, normalization="none"
    )
    assert carried.isnan().equal(want.isnan())
    assert carried[1].equal(clean_rollout[1])


def test_a_query_that_carries_nothing_adds_nothing() -> None:
    sizes = {"batch": 1, "keys": 160, "width": 140, "heads": 2, "kv_heads": 1}
    problem = make_problem(2, **sizes, holes=False, whole_query=True)
    problem.credit = replace(problem.inputs, key=problem.inputs.key.nan_to_num(0.5), attention_mask=None)
    problem.credit = replace(problem.inputs, query_position=torch.tensor([100]))
    problem.response.mask[:] = 1
    problem.response.mask[:, 60:80] = 0
    problem.response.start[:] = 10
    query = problem.inputs.query.clone()
    query[:, :, :10] = query[:, :, 70:90] = query[:, :, 150:] = NAN
    problem.credit = replace(problem.inputs, query=query)
    assert check_columns(problem).isfinite().all()
    query[:, :, :100] = query[:, :, 101:] = NAN
    assert check_rollout([problem.inputs], problem, {}).isfinite().all()


def test_keys_outside_the_window_are_not_read() -> None:
    sizes = {"batch": 1, "keys": 300, "width": 40, "heads": 2, "kv_heads": 1}
    problem = make_problem(2, **sizes, holes=False, whole_query=True, sliding_window=20)
    problem.credit = replace(problem.inputs, attention_mask=None, query_position=None)
    problem.response.mask[:] = 1
    problem.response.start[:] = 255
    problem.credit = replace(problem.inputs, key=torch.randn(problem.inputs.key.shape))
    raw = check_columns(problem)
    problem.inputs.key[:, :, :192] = NAN
    assert columns(problem)[0].equal(raw)


@pytest.mark.parametrize("axis", [0, 1])
def test_strides_beyond_32_bits(axis: int) -> None:
    sizes = {"batch": 2, "keys": 30, "width": 20, "heads": 2, "kv_heads": 2, "dtype": torch.float16}
    problem = make_problem(2, **sizes, holes=False, whole_query=True)
    want, _ = columns(problem)
    carried, _ = rollout([problem.inputs], problem)
    x = problem.inputs
    strides = [2 * 30 * 16, 30 * 16, 16, 1]
    strides[axis] = 2**31 + 64
    for moved in (replace(x, key=far_apart(x.key, *strides)), replace(x, query=far_apart(x.query, *strides))):
        there = Problem(problem.score, moved, problem.response, problem.given, problem.config)
        assert columns(there)[0].equal(want)
        assert rollout([moved], there)[0].equal(carried)


@pytest.mark.parametrize(("batch", "keys", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_shapes(batch: int, keys: int, width: int) -> None:
    x = torch.randn(batch, 2, keys, 16, device=DEVICE)
    inputs = AttentionInputs(x, x, 0.3)
    start = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    response = Response(torch.zeros(batch, width, device=DEVICE), start=start)
    for variant, shift in CHOICES:
        raw, status = column_credit_raw(inputs, response, variant=variant, shift=shift)
        assert raw.shape == (batch, width)
        assert (raw == 0).all()
        assert status.tolist() == [0] * batch
    raw, status = rollout_raw([inputs] * 2, response)
    assert (raw == 0).all()
    assert status.tolist() == [0] * batch


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts canaries around everything that the launchers allocate; the function returned checks them."""
    margin, buffers = 512, []

    def guard(make):
        def made(*size, dtype=torch.float32, device=None):
            shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
            if dtype == torch.bool:  # the reference's
                return make(shape, dtype=dtype, device=device)
            buffer = torch.full((shape.numel() + 2 * margin,), 55, dtype=dtype, device=device)
            buffers.append(buffer)
            inner = buffer[margin : margin + shape.numel()].view(shape)
            return inner.copy_(make(shape, dtype=dtype, device=device))

        return made

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, guard(getattr(torch, name)))
    for name in ("empty", "zeros"):
        like = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            f"{name}_like",
            lambda x, dtype=None, make=like: make(x.shape, dtype=dtype or x.dtype, device=x.device),
        )

    def check() -> None:
        assert buffers
        for buffer in buffers:
            assert (buffer[:margin] == 55).all()
            assert (buffer[-margin:] == 55).all()

    return check


@pytest.mark.parametrize("value", [-1, 30, HUGE])
@pytest.mark.parametrize("where", ["start", "index", "query_position", "key_start"])
def test_indices_out_of_range(where: str, value: int, guarded: Callable[[], None]) -> None:
    problem = make_problem(7, **SMALL, holes=False, whole_query=True, attention_mask=False)
    problem.response.mask[:, :2] = 1
    if where == "index":
        index = problem.response.start[:, None] + torch.arange(20)
        index[problem.response.mask == 0] = HUGE
        problem.response = Response(problem.response.mask, index=index)
    x = getattr(problem.response if where in ("start", "index") else problem.inputs, where)
    x[1] = value
    raw, status = columns(problem)
    assert status.tolist() == [0, int(Status.OUT_OF_RANGE) if where != "key_start" or value != 30 else 0, 0]
    assert_same_pattern(problem, raw)
    if where != "key_start":
        assert columns(problem, "last")[0].isnan().equal(raw.isnan())
    carried, _ = rollout([problem.inputs] * 2, problem)
    want = reference.attention_rollout(
        to_float64([problem.inputs] * 2), problem.response, normalization="none"
    )
    check(problem, carried, want)
    guarded()


@pytest.mark.usefixtures("crossing_rows")
@pytest.mark.parametrize("where", ["keys", "response"])
@pytest.mark.parametrize("bad", [(1, -5), (1, HUGE), (2, -HUGE), (3, 91), (3, 61), (0, HUGE)])
def test_bounds_of_packed_rows_out_of_range(
    where: str, bad: tuple[int, int], guarded: Callable[[], None]
) -> None:
    problem = make_problem(7, **SMALL, holes=False, whole_query=True, attention_mask=False)
    problem.response.mask[:, :2] = 1
    problem = pack(problem)
    bounds = (problem.response if where == "response" else problem.inputs).cu_seqlens
    bounds[bad[0]] = bad[1]
    for variant in ("mean", "last"):
        check_columns(problem, variant)
    layers = [replace(problem.inputs, query_position=None)] * 2
    check_rollout(layers, problem, norms_of(problem, 2))
    guarded()
