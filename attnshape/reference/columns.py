"""Columns of attention among the response's own tokens (ABC-D, arXiv 2402.00782)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.reference.attention import attention_matrix, keys_of_row, mean_over_heads, normalize
from attnshape.reference.layout import response_positions, response_rows
from attnshape.types import AttentionInputs, Response, compute_dtype


def attention_column_credit(
    inputs: AttentionInputs,
    response: Response | Tensor,
    *,
    variant: Literal["mean", "last"] = "mean",
    shift: Literal[0, 1] = 0,
    normalization: Normalization = "sum_to_one",
) -> Tensor:
    """Credit from the attention among the response's own unmasked tokens."""
    response = Response.of(response)
    dtype = compute_dtype(inputs.query, inputs.key)
    raw = torch.zeros(response.mask.shape, dtype=dtype, device=response.mask.device)
    rows, invalid = response_rows(response)
    for b, row in enumerate(rows):
        live = response.mask[row] != 0
        if not live.any():
            continue
        where = response_positions(response, row, len(live), b)[live]
        seq = keys_of_row(inputs, b, int(where[-1]))
        if invalid[b] or seq is None or where.min() < 0 or where.max() >= seq.key.shape[1]:
            raw[row] = torch.where(live, math.nan, 0.0)
            continue
        block = mean_over_heads(inputs, attention_matrix(inputs, seq))[where][:, where]  # a_s[j]: [n, n]
        n = len(where)
        queries = n - shift
        weights = torch.zeros(n, dtype=dtype, device=raw.device)
        for j in range(queries):
            attending = block[:queries, j]
            weights[j + shift] = attending[-1] if variant == "last" else attending[j:].mean()
        raw[row] = torch.zeros_like(raw[row]).masked_scatter(live, weights)
    return normalize(raw, response, normalization)
