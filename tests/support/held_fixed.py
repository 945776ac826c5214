"""A model whose attention weights, and the sizes that its norms divide by, stay those of its first run.

Both are found while it runs, whatever its modules are: weights by what an attention function gives of values
that are one where the key is and zero elsewhere, sizes among the operations by what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_SIZES = (aten.sqrt, aten.rsqrt, aten.std, aten.norm, aten.linalg_vector_norm)


class HeldFixed(TorchDispatchMode):
    """``with held_fixed: model(…)``: the first time to learn the constants, then with them."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[Tensor] = []
        self._learns = False
        self._place = 0

    def __enter__(self) -> HeldFixed:
        self._learns, self._place = not self._known, 0
        super().__enter__()
        return self

    def constant(self, find: Callable[[], Tensor]) -> Tensor:
        """What is found in the first run, at the same place of every other."""
        if self._learns:
            self._known.append(find())
        self._place += 1
        return self._known[self._place - 1]

    def attend(self, value: Tensor, call: Callable[[Tensor], Any]) -> Any:
        """In the place of an attention function, which ``call`` runs with other values."""

        def weights() -> Tensor:
            batch, heads, length, _ = value.shape
            given: Tensor = call(torch.eye(length).to(value).expand(batch, heads, -1, -1))[0]
            return given  # [B, S, Hq, keys]

        attention = self.constant(weights)
        own = value.repeat_interleave(attention.shape[2] // value.shape[1], 1)
        return torch.einsum("bqhk,bhkd->bqhd", attention, own).contiguous(), None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.native_layer_norm.default:
            x, shape, weight, bias, _ = args
            normal = x - x.mean(tuple(range(-len(shape), 0)), keepdim=True)
            normal = normal * self.constant(lambda: out[2])
            normal = normal if weight is None else normal * weight
            return normal if bias is None else normal + bias, *out[1:]
        is_root = func is aten.pow.Tensor_Scalar and args[1] in (0.5, -0.5)
        if (is_root or func.overloadpacket in _SIZES) and out.shape[-1:] == (1,):  # a router's root has more
            return self.constant(lambda: out)
        return out
