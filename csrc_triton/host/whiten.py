"""Whitening of a whole batch: moments of its parts, folded to those of all, then one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from csrc_triton.arguments import Batch, Whitening
from csrc_triton.launch import COMPILER, Launcher, ceil_div, processors, row_stride
from csrc_triton.whiten import fold_kernel, moments_kernel, whiten_kernel

BLOCK = 2048
"""Tokens a program takes at once."""
PARTS = 1024
"""Parts that tokens are divided into, and parts whose moments are folded at once."""
MAX_PARTS = 4096
"""Parts that every program of the last launch folds for itself; more are folded to fewer before."""

PROGRAMS = 4
"""Of the last launch, per multiprocessor: each folds the moments once."""

MOMENTS = Launcher(moments_kernel, "batch.p_x", "batch.p_mask")
FOLD = Launcher(fold_kernel)
WHITEN = Launcher(whiten_kernel, "p_out", "batch.p_x", "batch.p_mask")


def whiten(
    x: Tensor,
    mask: Tensor,
    moments: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    bessel: bool = True,
    eps: float = 1e-8,
    eps_mode: Literal["add", "clamp", "add_to_std"] = "add",
    shift_mean: bool = True,
    whiten_masked: bool = False,
) -> Tensor:
    """``(x - mean) * rsqrt(variance + eps)`` over the unmasked tokens of all of ``x``.

    One launch with ``moments`` of up to ``MAX_PARTS`` parts; one more for more parts, and without.

    Args:
        x: any shape and strides; float32, bfloat16 or float16.
        mask: of its shape, any dtype.
        moments: count, mean and sum of squared deviations, ``[..., 3]``, of parts that together hold the
            unmasked tokens.
        gather: from the moments of all parts, float64 ``[3]``, to those of every process, ``[..., 3]``.

    Returns:
        float32, of the shape of ``x``.
    """
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    flat = x.is_contiguous() and mask.is_contiguous()
    x, mask = _rows(x, flat), _rows(mask, flat)
    unit = 1 if x.numel() % 16 else 16  # what a bound must be a multiple of for wide loads up to it
    batch = Batch(x, row_stride(x), mask, row_stride(mask), max(x.shape[1], 1), x.numel() // unit, 1)
    n_blocks = ceil_div(x.numel(), BLOCK)
    constants: dict[str, Any] = {"UNIT": unit, "FLAT": flat, "BLOCK": BLOCK}
    if moments is None:
        blocks = max(ceil_div(n_blocks, PARTS), 1)
        moments = torch.empty(ceil_div(n_blocks, blocks), 3, dtype=torch.float64, device=x.device)
        if n_blocks:
            MOMENTS(len(moments), COMPILER, p_out=moments, batch=batch._replace(blocks=blocks), **constants)
    moments = moments.reshape(-1, 3).contiguous()
    if len(moments) > MAX_PARTS:
        moments = _folded(moments, PARTS)
    if gather is not None:
        moments = gather(_folded(moments, max(len(moments), 1))[0]).contiguous()
    if n_blocks:
        blocks = ceil_div(n_blocks, PROGRAMS * processors(x.device))
        of = Whitening(
            moments,
            moments.numel() // 3,
            int(bessel),
            eps if eps_mode == "add" else 0.0,
            eps if eps_mode == "clamp" else -math.inf,
            eps if eps_mode == "add_to_std" else 0.0,
            int(shift_mean),
            int(whiten_masked),
        )
        batch = batch._replace(blocks=blocks)
        programs = ceil_div(n_blocks, blocks)
        WHITEN(programs, COMPILER, p_out=out, batch=batch, of=of, PARTS=PARTS, **constants)
    return out


def _folded(moments: Tensor, parts: int) -> Tensor:
    """Moments of every ``parts`` parts, float64 ``[n, 3]``; of nothing, one."""
    out = torch.empty(max(ceil_div(len(moments), parts), 1), 3, dtype=torch.float64, device=moments.device)
    FOLD(len(out), COMPILER, p_out=out, p_moments=moments, n=len(moments), parts=parts, PARTS=PARTS)
    return out


def _rows(x: Tensor, flat: bool) -> Tensor:
    """``[rows, width]``; one row where nothing lies between rows, copied where neighbours lie apart."""
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if flat:
        return x.view(1, -1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])
