"""What a layer's attention moves along the residual stream, measured by hooks while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnshape.types import compute_dtype


class Norms(NamedTuple):
    """How much a layer moves; ``[B, ...]`` over all positions, packed sequences not told apart."""

    value: Tensor
    """``|W_O,h v[h, t]|``, ``[B, Hq, S]``."""
    residual: Tensor
    """``|x[s]|``, ``[B, S]``, divided by the factor that the layer puts on what its attention adds."""


class Pulls(NamedTuple):
    """Which way a layer moves what, laid out likewise."""

    value: Tensor
    """``[B, Hkv, S, Dv]``, the layer's own, by reference."""
    pull: Tensor
    """``W_O,h^T y[s] / |y[s]|^2``, ``[B, Hq, S, Dv]``."""


class Flow:
    """Watches a decoder layer from its input to what its attention adds.

    The output projection is the child of the attention module that is called with the attention function's
    output itself and whose output the module returns. What other children of the layer make of that before it
    is added (a norm in Gemma 2 and OLMo 2, dropout) is followed in the same way, and counts as one factor per
    position; Granite's constant factor is the layer's ``residual_multiplier``.

    Args:
        attention: the attention module.
        layer: the module that it is part of, which is called with the residual stream.
        signed: whether it measures ``Pulls`` instead of ``Norms``.
        is_watched: whether the forward that is under way is one to look at.
    """

    def __init__(
        self, attention: nn.Module, layer: nn.Module, *, signed: bool, is_watched: Callable[[], bool]
    ) -> None:
        self._attention, self._layer = attention, layer
        self._signed, self._is_watched = signed, is_watched
        self._handles: list[RemovableHandle] = []
        self.moved: Norms | Pulls | Exception | None = None
        self._forget()

    def _forget(self) -> None:
        self._stream: Tensor | None = None
        self._value: Tensor | None = None
        self._heads: Tensor | None = None  # [B, S, Hq, Dv], what the attention function returned
        self._columns: Tensor | None = None  # [Hq * Dv, hidden], of the projection
        self._projected: Tensor | None = None
        self._out: Tensor | None = None
        self._added: Tensor | None = None

    def open(self) -> None:
        """Hook the modules; ``close`` undoes it."""
        layer, attention = self._layer, self._attention
        before, after = self._guarded(self._on_enter), self._guarded(self._on_leave)
        self._handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            attention.register_forward_hook(self._guarded(self._on_attention)),
            layer.register_forward_hook(after),
        ]
        for child in attention.children():
            # Before it runs: sharded weights are at hand from its own first hook to its own last.
            self._handles.append(child.register_forward_pre_hook(self._guarded(self._on_projection)))
            self._handles.append(child.register_forward_hook(self._guarded(self._on_projected)))
        self._handles += [
            m.register_forward_hook(self._guarded(self._on_addition))
            for m in layer.children()
            if m is not attention
        ]

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """``hook``, in the forwards that are watched; the model's forward goes on if it fails."""

        def guarded(*args: Any) -> None:
            if self._is_watched() and not isinstance(self.moved, Exception):
                try:
                    hook(*args)
                except Exception as error:
                    # Its traceback would hold on to the forward's tensors.
                    self.moved = error.with_traceback(None)
                    self._forget()

        return guarded

    def attended(self, value: Tensor, heads: Tensor) -> None:
        """The attention function was given ``value`` and returned ``heads``."""
        self._value, self._heads = value.detach(), heads.detach()

    def _on_enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        self._stream = (args[0] if args else kwargs["hidden_states"]).detach()

    @torch.no_grad()
    def _on_projection(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        heads = self._heads
        if heads is None or self._columns is not None or not args or not _same(args[0], heads):
            return
        # The columns of the projection, whatever kind of module it is (LoRA, quantised).
        basis = torch.eye(heads.shape[-2] * heads.shape[-1], dtype=heads.dtype, device=heads.device)
        self._columns = module.forward(basis) - module.forward(torch.zeros_like(basis[:1]))

    def _on_projected(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._columns is not None and self._projected is None and _same(args[0], self._heads):
            self._projected = output

    def _on_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._heads is not None:
            self._out = self._added = (output[0] if isinstance(output, tuple) else output).detach()

    def _on_addition(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and _same(args[0], self._added) and isinstance(output, Tensor):
            self._added = output.detach()

    def _on_leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._heads is not None:
            self.moved = self._measure()
            self._forget()

    @torch.no_grad()
    def _measure(self) -> Norms | Pulls:
        stream, value, heads, out, added = self._stream, self._value, self._heads, self._out, self._added
        columns = self._columns
        if (
            columns is None
            or stream is None
            or value is None
            or heads is None
            or out is None
            or added is None
            or not _same(self._projected, out)
        ):
            raise ValueError(
                f"source: {type(self._attention).__name__} does not pass on what its heads give as it is, so "
                "its output projection is not known; want source='attention' or a gradient source"
            )
        hq, width = heads.shape[-2:]
        with torch.autocast(value.device.type, enabled=False):
            dtype = compute_dtype(value)
            weight, stream, out, added = (x.to(dtype) for x in (columns, stream, out, added))
            constant = getattr(self._layer, "residual_multiplier", 1.0)
            before, after = out.norm(dim=-1), added.norm(dim=-1)
            factor = constant * torch.where(before > 0, after / before, 1.0)
            if self._signed:
                y = stream + constant * added
                square = y.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
                pull = (y @ weight.mT) * (factor / square)[..., None]
                return Pulls(value, pull.view(*pull.shape[:-1], hq, width).transpose(1, 2))
            by_head = weight.view(hq, width, -1)
            gram = by_head @ by_head.mT  # |W_O v|^2 = v^T (W_O^T W_O) v
            v = value.to(dtype).repeat_interleave(hq // value.shape[1], 1)
            return Norms(((v @ gram) * v).sum(-1).clamp(min=0).sqrt(), stream.norm(dim=-1) / factor)


def _same(given: object, x: Tensor | None) -> bool:
    """Whether ``given`` holds the very elements of ``x``."""
    if not isinstance(given, Tensor) or x is None:
        return False
    if x.is_contiguous():
        return given.data_ptr() == x.data_ptr()
    # GPT-2's eager attention leaves the copying to its caller.
    return given.numel() == x.numel() and torch.equal(given.reshape(x.shape), x)
