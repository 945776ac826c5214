"""Statistics over unmasked tokens, and whitening by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnshape.config import Whitening
from attnshape.types import compute_dtype
from attnshape.vectorized.layout import Mask


def moments_of(x: Tensor, mask: Mask) -> Tensor:
    """Count, mean and sum of squared deviations of each row's unmasked tokens, ``[n, 3]``.

    Args:
        x: ``[n, R]``, 0 where masked.
    """
    mean = x.sum(1) / mask.count.clamp(min=1)
    m2 = mask.select(x - mean[:, None]).square().sum(1)
    return torch.stack([mask.count.to(x.dtype), mean, m2], 1)


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
    config: Whitening,
    moments: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    live, tokens = mask != 0, x.to(compute_dtype(x))
    if moments is None:
        everything = Mask(live.reshape(1, -1))
        moments = moments_of(everything.select(tokens.reshape(1, -1).double()), everything)
    folded = _folded(moments)
    count, mean, m2 = (folded if gather is None else _folded(gather(folded))).unbind()
    var = m2 / ((count - 1).clamp(min=1) if config.bessel else count.clamp(min=1))
    if config.eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + config.eps)
    else:
        scale = (var + config.eps if config.eps_mode == "add" else var.clamp(min=config.eps)).rsqrt()
    near = mean.to(tokens.dtype)  # the rest of the mean is subtracted where it is no longer small beside x
    rest = (near - mean) * scale + (0.0 if config.shift_mean else mean)
    out = (tokens - near) * scale.to(tokens.dtype) + rest.to(tokens.dtype)
    return out if config.whiten_masked else torch.where(live, out, 0.0)
