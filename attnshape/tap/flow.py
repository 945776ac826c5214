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
    strange: Tensor
    """Whether the layer adds something else to the residual stream than such a multiple."""


class Pulls(NamedTuple):
    """Which way a layer moves what, laid out likewise."""

    value: Tensor
    """``[B, Hkv, S, Dv]``, the layer's own, by reference."""
    pull: Tensor
    """``W_O,h^T y[s] / |y[s]|^2``, ``[B, Hq, S, Dv]``."""
    strange: Tensor
    """As in ``Norms``."""


class Flow:
    """Watches a decoder layer from its input to what its attention adds.

    The output projection is the child of the attention module that is called with the attention function's
    output itself and whose output the module returns. What other children of the layer make of that before it
    is added (a norm in Gemma 2 and OLMo 2, dropout) is followed in the same way, and counts as one factor per
    position. The stream after the attention, ``x + c * added``, is what a later child is called with, or what
    the layer returns once another child's output is taken off (attention and MLP side by side): that gives
    ``c``, which is 1 but in Granite and the like, and shows layers that do otherwise.

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
        self._later: list[Tensor] = []  # what other children are called with, and return
        self._beside: list[Tensor] = []

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
            # Before it runs: FSDP2 and ZeRO-3 have its weights at hand from their first hook on it, which is
            # older than this one, until their hook after it, which comes before any of ours.
            self._handles.append(child.register_forward_pre_hook(self._guarded(self._on_projection)))
            self._handles.append(child.register_forward_hook(self._guarded(self._on_projected)))
        self._handles += [
            m.register_forward_hook(self._guarded(self._on_child))
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
        stream = args[0] if args else kwargs["hidden_states"]
        if stream.ndim != 3:
            raise ValueError(
                f"source: {type(module).__name__} carries {list(stream.shape)}, not one residual stream "
                "[B, S, hidden]; want source='attention' or a gradient source"
            )
        self._stream = stream.detach()

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

    def _on_child(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        output = output[0] if isinstance(output, tuple) else output
        if _same(given, self._added) and isinstance(output, Tensor):
            self._added = output.detach()
            return
        if isinstance(given, Tensor) and self._added is not None:
            self._later.append(given.detach())
        if isinstance(output, Tensor):
            self._beside.append(output.detach())

    def _on_leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._heads is not None:
            self.moved = self._measure((output[0] if isinstance(output, tuple) else output).detach())
            self._forget()

    @torch.no_grad()
    def _measure(self, left: Tensor) -> Norms | Pulls:
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
            constant, strange = self._constant(stream, added, left.to(dtype), heads.dtype)
            before, after = out.norm(dim=-1), added.norm(dim=-1)
            factor = constant * torch.where(before > 0, after / before, 1.0)
            if self._signed:
                y = stream + constant * added
                square = y.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
                pull = (y @ weight.mT) * (factor / square)[..., None]
                return Pulls(value, pull.view(*pull.shape[:-1], hq, width).transpose(1, 2), strange)
            by_head = weight.view(hq, width, -1)
            gram = by_head @ by_head.mT  # |W_O v|^2 = v^T (W_O^T W_O) v
            v = value.to(dtype).repeat_interleave(hq // value.shape[1], 1)
            size = ((v @ gram) * v).sum(-1).clamp(min=0).sqrt()
            return Norms(size, stream.norm(dim=-1) / factor, strange)

    def _constant(
        self, stream: Tensor, added: Tensor, left: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``c`` of the stream after the attention, ``stream + c * added``, and whether there is none."""
        # OPT flattens its tokens on the way.
        later, beside_it = (
            [x.to(stream.dtype).reshape(stream.shape) for x in xs if x.numel() == stream.numel()]
            for xs in (self._later, self._beside)
        )
        seen: list[tuple[Tensor, Tensor | None]] = [(x, None) for x in later]
        seen += [(left, x) for x in beside_it]
        fits = []
        for after, beside in seen:
            gap, other = after - stream, torch.zeros_like(stream) if beside is None else beside
            # What stands in padding reaches nothing.
            sound = (gap + added + other).isfinite().all(-1, keepdim=True)
            gap, other, after = (torch.where(sound, x, 0.0) for x in (gap, other, after))
            # By the size of each token: one with massive activations is no measure of the others.
            size = after.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(after.dtype).tiny)
            gap, other, own = gap / size, other / size, torch.where(sound, added, 0.0) / size
            # Least squares with one more tensor at most: what is left of ``added`` without that.
            alone = own - _share(own, other) * other
            constant = _share(gap, alone)
            missed = (gap - constant * own - _share(gap - constant * own, other) * other).norm()
            # Models that were tried leave a quarter of this at most.
            rounding = 2 * torch.finfo(dtype).eps * size.numel() ** 0.5
            constant = torch.where((constant - 1).abs() * own.norm() <= rounding, 1.0, constant)
            none = (constant * own).norm() <= rounding  # the stream as it was before the attention
            fits.append(
                torch.stack([(none | (missed > rounding + 1e-3 * gap.norm())).to(constant), constant])
            )
        if not fits:
            return torch.ones_like(stream[0, 0, 0]), torch.ones((), dtype=torch.bool, device=stream.device)
        found = torch.stack(fits)
        strange, constant = found[found[:, 0].argmin()]
        return constant.to(stream.dtype), strange > 0


def _share(x: Tensor, of: Tensor) -> Tensor:
    """The factor on ``of`` that comes nearest to ``x``; 0 for no ``of``."""
    square = (of * of).sum()
    return torch.where(square > 0, (x * of).sum() / square.clamp(min=torch.finfo(square.dtype).tiny), 0.0)


def _same(given: object, x: Tensor | None) -> bool:
    """Whether ``given`` holds the very elements of ``x``."""
    if not isinstance(given, Tensor) or x is None:
        return False
    if x.is_contiguous():
        return given.data_ptr() == x.data_ptr()
    # GPT-2's eager attention leaves the copying to its caller.
    return given.numel() == x.numel() and torch.equal(given.reshape(x.shape), x)
