"""Columns of attention among the response's own tokens (ABC-D, arXiv 2402.00782)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.types import AttentionInputs, Response
from attnshape.vectorized.attention import (
    last_response_position,
    mean_attended,
    normalized,
    padded_layer,
    positions_in_range,
    query_chunk,
)
from attnshape.vectorized.layout import Rows


def attention_column_credit(
    inputs: AttentionInputs,
    response: Response,
    variant: Literal["mean", "last"],
    shift: Literal[0, 1],
    normalization: Normalization,
) -> Tensor:
    rows = Rows.of(response)
    positions = rows.key_positions()
    layer = padded_layer(inputs, last_response_position(rows, positions))
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
    step = query_chunk(layer)
    for lo in range(0, width, step):
        at = order[:, lo : lo + step].clamp(0, max(keys - 1, 0))
        seen = keys
        if inputs.causal and at.numel() and at.device.type == "cpu":  # elsewhere asking for it would wait
            seen = int(at.max()) + 1
        weights = mean_attended(layer, at, seen)  # [B, n, S]
        columns[:, :seen] += weights.masked_fill_(~asking[:, lo : lo + step, None], 0.0).sum(1)
    invalid = rows.invalid | layer.invalid | ~positions_in_range(rows, positions, 0, layer.lengths)
    weights = torch.cat([columns, columns.new_zeros(batch, 1)], 1).gather(1, order.clamp(0, keys))
    if variant == "mean":
        weights = weights / (queries - t).clamp(min=1)
    weights = weights.masked_fill(t >= queries, 0.0)
    if shift:
        weights = torch.nn.functional.pad(weights, (shift, 0))[:, :width]
    raw = weights.gather(1, rank).masked_fill(~rows.live, 0.0)
    raw = raw.masked_fill(rows.live & invalid[:, None], math.nan)
    return normalized(raw, rows, normalization)
