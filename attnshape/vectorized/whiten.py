"""Statistics over unmasked tokens, and whitening by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnshape.config import Whitening
from attnshape.types import compute_dtype
from attnshape.vectorized.layout import Mask, in_blocks


def moments_of(x: Tensor, mask: Mask) -> Tensor:
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
    live = Mask(mask.bool())
    outputs[0].copy_(moments_of(live.select(x.to(compute_dtype(x))), live))


def _whiten_rows(
    outputs: Sequence[Tensor], x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, shift_mean: bool
) -> None:
    [out] = outputs
    near = mean.to(out.dtype)  # the rest of the mean is subtracted where it is no longer small beside x
    rest = (near - mean) * scale + (0.0 if shift_mean else mean)
    torch.sub(x.to(out.dtype), near, out=out).mul_(scale.to(out.dtype)).add_(rest.to(out.dtype))
    if mask is not None:
        Mask(mask.bool()).select(out, out)


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
    rows = (1, x.numel()) if x.ndim < 2 else (-1, x.shape[-1])
    masks, tokens = (y.reshape(rows) if x.numel() else y.new_zeros(1, 0) for y in (mask, x))
    if moments is None:
        moments = x.new_empty(len(tokens), 3, dtype=torch.float64)
        in_blocks(_moments_of_rows, [moments], masks, tokens)
    folded = _folded(moments)
    count, mean, m2 = (folded if gather is None else _folded(gather(folded))).unbind()
    var = m2 / ((count - 1).clamp(min=1) if config.bessel else count.clamp(min=1))
    if config.eps_mode == "add_to_std":
        scale = 1 / (var.sqrt() + config.eps)
    else:
        scale = (var + config.eps if config.eps_mode == "add" else var.clamp(min=config.eps)).rsqrt()
    zeroed = None if config.whiten_masked else masks
    out = tokens.new_empty(tokens.shape, dtype=compute_dtype(x))
    in_blocks(_whiten_rows, [out], tokens, zeroed, mean, scale, config.shift_mean)
    return out.view(x.shape)
