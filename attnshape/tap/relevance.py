"""Gradients in which norms are constants: what a token gives is what it adds, its own size left as it is.

Of "XAI for Transformers" (Ali et al. 2022, arXiv 2202.07304): a norm divides a token by its own size, so that
its true gradient leaves out whatever points along the token, which is most of it. With the size held fixed,
gradient times input is carried through a norm whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnshape.types import compute_dtype


def along(x: Tensor, centers: bool) -> Tensor:
    """``d`` of tokens ``[..., hidden]``: the part of a token whose size its norm divides by."""
    return x - x.mean(-1, keepdim=True) if centers else x


_centers: WeakKeyDictionary[nn.Module, bool | None] = WeakKeyDictionary()


@torch.no_grad()
def centers_of(module: nn.Module, like: Tensor) -> bool | None:
    """Of a norm, ``bias + A d / |d|`` with a linear ``A``: whether ``d`` is a token less its mean.

    None for any other module. Found by trying it, whatever its class is called.

    Args:
        like: what it is called with, ``[..., hidden]``.
    """
    if module not in _centers:
        _centers[module] = _tried(module, like)
    return _centers[module]


def _tried(module: nn.Module, like: Tensor) -> bool | None:
    generator = torch.Generator("cpu").manual_seed(0)
    # Far from a mean of 0, where a norm that centres its tokens differs from one that does not.
    probe = (torch.randn(2, like.shape[-1], generator=generator, device="cpu") + 1).to(like)
    probe = torch.stack([probe[0], probe[1], probe[0] + probe[1], torch.zeros_like(probe[0])])
    try:
        given = module.forward(probe.view(*[1] * (like.ndim - 2), *probe.shape))
    except Exception:  # a module that takes something else is no norm
        return None
    if not isinstance(given, Tensor) or given.numel() != probe.numel():
        return None
    found, x = given.view(probe.shape).double(), probe.double()
    for centers in (False, True):
        # Less its bias and times the size of d, a norm is linear in the token; a linear map is not.
        one, other, both = ((found - found[3]) * along(x, centers).norm(dim=-1, keepdim=True))[:3]
        close = max(8 * torch.finfo(like.dtype).eps, 1e-3) * both.abs().max()
        if both.any() and (one + other - both).abs().max() <= close:
            return centers
    return None


class _Held(NamedTuple):
    """A norm that runs: its bias ``[hidden]``, and 1 ``[..., 1]`` with the gradient of the size of ``d``."""

    bias: Tensor
    size: Tensor


class FixedNorms:
    """Hooks on every module of a model that may be a norm.

    Args:
        is_watched: whether what a module does now is to have this gradient.
    """

    def __init__(self, model: nn.Module, is_watched: Callable[[], bool]) -> None:
        self._modules = [m for m in model.modules() if not any(True for _ in m.children())]
        self._is_watched = is_watched
        self._handles: list[RemovableHandle] = []
        self._held: dict[nn.Module, _Held] = {}
        self.seen = 0

    def open(self) -> None:
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._on_call, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._on_return))

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._held.clear()

    def _on_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]] | None:
        given = (*args, *kwargs.values())
        x = given[0] if len(given) == 1 else None
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and self._is_watched()):
            return None
        # Before it runs: sharded models have its weights at hand then.
        centers = centers_of(module, x)
        if centers is None:
            return None
        with torch.no_grad():
            bias = module.forward(x.new_zeros(*[1] * (x.ndim - 1), x.shape[-1]))
        d = along(x.to(compute_dtype(x)), centers)
        still = d.detach()
        share = (still * d).sum(-1, keepdim=True) / still.square().sum(-1, keepdim=True).clamp(min=1e-30)
        size = share - share.detach() + 1
        self._held[module] = _Held(bias, size)
        # Along d the module's own gradient is next to nothing, as it divides by |d|; it becomes none at all.
        return (x + (still * (1 - size)).to(x.dtype),), {}

    def _on_return(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        held = self._held.pop(module, None)
        if held is None:
            return output
        self.seen += 1
        # Instead all that the norm gives, apart from its bias, grows with d.
        whole = output.detach().to(held.size.dtype) - held.bias.to(held.size.dtype)
        return output + (whole * (held.size - 1)).to(output.dtype)
