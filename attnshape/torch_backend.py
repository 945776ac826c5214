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
BLOCK = 1 << 17
"""Tokens that a CPU thread shapes at once, so that what it holds of them stays in its cache."""


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

    def select(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` where unmasked, else 0; without ``out`` perhaps ``x`` itself."""
        if self.full:
            return x if out is None or out is x else out.copy_(x)
        kept = self.kept.to(torch.int64) if x.element_size() == 8 else self.kept
        if out is None:
            return (x.view(kept.dtype) & kept).view(x.dtype)
        torch.bitwise_and(x.view(kept.dtype), kept, out=out.view(kept.dtype))
        return out

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


def _in_blocks(compute: Callable[..., None], outputs: Sequence[Tensor], *arguments: Any) -> None:
    """``compute(outputs, *arguments)``, which writes the outputs, for some rows at a time.

    Every output has rows first, and so has every tensor of the arguments with an axis; the first argument
    is ``[B, R]``.
    """
    rows, width = arguments[0].shape
    step = max(rows, 1)
    if arguments[0].device.type == "cpu":
        step = max(torch.get_num_threads() * BLOCK // max(width, 1), 1)
    if step >= rows:
        compute(outputs, *arguments)
        return
    for lo in range(0, rows, step):
        block = slice(lo, lo + step)
        compute(
            [x[block] for x in outputs],
            *[x[block] if isinstance(x, Tensor) and x.ndim else x for x in arguments],
        )


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
        mask_row = inputs.mask_row
        if mask_row is not None:
            mask_row = packing.pad(mask_row).movedim(1, -1)
        inside = packing.inside if mask is None else packing.inside & (packing.pad(mask) != 0)
        key = packing.pad(inputs.key).transpose(1, 2)
        inputs = dataclasses.replace(
            inputs, query=query, key=key, lse=lse, attention_mask=inside, mask_row=mask_row, cu_seqlens=None
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
    visible = layer.attended[:, None].expand(distance.shape)
    if inputs.causal:
        visible = visible & (distance >= 0)
    if inputs.sliding_window is not None:
        visible = visible & (distance.abs() < inputs.sliding_window)
    visible = visible[:, None]  # [B, 1, n, S]
    if inputs.mask_row is not None:
        added = inputs.mask_row.to(dtype)
        added = (added[:, None] if added.ndim == 2 else added)[:, :, None]  # [B, 1 or Hq, 1, S]
        scores = scores + added
        visible = visible & (added != -math.inf)
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


def _normalize(
    raw: Tensor,
    mask: _Mask,
    score_at: Tensor,
    on_score: Tensor,
    normalization: Normalization,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Credit ``[n, R]``, its raw mass ``[n]``, and the rows that fell back to ``sparse``.

    Args:
        score_at, on_score: the score's token, and whether it is unmasked, ``[n]``.
    """
    out = torch.empty_like(raw) if out is None else out
    mask.select(raw, out)
    mass = out.sum(1, dtype=torch.float64)
    if normalization == "none":
        return out, mass, torch.zeros_like(mass, dtype=torch.bool)
    fallback = mass < MIN_MASS
    total = mask.count.double() if normalization == "sum_to_length" else torch.ones_like(mass)
    out *= (total / mass).masked_fill(fallback, 0.0).to(raw.dtype)[:, None]
    out.scatter_add_(1, _at(score_at, raw.shape[1]), (total * (fallback & on_score)).to(raw.dtype)[:, None])
    return out, mass, fallback


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


def _kl(tokens: TokenInputs, config: ShapingConfig, mask: _Mask, out: Tensor) -> Tensor:
    if tokens.kl is not None:
        return mask.select(tokens.kl.to(out.dtype), out)
    assert tokens.logprobs is not None
    assert tokens.ref_logprobs is not None
    k1 = torch.sub(tokens.logprobs.to(out.dtype), tokens.ref_logprobs.to(out.dtype), out=out)
    if config.kl_input_clip is not None:
        k1.clamp_(-config.kl_input_clip, config.kl_input_clip)
    if config.kl_estimator == "abs":
        k1.abs_()
    elif config.kl_estimator == "k2":
        k1.square_().div_(2)
    elif config.kl_estimator == "k3":
        k1.add_(torch.expm1(-k1))
    if config.kl_output_clip is not None:
        k1.clamp_(-config.kl_output_clip, config.kl_output_clip)
    return mask.select(k1, out)


class _Shaped(NamedTuple):
    """What is found of some rows."""

    rewards: Tensor  # [n, R]
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    kl: Tensor  # [n, 0] without a KL input
    mass: Tensor  # [n], as all that follows
    tokens: Tensor
    inside: Tensor  # the score's token is among the row's
    on_score: Tensor  # and is unmasked
    fallback: Tensor
    surely_finite: Tensor
    error: Tensor
    entropy: Tensor
    last_share: Tensor
    moments: Tensor  # [n, 3]

    @classmethod
    def empty(cls, mask: Tensor, dtype: torch.dtype, has_kl: bool) -> _Shaped:
        rows, width = mask.shape
        shapes = [(rows, width)] * 4 + [(rows, width if has_kl else 0)] + [(rows,)] * 9 + [(rows, 3)]
        dtypes = [dtype] * 5 + [torch.float64, torch.int32] + [torch.bool] * 4 + [torch.float64] * 4
        return cls(*(mask.new_empty(x, dtype=y) for x, y in zip(shapes, dtypes, strict=True)))


def _shape_rows(
    outputs: Sequence[Tensor],
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
) -> None:
    out = _Shaped(*outputs)
    rewards, weights, width, dtype = out.rewards, out.weights, mask.shape[1], out.rewards.dtype
    live, tokens = _Mask(mask.bool()), TokenInputs(*given)  # type: ignore[arg-type]
    if isinstance(score_index, Tensor):
        score_at = score_index.long()
    else:
        score_at = live.last if score_index == "last_unmasked" else lengths - 1
    inside = (score_at >= 0) & (score_at < lengths)
    at_score = _at(score_at, width)
    on_score = inside & live.live.gather(1, at_score).any(1)

    def to_score(x: Tensor) -> Tensor:
        """``x`` ([n]) where the score's token is unmasked."""
        return x.to(dtype).masked_fill(~on_score, 0.0)[:, None]

    if raw is not None:
        _, mass, fallback = _normalize(
            raw.to(dtype), live, score_at, on_score, config.normalization, out=weights
        )
    else:
        mass, fallback = torch.zeros_like(score), torch.zeros_like(on_score)
        total = live.count if config.normalization == "sum_to_length" else torch.ones_like(live.count)
        if source == "uniform":
            live.select((total / live.count).to(dtype)[:, None].expand(mask.shape), weights)
        else:
            weights.zero_().scatter_add_(1, at_score, to_score(total))

    score = score.to(dtype).clamp(*config.score_bounds)
    beta = config.share(source)
    torch.mul(weights, (beta * score)[:, None], out=rewards)
    rewards.scatter_add_(1, at_score, to_score((1 - beta) * score))
    error = (rewards.sum(1) - score).abs()
    if tokens.terminal_reward is not None:
        rewards.scatter_add_(1, at_score, to_score(tokens.terminal_reward))
    if tokens.token_rewards is not None:
        rewards += tokens.token_rewards.to(dtype)
    if _has_kl(tokens):
        kl = _kl(tokens, config, live, out.kl)
        if isinstance(tokens.kl_coef, Tensor):
            rewards.addcmul_(kl, tokens.kl_coef.to(kl), value=-1)
        else:
            rewards.sub_(kl, alpha=tokens.kl_coef)
    live.select(rewards, rewards)
    _gae(
        (out.advantages, out.returns),
        live,
        rewards,
        tokens.values,
        tokens.bootstrap,
        config.gamma,
        lam,
        lam_value,
        config.mask_semantics,
    )
    moments = _moments(out.advantages, live)
    # What is not finite makes advantages so; sums may overflow, and returns of a recurrence of their own.
    surely_finite = moments[:, 1].isfinite()
    if lam_value is not None:
        surely_finite &= out.returns.sum(1).isfinite()
    total = weights.sum(1)
    logs = weights.clamp(min=torch.finfo(dtype).tiny).log_()
    entropy = total.log() - logs.mul_(weights).sum(1) / total
    last_share = weights.gather(1, _at(live.last, width)).sum(1) / total
    entropy, last_share = (x.masked_fill(total == 0, 0.0) for x in (entropy, last_share))
    of_rows = (
        mass,
        live.count,
        inside,
        on_score,
        fallback,
        surely_finite,
        error,
        entropy,
        last_share,
        moments,
    )
    for row_output, x in zip(out[5:], of_rows, strict=True):
        row_output.copy_(x)


def _has_kl(tokens: TokenInputs) -> bool:
    return tokens.kl is not None or tokens.logprobs is not None


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
    compute = functools.partial(_shape_rows, config=config, source=credit)
    given = (config.lam, config.lam_value, config.score_index, *tokens)
    x = _Shaped.empty(rows.mask, dtype, _has_kl(tokens))
    _in_blocks(compute, x, rows.mask, rows.lengths, score, raw, *given)

    filled = x.tokens > 0
    invalid = invalid | (filled & ~x.inside)
    usable = filled & ~invalid
    outputs = [*x[:4], *([x.kl] if _has_kl(tokens) else [])]
    lost = ~x.surely_finite | (filled & invalid)
    if lost.any():
        suspects, live = lost.clone(), rows.live[lost]
        unknown = live & invalid[lost][:, None]
        found = [out[lost].masked_fill(~live, 0.0).masked_fill(unknown, math.nan) for out in outputs]
        finite = torch.stack([y.isfinite().all(1) for y in found]).all(0)
        for out, y in zip(outputs, found, strict=True):
            out[suspects] = y if config.on_nan == "propagate" else y.masked_fill(~finite[:, None], 0.0)
        lost[suspects] = ~finite
        x.moments[suspects] = _moments(x.advantages[suspects], _Mask(live))
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


def _suffix_scan(x: Tensor, gl: float | Tensor, out: Tensor | None = None) -> Tensor:
    """``G_t = x_t + gl * G_{t+1}`` along the rows of ``[n, R]``; in ``out`` if that needs no padding.

    Within a chunk a triangular product, between chunks the same scan over their first values: no sum is
    longer than a chunk, so float32 is enough at any length. Rows are made whole pairs of chunks: BLAS
    multiplies a single vector in another order than the rows of a matrix.
    """
    width, padding = x.shape[1], -x.shape[1] % (2 * SCAN_CHUNK)
    x = torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    out = torch.empty_like(x) if padding or out is None else out
    chunks = out.view(len(x), -1, SCAN_CHUNK)
    if isinstance(gl, Tensor):
        within, carried = _triangle(gl, x.dtype)
        torch.bmm(x.view(chunks.shape), within, out=chunks)
    else:
        within, carried = _triangle_of_number(gl, x.dtype, x.device)
        torch.mm(x.view(-1, SCAN_CHUNK), within, out=out.view(-1, SCAN_CHUNK))
    first = chunks[:, :, 0]
    if chunks.shape[1] > 2:
        first = _suffix_scan(first, gl**SCAN_CHUNK)
    chunks[:, :-1].addcmul_(first[:, 1:, None], carried)
    return out[:, :width]


def _returns(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    gl: float | Tensor,
    scratch: Tensor,
    out: Tensor | None,
) -> Tensor:
    """``G_t = A_t + V_t = r_t + (gamma - gl) V_{t+1} + gl G_{t+1}``, ``[n, R]``; in ``out`` if it can be."""
    if values is None:
        return _suffix_scan(rewards, gl, out)
    later = values[:, 1:]
    scratch[:, -1] = rewards[:, -1]
    if isinstance(gl, Tensor):
        torch.addcmul(rewards[:, :-1], (gamma - gl)[:, None].to(later.dtype), later, out=scratch[:, :-1])
    else:
        torch.add(rewards[:, :-1], later, alpha=gamma - gl, out=scratch[:, :-1])
    return _suffix_scan(scratch, gl, out)


def _non_finite_returns(rewards: Tensor, values: Tensor | None, gamma: float, gl: float | Tensor) -> Tensor:
    """As ``_returns``; NaN and infinity go where the recurrence carries them, nowhere else.

    What a value is to its own token is left out: ``A_t`` has it, once.
    """
    values = torch.zeros_like(rewards) if values is None else values
    scratch = torch.empty_like(rewards)
    column = torch.as_tensor(gl, dtype=rewards.dtype, device=rewards.device).view(-1, 1)
    finite = rewards.isfinite() & values.isfinite()
    poison = (column * rewards + (gamma - column) * values).masked_fill(finite, 0.0)

    def later(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, 1:], (0, 1))

    carried = poison.flip(1).cumsum(1).flip(1)
    carried = torch.where(column == 0, poison + 0.0 * later(carried), carried)
    returns = _returns(
        rewards.masked_fill(~finite, 0.0), values.masked_fill(~finite, 0.0), gamma, gl, scratch, None
    )
    return returns + rewards.masked_fill(finite, 0.0) + later(carried)


def _gae(
    outputs: tuple[Tensor, Tensor],
    mask: _Mask,
    rewards: Tensor,  # 0 where masked
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    mask_semantics: MaskSemantics,
) -> None:
    """Writes advantages and returns ``[n, R]``, 0 where masked."""
    if not rewards.numel():
        return
    advantages, returns = outputs
    work = _product_dtype(rewards.dtype, rewards.device)
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
    decaying = any(isinstance(gl, Tensor) or gl < 1 for gl in decays)
    if mask_semantics == "skip" and decaying and mask.interrupted:
        rank = mask.live.cumsum(1).sub_(1).clamp_(min=0)
        r = torch.zeros_like(r).scatter_add_(1, rank, r)
        v = None if v is None else torch.zeros_like(v).scatter_add_(1, rank, v)
    in_place = work == returns.dtype
    scratch = advantages if in_place else torch.empty_like(r)
    place = [None] * (len(decays) - 1) + [returns if in_place else None]
    found = [_returns(r, v, gamma, gl, scratch, out) for gl, out in zip(decays, place, strict=True)]
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
    mask.select(found[-1].to(returns.dtype), returns)
    if values is None:
        advantages.copy_(returns)
        return
    torch.sub(returns if len(found) == 1 else mask.select(found[0]), values, out=advantages)
    if lost is not None:
        returns.masked_fill_(~values.isfinite(), math.nan)


def _gae_rows(
    outputs: Sequence[Tensor],
    mask: Tensor,
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    *,
    gamma: float,
    mask_semantics: MaskSemantics,
) -> None:
    advantages, returns, *moments = outputs
    live, dtype = _Mask(mask.bool()), advantages.dtype
    rewards = live.select(rewards.to(dtype))
    values = None if values is None else values.to(dtype)
    _gae((advantages, returns), live, rewards, values, bootstrap, gamma, lam, lam_value, mask_semantics)
    for out in moments:
        out.copy_(_moments(advantages, live))


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
    outputs = [rows.mask.new_empty(rows.mask.shape, dtype=dtype) for _ in range(2)]
    if return_moments:
        outputs.append(rows.mask.new_empty((len(rows.mask), 3), dtype=torch.float64))
    compute = functools.partial(_gae_rows, gamma=gamma, mask_semantics=mask_semantics)
    given = (rows.pad(rewards), rows.pad(values), bootstrap, lam, lam_value)
    _in_blocks(compute, outputs, rows.mask, *given)
    advantages, returns, *moments = outputs
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
    # Deviations from nearly the mean are as exact as x is; what their own mean is not, they say themselves.
    near = (x.sum(1) / count.clamp(min=1)).to(x.dtype)
    deviations = mask.select(x - near[:, None])
    rest = deviations.sum(1).double() / count.clamp(min=1)
    m2 = deviations.square_().sum(1).double() - count * rest.square()
    return torch.stack([count, near.double() + rest, m2.clamp(min=0)], 1)


def _moments_of_rows(outputs: Sequence[Tensor], mask: Tensor, x: Tensor) -> None:
    live = _Mask(mask.bool())
    outputs[0].copy_(_moments(live.select(x.to(compute_dtype(x))), live))


def _whiten_rows(
    outputs: Sequence[Tensor], x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, shift_mean: bool
) -> None:
    [out] = outputs
    near = mean.to(out.dtype)  # the rest of the mean is subtracted where it is no longer small beside x
    rest = (near - mean) * scale + (0.0 if shift_mean else mean)
    torch.sub(x.to(out.dtype), near, out=out).mul_(scale.to(out.dtype)).add_(rest.to(out.dtype))
    if mask is not None:
        _Mask(mask.bool()).select(out, out)


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
        moments = x.new_empty(len(tokens), 3, dtype=torch.float64)
        _in_blocks(_moments_of_rows, [moments], masks, tokens)
    folded = _folded(moments)
    count, mean, m2 = (folded if gather is None else _folded(gather(folded))).unbind()
    var = m2 / ((count - 1).clamp(min=1) if bessel else count.clamp(min=1))
    if eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + eps)
    else:
        scale = (var + eps if eps_mode == "add" else var.clamp(min=eps)).rsqrt()
    zeroed = masks if zero_masked else None
    out = tokens.new_empty(tokens.shape, dtype=compute_dtype(x))
    _in_blocks(_whiten_rows, [out], tokens, zeroed, mean, scale, shift_mean)
    return out.view(x.shape)
