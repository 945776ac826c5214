"""How well credit agrees with the true effects of words; ties count as if broken at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnshape.credit import picked


def precision_at_k(credit: Tensor, effects: Tensor) -> float | None:
    """Of the ``k`` tokens with most credit, the share that has an effect; ``k`` is how many tokens have one.

    Both ``[n]``; ``effects`` is non-zero where a token matters. None if no token does.
    """
    matters = effects != 0
    k = matters.sum().view(1, 1)
    if k == 0:
        return None
    chosen = picked(credit[None], torch.ones_like(matters)[None], k)
    return float((chosen * matters).sum() / k)


def auc(credit: Tensor, effects: Tensor) -> float | None:
    """Probability that a token with an effect has more credit than one without (area under the ROC curve).

    Both ``[n]``. None unless there are tokens of both kinds.
    """
    matters = effects != 0
    inside, outside = credit[matters][:, None], credit[~matters][None]
    if not inside.numel() or not outside.numel():
        return None
    return float(((inside > outside).float() + 0.5 * (inside == outside).float()).mean())


def mean_agreement(credit: Tensor, effects: Tensor, mask: Tensor) -> dict[str, float]:
    """Means of both measures over the rows of ``[B, R]`` where they are defined, masked tokens left out."""
    measures = {"precision_at_k": precision_at_k, "auc": auc}
    out = {}
    for name, measure in measures.items():
        rows = [measure(c[m], e[m]) for c, e, m in zip(credit, effects, mask.bool(), strict=True)]
        defined = [x for x in rows if x is not None]
        out[name] = sum(defined) / len(defined) if defined else math.nan
    return out
