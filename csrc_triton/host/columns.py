"""Column sums of attention over many queries: credit from a response's own attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from csrc_triton.columns import (
    at_response_kernel,
    column_kernel,
    normalizer_kernel,
    response_kernel,
    rows_kernel,
)
from csrc_triton.host.attention import SCAN, LayerInputs, ResponseInputs, attention_row
from csrc_triton.launch import (
    COMPILER,
    ceil_div,
    contiguous,
    interpreted,
    padded,
    registers,
    row_stride,
    stride_unit,
    tokens,
)

CHUNK = 256
"""Tokens a program takes where nothing is multiplied."""


MEAN_HEADS = 8
"""Heads whose columns are added together."""


class Axis(NamedTuple):
    """A token axis: of the keys, or of the response tokens."""

    cu_seqlens: Tensor | None
    batch: int
    width: int  # per row, or in all when packed

    @property
    def total(self) -> int:
        return self.batch * self.width if self.cu_seqlens is None else self.width

    def slots(self, chunk: int) -> int:
        """Chunks that may be some row's."""
        if self.cu_seqlens is None:
            return self.batch * ceil_div(self.width, chunk)
        return self.width // chunk + self.batch


class ResponseEntries:
    """The response tokens, and what one launch finds out about them."""

    def __init__(
        self,
        response: ResponseInputs,
        lowest: int,
        shift: int,
    ) -> None:
        mask, index, cu_seqlens = response.mask, response.index, response.cu_seqlens
        batch = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.axis = Axis(cu_seqlens, batch, mask.shape[-1])
        self.ordered, self.lowest, self.shift = index is None, lowest, shift
        # Packed tokens may belong to no row.
        new = torch.empty if cu_seqlens is None else torch.zeros
        self.out = new(mask.shape, dtype=torch.float32, device=mask.device)
        self.status = torch.empty(batch, dtype=torch.int32, device=mask.device)
        self.facts = torch.empty(batch, 5, dtype=torch.int64, device=mask.device)
        self.rank, self.order = torch.empty(2, self.axis.total, dtype=torch.int32, device=mask.device)
        if batch:
            index = tokens(index)
            response_kernel[(batch,)](
                self.facts,
                self.status,
                self.rank,
                self.order,
                self.out,
                tokens(mask),
                row_stride(tokens(mask)),
                contiguous(response.start),
                index,
                row_stride(index),
                cu_seqlens,
                batch,
                self.axis.width,
                SHIFT=shift,
                SCAN=SCAN,
                **COMPILER,
            )

    def rows(
        self,
        layer: LayerInputs,
        asked: Tensor | None = None,
        top: Tensor | None = None,
        carried: Tensor | None = None,
    ) -> Tensor:
        """The entries of each row: its unmasked tokens, or with ``top`` its keys; int64 ``[B, 7]``."""
        position, axis = layer.query_position, axis_of(layer)
        rows = torch.empty(axis.batch, 7, dtype=torch.int64, device=self.out.device)
        if axis.batch:
            rows_kernel[(axis.batch,)](
                rows,
                self.status,
                asked,
                top,
                carried,
                self.facts,
                self.axis.cu_seqlens,
                self.axis.width,
                *axis,
                contiguous(layer.key_start),
                contiguous(position),
                *per_position(layer.attention_mask),
                CAUSAL=layer.causal,
                LAST_RESPONSE=position == "last_response",
                LOWEST=self.lowest,
                SHIFT=self.shift,
                SCAN=SCAN,
                **COMPILER,
            )
        return rows

    def read(self, layer: LayerInputs, rows: Tensor, x: Tensor, poison: Tensor | None = None) -> None:
        """Fills ``out``: with what lies at the tokens' keys, ``[keys]``, or from columns ``[Hq, tokens]``."""
        slots, axis = self.axis.slots(CHUNK), axis_of(layer)
        if slots:
            at_response_kernel[(slots,)](
                self.out,
                x,
                poison,
                self.rank,
                self.order,
                self.facts,
                self.status,
                rows,
                *self.axis,
                axis.cu_seqlens,
                axis.width,
                self.axis.total,
                tokens(layer.head_mask),
                layer.query.shape[1],
                MEAN=x.ndim == 2,
                SHIFT=self.shift,
                H=MEAN_HEADS,
                CHUNK=CHUNK,
                **COMPILER,
                **registers(128),
            )


def column_credit_raw(
    layer: LayerInputs, response: ResponseInputs, *, variant: Literal["mean", "last"], shift: Literal[0, 1]
) -> tuple[Tensor, Tensor]:
    """What the queries of a response's unmasked tokens give each of them, and each row's status.

    Args:
        layer: as ``attnshape.AttentionInputs``, with every query; any strides.
        response: its tokens, with ``start`` or ``index``.
        variant: the mean over a token and those after it, or what the last one gives.
        shift: 1 writes what a token gets at the one after it; the last one then asks nothing.

    Returns:
        ``[B, R]`` (or ``[M]``) float32, 0 at masked tokens, NaN in a row with an index out of range; and
        int32 ``[B]``, ``OUT_OF_RANGE`` for such a row.
    """
    entries = ResponseEntries(response, 0, shift)
    asked = torch.empty_like(entries.status)
    rows = entries.rows(layer, asked=asked)
    if variant == "last":
        # The same dataclass, whichever it is.
        at_asked: LayerInputs = dataclasses.replace(layer, query_position=asked)  # type: ignore[type-var]
        entries.read(layer, rows, attention_row([at_asked]).flatten())
    else:
        axis, order = entries.axis, entries.order
        normalizer, _ = row_normalizers(layer, rows, axis, order)
        entries.read(layer, rows, head_columns(layer, rows, axis, normalizer, order, ordered=entries.ordered))
    return entries.out, entries.status


def row_normalizers(
    layer: LayerInputs,
    rows: Tensor,
    axis: Axis,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per head and query, ``[Hq, entries]``: log2 of the softmax's denominator; the sum of ``norms``."""
    heads, tiles = layer.query.shape[1], _tiles(layer, 128 if layer.causal else 144)
    normalizer = torch.empty(heads, axis.total, dtype=torch.float32, device=layer.key.device)
    moved = None if norms is None else torch.empty_like(normalizer)
    slots = axis.slots(tiles["BLOCK"])
    operands, layout = _operands(layer)
    *norm_strides, stride = per_head(norms, axis_of(layer))
    if slots:
        normalizer_kernel[(slots * heads,)](
            normalizer,
            moved,
            *operands,
            rows,
            order,
            weight,
            *per_position(layer.attention_mask),
            *norm_strides,
            *per_head(layer.lse, axis_of(layer)),
            contiguous(layer.sinks),
            tokens(layer.head_mask),
            axis.cu_seqlens,
            axis.batch,
            ceil_div(axis.width, tiles["BLOCK"]),
            axis.total,
            heads,
            float(layer.scaling),
            None if layer.softcap is None else float(layer.softcap),
            layer.sliding_window,
            STRIDE_WT=stride,
            CAUSAL=layer.causal,
            **layout,
            **tiles,
        )
    return normalizer, moved


def head_columns(
    layer: LayerInputs,
    rows: Tensor,
    axis: Axis,
    normalizer: Tensor,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    ordered: bool = True,
) -> Tensor:
    """Per head, what every entry gets from the queries from it on, ``[Hq, entries]``."""
    heads, tiles = layer.query.shape[1], _tiles(layer, None if weight is None else 255, order)
    columns = torch.empty_like(normalizer)
    slots = axis.slots(tiles["BLOCK"])
    operands, layout = _operands(layer)
    if slots:
        column_kernel[(slots * heads,)](
            columns,
            normalizer,
            *operands,
            rows,
            order,
            weight,
            *per_position(layer.attention_mask),
            tokens(layer.head_mask),
            axis.cu_seqlens,
            axis.batch,
            ceil_div(axis.width, tiles["BLOCK"]),
            axis.total,
            heads,
            float(layer.scaling),
            None if layer.softcap is None else float(layer.softcap),
            layer.sliding_window,
            ORDERED=ordered,
            LATER=weight is None or layer.causal,
            CAUSAL=layer.causal,
            **layout,
            **tiles,
        )
    return columns


def _operands(layer: LayerInputs) -> tuple[list[Any], dict[str, Any]]:
    """Queries and keys with their strides, and what the kernels are specialised on."""
    axis = axis_of(layer)
    query, *query_strides = per_head(layer.query, axis)
    key, *key_strides = per_head(layer.key, axis)
    query_unit, key_unit = stride_unit(*query_strides), stride_unit(*key_strides)
    operands = [query, *(x // query_unit for x in query_strides), key, *(x // key_unit for x in key_strides)]
    return operands, {
        "G": query.shape[1] // key.shape[1],
        "D": key.shape[-1],
        "STRIDE_QD": query.stride(-1),
        "STRIDE_KD": key.stride(-1),
        "QUERY_UNIT": query_unit,
        "KEY_UNIT": key_unit,
        "UPCAST": interpreted(),
    }


def _tiles(layer: LayerInputs, most: int | None, ordered_by: Tensor | None = None) -> dict[str, Any]:
    """Rows a program holds and rows it streams, in parts of the head width, and how it is compiled.

    E.g. 128 rows of width 128 in bfloat16 (32 KB) held, and 3 tiles of 64 on their way (48 KB). ``most``
    registers, or as ptxas chooses: two programs share a multiprocessor where nothing spills.
    """
    width = max(16, padded(layer.key.shape[-1]))
    if layer.key.element_size() == 4:
        # Parts on their way in registers, where loads are not aligned, spill.
        tiles = {"BLOCK": 64, "STEP": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}
        return COMPILER | tiles | registers(168)
    # Positions that are read first take a stage for each one that their rows are ahead.
    stages = 3 if ordered_by is None else 5
    if width > 128:
        tiles = {"BLOCK": 64, "STEP": 32, "BLOCK_D": width, "num_warps": 4, "num_stages": stages}
        return COMPILER | tiles | registers(255)
    tiles = {"BLOCK": 128, "STEP": 64, "BLOCK_D": width, "num_warps": 8, "num_stages": stages}
    if layer.softcap:
        most = 255
    return COMPILER | tiles | ({} if most is None else registers(most))


def axis_of(layer: LayerInputs) -> Axis:
    cu = layer.cu_seqlens
    if cu is None:
        return Axis(None, layer.key.shape[0], layer.key.shape[2])
    return Axis(cu, cu.shape[0] - 1, layer.key.shape[0])


def per_position(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """``[B, S]``, or ``[N]``, and its strides per row and position."""
    if x is None:
        return None, 0, 0
    return x.view(torch.uint8) if x.dtype == torch.bool else x, row_stride(x), x.stride(-1)


def per_head(x: Tensor | None, axis: Axis) -> tuple[Any, int, int, int]:
    """``[B, H, S, ...]``, or ``[N, H, ...]``, and its strides per row, head and position."""
    if x is None:
        return None, 0, 0, 0
    if axis.cu_seqlens is None:
        return x, x.stride(0), x.stride(1), x.stride(2)
    return x, 0, x.stride(1), x.stride(0)
