"""What the host passes to kernels, in groups: tensors (``p_``), numbers, and None where there is nothing.

Groups of constants have names in capitals and are passed whole, as one ``constexpr``.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Response(NamedTuple):
    """Where the response tokens of all rows lie."""

    p_cu: Any = None  # bounds of packed rows
    n_rows: Any = 0
    width: Any = 0  # R, or M in all
    p_mask: Any = None  # [B, R], or [M]; None: every token counts
    stride_mask: Any = 0
    p_start: Any = None  # [B], of the first token among the row's keys
    p_index: Any = None  # [B, R], or [M]: of each token, or None
    stride_index: Any = 0


class Axis(NamedTuple):
    """Where the keys of all rows lie, and which of them a row's query sees."""

    p_cu: Any
    n_rows: Any
    width: Any  # S, or N in all
    p_start: Any = None  # [B], the first visible one
    p_position: Any = None  # [B], of the query; None: the last key's
    p_mask: Any = None  # [B, S], or [N]
    stride_mb: Any = 0
    stride_mt: Any = 0
    window: Any = None


class Layer(NamedTuple):
    """Queries and keys of one layer; their strides are counted in ``QUERY_UNIT`` and ``KEY_UNIT``."""

    p_query: Any
    stride_qb: Any
    stride_qh: Any
    stride_qt: Any  # 0 where there is one query per row
    p_key: Any
    stride_kb: Any
    stride_kh: Any
    stride_kt: Any
    kv_heads: Any
    scaling: Any
    softcap: Any
    n_layers: Any = 1
    p_sinks: Any = None  # [Hq]
    p_head_mask: Any = None  # [Hq]
    p_lse: Any = None
    stride_lb: Any = 0
    stride_lh: Any = 0
    stride_lt: Any = 0
    p_mask_row: Any = None  # what the layer's own mask adds to the scores
    stride_ab: Any = 0
    stride_ah: Any = 0
    stride_at: Any = 0


class Left(NamedTuple):
    """What the programs that read keys leave to those that finish."""

    p_partials: Any  # [Hq, slots, 2], of FEW keys: the largest score, and the sum of the terms
    slots: Any
    p_heads: Any  # [B, Hq, 2]: the score that those of the row are relative to, and the share of its term
    p_scores: Any  # [score slots, Hq, KEYS]
    p_groups: Any  # [Hkv, tokens], each key head's share of the mean at the response tokens; None: not made
    slots_per_row: Any  # of KEYS
    p_score_cu: Any
    score_slots_per_row: Any


class Inputs(NamedTuple):
    """Of tokens [B, R] or [M], and of rows [B]."""

    p_weights: Any = None
    stride_weights: Any = 0
    p_values: Any = None
    stride_values: Any = 0
    p_logprobs: Any = None
    stride_logprobs: Any = 0
    p_ref_logprobs: Any = None
    stride_ref_logprobs: Any = 0
    p_kl: Any = None
    stride_kl: Any = 0
    p_token_rewards: Any = None
    stride_token_rewards: Any = 0
    p_score: Any = None
    p_score_index: Any = None
    p_terminal: Any = None
    p_bootstrap: Any = None
    p_row_status: Any = None  # rows out of range, as another launch found them


class Settings(NamedTuple):
    """Numbers; those that may be on the device are read there where a tensor is given."""

    p_kl_coef: Any
    kl_coef: Any
    dense_share: Any
    score_low: Any
    score_high: Any
    kl_input_clip: Any
    kl_output_clip: Any
    min_mass: Any
    gamma: Any
    p_gl: Any
    gl: Any
    p_gl_value: Any
    gl_value: Any


class Outputs(NamedTuple):
    """Of tokens [B, R] or [M], and of rows; None where not asked for."""

    p_rewards: Any = None
    p_advantages: Any = None
    p_returns: Any = None
    p_credit: Any = None
    p_kl: Any = None
    p_status: Any = None  # [B]
    p_stats: Any = None  # [B, 4]
    p_moments: Any = None  # [B, 3]


class Grid(NamedTuple):
    """How programs divide the work, and the counters by which they find each other."""

    p_counters: Any
    n_tasks: Any
    n_leaders: Any = 0  # programs of packed rows whose bounds are not sound
    chunks_per_row: Any = 0  # of tokens
    split: Any = 1  # chunks of keys that a program reads
    step: Any = 1  # of how many a row's are a multiple; None: of one, and programs read on in the next row
    slots_per_row: Any = 1  # so many times as many
    p_doubles: Any = None  # what the programs of a row tell each other: float64 [DOUBLES, chunks]
    p_ints: Any = None  # and int32 [INTS, chunks]


# Of columns and rollouts


class Found(NamedTuple):
    """What is found out about the response tokens once."""

    p_facts: Any  # int64 [B, 5]: unmasked tokens; lowest and highest position; the last's, the last asker's
    p_status: Any  # [B]
    p_rank: Any  # [tokens]: place among the unmasked tokens of the row, or -1
    p_order: Any  # [tokens]: position of the unmasked tokens of the row, one after the other
    p_out: Any  # [tokens], the result


class Entries(NamedTuple):
    """Queries that ask, and keys that are asked about, of all rows."""

    p_rows: Any  # int64 [B, 7], each what ``entries_of_row`` says
    p_order: Any  # [total], position of each entry; None: they follow each other
    p_weight: Any  # [total], of each query; None: 1
    p_cu: Any
    n_rows: Any
    slots_per_row: Any
    total: Any


class PerHead(NamedTuple):
    """A number per head and entry."""

    p_x: Any  # [Hq, total]
    total: Any
    heads: Any
    p_head_mask: Any


class Weights(NamedTuple):
    """Of keys and heads, [B, Hq, S] or [N, Hq]."""

    p_w: Any
    stride_wb: Any
    stride_wh: Any
    stride_wt: Any


class Residual(NamedTuple):
    """What a position weighs itself, [B, S] or [N]."""

    p_norm: Any
    stride_xb: Any
    stride_xt: Any


# Of whitening


class Batch(NamedTuple):
    """Tokens of a whole batch, [n / width, width]."""

    p_x: Any
    stride_x: Any
    p_mask: Any
    stride_mask: Any
    width: Any
    n: Any  # in UNIT
    blocks: Any  # of a program


class Whitening(NamedTuple):
    p_moments: Any  # [parts, 3]
    parts: Any
    bessel: Any
    eps: Any
    least: Any
    eps_of_std: Any
    shift_mean: Any
    whiten_masked: Any  # whether masked tokens are whitened too; else they become 0


# Constants


class Product(NamedTuple):
    """How queries and keys are multiplied."""

    G: int  # query heads of a key head
    M: int  # padded to
    D: int
    BLOCK_D: int  # a part of the width
    STRIDE_QD: int
    STRIDE_KD: int
    QUERY_UNIT: int  # what strides are counted in
    KEY_UNIT: int
    FAR: bool  # whether keys of a chunk lie so far apart that 32 bits do not count it
    UPCAST: bool
    STAGES: int  # parts, or chunks, on their way at once, and one
    FOLD: int  # partials folded at once
    ONLY_KEPT: bool  # whether only keys that may be a response token's are read
    PTX: bool  # whether the GPU has PTX's instructions


class Mean(NamedTuple):
    """How scores become a mean over heads, and of which keys they are."""

    CAUSAL: bool
    G: int
    H: int  # heads read at once
    KEYS: int  # of a chunk
    SPARE: int  # slots of scores of a packed row, to round up
    ADD: bool = False  # whether other layers' mean is there already


class Rules(NamedTuple):
    """What is computed from credit."""

    CHUNK: int  # tokens
    WIDE: bool = False  # whether rows begin at multiples of 4 tokens and 16 bytes of float32, and so end
    STAGES: int = 3  # chunks of a row whose tokens are on their way at once, to shared memory, and one
    TOGETHER: bool = False  # whether lanes exchange both numbers of a step of the recurrence at once
    CREDIT: str | None = None  # None: nothing is redistributed
    EVEN: bool = False  # whether the score is every token's, and what credit does not spread lies evenly
    NORMALIZATION: str = "none"
    SCORE_INDEX: str = "last_unmasked"
    KL_ESTIMATOR: str | None = None
    KL_CLIPPED: bool = False
    SKIP: bool = True  # whether a masked token is the identity
    UNIT: bool = False  # whether every coefficient of the recurrence is 1
    TWO_RECURRENCES: bool = False
    ZERO_NONFINITE: bool = False
    PTX: bool = False  # whether the GPU has PTX's instructions
    DEPENDENT: bool = False  # whether a launch begins before the one that left it something has ended


class Tiles(NamedTuple):
    """How all queries and keys are multiplied, BLOCK rows of one with STEP of the other at a time."""

    CAUSAL: bool
    G: int  # query heads of a key head
    D: int
    BLOCK_D: int  # a part of the width
    STRIDE_QD: int
    STRIDE_KD: int
    QUERY_UNIT: int  # what strides are counted in
    KEY_UNIT: int
    UPCAST: bool
    BLOCK: int
    STEP: int
