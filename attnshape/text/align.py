"""Weights over one tokenizer's tokens carried to another's by the characters they share.

A PPO loop decodes the policy's tokens, puts them into the reward model's chat template and tokenises again:
the reward model's credit lies on other tokens than the policy's rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

Spans: TypeAlias = Sequence[tuple[int, int]]
"""``(start, end)`` of each token in characters, as ``return_offsets_mapping=True`` gives them."""
Offsets: TypeAlias = Spans | Sequence[Spans] | Tensor
"""One sequence's spans, or one list of them per sequence; as a tensor ``[S, 2]`` or ``[B, S, 2]``."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """A linear map from weights over source tokens to weights over target tokens; made by ``align``.

    Entry ``i`` carries ``share[i]`` of the weight of source token ``source_index[i]`` to target token
    ``target_index[i]``, counted over the flattened ``[B, S]`` and ``[B, T]``. Entries are in the order of
    their targets; the shares of each source token sum to 1.
    """

    source_shape: tuple[int, ...]
    """``(S,)``, or ``(B, S)`` for a batch."""
    target_shape: tuple[int, ...]
    """``(T,)``, or ``(B, T)`` for a batch."""
    source_index: Tensor
    target_index: Tensor
    share: Tensor
    source_mask: Tensor
    """bool, ``source_shape``: source tokens that overlap a target token. If the target is a response inside
    the source text, this is the response mask over the source tokens."""

    def __call__(self, weights: Tensor) -> Tensor:
        """``[..., *source_shape]`` to ``[..., *target_shape]``, float32, or float64 for float64; detached.

        Raises:
            ValueError: the last dimensions of ``weights`` are not ``source_shape``.
        """
        rank = len(self.source_shape)
        if weights.ndim < rank or weights.shape[weights.ndim - rank :] != self.source_shape:
            raise ValueError(
                f"weights must have shape [..., {', '.join(map(str, self.source_shape))}] as the offsets, "
                f"got {tuple(weights.shape)}"
            )
        lead = weights.shape[: weights.ndim - rank]
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        count = torch.Size(self.target_shape).numel()
        if not count:
            return weights.new_zeros(*lead, *self.target_shape, dtype=dtype)
        flat = weights.detach().double().reshape(*lead, torch.Size(self.source_shape).numel())
        source, target, share = (
            x.to(weights.device) for x in (self.source_index, self.target_index, self.share)
        )
        entries = flat.movedim(-1, 0)[source] * share.view(-1, *[1] * len(lead))
        lengths = torch.bincount(target, minlength=count)
        # Not index_add: its atomics make the bits of a CUDA result differ from run to run.
        sums = torch.segment_reduce(entries, "sum", lengths=lengths, axis=0, initial=0.0)
        return sums.movedim(0, -1).reshape(*lead, *self.target_shape).to(dtype)


def align(source_offsets: Offsets, target_offsets: Offsets) -> Alignment:
    """The map that carries weights from source tokens to target tokens by the characters they share.

    A source token's weight is spread evenly over those of its characters that a target token covers; where
    several target tokens cover one character (the bytes of an emoji), they share it equally. A source token
    that shares no character with any target token (template text, whitespace, special tokens) gives its
    weight to the nearest target token, to the following one if two are as near. A source token of zero width
    stands where the preceding one ends. So the sum of the weights is preserved, and no weight leaves the
    target tokens that a source token overlaps.

    Target tokens of zero width get nothing; if a sequence has no others, its first token gets everything. A
    sequence without target tokens loses its weight.

    Args:
        source_offsets: spans of one sequence's tokens, or of each sequence's; shorter sequences are padded on
            the right with tokens of zero width.
        target_offsets: the same for the target tokens, in characters of the same text.

    Raises:
        ValueError: a span ends before it starts or starts below 0, or the two are not of as many sequences.

    Examples:
        >>> carry = align([(0, 4), (4, 8)], [(0, 2), (2, 8)])  # where each token starts and ends
        >>> carry(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 3.5000])
    """
    source_rows, source_shape = _rows(source_offsets, "source_offsets")
    target_rows, target_shape = _rows(target_offsets, "target_offsets")
    if source_shape[:-1] != target_shape[:-1]:
        got = [
            f"{shape[0]} sequences" if len(shape) == 2 else "one" for shape in (source_shape, target_shape)
        ]
        raise ValueError(
            f"source_offsets and target_offsets must be of as many sequences, got {got[0]} and {got[1]}"
        )
    sources, targets = source_shape[-1], target_shape[-1]
    source_mask = torch.zeros(len(source_rows), sources, dtype=torch.bool, device="cpu")
    source_index, target_index, share = [], [], []
    for b, (source, target) in enumerate(zip(source_rows, target_rows, strict=True)):
        row_source, row_target, row_share = _align_row(source, target, source_mask[b, : len(source)])
        source_index.append(row_source + b * sources)
        target_index.append(row_target + b * targets)
        share.append(row_share)
    empty = torch.zeros(0, dtype=torch.int64, device="cpu")
    return Alignment(
        source_shape=source_shape,
        target_shape=target_shape,
        source_index=torch.cat([empty, *source_index]),
        target_index=torch.cat([empty, *target_index]),
        share=torch.cat([empty.double(), *share]),
        source_mask=source_mask.view(source_shape),
    )


def _align_row(source: Tensor, target: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source index, target index and share of one sequence's entries, by target; fills ``source_mask``."""
    if not len(source) or not len(target):
        none = source.new_zeros(0)
        return none, none, none.double()
    source_has_width = source[:, 1] > source[:, 0]
    end_before = torch.where(source_has_width, source[:, 1], 0).cummax(0).values
    source_start = torch.where(source_has_width, source[:, 0], end_before)
    source_end = torch.where(source_has_width, source[:, 1], end_before)
    wide = (target[:, 1] > target[:, 0]).nonzero().squeeze(1)
    wide = wide[target[wide, 0].argsort(stable=True)]
    target_start, target_end = target[wide, 0], target[wide, 1]

    # Between two neighbouring boundaries lies a piece of text whose characters all have the same tokens.
    bounds = (
        torch.cat([source_start, source_end, target_start, target_end]).unique()  # type: ignore[no-untyped-call]
    )
    width = bounds.diff()
    source_token, source_piece = _pieces(bounds, source_start, source_end)
    target_token, target_piece = _pieces(bounds, target_start, target_end)
    target_token = target_token[target_piece.argsort(stable=True)]
    sharers = target_piece.bincount(minlength=len(width))
    first_sharer = sharers.cumsum(0) - sharers

    visit, k = _expand(sharers[source_piece])
    source_index, piece = source_token[visit], source_piece[visit]
    target_index = wide[target_token[first_sharer[piece] + k]]
    part = width[piece].double() / sharers[piece]
    covered = part.new_zeros(len(source)).index_add_(0, source_index, part)
    share = part / covered[source_index]

    source_mask[:] = covered > 0
    lost = (~source_mask).nonzero().squeeze(1)
    if len(wide):
        following = torch.searchsorted(target_start, source_end[lost])
        far = 2 * int(bounds[-1]) + 1
        gap_after = torch.cat([target_start, bounds.new_tensor([far])])[following] - source_end[lost]
        gap_before = source_start[lost] - torch.cat([bounds.new_tensor([-far]), target_end])[following]
        heir = wide[torch.where(gap_after <= gap_before.clamp(min=0), following, following - 1)]
    else:
        heir = torch.zeros_like(lost)

    source_index, target_index = torch.cat([source_index, lost]), torch.cat([target_index, heir])
    order = target_index.argsort(stable=True)
    return source_index[order], target_index[order], torch.cat([share, share.new_ones(len(lost))])[order]


def _pieces(bounds: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of a token and a piece that it covers, in the order of the tokens."""
    first = torch.searchsorted(bounds, start)
    token, k = _expand(torch.searchsorted(bounds, end) - first)
    return token, first[token] + k


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """``counts[i]`` times each ``i``, and the times counted: ``[2, 1]`` gives ``0 0 1`` and ``0 1 0``."""
    index = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return index, torch.arange(len(index), device="cpu") - first[index]


def _spans(row: Any, name: str) -> Tensor:
    try:
        return (
            torch.tensor(row, device="cpu")
            if len(row)
            else torch.zeros(0, 2, dtype=torch.int64, device="cpu")
        )
    except (TypeError, ValueError) as error:  # no numbers, or not as many in each
        raise ValueError(f"{name} must be pairs (start, end) of characters, got {row!r:.60}") from error


def _rows(offsets: Offsets, name: str) -> tuple[list[Tensor], tuple[int, ...]]:
    """Each sequence's spans as int64 ``[S, 2]``, and ``(S,)``, or ``(B, S)`` for a batch of up to ``S``."""
    rows: list[Tensor]
    if isinstance(offsets, Tensor):
        batched = offsets.ndim == 3
        rows = list(offsets.cpu()) if batched else [offsets.cpu()]
        length = offsets.shape[-2] if offsets.ndim > 1 else 0
    else:
        batched = any(not len(item) or not isinstance(item[0], Real) for item in offsets)
        rows = [_spans(row, name) for row in (offsets if batched else [offsets])]
        length = max(map(len, rows), default=0)
    for b, row in enumerate(rows):
        if row.ndim != 2 or row.shape[1] != 2 or row.dtype == torch.bool or row.is_floating_point():
            raise ValueError(
                f"{name} must be pairs (start, end) of characters, got {tuple(row.shape)} {row.dtype}"
            )
        bad = ((row[:, 0] < 0) | (row[:, 1] < row[:, 0])).nonzero().squeeze(1)
        if len(bad):
            start, end = row[bad[0]].tolist()
            raise ValueError(
                f"{name}: token {int(bad[0])} of sequence {b} is ({start}, {end}), not 0 <= start <= end"
            )
    return [row.long() for row in rows], (len(rows), length) if batched else (length,)
