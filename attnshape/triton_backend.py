"""The operations on the Triton kernels of ``csrc_triton``; arguments are checked by ``attnshape.ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

import csrc_triton
from attnshape.config import GroupConfig, Normalization, ShapingConfig, Whitening
from attnshape.types import (
    KL,
    MIN_MASS,
    Advantages,
    AttentionInputs,
    CreditName,
    GroupAdvantages,
    Response,
    RowStats,
    ShapedRewards,
    Status,
    TokenInputs,
    decay,
    float32_rounded,
)
from attnshape.vectorized import groups
from attnshape.vectorized.advantages import with_carried

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


def _recurrence(config: ShapingConfig) -> dict[str, Any]:
    return {
        "gamma": float32_rounded(config.gamma),
        "gl": decay(config.gamma, config.lam),
        "gl_value": None if config.lam_value is None else decay(config.gamma, config.lam_value),
        "skip_masked": config.mask_semantics == "skip",
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
    kl = tokens.kl or KL(None, None, 0.0)
    swept: Any = csrc_triton.sweep(
        response,
        OUTPUTS,
        score=score,
        credit=credit,
        normalization=config.normalization,
        score_index=config.score_index,
        dense_share=config.share(credit),
        score_bounds=config.score_bounds,
        kl_estimator=config.kl_estimator,
        kl_input_clip=config.kl_input_clip,
        kl_output_clip=None if kl.estimate is not None else config.kl_output_clip,
        zero_nonfinite=config.on_nan == "zero_row",
        values=tokens.values,
        logprobs=kl.logprobs,
        ref_logprobs=kl.ref_logprobs,
        kl=kl.estimate,
        kl_coef=kl.coef,
        token_rewards=tokens.token_rewards,
        terminal_reward=tokens.terminal_reward,
        bootstrap=tokens.bootstrap,
        **_recurrence(config),
    )
    advantages, returns = swept.advantages, swept.returns
    if config.carry_masked:
        unsound = int(Status.OUT_OF_RANGE | (Status.NONFINITE if config.on_nan == "zero_row" else 0))
        computed = Advantages(advantages, returns, swept.moments)
        filled = with_carried(computed, swept.rewards, tokens.values, response, config, tokens.bootstrap)
        lost = (swept.status & unsound != 0)[:, None]
        advantages, returns = (torch.where(lost, x, y) for x, y in zip(computed[:2], filled[:2], strict=True))
    return ShapedRewards(
        swept.rewards,
        advantages,
        returns,
        swept.credit,
        swept.kl,
        swept.status,
        swept.moments,
        RowStats(swept.stats, attention),
    )


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    config: ShapingConfig,
    bootstrap: Tensor | None,
) -> Advantages:
    swept: Any = csrc_triton.sweep(
        response,
        ("advantages", "returns", "moments"),
        token_rewards=rewards,
        values=values,
        bootstrap=bootstrap,
        **_recurrence(config),
    )
    out = Advantages(swept.advantages, swept.returns, swept.moments)
    return with_carried(out, rewards, values, response, config, bootstrap)


def spread(
    parts: Tensor, credits: Sequence[groups.Weights], response: Response, config: GroupConfig
) -> GroupAdvantages:
    """One launch, one more for each further layer; of several rewards or signed weights only attention."""
    if len(credits) > 1 or config.signed:
        return groups.spread(parts, credits, response, config, shape_rewards)
    (credit,) = credits
    swept: Any = csrc_triton.sweep(
        response,
        ("rewards", "credit", "status", "moments"),
        score=parts[:, 0],
        credit="uniform" if credit is None else credit,
        dense_share=0.0 if credit is None else config.dense_share,
        even=True,
        min_mass=MIN_MASS,
    )
    return GroupAdvantages(swept.rewards, parts.sum(1), swept.credit, swept.status, swept.moments)


def whiten(
    x: Tensor,
    mask: Tensor,
    config: Whitening,
    moments: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    return csrc_triton.whiten(
        x,
        mask,
        moments,
        gather,
        config.bessel,
        config.eps,
        config.eps_mode,
        config.shift_mean,
        config.whiten_masked,
    )
