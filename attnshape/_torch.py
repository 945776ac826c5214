"""The operations without loops over tokens, in PyTorch: the backend of CPUs, and what a kernel has to beat.

Arguments are checked by ``attnshape.ops``. Packed layouts are padded first and packed again last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attnshape.types import (
    MIN_MASS,
    AttentionInputs,
    CreditName,
    EpsMode,
    MaskSemantics,
    Normalization,
    Response,
    RowStats,
    ScoreIndex,
    ShapedRewards,
    ShapingConfig,
    Status,
    TokenInputs,
    compute_dtype,
    decay,
    float32_rounded,
)

KEY_CHUNK = 1024
"""Keys converted to the accumulation dtype at once."""
SCORE_ELEMENTS = 1 << 24
"""Attention weights held at once while columns are summed."""
SCAN_CHUNK = 32
"""Tokens of the recurrence that one triangular product covers."""
BLOCK = 1 << 16
"""Tokens that a CPU thread shapes at once: what is held of them stays in its cache."""


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Where a process may have float32 products rounded (tf32, bfloat16), float64 is out of reach of that."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    lowered = device.type != "cpu" or precision in ("bf16", "tf32")
    return torch.float64 if lowered and dtype == torch.float32 else dtype


# Packed and padded -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Packing:
    """Where the tokens of a packed axis lie in its padded form."""

    index: Tensor  # [B, L], clamped
    inside: Tensor  # [B, L]
    valid: Tensor  # [B]; what lies between the bounds of another row is of no use

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int) -> _Packing:
        bounds = cu_seqlens.long()
        lo, hi = bounds[:-1], bounds[1:]
        lowest_after = bounds.flip(0).cummin(0).values.flip(0)
        crossed = (bounds.cummax(0).values[:-1] > lo) | (lowest_after[1:] < hi)
        valid = (lo >= 0) & (lo <= hi) & (hi <= total) & ~crossed
        lo, hi = (x.clamp(0, total) for x in (torch.minimum(lo, hi), torch.maximum(lo, hi)))
        longest = int((hi - lo).max()) if len(lo) else 0
        offsets = torch.arange(longest, device=lo.device)
        index = (lo[:, None] + offsets).clamp(0, max(total - 1, 0))
        return cls(index, offsets < (hi - lo)[:, None], valid)

    def pad(self, x: Tensor) -> Tensor:
        """``[M, ...]`` to ``[B, L, ...]``."""
        if not len(x):
            return x.new_zeros(*self.index.shape, *x.shape[1:])
        return x[self.index]

    def pack(self, x: Tensor, total: int) -> Tensor:
        """``[B, L]`` to ``[M]``; 0 at tokens of no sequence."""
        out = x.new_zeros(total)
        out[self.index[self.inside]] = x[self.inside]
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class _Mask:
    """Unmasked tokens of some rows; on a CPU integers are several times as fast as booleans."""

    live: Tensor  # [n, R] bool

    @functools.cached_property
    def full(self) -> bool:
        return not self.live.numel() or bool(self.live.view(torch.uint8).amin())

    @functools.cached_property
    def kept(self) -> Tensor:
        """int32 ``[n, R]``: every bit set where a token is unmasked, none elsewhere."""
        return self.live.view(torch.int8).neg().to(torch.int32)

    def select(self, x: Tensor) -> Tensor:
        """``x`` where unmasked, else 0; ``x`` itself where nothing is masked."""
        if self.full:
            return x
        kept = self.kept.to(torch.int64) if x.element_size() == 8 else self.kept
        return (x.view(kept.dtype) & kept).view(x.dtype)

    @functools.cached_property
    def count(self) -> Tensor:
        """Unmasked tokens of each row, ``[n]``."""
        return self.live.view(torch.uint8).sum(1, dtype=torch.int32)

    @functools.cached_property
    def last(self) -> Tensor:
        """Last unmasked token of each row, ``[n]``; -1 if there is none."""
        rows, width = self.live.shape
        if self.full:
            return torch.full((rows,), width - 1, device=self.live.device)
        t = torch.arange(1, width + 1, dtype=torch.int32, device=self.live.device)
        return (self.kept & t).amax(1).long() - 1

    @property
    def interrupted(self) -> bool:
        """Whether an unmasked token follows a masked one."""
        if self.full or self.live.shape[1] < 2:
            return False
        tokens = self.live.view(torch.uint8)
        return bool((tokens[:, 1:] > tokens[:, :-1]).view(torch.uint8).amax())


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Response tokens in padded form."""

    mask: Tensor  # [B, R], any dtype
    start: Tensor | None
    index: Tensor | None
    packing: _Packing | None
    shape: torch.Size

    @classmethod
    def of(cls, response: Response) -> _Rows:
        mask, index = response.mask, response.index
        if response.cu_seqlens is None:
            return cls(mask, response.start, index, None, mask.shape)
        packing = _Packing.of(response.cu_seqlens, mask.shape[0])
        return cls(
            packing.pad(mask.bool()) & packing.inside,
            response.start,
            None if index is None else packing.pad(index),
            packing,
            mask.shape,
        )

    @functools.cached_property
    def live(self) -> Tensor:
        """``[B, R]`` bool."""
        return self.mask.bool()

    def pad(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.packing is None else self.packing.pad(x)

    @property
    def invalid(self) -> Tensor:
        """``[B]``: rows whose bounds are out of range."""
        if self.packing is None:
            return torch.zeros(len(self.mask), dtype=torch.bool, device=self.mask.device)
        return ~self.packing.valid

    def restore(self, x: Tensor) -> Tensor:
        return x if self.packing is None else self.packing.pack(x, self.shape[0])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, masked ones too, ``[B]``."""
        if self.packing is not None:
            return self.packing.inside.sum(1)
        return torch.full((len(self.mask),), self.mask.shape[1], device=self.mask.device)

    def key_positions(self) -> Tensor:
        """``[B, R]``; -1 where a token has no key."""
        if self.index is not None:
            return self.index.long()
        assert self.start is not None
        return self.start.long()[:, None] + torch.arange(self.mask.shape[1], device=self.mask.device)


def _in_blocks(compute: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> list[Tensor]:
    """What ``compute`` returns of all rows, called on some rows of the arguments at a time.

    Tensors of the arguments and of the results have rows first; the first argument is ``[B, R]``. Results
    have memory of their own.
    """
    rows, width = arguments[0].shape
    step = rows
    if arguments[0].device.type == "cpu":
        step = torch.get_num_threads() * BLOCK // max(width, 1)
    if step >= rows:
        return list(compute(*arguments))
    whole: list[Tensor] = []
    for lo in range(0, rows, max(step, 1)):
        block = slice(lo, lo + max(step, 1))
        parts = compute(*[x[block] if isinstance(x, Tensor) and x.ndim else x for x in arguments])
        whole = whole or [x.new_empty(rows, *x.shape[1:]) for x in parts]
        for out, part in zip(whole, parts, strict=True):
            out[block] = part
    return whole


# Attention -------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One layer in padded form."""

    inputs: AttentionInputs  # never packed
    attended: Tensor  # [B, S] bool
    position: Tensor  # [B], clamped
    lengths: Tensor  # [B]
    invalid: Tensor  # [B] bool
    packing: _Packing | None
    dtype: torch.dtype


def _layer(inputs: AttentionInputs, last_response: Tensor | None = None) -> _Layer:
    dtype = compute_dtype(inputs.query, inputs.key)
    packing = None
    if inputs.cu_seqlens is not None:
        total = inputs.key.shape[0]
        packing = _Packing.of(inputs.cu_seqlens, total)
        query, lse, mask = inputs.query, inputs.lse, inputs.attention_mask
        if inputs.has_all_queries:
            query = packing.pad(query).transpose(1, 2)
        if lse is not None and lse.shape[0] == total and inputs.has_all_queries:
            lse = packing.pad(lse).transpose(1, 2)
        inside = packing.inside if mask is None else packing.inside & (packing.pad(mask) != 0)
        key = packing.pad(inputs.key).transpose(1, 2)
        inputs = dataclasses.replace(
            inputs, query=query, key=key, lse=lse, attention_mask=inside, cu_seqlens=None
        )
    batch, length = inputs.key.shape[0], inputs.key.shape[2]
    device = inputs.key.device
    t = torch.arange(length, device=device)
    lengths = torch.full((batch,), length, device=device) if packing is None else packing.inside.sum(1)
    invalid = torch.zeros(batch, dtype=torch.bool, device=device) if packing is None else ~packing.valid
    attended = torch.ones(batch, length, dtype=torch.bool, device=device)
    if inputs.attention_mask is not None:
        attended &= inputs.attention_mask != 0
    if inputs.key_start is not None:
        start = inputs.key_start.long()
        attended &= t >= start[:, None]
        invalid |= (start < 0) | (start > lengths)
    if isinstance(inputs.query_position, Tensor):
        position = inputs.query_position.long()
    elif inputs.query_position == "last_response":
        assert last_response is not None
        position = last_response
    else:
        position = (attended * t).amax(1) if length else torch.zeros(batch, dtype=torch.long, device=device)
    invalid |= (lengths > 0) & ((position < 0) | (position >= lengths))
    return _Layer(inputs, attended, position.clamp(0, max(length - 1, 0)), lengths, invalid, packing, dtype)


def _attention(layer: _Layer, positions: Tensor) -> Tensor:
    """``a[h, s, t]`` of the queries at ``positions [B, n]``: ``[B, Hq, n, S]``, 0 where not visible."""
    inputs, dtype = layer.inputs, layer.dtype
    key = inputs.key
    batch, kv_heads, length, width = key.shape
    heads = inputs.query.shape[1]
    work = _product_dtype(dtype, key.device)
    rows, n = torch.arange(batch, device=key.device)[:, None], positions.shape[1]
    if inputs.query.ndim == 3:
        query = inputs.query[:, :, None]
    else:
        query = inputs.query.transpose(1, 2)[rows, positions].transpose(1, 2)  # [B, Hq, n, D]
    query = query.to(work).reshape(batch, kv_heads, heads // kv_heads * n, width) * inputs.scaling
    chunks = [
        query @ key[:, :, lo : lo + KEY_CHUNK].to(work).transpose(-1, -2)
        for lo in range(0, length, KEY_CHUNK)
    ]
    scores = torch.cat(chunks, -1).to(dtype) if chunks else query.new_zeros(*query.shape[:3], 0, dtype=dtype)
    scores = scores.reshape(batch, heads, n, length)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    t = torch.arange(length, device=key.device)
    distance = positions[:, :, None] - t  # [B, n, S]
    visible = layer.attended[:, None] & (distance >= 0)
    if inputs.sliding_window is not None:
        visible &= distance < inputs.sliding_window
    visible = visible[:, None]  # [B, 1, n, S]
    scores = scores.masked_fill(~visible, -math.inf)
    sinks = None if inputs.sinks is None else inputs.sinks.to(dtype)[None, :, None, None]
    if inputs.lse is not None:
        lse = inputs.lse.to(dtype)
        lse = lse[:, :, None] if lse.ndim == 2 else lse.transpose(1, 2)[rows, positions].transpose(1, 2)
        lse = lse[..., None]  # [B, Hq, n, 1]
        probs = torch.exp(scores - (lse if sinks is None else torch.logaddexp(lse, sinks)))
    elif sinks is not None:
        sinks = sinks.expand(batch, heads, n, 1)
        probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return probs.masked_fill(~visible, 0.0)


def _chosen(inputs: AttentionInputs, x: Tensor) -> Tensor:
    """``x`` ([B, Hq, ...]), 0 in heads that do not count."""
    if inputs.head_mask is None:
        return x
    return x.masked_fill((inputs.head_mask == 0).view(-1, *[1] * (x.ndim - 2)), 0.0)


def _mean_over_heads(inputs: AttentionInputs, probs: Tensor) -> Tensor:
    """``[B, Hq, ...]`` to ``[B, ...]``."""
    if inputs.head_mask is None:
        return probs.mean(1)
    return _chosen(inputs, probs).sum(1) / (inputs.head_mask != 0).sum().clamp(min=1)


def _head_mean(
    inputs: Sequence[AttentionInputs], last_response: Tensor | None
) -> tuple[Tensor, _Layer, Tensor]:
    """Mean over layers and heads of the attention rows ``[B, S]``, the first layer, and the invalid rows."""
    layers = [_layer(x, last_response) for x in inputs]
    rows = [_mean_over_heads(x.inputs, _attention(x, x.position[:, None])[:, :, 0]) for x in layers]
    mean = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
    invalid = torch.stack([layer.invalid for layer in layers]).any(0)
    return mean, layers[0], invalid


def attention_row(inputs: Sequence[AttentionInputs]) -> Tensor:
    row, layer, invalid = _head_mean(inputs, None)
    row = row.masked_fill(invalid[:, None], math.nan)
    return row if layer.packing is None else layer.packing.pack(row, inputs[0].key.shape[0])


def _positions_in_range(rows: _Rows, positions: Tensor, lowest: int, lengths: Tensor) -> Tensor:
    """``[B]``: whether every unmasked token of the row lies among its keys."""
    outside = (positions < lowest) | (positions >= lengths[:, None])
    return ~(outside & rows.live).any(1)


def _lowest_position(rows: _Rows) -> int:
    return -1 if rows.start is None else 0


def _at_response(
    column: Tensor, rows: _Rows, positions: Tensor, invalid: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights over keys ``[B, S]`` read at the response tokens ``[B, R]``, and the invalid rows."""
    invalid = rows.invalid | invalid | ~_positions_in_range(rows, positions, _lowest_position(rows), lengths)
    column = torch.cat([column, column.new_zeros(len(column), 1)], 1)  # position -1 is nowhere
    nowhere = column.shape[1] - 1
    inside = (positions >= 0) & (positions < nowhere)
    raw = column.gather(1, torch.where(inside, positions, nowhere))
    raw = raw.masked_fill(~rows.live, 0.0)
    return raw.masked_fill(rows.live & invalid[:, None], math.nan), invalid & rows.live.any(1)


def _last_response(rows: _Rows, positions: Tensor) -> Tensor:
    if not positions.shape[1]:
        return positions.new_full((len(positions),), -1)
    return positions.gather(1, _Mask(rows.live).last.clamp(min=0)[:, None])[:, 0]


def _raw_credit(inputs: Sequence[AttentionInputs], rows: _Rows) -> tuple[Tensor, Tensor]:
    """Head mean of the attention at the response tokens, ``[B, R]``, and the rows that are out of range."""
    positions = rows.key_positions()
    attention, layer, invalid = _head_mean(inputs, _last_response(rows, positions))
    return _at_response(attention, rows, positions, invalid, layer.lengths)


def _at(index: Tensor, width: int) -> Tensor:
    """``index`` ([n]) for ``gather`` and ``scatter`` along rows, ``[n, 1]``; ``[n, 0]`` if they are empty."""
    return index.clamp(0, max(width - 1, 0))[:, None][:, :width]


def _one_hot(amount: Tensor, score_at: Tensor, width: int) -> Tensor:
    """``amount`` ([n]) at the score's token, 0 elsewhere."""
    return amount.new_zeros(len(amount), width).scatter_(1, _at(score_at, width), amount[:, None])


def _normalize(
    raw: Tensor, mask: _Mask, score_at: Tensor, on_score: Tensor, normalization: Normalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Credit ``[n, R]``, its raw mass ``[n]``, and the rows that fell back to ``sparse``.

    Args:
        score_at, on_score: the score's token, and whether it is unmasked, ``[n]``.
    """
    raw = mask.select(raw)
    mass = raw.sum(1, dtype=torch.float64)
    if normalization == "none":
        return raw.clone(), mass, torch.zeros_like(mass, dtype=torch.bool)
    fallback = mass < MIN_MASS
    total = mask.count.double() if normalization == "sum_to_length" else torch.ones_like(mass)
    credit = raw * (total / mass).masked_fill(fallback, 0.0).to(raw.dtype)[:, None]
    credit.scatter_add_(
        1, _at(score_at, raw.shape[1]), (total * (fallback & on_score)).to(raw.dtype)[:, None]
    )
    return credit, mass, fallback


def _normalized(raw: Tensor, rows: _Rows, normalization: Normalization) -> Tensor:
    mask = _Mask(rows.live)
    credit, _, _ = _normalize(raw, mask, mask.last, mask.count > 0, normalization)
    return rows.restore(mask.select(credit))


def attention_credit(
    inputs: Sequence[AttentionInputs], response: Response, normalization: Normalization
) -> Tensor:
    rows = _Rows.of(response)
    return _normalized(_raw_credit(inputs, rows)[0], rows, normalization)


def _query_chunk(layer: _Layer) -> int:
    """Queries whose attention over all keys fits the element budget."""
    batch, _, length, _ = layer.inputs.key.shape
    return max(1, SCORE_ELEMENTS // max(1, batch * layer.inputs.query.shape[1] * length))


def attention_column_credit(
    inputs: AttentionInputs,
    response: Response,
    variant: Literal["mean", "last"],
    shift: Literal[0, 1],
    normalization: Normalization,
) -> Tensor:
    rows = _Rows.of(response)
    positions = rows.key_positions()
    layer = _layer(inputs, _last_response(rows, positions))
    batch, width = rows.live.shape
    # The unmasked tokens of each row, moved to its front: queries and targets are counted among them.
    rank = (rows.live.cumsum(1) - 1).clamp(min=0)
    order = torch.zeros_like(positions).scatter_add_(1, rank, torch.where(rows.live, positions, 0))
    count = rows.live.sum(1, keepdim=True)
    t = torch.arange(width, device=rank.device)
    queries = count - shift
    asking = (t < queries) if variant == "mean" else (t == queries - 1)  # [B, R]
    keys = layer.inputs.key.shape[2]
    columns = torch.zeros(batch, keys, dtype=layer.dtype, device=rank.device)
    step = _query_chunk(layer)
    for lo in range(0, width, step):
        at = order[:, lo : lo + step].clamp(0, max(keys - 1, 0))
        weights = _mean_over_heads(inputs, _attention(layer, at))  # [B, n, S]
        columns += weights.masked_fill(~asking[:, lo : lo + step, None], 0.0).sum(1)
    invalid = rows.invalid | layer.invalid | ~_positions_in_range(rows, positions, 0, layer.lengths)
    weights = torch.cat([columns, columns.new_zeros(batch, 1)], 1).gather(1, order.clamp(0, keys))
    if variant == "mean":
        weights = weights / (queries - t).clamp(min=1)
    weights = weights.masked_fill(t >= queries, 0.0)
    if shift:
        weights = torch.nn.functional.pad(weights, (shift, 0))[:, :width]
    raw = weights.gather(1, rank).masked_fill(~rows.live, 0.0)
    raw = raw.masked_fill(rows.live & invalid[:, None], math.nan)
    return _normalized(raw, rows, normalization)


def attention_rollout(
    layers: Sequence[AttentionInputs],
    response: Response,
    value_norms: Sequence[Tensor] | None,
    residual_norms: Sequence[Tensor] | None,
    normalization: Normalization,
) -> Tensor:
    rows = _Rows.of(response)
    positions = rows.key_positions()
    last = _last_response(rows, positions)
    padded = [_layer(x, last) for x in layers]
    top = padded[-1]
    batch, length = top.attended.shape
    t = torch.arange(length, device=last.device)
    r = (t == top.position[:, None]).to(top.dtype)
    for i in reversed(range(len(padded))):
        layer = padded[i]
        plain = value_norms is None or residual_norms is None
        if not plain:
            assert value_norms is not None
            assert residual_norms is not None
            norms, residual = value_norms[i], residual_norms[i]
            if layer.packing is not None:
                norms, residual = layer.packing.pad(norms).transpose(1, 2), layer.packing.pad(residual)
            norms = _chosen(layer.inputs, norms.to(layer.dtype)).masked_fill(~layer.attended[:, None], 0.0)
            residual = residual.to(layer.dtype)
        below = torch.zeros_like(r)
        step = _query_chunk(layer)
        for lo in range(0, length, step):
            at = t[lo : lo + step].expand(batch, -1)
            attention, above = _attention(layer, at), r[:, lo : lo + step]
            asked = (above != 0)[..., None]  # a query that carries nothing adds nothing, NaN included
            if plain:
                moved = _mean_over_heads(layer.inputs, attention).masked_fill(~asked, 0.0)
                below += torch.einsum("bs,bst->bt", above, moved) / 2
                below[:, lo : lo + step] += above / 2
                continue
            moved = torch.einsum("bhst,bht->bst", _chosen(layer.inputs, attention), norms)
            moved = moved.masked_fill(~asked, 0.0)
            kept = residual[:, lo : lo + step]
            share = (above / (moved.sum(-1) + kept)).masked_fill(above == 0, 0.0)
            below += torch.einsum("bs,bst->bt", share, moved)
            below[:, lo : lo + step] += (share * kept).masked_fill(share == 0, 0.0)
        r = below
    invalid = torch.stack([layer.invalid for layer in padded]).any(0)
    raw, _ = _at_response(r, rows, positions, invalid, top.lengths)
    return _normalized(raw, rows, normalization)


# Rewards ---------------------------------------------------------------------------------------------


def _kl(tokens: TokenInputs, config: ShapingConfig, mask: _Mask, dtype: torch.dtype) -> Tensor | None:
    if tokens.kl is not None:
        return mask.select(tokens.kl.to(dtype)).clone()
    if tokens.logprobs is None or tokens.ref_logprobs is None:
        return None
    k1 = mask.select(tokens.logprobs.to(dtype) - tokens.ref_logprobs.to(dtype))
    if config.kl_input_clip is not None:
        k1 = k1.clamp(-config.kl_input_clip, config.kl_input_clip)
    if config.kl_estimator == "k1":
        kl = k1
    elif config.kl_estimator == "abs":
        kl = k1.abs()
    elif config.kl_estimator == "k2":
        kl = k1.square() / 2
    else:
        kl = torch.expm1(-k1) + k1
    if config.kl_output_clip is not None:
        kl = kl.clamp(-config.kl_output_clip, config.kl_output_clip)
    return kl


class _Shaped(NamedTuple):
    """What is found of some rows."""

    rewards: Tensor  # [n, R]
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    kl: Tensor
    mass: Tensor  # [n], as all that follows
    tokens: Tensor
    inside: Tensor  # the score's token is among the row's
    on_score: Tensor  # and is unmasked
    fallback: Tensor
    finite: Tensor
    error: Tensor
    entropy: Tensor
    last_share: Tensor
    moments: Tensor  # [n, 3]


def _shape_rows(
    mask: Tensor,
    lengths: Tensor,
    score: Tensor,
    raw: Tensor | None,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    score_index: ScoreIndex | Tensor,
    *given: Tensor | float | None,
    config: ShapingConfig,
    source: object,
    dtype: torch.dtype,
) -> _Shaped:
    live, tokens, width = _Mask(mask.bool()), TokenInputs(*given), mask.shape[1]  # type: ignore[arg-type]
    count = live.count
    if isinstance(score_index, Tensor):
        score_at = score_index.long()
    else:
        score_at = live.last if score_index == "last_unmasked" else lengths - 1
    inside = (score_at >= 0) & (score_at < lengths)
    at_score = _at(score_at, width)
    on_score = inside & live.live.gather(1, at_score).any(1)

    if raw is not None:
        weights, mass, fallback = _normalize(raw.to(dtype), live, score_at, on_score, config.normalization)
    else:
        total = count if config.normalization == "sum_to_length" else torch.ones_like(count)
        mass, fallback = torch.zeros_like(count, dtype=torch.float64), torch.zeros_like(on_score)
        if source == "uniform":
            weights = live.select((total / count).to(dtype)[:, None].expand(mask.shape))
        else:
            weights = _one_hot((total * on_score).to(dtype), score_at, width)

    def to_score(x: Tensor) -> Tensor:
        """``x`` ([n]) where the score's token is unmasked."""
        return x.to(dtype).masked_fill(~on_score, 0.0)[:, None]

    score = score.to(dtype).clamp(*config.score_bounds)
    beta = config.share(source)
    rewards = weights * (beta * score)[:, None]
    rewards.scatter_add_(1, at_score, to_score((1 - beta) * score))
    error = (rewards.sum(1, dtype=torch.float64) - score).abs()
    if tokens.terminal_reward is not None:
        rewards.scatter_add_(1, at_score, to_score(tokens.terminal_reward))
    if tokens.token_rewards is not None:
        rewards += tokens.token_rewards.to(dtype)
    kl = _kl(tokens, config, live, dtype)
    if kl is not None:
        rewards -= (tokens.kl_coef.to(kl) if isinstance(tokens.kl_coef, Tensor) else tokens.kl_coef) * kl
    rewards = live.select(rewards)
    advantages, returns = _gae(
        live, rewards, tokens.values, tokens.bootstrap, config.gamma, lam, lam_value, config.mask_semantics
    )

    moments = _moments(advantages, live)
    finite = moments[:, 1].isfinite() & returns.sum(1, dtype=torch.float64).isfinite()
    total = weights.sum(1, dtype=torch.float64)
    logs = weights.clamp(min=torch.finfo(dtype).tiny).log_()
    entropy = total.log() - logs.mul_(weights).sum(1, dtype=torch.float64) / total
    last_share = weights.gather(1, _at(live.last, width)).sum(1) / total
    return _Shaped(
        rewards,
        advantages,
        returns,
        weights,
        rewards.new_empty(len(score), 0) if kl is None else kl,
        mass,
        count,
        inside,
        on_score,
        fallback,
        finite,
        error,
        entropy.masked_fill(total == 0, 0.0),
        last_share.masked_fill(total == 0, 0.0),
        moments,
    )


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    rows = _Rows.of(response)
    raw, invalid = None, rows.invalid
    if isinstance(credit, Tensor):
        raw = rows.pad(credit)
    elif not isinstance(credit, str):
        raw, bad = _raw_credit(credit, rows)
        invalid = invalid | bad
    dtype = compute_dtype(score, raw, *(x for x in tokens if x is not tokens.kl_coef))
    of_tokens = ("values", "logprobs", "ref_logprobs", "kl", "token_rewards")
    padded: dict[str, Any] = {name: rows.pad(getattr(tokens, name)) for name in of_tokens}
    tokens = tokens._replace(**padded)
    compute = functools.partial(_shape_rows, config=config, source=credit, dtype=dtype)
    given = (config.lam, config.lam_value, config.score_index, *tokens)
    x = _Shaped(*_in_blocks(compute, rows.mask, rows.lengths, score, raw, *given))

    filled = x.tokens > 0
    invalid = invalid | (filled & ~x.inside)
    usable = filled & ~invalid
    outputs = [*x[:4], *([x.kl] if tokens.kl is not None or tokens.logprobs is not None else [])]
    lost = ~x.finite | (filled & invalid)
    if lost.any():
        live = rows.live[lost]
        for out in outputs:
            found = out[lost].masked_fill(~live, 0.0).masked_fill(live & invalid[lost][:, None], math.nan)
            out[lost] = found if config.on_nan == "propagate" else 0.0
        x.moments[lost] = _moments(x.advantages[lost], _Mask(live))
    flags = {
        Status.FALLBACK: x.fallback & usable,
        Status.EMPTY: ~filled & ~invalid,
        Status.SCORE_MASKED: usable & ~x.on_score,
        Status.OUT_OF_RANGE: invalid,
        Status.NONFINITE: lost,
    }
    status = torch.zeros(len(filled), dtype=torch.int32, device=filled.device)
    for flag, which in flags.items():
        status |= which.to(torch.int32) * int(flag)
    stats = [y.to(dtype).masked_fill(~usable, 0.0) for y in (x.entropy, x.last_share, x.mass, x.error)]
    attention = not isinstance(credit, Tensor | str)
    restored = [rows.restore(y) for y in outputs]
    return ShapedRewards(
        rewards=restored[0],
        advantages=restored[1],
        returns=restored[2],
        credit=restored[3],
        kl=restored[4] if len(restored) == 5 else None,
        status=status,
        row_stats=RowStats(
            entropy=stats[0],
            last_share=stats[1],
            response_share=stats[2] if attention else None,
            score_error=stats[3],
            advantage_moments=x.moments.to(dtype),
        ),
    )


# Advantages ------------------------------------------------------------------------------------------


def _triangle(gl: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each token of a chunk (``[n, C, C]``), and the one after it (``[n, 1, C]``), add to its tokens."""
    i = torch.arange(SCAN_CHUNK, dtype=torch.float64, device=gl.device)
    distance = i[:, None] - i
    within = (gl[:, None, None] ** distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
    return within.to(dtype), (gl[:, None, None] ** (SCAN_CHUNK - i)).to(dtype)


@functools.lru_cache(maxsize=64)
def _triangle_of_number(gl: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    within, carried = _triangle(torch.tensor([gl], dtype=torch.float64, device=device), dtype)
    return within[0], carried


def _suffix_scan(x: Tensor, gl: float | Tensor) -> Tensor:
    """``G_t = x_t + gl * G_{t+1}`` along the rows of ``[n, R]``.

    Within a chunk a triangular product, between chunks the same scan over their first values: no sum is
    longer than a chunk, so float32 is enough at any length. Rows are made whole pairs of chunks: BLAS
    multiplies a single vector in another order than the rows of a matrix.
    """
    width = x.shape[1]
    if width % (2 * SCAN_CHUNK):
        x = torch.nn.functional.pad(x, (0, -width % (2 * SCAN_CHUNK)))
    if isinstance(gl, Tensor):
        within, carried = _triangle(gl, x.dtype)
    else:
        within, carried = _triangle_of_number(gl, x.dtype, x.device)
    out = x.view(len(x), -1, SCAN_CHUNK) @ within
    first = out[:, :, 0]
    if out.shape[1] > 2:
        first = _suffix_scan(first, gl**SCAN_CHUNK)
    out[:, :-1].addcmul_(first[:, 1:, None], carried)
    return out.view(x.shape)[:, :width].contiguous()


def _returns(rewards: Tensor, values: Tensor | None, gamma: float, gl: float | Tensor) -> Tensor:
    """``G_t = A_t + V_t = r_t + (gamma - gl) V_{t+1} + gl G_{t+1}``, ``[n, R]``."""
    if values is None:
        return _suffix_scan(rewards, gl)
    x, later = torch.empty_like(rewards), values[:, 1:]
    x[:, -1] = rewards[:, -1]
    if isinstance(gl, Tensor):
        torch.addcmul(rewards[:, :-1], (gamma - gl)[:, None].to(x.dtype), later, out=x[:, :-1])
    else:
        torch.add(rewards[:, :-1], later, alpha=gamma - gl, out=x[:, :-1])
    return _suffix_scan(x, gl)


def _non_finite_returns(rewards: Tensor, values: Tensor | None, gamma: float, gl: float | Tensor) -> Tensor:
    """As ``_returns``; NaN and infinity go where the recurrence carries them, nowhere else.

    What a value is to its own token is left out: ``A_t`` has it, once.
    """
    values = torch.zeros_like(rewards) if values is None else values
    column = torch.as_tensor(gl, dtype=rewards.dtype, device=rewards.device).view(-1, 1)
    finite = rewards.isfinite() & values.isfinite()
    poison = (column * rewards + (gamma - column) * values).masked_fill(finite, 0.0)

    def later(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, 1:], (0, 1))

    carried = poison.flip(1).cumsum(1).flip(1)
    carried = torch.where(column == 0, poison + 0.0 * later(carried), carried)
    returns = _returns(rewards.masked_fill(~finite, 0.0), values.masked_fill(~finite, 0.0), gamma, gl)
    return returns + rewards.masked_fill(finite, 0.0) + later(carried)


def _gae(
    mask: _Mask,
    rewards: Tensor,  # 0 where masked
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    mask_semantics: MaskSemantics,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``[n, R]``, 0 where masked."""
    if not rewards.numel():
        return rewards, rewards.clone()
    dtype, work = rewards.dtype, _product_dtype(rewards.dtype, rewards.device)
    lams = [1.0] if values is None else [lam] if lam_value is None else [lam, lam_value]
    decays = [gl.double() if isinstance(gl, Tensor) else gl for gl in (decay(gamma, x) for x in lams)]
    gamma = float32_rounded(gamma)
    rewards = rewards.to(work)
    if bootstrap is not None:
        after = (gamma * bootstrap.to(work)).masked_fill(mask.last < 0, 0.0)
        rewards = rewards.scatter_add(1, _at(mask.last, rewards.shape[1]), after[:, None])
    values = None if values is None else mask.select(values.to(work))
    # To skip masked tokens is to move the others together; where nothing decays it makes no difference.
    rank, r, v = None, rewards, values
    if mask_semantics == "skip" and any(map(_below_one, decays)) and mask.interrupted:
        rank = (mask.live.cumsum(1) - 1).clamp_(min=0)
        r = torch.zeros_like(r).scatter_add_(1, rank, r)
        v = None if v is None else torch.zeros_like(v).scatter_add_(1, rank, v)
    found = [_returns(r, v, gamma, gl) for gl in decays]
    # A token that is not finite makes the first of its row so.
    probe = found[0][:, 0] + found[-1][:, 0]
    if v is not None:
        probe -= v[:, 0]
    lost = None if math.isfinite(probe.sum()) else ~probe.isfinite()
    if lost is not None:
        lost_v = None if v is None else v[lost]
        for x, gl in zip(found, decays, strict=True):
            x[lost] = _non_finite_returns(r[lost], lost_v, gamma, gl[lost] if isinstance(gl, Tensor) else gl)
    if rank is not None:
        found = [x.gather(1, rank) for x in found]
    found = [mask.select(x).to(dtype) for x in found]
    if values is None:
        return found[0], found[0].clone()
    returns = found[-1] if lost is None else found[-1].masked_fill(~values.isfinite(), math.nan)
    return found[0] - values, returns


def _below_one(gl: float | Tensor) -> bool:
    return bool((gl < 1).any()) if isinstance(gl, Tensor) else gl < 1


def _gae_rows(
    mask: Tensor,
    rewards: Tensor,
    *arguments: Any,
    dtype: torch.dtype,
    gamma: float,
    return_moments: bool,
    mask_semantics: MaskSemantics,
) -> tuple[Tensor, ...]:
    live = _Mask(mask.bool())
    values, bootstrap, lam, lam_value = arguments
    values = None if values is None else values.to(dtype)
    rewards = live.select(rewards.to(dtype))
    advantages, returns = _gae(live, rewards, values, bootstrap, gamma, lam, lam_value, mask_semantics)
    return (advantages, returns, _moments(advantages, live)) if return_moments else (advantages, returns)


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    mask_semantics: MaskSemantics,
    bootstrap: Tensor | None,
    return_moments: bool,
) -> tuple[Tensor, ...]:
    rows = _Rows.of(response)
    dtype = compute_dtype(rewards, values, bootstrap)
    compute = functools.partial(
        _gae_rows, dtype=dtype, gamma=gamma, return_moments=return_moments, mask_semantics=mask_semantics
    )
    given = (rows.pad(rewards), rows.pad(values), bootstrap, lam, lam_value)
    advantages, returns, *moments = _in_blocks(compute, rows.mask, *given)
    if rows.packing is not None:
        lost = rows.live & rows.invalid[:, None]
        advantages, returns = (x.masked_fill(lost, math.nan) for x in (advantages, returns))
        moments = [x.masked_fill(lost.any(1, keepdim=True), math.nan) for x in moments]
    return rows.restore(advantages), rows.restore(returns), *(x.to(dtype) for x in moments)


# Whitening -------------------------------------------------------------------------------------------


def _moments(x: Tensor, mask: _Mask) -> Tensor:
    """Count, mean and sum of squared deviations of each row's unmasked tokens, float64 ``[n, 3]``.

    Args:
        x: ``[n, R]``, 0 where masked.
    """
    count = mask.count.double()
    mean = x.sum(1, dtype=torch.float64) / count.clamp(min=1)
    deviations = mask.select(x - mean[:, None].to(x.dtype))
    return torch.stack([count, mean, deviations.square_().sum(1, dtype=torch.float64)], 1)


def _moments_of_rows(mask: Tensor, x: Tensor) -> tuple[Tensor]:
    live = _Mask(mask.bool())
    return (_moments(live.select(x.to(compute_dtype(x))), live),)


def _whiten_rows(
    x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, shift_mean: bool
) -> tuple[Tensor]:
    x = x.to(compute_dtype(x))
    near = mean.to(x.dtype)  # the rest of the mean is subtracted where it is no longer small beside x
    rest = (near - mean) * scale + (0.0 if shift_mean else mean)
    out = (x - near).mul_(scale.to(x.dtype)).add_(rest.to(x.dtype))
    return (out if mask is None else _Mask(mask.bool()).select(out),)


def _folded(moments: Tensor) -> Tensor:
    """The moments of what ``moments`` ([..., 3]) are moments of parts of: float64 ``[3]``."""
    counts, means, m2s = moments.double().reshape(-1, 3).unbind(1)
    means = means.masked_fill(counts == 0, 0.0)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    m2 = m2s.sum() + (counts * (means - mean).square()).sum()
    return torch.stack([count, mean, m2])


def whiten(
    x: Tensor,
    mask: Tensor,
    moments: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
    bessel: bool,
    eps: float,
    eps_mode: EpsMode,
    shift_mean: bool,
    zero_masked: bool,
) -> Tensor:
    rows = (1, x.numel()) if x.ndim < 2 else (-1, x.shape[-1])
    masks, tokens = (y.reshape(rows) if x.numel() else y.new_zeros(1, 0) for y in (mask, x))
    if moments is None:
        [moments] = _in_blocks(_moments_of_rows, masks, tokens)
    folded = _folded(moments)
    count, mean, m2 = (folded if gather is None else _folded(gather(folded))).unbind()
    var = m2 / ((count - 1).clamp(min=1) if bessel else count.clamp(min=1))
    if eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + eps)
    else:
        scale = (var + eps if eps_mode == "add" else var.clamp(min=eps)).rsqrt()
    zeroed = masks if zero_masked else None
    [out] = _in_blocks(_whiten_rows, tokens, zeroed, mean, scale, shift_mean)
    return out.view(x.shape)
