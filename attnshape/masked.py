"""What frameworks leave at masked tokens, filled in where a backend has computed the others
only: in PyTorch, for those that hold no serial loop."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.types import Advantages, ShapedRewards, Status, decay, float32_rounded


def filled(
    shaped: ShapedRewards, values: Tensor | None, response_mask: Tensor, config: ShapingConfig
) -> ShapedRewards:
    """``carried`` over a whole result; rows without sound outputs stay as they are."""
    if not config.carry_masked:
        return shaped
    unsound = int(Status.OUT_OF_RANGE | (Status.NONFINITE if config.on_nan == "zero_row" else 0))
    sound = (shaped.status & unsound == 0)[:, None]
    computed = Advantages(shaped.advantages, shaped.returns, shaped.moments)
    carry = carried(computed, values, response_mask, config)
    advantages, returns = (torch.where(sound, a, b) for a, b in zip(carry[:2], computed[:2], strict=True))
    return dataclasses.replace(shaped, advantages=advantages, returns=returns)


def carried(
    computed: Advantages, values: Tensor | None, response_mask: Tensor, config: ShapingConfig
) -> Advantages:
    """Advantages and returns ``[B, R]`` with what the recurrence carries past masked tokens, if asked for.

    With ``s`` the next unmasked token after a masked ``t`` (past the end all is 0), ``skip`` holds ``A_s``
    and ``zero`` ``gl ** (s - t - 1) * (gamma * V_s + gl * A_s)``. Returns add ``V_t``, which ``zero`` masks.
    """
    if not config.carry_masked:
        return computed
    advantages, returns, moments = computed
    live = response_mask != 0
    t = torch.arange(live.shape[1], device=live.device)
    following = torch.where(live, t, len(t)).flip(1).cummin(1).values.flip(1) if live.numel() else live.long()
    v = torch.zeros_like(advantages, dtype=torch.float64) if values is None else values.double()
    v_live = torch.where(live, v, 0.0)

    def at_following(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1)).gather(1, following)

    def fill(x: Tensor, lam: float | Tensor) -> Tensor:
        """``x`` (advantages, [B, R] float64) with masked tokens filled."""
        if config.mask_semantics == "skip":
            return at_following(x)
        gl = decay(config.gamma, lam if values is not None else 1.0)
        gl = gl.double()[:, None] if isinstance(gl, Tensor) else torch.full_like(x[:, :1], gl)
        entering = float32_rounded(config.gamma) * at_following(v_live) + gl * at_following(x)
        return torch.where(live, x, gl ** (following - t - 1).clamp(min=0) * entering)

    filled = fill(advantages.double(), config.lam)
    sums = fill(returns.double() - v_live, config.lam if config.lam_value is None else config.lam_value)
    sums = sums + (v if config.mask_semantics == "skip" else v_live)
    return Advantages(
        torch.where(live, advantages, filled.to(advantages.dtype)),
        torch.where(live, returns, sums.to(returns.dtype)),
        moments,
    )
