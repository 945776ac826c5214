"""Kernels from credit to rewards, advantages and returns."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=union-attr

from __future__ import annotations

import triton
import triton.language as tl

from csrc_triton.device.advantages import Board
from csrc_triton.device.layout import place_of_row, row_of_slot, slot_base
from csrc_triton.device.rewards import Job, row_at
from csrc_triton.device.sweep import fill_gaps, shape_chunk, shape_row, share_facts


@triton.jit
def rows_kernel(response, inputs, settings, out, rules: tl.constexpr, SOURCE: tl.constexpr):
    """A whole row. ``SOURCE`` of its credit: ``weights``, or None where nothing is read."""
    if rules.DEPENDENT:
        tl.extra.cuda.gdc_wait()
    i_b = tl.program_id(0)
    if response.p_cu is not None:  # noqa: SIM102
        if i_b == response.n_rows:
            fill_gaps(response, out, rules.CHUNK)
            return
    row = row_at(place_of_row(response, i_b), inputs, settings)
    shape_row(row, None, Job(response, inputs, out), None, rules, SOURCE)


@triton.jit
def chunks_kernel(response, inputs, settings, out, grid, rules: tl.constexpr, SOURCE: tl.constexpr):
    """A task of a chunk of a row that other programs share: its facts, or with everybody's the rest.

    Tasks are taken in order, so whoever waits for an earlier one waits for a program that runs.
    """
    if rules.DEPENDENT:
        tl.extra.cuda.gdc_wait()
    i_p = tl.atomic_add(grid.p_counters, 1, sem="relaxed", scope="gpu")
    if i_p == tl.num_programs(0) - 1:
        tl.store(grid.p_counters, 0)
    n_programs = grid.n_tasks * 2
    if response.p_cu is not None:  # noqa: SIM102
        if i_p == n_programs + grid.n_leaders:
            fill_gaps(response, out, rules.CHUNK)
            return

    # First all facts, then the rest from the right of each row, whose carry comes from there.
    leading = i_p >= n_programs
    sharing = i_p < grid.n_tasks
    i_slot = tl.where(sharing, i_p, n_programs - 1 - i_p)
    i_b, i_c = row_of_slot(i_slot, response.p_cu, response.n_rows, grid.chunks_per_row, rules.CHUNK)
    i_b = tl.where(leading, i_p - n_programs, i_b).to(tl.int32)
    i_c = i_c.to(tl.int32)
    job = Job(response, inputs, out)
    row = row_at(place_of_row(response, i_b), inputs, settings)
    n_chunks = tl.maximum((row.place.length + rules.CHUNK - 1) // rules.CHUNK, 1)
    owned = (leading == 0) & row.place.whole & (i_c >= 0) & (i_c < n_chunks)

    slot = slot_base(response.p_cu, i_b, grid.chunks_per_row, 1, rules.CHUNK)
    p_flags = grid.p_counters + 1 + 2 * response.n_rows
    p_made = grid.p_counters + 1 + 2 * row.place.row
    board = Board(grid.p_doubles + slot, grid.p_ints + slot, grid.n_tasks, p_flags + slot, p_made, p_made + 1)
    if owned & sharing:
        share_facts(row, board, job, i_c, rules, SOURCE)
    if owned & (sharing == 0):
        shape_chunk(row, board, job, i_c, n_chunks, rules)
    if response.p_cu is not None:  # noqa: SIM102
        if leading & row.lost:
            # A row that does not own its tokens becomes NaN, whatever its weights are.
            shape_row(row, None, job, None, rules, SOURCE)
