"""Rollout: what the positions of a sequence carry down, layer by layer."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from csrc_triton.columns import entries_of_row, first_key, is_visible_key, sum_heads
from csrc_triton.device.layout import row_of_slot, tokens_of_chunk
from csrc_triton.device.math import is_finite


class Positions(NamedTuple):
    """CHUNK positions of a row."""

    own: Any  # the row's entries
    row: Any
    t: Any  # [N]
    inside: Any  # [N]
    listed: Any  # [N] whether one is an entry
    at: Any  # [N] among those of all rows


@triton.jit
def positions_of_program(axis, p_rows, CHUNK: tl.constexpr):
    slots_per_row = (axis.width + CHUNK - 1) // CHUNK
    i_b, i_c = row_of_slot(tl.program_id(0), axis.p_cu, axis.n_rows, slots_per_row, CHUNK)
    row = i_b.to(tl.int64)
    own = entries_of_row(p_rows, row)
    t = tokens_of_chunk(i_c.to(tl.int64), CHUNK)
    inside = (t >= 0) & (t < own.end)
    listed = inside & (t >= own.first) & (t < own.first + own.count)
    return Positions(own, row, t, inside, listed, first_key(own, row, axis) + t)


@triton.jit
def residual_at(residual, here, read):
    """What positions weigh themselves, 0 where not to be ``read``."""
    offset = here.row * residual.stride_xb + (here.own.bos + here.t) * residual.stride_xt
    return tl.load(residual.p_norm + offset, mask=read, other=0.0).to(tl.float32)


@triton.jit
def poison_row(p_poison, row, x, inside):
    """Marks a row in which ``x`` is not finite."""
    if tl.max((inside & (is_finite(x) == 0)).to(tl.int32)) != 0:
        tl.store(p_poison + row, 1)


@triton.jit
def share_kernel(
    p_share,  # [keys] out
    p_poison,  # [B] out: whether a share is not finite
    p_carried,  # [keys]
    axis,
    p_rows,
    moved,  # per head
    residual,
    H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What each position carries over the length of all that was moved to it."""
    here = positions_of_program(axis, p_rows, CHUNK)
    carried = tl.load(p_carried + here.at, mask=here.inside, other=0.0)
    asked = here.inside & (carried != 0.0)
    length = sum_heads(moved, here.at, asked & here.listed, None, here.row, here.t, False, H)
    length += residual_at(residual, here, asked)
    share = tl.where(asked, carried / tl.where(asked, length, 1.0), 0.0)
    tl.store(p_share + here.at, share, mask=here.inside)
    poison_row(p_poison, here.row, share, here.inside)


@triton.jit
def carry_kernel(
    p_below,  # [keys] out
    p_poison,  # [B] out: whether what is carried on is not finite; None below the lowest layer
    p_above,  # [keys]: what each position carries, or its share of what it is made of
    axis, p_rows,
    columns,  # per head
    weights,  # of keys and heads, or None
    residual,
    H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One layer down: what each position gets from the later ones and keeps of its own."""
    here = positions_of_program(axis, p_rows, CHUNK)
    above = tl.load(p_above + here.at, mask=here.inside, other=0.0)
    attended = here.listed & is_visible_key(axis, here.own, here.row, here.t, here.own.end)
    at_key = here.own.bos + here.t
    if weights is None:
        below = sum_heads(columns, here.at, attended, None, here.row, at_key, True, H)
        below = (below + above) * 0.5
    else:
        below = sum_heads(columns, here.at, attended, weights, here.row, at_key, False, H)
        kept = residual_at(residual, here, here.inside & (above != 0.0))
        below += tl.where(above == 0.0, 0.0, above * kept)
    tl.store(p_below + here.at, below, mask=here.inside)
    if p_poison is not None:
        poison_row(p_poison, here.row, below, here.inside)
