"""Kernels that read queries and keys: one row of attention per sequence, and all that follows from it."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=union-attr

from __future__ import annotations

from typing import Any, NamedTuple

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
    slot_base,
)
from csrc_triton.device.rewards import Job, fetch_tokens, row_at
from csrc_triton.device.sweep import fill_gaps, shape_row


class Work(NamedTuple):
    """What the programs of a launch share."""

    axis: Any
    layer: Any
    left: Any
    response: Any
    inputs: Any
    settings: Any
    out: Any
    grid: Any


class Task(NamedTuple):
    """Chunks of one key head's keys of a row, that a program reads one after the other."""

    i_b: Any
    i_h: Any
    begin: Any  # the first, counted from the row's first visible key; behind all of them: none is to be read
    stop: Any
    base: Any  # the key head's first chunk among those of all rows
    opens: Any  # whether it is the row's first
    leads: Any  # whether there is none, but a packed row whose bounds may not be sound
    next: Any  # the chunk that the program goes on with, among those of all rows


@triton.jit
def attend_kernel(
    axis, layer, left, response, inputs, settings, out, grid,
    product: tl.constexpr, mean: tl.constexpr, rules: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Some chunks of keys, which lie row after row. The last program of a row finishes it.

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

    work = Work(axis, layer, left, response, inputs, settings, out, grid)
    leads = i_p >= grid.n_tasks
    at = tl.where(leads, i_p - grid.n_tasks, i_p * grid.split)
    stop = at + tl.where(leads, 1, grid.split)
    if grid.step is None:
        while at < stop:
            task = task_at(at, stop, leads, work, mean.KEYS)
            do_task(task, work, product, mean, rules, FINISH)
            at = task.next
    else:
        do_task(task_at(at, stop, leads, work, mean.KEYS), work, product, mean, rules, FINISH)


@triton.jit
def task_at(at, stop, leads, work, KEYS: tl.constexpr):
    """What a program reads at once from chunk ``at`` on, among those of all rows.

    A row has a slot or some, and a slot ``step`` chunks of each key head, key head after key head.
    """
    axis = work.axis
    kv_heads = work.layer.kv_heads
    step = 1
    if work.grid.step is not None:
        step = work.grid.step
    slots = work.grid.slots_per_row
    width = kv_heads * step  # chunks of a slot
    i_b, _ = row_of_slot(at // width, axis.p_cu, axis.n_rows, slots, KEYS * step)
    i_b = tl.where(leads, at, tl.minimum(i_b, axis.n_rows - 1)).to(tl.int32)
    begin = slot_base(axis.p_cu, i_b, slots, 1, KEYS * step) * width
    end = slot_base(axis.p_cu, i_b + 1, slots, 1, KEYS * step) * width
    # Packed, chunks before the first row and behind the last are nobody's.
    owned = (leads == 0) & (at >= begin) & (at < end)
    base = tl.where(owned, begin, 0).to(tl.int32)
    count = tl.where(owned, end - begin, kv_heads).to(tl.int32) // kv_heads
    i_h = (at - base) // count
    base += i_h * count
    following = tl.where(owned, base + count, tl.where(at < begin, begin, stop))
    following = tl.minimum(following, stop).to(tl.int32)
    first = tl.where(owned, at - base, 1 << 30)
    return Task(i_b, i_h, first, following - base, base, owned & (at == begin), leads, following)


@triton.jit
def do_task(
    task, work, product: tl.constexpr, mean: tl.constexpr, rules: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Reads a task's keys, and finishes the row if they are the last."""
    axis = work.axis
    response = work.response
    inputs = work.inputs
    keys = keys_of_row(axis, task.i_b, mean.CAUSAL, mean.KEYS)
    slots = slots_of_row(axis, work.left, response, keys, task.i_b, mean)
    attended = Attended(axis, work.layer, work.left, keys, slots)
    last = task.leads & (keys.whole == 0)
    first = last | (keys.whole & task.opens)
    if (inputs.p_row_status is not None) and (FINISH != "shape") and not mean.ADD:  # noqa: SIM102
        # The first layer: no row has been found out of range.
        if first:
            tl.store(inputs.p_row_status + keys.row, 0)
    if (FINISH == "shape") and rules.PTX:  # noqa: SIM102
        if first:
            fetch_tokens(response, inputs, place_of_row(response, task.i_b))

    if keys.whole & (task.begin < tl.maximum(keys.n_chunks, 1)):
        last = read_task(task, attended, work, product, mean, rules.CHUNK, FINISH)
    if FINISH != "scores":  # noqa: SIM102
        if last:
            place = place_of_row(response, task.i_b)
            if FINISH == "mean":
                stop = (place.length + rules.CHUNK - 1) // rules.CHUNK
                p_out = work.out.p_credit
                p_bad = inputs.p_row_status
                store_means(attended, response, place, p_out, p_bad, 0, stop, mean, "groups", rules.CHUNK)
            else:
                row = row_at(place, inputs, work.settings)
                shape_row(row, attended, Job(response, inputs, work.out), mean, rules, "groups")


@triton.jit
def read_task(
    task, attended, work,
    product: tl.constexpr, mean: tl.constexpr, CHUNK: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Reads a task's keys, and folds the key head's if they are its last; whether the row is done then."""
    layer = work.layer
    heads = heads_of(layer, task.i_h, product)
    begin, stop = chunks_to_read(attended, heads, task.begin, task.stop, product.ONLY_KEPT)
    attend(attended, heads, begin, stop, product, mean.KEYS)
    final = task.base + tl.maximum(attended.keys.n_chunks, 1) - 1
    others = final // work.grid.split - task.base // work.grid.split
    p_arrived = work.grid.p_counters + attended.keys.row * (layer.kv_heads + 1)
    before = others
    if others > 0:
        before = arrive(p_arrived + task.i_h)
    else:
        tl.debug_barrier()
    last = before == others
    if last:
        tl.store(p_arrived + task.i_h, 0)
        fold_partials(attended, heads, mean.KEYS, product.FOLD)
        if FINISH != "scores":
            tl.debug_barrier()
            place = place_of_row(work.response, task.i_b)
            leave_group(attended, work.response, place, task.i_h, mean, 2 * CHUNK)
            last = arrive(p_arrived + layer.kv_heads) == layer.kv_heads - 1
            if last:
                tl.store(p_arrived + layer.kv_heads, 0)
    return last


@triton.jit
def chunks_to_read(attended, heads, begin, stop, ONLY_KEPT: tl.constexpr):
    """Of a task's chunks, those that there are and are asked for."""
    slots = attended.slots
    stop = tl.minimum(stop, attended.keys.n_chunks)
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
