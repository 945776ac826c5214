"""Credit carried from the score's token down through all layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.reference.attention import (
    KeysOfRow,
    attention_matrix,
    chosen_heads,
    keys_of_row,
    mean_over_heads,
    normalize,
)
from attnshape.reference.layout import lowest_position, response_positions, response_rows
from attnshape.types import AttentionInputs, Response, SignedInputs, compute_dtype

Step = Callable[[int, int, KeysOfRow, Tensor], Tensor]
"""From a layer, a row ``b``, its keys and ``r [S]`` above the layer to ``r`` below it."""


def attention_rollout(
    layers: Sequence[AttentionInputs],
    response: Response | Tensor,
    *,
    normalization: Normalization = "sum_to_one",
) -> Tensor:
    """Plain (arXiv 2005.00928), or weighted by norms (arXiv 2004.10102, 2109.07152)."""

    def step(i: int, b: int, seq: KeysOfRow, r: Tensor) -> Tensor:
        asked = (r != 0)[None, :, None]  # a query that carries nothing adds nothing, NaN included
        a = torch.where(asked, attention_matrix(layers[i], seq), 0.0)  # [Hq, S, S]
        norms, residual = layers[i].value_norm, layers[i].residual_norm
        if norms is None or residual is None:
            return (r + r @ mean_over_heads(layers[i], a)) / 2
        norms = _of_row(layers[i], seq, norms, b).to(r.dtype)  # [Hq, S]
        residual = _of_row(layers[i], seq, residual, b).to(r.dtype)  # [S]
        norms = torch.where(seq.attended, norms, 0.0)
        moved = torch.einsum("hst,ht->st", chosen_heads(layers[i], a), chosen_heads(layers[i], norms))
        share = torch.where(r == 0, 0.0, r / (moved.sum(1) + residual))
        return share @ moved + torch.where(share == 0, 0.0, share * residual)

    response = Response.of(response)
    return normalize(_carried_down(layers, response, step), response, normalization)


def signed_rollout(layers: Sequence[SignedInputs], response: Response | Tensor) -> Tensor:
    """A value counts by its share of the residual stream that it is added to; signed, not normalised."""

    def step(i: int, b: int, seq: KeysOfRow, r: Tensor) -> Tensor:
        inputs = layers[i].inputs
        value = _of_row(inputs, seq, layers[i].value, b).to(r.dtype)  # [Hkv, S, Dv]
        pull = _of_row(inputs, seq, layers[i].pull, b).to(r.dtype)  # [Hq, S, Dv]
        value = torch.where(seq.attended[:, None], value, 0.0)
        value = value.repeat_interleave(len(pull) // len(value), 0)
        a = attention_matrix(inputs, seq) * torch.einsum("hsd,htd->hst", pull, value)
        m = torch.where((r == 0)[:, None], 0.0, chosen_heads(inputs, a).sum(0))  # [S, S]
        return r @ m + r * (1 - m.sum(1))

    return _carried_down([layer.inputs for layer in layers], Response.of(response), step)


def _carried_down(layers: Sequence[AttentionInputs], response: Response, step: Step) -> Tensor:
    """``r`` below the lowest layer, at the response tokens."""
    dtype = compute_dtype(*(x for layer in layers for x in (layer.query, layer.key)))
    raw = torch.zeros(response.mask.shape, dtype=dtype, device=response.mask.device)
    rows, invalid = response_rows(response)
    for b, row in enumerate(rows):
        live = response.mask[row] != 0
        if not live.any():
            continue
        where = response_positions(response, row, len(live), b)[live]
        sequences = [keys_of_row(layer, b, int(where[-1])) for layer in layers]
        sound = [seq for seq in sequences if seq is not None]
        top = sequences[-1]
        outside = top is None or where.min() < lowest_position(response) or where.max() >= top.key.shape[1]
        if invalid[b] or outside or top is None or len(sound) < len(layers):
            raw[row] = torch.where(live, math.nan, 0.0)
            continue
        r = torch.zeros(top.key.shape[1], dtype=dtype, device=raw.device)
        r[top.position] = 1.0
        for i in reversed(range(len(layers))):
            r = step(i, b, sound[i], r)
        padded = torch.cat([r, r.new_zeros(1)])
        raw[row] = torch.zeros_like(raw[row]).masked_scatter(live, padded[where])
    return raw


def _of_row(inputs: AttentionInputs, seq: KeysOfRow, x: Tensor, b: int) -> Tensor:
    """Row ``b`` of what has tokens, and heads before them (packed: after them)."""
    if not inputs.packed:
        return x[b]
    return x[seq.tokens] if x.ndim == 1 else x[seq.tokens].transpose(0, 1)
