"""Rollout: what the positions of a sequence carry down, layer by layer."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.columns import entries_of_row, first_key, sum_heads
from csrc_triton.device.layout import is_visible, row_of_slot
from csrc_triton.device.math import is_finite
from csrc_triton.launch import kernel


class Positions(NamedTuple):
    """CHUNK positions of a row."""

    entries: Any
    row: Any
    t: Any  # [N]
    inside: Any  # [N]
    listed: Any  # [N] whether one is an entry
    at: Any  # [N] among those of all rows


@triton.jit
def positions_of_program(p_rows, p_cu, n_rows, keys_width, CHUNK: tl.constexpr):
    i_b, i_c = row_of_slot(tl.program_id(0), p_cu, n_rows, (keys_width + CHUNK - 1) // CHUNK, CHUNK)
    row = i_b.to(tl.int64)
    entries = entries_of_row(p_rows, row)
    t = i_c.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = (t >= 0) & (t < entries.end)
    listed = inside & (t >= entries.first) & (t < entries.first + entries.count)
    return Positions(entries, row, t, inside, listed, first_key(entries, row, p_cu, keys_width) + t)


@kernel()
def share_kernel(
    p_share,  # [keys] out
    p_poison,  # [B] out: whether a share is not finite
    p_carried,  # [keys]
    p_moved,  # [Hq, total]
    p_residual,
    stride_xb,
    stride_xt,
    p_rows,
    p_cu,
    n_rows,
    keys_width,
    total,
    p_head_mask,
    heads,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What each position carries over the length of all that was moved to it."""
    here = positions_of_program(p_rows, p_cu, n_rows, keys_width, CHUNK)
    carried = tl.load(p_carried + here.at, mask=here.inside, other=0.0)
    asked = here.inside & (carried != 0.0)
    length = sum_heads(
        p_moved, total, here.at, asked & here.listed, None, 0, 0, here.t, p_head_mask, heads, False, H
    )
    offset = here.row * stride_xb + (here.entries.bos + here.t) * stride_xt
    length += tl.load(p_residual + offset, mask=asked, other=0.0).to(tl.float32)
    share = tl.where(asked, carried / tl.where(asked, length, 1.0), 0.0)
    tl.store(p_share + here.at, share, mask=here.inside)
    if tl.max((is_finite(share) == 0).to(tl.int32)) != 0:
        tl.store(p_poison + here.row, 1)


@kernel()
def carry_kernel(
    p_below,  # [keys] out
    p_poison,  # [B] out: whether what is carried on is not finite; None below the lowest layer
    p_above,  # [keys]: what each position carries, or its share of what it is made of
    p_columns,  # [Hq, total]
    p_key_weight,
    stride_wb,
    stride_wh,
    stride_wt,
    p_residual,
    stride_xb,
    stride_xt,
    p_rows,
    p_mask,
    stride_mb,
    stride_mt,
    p_cu,
    n_rows,
    keys_width,
    total,
    p_head_mask,
    heads,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One layer down: what each position gets from the later ones and keeps of its own."""
    here = positions_of_program(p_rows, p_cu, n_rows, keys_width, CHUNK)
    above = tl.load(p_above + here.at, mask=here.inside, other=0.0)
    bos = here.entries.bos
    mask_offset = here.row * stride_mb + bos * stride_mt
    attended = here.listed & is_visible(
        p_mask, mask_offset, stride_mt, here.t, here.entries.first, here.entries.end
    )
    if p_key_weight is None:
        below = sum_heads(
            p_columns, total, here.at, attended, None, 0, 0, here.t, p_head_mask, heads, True, H
        )
        below = (below + above) * 0.5
    else:
        p_row_weight = p_key_weight + here.row * stride_wb + bos * stride_wt
        below = sum_heads(
            p_columns,
            total,
            here.at,
            attended,
            p_row_weight,
            stride_wh,
            stride_wt,
            here.t,
            p_head_mask,
            heads,
            False,
            H,
        )
        offset = here.row * stride_xb + (bos + here.t) * stride_xt
        kept = tl.load(p_residual + offset, mask=here.inside & (above != 0.0), other=0.0).to(tl.float32)
        below += tl.where(above == 0.0, 0.0, above * kept)
    tl.store(p_below + here.at, below, mask=here.inside)
    if p_poison is not None:  # noqa: SIM102
        if tl.max((here.inside & (is_finite(below) == 0)).to(tl.int32)) != 0:
            tl.store(p_poison + here.row, 1)
