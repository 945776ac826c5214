"""Packed and padded rows, and their unmasked tokens."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from attnshape.types import Response


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Where a process may have float32 products rounded (tf32, bfloat16), float64 is out of reach of that."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    lowered = device.type != "cpu" or precision in ("bf16", "tf32")
    return torch.float64 if lowered and dtype == torch.float32 else dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a packed axis lie in its padded form."""

    index: Tensor  # [B, L], clamped
    inside: Tensor  # [B, L]
    valid: Tensor  # [B]; what lies between the bounds of another row is of no use

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int) -> Packing:
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
class Mask:
    """Unmasked tokens of some rows."""

    live: Tensor  # [n, R] bool

    def select(self, x: Tensor) -> Tensor:
        """``x`` where unmasked, else 0."""
        return torch.where(self.live, x, 0.0)

    @functools.cached_property
    def count(self) -> Tensor:
        """Unmasked tokens of each row, ``[n]``."""
        return self.live.sum(1)

    @functools.cached_property
    def last(self) -> Tensor:
        """Last unmasked token of each row, ``[n]``; -1 if there is none."""
        t = torch.arange(self.live.shape[1] + 1, device=self.live.device)
        return (torch.nn.functional.pad(self.live, (1, 0)) * t).amax(1) - 1

    def following(self, x: Tensor) -> Tensor:
        """``x`` of the next unmasked token, from each token on; 0 past the last."""
        width = self.live.shape[1]
        t = torch.arange(width, device=x.device).expand_as(x)
        at = torch.where(self.live, t, width).flip(1).cummin(1).values.flip(1) if x.numel() else t
        return torch.nn.functional.pad(x, (0, 1)).gather(1, at)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Response tokens in padded form."""

    mask: Tensor  # [B, R], any dtype
    start: Tensor | None
    index: Tensor | None
    packing: Packing | None
    shape: torch.Size

    @classmethod
    def of(cls, response: Response) -> Rows:
        mask, index = response.mask, response.index
        if response.cu_seqlens is None:
            return cls(mask, response.start, index, None, mask.shape)
        packing = Packing.of(response.cu_seqlens, mask.shape[0])
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
        return self.mask.bool().contiguous()

    def padded(self, x: Tensor) -> Tensor:
        # Of other strides sums would run in another order.
        return x.contiguous() if self.packing is None else self.packing.pad(x)

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


def at_column(index: Tensor, width: int) -> Tensor:
    """``index`` ([n]) for ``gather`` and ``scatter`` along rows, ``[n, 1]``; ``[n, 0]`` if they are empty."""
    return index.clamp(0, max(width - 1, 0))[:, None][:, :width]
