"""The reference against closed forms, hand-computed cases and the textbook loops."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from attnshape import (
    KL,
    AttentionInputs,
    Response,
    ShapingConfig,
    Status,
    Whitening,
    attention_row,
    reference,
)
from attnshape.reference.whiten import row_moments
from attnshape.types import float32_rounded

F64 = torch.float64


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_what_a_mask_adds_to_the_scores(per_head: bool, packed: bool, causal: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 2, 6, 8, dtype=torch.float64)
    added = torch.randn(2, 4, 6, dtype=torch.float64)
    added[:, :, 1] = added[0, 2 if per_head else slice(None), 4] = -torch.inf
    added = added if per_head else added[:, 0]
    key[:, :, 1] = torch.nan  # nobody sees it
    position = torch.tensor([3, 4])
    rows = []
    for b in range(2):
        scores = torch.stack([query[b, h] @ key[b, h // 2].T for h in range(4)]) * 0.5 + added[b]
        visible = added[b] != -torch.inf
        if causal:
            visible = visible & (torch.arange(6) <= position[b])
        rows.append(scores.masked_fill(~visible, -torch.inf).softmax(-1).mean(0))
    inputs = AttentionInputs(query, key, 0.5, query_position=position, mask_row=added, causal=causal)
    if packed:
        inputs = dataclasses.replace(
            inputs,
            key=key.transpose(1, 2).flatten(0, 1),
            mask_row=added.movedim(-1, 1).flatten(0, 1),
            cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32),
        )
    want = torch.stack(rows)
    for got in (reference.attention_row(inputs), attention_row(inputs, backend="torch")):
        torch.testing.assert_close(got.view(2, 6), want)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def textbook_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    semantics: str,
    bootstrap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Two carries, advantage and next value, one row."""
    gl = float32_rounded(gamma * lam)
    gamma = float32_rounded(gamma)
    advantage, next_value = 0.0, 0.0
    advantages = torch.zeros_like(rewards)
    last = int(mask.nonzero().max())
    for t in reversed(range(len(rewards))):
        m = float(mask[t])
        if t == last:
            next_value = bootstrap
        if semantics == "zero":
            r, v = m * rewards[t], m * values[t]
            advantage = r + gamma * next_value - v + gl * advantage
            next_value = v
        else:
            step = rewards[t] + gamma * next_value - values[t] + gl * advantage
            next_value = m * values[t] + (1 - m) * next_value
            advantage = m * step + (1 - m) * advantage
        advantages[t] = m * advantage
    return advantages, advantages + mask * values


@pytest.mark.parametrize("semantics", ["skip", "zero"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.7, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize(
    "mask", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
)
def test_gae_is_the_textbook_loop(semantics: str, gamma: float, lam: float, mask: list[int]) -> None:
    torch.manual_seed(0)
    rewards, values, live = torch.randn(1, 6, dtype=F64), torch.randn(1, 6, dtype=F64), torch.tensor([mask])
    config = ShapingConfig(gamma=gamma, lam=lam, mask_semantics=semantics)
    for bootstrap in (0.0, 0.75):
        got = reference.gae(rewards, values, live, config, bootstrap=f64([bootstrap])[0])
        want = textbook_gae(rewards[0], values[0], live[0], gamma, lam, semantics, bootstrap)
        torch.testing.assert_close(got[0][0], want[0])
        torch.testing.assert_close(got[1][0], want[1])


def test_decoupled_and_per_row_lam() -> None:
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64), torch.ones(2, 5)
    config = ShapingConfig(gamma=0.9, lam=f64([0.25, 0.75])[0], lam_value=1.0)
    advantages, returns, _ = reference.gae(rewards, values, mask, config)
    for b, own in enumerate((0.25, 0.75)):
        torch.testing.assert_close(
            advantages[b], textbook_gae(rewards[b], values[b], mask[b], 0.9, own, "skip")[0]
        )
        torch.testing.assert_close(
            returns[b], textbook_gae(rewards[b], values[b], mask[b], 0.9, 1.0, "skip")[1]
        )


def test_returns_at_gamma_lam_one_are_reversed_cumulative_sums() -> None:
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(2, 9, dtype=F64), torch.randn(2, 9, dtype=F64), torch.ones(2, 9)
    config = ShapingConfig(gamma=1.0, lam=1.0, mask_semantics="zero")
    advantages, returns, _ = reference.gae(rewards, values, mask, config)
    sums = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, sums)
    torch.testing.assert_close(advantages, sums - values)


def test_without_values_advantages_are_discounted_rewards_to_go() -> None:
    rewards = f64([1.0, 2.0, 4.0])
    config = ShapingConfig(gamma=0.5, lam=0.3)
    advantages, returns, _ = reference.gae(rewards, None, torch.ones(1, 3), config)
    assert advantages.tolist() == returns.tolist() == [[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0]]


def one_head(logits: list[float], **kwargs: object) -> AttentionInputs:
    """One head whose attention scores are ``logits``."""
    return AttentionInputs(f64([1.0])[None], f64(logits)[:, None, :, None], 1.0, **kwargs)


def test_one_head_is_a_softmax() -> None:
    inputs = one_head([0.0, math.log(2), math.log(5)])
    torch.testing.assert_close(reference.attention_row(inputs), f64([1 / 8, 2 / 8, 5 / 8]))
    response = Response(torch.ones(1, 2), start=torch.tensor([1]))
    torch.testing.assert_close(reference.attention_credit(inputs, response), f64([2 / 7, 5 / 7]))
    response = Response(torch.ones(1, 2), index=torch.tensor([[2, -1]]))
    raw = reference.attention_credit(inputs, response, normalization="none")
    torch.testing.assert_close(raw, f64([5 / 8, 0.0]))


@pytest.mark.parametrize(
    ("kwargs", "want"),
    [
        ({"sinks": f64([math.log(8)])[0]}, [1 / 16, 2 / 16, 5 / 16]),
        ({"sliding_window": 2}, [0.0, 2 / 7, 5 / 7]),
        ({"query_position": torch.tensor([1])}, [1 / 3, 2 / 3, 0.0]),
        ({"key_start": torch.tensor([1])}, [0.0, 2 / 7, 5 / 7]),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, [1 / 6, 0.0, 5 / 6]),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, [1 / 3, 2 / 3, 0.0]),
        ({"lse": f64([math.log(16)])}, [1 / 16, 2 / 16, 5 / 16]),
        ({"lse": f64([math.log(8)]), "sinks": f64([math.log(8)])[0]}, [1 / 16, 2 / 16, 5 / 16]),
    ],
)
def test_what_a_query_sees(kwargs: dict[str, object], want: list[float]) -> None:
    torch.testing.assert_close(
        reference.attention_row(one_head([0.0, math.log(2), math.log(5)], **kwargs)), f64(want)
    )


def test_softcap() -> None:
    got = reference.attention_row(one_head([1.0, 3.0], softcap=2.0))
    torch.testing.assert_close(got, torch.softmax(2 * torch.tanh(f64([0.5, 1.5])), 1))


def test_grouped_heads_layers_and_packing() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 2, 5, 8, dtype=F64)
    scores = torch.stack([key[:, h // 2] @ query[:, h, :, None] for h in range(4)], 1)[..., 0] * 0.5
    inputs = AttentionInputs(query, key, 0.5)
    want = scores.softmax(-1).mean(1)
    torch.testing.assert_close(reference.attention_row(inputs), want)
    other = AttentionInputs(-query, key, 0.5)
    both = (want + reference.attention_row(other)) / 2
    torch.testing.assert_close(reference.attention_row([inputs, other]), both)
    packed = AttentionInputs(
        query, key.transpose(1, 2).flatten(0, 1), 0.5, cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32)
    )
    torch.testing.assert_close(reference.attention_row(packed), want.flatten())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, F64])
def test_only_chosen_heads_count(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 3, 5, 8, dtype=F64), torch.randn(1, 3, 5, 8, dtype=F64)
    key[:, 1] = math.nan
    inputs = AttentionInputs(query, key, 0.5, head_mask=torch.tensor([2, 0, -1]).to(dtype))
    kept = AttentionInputs(query[:, ::2], key[:, ::2], 0.5)
    response = Response(torch.ones(1, 3), start=torch.tensor([1]))
    norms, residual = torch.rand(1, 3, 5, dtype=F64), torch.rand(1, 5, dtype=F64)
    norms[:, 1] = math.nan
    for credit in (reference.attention_credit, reference.attention_column_credit):
        torch.testing.assert_close(credit(inputs, response), credit(kept, response))
    weighted = dataclasses.replace(inputs, value_norm=norms, residual_norm=residual)
    kept_weighted = dataclasses.replace(kept, value_norm=norms[:, ::2], residual_norm=residual)
    for layer, kept_layer in ((inputs, kept), (weighted, kept_weighted)):
        got = reference.attention_rollout([layer], response)
        want = reference.attention_rollout([kept_layer], response)
        torch.testing.assert_close(got, want)


def test_where_no_head_counts_the_score_stays_on_its_token() -> None:
    inputs = AttentionInputs(
        torch.randn(1, 2, 4), torch.randn(1, 2, 4, 4), 1.0, head_mask=torch.zeros(2, dtype=torch.bool)
    )
    assert not reference.attention_row(inputs).any()
    response = Response(torch.ones(1, 3), start=torch.tensor([1]))
    out = reference.shape_rewards(torch.ones(1), inputs, response)
    assert out.credit.tolist() == [[0.0, 0.0, 1.0]]
    assert out.status.tolist() == [Status.FALLBACK]


@pytest.mark.parametrize(
    ("estimator", "want"),
    [
        ("k1", [0.5, -1.0]),
        ("abs", [0.5, 1.0]),
        ("k2", [0.125, 0.5]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2]),
    ],
)
def test_kl_estimators(estimator: str, want: list[float]) -> None:
    logprobs, ref = f64([-1.0, -3.0]), f64([-1.5, -2.0])
    torch.testing.assert_close(reference.kl_estimate(logprobs, ref, estimator), f64(want))
    clipped = reference.kl_estimate(logprobs, ref, estimator, 0.5, 0.25)
    inner = {"k1": [0.5, -0.5], "abs": [0.5, 0.5], "k2": [0.125, 0.125]}
    inner["k3"] = [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5]
    torch.testing.assert_close(clipped, f64(inner[estimator]).clamp(-0.25, 0.25))


def test_k3_of_a_small_ratio_keeps_its_digits() -> None:
    kl = reference.kl_estimate(f64([1e-9]), f64([0.0]), "k3")
    torch.testing.assert_close(kl, f64([0.5e-18]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("source", ["uniform", "sparse", "weights", "attention"])
@pytest.mark.parametrize("dense_share", [0.0, 0.8, 1.0])
def test_rewards_sum_to_the_score(source: str, dense_share: float) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]])
    credit = {
        "weights": torch.rand(2, 5, dtype=F64),
        "attention": AttentionInputs(
            torch.randn(2, 1, 4, dtype=F64), torch.randn(2, 1, 9, 4, dtype=F64), 1.0
        ),
    }.get(source, source)
    score = f64([3.0, -2.0])[0]
    response = Response(mask, start=torch.tensor([2, 3]))
    config = ShapingConfig(dense_share=dense_share, gamma=1.0, lam=1.0)
    out = reference.shape_rewards(score, credit, response, config=config)
    torch.testing.assert_close(out.rewards.sum(1), score)
    assert not out.rewards[mask == 0].any()
    torch.testing.assert_close(out.returns[:, 2][1], score[1])
    assert out.status.tolist() == [0, 0]


def test_a_hand_computed_row() -> None:
    out = reference.shape_rewards(
        f64([6.0])[0],
        f64([1.0, 5.0, 3.0, 9.0]),
        torch.tensor([[1, 0, 1, 0]]),
        values=f64([0.5, 9.0, 0.25, 9.0]),
        kl=KL.given(f64([1.0, 7.0, 2.0, 7.0]), 0.5),
        token_rewards=f64([0.25, 7.0, 0.0, 7.0]),
        terminal_reward=f64([10.0])[0],
        bootstrap=f64([100.0])[0],
        config=ShapingConfig(dense_share=0.5, gamma=1.0, lam=0.5, score_clip=4.0),
    )
    # The score is clamped to 4; half of it goes 1:3, half stays on the last unmasked token.
    rewards = [0.5 * 4 / 4 + 0.25 - 0.5, 0.0, 0.5 * 4 * 3 / 4 + 0.5 * 4 + 10 - 1.0, 0.0]
    last = rewards[2] + 100 - 0.25
    first = rewards[0] + 0.25 - 0.5 + 0.5 * last
    torch.testing.assert_close(out.credit, f64([0.25, 0.0, 0.75, 0.0]))
    torch.testing.assert_close(out.rewards, f64(rewards))
    torch.testing.assert_close(out.advantages, f64([first, 0.0, last, 0.0]))
    torch.testing.assert_close(out.returns, f64([first + 0.5, 0.0, last + 0.25, 0.0]))
    assert out.kl is not None
    assert out.kl.tolist() == [[1.0, 0.0, 2.0, 0.0]]
    torch.testing.assert_close(
        out.row_stats.entropy, -f64([0.25 * math.log(0.25) + 0.75 * math.log(0.75)])[0]
    )
    torch.testing.assert_close(out.row_stats.last_share, f64([0.75])[0])


def test_score_clip() -> None:
    for clip, want in ((4.0, -4.0), ((-3.0, 9.0), -3.0), (None, -6.0)):
        config = ShapingConfig(score_clip=clip)
        out = reference.shape_rewards(f64([-6.0])[0], "sparse", torch.ones(1, 2), config=config)
        assert out.rewards.tolist() == [[0.0, want]]


def test_one_token() -> None:
    response = Response(torch.ones(1, 1), start=torch.tensor([0]))
    out = reference.shape_rewards(f64([2.0])[0], one_head([0.0]), response, values=f64([0.5]))
    assert out.rewards.tolist() == [[2.0]]
    assert out.advantages.tolist() == [[1.5]]
    assert out.returns.tolist() == [[2.0]]


def test_status() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    weights = f64([0, 0, 9], [1, 1, 1], [1, 2, 1], [1, 3, 0], [1, math.nan, 1])
    out = reference.shape_rewards(
        f64([1, 1, 1, 2, 1])[0],
        weights,
        mask,
        config=ShapingConfig(dense_share=0.5, lam=1.0, score_index=torch.tensor([1, 0, 3, 2, 0])),
    )
    assert out.status.tolist() == [
        Status.FALLBACK,
        Status.EMPTY,
        Status.OUT_OF_RANGE | Status.NONFINITE,
        Status.SCORE_MASKED,
        Status.NONFINITE,
    ]
    assert out.rewards[0].tolist() == [0.0, 1.0, 0.0]
    assert not out.rewards[1].any()
    assert out.rewards[2].isnan().all()
    assert out.rewards[3].tolist() == [0.25, 0.75, 0.0]
    metrics = {name: value.item() for name, value in out.metrics.items()}
    counts = {"fallback": 1, "empty": 1, "score_masked": 1, "out_of_range": 1, "nan": 2}
    assert {name: metrics[f"{name}_rows"] for name in counts} == counts
    assert metrics["score_error"] == 1.0  # what score_index lost
    config = ShapingConfig(on_nan="zero_row")
    zeroed = reference.shape_rewards(f64([1.0])[0], f64([1.0, math.nan]), torch.ones(1, 2), config=config)
    assert not zeroed.rewards.any()
    assert zeroed.status.tolist() == [Status.NONFINITE]


def test_column_credit_by_hand() -> None:
    # Token s sees tokens up to s with equal weight: a_s[j] = 1 / (s + 1).
    inputs = AttentionInputs(torch.zeros(1, 1, 3, 2, dtype=F64), torch.zeros(1, 1, 3, 2, dtype=F64), 1.0)
    response = Response(torch.ones(1, 3), start=torch.tensor([0]))
    third, half = 1 / 3, 1 / 2
    cases = {
        ("mean", 0): [(1 + half + third) / 3, (half + third) / 2, third],
        ("last", 0): [third] * 3,
        ("mean", 1): [0.0, (1 + half) / 2, half],
        ("last", 1): [0.0, half, half],
    }
    for (variant, shift), want in cases.items():
        got = reference.attention_column_credit(
            inputs, response, variant=variant, shift=shift, normalization="none"
        )
        torch.testing.assert_close(got, f64(want))


def test_rollout_by_hand() -> None:
    inputs = AttentionInputs(torch.zeros(1, 2, 2, 2, dtype=F64), torch.zeros(1, 2, 2, 2, dtype=F64), 1.0)
    response = Response(torch.ones(1, 2), start=torch.tensor([0]))
    # Two plain layers from the last of two tokens: [0, 1] -> [1/4, 3/4] -> [7/16, 9/16].
    got = reference.attention_rollout([inputs, inputs], response, normalization="none")
    torch.testing.assert_close(got, f64([7 / 16, 9 / 16]))
    # One weighted layer: token 0 moves 1/2 * (1 + 3), token 1 moves 1/2 * (2 + 2), the residual keeps 4 of 8.
    norms = f64([1.0, 2.0], [3.0, 2.0])[None]
    layer = dataclasses.replace(inputs, value_norm=norms, residual_norm=f64([7.0, 4.0]))
    weighted = reference.attention_rollout([layer], response, normalization="none")
    torch.testing.assert_close(weighted, f64([2 / 8, 6 / 8]))


def test_whiten_by_hand() -> None:
    x, mask = f64([1.0, 3.0, 100.0]), torch.tensor([[1, 1, 0]])
    rsqrt2 = 1 / math.sqrt(2)
    cases = [
        (Whitening(eps=0.0), [-rsqrt2, rsqrt2, 0.0]),
        (Whitening(eps=0.0, bessel=False), [-1.0, 1.0, 0.0]),
        (Whitening(eps=4.0, eps_mode="clamp", shift_mean=False), [1.5, 2.5, 0.0]),
        (Whitening(eps=1.0, eps_mode="add_to_std", bessel=False), [-0.5, 0.5, 0.0]),
        (Whitening(eps=2.0, whiten_masked=True), [-0.5, 0.5, 49.0]),
    ]
    for config, want in cases:
        torch.testing.assert_close(reference.whiten(x, mask, config), f64(want))
    assert reference.whiten(x, torch.tensor([[0, 1, 0]])).tolist() == [[0.0, 0.0, 0.0]]
    assert reference.whiten(x, torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


def test_moments_by_hand() -> None:
    x, mask = f64([1.0, 3.0, 100.0], [9.0, 9.0, 9.0], [5.0, 7.0, 9.0]), torch.ones(3, 3)
    mask[0, 2] = mask[1, :] = 0
    want = f64([2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 7.0, 8.0])
    torch.testing.assert_close(row_moments(x, Response(mask)), want)
    packed = Response(mask.flatten(), cu_seqlens=torch.tensor([0, 3, 6, 9], dtype=torch.int32))
    torch.testing.assert_close(row_moments(x.flatten(), packed), want)
    config = ShapingConfig(gamma=0.0)
    torch.testing.assert_close(reference.gae(x, None, mask, config).moments, want)
    score = torch.zeros(3, dtype=F64)
    out = reference.shape_rewards(score, x, mask, token_rewards=x, config=config)
    torch.testing.assert_close(out.moments, want)
    whitened = reference.whiten(x, mask)
    torch.testing.assert_close(reference.whiten(x, mask, moments=want), whitened)
    torch.testing.assert_close(reference.whiten(x, mask, moments=want[None, ::2]), whitened)


def test_dtype_of_results() -> None:
    single = reference.shape_rewards(torch.ones(1), f64([1.0, 2.0]), torch.ones(1, 2))
    assert single.rewards.dtype == torch.float32
    double = reference.shape_rewards(f64([1.0])[0], f64([1.0, 2.0]), torch.ones(1, 2))
    assert double.rewards.dtype == F64


def test_scores_that_require_grad() -> None:
    score, values = torch.tensor([2.0, -1.0], requires_grad=True), torch.ones(2, 3, requires_grad=True)
    out = reference.shape_rewards(score, "uniform", torch.ones(2, 3), values=values)
    plain = reference.shape_rewards(score.detach(), "uniform", torch.ones(2, 3), values=values.detach())
    assert torch.equal(out.advantages, plain.advantages)
    assert not out.rewards.requires_grad
