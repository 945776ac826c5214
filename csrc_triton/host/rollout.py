"""Rollout: credit carried down through all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csrc_triton.host.attention import LayerInputs, ResponseInputs
from csrc_triton.host.columns import (
    CHUNK,
    MEAN_HEADS,
    ResponseEntries,
    axis_of,
    head_columns,
    per_head,
    per_position,
    row_normalizers,
)
from csrc_triton.launch import COMPILER, tokens
from csrc_triton.rollout import carry_kernel, share_kernel


def rollout_raw(
    layers: Sequence[LayerInputs],
    response: ResponseInputs,
    *,
    value_norms: Sequence[Tensor] | None = None,
    residual_norms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the highest layer's query position carries down to the response tokens, and each row's status.

    Args:
        layers: from the lowest to the highest, as for ``column_credit_raw``.
        value_norms: per layer ``[B, Hq, S]``, packed ``[N, Hq]``: weights of keys and heads.
        residual_norms: per layer ``[B, S]``, packed ``[N]``: what a position weighs itself.

    Other arguments and returns as for ``column_credit_raw``; an ``index`` may be -1, nowhere.
    """
    entries = ResponseEntries(response, 0 if response.index is None else -1, 0)
    axis = axis_of(layers[-1])
    carried = torch.zeros(axis.total, dtype=torch.float32, device=entries.out.device)
    poison = torch.zeros_like(entries.status)
    top = torch.empty(axis.batch, dtype=torch.int64, device=entries.out.device)
    rows = torch.empty(0)
    for i in reversed(range(len(layers))):
        layer = layers[i]
        rows = entries.rows(layer, top=top, carried=carried if i == len(layers) - 1 else None)
        norms = None if value_norms is None else value_norms[i]
        residual = per_position(None if residual_norms is None else residual_norms[i])
        heads = (axis.total, tokens(layer.head_mask), layer.query.shape[1])
        options = {"H": MEAN_HEADS, "CHUNK": CHUNK, **COMPILER}
        slots = axis.slots(CHUNK)
        normalizer, moved = row_normalizers(layer, rows, axis, weight=carried, norms=norms)
        if moved is not None and slots:
            share = torch.zeros_like(carried)
            share_kernel[(slots,)](share, poison, carried, moved, *residual, rows, *axis, *heads, **options)
            carried = share
        columns = head_columns(layer, rows, axis, normalizer, weight=carried)
        below = torch.zeros_like(carried)
        if slots:
            carry_kernel[(slots,)](
                below,
                poison if i else None,
                carried,
                columns,
                *per_head(norms, axis),
                *residual,
                rows,
                *per_position(layer.attention_mask),
                *axis,
                *heads,
                **options,
            )
        carried = below
    entries.read(layers[-1], rows, carried, poison)
    return entries.out, entries.status
