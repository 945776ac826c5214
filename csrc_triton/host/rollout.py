"""Rollout: credit carried down through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csrc_triton.arguments import Residual
from csrc_triton.host.attention import LayerInputs, ResponseInputs, key_axis
from csrc_triton.host.columns import (
    CHUNK,
    MEAN_HEADS,
    ResponseEntries,
    Tokens,
    head_columns,
    key_weights,
    per_head,
    row_normalizers,
)
from csrc_triton.launch import COMPILER, Launcher, row_stride
from csrc_triton.rollout import carry_kernel, share_kernel

SHARE = Launcher(share_kernel)
CARRY = Launcher(carry_kernel)


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
    axis = Tokens.of(key_axis(layers[-1]))
    carried = torch.zeros(axis.total, dtype=torch.float32, device=layers[-1].key.device)
    poison = torch.zeros_like(entries.found.p_status)
    top = torch.empty(axis.batch, dtype=torch.int64, device=carried.device)
    rows = torch.empty(0)
    slots = axis.slots(CHUNK)
    for i in reversed(range(len(layers))):
        layer = layers[i]
        rows = entries.rows(layer, top=top, carried=carried if i == len(layers) - 1 else None)
        norms = None if value_norms is None else value_norms[i]
        residual = None if residual_norms is None else _residual(residual_norms[i])
        here: dict[str, Any] = {"axis": key_axis(layer), "p_rows": rows, "residual": residual}
        here |= {"H": MEAN_HEADS, "CHUNK": CHUNK}
        normalizer, moved = row_normalizers(layer, rows, axis, weight=carried, norms=norms)
        if moved is not None and slots:
            share = torch.zeros_like(carried)
            moved_to = per_head(layer, moved)
            SHARE(slots, COMPILER, p_share=share, p_poison=poison, p_carried=carried, moved=moved_to, **here)
            carried = share
        columns = per_head(layer, head_columns(layer, rows, axis, normalizer, weight=carried))
        below = torch.zeros_like(carried)
        if slots:
            CARRY(
                slots,
                COMPILER,
                p_below=below,
                p_poison=poison if i else None,
                p_above=carried,
                columns=columns,
                weights=key_weights(norms, layer),
                **here,
            )
        carried = below
    entries.read(layers[-1], rows, carried, poison)
    return entries.found.p_out, entries.found.p_status


def _residual(x: Tensor) -> Residual:
    """What positions weigh themselves, ``[B, S]`` or ``[N]``."""
    return Residual(x, row_stride(x), x.stride(-1))
