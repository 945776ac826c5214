"""Column sums of attention over many queries: credit from a response's own attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from csrc_triton.arguments import Axis, Entries, Found, Layer, PerHead, Response, Tiles, Weights
from csrc_triton.columns import (
    at_response_kernel,
    column_kernel,
    entries_kernel,
    normalizer_kernel,
    response_kernel,
)
from csrc_triton.host.attention import (
    SCAN,
    LayerInputs,
    ResponseInputs,
    attention_row,
    key_axis,
    operands_of,
    response_of,
)
from csrc_triton.launch import COMPILER, Launcher, ceil_div, padded, registers, tokens

CHUNK = 256
"""Tokens a program takes where nothing is multiplied."""


MEAN_HEADS = 8
"""Heads whose columns are added together."""

RESPONSE = Launcher(response_kernel)
ENTRIES = Launcher(entries_kernel)
NORMALIZER = Launcher(normalizer_kernel, "layer.p_query", "layer.p_key")
COLUMN = Launcher(column_kernel, "layer.p_query", "layer.p_key")
AT_RESPONSE = Launcher(at_response_kernel)


class Tokens(NamedTuple):
    """A token axis: of the keys, or of the response tokens."""

    cu_seqlens: Tensor | None
    batch: int
    width: int  # per row, or in all when packed

    @staticmethod
    def of(x: Axis | Response) -> Tokens:
        return Tokens(x.p_cu, x.n_rows, x.width)

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

    def __init__(self, response: ResponseInputs, lowest: int, shift: int) -> None:
        mask = response.mask
        self.response = response_of(response)
        self.axis = Tokens.of(self.response)
        self.ordered, self.lowest, self.shift = response.index is None, lowest, shift
        batch, device = self.axis.batch, mask.device
        # Packed tokens may belong to no row.
        new = torch.empty if response.cu_seqlens is None else torch.zeros
        rank, order = torch.empty(2, self.axis.total, dtype=torch.int32, device=device)
        self.found = Found(
            torch.empty(batch, 5, dtype=torch.int64, device=device),
            torch.empty(batch, dtype=torch.int32, device=device),
            rank,
            order,
            new(mask.shape, dtype=torch.float32, device=device),
        )
        if batch:
            RESPONSE(batch, COMPILER, response=self.response, found=self.found, SHIFT=shift, SCAN=SCAN)

    def rows(
        self,
        layer: LayerInputs,
        asked: Tensor | None = None,
        top: Tensor | None = None,
        carried: Tensor | None = None,
    ) -> Tensor:
        """The entries of each row: its unmasked tokens, or with ``top`` its keys; int64 ``[B, 7]``."""
        axis = key_axis(layer)
        rows = torch.empty(axis.n_rows, 7, dtype=torch.int64, device=layer.key.device)
        if axis.n_rows:
            ENTRIES(
                axis.n_rows,
                COMPILER,
                axis=axis._replace(window=None),
                response=self.response,
                found=self.found,
                p_rows=rows,
                p_asked=asked,
                p_top=top,
                p_carried=carried,
                CAUSAL=layer.causal,
                LAST_RESPONSE=layer.query_position == "last_response",
                LOWEST=self.lowest,
                SHIFT=self.shift,
                SCAN=SCAN,
            )
        return rows

    def read(self, layer: LayerInputs, rows: Tensor, x: Tensor, poison: Tensor | None = None) -> None:
        """Fills the result: what lies at the keys, ``[keys]``, or the mean of columns ``[Hq, tokens]``."""
        slots = self.axis.slots(CHUNK)
        if slots:
            AT_RESPONSE(
                slots,
                COMPILER | registers(128),
                axis=key_axis(layer),
                response=self.response,
                found=self.found,
                per_head=per_head(layer, x) if x.ndim == 2 else None,
                p_x=None if x.ndim == 2 else x,
                p_poison=poison,
                p_rows=rows,
                MEAN=x.ndim == 2,
                SHIFT=self.shift,
                H=MEAN_HEADS,
                CHUNK=CHUNK,
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
    asked = torch.empty_like(entries.found.p_status)
    rows = entries.rows(layer, asked=asked)
    if variant == "last":
        # The same dataclass, whichever it is.
        at_asked: LayerInputs = dataclasses.replace(layer, query_position=asked)  # type: ignore[type-var]
        entries.read(layer, rows, attention_row([at_asked]).flatten())
    else:
        axis, order = entries.axis, entries.found.p_order
        normalizer, _ = row_normalizers(layer, rows, axis, order)
        entries.read(layer, rows, head_columns(layer, rows, axis, normalizer, order, ordered=entries.ordered))
    return entries.found.p_out, entries.found.p_status


def row_normalizers(
    layer: LayerInputs,
    rows: Tensor,
    axis: Tokens,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per head and query, ``[Hq, entries]``: log2 of the softmax's denominator; the sum of ``norms``."""
    normalizer = torch.empty(layer.query.shape[1], axis.total, dtype=torch.float32, device=layer.key.device)
    moved = None if norms is None else torch.empty_like(normalizer)
    weights = key_weights(norms, layer)
    _launch(
        NORMALIZER,
        layer,
        axis,
        (rows, order, weight),
        _tiles(layer),
        p_normalizer=normalizer,
        p_moved=moved,
        weights=weights,
        STRIDE_WT=0 if weights is None else weights.stride_wt,
    )
    return normalizer, moved


def head_columns(
    layer: LayerInputs,
    rows: Tensor,
    axis: Tokens,
    normalizer: Tensor,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    ordered: bool = True,
) -> Tensor:
    """Per head, what every entry gets from the queries from it on, ``[Hq, entries]``."""
    columns = torch.empty_like(normalizer)
    _launch(
        COLUMN,
        layer,
        axis,
        (rows, order, weight),
        _tiles(layer, order),
        p_columns=columns,
        p_normalizer=normalizer,
        ORDERED=ordered,
        LATER=weight is None or layer.causal,
    )
    return columns


def _launch(
    launcher: Launcher,
    layer: LayerInputs,
    axis: Tokens,
    entries: tuple[Tensor, Tensor | None, Tensor | None],
    tiled: tuple[Layer, Tiles, dict[str, Any]],
    **arguments: Any,
) -> None:
    """A program for each head and BLOCK entries that may be some row's."""
    operands, tiles, options = tiled
    programs = axis.slots(tiles.BLOCK) * layer.query.shape[1]
    if programs:
        slots_per_row = ceil_div(axis.width, tiles.BLOCK)
        launcher(
            programs,
            options,
            axis=key_axis(layer),
            layer=operands,
            entries=Entries(*entries, axis.cu_seqlens, axis.batch, slots_per_row, axis.total),
            tiles=tiles,
            **arguments,
        )


def _tiles(layer: LayerInputs, ordered_by: Tensor | None = None) -> tuple[Layer, Tiles, dict[str, Any]]:
    """Rows a program holds and rows it streams, in parts of the head width, and how it is compiled.

    E.g. 128 rows of width 128 in bfloat16 (32 KB) held, and 3 tiles of 64 on their way (48 KB): two programs
    share a multiprocessor. Eight warps are slower, and have registers for more options.
    """
    operands, product = operands_of(layer)
    width = max(16, padded(layer.key.shape[-1]))
    # Positions that are read first take a stage for each one that their rows are ahead.
    stages, most = 3 if ordered_by is None else 5, 255
    warps = 4 if layer.causal and layer.softcap is None else 8
    if layer.key.element_size() == 4:
        # Parts on their way in registers, where loads are not aligned, spill.
        block, step, part, stages, warps, most = 64, 64, 16, 1, 8, 168
    elif width > 128:
        block, step, part, warps = 64, 32, width, 4
    else:
        block, step, part = 128, 64, width
    tiles = Tiles(
        layer.causal,
        product.G,
        product.D,
        part,
        product.STRIDE_QD,
        product.STRIDE_KD,
        product.QUERY_UNIT,
        product.KEY_UNIT,
        product.UPCAST,
        block,
        step,
    )
    options = COMPILER | {"num_warps": warps, "num_stages": stages} | registers(most)
    return operands, tiles, options


def per_head(layer: LayerInputs, x: Tensor) -> PerHead:
    """A number per head and entry, ``[Hq, total]``."""
    return PerHead(x, x.shape[1], x.shape[0], tokens(layer.head_mask))


def key_weights(x: Tensor | None, layer: LayerInputs) -> Weights | None:
    """Weights of keys and heads, ``[B, Hq, S]`` or ``[N, Hq]``."""
    if x is None:
        return None
    if layer.cu_seqlens is None:
        return Weights(x, *x.stride())
    return Weights(x, 0, x.stride(1), x.stride(0))
