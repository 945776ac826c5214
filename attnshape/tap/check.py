"""Whether attention rows are those of a layer: times the values they must give the layer's own output."""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attnshape.tolerance import output_bound

_seen: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


@torch.no_grad()
def misplaced(weights: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """The share of each row's attention that the layer's output speaks against.

    ``max |weights @ values - output| / max (weights @ |values|)`` over the head's width. Weights that are
    off by a share ``e`` of their sum show about ``e``, however small the head's values are.

    Args:
        weights: attention rows per head, ``[..., Hq, n, S]``; rows that sum to 0 are left out.
        values: ``[..., Hkv, S, Dv]``, before any GQA repeat.
        output: what the layer's attention gave these queries, before the output projection,
            ``[..., Hq, n, Dv]``; rows that are not finite are left out.

    Returns:
        ``[..., Hq, n]``; NaN for rows that are left out, infinite where only the rows are not finite.
    """
    with torch.autocast(weights.device.type, enabled=False):
        values, output = values.to(weights.dtype), output.to(weights.dtype)
        values = values.repeat_interleave(weights.shape[-3] // values.shape[-3], -3)
        # What no query sees may hold anything.
        values = torch.where((weights != 0).any(-2)[..., None], values, 0.0)
        size = (weights @ values.abs()).amax(-1)
        error = (weights @ values - output).abs().amax(-1) / size.clamp(min=torch.finfo(size.dtype).tiny)
    error = error.nan_to_num(nan=torch.inf).masked_fill(size == 0, 0.0)
    left_out = (weights.sum(-1) == 0) | ~output.isfinite().all(-1)
    return error.masked_fill(left_out, torch.nan)


def failure(
    name: str, weights: Tensor, values: Tensor, output: Tensor, *, scores: Tensor | None = None
) -> str | None:
    """What is wrong with the rows of the layer ``name``, as a sentence; synchronises with the device.

    Args:
        weights, values, output: as of ``misplaced``.
        scores: ``[..., Hq, n, S]``, where the layer rounds them to the dtype of its values before the
            softmax: what that moves is let pass.

    Returns:
        None if nothing is wrong, ``""`` if every row was left out.
    """
    error = misplaced(weights, values, output)
    if scores is not None:
        # A score is off by up to half a unit in its last place.
        seen = torch.where(weights != 0, scores.abs(), 0.0)
        error = (error - torch.finfo(values.dtype).eps / 2 * (weights * seen).sum(-1)).clamp(min=0)
    left = error[~error.isnan()]
    if left.numel() == 0:
        return ""
    worst, bound = float(left.max()), output_bound(weights.device, weights.dtype, values.dtype, output.dtype)
    if worst <= bound:
        return None
    head = int(error.nan_to_num(nan=-1.0).movedim(-2, 0).flatten(1).amax(1).argmax())
    return (
        f"{name}: its attention row times its values is not what it gave: {worst:.2g} of head {head}'s "
        f"attention is elsewhere, at most {bound:.2g} is rounding"
    )


def is_due(module: nn.Module, kind: Hashable) -> bool:
    """Whether calls of this kind are yet to be checked."""
    return kind not in _seen.get(module, ())


def passed(module: nn.Module, kind: Hashable) -> None:
    """Calls of this kind need no further check."""
    _seen.setdefault(module, set()).add(kind)
