"""vLLM's paged cache: keys and values as views of one layout, gathered by block table into packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def keys_and_values(cache: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Views ``[blocks, Hkv, tokens, D]`` of a layer's cache.

    Args:
        cache: ``[blocks, Hkv, tokens, 2 D]``; whatever its strides, keys come before values in the last
            dimension (vLLM's ``v1/kv_cache_layout.py``).
        transposed: as vLLM's CPU backend has it: a block of a head is its keys ``[D, tokens]``, then its
            values ``[tokens, D]`` (``csrc/cpu/cpu_attn_vec.hpp``).
    """
    blocks, heads, tokens, both = cache.shape
    width = both // 2
    if not transposed:
        return cache[..., :width], cache[..., width:]
    key, value = cache.view(blocks, heads, 2, tokens * width).unbind(2)
    return key.view(blocks, heads, width, tokens).mT, value.view(blocks, heads, tokens, width)


def as_bytes(x: Tensor) -> Tensor:
    """8-bit floats as integers, which every operator that copies knows; others as they are."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


class Tokens(NamedTuple):
    """Where the tokens of some requests lie, one request after another."""

    block: Tensor
    """int ``[N]``."""
    offset: Tensor
    """int ``[N]``, in their blocks."""
    cu_seqlens: Tensor
    """int32 ``[n + 1]``."""

    def of(self, x: Tensor) -> Tensor:
        """``[N, Hkv, D]`` of a view ``[blocks, Hkv, tokens, D]``."""
        return as_bytes(x)[self.block, :, self.offset].view(x.dtype)


def tokens_of(
    table: Tensor, rows: Sequence[int], first: Sequence[int], end: Sequence[int], size: int
) -> Tokens:
    """The tokens ``first[i]:end[i]`` of each request.

    Args:
        table: blocks of each request, int ``[requests, blocks]``; read where these tokens are, only.
        rows: of the requests in the table.
        size: tokens of a block.
    """
    counts = [e - f for f, e in zip(first, end, strict=True)]
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    shifts = [f - low for f, low in zip(first, bounds, strict=False)]
    # One copy to the device; the rest is computed there.
    given = torch.tensor([*counts, *rows, *shifts, *bounds]).to(table.device, non_blocking=True)
    counted, row, shift, cu_seqlens = torch.split(given, [len(rows), len(rows), len(rows), len(rows) + 1])
    of_token = torch.repeat_interleave(counted, output_size=bounds[-1])
    position = torch.arange(bounds[-1], device=table.device) + shift[of_token]
    block = table[row[of_token], position // size]
    return Tokens(block.long(), position % size, cu_seqlens.to(torch.int32))
