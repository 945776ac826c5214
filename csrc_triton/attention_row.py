"""One row of attention per sequence, averaged over heads: at all keys or at response tokens."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
import triton.language as tl
from torch import Tensor

from csrc_triton.device import (
    INF,
    LOG2E,
    NAN,
    chunk_scores,
    fold_partials,
    head_mean,
    is_visible,
    row_of_slot,
    segment,
    slot_base,
    softmax_partial,
)
from csrc_triton.launch import COMPILER, ceil_div, interpreted, kernel, registers, row_stride, tokens

SCAN = 1024
"""Tokens a preparation program looks at together."""
FOLD = 16
"""Chunks whose partials are folded together."""
FOLD_HEADS = 8
"""Heads a program folds."""
MEAN_HEADS = 4
"""Heads whose terms are added together."""


@kernel()
def prepare_kernel(
    p_rows,  # [B, 5] out: bos, first, end, kept_chunk, status
    p_out,  # filled where the row is out of range
    out_stride,
    p_cu,
    n_rows,
    keys,  # S, or N
    p_key_start,
    p_position,
    p_mask,
    stride_mb,
    stride_mt,
    window,
    p_response_mask,
    stride_rb,
    p_response_start,
    p_response_index,
    stride_ib,
    p_response_cu,
    responses,  # R, or M
    LAST_RESPONSE: tl.constexpr,
    OUT_OF_RANGE: tl.constexpr,
    CHUNK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Which keys the query of a row sees, and whether an index of the row is out of range."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    bos = row * 0
    eos = bos + keys
    valid = eos >= bos
    if p_cu is not None:
        bos, eos, valid = segment(p_cu, i_b, n_rows, keys)
    length = tl.where(valid, eos - bos, 0)
    start = row * 0
    if p_key_start is not None:
        start = tl.load(p_key_start + i_b).to(tl.int64)
    valid = valid & (start >= 0) & (start <= length)

    first = tl.where(valid, start, length)
    last = length - 1
    if p_mask is not None:
        lowest = length
        last = row * 0 - 1
        mask_offset = bos * stride_mt
        if p_cu is None:
            mask_offset = row * stride_mb
        for t0 in range(first // SCAN * SCAN, length, SCAN):
            t = t0 + tl.arange(0, SCAN)
            attended = is_visible(p_mask, mask_offset, stride_mt, t, first, length)
            lowest = tl.minimum(lowest, tl.min(tl.where(attended, t, length)))
            last = tl.maximum(last, tl.max(tl.where(attended, t, -1)))
        first = lowest
    position = tl.where(first <= last, last, 0)
    if p_position is not None:
        position = tl.load(p_position + i_b).to(tl.int64)

    live_any = row >= 0
    kept_chunk = row * 0
    if p_response_mask is not None:
        r_lo = row * 0
        r_hi = r_lo + responses
        r_valid = r_lo == 0
        response_offset = row * stride_rb
        index_offset = row * stride_ib
        if p_response_cu is not None:
            r_lo, r_hi, r_valid = segment(p_response_cu, i_b, n_rows, responses)
            response_offset = row * 0
            index_offset = row * 0
        r_end = tl.where(r_valid, r_hi, r_lo)
        r_start = row * 0
        if p_response_start is not None:
            r_start = tl.load(p_response_start + i_b).to(tl.int64)
        lowest_t = row * 0
        highest_t = lowest_t - 1
        last_j = r_lo - 1
        for j0 in range(r_lo, r_end, SCAN):
            j = j0 + tl.arange(0, SCAN)
            live = tl.load(p_response_mask + response_offset + j, mask=j < r_end, other=0) != 0
            if p_response_index is not None:
                t = tl.load(p_response_index + index_offset + j, mask=live, other=-1).to(tl.int64)
                placed = t != -1
            else:
                t = r_start + j - r_lo
                placed = live
            lowest_t = tl.minimum(lowest_t, tl.min(tl.where(placed, t, 0)))
            highest_t = tl.maximum(highest_t, tl.max(tl.where(placed, t, -1)))
            last_j = tl.maximum(last_j, tl.max(tl.where(live, j, r_lo - 1)))
        live_any = last_j >= r_lo
        if LAST_RESPONSE:
            position = r_start + last_j - r_lo
            if p_response_index is not None:
                position = tl.load(p_response_index + index_offset + last_j, mask=live_any, other=-1).to(
                    tl.int64
                )
        valid = valid & (lowest_t >= 0) & (highest_t < length)
    valid = valid & ((length == 0) | ((position >= 0) & (position < length)))
    if p_response_mask is not None:
        valid = (valid | (live_any == 0)) & r_valid

    end = tl.where(valid, tl.minimum(position + 1, length), 0)
    if window is not None:
        first = tl.maximum(first, end - window)
    first = tl.where(valid & live_any, tl.minimum(first, end), end)
    if p_response_start is not None:
        kept_chunk = tl.maximum(r_start - first, 0) // CHUNK
    tl.store(p_rows + row * 5, bos)
    tl.store(p_rows + row * 5 + 1, first)
    tl.store(p_rows + row * 5 + 2, end)
    tl.store(p_rows + row * 5 + 3, kept_chunk)
    tl.store(p_rows + row * 5 + 4, tl.where(valid, 0, OUT_OF_RANGE))

    if valid == 0:
        if p_response_mask is not None:
            lo = r_lo
            hi = r_hi
            out_offset = row * out_stride
            if p_response_cu is not None:
                out_offset = row * 0
                lo = tl.minimum(tl.maximum(tl.minimum(r_lo, r_hi), 0), responses)
                hi = tl.minimum(tl.maximum(tl.maximum(r_lo, r_hi), 0), responses)
        else:
            lo = tl.minimum(tl.maximum(tl.minimum(bos, eos), 0), keys)
            hi = tl.minimum(tl.maximum(tl.maximum(bos, eos), 0), keys)
            out_offset = row * 0
            if p_cu is None:
                out_offset = row * out_stride
        for j0 in range(lo, hi, SCAN):
            j = j0 + tl.arange(0, SCAN)
            fill = tl.full([SCAN], NAN, tl.float32)
            if p_response_mask is not None:
                live = tl.load(p_response_mask + response_offset + j, mask=j < hi, other=0) != 0
                fill = tl.where(live, NAN, 0.0)
            tl.store(p_out + out_offset + j, fill, mask=j < hi)


@kernel("p_query", "p_key")
def partials_kernel(
    p_query,
    p_key,
    p_largest,  # [slots, Hq]
    p_sum,  # [slots, Hq]
    p_terms,  # [term slots, Hq, CHUNK]
    p_rows,  # [B, 5]
    p_mask,
    stride_mb,
    stride_mt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    p_cu,
    n_rows,
    slots_per_row,
    p_term_cu,
    term_slots_per_row,
    kv_heads,
    scaling,
    softcap,
    TERM_SPARE: tl.constexpr,
    ONLY_KEPT: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Scores and softmax partials of one chunk of keys, one key head."""
    i_p = tl.program_id(0)
    if p_cu is None:
        i_h = i_p // slots_per_row % kv_heads
        i_slot = i_p // (slots_per_row * kv_heads) * slots_per_row + i_p % slots_per_row
    else:
        i_h = i_p % kv_heads
        i_slot = i_p // kv_heads
    i_b, i_c = row_of_slot(i_slot, p_cu, n_rows, slots_per_row, CHUNK)
    row = i_b.to(tl.int64)
    bos = tl.load(p_rows + row * 5)
    first = tl.load(p_rows + row * 5 + 1)
    end = tl.load(p_rows + row * 5 + 2)
    kept_chunk = tl.load(p_rows + row * 5 + 3)
    term_base = slot_base(p_term_cu, i_b, term_slots_per_row, TERM_SPARE, CHUNK)
    term_slot = term_base + i_c - kept_chunk
    kept = (i_c >= kept_chunk) & (
        term_slot < slot_base(p_term_cu, i_b + 1, term_slots_per_row, TERM_SPARE, CHUNK)
    )
    if (i_c < 0) | (first + i_c.to(tl.int64) * CHUNK >= end):
        return
    if ONLY_KEPT:  # noqa: SIM102
        if kept == 0:
            return

    t = first + i_c.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    mask_offset = bos * stride_mt
    key_row = bos * (stride_kt * KEY_UNIT)
    query_row = row * (stride_qb * QUERY_UNIT) + (bos + end - 1) * (stride_qt * QUERY_UNIT)
    if p_cu is None:
        mask_offset = row * stride_mb
        key_row = row * (stride_kb * KEY_UNIT)
    visible = is_visible(p_mask, mask_offset, stride_mt, t, first, end)
    head = i_h.to(tl.int64)
    scores = chunk_scores(
        p_query + query_row + head * G * (stride_qh * QUERY_UNIT),
        stride_qh * QUERY_UNIT,
        p_key + key_row + head * (stride_kh * KEY_UNIT),
        stride_kt * KEY_UNIT,
        t,
        t < end,
        scaling,
        softcap,
        G,
        M,
        D,
        BLOCK_D,
        STRIDE_QD,
        STRIDE_KD,
        UPCAST,
    )
    largest, total, terms = softmax_partial(scores, visible)
    o_g = tl.arange(0, M)
    heads = kv_heads * G
    at = i_slot.to(tl.int64) * heads + i_h * G + o_g
    tl.store(p_largest + at, largest, mask=o_g < G)
    tl.store(p_sum + at, total, mask=o_g < G)
    if kept:
        place = (term_slot * heads + i_h * G + o_g)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        tl.store(p_terms + place, terms, mask=(o_g < G)[:, None])


@kernel()
def fold_kernel(
    p_largest,
    p_sum,
    p_factor,  # [slots, Hq]
    p_rows,
    p_cu,
    slots_per_row,
    p_sinks,
    p_lse,
    stride_lb,
    stride_lh,
    stride_lt,
    heads,
    CHUNK: tl.constexpr,
    H: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Folds the partials of one row, some heads."""
    row = tl.program_id(0).to(tl.int64)
    bos = tl.load(p_rows + row * 5)
    first = tl.load(p_rows + row * 5 + 1)
    end = tl.load(p_rows + row * 5 + 2)
    if first >= end:
        return
    o_h = tl.program_id(1) * H + tl.arange(0, H)
    sink = tl.full([H], -INF, tl.float32)
    if p_sinks is not None:
        sink = tl.load(p_sinks + o_h, mask=o_h < heads, other=0.0).to(tl.float32) * LOG2E
    lse = None
    if p_lse is not None:
        p_lse_row = p_lse + row * stride_lb + (bos + end - 1) * stride_lt
        lse = tl.load(p_lse_row + o_h * stride_lh, mask=o_h < heads, other=0.0).to(tl.float32) * LOG2E
    base = slot_base(p_cu, row, slots_per_row, 1, CHUNK)
    n_chunks = (end - first + CHUNK - 1) // CHUNK
    fold_partials(p_largest, p_sum, p_factor, base, n_chunks, heads, o_h, sink, lse, H, FOLD)


@kernel()
def mean_kernel(
    p_out,
    p_terms,
    p_factor,
    p_rows,
    p_cu,
    slots_per_row,
    p_term_cu,
    term_slots_per_row,
    p_mask,
    stride_mb,
    stride_mt,
    p_out_cu,
    n_rows,
    out_per_row,  # R or S
    p_response_mask,
    stride_rb,
    p_response_start,
    p_response_index,
    stride_ib,
    heads,
    TERM_SPARE: tl.constexpr,
    CHUNK: tl.constexpr,
    H: tl.constexpr,
):
    """Mean over heads at CHUNK response tokens, or keys where there is no ``p_response_mask``."""
    i_b, i_c = row_of_slot(tl.program_id(0), p_out_cu, n_rows, (out_per_row + CHUNK - 1) // CHUNK, CHUNK)
    row = i_b.to(tl.int64)
    if tl.load(p_rows + row * 5 + 4) != 0:
        return
    bos = tl.load(p_rows + row * 5)
    first = tl.load(p_rows + row * 5 + 1)
    end = tl.load(p_rows + row * 5 + 2)
    kept_chunk = tl.load(p_rows + row * 5 + 3)
    j = i_c.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    if p_out_cu is None:
        out_offset = row * out_per_row
        inside = j < out_per_row
        response_offset = row * stride_rb
        index_offset = row * stride_ib
    else:
        out_offset = tl.load(p_out_cu + row).to(tl.int64)
        inside = (j >= 0) & (j < tl.load(p_out_cu + row + 1).to(tl.int64) - out_offset)
        response_offset = out_offset
        index_offset = out_offset
    t = j
    wanted = inside
    if p_response_mask is not None:
        wanted = inside & (tl.load(p_response_mask + response_offset + j, mask=inside, other=0) != 0)
    if p_response_start is not None:
        t = j + tl.load(p_response_start + row).to(tl.int64)
    if p_response_index is not None:
        t = tl.load(p_response_index + index_offset + j, mask=wanted, other=-1).to(tl.int64)
    mask_offset = bos * stride_mt
    if p_cu is None:
        mask_offset = row * stride_mb
    seen = wanted & (t >= first) & (t < end)
    t = tl.where(seen, t, first)
    seen = seen & is_visible(p_mask, mask_offset, stride_mt, t, first, end)
    chunk = (t - first) // CHUNK
    term_slot = slot_base(p_term_cu, i_b, term_slots_per_row, TERM_SPARE, CHUNK) + chunk - kept_chunk
    slot = slot_base(p_cu, i_b, slots_per_row, 1, CHUNK) + chunk
    mean = head_mean(p_terms, p_factor, term_slot, slot, (t - first) % CHUNK, seen, heads, H, CHUNK)
    tl.store(p_out + out_offset + j, mean, mask=inside)


class LayerOptions(TypedDict, total=False):
    """What a layer may have besides queries, keys and scaling; as in ``attnshape.AttentionInputs``."""

    key_start: Tensor | None
    query_position: Tensor | Literal["last_response"] | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    softcap: float | None
    sliding_window: int | None
    sinks: Tensor | None
    lse: Tensor | None


class _Response(NamedTuple):
    """Where the response tokens lie among their row's keys."""

    mask: Tensor | None  # [B, R], or packed [M]
    start: Tensor | None
    key_index: Tensor | None
    cu_seqlens: Tensor | None


def attention_row(query: Tensor, key: Tensor, scaling: float, **options: Unpack[LayerOptions]) -> Tensor:
    """Head mean of one attention row per sequence: ``[B, S]`` (packed ``[N]``) float32, NaN if out of range.

    Args:
        query: ``[B, Hq, D]`` or ``[B, Hq, S, D]``; packed ``[B, Hq, D]`` or ``[N, Hq, D]``. Any strides.
        key: ``[B, Hkv, S, D]``, packed ``[N, Hkv, D]``. Any strides.
        scaling: factor on ``q . k``.
    """
    packed = options.get("cu_seqlens") is not None
    shape = (key.shape[0],) if packed else (key.shape[0], key.shape[2])
    # Packed keys may belong to no row.
    out = (torch.zeros if packed else torch.empty)(shape, dtype=torch.float32, device=key.device)
    _launch(query, key, scaling, options, out, None, 1)
    return out


def attention_credit_raw(
    query: Tensor,
    key: Tensor,
    scaling: float,
    response_mask: Tensor,
    *,
    response_start: Tensor | None = None,
    response_index: Tensor | None = None,
    response_cu_seqlens: Tensor | None = None,
    out_of_range: int,
    **options: Unpack[LayerOptions],
) -> tuple[Tensor, Tensor]:
    """``attention_row`` at the response tokens, and per row ``out_of_range`` or 0.

    Args:
        query, key, scaling: as in ``attention_row``.
        response_mask: ``[B, R]``, or ``[M]`` with ``response_cu_seqlens``; any dtype.
        response_start: ``[B]``; or else ``response_index`` ``[B, R]`` or ``[M]``, -1 for a token without key.
        out_of_range: the status of a row with an index outside its tensor; its unmasked tokens are NaN.

    Returns:
        ``[B, R]`` (or ``[M]``) float32, 0 at masked tokens, and int32 ``[B]``.
    """
    response = _Response(tokens(response_mask), response_start, tokens(response_index), response_cu_seqlens)
    # Packed tokens may belong to no row.
    new = torch.empty if response_cu_seqlens is None else torch.zeros
    out = new(response_mask.shape, dtype=torch.float32, device=key.device)
    return out, _launch(query, key, scaling, options, out, response, out_of_range)


def chunk_size(key: Tensor) -> int:
    """Keys per chunk, a constant of the layer: 64 KB at the most, e.g. 128 of width 256 in bfloat16."""
    return 64 if _padded(key.shape[-1]) * key.element_size() > 512 else 128


def _launch(
    query: Tensor,
    key: Tensor,
    scaling: float,
    options: LayerOptions,
    out: Tensor,
    response: _Response | None,
    out_of_range: int,
) -> Tensor:
    """Fills ``out``; returns the status of each row."""
    cu, mask, lse = options.get("cu_seqlens"), options.get("attention_mask"), options.get("lse")
    position = options.get("query_position")
    heads, kv_heads, width = query.shape[1], key.shape[1], key.shape[-1]
    group = heads // kv_heads
    chunk = chunk_size(key)
    if cu is None:
        batch, keys = key.shape[0], key.shape[2]
        slots_per_row = ceil_div(keys, chunk)
        slots = batch * slots_per_row
        stride_kb, stride_kh, stride_kt, stride_kd = key.stride()
    else:
        batch, keys = cu.shape[0] - 1, key.shape[0]
        slots_per_row = 0
        slots = keys // chunk + batch
        stride_kb = 0
        stride_kt, stride_kh, stride_kd = key.stride()
    query_strides = _position_strides(query, cu is not None, keys)
    query_unit = _stride_unit(*query_strides)
    key_unit = _stride_unit(stride_kb, stride_kh, stride_kt)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    mask_strides = (0, 0) if mask is None else (row_stride(mask), mask.stride(-1))

    # Slots for the terms: one per chunk of keys, or only where a row's response can lie.
    term_cu, terms_per_row, term_slots, term_spare = cu, slots_per_row, slots, 1
    out_cu, out_per_row, out_slots = cu, out.shape[-1], 0
    r_mask, r_start, r_index, r_cu = response or _Response(None, None, None, None)
    if r_mask is not None:
        out_cu = r_cu
        if r_start is not None:
            term_cu = r_cu
            if r_cu is None:
                terms_per_row = ceil_div(out_per_row, chunk) + 1
                term_slots = batch * terms_per_row
            else:
                term_spare = 2
                term_slots = out_per_row // chunk + 2 * batch
    if out_cu is None:
        out_slots = batch * ceil_div(out_per_row, chunk)
    else:
        out_slots = out_per_row // chunk + batch

    rows = torch.empty(batch, 5, dtype=torch.int64, device=key.device)
    largest, total, factor = torch.empty(3, slots, heads, dtype=torch.float32, device=key.device)
    terms = torch.empty(term_slots, heads, chunk, dtype=torch.float32, device=key.device)
    if batch == 0:
        return rows[:, 4].to(torch.int32)
    prepare_kernel[(batch,)](
        rows,
        out,
        out_per_row,
        cu,
        batch,
        keys,
        options.get("key_start"),
        position if isinstance(position, Tensor) else None,
        mask,
        *mask_strides,
        options.get("sliding_window"),
        r_mask,
        row_stride(r_mask),
        r_start,
        r_index,
        row_stride(r_index),
        r_cu,
        out_per_row,
        LAST_RESPONSE=position == "last_response",
        OUT_OF_RANGE=out_of_range,
        CHUNK=chunk,
        SCAN=SCAN,
        **COMPILER,
    )
    status = rows[:, 4].to(torch.int32)
    if out_slots == 0:
        return status
    if slots:
        partials_kernel[(slots * kv_heads,)](
            query,
            key,
            largest,
            total,
            terms,
            rows,
            mask,
            *mask_strides,
            *(stride // query_unit for stride in query_strides),
            stride_kb // key_unit,
            stride_kh // key_unit,
            stride_kt // key_unit,
            cu,
            batch,
            slots_per_row,
            term_cu,
            terms_per_row,
            kv_heads,
            float(scaling),
            options.get("softcap"),
            TERM_SPARE=term_spare,
            ONLY_KEPT=lse is not None and r_start is not None,
            G=group,
            M=max(16, _padded(group)),
            D=width,
            BLOCK_D=_block_d(key),
            STRIDE_QD=query.stride(-1),
            STRIDE_KD=stride_kd,
            QUERY_UNIT=query_unit,
            KEY_UNIT=key_unit,
            UPCAST=interpreted(),
            CHUNK=chunk,
            **COMPILER,
            **(registers(168) if key.element_size() < 4 else {}),
        )
        fold_kernel[(batch, ceil_div(heads, FOLD_HEADS))](
            largest,
            total,
            factor,
            rows,
            cu,
            slots_per_row,
            options.get("sinks"),
            lse,
            *((0, 0, 0) if lse is None else _position_strides(lse.unsqueeze(-1), cu is not None, keys)),
            heads,
            CHUNK=chunk,
            H=FOLD_HEADS,
            FOLD=FOLD,
            **COMPILER,
        )
    mean_kernel[(out_slots,)](
        out,
        terms,
        factor,
        rows,
        cu,
        slots_per_row,
        term_cu,
        terms_per_row,
        mask,
        *mask_strides,
        out_cu,
        batch,
        out_per_row,
        r_mask,
        row_stride(r_mask),
        r_start,
        r_index,
        row_stride(r_index),
        heads,
        TERM_SPARE=term_spare,
        CHUNK=chunk,
        H=MEAN_HEADS,
        **COMPILER,
    )
    return status


def _position_strides(x: Tensor, packed: bool, keys: int) -> tuple[int, int, int]:
    """Strides per row, head and position; 0 per position if ``x`` holds one row per sequence."""
    if not packed:
        return (x.stride(0), x.stride(1), x.stride(2) if x.ndim == 4 else 0)
    return (0, x.stride(1), x.stride(0)) if x.shape[0] == keys else (x.stride(0), x.stride(1), 0)


def _stride_unit(*strides: int) -> int:
    """What strides are counted in: 16 bytes or more where all allow it, so that loads may be that wide."""
    return 1 if any(stride % 8 for stride in strides) else 8


def _block_d(key: Tensor) -> int:
    """Part of the head width multiplied at once, so that operands fit registers: 128 of 192 in bfloat16."""
    return min(128 if key.element_size() < 4 else 16, max(16, _padded(key.shape[-1])))


def _padded(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
