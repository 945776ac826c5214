"""One row of attention, and credit from it (ABC, arXiv 2402.00782)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.reference.layout import lowest_position, response_positions, response_rows, segments
from attnshape.types import MIN_MASS, AttentionInputs, AttentionLayers, Response, Status, compute_dtype


class KeysOfRow(NamedTuple):
    """One sequence of one layer."""

    tokens: slice  # of the packed token axis
    query: Tensor  # [Hq, S, D], or [Hq, D]
    key: Tensor  # [Hq, S, D]
    attended: Tensor  # [S]
    mask_row: Tensor | None  # [Hq, S]
    lse: Tensor | None  # [Hq, S], or [Hq]
    position: int


def keys_of_row(inputs: AttentionInputs, b: int, last_response: int | None = None) -> KeysOfRow | None:
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
    return KeysOfRow(
        tokens,
        query.to(dtype),
        key.to(dtype).repeat_interleave(heads_per_key, dim=0),
        attended,
        None if mask_row is None else mask_row.to(dtype).expand(query.shape[0], length),
        None if lse is None else lse.to(dtype),
        position,
    )


def attend(inputs: AttentionInputs, seq: KeysOfRow, p: int) -> Tensor:
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


def chosen_heads(inputs: AttentionInputs, x: Tensor) -> Tensor:
    """Of ``x`` ([Hq, ...]) the heads that count."""
    return x if inputs.head_mask is None else x[inputs.head_mask != 0]


def mean_over_heads(inputs: AttentionInputs, a: Tensor) -> Tensor:
    chosen = chosen_heads(inputs, a)
    return chosen.sum(0) / max(len(chosen), 1)


def layers_of(inputs: AttentionLayers) -> Sequence[AttentionInputs]:
    return [inputs] if isinstance(inputs, AttentionInputs) else inputs


def _head_mean(layers: Sequence[AttentionInputs], keys: Sequence[KeysOfRow]) -> Tensor:
    """Mean over layers and heads of a sequence's attention row, ``[S]``."""
    rows = [
        mean_over_heads(layer, attend(layer, seq, seq.position))
        for layer, seq in zip(layers, keys, strict=True)
    ]
    return torch.stack(rows).mean(0)


def attention_row(inputs: AttentionLayers) -> Tensor:
    """Head mean of one attention row per sequence, ``[B, S]`` (packed ``[N]``), not normalised."""
    layers = layers_of(inputs)
    first = layers[0]
    dtype = compute_dtype(*(x for layer in layers for x in (layer.query, layer.key)))
    shape = first.key.shape[:1] if first.packed else (first.key.shape[0], first.key.shape[2])
    out = torch.zeros(shape, dtype=dtype, device=first.key.device)
    places: Sequence[int | slice] = range(len(out))
    if first.cu_seqlens is not None:
        places, _ = segments(first.cu_seqlens, len(out))
    for b, place in enumerate(places):
        found = [keys_of_row(layer, b) for layer in layers]
        keys = [x for x in found if x is not None]
        out[place] = _head_mean(layers, keys) if len(keys) == len(layers) else math.nan
    return out


OfRow = Callable[[int, list[KeysOfRow], Tensor], Tensor]
"""From a row ``b``, its keys in every layer and the key positions of its ``n`` unmasked response tokens (-1:
none) to their weights, ``[n]``."""


def weights_of_rows(
    layers: Sequence[AttentionInputs], response: Response, of_row: OfRow, lowest: int
) -> tuple[Tensor, Tensor]:
    """Weights of the mask's shape, and ``[B]`` bool: whether a row is out of range, and so NaN.

    ``lowest`` is the lowest key position that a response token may have.
    """
    dtype = compute_dtype(*(x for layer in layers for x in (layer.query, layer.key)))
    raw = torch.zeros(response.mask.shape, dtype=dtype, device=response.mask.device)
    rows, invalid = response_rows(response)
    for b, row in enumerate(rows):
        live = response.mask[row] != 0
        if not live.any():
            continue
        where = response_positions(response, row, len(live), b)[live]
        found = [keys_of_row(layer, b, int(where[-1])) for layer in layers]
        keys = [x for x in found if x is not None]
        outside = len(keys) < len(layers) or where.min() < lowest or where.max() >= keys[0].key.shape[1]
        if invalid[b] or outside:
            invalid[b] = True
            raw[row] = torch.where(live, math.nan, 0.0)
        else:
            raw[row] = torch.zeros_like(raw[row]).masked_scatter(live, of_row(b, keys, where))
    return raw, invalid


def at_positions(x: Tensor, where: Tensor) -> Tensor:
    """``x [S]`` at key positions, 0 at -1."""
    return torch.cat([x, x.new_zeros(1)])[where]


def raw_credit(inputs: AttentionLayers, response: Response) -> tuple[Tensor, Tensor]:
    """The attention row at the response tokens, and ``[B]`` bool: whether the row is out of range."""
    layers = layers_of(inputs)

    def of_row(b: int, keys: list[KeysOfRow], where: Tensor) -> Tensor:
        return at_positions(_head_mean(layers, keys), where)

    return weights_of_rows(layers, response, of_row, lowest_position(response))


def normalize_row(
    raw: Tensor, live: Tensor, score_index: int, normalization: Normalization
) -> tuple[Tensor, Status]:
    """Credit of one row from its raw weights, and how it fell back to ``sparse``, if it did."""
    raw = torch.where(live, raw, 0.0)
    mass = torch.where(raw < 0, -math.inf, raw).sum()
    total = int(live.sum()) if normalization == "sum_to_length" else 1
    negative = bool(mass == -math.inf)
    if negative or (normalization != "none" and mass < MIN_MASS):
        one_hot = torch.zeros_like(raw)
        one_hot[score_index] = total
        status = Status.FALLBACK | Status.NEGATIVE if negative else Status.FALLBACK
        return torch.where(live, one_hot, 0.0), status
    if normalization == "none":
        return raw, Status(0)
    return torch.where(live, raw / mass * total, 0.0), Status(0)


def normalize(raw: Tensor, response: Response, normalization: Normalization) -> Tensor:
    """Credit of the mask's shape; a row that falls back has it on its last unmasked token."""
    credit = torch.zeros_like(raw)
    for row in response_rows(response)[0]:
        live = response.mask[row] != 0
        if live.any():
            credit[row], _ = normalize_row(raw[row], live, int(live.nonzero().max()), normalization)
    return credit


def attention_credit(
    inputs: AttentionLayers, response: Response | Tensor, *, normalization: Normalization = "sum_to_one"
) -> Tensor:
    """ABC (arXiv 2402.00782): the attention row at the response tokens, normalised."""
    response = Response.of(response)
    return normalize(raw_credit(inputs, response)[0], response, normalization)


def attention_matrix(inputs: AttentionInputs, seq: KeysOfRow) -> Tensor:
    """``a[h, s, t]``: ``[Hq, S, S]``."""
    return torch.stack([attend(inputs, seq, p) for p in range(seq.key.shape[1])], dim=1)
