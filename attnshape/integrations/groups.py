"""What credit changes in an advantage that a framework made without a critic."""

from __future__ import annotations

from torch import Tensor

from attnshape.config import GroupConfig
from attnshape.ops import group_advantages


def added(part: Tensor, weights: Tensor, mask: Tensor, dense_share: float, *, signed: bool = False) -> Tensor:
    """``part[i] * dense_share * (n_i * credit[i, t] - 1)``: what a spread adds to each token's advantage.

    Args:
        part: ``[B]``, what the reward that has the credit has in the advantage.
        weights: ``[B, R]``, 0 or more, or signed token rewards; where they are all 0 nothing is added.
        mask: ``[B, R]``.
        signed: ``weights`` say what raised the score and what lowered it, see ``GroupConfig``.

    Returns:
        float32 ``[B, R]``, of mean 0 over a row's unmasked tokens, 0 where masked.
    """
    config = GroupConfig(
        baseline="none", scale="none", dense_share=dense_share, signed="score" if signed else None
    )
    part = part.float()
    spread = group_advantages(part, weights, mask, group=1, config=config).advantages
    return spread - part[:, None] * (mask != 0)
