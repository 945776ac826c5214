"""Packing as flash attention's functions of these names define it."""

import torch
from torch import Tensor


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero().squeeze(1)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, starts, int(lengths.max()), lengths


def pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch * length, *x.shape[1:])
    out[indices] = x
    return out.unflatten(0, (batch, length))


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices]


def rearrange(x: Tensor, pattern: str) -> Tensor:
    assert pattern == "b s ... -> (b s) ..."
    return x.flatten(0, 1)
