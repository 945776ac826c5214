"""Credit carried from the score's token down through all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.reference.attention import (
    KeysOfRow,
    at_positions,
    attention_matrix,
    chosen_heads,
    mean_over_heads,
    normalize,
    weights_of_rows,
)
from attnshape.reference.layout import lowest_position
from attnshape.types import AttentionInputs, Response, SignedInputs

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

    def of_row(b: int, keys: list[KeysOfRow], where: Tensor) -> Tensor:
        r = keys[-1].key.new_zeros(keys[-1].key.shape[1])
        r[keys[-1].position] = 1.0
        for i in reversed(range(len(layers))):
            r = step(i, b, keys[i], r)
        return at_positions(r, where)

    return weights_of_rows(layers, response, of_row, lowest_position(response))[0]


def _of_row(inputs: AttentionInputs, seq: KeysOfRow, x: Tensor, b: int) -> Tensor:
    """Row ``b`` of what has tokens, and heads before them (packed: after them)."""
    if not inputs.packed:
        return x[b]
    return x[seq.tokens] if x.ndim == 1 else x[seq.tokens].transpose(0, 1)
