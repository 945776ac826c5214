"""One kernel from queries and keys, or from credit, to rewards, advantages and returns; and its launchers."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=union-attr

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import triton.language as tl
from torch import Tensor

from csrc_triton.attention_row import (
    Response,
    Terms,
    attend,
    attended_range,
    group_means,
    head_weights,
    keys_of_row,
    place_of_row,
    slots_of_row,
)
from csrc_triton.device import INF, LOG2E, arrive, clamp, fold_chunks, number, row_of_slot, segment, slot_base
from csrc_triton.launch import (
    COMPILER,
    COUNTERS,
    Launcher,
    ceil_div,
    interpreted,
    kernel,
    padded,
    processors,
    registers,
    row_stride,
    stride_unit,
    tokens,
)
from csrc_triton.sweep import (
    DOUBLES,
    FLAGS,
    INTS,
    Board,
    Numbers,
    Outputs,
    Results,
    Source,
    Tokens,
    fill_gaps,
    shape_chunk,
    shape_row,
    share_facts,
    store_means,
)

CHUNK = 512
"""Response tokens a program shapes at once."""
SCAN = 1024
"""Tokens a preparation program looks at at once."""


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
    beta,
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
    p_largest,  # what its programs tell each other
    p_sum,
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
    ROLL: tl.constexpr,
    STRIDE_QD: tl.constexpr,
    STRIDE_KD: tl.constexpr,
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
        keys = keys_of_row(p_cu, n_rows, keys_width, p_key_start, p_position, window, i_b, KEYS)
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
        terms = Terms(p_terms, p_factor, p_attention_mask, stride_mt, slots)

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
            at_query = row * (stride_qb * QUERY_UNIT) + (keys.bos + keys.end - 1) * (stride_qt * QUERY_UNIT)
            at_key = row * (stride_kb * KEY_UNIT) + keys.first * (stride_kt * KEY_UNIT)
            if p_cu is not None:
                at_key = (keys.bos + keys.first) * (stride_kt * KEY_UNIT)
            attend(
                p_query + at_query + head * G * (stride_qh * QUERY_UNIT),
                stride_qh * QUERY_UNIT,
                p_key + at_key + head * (stride_kh * KEY_UNIT),
                stride_kt * KEY_UNIT,
                p_largest,
                p_sum,
                keys,
                terms,
                begin,
                stop,
                o_h,
                o_g < G,
                heads,
                scaling,
                softcap,
                G,
                M,
                D,
                BLOCK_D,
                ROLL,
                STRIDE_QD,
                STRIDE_KD,
                FAR,
                UPCAST,
                KEYS,
                STAGES,
            )
            p_counter = p_counters + row * (kv_heads + 1)
            if arrive(p_counter + head) == n_splits - 1:
                tl.store(p_counter + head, 0)
                sink = tl.full([M], -INF, tl.float32)
                if p_sinks is not None:
                    sink = tl.load(p_sinks + o_h, mask=o_g < G, other=0.0).to(tl.float32) * LOG2E
                lse = None
                if p_lse is not None:
                    p_row_lse = p_lse + row * stride_lb + (keys.bos + keys.end - 1) * stride_lt
                    lse = tl.load(p_row_lse + o_h * stride_lh, mask=(o_g < G) & (keys.end > 0), other=0.0)
                    lse = lse.to(tl.float32) * LOG2E
                fold_chunks(
                    p_largest,
                    p_sum,
                    p_factor,
                    slots.first,
                    keys.n_chunks,
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
                    response = Response(p_mask, p_response_index, place)
                    total = row * 0 + width
                    if p_response_cu is None:
                        total = total * n_rows
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
            source = None
            if SOURCE == "groups" or SOURCE == "terms":
                response = Response(p_mask, p_response_index, place)
                source = Source(keys, terms, response, p_groups, total, kv_heads)
            outside = 0
            if p_row_status is not None:
                outside = tl.load(p_row_status + row)

            # Either this program owns a chunk, or it does the whole row.
            owned = leading & (leading == 0)
            whole = owned == 0
            if (MODE == "mean") or (MODE == "chunks"):
                n_parts = tl.maximum(n_chunks, 1)
                owned = place.sound & (i_part >= 0) & (i_part < n_parts)
                whole = leading & (place.sound == 0)
            if (MODE == "mean") or (FINISH == "mean"):
                begin = tl.where(owned, i_part, 0)
                stop = tl.where(owned, begin + 1, tl.where(whole, n_chunks, 0))
                store_means(
                    out.p_credit + lo, p_row_status, source, row, begin, stop, SOURCE, ADD, G, H, KEYS, CHUNK
                )
            else:
                numbers = Numbers(
                    None if p_score is None else clamp(number(p_score + row), score_low, score_high),
                    None if p_terminal is None else number(p_terminal + row),
                    None if p_bootstrap is None else number(p_bootstrap + row),
                    kl_coef if p_kl_coef is None else number(p_kl_coef),
                    beta,
                    kl_input_clip,
                    kl_output_clip,
                    gamma,
                    gl if p_gl is None else number(p_gl + row),
                    gl_value if p_gl_value is None else number(p_gl_value + row),
                )
                results = Results(
                    None if p_status is None else p_status + row,
                    None if p_stats is None else p_stats + row * 4,
                    None if p_moments is None else p_moments + row * 3,
                )
                if MODE == "chunks":
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
                    if owned & sharing:
                        share_facts(
                            board,
                            tokens,
                            out,
                            source,
                            i_part,
                            length,
                            outside,
                            SOURCE,
                            ADD,
                            G,
                            H,
                            KEYS,
                            CHUNK,
                        )
                    if owned & (sharing == 0):
                        shape_chunk(
                            results,
                            tokens,
                            out,
                            numbers,
                            board,
                            p_score_index,
                            row,
                            length,
                            place.sound == 0,
                            n_parts - 1 - i_part,
                            min_mass,
                            FACTS,
                            CREDIT,
                            NORMALIZATION,
                            SCORE_INDEX,
                            KL_ESTIMATOR,
                            SKIP,
                            UNIT,
                            TWO_RECURRENCES,
                            ZERO_NONFINITE,
                            CHUNK,
                        )
                if (MODE != "chunks") or (p_response_cu is not None):  # noqa: SIM102
                    if whole:
                        shape_row(
                            results,
                            tokens,
                            out,
                            source,
                            numbers,
                            p_score_index,
                            row,
                            length,
                            place.sound == 0,
                            outside,
                            min_mass,
                            "weights" if (MODE == "chunks" and SOURCE == "terms") else SOURCE,
                            ADD,
                            CREDIT,
                            NORMALIZATION,
                            SCORE_INDEX,
                            KL_ESTIMATOR,
                            SKIP,
                            UNIT,
                            TWO_RECURRENCES,
                            ZERO_NONFINITE,
                            G,
                            H,
                            KEYS,
                            CHUNK,
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
    bos = row * 0
    eos = bos + keys
    sound = eos >= bos
    if p_cu is not None:
        bos, eos, sound = segment(p_cu, i_b, n_rows, keys)
    length = tl.where(sound, eos - bos, 0)
    start = row * 0
    if p_key_start is not None:
        start = tl.load(p_key_start + row).to(tl.int64)
    position = length - 1
    if p_mask is not None:
        inside = (start >= 0) & (start <= length)
        scanned = tl.where(inside, start, length)
        mask_offset = bos * stride_mt
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


class Layer(Protocol):
    """What is read of a layer, as ``attnshape.AttentionInputs`` has it."""

    @property
    def query(self) -> Tensor: ...

    @property
    def key(self) -> Tensor: ...

    @property
    def scaling(self) -> float: ...

    @property
    def key_start(self) -> Tensor | None: ...

    @property
    def query_position(self) -> Tensor | Literal["last_response"] | None: ...

    @property
    def attention_mask(self) -> Tensor | None: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...

    @property
    def softcap(self) -> float | None: ...

    @property
    def sliding_window(self) -> int | None: ...

    @property
    def sinks(self) -> Tensor | None: ...

    @property
    def lse(self) -> Tensor | None: ...

    @property
    def head_mask(self) -> Tensor | None: ...


class Attention(NamedTuple):
    """Credit that is the attention at the response tokens, averaged over heads and layers."""

    layers: Sequence[Layer]
    response_start: Tensor | None
    """Position of each row's first response token among its keys, ``[B]``."""
    response_index: Tensor | None
    """Or of every response token, ``[B, R]`` or ``[M]``; -1 for a token without key."""


Output = Literal["rewards", "advantages", "returns", "credit", "kl", "status", "stats", "moments"]


class Swept(NamedTuple):
    """What was asked for; the rest is None. ``[B, R]`` (packed ``[M]``) float32."""

    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    credit: Tensor | None = None
    kl: Tensor | None = None
    status: Tensor | None = None
    """int32 ``[B]``, bits as in ``csrc_triton.device``."""
    stats: Tensor | None = None
    """float32 ``[B, 4]``: entropy of the credit (nats), its share on the last unmasked token, raw mass, and
    ``|sum of the redistributed score - score|``."""
    moments: Tensor | None = None
    """float32 ``[B, 3]``: unmasked tokens, mean and sum of squared deviations of their advantages."""


def attention_row(layers: Sequence[Layer]) -> Tensor:
    """Mean over heads and layers of one attention row per sequence.

    Args:
        layers: as ``attnshape.AttentionInputs``, with the same tokens. ``query`` ``[B, Hq, D]`` or
            ``[B, Hq, S, D]``, packed ``[B, Hq, D]`` or ``[N, Hq, D]``; ``key`` ``[B, Hkv, S, D]``, packed
            ``[N, Hkv, D]``; any strides.

    Returns:
        ``[B, S]`` (packed ``[N]``) float32; NaN in a row with an index out of range.
    """
    key, cu = layers[0].key, layers[0].cu_seqlens
    batch = key.shape[0] if cu is None else cu.shape[0] - 1
    width = key.shape[2] if cu is None else key.shape[0]
    out = torch.empty((batch, width) if cu is None else (width,), dtype=torch.float32, device=key.device)
    shape = {"p_credit": out, "p_response_cu": cu, "n_rows": batch, "width": width}
    for i, layer in enumerate(layers):
        _average(layer, Attention(layers, None, None), i, shape)
    return out


def sweep(
    response_mask: Tensor,
    outputs: Sequence[Output],
    *,
    response_cu_seqlens: Tensor | None = None,
    score: Tensor | None = None,
    credit: Tensor | Attention | Literal["uniform", "sparse"] | None = None,
    normalization: Literal["sum_to_one", "sum_to_length", "none"] = "sum_to_one",
    row_status: Tensor | None = None,
    score_index: Tensor | Literal["last_unmasked", "last_token"] = "last_unmasked",
    beta: float = 1.0,
    score_bounds: tuple[float, float] = (-math.inf, math.inf),
    terminal_reward: Tensor | None = None,
    token_rewards: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1",
    kl_input_clip: float | None = None,
    kl_output_clip: float | None = None,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    gl: float | Tensor = 1.0,
    gl_value: float | Tensor | None = None,
    skip_masked: bool = True,
    zero_nonfinite: bool = False,
    min_mass: float,
) -> Swept:
    """From credit to rewards, advantages and returns; ``outputs`` names what is wanted (KL: if there is any).

    One launch; two where credit is attention and responses are longer than ``ONE_LAUNCH``. As many again for
    each further layer, and one for a layer whose visible keys follow from a mask.

    Args:
        response_mask: ``[B, R]``, or ``[M]`` with ``response_cu_seqlens``; any dtype. Other inputs per
            token have its shape, inputs per row are ``[B]``; any floating dtype.
        credit: raw weights; None where nothing is redistributed. It must be given where ``score`` is.
        row_status: int32 ``[B]``; a row that has one is out of range, unless all its tokens are masked.
        gl: ``gamma * lam``, a float or float32 ``[B]``; ignored without ``values``.
        gl_value: the same for the returns, where it differs.
        skip_masked: a masked token is the identity, not a step with reward and value 0.
        zero_nonfinite: a row with a non-finite output becomes 0.
        min_mass: credit that sums to less falls back to one-hot at the score's token.
    """
    if response_cu_seqlens is None:
        batch, width = response_mask.shape
    else:
        batch, width = response_cu_seqlens.shape[0] - 1, response_mask.shape[0]
    device = response_mask.device
    estimator: str | None = None if logprobs is None else kl_estimator
    if kl is not None:
        estimator = "given"
    out: dict[str, Tensor] = {}
    for name in ("credit", *outputs) if isinstance(credit, Attention) else outputs:
        if name == "kl" and estimator is None:
            continue
        if name == "status":
            out[name] = torch.empty(batch, dtype=torch.int32, device=device)
        elif name in PER_ROW:
            out[name] = torch.empty(batch, PER_ROW[name], dtype=torch.float32, device=device)
        else:
            out[name] = torch.empty(response_mask.shape, dtype=torch.float32, device=device)
    swept = Swept(**out)
    if batch == 0:
        # Tokens of no row.
        return Swept(*(None if x is None else x.zero_() for x in swept))
    if values is None:
        gl, gl_value = gamma, None
    second = gl_value is not None
    if gl_value is None:
        gl_value = gl
    weights = credit if isinstance(credit, Tensor) else None
    if isinstance(credit, Attention):
        weights = swept.credit
    shape = {
        **{f"p_{name}": x for name, x in out.items()},
        **_tokens(
            mask=response_mask,
            weights=weights,
            values=values,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            kl_in=kl,
            token_rewards=token_rewards,
        ),
        "p_score": _row(score),
        "p_score_index": _row(score_index),
        "p_terminal": _row(terminal_reward),
        "p_bootstrap": _row(bootstrap),
        "p_row_status": row_status,
        "p_response_cu": response_cu_seqlens,
        "n_rows": batch,
        "width": width,
        **_number("kl_coef", kl_coef),
        "beta": float(beta),
        "score_low": float(score_bounds[0]),
        "score_high": float(score_bounds[1]),
        "kl_input_clip": math.inf if kl_input_clip is None else float(kl_input_clip),
        "kl_output_clip": math.inf if kl_output_clip is None else float(kl_output_clip),
        "min_mass": float(min_mass),
        "gamma": float(gamma),
        **_number("gl", gl),
        **_number("gl_value", gl_value),
        "CREDIT": credit if isinstance(credit, str | None) else "given",
        "NORMALIZATION": normalization,
        "SCORE_INDEX": score_index if isinstance(score_index, str) else "explicit",
        "KL_ESTIMATOR": estimator,
        "SKIP": skip_masked,
        "UNIT": all(isinstance(x, float | int) and x == 1 for x in (gl, gl_value)),
        "TWO_RECURRENCES": second and "returns" in outputs,
        "ZERO_NONFINITE": zero_nonfinite,
        "FACTS": credit is not None or bootstrap is not None or not PER_ROW.keys().isdisjoint(out),
        "FINISH": "shape",
    }
    if isinstance(credit, Attention):
        _attend(credit, shape)
    else:
        shape["SOURCE"] = "weights" if isinstance(credit, Tensor) else None
        _sweep(shape, device)
    return swept


PER_ROW = {"status": 1, "stats": 4, "moments": 3}
"""Numbers per row of the outputs that are per row."""

ONE_LAUNCH = 2048
"""Longest response, in tokens, that the last program of a row shapes within the launch that reads the keys.

A packed batch counts as one response: how its rows divide it is known on the device only. Each further CHUNK
is some 4 microseconds (a guess) in which one program works alone; a second launch takes as long as two.
"""


def _attend(credit: Attention, shape: dict[str, Any]) -> None:
    """Everything from queries and keys to advantages."""
    *others, last = credit.layers
    if others:
        shape["p_row_status"] = torch.zeros(shape["n_rows"], dtype=torch.int32, device=last.key.device)
    for i, layer in enumerate(others):
        _average(layer, credit, i, shape)
    fused = shape["width"] <= ONE_LAUNCH
    arguments = _layer(last, credit, shape, "shape" if fused else "terms") | {"ADD": bool(others)}
    if fused:
        _launch(arguments | {"MODE": "attend", "SOURCE": "groups"})
        return
    _launch(arguments | {"MODE": "attend"})
    _sweep(arguments | {"SOURCE": "terms", "FINISH": "shape"}, last.key.device)


def _average(layer: Layer, credit: Attention, i: int, shape: dict[str, Any]) -> None:
    """Adds the ``i``-th layer's mean over heads to ``p_credit``."""
    fused = shape["width"] <= ONE_LAUNCH
    arguments = _layer(layer, credit, shape, "mean" if fused else "terms") | {"ADD": i > 0}
    if fused:
        _launch(arguments | {"MODE": "attend", "SOURCE": "groups"})
        return
    _launch(arguments | {"MODE": "attend"})
    n_tasks, chunks_per_row = _chunks(shape)
    leaders = 0 if shape["p_response_cu"] is None else shape["n_rows"]
    arguments |= {"n_tasks": n_tasks, "chunks_per_row": chunks_per_row, "n_leaders": leaders}
    _launch(arguments | {"MODE": "mean", "FINISH": "mean", "SOURCE": "terms"})


def _chunks(shape: dict[str, Any]) -> tuple[int, int]:
    """Chunks of response tokens in all, and per row of a padded batch."""
    if shape["p_response_cu"] is not None:
        return shape["width"] // CHUNK + shape["n_rows"], 0
    per_row = ceil_div(shape["width"], CHUNK)
    return shape["n_rows"] * per_row, per_row


def _sweep(shape: dict[str, Any], device: torch.device) -> None:
    batch, packed = shape["n_rows"], shape["p_response_cu"] is not None
    n_tasks, chunks_per_row = _chunks(shape)
    averaging = shape["SOURCE"] == "terms"
    if not in_chunks(batch, ceil_div(shape["width"], CHUNK), n_tasks, processors(device), averaging):
        _launch(shape | {"MODE": "rows", "n_tasks": batch, "n_leaders": 0})
        return
    workspace = {
        "p_doubles": torch.empty(DOUBLES, n_tasks, dtype=torch.float64, device=device),
        "p_ints": torch.empty(INTS, n_tasks, dtype=torch.int32, device=device),
        "p_counters": COUNTERS.take(device, 1 + 2 * batch + FLAGS.value * n_tasks),
        "chunks_per_row": chunks_per_row,
        "n_tasks": n_tasks,
        "n_leaders": batch if packed else 0,
    }
    _launch(shape | workspace | {"MODE": "chunks"})


def in_chunks(batch: int, longest: int, n_chunks: int, processors: int, averaging: bool = False) -> bool:
    """Whether rows are swept by a program per chunk, not per row.

    ``longest`` is the most chunks that a row may have. Guessed from the loads that wait for each other: alone
    with its row, a program takes 3 microseconds a chunk; sharing it, 4 for each of a chunk's two tasks, and 4
    more at the end; ``averaging`` heads takes either 6 more a chunk. Three programs fit a multiprocessor.
    """
    at_once = 3 * processors
    alone = (9 if averaging else 3) * longest * max(1.0, batch / at_once)
    shared = 4 + (7 if averaging else 4) * max(1.0, 2 * n_chunks / at_once)
    return longest > 1 and shared < alone


def _layer(layer: Layer, credit: Attention, shape: dict[str, Any], finish: str) -> dict[str, Any]:
    """Arguments of the launch that reads a layer's keys; launches the preparation that it may need."""
    query, key, cu, mask, lse = layer.query, layer.key, layer.cu_seqlens, layer.attention_mask, layer.lse
    heads, kv_heads, width = query.shape[1], key.shape[1], key.shape[-1]
    group, chunk, batch = heads // kv_heads, chunk_size(key), shape["n_rows"]
    device = key.device
    if cu is None:
        keys = key.shape[2]
        slots_per_row = ceil_div(keys, chunk)
        slots = batch * slots_per_row
        stride_kb, stride_kh, stride_kt, stride_kd = key.stride()
    else:
        keys, slots_per_row, stride_kb = key.shape[0], 0, 0
        slots = keys // chunk + batch
        stride_kt, stride_kh, stride_kd = key.stride()
    query_strides = _position_strides(query, cu is not None, keys)
    query_unit = stride_unit(*query_strides)
    key_unit = stride_unit(stride_kb, stride_kh, stride_kt)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    head_mask = _row(layer.head_mask)
    if head_mask is not None and head_mask.dtype == torch.bool:
        head_mask = head_mask.view(torch.uint8)
    index = tokens(credit.response_index)

    # Slots for the terms: one per chunk of keys, or only where a row's response can lie.
    response_cu = shape["p_response_cu"]
    term_cu, terms_per_row, term_slots, term_spare = cu, slots_per_row, slots, 1
    if credit.response_start is not None:
        term_cu = response_cu
        if response_cu is None:
            terms_per_row = ceil_div(shape["width"], chunk) + 1
            term_slots = batch * terms_per_row
        else:
            term_spare = 2
            term_slots = shape["width"] // chunk + 2 * batch
    split = chunks_per_program(slots * kv_heads, processors(device))
    splits_per_row = max(1, ceil_div(slots_per_row, split))
    if cu is None:
        n_tasks = batch * splits_per_row * kv_heads
    else:
        n_tasks = (keys // (chunk * split) + batch) * kv_heads
    position: Tensor | str | None = layer.query_position
    start = layer.key_start
    if mask is not None or isinstance(position, str):
        start, position = _prepare(layer, credit, shape, mask)
    tokens_in_all = shape["width"] * (batch if response_cu is None else 1)
    largest, total, factor = torch.empty(3, slots, heads, dtype=torch.float32, device=device)
    groups = None
    if finish != "terms":
        groups = torch.empty(kv_heads, tokens_in_all, dtype=torch.float32, device=device)
    lse_strides = (0, 0, 0)
    if lse is not None:
        lse_strides = _position_strides(lse.unsqueeze(-1), cu is not None, keys)
    half = key.element_size() < 4
    wide = key_unit > 1 and key.data_ptr() % 16 == 0
    # Parts of 16 fit registers where operands are wide, or loaded element by element. Tensor cores add 16 by
    # 16 all the same, so bits do not depend on alignment; the interpreter's products would.
    heavy = not half or max(16, padded(group)) * padded(width) > 4096
    return shape | {
        "p_query": query,
        "stride_qb": query_strides[0] // query_unit,
        "stride_qh": query_strides[1] // query_unit,
        "stride_qt": query_strides[2] // query_unit,
        "p_key": key,
        "stride_kb": stride_kb // key_unit,
        "stride_kh": stride_kh // key_unit,
        "stride_kt": stride_kt // key_unit,
        "p_cu": cu,
        "keys_width": keys,
        "p_key_start": start,
        "p_position": position,
        "p_attention_mask": mask,
        "stride_mb": 0 if mask is None else row_stride(mask),
        "stride_mt": 0 if mask is None else mask.stride(-1),
        "window": None if layer.sliding_window is None else min(layer.sliding_window, keys),
        "scaling": float(layer.scaling),
        "softcap": layer.softcap,
        "p_sinks": _row(layer.sinks),
        "p_lse": lse,
        "stride_lb": lse_strides[0],
        "stride_lh": lse_strides[1],
        "stride_lt": lse_strides[2],
        "p_head_mask": head_mask,
        "kv_heads": kv_heads,
        "n_layers": len(credit.layers),
        "p_response_start": credit.response_start,
        "p_response_index": index,
        "stride_index": row_stride(index),
        "p_largest": largest,
        "p_sum": total,
        "p_factor": factor,
        "p_terms": torch.empty(term_slots, heads, chunk, dtype=torch.float32, device=device),
        "p_groups": groups,
        "slots_per_row": slots_per_row,
        "p_term_cu": term_cu,
        "term_slots_per_row": terms_per_row,
        "split": split,
        "splits_per_row": splits_per_row,
        "p_counters": COUNTERS.take(device, batch * (kv_heads + 1)),
        "n_tasks": n_tasks,
        "n_leaders": 0 if cu is None else batch,
        "FINISH": finish,
        "TERM_SPARE": term_spare,
        "ONLY_KEPT": lse is not None and credit.response_start is not None,
        "G": group,
        "M": max(16, padded(group)),
        "D": width,
        "BLOCK_D": 16 if heavy or (not wide and not interpreted()) else min(64, max(16, padded(width))),
        "ROLL": heavy or not wide,
        "STRIDE_QD": query.stride(-1),
        "STRIDE_KD": stride_kd,
        "FAR": stride_kt * chunk >= 2**31,
        "QUERY_UNIT": query_unit,
        "KEY_UNIT": key_unit,
        "UPCAST": interpreted(),
        "KEYS": chunk,
        "FOLD": max(16, 1024 // max(16, padded(group))),
        "H": min(4, padded(group)),
        "STAGES": 2 if wide else 1,
    }


def chunk_size(key: Tensor) -> int:
    """Keys per chunk, a constant of the layer: at most 64 KB, or 32 KB of float32, lest it spill."""
    return 32 if padded(key.shape[-1]) * key.element_size() > 512 else 128


def chunks_per_program(n_chunks: int, processors: int) -> int:
    """Chunks of keys that a program reads one after the other: few enough for 8 programs per multiprocessor.

    E.g. 2 of 4096 in all (32 sequences of 2048 keys, 8 key heads) on 132 multiprocessors; at most 8.
    """
    split = 1
    while split < 8 and n_chunks >= split * 2 * 8 * processors:
        split *= 2
    return split


def _prepare(
    layer: Layer, credit: Attention, shape: dict[str, Any], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """First visible key and position of each row's query, from a mask or the response."""
    cu, position, batch = layer.cu_seqlens, layer.query_position, shape["n_rows"]
    index = tokens(credit.response_index)
    start_out, position_out = torch.empty(2, batch, dtype=torch.int64, device=layer.key.device)
    prepare_kernel[(batch,)](
        start_out,
        position_out,
        cu,
        batch,
        layer.key.shape[2] if cu is None else layer.key.shape[0],
        layer.key_start,
        position if isinstance(position, Tensor) else None,
        mask,
        0 if mask is None else row_stride(mask),
        0 if mask is None else mask.stride(-1),
        shape.get("p_mask"),
        shape.get("stride_mask", 0),
        credit.response_start,
        index,
        row_stride(index),
        shape["p_response_cu"],
        shape["width"],
        LAST_RESPONSE=position == "last_response",
        SCAN=SCAN,
        **COMPILER,
    )
    return start_out, position_out


def _launch(arguments: dict[str, Any]) -> None:
    programs = arguments["n_tasks"] * (1 + (arguments["MODE"] == "chunks" and arguments["FACTS"]))
    programs += arguments["n_leaders"]
    if arguments["p_response_cu"] is not None and arguments["FINISH"] != "terms":
        programs += 1
    if not programs:
        return
    try:
        LAUNCHER(programs, arguments, COMPILER | _registers(arguments))
    except BaseException:
        COUNTERS.discard(next(x.device for x in arguments.values() if isinstance(x, Tensor)))
        raise


def _registers(arguments: dict[str, Any]) -> dict[str, int]:
    """Three programs on a multiprocessor; two where that would spill."""
    from_terms = arguments["MODE"] != "attend" and arguments.get("SOURCE") == "terms"
    many = arguments.get("ROLL") or from_terms or arguments.get("TWO_RECURRENCES")
    return registers(255 if many else 168)


def _default(name: str) -> Any:
    if name.startswith("p_") or name in ("window", "softcap", "SOURCE", "CREDIT", "KL_ESTIMATOR"):
        return None
    return 0.0 if name in FLOATS else 0


FLOATS = (
    *("scaling", "kl_coef", "beta", "min_mass", "gamma", "gl", "gl_value"),
    *("score_low", "score_high", "kl_input_clip", "kl_output_clip"),
)
DEFAULTS = {name: _default(name) for name in shape_kernel.arg_names} | {
    "NORMALIZATION": "none",
    "SCORE_INDEX": "last_unmasked",
    "CHUNK": CHUNK,
}
"""Arguments of the kernel that a launch leaves out."""
LAUNCHER = Launcher(shape_kernel, DEFAULTS, ("p_query", "p_key"))


def _tokens(**given: Tensor | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, x in given.items():
        x = tokens(x)
        if x is not None:
            out[f"p_{name}"], out[f"stride_{name}"] = x, row_stride(x)
    return out


def _row(x: Tensor | str | None) -> Tensor | None:
    return x.contiguous() if isinstance(x, Tensor) else None


def _number(name: str, x: float | Tensor) -> dict[str, Any]:
    """A tensor to be read on the device, or a number."""
    return {f"p_{name}": x.contiguous()} if isinstance(x, Tensor) else {name: float(x)}


def _position_strides(x: Tensor, packed: bool, keys: int) -> tuple[int, int, int]:
    """Strides per row, head and position; 0 per position if ``x`` holds one row per sequence."""
    if not packed:
        return (x.stride(0), x.stride(1), x.stride(2) if x.ndim == 4 else 0)
    return (0, x.stride(1), x.stride(0)) if x.shape[0] == keys else (x.stride(0), x.stride(1), 0)
