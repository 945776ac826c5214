"""Kernels that read queries and keys: one row of attention per sequence, and all that follows from it."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=union-attr

from __future__ import annotations

import triton
import triton.language as tl

from csrc_triton.device.attention import (
    Attended,
    attend,
    fold_partials,
    heads_of,
    leave_group,
    slots_of_row,
    store_means,
)
from csrc_triton.device.handoff import arrive
from csrc_triton.device.layout import (
    attended_range,
    bounds_of_row,
    is_live,
    keys_of_row,
    place_of_row,
    position_of,
    row_of_slot,
)
from csrc_triton.device.rewards import Job, fetch_tokens, row_at
from csrc_triton.device.sweep import fill_gaps, shape_row


@triton.jit
def attend_kernel(
    axis, layer, left, response, inputs, settings, out, grid,
    product: tl.constexpr, mean: tl.constexpr, rules: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """A split of one row's keys for one key head. The last program of a row finishes it.

    ``FINISH``: ``scores`` are left to another launch; their ``mean`` is the result; or it is credit, and the
    row is to ``shape``.
    """
    if rules.DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0)
    if (FINISH != "scores") and (response.p_cu is not None):  # noqa: SIM102
        if i_p == grid.n_tasks + grid.n_leaders:
            fill_gaps(response, out, rules.CHUNK)
            return

    i_b, i_h, i_part = split_of_program(i_p, axis, layer, grid, mean.KEYS)
    keys = keys_of_row(axis, i_b, mean.CAUSAL, mean.KEYS)
    attended = Attended(axis, layer, left, keys, slots_of_row(axis, left, response, keys, i_b, mean))
    leading = (i_p >= grid.n_tasks) & (keys.whole == 0)
    first = leading | (keys.whole & (i_part == 0) & (i_h == 0))
    if (inputs.p_row_status is not None) and (FINISH != "shape") and not mean.ADD:  # noqa: SIM102
        # The first layer: no row has been found out of range.
        if first:
            tl.store(inputs.p_row_status + keys.row, 0)
    if (FINISH == "shape") and rules.PTX:  # noqa: SIM102
        if first:
            fetch_tokens(response, inputs, place_of_row(response, i_b))

    last = leading
    n_splits = tl.maximum((keys.n_chunks + grid.split - 1) // grid.split, 1)
    if keys.whole & (i_part >= 0) & (i_part < n_splits):
        last = read_split(
            attended, response, grid, i_b, i_h, i_part, n_splits, product, mean, rules.CHUNK, FINISH
        )
    if FINISH != "scores":  # noqa: SIM102
        if last:
            place = place_of_row(response, i_b)
            if FINISH == "mean":
                stop = (place.length + rules.CHUNK - 1) // rules.CHUNK
                p_bad = inputs.p_row_status
                store_means(
                    attended, response, place, out.p_credit, p_bad, 0, stop, mean, "groups", rules.CHUNK
                )
            else:
                row = row_at(place, inputs, settings)
                shape_row(row, attended, Job(response, inputs, out), mean, rules, "groups")


@triton.jit
def read_split(
    attended, response, grid, i_b, i_h, i_part, n_splits,
    product: tl.constexpr, mean: tl.constexpr, CHUNK: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Reads a split of a key head's keys, and folds them if it is the last; whether the row is done then."""
    layer = attended.layer
    heads = heads_of(layer, i_h, product)
    begin, stop = chunks_of_split(attended, heads, i_part, grid.split, product.ONLY_KEPT)
    attend(attended, heads, begin, stop, product, mean.KEYS)
    p_arrived = grid.p_counters + attended.keys.row * (layer.kv_heads + 1)
    before = n_splits - 1
    if n_splits > 1:
        before = arrive(p_arrived + i_h)
    else:
        tl.debug_barrier()
    last = before == n_splits - 1
    if last:
        tl.store(p_arrived + i_h, 0)
        fold_partials(attended, heads, mean.KEYS, product.FOLD)
        if FINISH != "scores":
            tl.debug_barrier()
            leave_group(attended, response, place_of_row(response, i_b), i_h, mean, 2 * CHUNK)
            last = arrive(p_arrived + layer.kv_heads) == layer.kv_heads - 1
            if last:
                tl.store(p_arrived + layer.kv_heads, 0)
    return last


@triton.jit
def split_of_program(i_p, axis, layer, grid, KEYS: tl.constexpr):
    """Row, key head and split of a program; a packed row that is not sound has none, but a leader."""
    if axis.p_cu is None:
        i_part = i_p % grid.splits_per_row
        i_h = i_p // grid.splits_per_row % layer.kv_heads
        i_b = i_p // (grid.splits_per_row * layer.kv_heads)
    else:
        i_h = i_p % layer.kv_heads
        i_b, i_part = row_of_slot(i_p // layer.kv_heads, axis.p_cu, axis.n_rows, 0, KEYS * grid.split)
    leading = i_p >= grid.n_tasks
    i_b = tl.where(leading, i_p - grid.n_tasks, i_b).to(tl.int32)
    return i_b, i_h, tl.where(leading, -1, i_part).to(tl.int32)


@triton.jit
def chunks_of_split(attended, heads, i_part, split, ONLY_KEPT: tl.constexpr):
    """The first chunk of keys of a split and the one after its last."""
    slots = attended.slots
    begin = i_part * split
    stop = tl.minimum(begin + split, attended.keys.n_chunks)
    if ONLY_KEPT:
        begin = tl.maximum(begin, slots.kept)
        stop = tl.minimum(stop, slots.kept + slots.n_kept)
    if attended.layer.p_head_mask is not None:
        stop = tl.where(tl.max(heads.weight) == 0.0, begin, stop)
    return begin, stop


@triton.jit
def means_kernel(axis, layer, left, response, inputs, out, grid, mean: tl.constexpr, rules: tl.constexpr):
    """A chunk of a row's tokens: the mean over heads of the scores that another launch left."""
    if rules.DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    if response.p_cu is not None:  # noqa: SIM102
        if i_p == grid.n_tasks + grid.n_leaders:
            fill_gaps(response, out, rules.CHUNK)
            return
    i_b, i_c = row_of_slot(i_p, response.p_cu, response.n_rows, grid.chunks_per_row, rules.CHUNK)
    leading = i_p >= grid.n_tasks
    i_b = tl.where(leading, i_p - grid.n_tasks, i_b).to(tl.int32)
    keys = keys_of_row(axis, i_b, mean.CAUSAL, mean.KEYS)
    attended = Attended(axis, layer, left, keys, slots_of_row(axis, left, response, keys, i_b, mean))
    place = place_of_row(response, i_b)
    # A chunk of a row that owns its tokens; or all of one that does not, by its leader.
    n_chunks = (place.length + rules.CHUNK - 1) // rules.CHUNK
    owned = (leading == 0) & place.whole & (i_c >= 0) & (i_c < n_chunks)
    begin = tl.where(owned, i_c, 0).to(tl.int32)
    lost = leading & (place.whole == 0)
    stop = tl.where(owned, begin + 1, tl.where(lost, n_chunks, 0))
    p_bad = inputs.p_row_status
    store_means(attended, response, place, out.p_credit, p_bad, begin, stop, mean, "scores", rules.CHUNK)


@triton.jit
def prepare_kernel(axis, response, p_start, p_position, LAST_RESPONSE: tl.constexpr, SCAN: tl.constexpr):
    """First visible key and position of the query of each row, from a mask; out of range where they are."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    bounds = bounds_of_row(axis.p_cu, axis.n_rows, axis.width, i_b)
    length = tl.where(bounds.whole, bounds.length, 0)
    start = row * 0
    if axis.p_start is not None:
        start = tl.load(axis.p_start + row).to(tl.int64)
    position = length - 1
    if axis.p_mask is not None:
        inside = (start >= 0) & (start <= length)
        scanned = tl.where(inside, start, length)
        mask_offset = row * axis.stride_mb + bounds.lo * axis.stride_mt
        lowest, last = attended_range(axis.p_mask, mask_offset, axis.stride_mt, scanned, length, SCAN)
        start = tl.where(inside, lowest, start)
        position = tl.maximum(last, 0)
    if axis.p_position is not None:
        position = tl.load(axis.p_position + row).to(tl.int64)
    if LAST_RESPONSE:
        place = place_of_row(response, i_b)
        last_j = place.length * 0 - 1
        for j0 in range(0, place.length, SCAN):
            j = j0 + tl.arange(0, SCAN)
            last_j = tl.maximum(last_j, tl.max(tl.where(is_live(response, place, j), j, -1)))
        position = tl.where(last_j >= 0, position_of(response, place, last_j, last_j >= 0), -1)
    tl.store(p_start + row, start)
    tl.store(p_position + row, position)
