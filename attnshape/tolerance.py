"""The numerical bounds, in one home: the tests and ``attnshape compare`` use these.

A row is the last dimension; packed tensors are to be split into rows first. ``expected`` is the float64
reference on the same inputs, upcast. Non-finite values of it leave the bounds of their row finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CREDIT_SUM = 1e-6
"""Largest ``|sum - 1|`` of a row of credit normalised with ``"sum_to_one"``."""


_OUTPUT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Engines that keep keys and values in 8 bits may multiply in 8 bits, and round the row to them.
_OUTPUT |= {torch.float8_e4m3fn: 0.1, torch.float8_e5m2: 0.1}
_FLOAT32_PRODUCTS = {"tf32": 4e-3, "bf16": 3e-2}


def output_bound(device: torch.device, *dtypes: torch.dtype) -> float:
    """Largest share of a row's attention that rounding moves, in a layer that computes in these dtypes.

    Looser where torch has been told to multiply float32 with fewer bits (``fp32_precision``).
    """
    bound = max(_OUTPUT[dtype] for dtype in dtypes)
    if torch.float32 in dtypes:
        backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        bound = max(bound, _FLOAT32_PRODUCTS.get(backend.matmul.fp32_precision, 0.0))
    return bound


def credit_bound(expected: Tensor, max_logit: float | Tensor = 0.0) -> Tensor:
    """Largest allowed error of each token's credit.

    Args:
        expected: ``[..., R]``.
        max_logit: ``max |s|`` over the visible keys and the heads, one float or one per row, ``[...]``.
    """
    size = _finite_abs(expected)
    return 1e-5 * (1 + _per_row(max_logit, size)) * size + 1e-7 * _row_max(size)


def reward_bound(expected: Tensor, *terms: Tensor, max_logit: float | Tensor = 0.0) -> Tensor:
    """``credit_bound`` on the scale of rewards.

    Args:
        expected: ``[..., R]``.
        terms: the summands that may cancel in ``expected``, such as ``score * credit`` and
            ``kl_coef * log_ratio``; each broadcasts to it.
        max_logit: as in ``credit_bound``.
    """
    size = _finite_abs(expected)
    for term in terms:
        size = size + _finite_abs(term)
    return credit_bound(size, max_logit)


def kl_bound(expected: Tensor, log_ratio: Tensor) -> Tensor:
    """Largest allowed error of a KL estimate: a few float32 roundings of ``log_ratio`` and what they become.

    Args:
        expected: ``[..., R]``.
        log_ratio: ``logprobs - ref_logprobs`` in float64, ``[..., R]``, before any clamp.
    """
    ratio = _finite_abs(log_ratio)
    return 1e-6 * (ratio + (1 + ratio) * _finite_abs(expected))


def gae_bound(expected: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """Largest allowed error of advantages or returns, the same for every token of a row.

    Args:
        expected: ``[..., R]``.
        gamma: discount per token.
        lam: GAE's lambda of this output, a float or one per row, ``[...]``.
    """
    size = _finite_abs(expected)
    bound = 1e-5 * _row_max(size).clamp(min=1).expand_as(size)
    if gamma == 1:
        return bound
    gap = 1 - gamma * _per_row(lam, size)
    return bound * (1e-3 / gap).clamp(min=1)


def error_fraction(actual: Tensor, expected: Tensor, bound: Tensor) -> Tensor:
    """``|actual - expected| / bound`` of each element, float64; within the bounds is ``<= 1``.

    Where ``expected`` is not finite: 0 for the same value (NaN equals NaN), infinite for any other.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual {tuple(actual.shape)} and expected {tuple(expected.shape)} differ in shape")
    actual, expected = actual.to("cpu", torch.float64), expected.to("cpu", torch.float64)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    fraction = (actual - expected).abs() / bound.to("cpu", torch.float64)
    return torch.where(same, 0.0, fraction.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _finite_abs(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.to("cpu", torch.float64), nan=0.0, posinf=0.0, neginf=0.0).abs()


def _row_max(size: Tensor) -> Tensor:
    if size.shape[-1] == 0:
        return size.new_zeros(*size.shape[:-1], 1)
    return size.amax(-1, keepdim=True)


def _per_row(x: float | Tensor, like: Tensor) -> Tensor:
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    return x if x.ndim == 0 else x.unsqueeze(-1)
