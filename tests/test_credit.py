"""Sources of credit against their formulas written out token by token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnshape import (
    AttentionInputs,
    Response,
    ShapingConfig,
    SignedInputs,
    Status,
    credit,
    reference,
    shape_rewards,
)
from attnshape.reference.attention import attention_matrix, keys_of_row

F64 = torch.float64
B, R, S = 6, 9, 14


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def response_mask() -> Tensor:
    """Rows with holes, at either end too; full; of one token; empty."""
    mask = torch.rand(B, R, generator=torch.Generator().manual_seed(3)) > 0.35
    mask[0], mask[1] = True, False
    mask[2] = torch.arange(R) == 4
    mask[3, :2] = mask[4, -2:] = False
    return mask


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, math.nan)


def check(make: Callable[..., Tensor], by_hand: Callable[..., list[float]], *tokens: Tensor) -> None:
    """``make`` of token tensors and the mask, padded and packed; ``by_hand`` of one row's unmasked tokens."""
    mask = response_mask()
    want = torch.zeros(B, R, dtype=F64)
    for b in range(B):
        want[b, mask[b]] = torch.tensor(by_hand(b, *(x[b, mask[b]].tolist() for x in tokens)), dtype=F64)
    given = [poisoned(x, mask) for x in tokens]
    for mask_dtype in (torch.bool, torch.int64, torch.float32):
        got = make(*given, mask.to(mask_dtype))
        assert got.dtype in (F64, torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    single = make(*(x.float().requires_grad_() for x in given), mask)
    assert single.dtype == torch.float32
    assert not single.requires_grad
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-5)
    # Rows of different lengths end to end, tokens of no sequence before and after them.
    lengths = [int(row.nonzero().max()) + 1 if row.any() else 2 for row in mask]
    lengths[5] = 0
    bounds = torch.tensor([2, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def pack(x: Tensor) -> Tensor:
        return torch.cat([x[0, :2], *(x[b, :n] for b, n in enumerate(lengths)), x[0, :3]])

    got = make(*map(pack, given), Response(pack(mask), cu_seqlens=bounds))
    for b, (lo, hi) in enumerate(itertools.pairwise(bounds.tolist())):
        torch.testing.assert_close(got[lo:hi].double(), want[b, : hi - lo], rtol=1e-6, atol=1e-7)


def test_uniform() -> None:
    mask = response_mask()
    check(credit.uniform, lambda b: [1 / n for n in [int(mask[b].sum())] for _ in range(n)])


def test_sparse() -> None:
    mask = response_mask()

    def by_hand(b: int) -> list[float]:
        n = int(mask[b].sum())
        return [float(j == n - 1) for j in range(n)]

    check(credit.sparse, by_hand)


@pytest.mark.parametrize("name", ["uniform", "sparse"])
def test_named_credit_is_that_of_shape_rewards(name: str) -> None:
    mask, score = response_mask(), normal(B)
    for config in (ShapingConfig(), ShapingConfig(normalization="sum_to_length")):
        want = shape_rewards(score, name, mask, config=config)
        got = shape_rewards(score, getattr(credit, name)(mask), mask, config=config)
        torch.testing.assert_close(got.rewards, want.rewards.float())


def test_incremental_rewards() -> None:
    prompt = normal(B, seed=1)

    def by_hand(b: int, scores: list[float]) -> list[float]:
        before = [prompt[b].item(), *scores][:-1] if scores else []
        return [score - previous for score, previous in zip(scores, before, strict=True)]

    check(
        lambda scores, response: credit.incremental_rewards(scores, prompt.to(scores.dtype), response),
        by_hand,
        normal(B, R),
    )


def test_incremental_rewards_sum_to_what_the_response_added() -> None:
    mask, scores, prompt = response_mask(), normal(B, R), normal(B, seed=1)
    got = credit.incremental_rewards(poisoned(scores, mask), prompt, mask).sum(1)
    for b in range(B):
        live = mask[b].nonzero().flatten()
        added = scores[b, live[-1]] - prompt[b] if len(live) else torch.zeros((), dtype=F64)
        torch.testing.assert_close(got[b], added)


def test_log_ratio_rewards() -> None:
    check(
        lambda *x: credit.log_ratio_rewards(*x, scale=0.25),
        lambda b, policy, ref: [0.25 * (x - y) for x, y in zip(policy, ref, strict=True)],
        normal(B, R),
        normal(B, R, seed=1),
    )


def test_discriminator_rewards() -> None:
    check(
        lambda *x: credit.discriminator_rewards(*x, validate=True),
        lambda b, good: [2 * p - 1 for p in good],
        normal(B, R).sigmoid(),
    )


@pytest.mark.parametrize("cutoff", [-10.0, 0.3, 0.8, math.inf])
def test_segment_rewards(cutoff: float) -> None:
    mean, std = (0.4, -0.2), (-0.3, 1.5)

    def by_hand(b: int, scores: list[float], entropy: list[float]) -> list[float]:
        segments: list[list[int]] = [[]]
        for j, h in enumerate(entropy):
            segments[-1].append(j)
            if h > cutoff:
                segments.append([])
        segments = [segment for segment in segments if segment]
        rewards = []
        for k, segment in enumerate(segments, start=1):
            p = k / len(segments)
            mu, sigma = (w * math.log(p) + bias for w, bias in (mean, std))
            rewards += [(scores[segment[-1]] - mu) / sigma / len(segment)] * len(segment)
        return rewards

    check(
        lambda *x: credit.segment_rewards(*x, cutoff=cutoff, mean=mean, std=std),
        by_hand,
        normal(B, R),
        normal(B, R, seed=1).abs(),
    )


def test_segments_are_not_normalised_unless_asked() -> None:
    scores, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3)
    got = credit.segment_rewards(scores, torch.tensor([[1.0, 1.005, 0.0]]), mask, cutoff=1.0)
    torch.testing.assert_close(got, torch.tensor([[1.0, 1.0, 4.0]]))


def test_centered() -> None:
    check(
        credit.centered,
        lambda b, weights: [w - sum(weights) / len(weights) for w in weights],
        normal(B, R),
    )


def overlap_by_hand(first: list[float], second: list[float], share: float) -> float:
    """Means over all ways to break ties, each source's by itself."""
    k = max(1, round(share * len(first)))

    def ways(weights: list[float]) -> list[set[int]]:
        sizes = [abs(w) for w in weights]
        top = sorted(sizes, reverse=True)[:k]
        found = itertools.combinations(range(len(sizes)), k)
        return [set(c) for c in found if sorted((sizes[i] for i in c), reverse=True) == top]

    shares = [len(a & b) / k for a in ways(first) for b in ways(second)]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_top_overlap(share: float) -> None:
    mask = response_mask()
    first = normal(B, R, seed=1)
    second = (first + normal(B, R, seed=2)).round()  # with ties
    bounds = torch.arange(0, B * R + 1, R, dtype=torch.int32)
    got = credit.top_overlap(poisoned(first, mask), poisoned(second, mask), mask, share=share)
    response = Response(mask.flatten(), cu_seqlens=bounds)
    packed = credit.top_overlap(first.flatten(), second.flatten(), response, share=share)
    assert got.dtype == torch.float32
    for b in range(B):
        if mask[b].any():
            want = overlap_by_hand(first[b, mask[b]].tolist(), second[b, mask[b]].tolist(), share)
            assert got[b].item() == pytest.approx(want, abs=1e-6)
        else:
            assert got[b].isnan()
    torch.testing.assert_close(packed, got, equal_nan=True)


def test_top_overlap_of_sources_that_agree_and_that_do_not() -> None:
    mask, x = torch.ones(2, 200), normal(2, 200)
    assert credit.top_overlap(x, -2 * x, mask).tolist() == [1.0, 1.0]
    torch.testing.assert_close(credit.top_overlap(x, torch.ones(2, 200), mask), torch.full((2,), 0.1))
    bad = torch.where(torch.arange(200) == 7, torch.nan, x[:1]).expand(2, 200).clone()
    bad[1] = x[1]
    assert credit.top_overlap(bad, x, mask).isnan().tolist() == [True, False]


def test_centered_weights_leave_the_score_alone() -> None:
    mask, score, weights = response_mask(), normal(B), normal(B, R, seed=1) * 50
    rewards = shape_rewards(
        score,
        "uniform",
        mask,
        token_rewards=credit.centered(poisoned(weights, mask), mask),
        config=ShapingConfig(dense_share=1.0),
    ).rewards
    for b in range(B):
        if not mask[b].any():
            continue
        live = weights[b, mask[b]]
        torch.testing.assert_close(rewards[b, mask[b]], score[b] / len(live) + live - live.mean())
        torch.testing.assert_close(rewards[b].sum(), score[b])


# Gradient times input


def cubic_score(inputs: Tensor, lengths: Tensor) -> Tensor:
    """``sum of c[t] * x^3`` over the first positions: its gradient times its input is 3 times each term."""
    axes = [1, 3] if inputs.ndim == 4 else [2]
    per_token = inputs.pow(3).sum(axes) * torch.arange(1, S + 1)
    return torch.where(torch.arange(S) < lengths[:, None], per_token, 0.0).sum(1)


@pytest.mark.parametrize("shape", [(B, 2, S, 3), (B, S, 5)])
@pytest.mark.parametrize("by", ["start", "index", "packed"])
def test_gradient_weights(shape: tuple[int, ...], by: str) -> None:
    mask, lengths = response_mask(), torch.tensor([14, 14, 14, 14, 14, 8])
    inputs = normal(*shape).requires_grad_()
    score = cubic_score(inputs, lengths)
    terms = inputs.detach().pow(3).sum([1, 3] if len(shape) == 4 else [2]) * torch.arange(1, S + 1)
    terms = 3 * terms.masked_fill(torch.arange(S) >= lengths[:, None], 0.0)
    start = torch.tensor([0, 5, 3, 2, 4, 5])
    places = start[:, None] + torch.arange(R)
    place: dict[str, Tensor] = {"start": start}
    if by == "index":
        places = places.flip(1)
        places[4, 3] = -1
        mask[4, 3] = True
        place = {"index": places}
    want = torch.where(places < 0, 0.0, terms.gather(1, places.clamp(min=0))).masked_fill(~mask, 0.0)
    if by == "packed":
        bounds = torch.arange(0, B * R + 1, R, dtype=torch.int32)
        response = Response(mask.flatten(), **place, cu_seqlens=bounds)
        got = credit.gradient_weights(score, inputs, response).view(B, R)
    else:
        got = credit.gradient_weights(score, inputs, Response(mask, **place), validate=True)
    torch.testing.assert_close(got, want)
    assert got.dtype == F64
    assert not got.requires_grad
    assert inputs.grad is None


def test_gradient_weights_of_a_row_out_of_range() -> None:
    inputs = normal(2, S, 3).float().requires_grad_()
    mask = torch.ones(2, 4)
    mask[0, 3] = 0
    response = Response(mask, start=torch.tensor([S - 3, S - 3]))
    got = credit.gradient_weights(inputs.pow(2).sum([1, 2]), inputs, response)
    want = 2 * inputs.detach().pow(2).sum(2)
    torch.testing.assert_close(got[0], torch.cat([want[0, -3:], torch.zeros(1)]))
    assert got[1].isnan().all()
    assert got.dtype == torch.float32
    with pytest.raises(ValueError, match=r"response\.start: row 1"):
        credit.gradient_weights(inputs.pow(2).sum([1, 2]), inputs, response, validate=True)


# Signed rollout


def signed_layers(count: int, *, dtype: torch.dtype = F64, **options: Any) -> list[SignedInputs]:
    layers = []
    attended = torch.rand(B, S, generator=torch.Generator().manual_seed(9)) > 0.2
    attended[:, :2] = attended[:, -1] = True
    attended[3, -5:] = False
    for i in range(count):
        query, key = normal(B, 4, S, 8, seed=10 * i + 1), normal(B, 2, S, 8, seed=10 * i + 2)
        inputs = AttentionInputs(query.to(dtype), key.to(dtype), 0.5, attention_mask=attended, **options)
        value = normal(B, 2, S, 5, seed=10 * i + 3).masked_fill(~attended[:, None, :, None], math.nan)
        pull = normal(B, 4, S, 5, seed=10 * i + 4).masked_fill(~attended[:, None, :, None], math.nan) / 5
        layers.append(SignedInputs(inputs, value.to(dtype), pull.to(dtype)))
    return layers


def signed_rollout_by_hand(layers: list[SignedInputs], b: int, position: int) -> Tensor:
    r = torch.zeros(S, dtype=F64)
    r[position] = 1
    for inputs, value, pull in reversed(layers):
        seq = keys_of_row(inputs, b)
        assert seq is not None
        attention = attention_matrix(inputs, seq)
        value = value[b].nan_to_num(0.0)
        below = torch.zeros(S, dtype=F64)
        for s in range(S):
            if r[s] == 0:
                continue
            kept = r[s].clone()
            for t in range(S):
                share = sum(attention[h, s, t] * (pull[b, h, s] @ value[h // 2, t]) for h in range(4))
                below[t] += r[s] * share
                kept -= r[s] * share
            below[s] += kept
        r = below
    return r


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "sliding_window": 5}])
def test_signed_rollout(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layers, mask = signed_layers(2, **options), response_mask()
    response = Response(mask, start=torch.full((B,), S - R))
    got = credit.signed_rollout(layers, response, validate=True)
    torch.testing.assert_close(reference.signed_rollout(layers, response), got)
    for b in range(B):
        r = signed_rollout_by_hand(layers, b, S - 6 if b == 3 else S - 1)
        torch.testing.assert_close(r.sum(), torch.ones((), dtype=F64))
        torch.testing.assert_close(got[b], r[S - R :].masked_fill(~mask[b], 0.0))
    assert got.min() < 0
    monkeypatch.setattr("attnshape.vectorized.attention.SCORE_ELEMENTS", B * 4 * S * 3)
    torch.testing.assert_close(credit.signed_rollout(layers, response), got)


def test_signed_rollout_of_packed_sequences() -> None:
    layers, response = signed_layers(2), Response(response_mask(), start=torch.full((B,), S - R))
    want = credit.signed_rollout(layers, response)
    bounds = torch.arange(0, B * S + 1, S, dtype=torch.int32)

    def pack(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    packed = [
        SignedInputs(
            AttentionInputs(
                pack(x.query),
                pack(x.key),
                x.scaling,
                cu_seqlens=bounds,
                attention_mask=x.attention_mask.flatten(),
            ),
            pack(value),
            pack(pull),
        )
        for x, value, pull in layers
    ]
    torch.testing.assert_close(credit.signed_rollout(packed, response), want)


def test_heads_that_do_not_count_carry_nothing() -> None:
    layers, response = signed_layers(1), Response(torch.ones(B, R), start=torch.full((B,), S - R))
    [(inputs, value, pull)] = layers
    chosen = torch.tensor([1, 0, 0, 1])
    masked = [
        SignedInputs(
            AttentionInputs(
                inputs.query, inputs.key, 0.5, attention_mask=inputs.attention_mask, head_mask=chosen
            ),
            value,
            pull.masked_fill(chosen[:, None, None] == 0, math.nan),
        )
    ]
    silent = [SignedInputs(inputs, value, pull * chosen[:, None, None])]
    torch.testing.assert_close(
        credit.signed_rollout(masked, response), credit.signed_rollout(silent, response)
    )


@st.composite
def signed_rollouts(draw: st.DrawFn) -> tuple[list[SignedInputs], Response]:
    """Layers and a response of every layout; what nobody may look at is NaN."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g)

    batch, keys, kv_heads, group = pick(1, 2, 4), draw(st.integers(2, 9)), pick(1, 2), pick(1, 3)
    width, heads = draw(st.integers(1, keys)), kv_heads * group
    attended = torch.rand(batch, keys, generator=g) < 0.8
    attended[:, -1] |= draw(st.booleans())
    packed, window, softcap = draw(st.booleans()), pick(None, 1, 3), pick(None, 2.0)
    head_mask = pick(None, torch.tensor([1, 0, 1, 1, 0, 1])[:heads])
    sinks = normal(heads) if draw(st.booleans()) else None
    key_start = below(keys + pick(0, 2), batch) if draw(st.booleans()) else None
    position = pick(None, "last_response", "given")
    if position == "given":
        position = below(keys, batch)
        position[0] += pick(0, 0, keys)  # then the row is out of range
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        query, key = normal(batch, heads, keys, 4) * 2, normal(batch, kv_heads, keys, 4)
        value, pull = normal(batch, kv_heads, keys, 3), normal(batch, heads, keys, 3)
        key, value = (x.masked_fill(~attended[:, None, :, None], math.nan) for x in (key, value))
        if head_mask is not None:
            pull = pull.masked_fill(head_mask[:, None, None] == 0, pick(math.nan, 7.0))
        tokens, bounds = attended, None
        if packed:
            query, key, value, pull = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value, pull))
            tokens, bounds = attended.flatten(), (torch.arange(batch + 1) * keys).int()
        inputs = AttentionInputs(
            query,
            key,
            0.5,
            attention_mask=tokens,
            cu_seqlens=bounds,
            key_start=key_start,
            query_position=position,
            softcap=softcap,
            sliding_window=window,
            sinks=sinks,
            head_mask=head_mask,
            causal=draw(st.booleans()),
        )
        layers.append(SignedInputs(inputs, value, pull))
    mask = torch.rand(batch, width, generator=g) < pick(0.7, 1.0)
    start = below(keys - width + 1 + pick(0, 1), batch)  # one too far is out of range
    index = torch.where(torch.rand(batch, width, generator=g) < 0.2, -1, below(keys, batch, width))
    place = {"index": index} if draw(st.booleans()) else {"start": start}
    if not draw(st.booleans()):
        return layers, Response(mask, **place)
    if "index" in place:
        place["index"] = index.flatten()
    return layers, Response(mask.flatten(), **place, cu_seqlens=(torch.arange(batch + 1) * width).int())


@settings(max_examples=150)
@given(signed_rollouts())
def test_signed_rollout_is_the_reference(problem: tuple[list[SignedInputs], Response]) -> None:
    layers, response = problem
    got = credit.signed_rollout(layers, response)
    torch.testing.assert_close(got, reference.signed_rollout(layers, response), equal_nan=True)


# All of them


def test_all_sources_are_in_one_place() -> None:
    for name in credit.__all__:
        assert getattr(credit, name).__doc__


def test_every_source_goes_into_shape_rewards() -> None:
    mask, score = response_mask(), normal(B).float()
    x = poisoned(normal(B, R).float(), mask)
    signed = credit.signed_rollout(
        signed_layers(2, dtype=torch.float32), Response(mask, start=torch.full((B,), S - R))
    )
    for weights in (
        credit.uniform(mask),
        credit.sparse(mask),
        signed.abs(),
    ):
        shaped = shape_rewards(score, weights, mask, validate=True)
        live = mask.any(1)
        torch.testing.assert_close(shaped.rewards.sum(1)[live], score[live])
    for rewards in (
        credit.incremental_rewards(x, score, mask),
        credit.log_ratio_rewards(x, x + 1, mask, scale=0.1),
        credit.discriminator_rewards(x.sigmoid(), mask),
        credit.segment_rewards(x, x.abs(), mask, cutoff=0.5),
        credit.centered(x, mask),
    ):
        config = ShapingConfig(lam=0.95)
        shaped = shape_rewards(torch.zeros(B), "sparse", mask, token_rewards=rewards, values=x, config=config)
        torch.testing.assert_close(shaped.rewards, rewards)
        assert shaped.advantages.isfinite().all()
    with pytest.raises(ValueError, match=r"credit: got -.* signed ones are token_rewards"):
        shape_rewards(score, signed, mask, validate=True)
    assert (shape_rewards(score, signed, mask).status & int(Status.NEGATIVE)).any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    mask, x, row = torch.ones(shape), torch.ones(shape), torch.ones(shape[0])
    for out in (
        credit.uniform(mask),
        credit.sparse(mask),
        credit.incremental_rewards(x, row, mask),
        credit.log_ratio_rewards(x, x, mask, scale=1.0),
        credit.discriminator_rewards(x, mask, validate=True),
        credit.segment_rewards(x, x, mask, cutoff=0.0),
        credit.centered(x, mask),
    ):
        assert out.shape == shape
    assert credit.top_overlap(x, x, mask).shape == shape[:1]


def bad_calls() -> dict[str, Callable[[], object]]:
    mask, x, row = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)
    inputs = torch.ones(2, 5, 4, requires_grad=True)
    response = Response(mask, start=torch.zeros(2, dtype=torch.int32))
    [(layer, value, pull)] = signed_layers(1)
    from_zero = Response(torch.ones(B, R), start=torch.zeros(B, dtype=torch.int32))
    past_the_end = Response(torch.ones(B, R), start=torch.full((B,), S))
    gradient_weights, segments, rollout = (
        credit.gradient_weights,
        credit.segment_rewards,
        credit.signed_rollout,
    )
    one_row = AttentionInputs(layer.query[:, :, 0], layer.key, 0.5)
    return {
        "response.mask: got list": lambda: credit.uniform([[1]]),
        "response.mask: got shape (3,)": lambda: credit.uniform(torch.ones(3)),
        "response.mask: got shape (2, 3), want [M]": lambda: credit.sparse(
            Response(mask, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
        ),
        "response.cu_seqlens: got torch.int64": lambda: credit.centered(
            row, Response(row, cu_seqlens=torch.tensor([0, 2]))
        ),
        "token_scores: got shape (2, 4)": lambda: credit.incremental_rewards(torch.ones(2, 4), row, mask),
        "prompt_score: got shape (1,), want (2,)": lambda: credit.incremental_rewards(x, row[:1], mask),
        "token_scores: got torch.int64": lambda: credit.incremental_rewards(x.long(), row, mask),
        "ref_logprobs: got NoneType": lambda: credit.log_ratio_rewards(x, None, mask, scale=1.0),
        "scale: got nan": lambda: credit.log_ratio_rewards(x, x, mask, scale=math.nan),
        "scale: got Tensor": lambda: credit.log_ratio_rewards(x, x, mask, scale=row),
        "good: got shape (2,)": lambda: credit.discriminator_rewards(row, mask),
        "good: got a value outside 0 to 1": lambda: credit.discriminator_rewards(2 * x, mask, validate=True),
        "entropy: got shape": lambda: segments(x, row, mask, cutoff=1.0),
        "cutoff: got nan": lambda: segments(x, x, mask, cutoff=math.nan),
        "cutoff: got '2'": lambda: segments(x, x, mask, cutoff="2"),
        "mean: got 1.0, want (w, b)": lambda: segments(x, x, mask, cutoff=1.0, mean=1.0),
        "std: got inf": lambda: segments(x, x, mask, cutoff=1.0, std=(0.0, math.inf)),
        "weights: got shape": lambda: credit.centered(row, mask),
        "first: got shape": lambda: credit.top_overlap(row, x, mask),
        "second: got NoneType": lambda: credit.top_overlap(x, None, mask),
        "share: got 0,": lambda: credit.top_overlap(x, x, mask, share=0),
        "share: got 1.5": lambda: credit.top_overlap(x, x, mask, share=1.5),
        "share: got Tensor": lambda: credit.top_overlap(x, x, mask, share=row),
        "inputs: got tuple": lambda: gradient_weights(row, (inputs,), response),
        "inputs: got shape (2, 5)": lambda: gradient_weights(row, inputs[..., 0], response),
        "inputs: got a tensor without gradient": lambda: gradient_weights(row, inputs.detach(), response),
        "score: got a tensor without a graph": lambda: gradient_weights(row, inputs, response),
        "score: got shape (3,)": lambda: gradient_weights(torch.ones(3), inputs, response),
        "inputs: got a tensor that the score does not depend on": lambda: gradient_weights(
            row.requires_grad_(), inputs, response
        ),
        "response.mask: got 2 rows, want 3": lambda: gradient_weights(
            row, torch.ones(3, 5, 4, requires_grad=True), response
        ),
        "response.start, response.index: got neither": lambda: gradient_weights(row, inputs, mask),
        "layers: got AttentionInputs": lambda: rollout(layer, from_zero),
        "layers: got none, want one or more": lambda: rollout([], from_zero),
        "layers[0].value: got shape": lambda: rollout([SignedInputs(layer, value[:, :1], pull)], from_zero),
        "layers[0].pull: got shape": lambda: rollout([SignedInputs(layer, value, pull[..., :4])], from_zero),
        "layers[0].inputs: got one query row": lambda: rollout(
            [SignedInputs(one_row, value, pull)], from_zero
        ),
        "layers: got a mask_row, which is of one query": lambda: rollout(
            [SignedInputs(dataclasses.replace(layer, mask_row=torch.zeros(B, S, dtype=F64)), value, pull)],
            from_zero,
        ),
        "response.start: row 0": lambda: rollout(
            [SignedInputs(layer, value, pull)], past_the_end, validate=True
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        bad_calls()[message]()
    assert message in str(error.value)
