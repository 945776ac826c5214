"""Tensors whose elements lie far apart."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def far_apart(x: Tensor, *strides: int) -> Tensor:
    """The same numbers with these strides, in memory that is there where it was written."""
    span = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    if x.is_cuda:
        flat = torch.empty(span, dtype=x.dtype, device=x.device)
    else:
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        flat = torch.frombuffer(mmap.mmap(-1, span * x.element_size(), flags=kind), dtype=x.dtype)
    return flat.as_strided(x.shape, strides).copy_(x)
