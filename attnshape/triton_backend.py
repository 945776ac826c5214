"""The operations on the Triton kernels of ``csrc_triton``; arguments are checked by ``attnshape.ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

import csrc_triton
from attnshape.types import (
    MIN_MASS,
    AttentionInputs,
    CreditName,
    EpsMode,
    MaskSemantics,
    Normalization,
    Response,
    RowStats,
    ShapedRewards,
    ShapingConfig,
    TokenInputs,
    decay,
    float32_rounded,
)

MAX_HEAD_DIM = 256
MAX_GROUP = 64
OUTPUTS: Final = ("rewards", "advantages", "returns", "credit", "kl", "status", "stats", "moments")


def unsupported(layers: Sequence[AttentionInputs], *tensors: Tensor | None) -> str | None:
    """Why the kernels cannot run on these layers and tensors; None where they can."""
    tensors = (*tensors, *(layer.key for layer in layers))
    given = [x for x in tensors if x is not None]
    if not csrc_triton.interpreted():
        elsewhere = [x.device for x in given if not x.is_cuda]
        if elsewhere:
            return f"tensors are on {elsewhere[0]} and TRITON_INTERPRET=1 was not set before import"
    if any(x.dtype == torch.float64 for x in given):
        return "the kernels compute in float32 and a tensor is torch.float64"
    for layer in layers:
        if layer.mask_row is not None or not layer.causal:
            return "they know neither mask_row nor causal=False"
        width, group = layer.key.shape[-1], layer.query.shape[1] // layer.key.shape[1]
        if width > MAX_HEAD_DIM:
            return f"the head width is {width}, the kernels' limit {MAX_HEAD_DIM}"
        if group > MAX_GROUP:
            return f"{group} query heads share a key head, the kernels' limit is {MAX_GROUP}"
    return None


def attention_row(inputs: Sequence[AttentionInputs]) -> Tensor:
    return csrc_triton.attention_row(inputs)


def _normalized(
    credit: Tensor | Sequence[AttentionInputs],
    response: Response,
    normalization: Normalization,
    status: Tensor | None = None,
) -> Tensor:
    out = csrc_triton.sweep(
        response,
        ("credit",),
        credit=credit,
        row_status=status,
        normalization=normalization,
        min_mass=MIN_MASS,
    ).credit
    assert out is not None
    return out


def attention_credit(
    inputs: Sequence[AttentionInputs], response: Response, normalization: Normalization
) -> Tensor:
    return _normalized(inputs, response, normalization)


def attention_column_credit(
    inputs: AttentionInputs,
    response: Response,
    variant: Literal["mean", "last"],
    shift: Literal[0, 1],
    normalization: Normalization,
) -> Tensor:
    raw, status = csrc_triton.column_credit_raw(inputs, response, variant=variant, shift=shift)
    return _normalized(raw, response, normalization, status)


def attention_rollout(
    layers: Sequence[AttentionInputs],
    response: Response,
    value_norms: Sequence[Tensor] | None,
    residual_norms: Sequence[Tensor] | None,
    normalization: Normalization,
) -> Tensor:
    raw, status = csrc_triton.rollout_raw(
        layers, response, value_norms=value_norms, residual_norms=residual_norms
    )
    return _normalized(raw, response, normalization, status)


def _recurrence(
    gamma: float, lam: float | Tensor, lam_value: float | Tensor | None, mask_semantics: MaskSemantics
) -> dict[str, Any]:
    return {
        "gamma": float32_rounded(gamma),
        "gl": decay(gamma, lam),
        "gl_value": None if lam_value is None else decay(gamma, lam_value),
        "skip_masked": mask_semantics == "skip",
        "min_mass": MIN_MASS,
    }


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    attention = not isinstance(credit, Tensor | str)
    swept: Any = csrc_triton.sweep(
        response,
        OUTPUTS,
        score=score,
        credit=credit,
        normalization=config.normalization,
        score_index=config.score_index,
        beta=config.share(credit),
        score_bounds=config.score_bounds,
        kl_estimator=config.kl_estimator,
        kl_input_clip=config.kl_input_clip,
        kl_output_clip=None if tokens.kl is not None else config.kl_output_clip,
        zero_nonfinite=config.on_nan == "zero_row",
        **tokens._asdict(),
        **_recurrence(config.gamma, config.lam, config.lam_value, config.mask_semantics),
    )
    entropy, last_share, share, error = swept.stats.unbind(1)
    stats = RowStats(entropy, last_share, share if attention else None, error, swept.moments)
    return ShapedRewards(
        swept.rewards, swept.advantages, swept.returns, swept.credit, swept.kl, swept.status, stats
    )


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | Tensor | None,
    mask_semantics: MaskSemantics,
    bootstrap: Tensor | None,
    return_moments: bool,
) -> tuple[Tensor, ...]:
    swept: Any = csrc_triton.sweep(
        response,
        ("advantages", "returns", "moments") if return_moments else ("advantages", "returns"),
        token_rewards=rewards,
        values=values,
        bootstrap=bootstrap,
        **_recurrence(gamma, lam, lam_value, mask_semantics),
    )
    moments = (swept.moments,) if return_moments else ()
    return swept.advantages, swept.returns, *moments


def whiten(
    x: Tensor,
    mask: Tensor,
    moments: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
    bessel: bool,
    eps: float,
    eps_mode: EpsMode,
    shift_mean: bool,
    zero_masked: bool,
) -> Tensor:
    return csrc_triton.whiten(x, mask, moments, gather, bessel, eps, eps_mode, shift_mean, zero_masked)
