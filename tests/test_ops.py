"""The public functions: what bad input gets, choice of backend, layouts, metrics."""

import contextlib
import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from support.backends import BACKENDS, each_backend, here, there

import attnshape
from attnshape import (
    KL,
    AttentionInputs,
    Response,
    ShapingConfig,
    Status,
    Whitening,
    ops,
    reference,
    triton_backend,
)
from attnshape.problems import KL_COEF, make_problem, pack


def inputs(**changes: Any) -> AttentionInputs:
    made = AttentionInputs(torch.randn(3, 4, 8), torch.randn(3, 2, 10, 8), 0.5)
    return dataclasses.replace(made, **changes)


def at(mask: Any = None, **place: Any) -> Response:
    """A response of 3 rows of 4 tokens, which start at 2, 3 and 4 if not told otherwise."""
    return Response(
        torch.ones(3, 4) if mask is None else mask, **({"start": torch.tensor([2, 3, 4])} | place)
    )


def call(credit: Any = None, /, **changes: Any) -> attnshape.ShapedRewards:
    """``shape_rewards`` on 3 rows of 4 tokens, with changes."""
    arguments = {"score": torch.randn(3), "response": at(), "values": torch.randn(3, 4)} | changes
    score, response = arguments.pop("score"), arguments.pop("response")
    return attnshape.shape_rewards(score, inputs() if credit is None else credit, response, **arguments)


def test_the_call_that_the_bad_ones_vary() -> None:
    assert call().rewards.isfinite().all()


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"score": torch.randn(1)}, ValueError, "score: got shape (1,), want (3,)"),
    ({"score": torch.randn(3, 1)}, ValueError, "score: got shape (3, 1), want (3,)"),
    ({"score": [1.0, 2.0, 3.0]}, TypeError, "score: got list, want a torch.Tensor"),
    ({"score": torch.ones(3, dtype=torch.int64)}, TypeError, "score: got torch.int64"),
    ({"score": torch.randn(3, device="meta")}, ValueError, "score: got a tensor on meta, want cpu"),
    ({"values": torch.randn(3, 5)}, ValueError, "values: got shape (3, 5), want (3, 4)"),
    ({"response": at(torch.ones(3))}, ValueError, "response.mask: got shape (3,), want [B, R]"),
    ({"response": at(torch.ones(3, 4, 1))}, ValueError, "response.mask: got shape (3, 4, 1), want [B, R]"),
    ({"response": at(torch.ones(2, 4))}, ValueError, "response.mask: got 2 rows, want 3"),
    ({"response": at([[1]])}, TypeError, "response.mask: got list, want a torch.Tensor"),
    ({"response": torch.ones(3, 4)}, ValueError, "response.start, response.index: got neither"),
    ({"response": at(index=torch.zeros(3, 4, dtype=torch.int64))}, ValueError, "got both"),
    ({"response": at(start=torch.zeros(3))}, TypeError, "response.start: got torch.float32"),
    ({"response": at(start=torch.tensor([1]))}, ValueError, "response.start: got shape (1,), want (3,)"),
    (
        {"response": at(start=None, index=torch.zeros(3, 5, dtype=torch.int64))},
        ValueError,
        "response.index: got shape (3, 5), want (3, 4) = that of response.mask",
    ),
    ({"kl": KL(torch.randn(3, 4), None, 0.1)}, TypeError, "kl.ref_logprobs: got NoneType"),
    ({"kl": KL(None, torch.randn(3, 4), 0.1)}, TypeError, "kl.logprobs: got NoneType"),
    (
        {"kl": KL(torch.randn(3, 5), torch.randn(3, 4), 0.1)},
        ValueError,
        "kl.logprobs: got shape (3, 5), want (3, 4)",
    ),
    (
        {"kl": torch.ones(3, 4)},
        TypeError,
        "kl: got Tensor, want KL(logprobs, ref_logprobs, coef) or KL.given",
    ),
    ({"kl": KL.given(torch.ones(3), 0.1)}, ValueError, "kl.estimate: got shape (3,), want (3, 4)"),
    ({"kl": KL.given(torch.ones(3, 4), torch.ones(3))}, ValueError, "kl.coef: got shape (3,), want ()"),
    ({"kl": KL.given(torch.ones(3, 4), torch.tensor(1))}, TypeError, "kl.coef: got torch.int64"),
    ({"kl": KL.given(torch.ones(3, 4), float("nan"))}, ValueError, "kl.coef: got nan, want a finite number"),
    ({"kl": KL.given(torch.ones(3, 4), None)}, TypeError, "kl.coef: got NoneType, want a number"),
    (
        {"kl": KL(torch.ones(3, 4), torch.ones(3, 4), 0.1, torch.ones(3, 4))},
        ValueError,
        "kl: got an estimate beside logprobs",
    ),
    ({"terminal_reward": torch.ones(1)}, ValueError, "terminal_reward: got shape (1,), want (3,)"),
    ({"bootstrap": torch.ones(3, 4)}, ValueError, "bootstrap: got shape (3, 4), want (3,)"),
    (
        {"response": at(cu_seqlens=torch.tensor([0, 4, 8, 12]))},
        TypeError,
        "response.cu_seqlens: got torch.int64",
    ),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', want one of 'auto', 'triton', 'cpu', 'torch'"),
    ({"config": {"dense_share": 1}}, TypeError, "config: got dict, want ShapingConfig"),
]
BAD_CONFIGS = [
    ({"gamma": 1.5}, ValueError, "gamma: got 1.5, want a number from 0 to 1"),
    ({"gamma": torch.ones(3)}, TypeError, "gamma: got Tensor, want a number from 0 to 1"),
    ({"lam": -0.1}, ValueError, "lam: got -0.1"),
    ({"lam": "1"}, TypeError, "lam: got str"),
    ({"lam_value": 2.0}, ValueError, "lam_value: got 2.0"),
    ({"dense_share": float("nan")}, ValueError, "dense_share: got nan"),
    ({"dense_share": torch.ones(3)}, TypeError, "dense_share: got Tensor"),
    ({"normalization": "softmax"}, ValueError, "normalization: got 'softmax'"),
    ({"mask_semantics": "drop"}, ValueError, "mask_semantics: got 'drop', want one of 'skip', 'zero'"),
    ({"mask_layout": "suffix"}, ValueError, "mask_layout: got 'suffix'"),
    ({"kl_estimator": "full"}, ValueError, "kl_estimator: got 'full'"),
    ({"on_nan": "raise"}, ValueError, "on_nan: got 'raise'"),
    ({"kl_input_clip": 0.0}, ValueError, "kl_input_clip: got 0.0, want a positive number or None"),
    ({"kl_output_clip": -1.0}, ValueError, "kl_output_clip: got -1.0"),
    ({"score_clip": (1.0, -1.0)}, ValueError, "score_clip: got (1.0, -1.0)"),
    ({"score_clip": -1.0}, ValueError, "score_clip: got -1.0, want a positive number or (low, high)"),
    ({"score_index": "first"}, ValueError, "score_index: got 'first'"),
    ({"whitening": {"bessel": False}}, TypeError, "whitening: got dict, want Whitening"),
]
BAD_BESIDE_THE_BATCH = [
    ({"lam": torch.ones(2)}, ValueError, "lam: got shape (2,), want (3,)"),
    ({"lam": torch.ones(3, dtype=torch.int64)}, TypeError, "lam: got torch.int64"),
    ({"lam_value": torch.ones(3, 1)}, ValueError, "lam_value: got shape (3, 1), want (3,)"),
    (
        {"score_index": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        "score_index: got shape (2,), want (3,)",
    ),
    ({"score_index": torch.zeros(3)}, TypeError, "score_index: got torch.float32"),
]
BAD_INPUTS = [
    ({"query": torch.randn(3, 3, 8)}, ValueError, "query: got 3 heads, want a multiple of key's 2"),
    ({"query": torch.randn(3, 4, 16)}, ValueError, "query: got head width 16, want 8"),
    ({"query": torch.randn(2, 4, 8)}, ValueError, "query: got shape (2, 4, 8), want [B, Hq, D]"),
    ({"query": torch.randn(3, 4, 9, 8)}, ValueError, "query: got 9 positions, want 10"),
    ({"query": torch.randn(3, 4, 8).half()}, TypeError, "query: got torch.float16, want torch.float32"),
    ({"query": torch.randn(3, 4, 8, device="meta")}, ValueError, "query: got a tensor on meta"),
    ({"key": torch.randn(3, 2, 8)}, ValueError, "key: got shape (3, 2, 8), want [B, Hkv, S, D]"),
    ({"key": torch.ones(3, 2, 10, 8, dtype=torch.int32)}, TypeError, "key: got torch.int32"),
    ({"query_position": torch.zeros(1, dtype=torch.int32)}, ValueError, "query_position: got shape (1,)"),
    ({"query_position": "pooled"}, ValueError, "query_position: got 'pooled'"),
    (
        {"query_position": "last_response"},
        ValueError,
        'query_position: got "last_response" with one query row',
    ),
    ({"key_start": torch.zeros(3)}, TypeError, "key_start: got torch.float32"),
    ({"attention_mask": torch.ones(3, 9)}, ValueError, "attention_mask: got shape (3, 9), want (3, 10)"),
    ({"sinks": torch.ones(2)}, ValueError, "sinks: got shape (2,), want (4,)"),
    ({"lse": torch.ones(3, 4, 10)}, ValueError, "lse: got shape (3, 4, 10), want (3, 4)"),
    ({"head_mask": torch.ones(2)}, ValueError, "head_mask: got shape (2,), want (4,) = [Hq]"),
    ({"head_mask": [1, 0, 0, 1]}, TypeError, "head_mask: got list"),
    ({"head_mask": torch.ones(4, device="meta")}, ValueError, "head_mask: got a tensor on meta"),
    ({"softcap": 0.0}, ValueError, "softcap: got 0.0"),
    ({"sliding_window": 0}, ValueError, "sliding_window: got 0"),
    ({"scaling": float("inf")}, ValueError, "scaling: got inf"),
    ({"scaling": None}, TypeError, "scaling: got NoneType, want a number"),
    ({"softcap": "30"}, TypeError, "softcap: got str, want a number or None"),
    ({"sliding_window": 2.5}, TypeError, "sliding_window: got float, want an int or None"),
    ({"cu_seqlens": torch.zeros(4)}, TypeError, "cu_seqlens: got torch.float32"),
    ({"cu_seqlens": torch.zeros(4, dtype=torch.int32)}, ValueError, "want [N, Hkv, D] with cu_seqlens"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


def test_what_only_validation_or_the_log_says() -> None:
    mask, score = torch.ones(2, 3), torch.ones(2)
    config = ShapingConfig(lam=torch.tensor([0.5, 1.5]))
    for function in (
        lambda: attnshape.gae(mask, mask, mask, config, validate=True),
        lambda: attnshape.shape_rewards(score, "uniform", mask, values=mask, config=config, validate=True),
    ):
        with pytest.raises(ValueError, match=r"lam: row 1 is 1\.5, want numbers from 0 to 1"):
            function()
    with pytest.raises(TypeError, match="out: got Advantages, want what shape_rewards or group_advantages"):
        attnshape.log_metrics(attnshape.gae(mask, None, mask))  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CONFIGS)
def test_a_bad_config_cannot_be_made(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ShapingConfig(**changes)
    with pytest.raises(error, match=re.escape(message)):
        dataclasses.replace(ShapingConfig(), **changes)


def test_a_bad_whitening_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="eps_mode: got 'max', want one of 'add', 'clamp', 'add_to_std'"):
        Whitening(eps_mode="max")


@pytest.mark.parametrize(("changes", "error", "message"), BAD_BESIDE_THE_BATCH)
def test_a_config_that_does_not_fit_the_batch(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = ShapingConfig(**changes)
    with pytest.raises(error, match=re.escape(message)):
        call(config=config)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_INPUTS)
def test_bad_attention_inputs(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(inputs(**changes))


@pytest.mark.parametrize(
    ("credit", "error", "message"),
    [
        ("dense", ValueError, "credit: got 'dense'"),
        (torch.ones(3, 5), ValueError, "credit: got shape (3, 5), want (3, 4)"),
        ([], TypeError, "inputs: got list"),
        ([inputs(), "x"], TypeError, "inputs: got a list with str"),
        (
            [inputs(), AttentionInputs(torch.ones(3, 4, 8), torch.ones(3, 2, 9, 8), 1.0)],
            ValueError,
            "inputs[1].key",
        ),
        (7, TypeError, "credit: got int"),
    ],
)
def test_bad_credit(credit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(credit)


def test_functions_name_their_own_arguments() -> None:
    ones = torch.ones(3, 4)
    here = at(start=torch.tensor([0, 0, 0]))
    whole = inputs(query=torch.randn(3, 4, 10, 8))
    weighted = dataclasses.replace(whole, value_norm=torch.ones(3, 4, 10), residual_norm=torch.ones(3, 10))
    column_credit, rollout = attnshape.attention_column_credit, attnshape.attention_rollout
    bad_calls = {
        "rewards: got shape": lambda: attnshape.gae(torch.ones(3), ones, ones),
        "variant: got 'sum'": lambda: column_credit(whole, here, variant="sum"),
        "shift: got 2": lambda: column_credit(whole, here, shift=2),
        "inputs.query: got one query row": lambda: column_credit(inputs(), here),
        "normalization: got 'l2'": lambda: attnshape.attention_credit(whole, here, normalization="l2"),
        "layers: got one query row": lambda: rollout([inputs()], here),
        "layers: got 0 with residual_norm": lambda: rollout(
            [dataclasses.replace(weighted, residual_norm=None)], here
        ),
        "layers: got 1 with value_norm": lambda: rollout([whole, weighted], here),
        "layers[0].value_norm: got shape": lambda: rollout(
            [dataclasses.replace(whole, value_norm=ones, residual_norm=ones)], here
        ),
        "response.mask: got shape": lambda: attnshape.whiten(ones, torch.ones(4)),
        "moments: got shape (4, 2), want [..., 3]": lambda: attnshape.whiten(
            ones, ones, moments=torch.ones(4, 2)
        ),
        "attention_row cannot resolve": lambda: attnshape.attention_row(
            dataclasses.replace(whole, query_position="last_response")
        ),
    }
    for message, bad_call in bad_calls.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            bad_call()
    with pytest.raises(TypeError, match="config: got dict, want Whitening"):
        attnshape.whiten(ones, ones, {"bessel": False})
    with pytest.raises(TypeError, match="config: got Whitening, want ShapingConfig"):
        attnshape.gae(ones, ones, ones, Whitening())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("start", torch.tensor([2, 7, 4]), "row 1 starts at 7 and its last unmasked token lies at"),
        ("start", torch.tensor([2, -1, 4]), "response.start: row 1 starts at -1"),
        ("query_position", torch.tensor([0, 1, 10]), "query_position: row 2 is 10, want 0 <="),
        ("key_start", torch.tensor([-1, 0, 0]), "key_start: row 0 is -1"),
        ("score_index", torch.tensor([0, 4, 0]), "score_index: row 1 is 4, want 0 <= score_index < 4"),
        ("index", torch.tensor([[0, 1, 2, 3]] * 2 + [[0, 1, 2, 10]]), "response.index: row 2 spans 0 to 10"),
        ("index", torch.tensor([[0, 1, -2, 3]] * 3), "response.index: row 0 spans -2 to 3"),
    ],
)  # fmt: skip
def test_validate_names_the_row(name: str, value: torch.Tensor, message: str) -> None:
    made, changes = inputs(), {}
    if name in ("query_position", "key_start"):
        made = inputs(**{name: value})
    elif name == "score_index":
        changes["config"] = ShapingConfig(score_index=value, lam=0.95)
    else:
        changes["response"] = at(**{"start": None, name: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        call(made, validate=True, **changes)
    out = call(made, **changes)
    row = int(re.search(r"row (\d)", message).group(1))  # type: ignore[union-attr]
    assert out.status[row] & int(Status.OUT_OF_RANGE)
    assert out.advantages[row].isnan().all()
    good = [b for b in range(3) if not out.status[b]]
    assert out.advantages[good].isfinite().all()


def test_validate_packed() -> None:
    problem = pack(make_problem(0))
    problem.shaped(attnshape.shape_rewards, validate=True)
    bad = torch.tensor([0, 30, 24, 72], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: row 1 is 30:24"):
        attnshape.attention_row(dataclasses.replace(problem.inputs, cu_seqlens=bad), validate=True)
    bad = torch.tensor([0, 9, 18, 99], dtype=torch.int32)
    elsewhere = dataclasses.replace(problem, response=dataclasses.replace(problem.response, cu_seqlens=bad))
    message = r"response\.cu_seqlens: row 2 is 18:99, want rising bounds within 0:27"
    with pytest.raises(ValueError, match=message):
        elsewhere.shaped(attnshape.shape_rewards, validate=True)
    with pytest.raises(ValueError, match=message):
        attnshape.gae(problem.given["values"], None, elsewhere.response, validate=True)


def test_redistribute_is_the_reward_without_the_rest() -> None:
    problem = make_problem(1, extras=False, kl="")
    score, mask, weights = problem.score, problem.response.mask, torch.rand(3, 9)
    config = ShapingConfig(dense_share=0.5)
    rewards = attnshape.redistribute(score, weights, mask, config)
    assert torch.equal(rewards, attnshape.shape_rewards(score, weights, mask, config=config).rewards)
    live = (mask != 0).any(1)
    torch.testing.assert_close(rewards.sum(1), torch.where(live, score, 0.0))
    uniform = attnshape.redistribute(score, "uniform", mask, ShapingConfig(dense_share=1.0))
    torch.testing.assert_close(uniform[0], (score[0] / mask[0].sum()) * mask[0])


def test_credit_that_travels_gives_the_same_rewards() -> None:
    problem = make_problem(2, config=ShapingConfig(lam=0.95))
    credit = attnshape.attention_credit(problem.inputs, problem.response)
    there = dataclasses.replace(problem, credit=credit).shaped(attnshape.shape_rewards)
    here = problem.shaped(attnshape.shape_rewards)
    torch.testing.assert_close(there.rewards, here.rewards)
    torch.testing.assert_close(there.advantages, here.advantages)


def test_kl_coef_may_be_a_tensor() -> None:
    problem = make_problem(3)
    number = problem.shaped(attnshape.shape_rewards)
    kl = dataclasses.replace(problem.given["kl"], coef=torch.tensor(KL_COEF))
    tensor = problem.shaped(attnshape.shape_rewards, kl=kl)
    assert torch.equal(number.rewards, tensor.rewards)
    without = problem.shaped(attnshape.shape_rewards, kl=None)
    assert without.kl is None
    assert not torch.equal(number.rewards, without.rewards)


@pytest.mark.parametrize("packed", [False, True])
@each_backend
def test_a_given_kl_is_subtracted_as_it_is(backend: str, packed: bool) -> None:
    """Neither the estimator nor a clip touches it, whatever the config says of both."""
    problem = make_problem(4, kl="kl", config=ShapingConfig(kl_estimator="k2", kl_output_clip=1e-3))
    problem = pack(problem) if packed else problem
    live, estimate = problem.response.mask != 0, problem.given["kl"].estimate
    shaped = problem.shaped(attnshape.shape_rewards, backend=backend)
    without = problem.shaped(attnshape.shape_rewards, backend=backend, kl=None)
    assert shaped.kl is not None
    assert without.kl is None
    assert torch.equal(shaped.kl, torch.where(live, estimate, 0.0))
    torch.testing.assert_close(without.rewards - shaped.rewards, KL_COEF * shaped.kl)


def test_kl_given_is_the_short_form() -> None:
    kl = torch.rand(3, 4)
    given = KL.given(kl, 0.5)
    assert (given.logprobs, given.ref_logprobs, given.coef) == (None, None, 0.5)
    assert given.estimate is kl
    long = call(kl=KL(None, None, 0.5, estimate=kl), score=torch.ones(3), values=torch.ones(3, 4))
    torch.testing.assert_close(long.rewards.sum(1), 1 - 0.5 * kl.sum(1))


def test_a_plain_mask_is_a_response() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    made = Response.of(mask)
    assert made.mask is mask
    assert (made.start, made.index, made.cu_seqlens) == (None, None, None)
    assert Response.of(made) is made
    assert made.batch_size == 3
    packed = Response(mask.flatten(), cu_seqlens=torch.tensor([0, 4, 12], dtype=torch.int32))
    assert packed.batch_size == 2
    x, score = torch.randn(3, 4), torch.randn(3)
    for of_tokens in (
        lambda response: attnshape.shape_rewards(score, "uniform", response, values=x).advantages,
        lambda response: attnshape.redistribute(score, x.abs(), response),
        lambda response: attnshape.gae(x, x, response).advantages,
        lambda response: attnshape.whiten(x, response),
    ):
        assert torch.equal(of_tokens(mask), of_tokens(made))


def test_metrics_tell_dense_credit_from_sparse() -> None:
    mask, score = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.ones(2)
    dense = attnshape.shape_rewards(score, "uniform", mask).metrics
    sparse = attnshape.shape_rewards(score, "sparse", mask).metrics
    torch.testing.assert_close(dense["credit_entropy"], torch.tensor([4.0, 2.0]).log().mean())
    torch.testing.assert_close(dense["credit_last_share"], torch.tensor(0.375))
    assert sparse["credit_entropy"] == 0
    assert sparse["credit_last_share"] == 1
    assert "response_attention" not in sparse
    whole = attnshape.shape_rewards(
        torch.ones(1),
        AttentionInputs(torch.randn(1, 1, 4), torch.zeros(1, 1, 8, 4), 1.0),
        Response(torch.ones(1, 2), start=torch.tensor([3])),
    ).metrics
    torch.testing.assert_close(whole["response_attention"], torch.tensor(2 / 8))


INF, NAN = float("inf"), float("nan")
NEGATIVE = Status.FALLBACK | Status.NEGATIVE
ROWS_WITH_NEGATIVE_WEIGHTS: list[tuple[list[float], list[int], int]] = [
    ([1.0, 2.0, -9.0, 1.0], [1, 1, 0, 1], 0),  # masked there: of no account
    ([1.0, -1e-30, 2.0, 1.0], [1, 1, 1, 1], NEGATIVE),
    ([1.0, -1.0, NAN, 1.0], [1, 1, 1, 1], Status.NONFINITE),
    ([INF, 1.0, 1.0, -2.0], [1, 1, 1, 1], Status.NONFINITE),
    ([-INF, 1.0, 1.0, 2.0], [1, 0, 1, 1], NEGATIVE),
    ([-0.0, 3.0, 1.0, 0.0], [1, 1, 1, 1], 0),
    ([2.0, -3.0, NAN, 1.0], [1, 1, 0, 1], NEGATIVE),
    ([1.0, -3.0, 1.0, 1.0], [0, 0, 0, 0], Status.EMPTY),
    ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 0], Status.FALLBACK),  # nothing to go by, but nothing negative
]
"""Weights, mask, and the status that a row gets."""


def shaped_by(library: str, *arguments: Any, **options: Any) -> attnshape.ShapedRewards:
    """By the reference, or by a backend where it runs."""
    if library == "reference":
        return reference.shape_rewards(*arguments, **options)
    return here(attnshape.shape_rewards(*there([*arguments]), **there(options), backend=library))


each_library = pytest.mark.parametrize("library", ["reference", *BACKENDS])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalization", ["sum_to_one", "sum_to_length", "none"])
@each_library
def test_a_row_with_a_negative_weight_is_shaped_as_sparse(
    library: str, normalization: str, packed: bool
) -> None:
    weights, mask = (torch.tensor([row[i] for row in ROWS_WITH_NEGATIVE_WEIGHTS]) for i in (0, 1))
    statuses = [int(status) for _, _, status in ROWS_WITH_NEGATIVE_WEIGHTS]
    response, score = Response(mask), torch.arange(1.0, len(mask) + 1)
    if packed:
        bounds = torch.arange(0, mask.numel() + 1, 4, dtype=torch.int32)
        weights, response = weights.flatten(), Response(mask.flatten(), cu_seqlens=bounds)
    config = ShapingConfig(normalization=normalization, dense_share=0.75)
    if normalization == "none":
        statuses[-1] = 0
    out, sparse = (shaped_by(library, score, x, response, config=config) for x in (weights, "sparse"))
    assert out.status.tolist() == statuses
    for name in ("credit", "rewards", "advantages", "returns"):
        got, want = (getattr(x, name).view(mask.shape) for x in (out, sparse))
        for row, status in enumerate(statuses):
            if status == NEGATIVE:
                torch.testing.assert_close(got[row], want[row])
            assert got[row].isfinite().all() == (status != Status.NONFINITE)
            assert not got[row][mask[row] == 0].any()
    credit = out.credit.view(mask.shape)
    if normalization != "none":  # then a row is as it was given
        assert credit[2].isnan().all()
        assert credit[3].isnan().all()
    torch.testing.assert_close(
        credit[5], torch.tensor([0.0, 3.0, 1.0, 0.0]) * {"sum_to_one": 0.25}.get(normalization, 1.0)
    )
    metrics = {name: x.item() for name, x in out.metrics.items()}
    counts = {name: metrics[f"{name}_rows"] for name in ("negative", "fallback", "nan", "empty")}
    fallbacks = 3 if normalization == "none" else 4
    assert counts == {"negative": 3, "fallback": fallbacks, "nan": 2, "empty": 1}


@each_library
def test_a_negative_weight_and_a_masked_score(library: str) -> None:
    """What would go to the score's token is lost with it, and both are flagged."""
    config = ShapingConfig(score_index=torch.tensor([1]))
    arguments = torch.ones(1), torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1, 0, 1]])
    out = shaped_by(library, *arguments, config=config)
    assert out.status.tolist() == [NEGATIVE | Status.SCORE_MASKED]
    assert not out.credit.any()
    assert not out.rewards.any()


@each_library
def test_a_nan_in_one_row_hides_no_negative_weight_in_another(library: str) -> None:
    weights = torch.tensor([[NAN, 1.0], [1.0, -1.0], [1.0, 1.0]])
    out = shaped_by(library, torch.ones(3), weights, torch.ones(3, 2))
    assert out.status.tolist() == [Status.NONFINITE, NEGATIVE, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_validate_refuses_a_negative_weight(packed: bool) -> None:
    weights, mask = torch.tensor([[1.0, 2.0, -9.0], [0.0, -0.25, 1.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    response, place = Response(mask), "[1, 1]"
    if packed:
        cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
        weights, response = weights.flatten(), Response(mask.flatten(), cu_seqlens=cu_seqlens)
        place = "[4]"
    message = (
        f"credit: got -0.25 at {place}, want weights of 0 or more; signed ones are token_rewards, "
        "best made by attnshape.credit.centered"
    )
    for function in (attnshape.shape_rewards, attnshape.redistribute):
        function(torch.ones(2), weights, response)
        function(torch.ones(2), weights.abs(), response, validate=True)
        with pytest.raises(ValueError, match=re.escape(message)):
            function(torch.ones(2), weights, response, validate=True)


def test_triton_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    double = inputs(query=torch.randn(3, 4, 8).double(), key=torch.randn(3, 2, 10, 8).double())
    with pytest.raises(ValueError, match='backend: got "triton", but'):
        attnshape.attention_row(double, backend="triton")


def test_masks_of_any_dtype() -> None:
    config = ShapingConfig(dense_share=1.0)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        mask = torch.tensor([[1, 0, 1]]).to(dtype)
        out = attnshape.redistribute(torch.tensor([3.0]), "uniform", mask, config)
        torch.testing.assert_close(out, torch.tensor([[1.5, 0.0, 1.5]]))
    fraction = torch.tensor([[0.25, 0.0, 7.0]])
    out = attnshape.redistribute(torch.tensor([3.0]), "uniform", fraction, config)
    torch.testing.assert_close(out, torch.tensor([[1.5, 0.0, 1.5]]))


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    def device(entered_device: torch.device) -> contextlib.nullcontext[None]:
        entered.append(entered_device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_backend, "gae", lambda *arguments: arguments)
    for index in (0, 1, 2):
        assert ops._function("gae", "auto", torch.device("cuda", index), ())(3, 4) == (3, 4)
    assert entered == [torch.device("cuda", 0), torch.device("cuda", 2)]


@pytest.mark.parametrize(
    ("field", "x", "error"),
    [
        ("score_clip", "x", "score_clip: got str, want a positive number or"),
        ("score_clip", [1.0, 2.0], "score_clip: got list, want a positive number or"),
        ("score_clip", (1.0,), r"score_clip: got \(1.0,\), want a positive number or"),
        ("score_clip", (1.0, "b"), "score_clip: got str, want"),
        ("score_clip", torch.ones(()), "score_clip: got Tensor, want"),
        ("score_clip", -1.0, "score_clip: got -1.0, want"),
        ("score_clip", float("nan"), "score_clip: got nan, want"),
        ("kl_input_clip", "a", "kl_input_clip: got str, want a positive number or None"),
        ("kl_output_clip", 0.0, "kl_output_clip: got 0.0, want a positive number or None"),
        ("lam", True, "lam: got bool, want a number from 0 to 1"),
        ("gamma", torch.ones(2), "gamma: got Tensor, want a number from 0 to 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_sentence(field: str, x: Any, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        ShapingConfig(**{field: x})


@pytest.mark.parametrize("eps", [-1.0, "a", float("nan"), float("inf")])
def test_eps_is_a_finite_number(eps: Any) -> None:
    for config in (attnshape.Whitening, attnshape.GroupConfig):
        with pytest.raises((ValueError, TypeError), match=r"eps: got .* want a finite number of 0 or more"):
            config(eps=eps)


def test_metrics_are_plain_floats_for_a_log() -> None:
    score, credit = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[3.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    out = attnshape.shape_rewards(score, credit, torch.tensor([[1, 1], [1, 1], [0, 0]]))
    found = attnshape.log_metrics(out, "credit/")
    assert {type(value) for value in found.values()} == {float}
    assert found.keys() == {f"credit/{name}" for name in out.metrics}
    entropy = (
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2
    )  # the second row is sparse, the third empty
    assert found["credit/credit_entropy"] == pytest.approx(entropy)
    assert (found["credit/fallback_rows"], found["credit/empty_rows"]) == (1.0, 1.0)
    assert "attnshape/credit_entropy" in attnshape.log_metrics(out)
    groups = attnshape.group_advantages(score, credit, torch.tensor([[1, 1], [1, 1], [0, 0]]), group=3)
    found = attnshape.log_metrics(groups)
    assert {type(value) for value in found.values()} == {float}
    # Without credit a completion's advantage is even.
    assert found["attnshape/credit_entropy"] == pytest.approx(entropy + math.log(2) / 2)
    assert (found["attnshape/fallback_rows"], found["attnshape/empty_rows"]) == (1.0, 1.0)
