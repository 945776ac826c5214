"""Credit carried from the score's token down through all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnshape.config import Normalization
from attnshape.types import AttentionInputs, Response, SignedInputs
from attnshape.vectorized.attention import (
    PaddedLayer,
    at_response,
    attend,
    chosen_heads,
    last_response_position,
    mean_over_heads,
    normalized,
    padded_layer,
    query_chunk,
)
from attnshape.vectorized.layout import Rows

Moved = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
"""From some queries' attention ``[B, Hq, n, S]``, what they carry ``[B, n]`` and which they are: what goes to
each key, ``[B, S]``, and what stays where it is, ``[B, n]``."""


def attention_rollout(
    layers: Sequence[AttentionInputs],
    response: Response,
    value_norms: Sequence[Tensor] | None,
    residual_norms: Sequence[Tensor] | None,
    normalization: Normalization,
) -> Tensor:
    def plain(layer: PaddedLayer, i: int) -> Moved:
        def moved(attention: Tensor, above: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            shares = mean_over_heads(layer.inputs, attention) / 2
            return _carried(above, shares), above / 2

        return moved

    def weighted(layer: PaddedLayer, i: int) -> Moved:
        assert value_norms is not None
        assert residual_norms is not None
        norms, residual = layer.padded(value_norms[i]), layer.padded(residual_norms[i]).to(layer.dtype)
        norms = chosen_heads(layer.inputs, norms.to(layer.dtype)).masked_fill(~layer.attended[:, None], 0.0)

        def moved(attention: Tensor, above: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            lengths = torch.einsum("bhst,bht->bst", chosen_heads(layer.inputs, attention), norms)
            lengths = lengths.masked_fill((above == 0)[..., None], 0.0)
            kept = residual[:, part]
            share = (above / (lengths.sum(-1) + kept)).masked_fill(above == 0, 0.0)
            return _carried(share, lengths), (share * kept).masked_fill(share == 0, 0.0)

        return moved

    rows = Rows.of(response)
    raw = _carried_down(layers, rows, plain if value_norms is None else weighted)
    return normalized(raw, rows, normalization)


def signed_rollout(layers: Sequence[SignedInputs], response: Response) -> Tensor:
    def signed(layer: PaddedLayer, i: int) -> Moved:
        value, pull = layer.padded(layers[i].value), layer.padded(layers[i].pull)
        value = value.to(layer.dtype).masked_fill(~layer.attended[:, None, :, None], 0.0)
        value = chosen_heads(layer.inputs, value.repeat_interleave(pull.shape[1] // value.shape[1], 1))
        pull = chosen_heads(layer.inputs, pull.to(layer.dtype))

        def moved(attention: Tensor, above: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            attention = chosen_heads(layer.inputs, attention)
            share = (attention * (pull[:, :, part] @ value.mT)).sum(1)
            share = share.masked_fill((above == 0)[..., None], 0.0)
            return _carried(above, share), above * (1 - share.sum(-1))

        return moved

    rows = Rows.of(response)
    return rows.restore(_carried_down([layer.inputs for layer in layers], rows, signed))


def _carried(above: Tensor, shares: Tensor) -> Tensor:
    """``sum over s of above[s] shares[s, t]``; a query that carries nothing adds nothing, NaN included."""
    return torch.einsum("bs,bst->bt", above, shares.masked_fill((above == 0)[..., None], 0.0))


def _carried_down(
    layers: Sequence[AttentionInputs], rows: Rows, of_layer: Callable[[PaddedLayer, int], Moved]
) -> Tensor:
    """What the score's token carries, below the lowest layer, at the response tokens ``[B, R]``."""
    positions = rows.key_positions()
    last = last_response_position(rows, positions)
    padded = [padded_layer(x, last) for x in layers]
    top = padded[-1]
    batch, length = top.attended.shape
    t = torch.arange(length, device=last.device)
    r = (t == top.position[:, None]).to(top.dtype)
    for i in reversed(range(len(padded))):
        layer, below = padded[i], torch.zeros_like(r)
        moved, step = of_layer(layer, i), query_chunk(layer)
        for lo in range(0, length, step):
            part = slice(lo, lo + step)
            to_keys, stays = moved(attend(layer, t[part].expand(batch, -1)), r[:, part], part)
            below += to_keys
            below[:, part] += stays
        r = below
    invalid = torch.stack([layer.invalid for layer in padded]).any(0)
    return at_response(r, rows, positions, invalid, top.lengths)[0]
