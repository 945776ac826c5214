"""Every operation in plain PyTorch, to be read beside the formulas: the truth for the fast paths.

Loops over sequences, full ``[T, T]`` attention, no kernels. All arithmetic is in float32, or in float64 where
every floating input is float64. Arguments and shapes are those of the functions of the same name in
``attnshape``; inputs are taken to be checked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnshape.types import (
    MIN_MASS,
    Attention,
    AttentionInputs,
    CreditName,
    EpsMode,
    KLEstimator,
    MaskSemantics,
    Normalization,
    RowStats,
    ScoreIndex,
    ShapedRewards,
    ShapingConfig,
    Status,
    compute_dtype,
    float32_rounded,
)

Row = tuple[int, slice] | slice
"""What selects one row's response tokens out of ``[B, R]``, or out of packed ``[M]``."""


def segments(cu_seqlens: Tensor, total: int) -> tuple[list[slice], list[bool]]:
    """The tokens of each packed sequence, and whether its bounds are sound and no other's lie inside."""
    bounds = cu_seqlens.tolist()
    tokens, sound = [], []
    for b, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        sound.append(0 <= lo <= hi <= total and max(bounds[: b + 1]) <= lo and hi <= min(bounds[b + 1 :]))
        lo, hi = (min(max(bound, 0), total) for bound in sorted((lo, hi)))
        tokens.append(slice(lo, hi))
    return tokens, sound


def response_rows(response_mask: Tensor, response_cu_seqlens: Tensor | None) -> tuple[list[Row], Tensor]:
    """What selects each row's tokens, and ``[B]`` bool: whether its bounds are out of range."""
    if response_cu_seqlens is None:
        rows: list[Row] = [(b, slice(None)) for b in range(response_mask.shape[0])]
        return rows, torch.zeros(len(rows), dtype=torch.bool, device=response_mask.device)
    tokens, sound = segments(response_cu_seqlens, response_mask.shape[0])
    return [*tokens], ~torch.tensor(sound, dtype=torch.bool, device=response_mask.device)


# 2.1 One row of attention ----------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One sequence of one layer."""

    tokens: slice  # of the packed token axis
    query: Tensor  # [Hq, S, D], or [Hq, D]
    key: Tensor  # [Hq, S, D]
    attended: Tensor  # [S]
    mask_row: Tensor | None  # [Hq, S]
    lse: Tensor | None  # [Hq, S], or [Hq]
    position: int


def _sequence(inputs: AttentionInputs, b: int, last_response: int | None = None) -> _Layer | None:
    """Sequence ``b`` of a layer; None where an index of it is out of range."""
    dtype = compute_dtype(inputs.query, inputs.key)
    query, key, mask, lse = inputs.query, inputs.key, inputs.attention_mask, inputs.lse
    mask_row = inputs.mask_row
    tokens = slice(None)
    if inputs.cu_seqlens is None:
        query, key = query[b], key[b]  # [Hq, S, D] or [Hq, D]; [Hkv, S, D]
        mask = None if mask is None else mask[b]
        mask_row = None if mask_row is None else mask_row[b]
        lse = None if lse is None else lse[b]
    else:
        rows, sound = segments(inputs.cu_seqlens, key.shape[0])
        if not sound[b]:
            return None
        tokens = rows[b]
        query = query[tokens].transpose(0, 1) if inputs.has_all_queries else query[b]
        key = key[tokens].transpose(0, 1)
        mask = None if mask is None else mask[tokens]
        mask_row = None if mask_row is None else mask_row[tokens].movedim(0, -1)
        if lse is not None:
            lse = lse[tokens].transpose(0, 1) if lse.shape[0] == inputs.key.shape[0] else lse[b]
    length = key.shape[1]
    start = 0 if inputs.key_start is None else int(inputs.key_start[b])
    if not 0 <= start <= length:
        return None
    attended = torch.arange(length, device=key.device) >= start
    if mask is not None:
        attended &= mask != 0
    if isinstance(inputs.query_position, Tensor):
        position = int(inputs.query_position[b])
    elif inputs.query_position == "last_response":
        position = -1 if last_response is None else last_response
    else:
        position = int(attended.nonzero().max()) if attended.any() else 0
    if length and not 0 <= position < length:
        return None
    heads_per_key = query.shape[0] // key.shape[0]
    return _Layer(
        tokens,
        query.to(dtype),
        key.to(dtype).repeat_interleave(heads_per_key, dim=0),
        attended,
        None if mask_row is None else mask_row.to(dtype).expand(query.shape[0], length),
        None if lse is None else lse.to(dtype),
        position,
    )


def _attention(inputs: AttentionInputs, seq: _Layer, p: int) -> Tensor:
    """``a[h, t]`` of the query at position ``p``: ``[Hq, S]``."""
    t = torch.arange(seq.key.shape[1], device=seq.key.device)
    if len(t) == 0:
        return seq.key.new_zeros(seq.key.shape[:2])
    query = seq.query if seq.query.ndim == 2 else seq.query[:, p]
    visible = seq.attended & (t <= p) if inputs.causal else seq.attended
    if inputs.sliding_window is not None:
        visible = visible & ((p - t).abs() < inputs.sliding_window)
    scores = inputs.scaling * (seq.key[:, visible] @ query.unsqueeze(-1)).squeeze(-1)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if seq.mask_row is not None:
        hidden = seq.mask_row[:, visible] == -math.inf
        scores = (scores + seq.mask_row[:, visible]).masked_fill(hidden, -math.inf)
    sinks = scores.new_empty(scores.shape[0], 0)
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(scores)[:, None]
    if seq.lse is None:
        probs = torch.cat([scores, sinks], dim=1).softmax(1)[:, : scores.shape[1]]
    else:
        lse = seq.lse if seq.lse.ndim == 1 else seq.lse[:, p]
        probs = torch.exp(scores - torch.cat([lse[:, None], sinks], dim=1).logsumexp(1, keepdim=True))
    out = scores.new_zeros(scores.shape[0], len(t))
    out[:, visible] = probs.masked_fill(hidden, 0.0)
    return out


def _chosen(inputs: AttentionInputs, x: Tensor) -> Tensor:
    """Of ``x`` ([Hq, ...]) the heads that count."""
    return x if inputs.head_mask is None else x[inputs.head_mask != 0]


def _mean_over_heads(inputs: AttentionInputs, a: Tensor) -> Tensor:
    chosen = _chosen(inputs, a)
    return chosen.sum(0) / max(len(chosen), 1)


def _layers(inputs: Attention) -> Sequence[AttentionInputs]:
    return [inputs] if isinstance(inputs, AttentionInputs) else inputs


def _head_mean(layers: Iterable[AttentionInputs], b: int, last_response: int | None) -> Tensor | None:
    """Mean over layers and heads of sequence ``b``'s attention row, ``[S]``; None where out of range."""
    rows = []
    for layer in layers:
        seq = _sequence(layer, b, last_response)
        if seq is None:
            return None
        rows.append(_mean_over_heads(layer, _attention(layer, seq, seq.position)))
    return torch.stack(rows).mean(0)


def attention_row(inputs: Attention) -> Tensor:
    """Head mean of one attention row per sequence, ``[B, S]`` (packed ``[N]``), not normalised."""
    layers = _layers(inputs)
    first = layers[0]
    dtype = compute_dtype(*(x for layer in layers for x in (layer.query, layer.key)))
    shape = first.key.shape[:1] if first.packed else (first.key.shape[0], first.key.shape[2])
    out = torch.zeros(shape, dtype=dtype, device=first.key.device)
    places: Sequence[int | slice] = range(len(out))
    if first.cu_seqlens is not None:
        places, _ = segments(first.cu_seqlens, len(out))
    for b, place in enumerate(places):
        row = _head_mean(layers, b, None)
        out[place] = math.nan if row is None else row
    return out


def _response_positions(row: Row, length: int, start: Tensor | None, index: Tensor | None, b: int) -> Tensor:
    """Key position of each response token of row ``b``; -1 where it has none."""
    if index is not None:
        return index[row].long()
    assert start is not None
    return start[b].long() + torch.arange(length, device=start.device)


def raw_credit(
    inputs: Attention,
    response_mask: Tensor,
    response_start: Tensor | None,
    response_index: Tensor | None,
    response_cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The attention row at the response tokens, and ``[B]`` bool: whether the row is out of range."""
    layers = _layers(inputs)
    dtype = compute_dtype(*(x for layer in layers for x in (layer.query, layer.key)))
    raw = torch.zeros(response_mask.shape, dtype=dtype, device=response_mask.device)
    rows, invalid = response_rows(response_mask, response_cu_seqlens)
    for b, row in enumerate(rows):
        live = response_mask[row] != 0
        if not live.any():
            continue
        where = _response_positions(row, len(live), response_start, response_index, b)[live]
        attention = _head_mean(layers, b, int(where[-1]))
        lowest = -1 if response_start is None else 0
        if invalid[b] or attention is None or where.min() < lowest or where.max() >= len(attention):
            invalid[b] = True
            raw[row] = torch.where(live, math.nan, 0.0)
        else:
            padded = torch.cat([attention, attention.new_zeros(1)])  # position -1 is nowhere
            raw[row] = torch.zeros_like(raw[row]).masked_scatter(live, padded[where])
    return raw, invalid


def normalize_row(
    raw: Tensor, live: Tensor, score_index: int, normalization: Normalization
) -> tuple[Tensor, bool]:
    """Credit of one row from its raw weights, and whether it fell back to ``sparse``."""
    raw = torch.where(live, raw, 0.0)
    if normalization == "none":
        return raw, False
    total = int(live.sum()) if normalization == "sum_to_length" else 1
    mass = raw.sum()
    if mass < MIN_MASS:
        one_hot = torch.zeros_like(raw)
        one_hot[score_index] = total
        return torch.where(live, one_hot, 0.0), True
    return torch.where(live, raw / mass * total, 0.0), False


def _normalize(
    raw: Tensor, response_mask: Tensor, rows: Sequence[Row], normalization: Normalization
) -> Tensor:
    credit = torch.zeros_like(raw)
    for row in rows:
        live = response_mask[row] != 0
        if live.any():
            credit[row], _ = normalize_row(raw[row], live, int(live.nonzero().max()), normalization)
    return credit


def attention_credit(
    inputs: Attention,
    response_mask: Tensor,
    *,
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
    normalization: Normalization = "sum_to_one",
) -> Tensor:
    """ABC (arXiv 2402.00782): the attention row at the response tokens, normalised."""
    raw, _ = raw_credit(inputs, response_mask, response_start, response_index, response_cu_seqlens)
    rows, _ = response_rows(response_mask, response_cu_seqlens)
    return _normalize(raw, response_mask, rows, normalization)


# 2.2 Columns (ABC-D) ---------------------------------------------------------------------------------


def _attention_matrix(inputs: AttentionInputs, seq: _Layer) -> Tensor:
    """``a[h, s, t]``: ``[Hq, S, S]``."""
    return torch.stack([_attention(inputs, seq, p) for p in range(seq.key.shape[1])], dim=1)


def attention_column_credit(
    inputs: AttentionInputs,
    response_mask: Tensor,
    *,
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
    variant: Literal["mean", "last"] = "mean",
    shift: Literal[0, 1] = 0,
    normalization: Normalization = "sum_to_one",
) -> Tensor:
    """ABC-D (arXiv 2402.00782): credit from the attention among the response's own unmasked tokens."""
    dtype = compute_dtype(inputs.query, inputs.key)
    raw = torch.zeros(response_mask.shape, dtype=dtype, device=response_mask.device)
    rows, invalid = response_rows(response_mask, response_cu_seqlens)
    for b, row in enumerate(rows):
        live = response_mask[row] != 0
        if not live.any():
            continue
        where = _response_positions(row, len(live), response_start, response_index, b)[live]
        seq = _sequence(inputs, b, int(where[-1]))
        if invalid[b] or seq is None or where.min() < 0 or where.max() >= seq.key.shape[1]:
            raw[row] = torch.where(live, math.nan, 0.0)
            continue
        block = _mean_over_heads(inputs, _attention_matrix(inputs, seq))[where][:, where]  # a_s[j]: [n, n]
        n = len(where)
        queries = n - shift
        weights = torch.zeros(n, dtype=dtype, device=raw.device)
        for j in range(queries):
            attending = block[:queries, j]
            weights[j + shift] = attending[-1] if variant == "last" else attending[j:].mean()
        raw[row] = torch.zeros_like(raw[row]).masked_scatter(live, weights)
    return _normalize(raw, response_mask, rows, normalization)


# 2.4 Rollout -----------------------------------------------------------------------------------------


def attention_rollout(
    layers: Sequence[AttentionInputs],
    response_mask: Tensor,
    *,
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
    normalization: Normalization = "sum_to_one",
) -> Tensor:
    """Credit carried down through all layers, plain (arXiv 2005.00928) or weighted by norms."""
    dtype = compute_dtype(*(x for layer in layers for x in (layer.query, layer.key)))
    raw = torch.zeros(response_mask.shape, dtype=dtype, device=response_mask.device)
    rows, invalid = response_rows(response_mask, response_cu_seqlens)
    for b, row in enumerate(rows):
        live = response_mask[row] != 0
        if not live.any():
            continue
        where = _response_positions(row, len(live), response_start, response_index, b)[live]
        sequences = [_sequence(layer, b, int(where[-1])) for layer in layers]
        top = sequences[-1]
        lowest = -1 if response_start is None else 0
        if (
            invalid[b]
            or top is None
            or None in sequences
            or where.min() < lowest
            or where.max() >= top.key.shape[1]
        ):
            raw[row] = torch.where(live, math.nan, 0.0)
            continue
        r = torch.zeros(top.key.shape[1], dtype=dtype, device=raw.device)
        r[top.position] = 1.0
        for i in reversed(range(len(layers))):
            seq = sequences[i]
            assert seq is not None
            asked = (r != 0)[None, :, None]  # a query that carries nothing adds nothing, NaN included
            a = torch.where(asked, _attention_matrix(layers[i], seq), 0.0)  # [Hq, S, S]
            norms, residual = layers[i].value_norm, layers[i].residual_norm
            if norms is None or residual is None:
                r = (r + r @ _mean_over_heads(layers[i], a)) / 2
                continue
            packed = layers[i].packed
            norms = norms[seq.tokens].transpose(0, 1) if packed else norms[b]  # [Hq, S]
            residual = (residual[seq.tokens] if packed else residual[b]).to(dtype)  # [S]
            norms = torch.where(seq.attended, norms.to(dtype), 0.0)
            moved = torch.einsum("hst,ht->st", _chosen(layers[i], a), _chosen(layers[i], norms))
            share = torch.where(r == 0, 0.0, r / (moved.sum(1) + residual))
            r = share @ moved + torch.where(share == 0, 0.0, share * residual)
        padded = torch.cat([r, r.new_zeros(1)])
        raw[row] = torch.zeros_like(raw[row]).masked_scatter(live, padded[where])
    return _normalize(raw, response_mask, rows, normalization)


# Tokens of another tokenizer ------------------------------------------------------------------------


def align(
    source_offsets: Sequence[tuple[int, int]], target_offsets: Sequence[tuple[int, int]]
) -> Callable[[Tensor], Tensor]:
    """The map ``[S]`` to ``[T]`` of one sequence that carries weights by the characters tokens share."""

    def carry(weights: Tensor) -> Tensor:
        out = weights.new_zeros(len(target_offsets))
        if not target_offsets:
            return out
        wide = [t for t, (start, end) in enumerate(target_offsets) if start < end]
        here = 0
        for weight, (start, end) in zip(weights, source_offsets, strict=True):
            if start == end:
                start = end = here
            here = max(here, end)
            owners = [
                [t for t in wide if target_offsets[t][0] <= c < target_offsets[t][1]]
                for c in range(start, end)
            ]
            owners = [tokens for tokens in owners if tokens]
            for tokens in owners:
                for t in tokens:
                    out[t] += weight / len(owners) / len(tokens)
            if owners:
                continue
            after = [t for t in wide if target_offsets[t][0] >= end]
            before = [t for t in wide if target_offsets[t][0] < end]
            following = min(after, key=lambda t: target_offsets[t][0], default=None)
            preceding = max(before, key=lambda t: (target_offsets[t][0], t), default=None)
            if not wide:
                out[0] += weight
            elif preceding is None:
                out[following] += weight
            elif following is None:
                out[preceding] += weight
            else:
                gap_after = target_offsets[following][0] - end
                gap_before = max(start - target_offsets[preceding][1], 0)
                out[following if gap_after <= gap_before else preceding] += weight
        return out

    return carry


# 3 Rewards -------------------------------------------------------------------------------------------


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: KLEstimator = "k1",
    input_clip: float | None = None,
    output_clip: float | None = None,
) -> Tensor:
    """KL estimate per token (http://joschu.net/blog/kl-approx.html)."""
    dtype = compute_dtype(logprobs, ref_logprobs)
    k1 = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if input_clip is not None:
        k1 = k1.clamp(-input_clip, input_clip)
    if estimator == "k1":
        kl = k1
    elif estimator == "abs":
        kl = k1.abs()
    elif estimator == "k2":
        kl = k1.square() / 2
    else:
        kl = torch.expm1(-k1) + k1
    return kl if output_clip is None else kl.clamp(-output_clip, output_clip)


def _score_position(live: Tensor, score_index: ScoreIndex | Tensor, b: int) -> int:
    """Token of row ``b`` that carries the score."""
    if isinstance(score_index, Tensor):
        return int(score_index[b])
    return int(live.nonzero().max()) if score_index == "last_unmasked" else len(live) - 1


def _rewards_row(
    score: Tensor,  # [], clamped
    credit: Tensor,  # [R]
    live: Tensor,
    score_index: int,
    beta: float,
) -> Tensor:
    """The redistributed score of one row, ``[R]``."""
    on_score = torch.arange(len(live), device=live.device) == score_index
    return torch.where(live, beta * score * credit + torch.where(on_score, (1 - beta) * score, 0.0), 0.0)


def redistribute(
    score: Tensor,
    credit: Tensor,
    response_mask: Tensor,
    *,
    beta: float = 0.8,
    normalization: Normalization = "sum_to_one",
    score_index: ScoreIndex | Tensor = "last_unmasked",
    response_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``beta * score * credit[j] + (1 - beta) * score * [j == score_index]``."""
    config = ShapingConfig(beta=beta, normalization=normalization, score_index=score_index)
    return shape_rewards(
        score, credit, response_mask=response_mask, config=config, response_cu_seqlens=response_cu_seqlens
    ).rewards


# 4 Advantages ----------------------------------------------------------------------------------------


def _recurrence(
    rewards: Tensor,  # [R], bootstrap already in the last unmasked one
    values: Tensor,  # [R]
    live: Tensor,
    gamma: float,
    gl: float,
    mask_semantics: MaskSemantics,
    zero_masked: bool,
) -> Tensor:
    """``A`` of one row, ``[R]``; the loop runs in float64 whatever the dtype.

    ``W_t = gl W_{t+1} + gl r_t + (gamma - gl) V_t`` and ``A_t = r_t - V_t + W_{t+1}``: with
    ``W_t = gamma V_t + gl A_t`` this is ``A_t = r_t + gamma V_{t+1} - V_t + gl A_{t+1}``.
    """
    w, a, out = 0.0, 0.0, []
    for r, v, m in zip(
        reversed(rewards.tolist()), reversed(values.tolist()), reversed(live.tolist()), strict=True
    ):
        if m or mask_semantics == "zero":
            a = r - v + w
        out.append(a if m or not zero_masked else 0.0)
        if m:
            w = gl * w + gl * r + (gamma - gl) * v
        elif mask_semantics == "zero":
            w = gl * w
    return torch.tensor(out[::-1], dtype=torch.float64, device=rewards.device).to(rewards.dtype)


def _lam_of_row(lam: float | Tensor, gamma: float, b: int) -> float:
    """``gl`` of row ``b``: gamma * lam, rounded to float32 once."""
    value = lam[b].item() if isinstance(lam, Tensor) else lam
    return float32_rounded(gamma * value)


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    mask_semantics: MaskSemantics,
    lam_value: float | Tensor | None = None,
    bootstrap: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
    zero_masked: bool = True,
    return_moments: bool = False,
) -> tuple[Tensor, ...]:
    """GAE (arXiv 1506.02438): advantages and returns, and the moments of the advantages if asked for."""
    dtype = compute_dtype(rewards, values, bootstrap)
    advantages = torch.zeros(response_mask.shape, dtype=dtype, device=rewards.device)
    returns = torch.zeros_like(advantages)
    gamma32 = float32_rounded(gamma)
    rows, invalid = response_rows(response_mask, response_cu_seqlens)
    for b, row in enumerate(rows):
        live = response_mask[row] != 0
        if invalid[b]:
            advantages[row] = returns[row] = torch.where(live, math.nan, 0.0).to(dtype)
            continue
        r = torch.where(live, rewards[row].to(dtype), 0.0)
        if bootstrap is not None and live.any():
            r[live.nonzero().max()] += gamma32 * bootstrap[b].to(dtype)
        if values is None:
            zeros = torch.zeros_like(r)
            advantages[row] = _recurrence(r, zeros, live, gamma32, gamma32, mask_semantics, zero_masked)
            returns[row] = advantages[row]
            continue
        v = torch.where(live, values[row].to(dtype), 0.0)
        gl = _lam_of_row(lam, gamma, b)
        gl_value = gl if lam_value is None else _lam_of_row(lam_value, gamma, b)
        advantages[row] = _recurrence(r, v, live, gamma32, gl, mask_semantics, zero_masked)
        returns[row] = _recurrence(r, v, live, gamma32, gl_value, mask_semantics, zero_masked)
        returns[row] += v if zero_masked or mask_semantics == "zero" else values[row].to(dtype)
    if return_moments:
        return advantages, returns, row_moments(advantages, response_mask, response_cu_seqlens)
    return advantages, returns


def moments_of(tokens: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of ``tokens`` ([n]): ``[3]``."""
    mean = tokens.sum() / max(len(tokens), 1)
    return torch.stack([tokens.new_tensor(len(tokens)), mean, (tokens - mean).square().sum()])


def row_moments(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Of each row's unmasked tokens, ``[B, 3]``."""
    rows, _ = response_rows(mask, cu_seqlens)
    return torch.stack([moments_of(x[row][mask[row] != 0]) for row in rows]) if rows else x.new_zeros(0, 3)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    moments: Tensor | None = None,
    bessel: bool = True,
    eps: float = 1e-8,
    eps_mode: EpsMode = "add",
    shift_mean: bool = True,
    zero_masked: bool = True,
) -> Tensor:
    """``(x - mean) * rsqrt(var + eps)`` over unmasked tokens."""
    live = mask != 0
    dtype = compute_dtype(x)
    if moments is None:
        moments = moments_of(x[live].to(dtype))
    counts, means, m2s = moments.to(dtype).reshape(-1, 3).unbind(1)
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum() / count
    m2 = m2s.sum() + (counts * (means - mean).square()).sum()
    var = m2 / ((count - 1).clamp(min=1) if bessel else count)
    if eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + eps)
    else:
        scale = (var + eps if eps_mode == "add" else var.clamp(min=eps)).rsqrt()
    out = (x.to(dtype) - mean) * scale
    if not shift_mean:
        out = out + mean
    return torch.where(live, out, 0.0) if zero_masked else out


# All of it -------------------------------------------------------------------------------------------


def shape_rewards(
    score: Tensor,
    credit: Tensor | Attention | CreditName,
    *,
    values: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    token_rewards: Tensor | None = None,
    terminal_reward: Tensor | None = None,
    bootstrap: Tensor | None = None,
    response_mask: Tensor,
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
    config: ShapingConfig | None = None,
) -> ShapedRewards:
    """From a score and a source of credit to rewards, advantages and returns."""
    config = config or ShapingConfig()
    attention = not isinstance(credit, Tensor | str)
    floats = [score, values, logprobs, ref_logprobs, kl, token_rewards, terminal_reward, bootstrap]
    rows, invalid = response_rows(response_mask, response_cu_seqlens)
    device = response_mask.device
    if isinstance(credit, Tensor):
        raw = credit
    elif isinstance(credit, str):
        raw = None
    else:
        raw, invalid = raw_credit(credit, response_mask, response_start, response_index, response_cu_seqlens)
    dtype = compute_dtype(*floats, raw)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    score, raw = score.to(dtype).clamp(*config.score_bounds), cast(raw)
    values, token_rewards, bootstrap = cast(values), cast(token_rewards), cast(bootstrap)
    if logprobs is not None and ref_logprobs is not None:
        kl = kl_estimate(
            logprobs.to(dtype),
            ref_logprobs.to(dtype),
            config.kl_estimator,
            config.kl_input_clip,
            config.kl_output_clip,
        )
    kl = None if kl is None else torch.where(response_mask != 0, kl.to(dtype), 0.0)
    rewards = torch.zeros(response_mask.shape, dtype=dtype, device=device)
    weights = torch.zeros_like(rewards)
    status = torch.zeros(len(rows), dtype=torch.int32, device=device)
    entropy, last_share, share, error = torch.zeros(4, len(rows), dtype=dtype, device=device)

    for b, row in enumerate(rows):
        live = response_mask[row] != 0
        n = int(live.sum())
        if n == 0:
            status[b] |= int(Status.OUT_OF_RANGE if invalid[b] else Status.EMPTY)
            continue
        at = _score_position(live, config.score_index, b)
        if invalid[b] or not 0 <= at < len(live):
            status[b] |= int(Status.OUT_OF_RANGE)
            weights[row] = rewards[row] = torch.where(live, math.nan, 0.0)
            continue
        if not live[at]:
            status[b] |= int(Status.SCORE_MASKED)
        if credit == "uniform":
            total = n if config.normalization == "sum_to_length" else 1
            weights[row] = torch.where(live, total / n, 0.0)
        elif raw is None:  # sparse
            zeros = torch.zeros(len(live), dtype=dtype, device=device)
            weights[row], _ = normalize_row(zeros, live, at, _summing(config.normalization))
        else:
            weights[row], fell_back = normalize_row(raw[row], live, at, config.normalization)
            status[b] |= int(Status.FALLBACK) if fell_back else 0
            share[b] = torch.where(live, raw[row], 0.0).sum()
        shaped = _rewards_row(score[b], weights[row], live, at, config.share(credit))
        error[b] = (shaped.sum() - score[b]).abs()
        total_weight = weights[row].sum()
        p = weights[row][weights[row] != 0] / total_weight
        entropy[b] = -(p * p.log()).sum()
        last = int(live.nonzero().max())
        last_share[b] = weights[row][last] / total_weight if total_weight != 0 else 0.0

        if terminal_reward is not None and live[at]:
            shaped[at] += terminal_reward[b].to(dtype)
        if token_rewards is not None:
            shaped = shaped + token_rewards[row]
        if kl is not None:
            shaped = shaped - torch.as_tensor(kl_coef).to(shaped) * kl[row]
        rewards[row] = torch.where(live, shaped, 0.0)

    advantages, returns = gae(
        rewards,
        values,
        response_mask,
        gamma=config.gamma,
        lam=config.lam,
        lam_value=config.lam_value,
        mask_semantics=config.mask_semantics,
        bootstrap=bootstrap,
        response_cu_seqlens=response_cu_seqlens,
        zero_masked=config.zero_masked,
    )
    outputs = [x for x in (rewards, advantages, returns, weights, kl) if x is not None]
    for b, row in enumerate(rows):
        if status[b] & int(Status.OUT_OF_RANGE):
            for x in outputs:
                x[row] = torch.where(response_mask[row] != 0, math.nan, 0.0)
        live = response_mask[row] != 0  # masked tokens may hold anything where ``zero_masked`` is False
        if not all(x[row][live].isfinite().all() for x in outputs):
            status[b] |= int(Status.NONFINITE)
            if config.on_nan == "zero_row":
                for x in outputs:
                    x[row] = 0.0
    moments = row_moments(advantages, response_mask, response_cu_seqlens)
    stats = RowStats(entropy, last_share, share if attention else None, error, moments)
    return ShapedRewards(rewards, advantages, returns, weights, kl, status, stats)


def _summing(normalization: Normalization) -> Normalization:
    """``sparse`` has no weights of its own to leave as they are."""
    return "sum_to_one" if normalization == "none" else normalization
