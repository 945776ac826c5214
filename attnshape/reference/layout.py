"""Where rows lie: masks, packed and padded, positions among the keys."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnshape.types import Response

Row = tuple[int, slice] | slice
"""What selects one row's response tokens out of ``[B, R]``, or out of packed ``[M]``."""


def segments(cu_seqlens: Tensor, total: int) -> tuple[list[slice], list[bool]]:
    """The tokens of each packed sequence, and whether its bounds are sound and no other's lie inside."""
    bounds = cu_seqlens.tolist()
    tokens, sound = [], []
    for b, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        sound.append(0 <= lo <= hi <= total and max(bounds[: b + 1]) <= lo and hi <= min(bounds[b + 1 :]))
        lo, hi = (min(max(bound, 0), total) for bound in sorted((lo, hi)))
        tokens.append(slice(lo, hi))
    return tokens, sound


def response_rows(response: Response) -> tuple[list[Row], Tensor]:
    """What selects each row's tokens, and ``[B]`` bool: whether its bounds are out of range."""
    mask = response.mask
    if response.cu_seqlens is None:
        rows: list[Row] = [(b, slice(None)) for b in range(mask.shape[0])]
        return rows, torch.zeros(len(rows), dtype=torch.bool, device=mask.device)
    tokens, sound = segments(response.cu_seqlens, mask.shape[0])
    return [*tokens], ~torch.tensor(sound, dtype=torch.bool, device=mask.device)


def response_positions(response: Response, row: Row, length: int, b: int) -> Tensor:
    """Key position of each response token of row ``b``; -1 where it has none."""
    if response.index is not None:
        return response.index[row].long()
    assert response.start is not None
    return response.start[b].long() + torch.arange(length, device=response.start.device)


def lowest_position(response: Response) -> int:
    """Only ``index`` may say that a token has no key."""
    return -1 if response.start is None else 0
