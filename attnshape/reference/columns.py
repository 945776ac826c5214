"""Columns of attention among the response's own tokens (ABC-D, arXiv 2402.00782)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.reference.attention import (
    KeysOfRow,
    attention_matrix,
    mean_over_heads,
    normalize,
    weights_of_rows,
)
from attnshape.types import AttentionInputs, Response


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

    def of_row(b: int, keys: list[KeysOfRow], where: Tensor) -> Tensor:
        attention = mean_over_heads(inputs, attention_matrix(inputs, keys[0]))
        block = attention[where][:, where]  # a_s[j]: [n, n]
        n = len(where)
        queries = n - shift
        weights = torch.zeros(n, dtype=block.dtype, device=block.device)
        for j in range(queries):
            attending = block[:queries, j]
            weights[j + shift] = attending[-1] if variant == "last" else attending[j:].mean()
        return weights

    raw, _ = weights_of_rows([inputs], response, of_row, 0)
    return normalize(raw, response, normalization)
