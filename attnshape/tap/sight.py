"""What a query sees: the one place that reads it off what an attention function is called with."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnshape.tap.find import EAGER, AttentionFunction, Mask

CHUNK_ELEMENTS = 2**24
"""Of a square mask, looked at together."""


class Extent(NamedTuple):
    """A square mask as ``AttentionInputs`` can say it of every query, and whether it says more."""

    attended: Tensor
    """``[B, S]``, non-zero where a key may be seen."""
    causal: Tensor
    window: Tensor
    """int: keys that a query sees at most, itself included; more than there are if it sees all."""
    differs: Tensor
    """Whether the mask says more than these three."""
    crosses: Tensor
    """Whether a query sees another sequence of packed input."""


@dataclass(frozen=True)
class Sight:
    """What the queries of one call of an attention function see.

    A square mask is all there is to know: next to one, functions go by neither ``is_causal`` nor a window.
    """

    square: Tensor | BlockMask | None
    """Dense ``[1 or B, 1 or Hq, S, S or more]``, bool or added to the scores, or a block mask."""
    bias: Tensor | None
    """``[1 or B, 1 or Hq, S, S or more]``, added to the scores as well."""
    padding: Tensor | None
    """``[B, S]``, non-zero where a key may be seen."""
    causal: bool
    window: int | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What tells two calls apart; hashable."""
        shapes = [
            (x.dtype, x.shape[1] == 1) if isinstance(x, Tensor) else x is not None
            for x in (self.square, self.bias)
        ]
        return (*shapes, self.padding is not None, self.causal, self.window)

    def without_tensors(self) -> Sight:
        """What is left to know once the rows are read."""
        return Sight(None, None, None, causal=self.causal, window=self.window)

    def rows(self, positions: Tensor, length: int) -> Tensor | None:
        """What is added to the scores of queries ``[B, n]``, ``[B, 1 or Hq, n, S]``; -inf hides a key.

        None where there is neither a square mask nor a bias: the other fields say it all.
        """
        parts = []
        if isinstance(self.square, BlockMask):
            parts.append(_block_rows(self.square, positions, length))
        elif self.square is not None:
            parts.append(_dense_rows(self.square, positions, length))
        if self.bias is not None:
            parts.append(_dense_rows(self.bias, positions, length))
        return sum(parts[1:], parts[0]) if parts else None

    def sees_itself(self, batch: int, length: int, device: torch.device) -> Tensor:
        """bool ``[B, S]``: whether each token is visible to itself, as none of the padding is."""
        keys = torch.arange(length, device=device)
        if isinstance(self.square, BlockMask):
            rows = torch.arange(batch, device=device)[:, None]
            seen: Tensor = self.square.mask_mod(rows, torch.zeros_like(rows), keys, keys)
            return seen.expand(batch, -1)
        if self.square is not None:
            diagonal = self.square[:, 0].diagonal(dim1=-2, dim2=-1)
            return (_additive(diagonal) != -math.inf).expand(batch, -1)
        return torch.ones_like(keys, dtype=torch.bool).expand(batch, -1)

    def extent(self, given: Tensor | None, sequence: Tensor, batch: int) -> Extent:
        """A square mask, or bias, in the words of ``AttentionInputs``.

        Args:
            given: the caller's own ``[B, S]``, if there is one.
            sequence: int ``[S]``, of each token; all the same if not packed.
            batch: number of rows.
        """
        length, device = len(sequence), sequence.device
        keys = torch.arange(length, device=device)
        step = max(1, CHUNK_ELEMENTS // max(1, batch * length))
        chunks = torch.split(keys, step)

        def seen_by(queries: Tensor) -> tuple[Tensor, Tensor]:
            rows = self.rows(queries.expand(batch, -1), length)
            assert rows is not None
            seen = rows != -math.inf
            plain = (seen == seen[:, :1]).all(1) & (~seen | (rows == 0)).all(1)
            return seen[:, 0], ~plain  # [B, n, S]

        if given is None:
            attended = torch.stack([seen_by(queries)[0].any(1) for queries in chunks]).any(0)
        else:
            attended = given.to(device) != 0
        later = crosses = differs = torch.zeros((), dtype=torch.bool, device=device)
        far = span = keys.new_zeros(())
        for queries in chunks:
            distance, same = queries[:, None] - keys, sequence[queries][:, None] == sequence
            seen = seen_by(queries)[0] & attended[:, queries][..., None]
            crosses = crosses | (seen & ~same).any()
            later = later | (seen & same & (distance < 0)).any()
            far = torch.maximum(far, (seen * same * distance.abs()).max())
            alive = attended[:, queries][..., None] & attended[:, None] & same
            span = torch.maximum(span, (alive * distance.abs()).max())
        for queries in chunks:
            distance, same = queries[:, None] - keys, sequence[queries][:, None] == sequence
            seen, more = seen_by(queries)
            said = attended[:, None] & same & ((distance >= 0) | later) & (distance.abs() <= far)
            differs = differs | ((more | (seen != said)) & attended[:, queries][..., None]).any()
        window = torch.where(far >= span, length + 1, far + 1)
        return Extent(attended if given is None else given, ~later, window, differs, crosses)


def sight_of(
    module: Any, function: AttentionFunction, queries: int, mask: Mask, options: dict[str, Any]
) -> Sight:
    """What ``function`` shows so many queries of ``module`` when it is called so."""
    bias = options.get("position_bias")
    bias = None if bias is None else _square(bias.detach(), queries)
    function = inspect.unwrap(function)
    eager, flex = function.__name__.endswith(EAGER), function is flex_attention_forward
    if isinstance(mask, BlockMask):
        return Sight(mask, bias, None, causal=False, window=None)
    by_mask = eager or flex or function is sdpa_attention_forward
    if isinstance(mask, Tensor) and (mask.ndim > 2 or by_mask):
        return Sight(_square(mask.detach(), queries), bias, None, causal=False, window=None)
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return Sight(
        None,
        bias,
        mask,
        causal=bool(causal) and not (eager or flex),
        window=None if by_mask else options.get("sliding_window"),
    )


def _square(mask: Tensor, queries: int) -> Tensor:
    """A mask as it broadcasts to scores ``[B, Hq, queries, S]``: its first two dimensions may be 1."""
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask.expand(-1, -1, queries, -1)


def _additive(mask: Tensor) -> Tensor:
    """A mask as it is added to scores, -inf where a key is hidden."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
    if not mask.is_floating_point():
        return mask.float()
    # The least number of the dtype hides a key as well, and what a bias has made of it.
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -math.inf)


def _dense_rows(mask: Tensor, positions: Tensor, length: int) -> Tensor:
    batch = torch.arange(len(positions), device=mask.device)[:, None]
    rows = mask.expand(len(positions), -1, -1, -1).transpose(1, 2)[batch, positions.to(mask.device)]
    return _additive(rows[..., :length]).transpose(1, 2)


def _block_rows(mask: BlockMask, positions: Tensor, length: int) -> Tensor:
    device = positions.device
    batch = torch.arange(len(positions), device=device)[:, None, None, None]
    heads = torch.arange(mask.shape[1], device=device)[:, None, None]
    keys = torch.arange(length, device=device)
    seen = mask.mask_mod(batch, heads, positions[:, None, :, None], keys)
    return _additive(seen.expand(len(positions), mask.shape[1], positions.shape[1], length))
