"""The public functions: what bad input gets, choice of backend, layouts, metrics."""

import contextlib
import dataclasses
import re
from typing import Any

import pytest
import torch
from support.problems import make_problem, pack

import attnshape
from attnshape import AttentionInputs, ShapingConfig, Status, ops, triton_backend


def inputs(**changes: Any) -> AttentionInputs:
    made = AttentionInputs(torch.randn(3, 4, 8), torch.randn(3, 2, 10, 8), 0.5)
    return dataclasses.replace(made, **changes)


def call(credit: Any = None, /, **changes: Any) -> attnshape.ShapedRewards:
    """``shape_rewards`` on 3 rows of 4 tokens, with changes."""
    arguments = {
        "score": torch.randn(3),
        "values": torch.randn(3, 4),
        "response_mask": torch.ones(3, 4),
        "response_start": torch.tensor([2, 3, 4]),
    } | changes
    return attnshape.shape_rewards(
        arguments.pop("score"), inputs() if credit is None else credit, **arguments
    )


def test_the_call_that_the_bad_ones_vary() -> None:
    assert call().rewards.isfinite().all()


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"score": torch.randn(1)}, ValueError, "score: got shape (1,), want (3,)"),
    ({"score": torch.randn(3, 1)}, ValueError, "score: got shape (3, 1), want (3,)"),
    ({"score": [1.0, 2.0, 3.0]}, TypeError, "score: got list, want a torch.Tensor"),
    ({"score": torch.ones(3, dtype=torch.int64)}, TypeError, "score: got torch.int64"),
    ({"score": torch.randn(3, device="meta")}, ValueError, "score: got a tensor on meta, want cpu"),
    ({"values": torch.randn(3, 5)}, ValueError, "values: got shape (3, 5), want (3, 4)"),
    ({"response_mask": torch.ones(3)}, ValueError, "response_mask: got shape (3,), want [B, R]"),
    ({"response_mask": torch.ones(2, 4)}, ValueError, "response_mask: got 2 rows, want 3"),
    ({"response_start": None}, ValueError, "response_start, response_index: got neither"),
    ({"response_index": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "got both"),
    ({"response_start": torch.zeros(3)}, TypeError, "response_start: got torch.float32"),
    ({"response_start": torch.tensor([1])}, ValueError, "response_start: got shape (1,), want (3,)"),
    ({"logprobs": torch.randn(3, 4)}, ValueError, "ref_logprobs: got None"),
    ({"kl_coef": 0.1}, ValueError, "kl_coef: got 0.1 without a KL"),
    ({"kl": torch.ones(3, 4), "kl_coef": torch.ones(3)}, ValueError, "kl_coef: got shape (3,), want ()"),
    (
        {"kl": torch.ones(3, 4), "logprobs": torch.ones(3, 4), "ref_logprobs": torch.ones(3, 4)},
        ValueError,
        "kl: got a tensor beside logprobs",
    ),
    ({"terminal_reward": torch.ones(1)}, ValueError, "terminal_reward: got shape (1,), want (3,)"),
    ({"bootstrap": torch.ones(3, 4)}, ValueError, "bootstrap: got shape (3, 4), want (3,)"),
    ({"response_cu_seqlens": torch.tensor([0, 4, 8, 12])}, TypeError, "response_cu_seqlens: got torch.int64"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', want one of 'auto', 'triton', 'torch'"),
    ({"config": {"beta": 1}}, TypeError, "config: got dict, want ShapingConfig"),
]
BAD_CONFIGS = [
    ({"gamma": 1.5}, ValueError, "gamma: got 1.5"),
    ({"gamma": torch.ones(3)}, TypeError, "gamma: got Tensor, want a float"),
    ({"lam": -0.1}, ValueError, "lam: got -0.1"),
    ({"lam": torch.ones(2)}, ValueError, "lam: got shape (2,), want (3,)"),
    ({"lam_value": 2.0}, ValueError, "lam_value: got 2.0"),
    ({"beta": float("nan")}, ValueError, "beta: got nan"),
    ({"normalization": "softmax"}, ValueError, "normalization: got 'softmax'"),
    ({"mask_semantics": "drop"}, ValueError, "mask_semantics: got 'drop'"),
    ({"kl_estimator": "full"}, ValueError, "kl_estimator: got 'full'"),
    ({"on_nan": "raise"}, ValueError, "on_nan: got 'raise'"),
    ({"kl_input_clip": 0.0}, ValueError, "kl_input_clip: got 0.0"),
    ({"score_clip": (1.0, -1.0)}, ValueError, "score_clip: got (1.0, -1.0)"),
    ({"score_index": "first"}, ValueError, "score_index: got 'first'"),
    (
        {"score_index": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        "score_index: got shape (2,), want (3,)",
    ),
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
    ({"cu_seqlens": torch.zeros(4)}, TypeError, "cu_seqlens: got torch.float32"),
    ({"cu_seqlens": torch.zeros(4, dtype=torch.int32)}, ValueError, "want [N, Hkv, D] with cu_seqlens"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CONFIGS)
def test_bad_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(config=ShapingConfig(**changes))


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
    start = torch.tensor([0, 0, 0])
    whole = inputs(query=torch.randn(3, 4, 10, 8))
    bad_calls = {
        "rewards: got shape": lambda: attnshape.gae(
            torch.ones(3), ones, ones, gamma=1.0, lam=1.0, mask_semantics="skip"
        ),
        "variant: got 'sum'": lambda: attnshape.attention_column_credit(
            whole, ones, response_start=start, variant="sum"
        ),
        "shift: got 2": lambda: attnshape.attention_column_credit(whole, ones, response_start=start, shift=2),
        "inputs.query: got one query row": lambda: attnshape.attention_column_credit(
            inputs(), ones, response_start=start
        ),
        "layers: got one query row": lambda: attnshape.attention_rollout(
            [inputs()], ones, response_start=start
        ),
        "layers: got 0 with residual_norm": lambda: attnshape.attention_rollout(
            [dataclasses.replace(whole, value_norm=torch.ones(3, 4, 10))], ones, response_start=start
        ),
        "layers: got 1 with value_norm": lambda: attnshape.attention_rollout(
            [
                whole,
                dataclasses.replace(whole, value_norm=torch.ones(3, 4, 10), residual_norm=torch.ones(3, 10)),
            ],
            ones,
            response_start=start,
        ),
        "layers[0].value_norm: got shape": lambda: attnshape.attention_rollout(
            [dataclasses.replace(whole, value_norm=ones, residual_norm=ones)], ones, response_start=start
        ),
        "mask: got shape": lambda: attnshape.whiten(ones, torch.ones(4)),
        "moments: got shape (4, 2), want [..., 3]": lambda: attnshape.whiten(
            ones, ones, moments=torch.ones(4, 2)
        ),
        "eps_mode: got 'max'": lambda: attnshape.whiten(ones, ones, eps_mode="max"),
        "attention_row cannot resolve": lambda: attnshape.attention_row(
            dataclasses.replace(whole, query_position="last_response")
        ),
    }
    for message, bad_call in bad_calls.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            bad_call()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("response_start", torch.tensor([2, 7, 4]), "row 1 starts at 7 and its last unmasked token lies at"),
        ("response_start", torch.tensor([2, -1, 4]), "response_start: row 1 starts at -1"),
        ("query_position", torch.tensor([0, 1, 10]), "query_position: row 2 is 10, want 0 <="),
        ("key_start", torch.tensor([-1, 0, 0]), "key_start: row 0 is -1"),
        ("score_index", torch.tensor([0, 4, 0]), "score_index: row 1 is 4, want 0 <= score_index < 4"),
        ("response_index", torch.tensor([[0, 1, 2, 3]] * 2 + [[0, 1, 2, 10]]), "row 2 spans 0 to 10"),
        ("response_index", torch.tensor([[0, 1, -2, 3]] * 3), "response_index: row 0 spans -2 to 3"),
    ],
)  # fmt: skip
def test_validate_names_the_row(name: str, value: torch.Tensor, message: str) -> None:
    made, changes = inputs(), {}
    if name in ("query_position", "key_start"):
        made = inputs(**{name: value})
    elif name == "score_index":
        changes["config"] = ShapingConfig(score_index=value)
    else:
        changes = {"response_start": None, name: value}
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
    attnshape.shape_rewards(problem.score, problem.inputs, **problem.kwargs, validate=True)
    bad = torch.tensor([0, 30, 24, 72], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: row 1 is 30:24"):
        attnshape.attention_row(dataclasses.replace(problem.inputs, cu_seqlens=bad), validate=True)
    kwargs = problem.kwargs | {"response_cu_seqlens": torch.tensor([0, 9, 18, 99], dtype=torch.int32)}
    with pytest.raises(
        ValueError, match=r"response_cu_seqlens: row 2 is 18:99, want rising bounds within 0:27"
    ):
        attnshape.shape_rewards(problem.score, problem.inputs, **kwargs, validate=True)


def test_redistribute_is_the_reward_without_the_rest() -> None:
    problem = make_problem(1, extras=False, kl="")
    score, mask, weights = problem.score, problem.kwargs["response_mask"], torch.rand(3, 9)
    rewards = attnshape.redistribute(score, weights, mask, beta=0.5)
    shaped = attnshape.shape_rewards(score, weights, response_mask=mask, config=ShapingConfig(beta=0.5))
    assert torch.equal(rewards, shaped.rewards)
    live = (mask != 0).any(1)
    torch.testing.assert_close(rewards.sum(1), torch.where(live, score, 0.0))
    uniform = attnshape.redistribute(score, "uniform", mask, beta=1.0)
    torch.testing.assert_close(uniform[0], (score[0] / mask[0].sum()) * mask[0])


def test_credit_that_travels_gives_the_same_rewards() -> None:
    problem = make_problem(2)
    place = {name: problem.kwargs[name] for name in ("response_mask", "response_start")}
    credit = attnshape.attention_credit(problem.inputs, **place)
    there = attnshape.shape_rewards(problem.score, credit, **problem.kwargs)
    here = attnshape.shape_rewards(problem.score, problem.inputs, **problem.kwargs)
    torch.testing.assert_close(there.rewards, here.rewards)
    torch.testing.assert_close(there.advantages, here.advantages)


def test_kl_coef_may_be_a_tensor() -> None:
    problem = make_problem(3)
    number = attnshape.shape_rewards(problem.score, problem.inputs, **problem.kwargs)
    tensor = attnshape.shape_rewards(
        problem.score, problem.inputs, **problem.kwargs | {"kl_coef": torch.tensor(0.125)}
    )
    assert torch.equal(number.rewards, tensor.rewards)


def test_metrics_tell_dense_credit_from_sparse() -> None:
    mask, score = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.ones(2)
    dense = attnshape.shape_rewards(score, "uniform", response_mask=mask).metrics
    sparse = attnshape.shape_rewards(score, "sparse", response_mask=mask).metrics
    torch.testing.assert_close(dense["credit_entropy"], torch.tensor([4.0, 2.0]).log().mean())
    torch.testing.assert_close(dense["credit_last_share"], torch.tensor(0.375))
    assert sparse["credit_entropy"] == 0
    assert sparse["credit_last_share"] == 1
    assert "response_attention" not in sparse
    whole = attnshape.shape_rewards(
        torch.ones(1),
        AttentionInputs(torch.randn(1, 1, 4), torch.zeros(1, 1, 8, 4), 1.0),
        response_mask=torch.ones(1, 2),
        response_start=torch.tensor([3]),
    ).metrics
    torch.testing.assert_close(whole["response_attention"], torch.tensor(2 / 8))


def test_triton_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    double = inputs(query=torch.randn(3, 4, 8).double(), key=torch.randn(3, 2, 10, 8).double())
    with pytest.raises(ValueError, match='backend: got "triton", but'):
        attnshape.attention_row(double, backend="triton")


def test_masks_of_any_dtype() -> None:
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        mask = torch.tensor([[1, 0, 1]]).to(dtype)
        out = attnshape.redistribute(torch.tensor([3.0]), "uniform", mask, beta=1.0)
        torch.testing.assert_close(out, torch.tensor([[1.5, 0.0, 1.5]]))
    fraction = attnshape.redistribute(
        torch.tensor([3.0]), "uniform", torch.tensor([[0.25, 0.0, 7.0]]), beta=1.0
    )
    torch.testing.assert_close(fraction, torch.tensor([[1.5, 0.0, 1.5]]))


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
