"""The kernel from queries and keys, or from credit, to rewards, advantages and returns."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=union-attr

from __future__ import annotations

import triton.language as tl

from csrc_triton.advantages import Board
from csrc_triton.device.attention import (
    FEW,
    Attended,
    MaskRow,
    Terms,
    Tile,
    attend,
    fold_chunks,
    group_means,
    head_weights,
    slots_of_row,
    store_means,
)
from csrc_triton.device.handoff import arrive
from csrc_triton.device.layout import (
    ResponseTokens,
    attended_range,
    bounds_of_row,
    keys_of_row,
    place_of_row,
    row_of_slot,
    slot_base,
)
from csrc_triton.device.math import INF, LOG2E, clamp, number
from csrc_triton.launch import kernel
from csrc_triton.rewards import (
    Numbers,
    Outputs,
    Results,
    Row,
    Rules,
    Tokens,
    fill_gaps,
    shape_part,
)


@kernel("p_query", "p_key")
def shape_kernel(
    p_rewards,  # outputs [B, R] or [M], or None
    p_advantages,
    p_returns,
    p_credit,
    p_kl,
    p_status,  # [B]
    p_stats,  # [B, 4]
    p_moments,  # [B, 3]
    p_mask,  # tokens' inputs, or None
    stride_mask,
    p_weights,
    stride_weights,
    p_values,
    stride_values,
    p_logprobs,
    stride_logprobs,
    p_ref_logprobs,
    stride_ref_logprobs,
    p_kl_in,
    stride_kl_in,
    p_token_rewards,
    stride_token_rewards,
    p_score,  # rows' inputs, or None
    p_score_index,
    p_terminal,
    p_bootstrap,
    p_row_status,
    p_response_start,
    p_response_index,
    stride_index,
    p_response_cu,
    n_rows,
    width,  # R, or M
    p_kl_coef,
    kl_coef,
    dense_share,
    score_low,
    score_high,
    kl_input_clip,
    kl_output_clip,
    min_mass,
    gamma,
    p_gl,
    gl,
    p_gl_value,
    gl_value,
    p_query,  # a layer, or None
    stride_qb,
    stride_qh,
    stride_qt,
    p_key,
    stride_kb,
    stride_kh,
    stride_kt,
    p_cu,
    keys_width,  # S, or N
    p_key_start,
    p_position,
    p_attention_mask,
    stride_mb,
    stride_mt,
    p_mask_row,
    stride_ab,
    stride_ah,
    stride_at,
    window,
    scaling,
    softcap,
    p_sinks,
    p_lse,
    stride_lb,
    stride_lh,
    stride_lt,
    p_head_mask,
    kv_heads,
    n_layers,
    p_partials,  # what its programs tell each other
    p_factor,
    p_terms,
    p_groups,
    slots_per_row,
    p_term_cu,
    term_slots_per_row,
    split,
    splits_per_row,
    p_doubles,  # what the programs of a row's chunks do
    p_ints,
    chunks_per_row,
    p_counters,
    n_tasks,
    n_leaders,
    MODE: tl.constexpr,  # a program is, attend: a split of a row's keys; mean, chunks: a chunk; rows: a row
    FINISH: tl.constexpr,  # terms, mean, shape
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    FACTS: tl.constexpr,
    CREDIT: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    SCORE_INDEX: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    SKIP: tl.constexpr,
    UNIT: tl.constexpr,
    TWO_RECURRENCES: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    TERM_SPARE: tl.constexpr,
    ONLY_KEPT: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
    CAUSAL: tl.constexpr,
    FAR: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
    KEYS: tl.constexpr,
    FOLD: tl.constexpr,
    H: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_p = tl.program_id(0)
    n_programs = n_tasks
    if MODE == "chunks":
        # Tasks are taken in order, so whoever waits for an earlier one waits for a program that runs.
        i_p = tl.atomic_add(p_counters, 1, sem="relaxed", scope="gpu")
        if FACTS:
            n_programs = n_tasks * 2
        if i_p == tl.num_programs(0) - 1:
            tl.store(p_counters, 0)
    if (p_response_cu is not None) and (FINISH != "terms"):  # noqa: SIM102
        if i_p == n_programs + n_leaders:
            outputs = Outputs(i_p * 0, p_rewards, p_advantages, p_returns, p_credit, p_kl)
            fill_gaps(outputs, p_response_cu, n_rows, width, CHUNK)
            return

    # Which row, and which part of it. A packed row whose bounds are not sound owns none, but has a leader.
    leading = i_p >= n_programs
    sharing = leading & (leading == 0)
    i_h = i_p * 0
    i_part = i_p * 0
    if MODE == "rows":
        i_b = i_p
    elif MODE == "attend":
        if p_cu is None:
            i_part = i_p % splits_per_row
            i_h = i_p // splits_per_row % kv_heads
            i_b = i_p // (splits_per_row * kv_heads)
        else:
            i_h = i_p % kv_heads
            i_b, i_part = row_of_slot(i_p // kv_heads, p_cu, n_rows, 0, KEYS * split)
    else:
        i_slot = i_p
        if MODE == "chunks":
            if FACTS:
                sharing = i_p < n_tasks
            # From the right of each row, whose carry comes from there.
            i_slot = tl.where(sharing, i_p, n_programs - 1 - i_p)
        i_b, i_part = row_of_slot(i_slot, p_response_cu, n_rows, chunks_per_row, CHUNK)
    i_b = tl.where(leading, i_p - n_programs, i_b).to(tl.int32)
    i_part = tl.where(leading, -1, i_part).to(tl.int32)
    row = i_b.to(tl.int64)

    heads = kv_heads * G
    keys = None
    terms = None
    if (MODE == "attend") or (SOURCE == "terms"):
        keys = keys_of_row(p_cu, n_rows, keys_width, p_key_start, p_position, window, i_b, CAUSAL, KEYS)
        slots = slots_of_row(
            stride_mb,
            stride_mt,
            p_cu,
            slots_per_row,
            p_term_cu,
            term_slots_per_row,
            keys,
            p_response_start,
            p_response_cu,
            n_rows,
            width,
            i_b,
            TERM_SPARE,
            KEYS,
        )
        p_added = p_mask_row
        if p_mask_row is not None:
            p_added += (keys.bos + keys.first) * stride_at
            if p_cu is None:
                p_added += row * stride_ab
        mask_row = MaskRow(p_added, stride_ah, stride_at)
        terms = Terms(p_terms, p_factor, p_attention_mask, stride_mt, mask_row, slots)

    finishing = i_p >= 0
    if MODE == "attend":
        finishing = leading & (keys.whole == 0)
        n_splits = tl.maximum((keys.n_chunks + split - 1) // split, 1)
        if keys.whole & (i_part >= 0) & (i_part < n_splits):
            head = i_h.to(tl.int64)
            o_g = tl.arange(0, M)
            o_h = i_h * G + o_g
            weight = head_weights(p_head_mask, o_h, o_g < G, heads, n_layers)
            begin = i_part * split
            stop = tl.minimum(begin + split, keys.n_chunks)
            if ONLY_KEPT:
                begin = tl.maximum(begin, tl.minimum(slots.kept, stop).to(tl.int32))
                stop = tl.minimum(stop, tl.minimum(slots.kept + slots.n_kept, stop).to(tl.int32))
            if p_head_mask is not None:
                stop = tl.where(tl.max(weight) == 0.0, begin, stop)
            # Products with 64 bits from the left, the unit last: a stride itself may need them.
            at_query = row * stride_qb * QUERY_UNIT + (keys.bos + keys.position) * stride_qt * QUERY_UNIT
            at_query += head * G * stride_qh * QUERY_UNIT
            at_key = (keys.bos + keys.first) * stride_kt * KEY_UNIT + head * stride_kh * KEY_UNIT
            if p_cu is None:
                at_key += row * stride_kb * KEY_UNIT
            attend(
                p_query + at_query,
                stride_qh,
                p_key + at_key,
                stride_kt,
                p_partials,
                keys,
                terms,
                begin,
                stop,
                o_h,
                o_g < G,
                heads,
                scaling,
                softcap,
                KEYS,
                Tile(D, BLOCK_D, STRIDE_QD, STRIDE_KD, QUERY_UNIT, KEY_UNIT, FAR, UPCAST, STAGES),
            )
            p_counter = p_counters + row * (kv_heads + 1)
            if arrive(p_counter + head) == n_splits - 1:
                tl.store(p_counter + head, 0)
                sink = tl.full([M], -INF, tl.float32)
                if p_sinks is not None:
                    sink = tl.load(p_sinks + o_h, mask=o_g < G, other=0.0).to(tl.float32) * LOG2E
                lse = None
                if p_lse is not None:
                    p_row_lse = p_lse + row * stride_lb + (keys.bos + keys.position) * stride_lt
                    lse = tl.load(p_row_lse + o_h * stride_lh, mask=(o_g < G) & (keys.end > 0), other=0.0)
                    lse = lse.to(tl.float32) * LOG2E
                fold_chunks(
                    p_partials,
                    p_factor,
                    slots.first * (KEYS // FEW),
                    keys.n_chunks * (KEYS // FEW),
                    heads,
                    o_h,
                    o_g < G,
                    sink,
                    lse,
                    weight,
                    FOLD,
                )
                if FINISH != "terms":
                    tl.debug_barrier()
                    place = place_of_row(
                        stride_mask, p_response_start, stride_index, p_response_cu, n_rows, width, i_b
                    )
                    total = row * 0 + width
                    if p_response_cu is None:
                        total = total * n_rows
                    response = ResponseTokens(p_mask, p_response_index, place)
                    group_means(p_groups, total, keys, terms, response, i_h, heads, G, H, KEYS, CHUNK)
                    finishing = arrive(p_counter + kv_heads) == kv_heads - 1
                    if finishing:
                        tl.store(p_counter + kv_heads, 0)

    if (MODE != "attend") or (FINISH != "terms"):  # noqa: SIM102
        if finishing:
            place = place_of_row(
                stride_mask, p_response_start, stride_index, p_response_cu, n_rows, width, i_b
            )
            lo = place.lo
            length = place.length
            n_chunks = (length + CHUNK - 1) // CHUNK
            total = row * 0 + width
            at_weights = lo
            at_values = lo
            at_logprobs = lo
            at_ref_logprobs = lo
            at_kl = lo
            at_token_rewards = lo
            if p_response_cu is None:
                total = total * n_rows
                at_weights = row * stride_weights
                at_values = row * stride_values
                at_logprobs = row * stride_logprobs
                at_ref_logprobs = row * stride_ref_logprobs
                at_kl = row * stride_kl_in
                at_token_rewards = row * stride_token_rewards
            tokens = Tokens(
                None if p_mask is None else p_mask + place.at_mask,
                None if p_weights is None else p_weights + at_weights,
                None if p_values is None else p_values + at_values,
                None if p_logprobs is None else p_logprobs + at_logprobs,
                None if p_ref_logprobs is None else p_ref_logprobs + at_ref_logprobs,
                None if p_kl_in is None else p_kl_in + at_kl,
                None if p_token_rewards is None else p_token_rewards + at_token_rewards,
            )
            out = Outputs(lo, p_rewards, p_advantages, p_returns, p_credit, p_kl)
            attended = None
            if SOURCE == "groups" or SOURCE == "terms":
                response = ResponseTokens(p_mask, p_response_index, place)
                attended = Attended(keys, terms, response, p_groups, total, kv_heads)

            # Either this program owns a chunk, or it does the whole row.
            owned = leading & (leading == 0)
            whole = owned == 0
            if (MODE == "mean") or (MODE == "chunks"):
                n_parts = tl.maximum(n_chunks, 1)
                owned = place.whole & (i_part >= 0) & (i_part < n_parts)
                whole = leading & (place.whole == 0)
            if (MODE == "mean") or (FINISH == "mean"):
                begin = tl.where(owned, i_part, 0)
                stop = tl.where(owned, begin + 1, tl.where(whole, n_chunks, 0))
                p_outside = None if p_row_status is None else p_row_status + row
                store_means(
                    out.p_credit + lo, p_outside, attended, begin, stop, SOURCE, ADD, G, H, KEYS, CHUNK
                )
            else:
                numbers = Numbers(
                    None if p_score is None else clamp(number(p_score + row), score_low, score_high),
                    None if p_score_index is None else tl.load(p_score_index + row).to(tl.int64),
                    None if p_terminal is None else number(p_terminal + row),
                    None if p_bootstrap is None else number(p_bootstrap + row),
                    kl_coef if p_kl_coef is None else number(p_kl_coef),
                    dense_share,
                    kl_input_clip,
                    kl_output_clip,
                    min_mass,
                    gamma,
                    gl if p_gl is None else number(p_gl + row),
                    gl_value if p_gl_value is None else number(p_gl_value + row),
                )
                results = Results(
                    None if p_status is None else p_status + row,
                    None if p_stats is None else p_stats + row * 4,
                    None if p_moments is None else p_moments + row * 3,
                )
                outside = 0
                if p_row_status is not None:
                    outside = tl.load(p_row_status + row)
                board = None
                n_parts = 0
                if MODE == "chunks":
                    n_parts = tl.maximum(n_chunks, 1)
                    slot = slot_base(p_response_cu, i_b, chunks_per_row, 1, CHUNK)
                    p_flags = p_counters + 1 + 2 * n_rows
                    p_row_counters = p_counters + 1 + 2 * row
                    board = Board(
                        p_doubles + slot,
                        p_ints + slot,
                        n_tasks,
                        p_flags + slot,
                        p_row_counters,
                        p_row_counters + 1,
                    )
                shape_part(
                    Row(tokens, out, results, numbers, length, place.whole == 0, outside),
                    attended,
                    board,
                    i_part,
                    n_parts,
                    owned,
                    sharing,
                    whole,
                    Rules(
                        ADD,
                        G,
                        H,
                        KEYS,
                        CHUNK,
                        CREDIT,
                        EVEN,
                        NORMALIZATION,
                        SCORE_INDEX,
                        KL_ESTIMATOR,
                        p_values is not None,
                        SKIP,
                        UNIT,
                        TWO_RECURRENCES,
                        ZERO_NONFINITE,
                    ),
                    SOURCE,
                    FACTS,
                    (MODE != "chunks") or (p_response_cu is not None),
                )


@kernel()
def prepare_kernel(
    p_start_out,  # [B]
    p_position_out,  # [B]
    p_cu,
    n_rows,
    keys,  # S, or N
    p_key_start,
    p_position,
    p_mask,
    stride_mb,
    stride_mt,
    p_response_mask,
    stride_rb,
    p_response_start,
    p_response_index,
    stride_ib,
    p_response_cu,
    responses,  # R, or M
    LAST_RESPONSE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """First visible key and position of the query of each row, from a mask; out of range where they are."""
    i_b = tl.program_id(0)
    row = i_b.to(tl.int64)
    bounds = bounds_of_row(p_cu, n_rows, keys, i_b)
    length = tl.where(bounds.whole, bounds.length, 0)
    start = row * 0
    if p_key_start is not None:
        start = tl.load(p_key_start + row).to(tl.int64)
    position = length - 1
    if p_mask is not None:
        inside = (start >= 0) & (start <= length)
        scanned = tl.where(inside, start, length)
        mask_offset = bounds.lo * stride_mt
        if p_cu is None:
            mask_offset = row * stride_mb
        lowest, last = attended_range(p_mask, mask_offset, stride_mt, scanned, length, SCAN)
        start = tl.where(inside, lowest, start)
        position = tl.maximum(last, 0)
    if p_position is not None:
        position = tl.load(p_position + row).to(tl.int64)
    if LAST_RESPONSE:
        place = place_of_row(stride_rb, p_response_start, stride_ib, p_response_cu, n_rows, responses, i_b)
        last_j = place.length * 0 - 1
        for j0 in range(0, place.length, SCAN):
            j = j0 + tl.arange(0, SCAN)
            live = j < place.length
            live = live & (tl.load(p_response_mask + place.at_mask + j, mask=live, other=0) != 0)
            last_j = tl.maximum(last_j, tl.max(tl.where(live, j, -1)))
        position = place.start + last_j
        if p_response_index is not None:
            position = tl.load(p_response_index + place.at_index + last_j, mask=last_j >= 0, other=-1).to(
                tl.int64
            )
        position = tl.where(last_j >= 0, position, -1)
    tl.store(p_start_out + row, start)
    tl.store(p_position_out + row, position)
