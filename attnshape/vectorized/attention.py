"""One row of attention, and credit from it (ABC, arXiv 2402.00782)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.types import MIN_MASS, AttentionInputs, Response, compute_dtype
from attnshape.vectorized.layout import Mask, Packing, Rows, at_column, product_dtype

KEY_CHUNK = 1024
"""Keys converted to the accumulation dtype at once."""
SCORE_ELEMENTS = 1 << 24
"""Attention weights held at once while columns are summed."""
CACHED_ELEMENTS = 1 << 20
"""The same on a CPU, in whose cache they stay."""


class PaddedLayer(NamedTuple):
    """One layer in padded form."""

    inputs: AttentionInputs  # never packed
    attended: Tensor  # [B, S] bool
    position: Tensor  # [B], clamped
    lengths: Tensor  # [B]
    invalid: Tensor  # [B] bool
    packing: Packing | None
    dtype: torch.dtype

    def padded(self, x: Tensor) -> Tensor:
        """What has tokens and then heads when packed, with heads and then tokens."""
        if self.packing is None:
            return x
        x = self.packing.pad(x)
        return x if x.ndim == 2 else x.transpose(1, 2)


def padded_layer(inputs: AttentionInputs, last_response: Tensor | None = None) -> PaddedLayer:
    dtype = compute_dtype(inputs.query, inputs.key)
    packing = None
    if inputs.cu_seqlens is not None:
        total = inputs.key.shape[0]
        packing = Packing.of(inputs.cu_seqlens, total)
        query, lse, mask = inputs.query, inputs.lse, inputs.attention_mask
        if inputs.has_all_queries:
            query = packing.pad(query).transpose(1, 2)
        if lse is not None and lse.shape[0] == total and inputs.has_all_queries:
            lse = packing.pad(lse).transpose(1, 2)
        mask_row = inputs.mask_row
        if mask_row is not None:
            mask_row = packing.pad(mask_row).movedim(1, -1)
        inside = packing.inside if mask is None else packing.inside & (packing.pad(mask) != 0)
        key = packing.pad(inputs.key).transpose(1, 2)
        inputs = dataclasses.replace(
            inputs, query=query, key=key, lse=lse, attention_mask=inside, mask_row=mask_row, cu_seqlens=None
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
    return PaddedLayer(
        inputs, attended, position.clamp(0, max(length - 1, 0)), lengths, invalid, packing, dtype
    )


def attend(layer: PaddedLayer, positions: Tensor) -> Tensor:
    """``a[h, s, t]`` of the queries at ``positions [B, n]``: ``[B, Hq, n, S]``, 0 where not visible."""
    probs, visible = _attended(layer, positions)
    return probs.masked_fill_(~visible, 0.0)


def mean_attended(layer: PaddedLayer, positions: Tensor, keys: int | None = None) -> Tensor:
    """Mean over heads of ``attend``, ``[B, n, S]``; of the first keys only, where the rest is not seen."""
    probs, visible = _attended(layer, positions, keys)
    if visible.shape[1] > 1:
        return mean_over_heads(layer.inputs, probs.masked_fill_(~visible, 0.0))
    return mean_over_heads(layer.inputs, probs).masked_fill_(~visible[:, 0], 0.0)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """``query @ key.mT`` in the query's dtype."""
    if key.dtype == query.dtype:
        return query @ key.mT
    parts = [query @ part.to(query.dtype).mT for part in torch.split(key, KEY_CHUNK, 2)]
    return torch.cat(parts, -1)


def _attended(layer: PaddedLayer, positions: Tensor, keys: int | None = None) -> tuple[Tensor, Tensor]:
    """``attend`` and what is visible, ``[B, 1 or Hq, n, S]``; where it is not, NaN in a row that has NaN or
    sees nothing."""
    inputs, dtype = layer.inputs, layer.dtype
    key = inputs.key[:, :, :keys]
    batch, kv_heads, length, width = key.shape
    heads = inputs.query.shape[1]
    work = product_dtype(dtype, key.device)
    rows, n = torch.arange(batch, device=key.device)[:, None], positions.shape[1]
    if inputs.query.ndim == 3:
        query = inputs.query[:, :, None]
    else:
        query = inputs.query.transpose(1, 2)[rows, positions].transpose(1, 2)  # [B, Hq, n, D]
    query = query.to(work).reshape(batch, kv_heads, heads // kv_heads * n, width) * inputs.scaling
    scores = _scores(query, key).to(dtype).reshape(batch, heads, n, length)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    t = torch.arange(length, device=key.device)
    distance = positions[:, :, None] - t  # [B, n, S]
    visible = layer.attended[:, None, :keys].expand(distance.shape)
    if inputs.causal:
        visible = visible & (distance >= 0)
    if inputs.sliding_window is not None:
        visible = visible & (distance.abs() < inputs.sliding_window)
    visible = visible[:, None]  # [B, 1, n, S]
    if inputs.mask_row is not None:
        added = inputs.mask_row[..., :keys].to(dtype)
        added = (added[:, None] if added.ndim == 2 else added)[:, :, None]  # [B, 1 or Hq, 1, S]
        scores = scores + added
        visible = visible & (added != -math.inf)
    torch.where(visible, scores, torch.full((), -math.inf, dtype=dtype, device=key.device), out=scores)
    sinks = None if inputs.sinks is None else inputs.sinks.to(dtype)[None, :, None, None]
    if inputs.lse is not None:
        lse = inputs.lse.to(dtype)
        lse = lse[:, :, None] if lse.ndim == 2 else lse.transpose(1, 2)[rows, positions].transpose(1, 2)
        lse = lse[..., None]  # [B, Hq, n, 1]
        return scores.sub_(lse if sinks is None else torch.logaddexp(lse, sinks)).exp_(), visible
    if sinks is not None:
        sinks = sinks.expand(batch, heads, n, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], visible
    return torch.softmax(scores, -1, out=scores), visible


def chosen_heads(inputs: AttentionInputs, x: Tensor) -> Tensor:
    """``x`` ([B, Hq, ...]), 0 in heads that do not count."""
    if inputs.head_mask is None:
        return x
    return x.masked_fill((inputs.head_mask == 0).view(-1, *[1] * (x.ndim - 2)), 0.0)


def mean_over_heads(inputs: AttentionInputs, probs: Tensor) -> Tensor:
    """``[B, Hq, ...]`` to ``[B, ...]``."""
    if inputs.head_mask is None:
        return probs.mean(1)
    return chosen_heads(inputs, probs).sum(1) / (inputs.head_mask != 0).sum().clamp(min=1)


def _head_mean(
    inputs: Sequence[AttentionInputs], last_response: Tensor | None
) -> tuple[Tensor, PaddedLayer, Tensor]:
    """Mean over layers and heads of the attention rows ``[B, S]``, the first layer, and the invalid rows."""
    layers = [padded_layer(x, last_response) for x in inputs]
    rows = [mean_attended(x, x.position[:, None])[:, 0] for x in layers]
    mean = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
    invalid = torch.stack([layer.invalid for layer in layers]).any(0)
    return mean, layers[0], invalid


def attention_row(inputs: Sequence[AttentionInputs]) -> Tensor:
    row, layer, invalid = _head_mean(inputs, None)
    row = row.masked_fill(invalid[:, None], math.nan)
    return row if layer.packing is None else layer.packing.pack(row, inputs[0].key.shape[0])


def positions_in_range(rows: Rows, positions: Tensor, lowest: int, lengths: Tensor) -> Tensor:
    """``[B]``: whether every unmasked token of the row lies among its keys."""
    outside = (positions < lowest) | (positions >= lengths[:, None])
    return ~(outside & rows.live).any(1)


def at_response(
    column: Tensor, rows: Rows, positions: Tensor, invalid: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights over keys ``[B, S]`` read at the response tokens ``[B, R]``, and the invalid rows."""
    lowest = -1 if rows.start is None else 0  # only an index may say that a token has no key
    invalid = rows.invalid | invalid | ~positions_in_range(rows, positions, lowest, lengths)
    column = torch.cat([column, column.new_zeros(len(column), 1)], 1)  # position -1 is nowhere
    nowhere = column.shape[1] - 1
    inside = (positions >= 0) & (positions < nowhere)
    raw = column.gather(1, torch.where(inside, positions, nowhere))
    raw = raw.masked_fill(~rows.live, 0.0)
    return raw.masked_fill(rows.live & invalid[:, None], math.nan), invalid & rows.live.any(1)


def last_response_position(rows: Rows, positions: Tensor) -> Tensor:
    if not positions.shape[1]:
        return positions.new_full((len(positions),), -1)
    return positions.gather(1, Mask(rows.live).last.clamp(min=0)[:, None])[:, 0]


def raw_credit(inputs: Sequence[AttentionInputs], rows: Rows) -> tuple[Tensor, Tensor]:
    """Head mean of the attention at the response tokens, ``[B, R]``, and the rows that are out of range."""
    positions = rows.key_positions()
    attention, layer, invalid = _head_mean(inputs, last_response_position(rows, positions))
    return at_response(attention, rows, positions, invalid, layer.lengths)


def normalize(
    raw: Tensor, mask: Mask, score_at: Tensor, on_score: Tensor, normalization: Normalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Credit ``[n, R]``, its raw mass ``[n]``, and the rows that fell back to ``sparse``; mass ``-inf`` if
    a weight is negative.

    Args:
        score_at, on_score: the score's token, and whether it is unmasked, ``[n]``.
    """
    raw = mask.select(raw)
    mass = torch.where(raw < 0, -math.inf, raw).sum(1, dtype=torch.float64)
    fallback = mass == -math.inf if normalization == "none" else mass < MIN_MASS
    total = mask.count.double() if normalization == "sum_to_length" else torch.ones_like(mass)
    scale = torch.ones_like(mass) if normalization == "none" else total / mass
    credit = torch.where(fallback[:, None], 0.0, raw * scale.to(raw.dtype)[:, None])
    on_token = (total * (fallback & on_score)).to(raw.dtype)[:, None]
    return mask.select(credit.scatter_add(1, at_column(score_at, raw.shape[1]), on_token)), mass, fallback


def normalized(raw: Tensor, rows: Rows, normalization: Normalization) -> Tensor:
    mask = Mask(rows.live)
    credit, _, _ = normalize(raw, mask, mask.last, mask.count > 0, normalization)
    return rows.restore(credit)


def attention_credit(
    inputs: Sequence[AttentionInputs], response: Response, normalization: Normalization
) -> Tensor:
    rows = Rows.of(response)
    return normalized(raw_credit(inputs, rows)[0], rows, normalization)


def query_chunk(layer: PaddedLayer) -> int:
    """Queries whose attention over all keys fits the element budget."""
    batch, _, length, _ = layer.inputs.key.shape
    elements = SCORE_ELEMENTS
    if layer.inputs.key.device.type == "cpu":
        elements = min(elements, CACHED_ELEMENTS)
    return max(1, elements // max(1, batch * layer.inputs.query.shape[1] * length))
