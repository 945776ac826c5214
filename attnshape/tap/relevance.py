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


class Norm(NamedTuple):
    """``bias + A d / |d|``, with a linear ``A``; ``d`` is a token, or what of it differs from its mean."""

    centers: bool
    bias: Tensor
    """``[hidden]``."""

    def along(self, x: Tensor) -> Tensor:
        """``d`` of tokens ``[..., hidden]``."""
        return x - x.mean(-1, keepdim=True) if self.centers else x

    def size(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``d`` as a constant, and 1, ``[..., 1]``, with the gradient of how many times as long it is."""
        d = self.along(x.to(compute_dtype(x)))
        still = d.detach()
        share = (still * d).sum(-1, keepdim=True) / still.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return still, share - share.detach() + 1


_norms: WeakKeyDictionary[nn.Module, Norm | None] = WeakKeyDictionary()


@torch.no_grad()
def norm_of(module: nn.Module, like: Tensor) -> Norm | None:
    """What a module does to a token, if that is a norm: found by trying it, whatever its class is called.

    Args:
        like: what it is called with, ``[..., hidden]``.
    """
    if module not in _norms:
        _norms[module] = _tried(module, like)
    return _norms[module]


def _tried(module: nn.Module, like: Tensor) -> Norm | None:
    generator = torch.Generator().manual_seed(0)
    # Far from a mean of 0, where a norm that centres its tokens differs from one that does not.
    probe = (torch.randn(2, like.shape[-1], generator=generator) + 1).to(like)
    probe = torch.stack([probe[0], probe[1], probe[0] + probe[1], torch.zeros_like(probe[0])])
    try:
        given = module.forward(probe.view(*[1] * (like.ndim - 2), *probe.shape))
    except Exception:  # a module that takes something else is no norm
        return None
    if not isinstance(given, Tensor) or given.numel() != probe.numel():
        return None
    found, x = given.view(probe.shape).double(), probe.double()
    bias = found[3]
    for centers in (False, True):
        norm = Norm(centers, given.view(probe.shape)[3])
        # Less its bias and times the size of d, a norm is linear in the token; a linear map is not.
        one, other, both = ((found - bias) * norm.along(x).norm(dim=-1, keepdim=True))[:3]
        close = max(8 * torch.finfo(like.dtype).eps, 1e-3) * both.abs().max()
        if both.any() and (one + other - both).abs().max() <= close:
            return norm
    return None


class FixedNorms:
    """Hooks on every module of a model that may be a norm.

    Args:
        is_watched: whether what a module does now is to have this gradient.
    """

    def __init__(self, model: nn.Module, is_watched: Callable[[], bool]) -> None:
        self._modules = [m for m in model.modules() if not any(True for _ in m.children())]
        self._is_watched = is_watched
        self._handles: list[RemovableHandle] = []
        self._sizes: dict[nn.Module, Tensor] = {}
        self.seen = 0

    def open(self) -> None:
        for module in self._modules:
            # Before it runs: sharded models have its weights at hand then.
            self._handles.append(module.register_forward_pre_hook(self._on_call))
            self._handles.append(module.register_forward_hook(self._on_return))

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._sizes.clear()

    def _on_call(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            return None
        norm = norm_of(module, args[0]) if self._is_watched() else None
        if norm is None:
            return None
        # Along d the module's own gradient is next to nothing, as it divides by |d|; it becomes none at all.
        still, self._sizes[module] = norm.size(args[0])
        return (args[0] + (still * (1 - self._sizes[module])).to(args[0].dtype),)

    def _on_return(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        size, norm = self._sizes.pop(module, None), _norms.get(module)
        if size is None or norm is None:
            return output
        self.seen += 1
        # Instead all that the norm gives, apart from its bias, grows with d.
        whole = output.detach().to(size.dtype) - norm.bias.to(size.dtype)
        return output + (whole * (size - 1)).to(output.dtype)
