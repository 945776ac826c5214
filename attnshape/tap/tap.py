"""Queries and keys of chosen attention layers, taken from a running Hugging Face model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from attnshape.tap.capture import (
    Attended,
    Embedded,
    Pooling,
    QueryPosition,
    attended_by,
    check_whole,
    differentiable,
    last_non_pad,
    moved,
)
from attnshape.tap.find import (
    AttentionFunction,
    Mask,
    attention_layers,
    check_layer,
    choose,
    classifier,
    embeddings,
    has_method,
    is_compiled,
    is_inside,
    layers_around,
    models_of,
)
from attnshape.tap.flow import Flow, Norms, Pulls
from attnshape.tap.hooks import Entry, Given, in_trial, unwatch, watch
from attnshape.tap.relevance import FixedNorms
from attnshape.tap.trial import SCORED, Scored, mixes_elsewhere, scored_tokens
from attnshape.types import AttentionInputs, SignedInputs

Source: TypeAlias = Literal[
    "attention", "rollout", "signed_rollout", "gradient_value", "gradient_embedding", "relevance"
]
Check: TypeAlias = Literal["first", "always", "never"]
Taken: TypeAlias = AttentionInputs | SignedInputs | Tensor

_SOURCES = get_args(Source)
_ROLLOUTS = ("rollout", "signed_rollout")
_NO_OTHER_MIXING = ("rollout", "signed_rollout", "gradient_value", "relevance")
GRADIENTS = ("gradient_value", "gradient_embedding", "relevance")
"""Sources for ``credit.gradient_weights``."""
ONE_LAYER = ("gradient_value", "relevance")
"""Those that read a layer that may be given."""
RELEVANCE_UP = 3
"""``"relevance"`` is taken where a third of the layers are below. The words that people call positive or
negative are found best there (``benchmarks/language``): they know their neighbours and have not moved on."""
_CHECKS = ("first", "always", "never")
_POSITIONS = ("pooled", "last_visible", "last_response", "mean", "all")
_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q")


class AttentionTap:
    """Context manager that hands out what credit is made of while a model runs.

    The model keeps its own attention implementation and its logits keep their bits. While the tap is open
    the attention function of its layers is wrapped under its own name; leaving the block, by an exception
    too, restores it. Taps nest. A tap sees the forwards of the thread that entered it, and no others.

    Args:
        model: a Hugging Face model whose attention goes through transformers' ``AttentionInterface``, or an
            eager GPT-J, or a module around one (value head, PEFT, data parallel, ``torch.compile``).
        layer: which of the model's attention layers, negative from the last; or several. One only for
            ``"gradient_value"`` and ``"relevance"``; none for rollouts, which read every layer, nor for
            embeddings.
        source: what ``take`` hands out. ``"attention"``: queries and keys, of the last layer if no ``layer``
            is given. ``"rollout"``: those of every layer with the norms of what they move, for
            ``attention_rollout``. ``"signed_rollout"``: for ``credit.signed_rollout``. ``"gradient_value"``:
            the values of the first layer, or of ``layer``, and ``"gradient_embedding"``: the token
            embeddings, for ``credit.gradient_weights``. ``"relevance"``: for the same, the hidden states that
            enter ``layer``, by default the one with a third of them below; the forward's gradient then holds
            attention and norms fixed (arXiv 2202.07304), so it is for credit, not for training. Only
            ``"attention"`` works in compiled models.
        query_position: the query that is read; may be assigned between forwards. ``"pooled"``: the token
            whose hidden state gave the score, which is the sequence-classification head's choice, or the
            last visible key where there is no such head. ``"last_visible"``. Int ``[B]``: these positions.
            ``"all"``: every query, kept by reference. ``"last_response"``: the same, and the position is
            resolved where the response is known. ``"mean"``: the mean row over the visible queries, for
            heads that average their hidden states (``"pooled"`` finds out by itself).
        check: when a layer's row is held to what the layer did: the row times the values must be its own
            attention output at that query, per head, within ``tolerance.output_bound``. ``"first"``: at the
            first call of each kind (mask, dtypes, scores, about the same length), remembered for all taps on
            the layer; a few queries where every query is taken. Not while dropout is active.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; no such layer; attention that bypasses the
            interface or shards the keys; an encoder-decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int | Sequence[int] | None = None,
        *,
        source: Source = "attention",
        query_position: QueryPosition = "pooled",
        check: Check = "first",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if source not in _SOURCES:
            raise ValueError(f"source: got {source!r}, want one of {_SOURCES}")
        if check not in _CHECKS:
            raise ValueError(f"check: got {check!r}, want one of {_CHECKS}")
        modules, models = dict(model.named_modules()), models_of(model)
        self._source, self._check = source, check
        self._embeddings: list[nn.Module] = []
        self._attention: list[nn.Module] = []
        if source == "gradient_embedding":
            _layer_of(source, layer, 0)
            self._single = True
            self._embeddings = embeddings(list(models.values()))
            if not self._embeddings:
                raise ValueError(f"model: {type(model).__name__} has no token embeddings of its own")
            read = [name for name, module in modules.items() if module is self._embeddings[0]]
        else:
            names = attention_layers(model, models)
            self._attention = [modules[name] for name in names]
            self._last = modules[names[-1]]
            chosen = _layer_of(source, layer, len(names))
            self._single = isinstance(chosen, int)
            read = choose(names, chosen)
            if source == "relevance":
                read = names[names.index(read[0]) :]  # those above have their attention held fixed
        self._layers = [_Layer(name, modules[name]) for name in read]
        self._is_compiled = any(is_compiled(m) for m in modules.values())
        for tapped in self._layers:
            self._check_layer(tapped)
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
            for n, m in models.items()
            if any(is_inside(t.name, n) for t in self._layers)
        ]
        self._norms = FixedNorms(model, self._has_entered) if source == "relevance" else None
        self._head = classifier([m.module for m in self._models])
        # What is around the model may put tokens of its own before those that it is given.
        self._around = None if self._is_compiled or model is self._models[0].module else model
        self._asked: dict[str, Any] = {}
        self._moved: ValueError | None = None
        self._scored: Scored | str | None = None
        self._mixes: bool | str = False
        self._call: _Call | None = None
        self._entries: list[Entry] = []
        self._handles: list[RemovableHandle] = []
        self._thread: int | None = None
        self.query_position = query_position

    def _check_layer(self, layer: _Layer) -> None:
        if self._source != "gradient_embedding":
            check_layer(layer.name, layer.module)
        if self._is_compiled and self._source != "attention":
            raise ValueError(
                f"model: compiled, want source='attention', or the model as it was, for {self._source!r}"
            )
        if self._is_compiled and has_method(type(layer.module)):
            raise ValueError(f"model: compiled, want the model as it was for {type(layer.module).__name__}")

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
        elif value not in _POSITIONS or (value == "mean" and self._source in _ROLLOUTS):
            raise ValueError(f"query_position: got {value!r}, want one of {_POSITIONS} or an int tensor [B]")
        self._query_position = value

    def __enter__(self) -> AttentionTap:
        if self._thread is not None:
            raise RuntimeError("this AttentionTap is open already; make a second one")
        self._reset()
        if self._is_compiled:
            # Nothing can be tried while a graph is traced.
            self._try_model(self._models[-1].module.device)
        self._thread = threading.get_ident()
        self._entries = watch(*self._watched(), self)
        for flow in self._flows:
            flow.open()
        self._handles = [m.register_forward_hook(self._on_embedding) for m in self._embeddings]
        if self._around is not None:
            self._handles.append(self._around.register_forward_pre_hook(self._on_around, with_kwargs=True))
        if self._norms is not None:
            _, block = layers_around(self._models[-1].module, self._layers[0].module)
            self._handles.append(block.register_forward_pre_hook(self._on_block, with_kwargs=True))
            self._norms.open()
        if self._source in GRADIENTS:
            lists = [m for m in self._models[-1].module.modules() if isinstance(m, nn.ModuleList)]
            self._handles += [m.register_forward_pre_hook(self._on_layer) for layers in lists for m in layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unwatch(*self._watched(), self, self._entries)
        for flow in self._flows:
            flow.close()
        if self._norms is not None:
            self._norms.close()
        while self._handles:
            self._handles.pop().remove()
        self._thread = None

    def _watched(self) -> tuple[list[nn.Module], list[nn.Module]]:
        layers = [] if self._embeddings else [layer.module for layer in self._layers]
        return [model.module for model in self._models], layers

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
            its graph: values ``[B, Hkv, S, D]``, or embeddings or hidden states ``[B, S, hidden]``.

        Raises:
            RuntimeError: no forward ran since the last ``take``, or more than one.
            ValueError: the forward did what ``AttentionInputs`` cannot express, or the check failed, or other
                modules mix tokens where the source takes it that attention alone does; the message says what.
        """
        attended = [layer.attended for layer in self._layers]
        forwards = [layer.forwards for layer in self._layers]
        moved = [flow.moved for flow in self._flows] or [None] * len(attended)
        norms = None if self._norms is None else self._norms.seen
        halved = self._embeddings and self._models[0].module.config.is_encoder_decoder
        halved = halved and not self._layers[0].again
        elsewhere = self._moved
        self._reset()
        for layer, count in zip(self._layers, forwards, strict=True):
            if count != 1:
                raise RuntimeError(
                    f"take() wants exactly one forward since the last take(), inside the block and in the "
                    f"thread that entered it; layer {layer.name!r} ran {count}"
                )
        if halved:
            raise ValueError(
                "source: the decoder's embeddings were not seen, so the gradient would be of a part"
            )
        if elsewhere is not None and not self._embeddings:
            raise elsewhere
        if self._source in _NO_OTHER_MIXING:
            self._refuse_other_mixing()
        always = self._check == "always"
        taken: list[Taken] = []
        for layer, found, flow in zip(self._layers, attended, moved, strict=True):
            for trouble in (found, flow):
                if isinstance(trouble, Exception):
                    raise _told(layer.name, trouble)
            if self._source == "relevance" and taken:
                continue
            if isinstance(found, Tensor):
                taken.append(found)
            elif isinstance(found, Attended) and not self._flows:
                taken.append(found.take(layer.name, always=always))
            elif isinstance(found, Attended) and isinstance(flow, Norms | Pulls):
                taken.append(found.with_flow(found.take(layer.name, always=always), flow))
            else:
                raise ValueError(f"layer: what {layer.name!r} moves was not seen; want source='attention'")
        if norms == 0:
            raise ValueError(
                "source: the model called no module that divides a token by its size (LayerNorm, RMSNorm), "
                "so what 'relevance' holds fixed was not seen; want source='gradient_embedding'"
            )
        return taken[0] if self._single else tuple(taken)

    def _refuse_other_mixing(self) -> None:
        if self._mixes is not False:
            kind = type(self._models[-1].module).__name__
            why = self._mixes if isinstance(self._mixes, str) else f"{kind} has other modules that do"
            raise ValueError(
                f"source: {self._source!r} takes it that attention alone moves information between tokens, "
                f"and {why}; want source='gradient_embedding', or 'attention' for the row itself"
            )

    def _try_model(self, device: torch.device) -> None:
        """Find out what has to be tried, with the weights at hand; what is known is not tried again."""
        if self._source in _NO_OTHER_MIXING:
            self._mixes = mixes_elsewhere(self._models[-1].module, self._attention, device)
        if self._reads_pooled() and self._head is not None and not self._head[1]:
            self._scored = scored_tokens(self._head[0], self._last, device)

    def _reads_pooled(self) -> bool:
        return (
            self._source not in GRADIENTS
            and isinstance(self._query_position, str)
            and self._query_position == "pooled"
        )

    def _reset(self) -> None:
        self._call, self._moved, self._asked = None, None, {}
        for layer in self._layers:
            layer.forwards, layer.attended, layer.again = 0, None, False
        for flow in self._flows:
            flow.moved = None
        if self._norms is not None:
            self._norms.seen = 0

    def _on_around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What holds the tapped model is called."""
        if not self._is_other_thread() and not in_trial():
            self._asked = _given(tuple(inspect.signature(module.forward).parameters), args, kwargs)

    def on_call(self, level: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model is called: a forward begins, or reaches a model inside the one that began it."""
        if self._is_other_thread():
            return
        given = _given(self._models[level].parameters, args, kwargs)
        call = self._call
        if call is not None and call.level < level:
            self._call = _Call(call.outermost, level, given | call.given, call.seen)
            if not torch.compiler.is_compiling():
                self._moved = self._moved or moved(call.given, given)
        else:
            self._call = _Call(level, level, given, [False] * len(self._layers))
            if not torch.compiler.is_compiling():
                self._moved, self._asked = moved(self._asked, given), {}
                tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
                self._try_model(next((x.device for x in tensors), self._models[level].module.device))

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
    ) -> Given:
        """A tapped layer is about to call its attention function; returns what to call it with."""
        call = self._call
        if call is None or self._is_other_thread() or self._source == "gradient_embedding":
            return query, key, value, mask, options
        layer = self._layers[index]
        if call.seen[index]:
            layer.attended = ValueError(f"layer: {layer.name!r} attends more than once in a forward")
            return query, key, value, mask, options
        call.seen[index] = True
        layer.forwards += 1
        if self._source == "relevance":
            # Weights come of all but values; a mask too may be made of hidden states (Doge).
            still = {name: _still(x) for name, x in options.items()}
            return query.detach(), key.detach(), value, _still(mask), still
        layer.attended = None
        if layer.forwards > 1:
            return query, key, value, mask, options
        # The forward goes on, whatever happens; take() says why there is nothing to give.
        try:
            if self._source == "gradient_value":
                check_whole(query, value)
                layer.attended = value = differentiable(value)
            else:
                position, pooled = self._position(call.given.get("input_ids"), query)
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
        except Exception as error:
            layer.attended = _kept(error)
        return query, key, value, mask, options

    def _position(
        self, input_ids: Tensor | None, query: Tensor
    ) -> tuple[Pooling | QueryPosition, Tensor | None]:
        """The query position of a forward, "pooled" resolved, and that of padded input by its ids."""
        if not self._reads_pooled():
            return self._query_position, None
        if self._head is None:
            return "last_visible", None
        head, is_known = self._head
        scored = "last_non_pad" if is_known else self._scored
        if scored == "last_non_pad":
            return "last", last_non_pad(head, input_ids, query)
        if scored not in SCORED:
            raise ValueError(
                f"query_position='pooled': which token {type(head).__name__} scores is not known"
                f"{f': {scored}' if scored else ''}; want 'last_visible', 'last_response', 'mean', 'all' or "
                "the positions as an int tensor [B]"
            )
        if scored == "mean" and self._source in _ROLLOUTS:
            raise ValueError(
                f"query_position='pooled': {type(head).__name__} averages its tokens, and a rollout starts "
                "from one; want a position, or source='gradient_embedding'"
            )
        return scored, None  # type: ignore[return-value]

    def on_attended(self, index: int, value: Tensor, output: Any) -> None:
        """The attention function of a tapped layer returned."""
        layer = self._layers[index]
        found = layer.attended
        if not self._is_watched() or layer.forwards != 1 or not isinstance(found, Attended):
            return
        try:
            if self._flows:
                self._flows[index].attended(value, output[0])
            if self._check == "never" or found.drops:
                return
            # Graphs keep what a check needs: they cannot know whether one is due.
            if self._check == "always" or torch.compiler.is_compiling() or found.is_due:
                found.returned(value, output)
        except Exception as error:
            layer.attended = _kept(error)

    def _on_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The token embeddings of a forward, which it goes on with."""
        call = self._call
        if call is None or self._is_other_thread() or in_trial():
            return output
        layer = self._layers[0]
        try:
            if not call.seen[0]:
                call.seen[0] = True
                layer.forwards += 1
                call.embedded = Embedded.of(args[0], output, call.given.get("input_ids"))
                layer.attended = call.embedded.taken
                return call.embedded.passed_on()
            if call.embedded is not None and isinstance(layer.attended, Tensor):
                layer.again = True
                return call.embedded.again(args[0], output)
        except Exception as error:
            layer.attended = _kept(error)
        return output

    def _on_block(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The lowest layer of ``"relevance"`` runs; it goes on with the hidden states that are taken."""
        layer = self._layers[0]
        if not self._is_watched() or in_trial() or layer.attended is not None:
            return None
        try:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                raise ValueError(
                    f"source: {type(module).__name__} carries no one residual stream [B, S, hidden]; want "
                    "source='gradient_embedding'"
                )
            layer.attended = differentiable(hidden)
            passed_on = layer.attended.clone()  # some layers add to it in place
        except Exception as error:
            layer.attended = _kept(error)
            return None
        return ((passed_on, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": passed_on})

    def _has_entered(self) -> bool:
        """Whether the lowest layer of ``"relevance"`` has begun: all that runs then leads to the score."""
        return not self._is_other_thread() and not in_trial() and isinstance(self._layers[0].attended, Tensor)

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A layer of the model runs: if without gradients, they show a part of what moves the score (HRM)."""
        layer = self._layers[0]
        if not isinstance(layer.attended, Tensor) or not self._is_watched() or in_trial():
            return
        checkpointed = getattr(module, "gradient_checkpointing", False) and module.training
        if checkpointed and self._source == "relevance":
            layer.attended = ValueError(
                "source: 'relevance' holds attention and norms fixed while the model runs, and gradient "
                "checkpointing runs it again later; want model.eval()"
            )
        elif not torch.is_grad_enabled() and not checkpointed:
            layer.attended = ValueError(
                f"source: the model runs a {type(module).__name__} without gradients, so that "
                f"{self._source!r} would be of a part of it; want source='attention'"
            )

    def _is_watched(self) -> bool:
        """Whether this thread is inside a forward of the tapped model."""
        return self._call is not None and not self._is_other_thread()

    def _is_other_thread(self) -> bool:
        # A compiled graph cannot ask which thread runs it.
        return not torch.compiler.is_compiling() and threading.get_ident() != self._thread


def _given(parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with, as far as it matters here."""
    given = dict(zip(parameters, args, strict=False)) | kwargs
    return {name: given[name] for name in _ARGUMENTS if given.get(name) is not None}


def _still(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _kept(error: Exception) -> Exception:
    """An error that waits for ``take``; its traceback would hold on to the forward's tensors."""
    return error if torch.compiler.is_compiling() else error.with_traceback(None)


def _told(name: str, error: Exception) -> ValueError:
    """An error that happened inside a forward, as ``take`` raises it."""
    if isinstance(error, ValueError):
        return error
    told = ValueError(
        f"layer: {name!r} could not be read ({type(error).__name__}: {error}); want "
        "source='gradient_embedding', which reads no attention"
    )
    told.__cause__ = error
    return told


@dataclass
class _Model:
    module: PreTrainedModel
    parameters: tuple[str, ...]


@dataclass
class _Layer:
    name: str
    module: nn.Module
    forwards: int = 0
    attended: Attended | Tensor | Exception | None = None
    again: bool = False
    """Of embeddings: whether the forward's second use of them was seen."""


@dataclass
class _Call:
    """A forward under way: the models it is in, what they were given, the tapped layers it passed."""

    outermost: int
    level: int
    given: dict[str, Any]
    seen: list[bool]
    embedded: Embedded | None = None


def _layer_of(source: Source, layer: int | Sequence[int] | None, layers: int) -> int | Sequence[int]:
    """The layers that a source reads, where ``layer`` does not say."""
    if source in _ROLLOUTS or source == "gradient_embedding":
        if layer is not None:
            raise ValueError(f"layer: got {layer!r}, want none for source={source!r}")
        return range(layers) if source in _ROLLOUTS else 0
    if layer is None and source == "relevance":
        return layers // RELEVANCE_UP
    if layer is None:
        return -1 if source == "attention" else 0
    if source in ONE_LAYER and not isinstance(layer, int):
        raise TypeError(f"layer: got {layer!r}, want int for source={source!r}")
    return layer
