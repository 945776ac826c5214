"""Statistics over unmasked tokens, and whitening by them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnshape.config import Whitening
from attnshape.reference.layout import response_rows
from attnshape.types import Response, compute_dtype


def moments_of(tokens: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of ``tokens`` ([n]): ``[3]``."""
    mean = tokens.sum() / max(len(tokens), 1)
    return torch.stack([tokens.new_tensor(len(tokens)), mean, (tokens - mean).square().sum()])


def row_moments(x: Tensor, response: Response) -> Tensor:
    """Of each row's unmasked tokens, ``[B, 3]``."""
    rows, _ = response_rows(response)
    of_rows = [moments_of(x[row][response.mask[row] != 0]) for row in rows]
    return torch.stack(of_rows) if rows else x.new_zeros(0, 3)


def whiten(
    x: Tensor, response: Response | Tensor, config: Whitening | None = None, *, moments: Tensor | None = None
) -> Tensor:
    """``(x - mean) * rsqrt(var + eps)`` over unmasked tokens."""
    config, live = config or Whitening(), Response.of(response).mask != 0
    dtype = compute_dtype(x)
    if moments is None:
        moments = moments_of(x[live].to(dtype))
    counts, means, m2s = moments.to(dtype).reshape(-1, 3).unbind(1)
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum() / count
    m2 = m2s.sum() + (counts * (means - mean).square()).sum()
    var = m2 / ((count - 1).clamp(min=1) if config.bessel else count)
    if config.eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + config.eps)
    else:
        scale = (var + config.eps if config.eps_mode == "add" else var.clamp(min=config.eps)).rsqrt()
    out = (x.to(dtype) - mean) * scale
    if not config.shift_mean:
        out = out + mean
    return out if config.whiten_masked else torch.where(live, out, 0.0)
