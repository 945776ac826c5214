"""What the launchers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

COMPILER = {"num_warps": 4, "enable_fp_fusion": False}
"""Unfused: no result depends on what a compiler happens to contract."""


def registers(most: int) -> dict[str, int]:
    """Left alone, ptxas spills one or two to fit one more program on a multiprocessor."""
    return {} if torch.version.hip else {"maxnreg": most}


def kernel(*aligned: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` that specialises only ``constexpr`` parameters and the alignment of the pointers named.

    Alignment and divisibility choose layouts, and layouts choose the order of additions.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        plain = [p.name for p in parameters if "constexpr" not in str(p.annotation) and p.name not in aligned]
        return triton.jit(function, do_not_specialize=plain)

    return decorate


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    return bool(triton.knobs.runtime.interpret)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tokens(x: Tensor | None) -> Tensor | None:
    """``x`` with neighbouring tokens neighbours in memory; kernels take any stride between rows."""
    if x is None:
        return None
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.ndim == 1 else x.stride(0)
