"""The operations on the Triton kernels of ``csrc_triton``; arguments are checked by ``attnshape.ops``."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import csrc_triton
from attnshape.types import (
    MIN_MASS,
    AttentionInputs,
    CreditName,
    MaskSemantics,
    Normalization,
    Response,
    RowStats,
    ShapedRewards,
    ShapingConfig,
    Status,
    TokenInputs,
    decay,
    float32_rounded,
)

MAX_HEAD_DIM = 256
MAX_GROUP = 64
STATUS_BITS = csrc_triton.StatusBits(
    fallback=int(Status.FALLBACK),
    empty=int(Status.EMPTY),
    score_masked=int(Status.SCORE_MASKED),
    out_of_range=int(Status.OUT_OF_RANGE),
    nonfinite=int(Status.NONFINITE),
)


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


def _options(layer: AttentionInputs) -> dict[str, Any]:
    """Everything a layer has besides queries, keys and scaling."""
    names = [field.name for field in dataclasses.fields(layer)]
    return {name: getattr(layer, name) for name in names if name not in ("query", "key", "scaling")}


def _mean(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)


def attention_row(inputs: Sequence[AttentionInputs]) -> Tensor:
    return _mean([csrc_triton.attention_row(x.query, x.key, x.scaling, **_options(x)) for x in inputs])


def _raw_credit(inputs: Sequence[AttentionInputs], response: Response) -> tuple[Tensor, Tensor]:
    """Attention at the response tokens, and the status of each row."""
    rows = [
        csrc_triton.attention_credit_raw(
            x.query,
            x.key,
            x.scaling,
            response.mask,
            response_start=response.start,
            response_index=response.index,
            response_cu_seqlens=response.cu_seqlens,
            out_of_range=STATUS_BITS.out_of_range,
            **_options(x),
        )
        for x in inputs
    ]
    return _mean([raw for raw, _ in rows]), functools.reduce(operator.or_, [status for _, status in rows])


def attention_credit(
    inputs: Sequence[AttentionInputs], response: Response, normalization: Normalization
) -> Tensor:
    raw, status = _raw_credit(inputs, response)
    credit = csrc_triton.sweep(
        response.mask,
        ("credit",),
        response_cu_seqlens=response.cu_seqlens,
        credit=raw,
        normalization=normalization,
        row_status=status,
        min_mass=MIN_MASS,
        status_bits=STATUS_BITS,
    ).credit
    assert credit is not None
    return credit


def _recurrence(
    gamma: float, lam: float | Tensor, lam_value: float | Tensor | None, mask_semantics: MaskSemantics
) -> dict[str, Any]:
    return {
        "gamma": float32_rounded(gamma),
        "gl": decay(gamma, lam),
        "gl_value": None if lam_value is None else decay(gamma, lam_value),
        "skip_masked": mask_semantics == "skip",
        "min_mass": MIN_MASS,
        "status_bits": STATUS_BITS,
    }


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    row_status, attention = None, False
    if not isinstance(credit, Tensor | str):
        attention = True
        credit, row_status = _raw_credit(credit, response)
    has_kl = tokens.kl is not None or tokens.logprobs is not None
    swept: Any = csrc_triton.sweep(
        response.mask,
        ("rewards", "advantages", "returns", "credit", *(("kl",) if has_kl else ()), "status", "stats"),
        response_cu_seqlens=response.cu_seqlens,
        score=score,
        credit=credit,
        normalization=config.normalization,
        row_status=row_status,
        score_index=config.score_index,
        beta=config.beta,
        score_bounds=config.score_bounds,
        kl_estimator=config.kl_estimator,
        kl_input_clip=config.kl_input_clip,
        kl_output_clip=None if tokens.kl is not None else config.kl_output_clip,
        zero_nonfinite=config.on_nan == "zero_row",
        **tokens._asdict(),
        **_recurrence(config.gamma, config.lam, config.lam_value, config.mask_semantics),
    )
    entropy, last_share, share, error = swept.stats.unbind(1)
    stats = RowStats(entropy, last_share, share if attention else None, error)
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
) -> tuple[Tensor, Tensor]:
    swept = csrc_triton.sweep(
        response.mask,
        ("advantages", "returns"),
        response_cu_seqlens=response.cu_seqlens,
        token_rewards=rewards,
        values=values,
        bootstrap=bootstrap,
        **_recurrence(gamma, lam, lam_value, mask_semantics),
    )
    assert swept.advantages is not None
    assert swept.returns is not None
    return swept.advantages, swept.returns
