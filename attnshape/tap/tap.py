"""Queries and keys of chosen attention layers, taken from a running Hugging Face model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from attnshape.tap.capture import Attended, QueryPosition, attended_by, differentiable, pooled_position
from attnshape.tap.find import (
    AttentionFunction,
    Mask,
    can_tap,
    check_layer,
    choose,
    has_method,
    is_compiled,
    is_inside,
    lookups,
    pooling_head,
)
from attnshape.tap.flow import Flow
from attnshape.tap.hooks import Entry, Probe, attach, detach, hook, install, unhook, uninstall
from attnshape.types import AttentionInputs, SignedInputs

Source: TypeAlias = Literal["attention", "rollout", "signed_rollout", "gradient_value", "gradient_embedding"]
Taken: TypeAlias = AttentionInputs | SignedInputs | Tensor

_SOURCES = ("attention", "rollout", "signed_rollout", "gradient_value", "gradient_embedding")
_ROLLOUTS = ("rollout", "signed_rollout")
_POSITIONS = ("pooled", "last_visible", "last_response", "all")
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q")

_lock = threading.Lock()


class AttentionTap:
    """Context manager that hands out what credit is made of while a model runs.

    The model keeps its own attention implementation and its logits keep their bits. While the tap is open
    the attention function of its layers is wrapped under its own name; leaving the block, by an exception
    too, restores it. Taps nest. A tap sees the forwards of the thread that entered it, and no others.

    Args:
        model: a Hugging Face model whose attention goes through transformers' ``AttentionInterface``, or an
            eager GPT-J, or a module around one (value head, PEFT, data parallel, ``torch.compile``).
        layer: which of the model's attention layers, negative from the last; or several. One only for
            ``"gradient_value"``; none for rollouts, which read every layer, nor for embeddings.
        source: what ``take`` hands out. ``"attention"``: queries and keys, of the last layer if no ``layer``
            is given. ``"rollout"``: those of every layer with the norms of what they move, for
            ``attention_rollout``. ``"signed_rollout"``: for ``credit.signed_rollout``. ``"gradient_value"``:
            the values of the first layer, or of ``layer``, and ``"gradient_embedding"``: the token
            embeddings, for ``credit.gradient_weights``. Only ``"attention"`` works in compiled models.
        query_position: the query that is read; may be assigned between forwards. ``"pooled"``: the token
            whose hidden state gave the score, which is the sequence-classification head's choice, or the
            last visible key where there is no such head. ``"last_visible"``. Int ``[B]``: these positions.
            ``"all"``: every query, kept by reference. ``"last_response"``: the same, and the position is
            resolved where the response is known.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; no such layer; attention that bypasses the
            interface or shards the keys; ``"pooled"`` with a head whose choice is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int | Sequence[int] | None = None,
        *,
        source: Source = "attention",
        query_position: QueryPosition = "pooled",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if source not in _SOURCES:
            raise ValueError(f"source: got {source!r}, want one of {_SOURCES}")
        modules = dict(model.named_modules())
        names = [n for n, m in modules.items() if can_tap(type(m)) and getattr(m, "is_causal", True)]
        if not names:
            raise ValueError(
                f"model: {type(model).__name__} has no causal attention layer that takes its function from "
                "transformers' AttentionInterface, so its queries and keys cannot be tapped"
            )
        self._source = source
        layer = _layer_of(source, layer, len(names))
        self._single = isinstance(layer, int)
        self._layers = [_Layer(name, modules[name]) for name in choose(names, layer)]
        for tapped in self._layers:
            check_layer(tapped.name, tapped.module)
        if any(is_compiled(m) for m in modules.values()):
            if source != "attention":
                raise ValueError(
                    f"model: compiled, want source='attention', or the model as it was, for {source!r}"
                )
            for tapped in self._layers:
                if has_method(type(tapped.module)):
                    raise ValueError(
                        f"model: compiled, want the model as it was for {type(tapped.module).__name__}"
                    )
        self._flows = [
            Flow(
                modules[t.name],
                modules[t.name.rpartition(".")[0]],
                signed=source == "signed_rollout",
                is_watched=self._is_watched,
            )
            for t in self._layers
            if source in _ROLLOUTS
        ]
        self._models = [
            _Model(m, tuple(inspect.signature(m.forward).parameters))
            for n, m in modules.items()
            if isinstance(m, PreTrainedModel) and any(is_inside(t.name, n) for t in self._layers)
        ]
        if not self._models:
            raise ValueError(f"model: {type(model).__name__} holds no transformers.PreTrainedModel")
        self._head = pooling_head([m.module for m in self._models])
        self._call: _Call | None = None
        self._entries: list[Entry] = []
        self._thread: int | None = None
        self._embedding_hook: RemovableHandle | None = None
        self.query_position = query_position

    @property
    def query_position(self) -> QueryPosition:
        return self._query_position

    @query_position.setter
    def query_position(self, value: QueryPosition) -> None:
        if isinstance(value, Tensor):
            if value.ndim != 1 or value.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"query_position: got {value.dtype} {list(value.shape)}, want int32 or int64 [B]"
                )
        elif value not in _POSITIONS:
            raise ValueError(f"query_position: got {value!r}, want one of {_POSITIONS} or an int tensor [B]")
        elif value == "pooled" and isinstance(self._head, str):
            raise ValueError(
                f"query_position='pooled': which token {self._head} scores is not known; want "
                "'last_visible', 'last_response', 'all' or the positions as an int tensor [B]"
            )
        self._query_position = value

    def __enter__(self) -> AttentionTap:
        if self._thread is not None:
            raise RuntimeError("this AttentionTap is open already; make a second one")
        self._reset()
        self._thread = threading.get_ident()
        with _lock:
            for level, model in enumerate(self._models):
                attach(model.module, Probe(self, level))
                hook(model.module)
            for index, layer in enumerate(self._layers):
                attach(layer.module, Probe(self, index))
                self._entries += [install(*lookup) for lookup in lookups(layer.module)]
        for flow in self._flows:
            flow.open()
        if self._source == "gradient_embedding":
            embedding = self._models[0].module.get_input_embeddings()
            self._embedding_hook = embedding.register_forward_hook(self._on_embedding)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            while self._entries:
                uninstall(self._entries.pop())
            for layer in self._layers:
                detach(layer.module, self)
            for model in self._models:
                if not detach(model.module, self):
                    unhook(model.module)
        for flow in self._flows:
            flow.close()
        if self._embedding_hook is not None:
            self._embedding_hook.remove()
            self._embedding_hook = None
        self._thread = None

    def take(self) -> Any:
        """What the one forward since the last ``take`` used; works after the block too.

        Returns:
            ``AttentionInputs`` if ``layer`` was an int, else a tuple in the order of ``layer``; detached.
            ``query`` is a copy of the rows, ``[B, Hq, D]`` (every query, by reference, for ``"all"``,
            ``"last_response"`` and rollouts); ``key`` is the layer's own, by reference. Packed input, that is
            ``cu_seq_lens_q`` or restarting ``position_ids``, both without a mask, gives one row per sequence
            (the last token's unless positions are given, which count from the sequence's first token), and
            ``key`` as ``[N, Hkv, D]`` with ``cu_seqlens``.

            Rollouts give a tuple of every layer, the lowest first: ``AttentionInputs`` with norms, or
            ``SignedInputs``. A gradient source gives the tensor that the score is to be differentiated by, in
            its graph: values ``[B, Hkv, S, D]`` or embeddings ``[B, S, hidden]``.

        Raises:
            RuntimeError: no forward ran since the last ``take``, or more than one.
            ValueError: the forward did what ``AttentionInputs`` cannot express; the message names it.
        """
        attended = [layer.attended for layer in self._layers]
        forwards = [layer.forwards for layer in self._layers]
        moved = [flow.moved for flow in self._flows] or [None] * len(attended)
        self._reset()
        for layer, count in zip(self._layers, forwards, strict=True):
            if count != 1:
                raise RuntimeError(
                    f"take() wants exactly one forward since the last take(), inside the block and in the "
                    f"thread that entered it; layer {layer.name!r} ran {count}"
                )
        taken: list[Taken] = []
        for found, flow in zip(attended, moved, strict=True):
            if isinstance(found, ValueError):
                raise found
            if isinstance(flow, ValueError):
                raise flow
            if isinstance(found, Tensor):
                taken.append(found)
            elif found is not None:
                taken.append(found.inputs() if flow is None else found.with_flow(flow))
        return taken[0] if self._single else tuple(taken)

    def _reset(self) -> None:
        self._call = None
        for layer in self._layers:
            layer.forwards, layer.attended = 0, None
        for flow in self._flows:
            flow.moved = None

    def on_call(self, level: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model is called: a forward begins, or reaches a model inside the one that began it."""
        if self._is_other_thread():
            return
        given = dict(zip(self._models[level].parameters, args, strict=False)) | kwargs
        given = {name: given[name] for name in _ARGUMENTS if given.get(name) is not None}
        call = self._call
        if call is not None and call.level < level:
            self._call = _Call(call.outermost, level, given | call.given, call.seen)
        else:
            self._call = _Call(level, level, given, [False] * len(self._layers))

    def on_return(self, level: int) -> None:
        """A model returns; what its layers do later is gradient checkpointing, which runs them again."""
        if self._call is not None and self._call.outermost == level and not self._is_other_thread():
            self._call = None

    def on_attention(
        self,
        index: int,
        function: AttentionFunction,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        options: dict[str, Any],
    ) -> Tensor:
        """A tapped layer is about to call its attention function; returns the values to call it with."""
        call = self._call
        if call is None or self._is_other_thread() or self._source == "gradient_embedding":
            return value
        layer = self._layers[index]
        if call.seen[index]:
            layer.attended = ValueError(f"layer: {layer.name!r} attends more than once in a forward")
            return value
        call.seen[index] = True
        layer.forwards += 1
        layer.attended = None
        if layer.forwards > 1:
            return value
        if self._source == "gradient_value":
            layer.attended = differentiable(value)
            return value if isinstance(layer.attended, ValueError) else layer.attended
        pooled, position = None, self._query_position
        if isinstance(position, str) and position == "pooled" and isinstance(self._head, PreTrainedModel):
            pooled = pooled_position(self._head, call.given.get("input_ids"), query)
        try:
            layer.attended = attended_by(
                layer.module,
                function,
                query.detach(),
                key.detach(),
                mask,
                options,
                given=call.given,
                position=position,
                pooled=pooled,
                whole=self._source in _ROLLOUTS,
            )
        except ValueError as error:
            # The forward goes on; take() says why there is nothing to give.
            layer.attended = error
        return value

    def on_attended(self, index: int, value: Tensor, output: Any) -> None:
        """The attention function of a tapped layer returned."""
        if self._flows and self._is_watched() and self._layers[index].forwards == 1:
            self._flows[index].attended(value, output[0])

    def _on_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The token embeddings of a forward, which it goes on with."""
        if self._call is None or self._is_other_thread():
            return output
        layer = self._layers[0]
        layer.forwards += 1
        layer.attended = differentiable(output)
        return output if isinstance(layer.attended, ValueError) else layer.attended

    def _is_watched(self) -> bool:
        """Whether this thread is inside a forward of the tapped model."""
        return self._call is not None and not self._is_other_thread()

    def _is_other_thread(self) -> bool:
        # A compiled graph cannot ask which thread runs it.
        return not torch.compiler.is_compiling() and threading.get_ident() != self._thread


@dataclass
class _Model:
    module: PreTrainedModel
    parameters: tuple[str, ...]


@dataclass
class _Layer:
    name: str
    module: nn.Module
    forwards: int = 0
    attended: Attended | Tensor | ValueError | None = None


@dataclass
class _Call:
    """A forward under way: the models it is in, what they were given, the tapped layers it passed."""

    outermost: int
    level: int
    given: dict[str, Any]
    seen: list[bool]


def _layer_of(source: Source, layer: int | Sequence[int] | None, layers: int) -> int | Sequence[int]:
    """The layers that a source reads, where ``layer`` does not say."""
    if source in _ROLLOUTS or source == "gradient_embedding":
        if layer is not None:
            raise ValueError(f"layer: got {layer!r}, want none for source={source!r}")
        return range(layers) if source in _ROLLOUTS else 0
    if layer is None:
        return -1 if source == "attention" else 0
    if source == "gradient_value" and not isinstance(layer, int):
        raise TypeError(f"layer: got {layer!r}, want int for source={source!r}")
    return layer
