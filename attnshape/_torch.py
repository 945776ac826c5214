"""The operations without loops over tokens, in PyTorch: the backend of CPUs, and what a kernel has to beat.

Arguments are checked by ``attnshape.ops``. Packed layouts are padded first and packed again last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnshape.types import (
    MIN_MASS,
    AttentionInputs,
    CreditName,
    EpsMode,
    MaskSemantics,
    Normalization,
    Response,
    RowStats,
    ShapedRewards,
    ShapingConfig,
    Status,
    TokenInputs,
    compute_dtype,
    decay,
    float32_rounded,
)

KEY_CHUNK = 1024
"""Keys converted to the accumulation dtype at once."""
SCORE_ELEMENTS = 1 << 24
"""Attention weights held at once while columns are summed."""
SCAN_CHUNK = 32
"""Tokens of the recurrence that one triangular product covers."""


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Where a process may have float32 products rounded (tf32, bfloat16), float64 is out of reach of that."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    lowered = device.type != "cpu" or precision in ("bf16", "tf32")
    return torch.float64 if lowered and dtype == torch.float32 else dtype


# Packed and padded -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Packing:
    """Where the tokens of a packed axis lie in its padded form."""

    index: Tensor  # [B, L], clamped
    inside: Tensor  # [B, L]
    valid: Tensor  # [B]; what lies between the bounds of another row is of no use

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int) -> _Packing:
        bounds = cu_seqlens.long()
        lo, hi = bounds[:-1], bounds[1:]
        lowest_after = bounds.flip(0).cummin(0).values.flip(0)
        crossed = (bounds.cummax(0).values[:-1] > lo) | (lowest_after[1:] < hi)
        valid = (lo >= 0) & (lo <= hi) & (hi <= total) & ~crossed
        lo, hi = (x.clamp(0, total) for x in (torch.minimum(lo, hi), torch.maximum(lo, hi)))
        longest = int((hi - lo).max()) if len(lo) else 0
        offsets = torch.arange(longest, device=lo.device)
        index = (lo[:, None] + offsets).clamp(0, max(total - 1, 0))
        return cls(index, offsets < (hi - lo)[:, None], valid)

    def pad(self, x: Tensor) -> Tensor:
        """``[M, ...]`` to ``[B, L, ...]``."""
        if not len(x):
            return x.new_zeros(*self.index.shape, *x.shape[1:])
        return x[self.index]

    def pack(self, x: Tensor, total: int) -> Tensor:
        """``[B, L]`` to ``[M]``; 0 at tokens of no sequence."""
        out = x.new_zeros(total)
        out[self.index[self.inside]] = x[self.inside]
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Response tokens in padded form."""

    live: Tensor  # [B, R] bool
    start: Tensor | None
    index: Tensor | None
    packing: _Packing | None
    shape: torch.Size

    @classmethod
    def of(cls, response: Response) -> _Rows:
        live, index = response.mask.bool(), response.index
        if response.cu_seqlens is None:
            return cls(live, response.start, index, None, live.shape)
        packing = _Packing.of(response.cu_seqlens, live.shape[0])
        return cls(
            packing.pad(live) & packing.inside,
            response.start,
            None if index is None else packing.pad(index),
            packing,
            live.shape,
        )

    def pad(self, x: Tensor) -> Tensor:
        return x if self.packing is None else self.packing.pad(x)

    @property
    def invalid(self) -> Tensor:
        """``[B]``: rows whose bounds are out of range."""
        if self.packing is None:
            return torch.zeros(len(self.live), dtype=torch.bool, device=self.live.device)
        return ~self.packing.valid

    def restore(self, x: Tensor) -> Tensor:
        return x if self.packing is None else self.packing.pack(x, self.shape[0])

    @property
    def last(self) -> Tensor:
        """Last unmasked token of each row, ``[B]``; -1 if there is none."""
        width = self.live.shape[1]
        if not width:
            return torch.full((len(self.live),), -1, device=self.live.device)
        return (self.live * torch.arange(1, width + 1, device=self.live.device)).amax(1) - 1

    def key_positions(self) -> Tensor:
        """``[B, R]``; -1 where a token has no key."""
        if self.index is not None:
            return self.index.long()
        assert self.start is not None
        return self.start.long()[:, None] + torch.arange(self.live.shape[1], device=self.live.device)


# Attention -------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One layer in padded form."""

    inputs: AttentionInputs  # never packed
    attended: Tensor  # [B, S] bool
    position: Tensor  # [B], clamped
    lengths: Tensor  # [B]
    invalid: Tensor  # [B] bool
    packing: _Packing | None
    dtype: torch.dtype


def _layer(inputs: AttentionInputs, last_response: Tensor | None = None) -> _Layer:
    dtype = compute_dtype(inputs.query, inputs.key)
    packing = None
    if inputs.cu_seqlens is not None:
        total = inputs.key.shape[0]
        packing = _Packing.of(inputs.cu_seqlens, total)
        query, lse, mask = inputs.query, inputs.lse, inputs.attention_mask
        if inputs.has_all_queries:
            query = packing.pad(query).transpose(1, 2)
        if lse is not None and lse.shape[0] == total and inputs.has_all_queries:
            lse = packing.pad(lse).transpose(1, 2)
        inside = packing.inside if mask is None else packing.inside & (packing.pad(mask) != 0)
        key = packing.pad(inputs.key).transpose(1, 2)
        inputs = dataclasses.replace(
            inputs, query=query, key=key, lse=lse, attention_mask=inside, cu_seqlens=None
        )
    batch, length = inputs.key.shape[0], inputs.key.shape[2]
    device = inputs.key.device
    t = torch.arange(length, device=device)
    lengths = torch.full((batch,), length, device=device) if packing is None else packing.inside.sum(1)
    invalid = torch.zeros(batch, dtype=torch.bool, device=device) if packing is None else ~packing.valid
    attended = torch.ones(batch, length, dtype=torch.bool, device=device)
    if inputs.attention_mask is not None:
        attended &= inputs.attention_mask != 0
    if inputs.key_start is not None:
        start = inputs.key_start.long()
        attended &= t >= start[:, None]
        invalid |= (start < 0) | (start > lengths)
    if isinstance(inputs.query_position, Tensor):
        position = inputs.query_position.long()
    elif inputs.query_position == "last_response":
        assert last_response is not None
        position = last_response
    else:
        position = (attended * t).amax(1) if length else torch.zeros(batch, dtype=torch.long, device=device)
    invalid |= (lengths > 0) & ((position < 0) | (position >= lengths))
    return _Layer(inputs, attended, position.clamp(0, max(length - 1, 0)), lengths, invalid, packing, dtype)


def _attention(layer: _Layer, positions: Tensor) -> Tensor:
    """``a[h, s, t]`` of the queries at ``positions [B, n]``: ``[B, Hq, n, S]``, 0 where not visible."""
    inputs, dtype = layer.inputs, layer.dtype
    key = inputs.key
    batch, kv_heads, length, width = key.shape
    heads = inputs.query.shape[1]
    work = _product_dtype(dtype, key.device)
    rows, n = torch.arange(batch, device=key.device)[:, None], positions.shape[1]
    if inputs.query.ndim == 3:
        query = inputs.query[:, :, None]
    else:
        query = inputs.query.transpose(1, 2)[rows, positions].transpose(1, 2)  # [B, Hq, n, D]
    query = query.to(work).reshape(batch, kv_heads, heads // kv_heads * n, width) * inputs.scaling
    chunks = [
        query @ key[:, :, lo : lo + KEY_CHUNK].to(work).transpose(-1, -2)
        for lo in range(0, length, KEY_CHUNK)
    ]
    scores = torch.cat(chunks, -1).to(dtype) if chunks else query.new_zeros(*query.shape[:3], 0, dtype=dtype)
    scores = scores.reshape(batch, heads, n, length)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    t = torch.arange(length, device=key.device)
    distance = positions[:, :, None] - t  # [B, n, S]
    visible = layer.attended[:, None] & (distance >= 0)
    if inputs.sliding_window is not None:
        visible &= distance < inputs.sliding_window
    visible = visible[:, None]  # [B, 1, n, S]
    scores = scores.masked_fill(~visible, -math.inf)
    sinks = None if inputs.sinks is None else inputs.sinks.to(dtype)[None, :, None, None]
    if inputs.lse is not None:
        lse = inputs.lse.to(dtype)
        lse = lse[:, :, None] if lse.ndim == 2 else lse.transpose(1, 2)[rows, positions].transpose(1, 2)
        lse = lse[..., None]  # [B, Hq, n, 1]
        probs = torch.exp(scores - (lse if sinks is None else torch.logaddexp(lse, sinks)))
    elif sinks is not None:
        sinks = sinks.expand(batch, heads, n, 1)
        probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return probs.masked_fill(~visible, 0.0)


def _chosen(inputs: AttentionInputs, x: Tensor) -> Tensor:
    """``x`` ([B, Hq, ...]), 0 in heads that do not count."""
    if inputs.head_mask is None:
        return x
    return x.masked_fill((inputs.head_mask == 0).view(-1, *[1] * (x.ndim - 2)), 0.0)


def _mean_over_heads(inputs: AttentionInputs, probs: Tensor) -> Tensor:
    """``[B, Hq, ...]`` to ``[B, ...]``."""
    if inputs.head_mask is None:
        return probs.mean(1)
    return _chosen(inputs, probs).sum(1) / (inputs.head_mask != 0).sum().clamp(min=1)


def _head_mean(
    inputs: Sequence[AttentionInputs], last_response: Tensor | None
) -> tuple[Tensor, _Layer, Tensor]:
    """Mean over layers and heads of the attention rows ``[B, S]``, the first layer, and the invalid rows."""
    layers = [_layer(x, last_response) for x in inputs]
    rows = [_mean_over_heads(x.inputs, _attention(x, x.position[:, None])[:, :, 0]) for x in layers]
    mean = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
    invalid = torch.stack([layer.invalid for layer in layers]).any(0)
    return mean, layers[0], invalid


def attention_row(inputs: Sequence[AttentionInputs]) -> Tensor:
    row, layer, invalid = _head_mean(inputs, None)
    row = row.masked_fill(invalid[:, None], math.nan)
    return row if layer.packing is None else layer.packing.pack(row, inputs[0].key.shape[0])


def _positions_in_range(rows: _Rows, positions: Tensor, lowest: int, lengths: Tensor) -> Tensor:
    """``[B]``: whether every unmasked token of the row lies among its keys."""
    outside = (positions < lowest) | (positions >= lengths[:, None])
    return ~(outside & rows.live).any(1)


def _lowest_position(rows: _Rows) -> int:
    return -1 if rows.start is None else 0


def _at_response(
    column: Tensor, rows: _Rows, positions: Tensor, invalid: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights over keys ``[B, S]`` read at the response tokens ``[B, R]``, and the invalid rows."""
    invalid = rows.invalid | invalid | ~_positions_in_range(rows, positions, _lowest_position(rows), lengths)
    column = torch.cat([column, column.new_zeros(len(column), 1)], 1)  # position -1 is nowhere
    nowhere = column.shape[1] - 1
    inside = (positions >= 0) & (positions < nowhere)
    raw = column.gather(1, torch.where(inside, positions, nowhere))
    raw = raw.masked_fill(~rows.live, 0.0)
    return raw.masked_fill(rows.live & invalid[:, None], math.nan), invalid & rows.live.any(1)


def _last_response(rows: _Rows, positions: Tensor) -> Tensor:
    if not positions.shape[1]:
        return positions.new_full((len(positions),), -1)
    return positions.gather(1, rows.last.clamp(min=0)[:, None])[:, 0]


def _raw_credit(inputs: Sequence[AttentionInputs], rows: _Rows) -> tuple[Tensor, Tensor]:
    """Head mean of the attention at the response tokens, ``[B, R]``, and the rows that are out of range."""
    positions = rows.key_positions()
    attention, layer, invalid = _head_mean(inputs, _last_response(rows, positions))
    return _at_response(attention, rows, positions, invalid, layer.lengths)


def _normalize(
    raw: Tensor, rows: _Rows, score_at: Tensor, normalization: Normalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Credit ``[B, R]``, its raw mass ``[B]``, and the rows that fell back to ``sparse``."""
    raw = raw.masked_fill(~rows.live, 0.0)
    mass = raw.sum(1, dtype=torch.float64)
    if normalization == "none":
        return raw, mass, torch.zeros_like(mass, dtype=torch.bool)
    fallback = (mass < MIN_MASS) & rows.live.any(1)
    total = rows.live.sum(1) if normalization == "sum_to_length" else torch.ones_like(mass)
    credit = (raw * (total / mass).to(raw.dtype)[:, None]).masked_fill(~rows.live, 0.0)
    return torch.where(fallback[:, None], _one_hot(rows, score_at, total, raw), credit), mass, fallback


def _one_hot(rows: _Rows, score_at: Tensor, total: Tensor, like: Tensor) -> Tensor:
    t = torch.arange(rows.live.shape[1], device=like.device)
    on_score = (t == score_at[:, None]) & rows.live
    return torch.where(on_score, total[:, None].to(like.dtype), 0.0)


def _normalized(raw: Tensor, rows: _Rows, normalization: Normalization) -> Tensor:
    credit, _, _ = _normalize(raw, rows, rows.last, normalization)
    return rows.restore(credit)


def attention_credit(
    inputs: Sequence[AttentionInputs], response: Response, normalization: Normalization
) -> Tensor:
    rows = _Rows.of(response)
    return _normalized(_raw_credit(inputs, rows)[0], rows, normalization)


def _query_chunk(layer: _Layer) -> int:
    """Queries whose attention over all keys fits the element budget."""
    batch, _, length, _ = layer.inputs.key.shape
    return max(1, SCORE_ELEMENTS // max(1, batch * layer.inputs.query.shape[1] * length))


def attention_column_credit(
    inputs: AttentionInputs,
    response: Response,
    variant: Literal["mean", "last"],
    shift: Literal[0, 1],
    normalization: Normalization,
) -> Tensor:
    rows = _Rows.of(response)
    positions = rows.key_positions()
    layer = _layer(inputs, _last_response(rows, positions))
    batch, width = rows.live.shape
    # The unmasked tokens of each row, moved to its front: queries and targets are counted among them.
    rank = (rows.live.cumsum(1) - 1).clamp(min=0)
    order = torch.zeros_like(positions).scatter_add_(1, rank, torch.where(rows.live, positions, 0))
    count = rows.live.sum(1, keepdim=True)
    t = torch.arange(width, device=rank.device)
    queries = count - shift
    asking = (t < queries) if variant == "mean" else (t == queries - 1)  # [B, R]
    keys = layer.inputs.key.shape[2]
    columns = torch.zeros(batch, keys, dtype=layer.dtype, device=rank.device)
    step = _query_chunk(layer)
    for lo in range(0, width, step):
        at = order[:, lo : lo + step].clamp(0, max(keys - 1, 0))
        weights = _mean_over_heads(inputs, _attention(layer, at))  # [B, n, S]
        columns += weights.masked_fill(~asking[:, lo : lo + step, None], 0.0).sum(1)
    invalid = rows.invalid | layer.invalid | ~_positions_in_range(rows, positions, 0, layer.lengths)
    weights = torch.cat([columns, columns.new_zeros(batch, 1)], 1).gather(1, order.clamp(0, keys))
    if variant == "mean":
        weights = weights / (queries - t).clamp(min=1)
    weights = weights.masked_fill(t >= queries, 0.0)
    if shift:
        weights = torch.nn.functional.pad(weights, (shift, 0))[:, :width]
    raw = weights.gather(1, rank).masked_fill(~rows.live, 0.0)
    raw = raw.masked_fill(rows.live & invalid[:, None], math.nan)
    return _normalized(raw, rows, normalization)


def attention_rollout(
    layers: Sequence[AttentionInputs],
    response: Response,
    value_norms: Sequence[Tensor] | None,
    residual_norms: Sequence[Tensor] | None,
    normalization: Normalization,
) -> Tensor:
    rows = _Rows.of(response)
    positions = rows.key_positions()
    last = _last_response(rows, positions)
    padded = [_layer(x, last) for x in layers]
    top = padded[-1]
    batch, length = top.attended.shape
    t = torch.arange(length, device=last.device)
    r = (t == top.position[:, None]).to(top.dtype)
    for i in reversed(range(len(padded))):
        layer = padded[i]
        plain = value_norms is None or residual_norms is None
        if not plain:
            assert value_norms is not None
            assert residual_norms is not None
            norms, residual = value_norms[i], residual_norms[i]
            if layer.packing is not None:
                norms, residual = layer.packing.pad(norms).transpose(1, 2), layer.packing.pad(residual)
            norms = _chosen(layer.inputs, norms.to(layer.dtype)).masked_fill(~layer.attended[:, None], 0.0)
            residual = residual.to(layer.dtype)
        below = torch.zeros_like(r)
        step = _query_chunk(layer)
        for lo in range(0, length, step):
            at = t[lo : lo + step].expand(batch, -1)
            attention, above = _attention(layer, at), r[:, lo : lo + step]
            asked = (above != 0)[..., None]  # a query that carries nothing adds nothing, NaN included
            if plain:
                moved = _mean_over_heads(layer.inputs, attention).masked_fill(~asked, 0.0)
                below += torch.einsum("bs,bst->bt", above, moved) / 2
                below[:, lo : lo + step] += above / 2
                continue
            moved = torch.einsum("bhst,bht->bst", _chosen(layer.inputs, attention), norms)
            moved = moved.masked_fill(~asked, 0.0)
            kept = residual[:, lo : lo + step]
            share = (above / (moved.sum(-1) + kept)).masked_fill(above == 0, 0.0)
            below += torch.einsum("bs,bst->bt", share, moved)
            below[:, lo : lo + step] += (share * kept).masked_fill(share == 0, 0.0)
        r = below
    invalid = torch.stack([layer.invalid for layer in padded]).any(0)
    raw, _ = _at_response(r, rows, positions, invalid, top.lengths)
    return _normalized(raw, rows, normalization)


# Rewards ---------------------------------------------------------------------------------------------


def _kl(tokens: TokenInputs, config: ShapingConfig, rows: _Rows, dtype: torch.dtype) -> Tensor | None:
    if tokens.kl is not None:
        return rows.pad(tokens.kl).to(dtype).masked_fill(~rows.live, 0.0)
    if tokens.logprobs is None or tokens.ref_logprobs is None:
        return None
    k1 = rows.pad(tokens.logprobs).to(dtype) - rows.pad(tokens.ref_logprobs).to(dtype)
    if config.kl_input_clip is not None:
        k1 = k1.clamp(-config.kl_input_clip, config.kl_input_clip)
    if config.kl_estimator == "k1":
        kl = k1
    elif config.kl_estimator == "abs":
        kl = k1.abs()
    elif config.kl_estimator == "k2":
        kl = k1.square() / 2
    else:
        kl = torch.expm1(-k1) + k1
    if config.kl_output_clip is not None:
        kl = kl.clamp(-config.kl_output_clip, config.kl_output_clip)
    return kl.masked_fill(~rows.live, 0.0)


def _score_positions(rows: _Rows, config: ShapingConfig) -> Tensor:
    if isinstance(config.score_index, Tensor):
        return config.score_index.long()
    if config.score_index == "last_unmasked":
        return rows.last
    if rows.packing is not None:
        return rows.packing.inside.sum(1) - 1
    return torch.full_like(rows.last, rows.live.shape[1] - 1)


def _weights(
    raw: Tensor | None,
    source: object,
    rows: _Rows,
    score_at: Tensor,
    config: ShapingConfig,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Credit ``[B, R]`` of raw weights or a named source, raw mass ``[B]``, and the rows that fell back."""
    if raw is not None:
        return _normalize(raw.to(dtype), rows, score_at, config.normalization)
    count = rows.live.sum(1)
    total = count if config.normalization == "sum_to_length" else torch.ones_like(count)
    mass = torch.zeros(len(count), dtype=torch.float64, device=count.device)
    if source == "uniform":
        each = (total / count).to(dtype)[:, None].expand(rows.live.shape)
        weights = each.masked_fill(~rows.live, 0.0)
    else:
        weights = _one_hot(rows, score_at, total, torch.empty(0, dtype=dtype, device=count.device))
    return weights, mass, torch.zeros_like(count, dtype=torch.bool)


def _row_stats(
    weights: Tensor,
    spread: Tensor,
    score: Tensor,
    mass: Tensor | None,
    advantages: Tensor,
    rows: _Rows,
    usable: Tensor,
) -> RowStats:
    dtype = weights.dtype
    share = weights / weights.sum(1, dtype=torch.float64).to(dtype)[:, None]
    share = share.masked_fill(weights == 0, 0.0)
    at_last = torch.arange(weights.shape[1], device=weights.device) == rows.last[:, None]
    error = (spread.sum(1, dtype=torch.float64) - score).abs().to(dtype)
    return RowStats(
        entropy=torch.special.entr(share).sum(1).masked_fill(~usable, 0.0),
        last_share=share.masked_fill(~at_last, 0.0).sum(1).masked_fill(~usable, 0.0),
        response_share=None if mass is None else mass.to(dtype).masked_fill(~usable, 0.0),
        score_error=error.masked_fill(~usable, 0.0),
        advantage_moments=_moments(advantages, rows.live).to(dtype),
    )


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    rows = _Rows.of(response)
    live, filled = rows.live, rows.live.any(1)
    width = live.shape[1]
    score_at = _score_positions(rows, config)
    lengths = rows.packing.inside.sum(1) if rows.packing is not None else torch.full_like(score_at, width)
    invalid = rows.invalid | (filled & ((score_at < 0) | (score_at >= lengths)))
    raw = None
    attention = not isinstance(credit, Tensor | str)
    if isinstance(credit, Tensor):
        raw = rows.pad(credit)
    elif not isinstance(credit, str):
        raw, bad = _raw_credit(credit, rows)
        invalid = invalid | bad
    dtype = compute_dtype(score, raw, *(x for x in tokens if x is not tokens.kl_coef))
    score = score.to(dtype).clamp(*config.score_bounds)
    weights, mass, fallback = _weights(raw, credit, rows, score_at, config, dtype)

    on_score = live & (torch.arange(width, device=live.device) == score_at[:, None])
    beta = config.share(credit)
    spread = beta * score[:, None] * weights
    spread = spread + torch.where(on_score, ((1 - beta) * score)[:, None], 0.0)
    spread = rewards = spread.masked_fill(~live, 0.0)
    if tokens.terminal_reward is not None:
        rewards = rewards + torch.where(on_score, tokens.terminal_reward.to(dtype)[:, None], 0.0)
    if tokens.token_rewards is not None:
        rewards = rewards + rows.pad(tokens.token_rewards).to(dtype)
    kl = _kl(tokens, config, rows, dtype)
    if kl is not None:
        kl_coef = tokens.kl_coef
        rewards = rewards - (kl_coef.to(kl) if isinstance(kl_coef, Tensor) else kl_coef) * kl
    rewards = rewards.masked_fill(~live, 0.0)
    values = None if tokens.values is None else rows.pad(tokens.values)
    advantages, returns = _gae(rewards, values, rows, config, tokens.bootstrap, dtype)

    outputs = [rewards, advantages, returns, weights] + ([] if kl is None else [kl])
    outputs = [x.masked_fill(live & invalid[:, None], math.nan) for x in outputs]
    finite = torch.stack([x.isfinite().all(1) for x in outputs]).all(0)
    if config.on_nan == "zero_row":
        outputs = [torch.where(finite[:, None], x, 0.0) for x in outputs]
    usable = filled & ~invalid
    flags = {
        Status.FALLBACK: fallback & ~invalid,
        Status.EMPTY: ~filled & ~invalid,
        Status.SCORE_MASKED: usable & ~on_score.any(1),
        Status.OUT_OF_RANGE: invalid,
        Status.NONFINITE: ~finite,
    }
    status = torch.zeros(len(live), dtype=torch.int32, device=live.device)
    for flag, which in flags.items():
        status |= which.to(torch.int32) * int(flag)
    restored = [rows.restore(x) for x in outputs]
    return ShapedRewards(
        rewards=restored[0],
        advantages=restored[1],
        returns=restored[2],
        credit=restored[3],
        kl=None if kl is None else restored[4],
        status=status,
        row_stats=_row_stats(weights, spread, score, mass if attention else None, outputs[1], rows, usable),
    )


# Advantages ------------------------------------------------------------------------------------------


def _decay_tensor(gamma: float, lam: float | Tensor, device: torch.device) -> Tensor:
    """``gl`` in float64: ``[1]``, or ``[B]`` where lam is per row."""
    gl = decay(gamma, lam)
    return gl.double() if isinstance(gl, Tensor) else torch.tensor([gl], dtype=torch.float64, device=device)


def _all_bits(live: Tensor, dtype: torch.dtype) -> Tensor:
    """An integer as wide as ``dtype`` with every bit set where ``live``, none elsewhere."""
    return live.to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


def _select(x: Tensor, kept: Tensor) -> Tensor:
    """``x`` where ``kept`` has its bits, else 0; on a CPU three times as fast as ``masked_fill``."""
    return (x.view(kept.dtype) & kept).view(x.dtype)


def _select_(x: Tensor, kept: Tensor) -> Tensor:
    """``_select`` in place."""
    return x.view(kept.dtype).bitwise_and_(kept).view(x.dtype)


def _suffix_scan(x: Tensor, gl: Tensor) -> Tensor:
    """``W_t = gl * W_{t+1} + x_t`` along the rows of ``[B, R]``.

    Within a chunk a triangular product, between chunks the same scan over their first values: no sum is
    longer than a chunk, so float32 is enough at any length.
    """
    rows, width = x.shape
    if not x.numel():
        return x
    chunk = min(width, SCAN_CHUNK)
    i = torch.arange(chunk, dtype=torch.float64, device=x.device)
    distance = i[:, None] - i
    decays = (gl[:, None, None] ** distance.clamp(min=0)).masked_fill(distance < 0, 0.0).to(x.dtype)
    if width % chunk:
        x = torch.nn.functional.pad(x, (0, -width % chunk))
    chunks = x.reshape(rows, -1, chunk)
    out = chunks @ (decays[0] if len(decays) == 1 else decays)
    if out.shape[1] > 1:
        first = _suffix_scan(out[:, :, 0], gl**chunk)
        later = torch.nn.functional.pad(first[:, 1:], (0, 1))
        out.addcmul_(later[:, :, None], (gl[:, None, None] ** (chunk - i)).to(x.dtype))
    return out.view(rows, -1)[:, :width]


def _suffix_scan_non_finite(x: Tensor, gl: Tensor) -> Tensor:
    """As ``_suffix_scan``; NaN and infinity go where the recurrence carries them, nowhere else."""
    if math.isfinite(x.sum().item()):
        return _suffix_scan(x, gl)
    finite = x.isfinite()
    poison = x.masked_fill(finite, 0.0)
    carried = poison.flip(1).cumsum(1).flip(1)
    forgotten = poison + 0.0 * torch.nn.functional.pad(carried[:, 1:], (0, 1))
    return _suffix_scan(x.masked_fill(~finite, 0.0), gl) + torch.where(gl[:, None] == 0, forgotten, carried)


def _interrupted(live: Tensor) -> bool:
    """Whether masked tokens stand between unmasked ones."""
    if not live.numel():
        return False
    rises = (live[:, 1:] & ~live[:, :-1]).sum(1) + live[:, 0]
    return bool((rises > 1).any())


def _advantages(rewards: Tensor, values: Tensor | None, gamma: float, gl: Tensor) -> Tensor:
    factor = gl[:, None].to(rewards.dtype)
    undiscounted = len(gl) == 1 and gl.item() == 1.0
    x = rewards if undiscounted else factor * rewards
    if values is not None:
        x = torch.addcmul(x, gamma - factor, values)
    out = rewards.clone() if values is None else rewards - values
    out[:, :-1] += _suffix_scan_non_finite(x, gl)[:, 1:]
    return out


def _gae(
    rewards: Tensor,
    values: Tensor | None,
    rows: _Rows,
    config: ShapingConfig,
    bootstrap: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    live, work = rows.live, _product_dtype(dtype, rewards.device)
    gamma = float32_rounded(config.gamma)
    decays = [_decay_tensor(config.gamma, config.lam, rewards.device)]
    if values is None:
        decays = [_decay_tensor(config.gamma, 1.0, rewards.device)]
    elif config.lam_value is not None:
        decays.append(_decay_tensor(config.gamma, config.lam_value, rewards.device))
    kept = _all_bits(live, work)
    r = _select(rewards.to(work), kept)
    if bootstrap is not None and live.shape[1]:
        at_last = torch.arange(live.shape[1], device=live.device) == rows.last[:, None]
        r = r + torch.where(at_last, gamma * bootstrap.to(work)[:, None], 0.0)
    v = None if values is None else _select(values.to(work), kept)
    # To skip masked tokens is to move the others together; where nothing decays it makes no difference.
    rank = None
    if config.mask_semantics == "skip" and any(bool((gl < 1).any()) for gl in decays) and _interrupted(live):
        rank = (live.cumsum(1) - 1).clamp(min=0)
        r = torch.zeros_like(r).scatter_add_(1, rank, r)
        v = None if v is None else torch.zeros_like(v).scatter_add_(1, rank, v)
    out = [_advantages(r, v, gamma, gl) for gl in decays]
    returns = out[-1].clone() if v is None else out[-1] + v
    out = [out[0], returns] if rank is None else [x.gather(1, rank) for x in (out[0], returns)]
    advantages, returns = (_select_(x, kept).to(dtype) for x in out)
    return advantages, returns


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    mask_semantics: MaskSemantics,
    bootstrap: Tensor | None,
    return_moments: bool,
) -> tuple[Tensor, ...]:
    rows = _Rows.of(response)
    config = ShapingConfig(gamma=gamma, lam=lam, lam_value=lam_value, mask_semantics=mask_semantics)
    dtype = compute_dtype(rewards, values, bootstrap)
    values = None if values is None else rows.pad(values)
    advantages, returns = _gae(rows.pad(rewards), values, rows, config, bootstrap, dtype)
    if rows.packing is not None:
        lost = rows.live & rows.invalid[:, None]
        advantages, returns = (x.masked_fill(lost, math.nan) for x in (advantages, returns))
    moments = (_moments(advantages, rows.live).to(dtype),) if return_moments else ()
    return rows.restore(advantages), rows.restore(returns), *moments


# Whitening -------------------------------------------------------------------------------------------


def _moments(x: Tensor, live: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations along the last axis where ``live``: float64 ``[..., 3]``."""
    count = live.sum(-1).double()
    tokens = x.double().masked_fill(~live, 0.0)
    mean = tokens.sum(-1) / count.clamp(min=1)
    m2 = (tokens - mean[..., None]).masked_fill(~live, 0.0).square().sum(-1)
    return torch.stack([count, mean, m2], -1)


def _folded(moments: Tensor) -> Tensor:
    """The moments of what ``moments`` ([..., 3]) are moments of parts of: float64 ``[3]``."""
    counts, means, m2s = moments.double().reshape(-1, 3).unbind(1)
    means = means.masked_fill(counts == 0, 0.0)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    m2 = m2s.sum() + (counts * (means - mean).square()).sum()
    return torch.stack([count, mean, m2])


def whiten(
    x: Tensor,
    mask: Tensor,
    moments: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
    bessel: bool,
    eps: float,
    eps_mode: EpsMode,
    shift_mean: bool,
    zero_masked: bool,
) -> Tensor:
    if moments is None:
        moments = _moments(x.reshape(-1), mask.reshape(-1) != 0)
    count, mean, m2 = (_folded(moments) if gather is None else _folded(gather(_folded(moments)))).unbind()
    var = m2 / ((count - 1).clamp(min=1) if bessel else count.clamp(min=1))
    if eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + eps)
    else:
        scale = (var + eps if eps_mode == "add" else var.clamp(min=eps)).rsqrt()
    out = (x.double() - mean) * scale
    if not shift_mean:
        out = out + mean
    return (out.masked_fill(mask == 0, 0.0) if zero_masked else out).to(compute_dtype(x))
