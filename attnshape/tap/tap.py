"""Queries and keys of chosen attention layers, taken from a running Hugging Face model."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from attnshape.tap.flow import Flow, Norms, Pulls
from attnshape.types import AttentionInputs, SignedInputs

AttentionFunction: TypeAlias = Callable[..., Any]
Mask: TypeAlias = Tensor | BlockMask | None
QueryPosition: TypeAlias = Literal["pooled", "last_visible", "last_response", "all"] | Tensor
Source: TypeAlias = Literal["attention", "rollout", "signed_rollout", "gradient_value", "gradient_embedding"]
Taken: TypeAlias = AttentionInputs | SignedInputs | Tensor

_SOURCES = ("attention", "rollout", "signed_rollout", "gradient_value", "gradient_embedding")
_ROLLOUTS = ("rollout", "signed_rollout")
_POSITIONS = ("pooled", "last_visible", "last_response", "all")
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q")
_EAGER = "eager_attention_forward"
_METHOD, _METHOD_CLASSES = "_attn", ("GPTJAttention",)
"""Attention that is a method of its module, and goes through no interface."""
_SHARDS_KEYS = ("ring_flash_attn", "deepspeed")
_PROBES = "_attention_probes"
_HOOKS = "_attention_hooks"

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
        names = [n for n, m in modules.items() if _can_tap(type(m)) and getattr(m, "is_causal", True)]
        if not names:
            raise ValueError(
                f"model: {type(model).__name__} has no causal attention layer that takes its function from "
                "transformers' AttentionInterface, so its queries and keys cannot be tapped"
            )
        self._source = source
        layer = _layer_of(source, layer, len(names))
        self._single = isinstance(layer, int)
        self._layers = [_Layer(name, modules[name]) for name in _choose(names, layer)]
        for tapped in self._layers:
            _check_layer(tapped)
        if any(_is_compiled(m) for m in modules.values()):
            if source != "attention":
                raise ValueError(
                    f"model: compiled, want source='attention', or the model as it was, for {source!r}"
                )
            for tapped in self._layers:
                if _has_method(type(tapped.module)):
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
            if isinstance(m, PreTrainedModel) and any(_is_inside(t.name, n) for t in self._layers)
        ]
        if not self._models:
            raise ValueError(f"model: {type(model).__name__} holds no transformers.PreTrainedModel")
        self._head = _pooling_head([m.module for m in self._models])
        self._call: _Call | None = None
        self._entries: list[_Entry] = []
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
                _attach(model.module, _Probe(self, level))
                _hook(model.module)
            for index, layer in enumerate(self._layers):
                _attach(layer.module, _Probe(self, index))
                self._entries += [_install(*lookup) for lookup in _lookups(layer.module)]
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
                _uninstall(self._entries.pop())
            for layer in self._layers:
                _detach(layer.module, self)
            for model in self._models:
                if not _detach(model.module, self):
                    _unhook(model.module)
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

    def _on_call(self, level: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

    def _on_return(self, level: int) -> None:
        """A model returns; what its layers do later is gradient checkpointing, which runs them again."""
        if self._call is not None and self._call.outermost == level and not self._is_other_thread():
            self._call = None

    def _on_attention(
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
            layer.attended = _differentiable(value)
            return value if isinstance(layer.attended, ValueError) else layer.attended
        pooled, position = None, self._query_position
        if isinstance(position, str) and position == "pooled" and isinstance(self._head, PreTrainedModel):
            pooled = _pooled(self._head, call.given.get("input_ids"), query)
        try:
            layer.attended = _attended(
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

    def _on_attended(self, index: int, value: Tensor, output: Any) -> None:
        """The attention function of a tapped layer returned."""
        if self._flows and self._is_watched() and self._layers[index].forwards == 1:
            self._flows[index].attended(value, output[0])

    def _on_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The token embeddings of a forward, which it goes on with."""
        if self._call is None or self._is_other_thread():
            return output
        layer = self._layers[0]
        layer.forwards += 1
        layer.attended = _differentiable(output)
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
    attended: _Attended | Tensor | ValueError | None = None


@dataclass
class _Call:
    """A forward under way: the models it is in, what they were given, the tapped layers it passed."""

    outermost: int
    level: int
    given: dict[str, Any]
    seen: list[bool]


@dataclass
class _Attended:
    """One call of a layer's attention function, on its way to ``AttentionInputs``."""

    query: Tensor
    key: Tensor
    scaling: float
    options: dict[str, Any]
    position: QueryPosition
    pooled: Tensor | None
    whole: bool
    """Whether every query is kept."""
    mask: Tensor | None
    square_mask: Mask
    """``[B, 1, S, S]``: given in the place of ``mask``."""
    cu_seqlens: Tensor | None
    position_ids: Tensor | None
    """``[B, S]``, until searched for restarts."""
    joined: Tensor | None
    """bool ``[B, S - 1]``: whether a token sees the one before it, as none does across packed sequences."""

    def locate(self) -> None:
        """Find the sequences and the queries that are read, and keep those queries only."""
        if self.position_ids is not None:
            self.cu_seqlens = _sequences(self.position_ids, self.key.shape[0])
            self.position_ids = None
        if self.cu_seqlens is None:
            self._locate_padded()
        else:
            self._locate_packed(self.cu_seqlens)

    def _locate_padded(self) -> None:
        batch, _, length, _ = self.key.shape
        position = self.position
        every = isinstance(position, str) and position in ("all", "last_response")
        if (every or self.whole) and self.square_mask is not None:
            wanted = f"query_position={position!r}" if every else "a rollout"
            raise ValueError(f"attention_mask: got 4-D, want [B, S] for {wanted}")
        if every:
            return
        keys = torch.arange(length, device=self.key.device)
        if isinstance(position, str) and position == "pooled" and self.pooled is not None:
            position = self.pooled
        if isinstance(position, str):
            visible = torch.ones_like(keys, dtype=torch.bool).expand(batch, -1)
            if self.mask is not None:
                visible = self.mask.to(keys.device) != 0
            elif self.square_mask is not None:
                visible = _sees(self.square_mask, keys, keys, batch)
            position = (visible * keys).argmax(-1).to(torch.int32)
        self.position = _checked(position, batch).to(keys.device)
        if self.whole:
            return
        rows = self.position.clamp(0, length - 1)
        if self.square_mask is not None:
            self.mask, self.square_mask = _sees(self.square_mask, rows[:, None], keys, batch), None
        self.query = self.query[torch.arange(batch, device=keys.device), :, rows]

    def _locate_packed(self, cu_seqlens: Tensor) -> None:
        self.query, self.key = self.query[0].transpose(0, 1), self.key[0].transpose(0, 1)
        if isinstance(self.position, str):
            if self.position in ("all", "last_response"):
                return
            self.position = cu_seqlens.diff() - 1
        self.position = _checked(self.position, len(cu_seqlens) - 1).to(self.key.device)
        if self.whole:
            return
        rows = cu_seqlens[:-1] + self.position
        self.query = self.query[rows.clamp(0, len(self.key) - 1)]

    def inputs(self) -> AttentionInputs:
        if self.position_ids is not None:
            self.locate()
        if self.cu_seqlens is not None and self.joined is not None:
            starts = self.cu_seqlens[1:-1].long()
            if self.joined[0, starts - 1].any():
                raise ValueError(
                    "packed input: the layer attended across sequences; transformers keeps them apart in "
                    "flash attention, and elsewhere where position_ids restart and use_cache=False"
                )
        if isinstance(self.position, Tensor):
            position: Tensor | Literal["last_response"] | None = self.position
        else:
            position = "last_response" if self.position == "last_response" else None
        return AttentionInputs(
            self.query,
            self.key,
            self.scaling,
            query_position=position,
            attention_mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            **self.options,
        )

    def with_flow(self, moved: Norms | Pulls) -> AttentionInputs | SignedInputs:
        """``inputs`` with what the layer moved."""
        inputs = self.inputs()
        packed = inputs.packed
        first, second = (x[0] if packed else x for x in moved)
        if isinstance(moved, Pulls):
            if packed:
                first, second = first.transpose(0, 1), second.transpose(0, 1)
            return SignedInputs(inputs, first, second)
        return dataclasses.replace(inputs, value_norm=first.T if packed else first, residual_norm=second)


def _differentiable(x: Tensor) -> Tensor | ValueError:
    """``x``, or the same numbers as the place where a graph begins."""
    if not torch.is_grad_enabled():
        return ValueError(
            "source: a gradient source wants a forward under torch.enable_grad(), got one without"
        )
    return x if x.requires_grad else x.detach().requires_grad_()


def _attended(
    module: nn.Module,
    function: AttentionFunction,
    query: Tensor,
    key: Tensor,
    layer_mask: Mask,
    options: dict[str, Any],
    *,
    given: dict[str, Any],
    position: QueryPosition,
    pooled: Tensor | None,
    whole: bool,
) -> _Attended:
    """What the layer attended with, if ``AttentionInputs`` can express it; else ``ValueError``."""
    if isinstance(key, DTensor):
        raise ValueError("key: sharded over devices (ring or context parallel), want every key on one device")
    batch, _, length, _ = key.shape
    if query.shape[2] != length:
        raise ValueError(
            f"query: the layer had {query.shape[2]} queries for {length} keys; a tapped forward takes whole "
            "sequences, without earlier past_key_values or a static cache"
        )
    if options.get("position_bias") is not None:
        raise ValueError("position_bias: the layer adds one to its scores, which cannot be expressed")
    mask, square_mask = given.get("attention_mask"), None
    if mask is not None and not _is_padding_mask(mask):
        # Of masks prepared by the caller the model picks one per layer.
        mask, square_mask = (layer_mask, None) if _is_padding_mask(layer_mask) else (None, layer_mask)
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"attention_mask: got {list(mask.shape)}, want [B, S] = {[batch, length]}")
    if square_mask is not None and square_mask.shape[1] != 1:
        raise ValueError(f"attention_mask: got {list(square_mask.shape)}, want [B, 1, S, S]")
    unmasked = mask is None and square_mask is None
    cu_seqlens = given.get("cu_seq_lens_q") if unmasked else None
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seq_lens_q: got a batch of {batch}, want 1")
    position_ids = given.get("position_ids") if unmasked and cu_seqlens is None else None
    if position_ids is not None and position_ids.ndim != 2:
        position_ids = None
    attended = _Attended(
        query,
        key,
        _scaling(module, function, query, options.get("scaling")),
        _score_options(function, options),
        position,
        pooled,
        whole,
        mask,
        square_mask,
        None if cu_seqlens is None else cu_seqlens.to(key.device, torch.int32),
        position_ids,
        _joined(module, layer_mask, key) if cu_seqlens is not None or position_ids is not None else None,
    )
    # A graph cannot depend on how many sequences there are: that waits for take().
    if position_ids is None or not torch.compiler.is_compiling():
        attended.locate()
    return attended


def _scaling(module: Any, function: AttentionFunction, query: Tensor, scaling: float | None) -> float:
    if scaling is not None:
        return scaling
    default: float = query.shape[-1] ** -0.5
    if function.__name__ != _EAGER or not hasattr(module, "scale_attn_weights"):
        return default
    # GPT-2 in transformers 4.57: only its eager function knows how the layer scales.
    if not module.scale_attn_weights:
        default = 1.0
    return default / (module.layer_idx + 1 if module.scale_attn_by_inverse_layer_idx else 1)


def _score_options(function: AttentionFunction, options: dict[str, Any]) -> dict[str, Any]:
    """What else goes into the scores, by the names of ``AttentionInputs``."""
    sinks = options.get("s_aux")
    return {
        # transformers 4.57 hands sdpa a soft cap, which it drops.
        "softcap": None if function is sdpa_attention_forward else options.get("softcap"),
        "sliding_window": options.get("sliding_window"),
        "sinks": None if sinks is None else sinks.detach(),
    }


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _sees(mask: Tensor | BlockMask, queries: Tensor, keys: Tensor, batch: int) -> Tensor:
    """bool ``[B, n]``: what a mask ``[B, 1, S, S]`` says of queries and keys that broadcast to ``[B, n]``."""
    rows = torch.arange(batch, device=keys.device)[:, None]
    if isinstance(mask, BlockMask):
        seen: Tensor = mask.mask_mod(rows, torch.zeros_like(rows), queries, keys)
        return seen.expand(batch, -1)
    values = mask.expand(batch, -1, -1, -1)[rows, 0, queries, keys]
    # An additive mask holds 0 where a key is seen.
    return values if values.dtype == torch.bool else values == 0


def _joined(module: Any, layer_mask: Mask, key: Tensor) -> Tensor | None:
    """``_Attended.joined`` by the layer's mask; None in flash attention, which goes by the arguments."""
    if "flash" in str(module.config._attn_implementation):
        return None
    keys = torch.arange(key.shape[2], device=key.device)
    if layer_mask is None:
        return torch.ones_like(keys[1:], dtype=torch.bool).expand(key.shape[0], -1)
    return _sees(layer_mask, keys[1:], keys[:-1], key.shape[0])


def _sequences(position_ids: Tensor, batch: int) -> Tensor | None:
    """``cu_seqlens`` of packed input, read as transformers does; None if no position restarts."""
    restarts = torch.diff(position_ids) != 1
    if not restarts.any():
        return None
    if batch != 1:
        raise ValueError(f"position_ids: packed sequences in a batch of {batch}, want 1")
    starts = restarts[0].nonzero().flatten() + 1
    ends = torch.tensor([position_ids.shape[1]], device=starts.device)
    return torch.cat([torch.zeros_like(ends), starts, ends]).to(torch.int32)


def _checked(position: Tensor, rows: int) -> Tensor:
    if len(position) != rows:
        raise ValueError(f"query_position: got {len(position)} positions for {rows} sequences")
    return position


def _pooled(head: PreTrainedModel, input_ids: Tensor | None, query: Tensor) -> Tensor:
    """The tokens that transformers' sequence-classification heads score, int32 ``[B]``."""
    batch, _, length, _ = query.shape
    pad = head.config.get_text_config().pad_token_id
    if pad is None or input_ids is None:
        return torch.full((batch,), length - 1, dtype=torch.int32, device=query.device)
    tokens = (input_ids != pad).to(query.device, torch.int32)
    position: Tensor = (torch.arange(length, device=query.device) * tokens).argmax(-1)
    return position.to(torch.int32)


@functools.cache
def _interface(forward: Callable[..., Any]) -> AttentionInterface | None:
    """The table where modules with this ``forward`` look their attention function up, if they do."""
    forward = inspect.unwrap(forward)
    names = forward.__code__.co_names if inspect.isfunction(forward) else ()
    values = (forward.__globals__.get(name) for name in names)
    return next((value for value in values if isinstance(value, AttentionInterface)), None)


def _has_method(kind: type[nn.Module]) -> bool:
    return kind.__name__ in _METHOD_CLASSES


def _can_tap(kind: type[nn.Module]) -> bool:
    return _has_method(kind) or _interface(kind.forward) is not None


def _lookups(module: Any) -> list[tuple[dict[str, Any], str, AttentionFunction]]:
    """The entries, as (table, name, function), one of which an attention layer calls."""
    if _has_method(type(module)):
        return [(vars(module), _METHOD, getattr(module, _METHOD))]
    interface, name = _interface(type(module).forward), module.config._attn_implementation
    found = []
    if interface is not None and name in interface:
        found.append((interface._local_mapping, name, interface[name]))
    # Eager attention is a function of the layer's own file, whose name is the only convention.
    forward = inspect.unwrap(type(module).forward)
    names = [n for n in forward.__code__.co_names if n.endswith(_EAGER)]
    return found + [(forward.__globals__, n, forward.__globals__[n]) for n in names]


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


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def _choose(names: Sequence[str], layer: int | Sequence[int]) -> list[str]:
    """The names of the attention layers that ``layer`` asks for."""
    chosen = []
    for index in layer if isinstance(layer, Sequence) else [layer]:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"layer: got {layer!r}, want int or a sequence of int")
        if not -len(names) <= index < len(names):
            raise ValueError(f"layer: got {index}, the model has {len(names)} attention layers")
        chosen.append(names[index])
    if not chosen:
        raise ValueError("layer: got an empty sequence, want one index or more")
    return chosen


def _check_layer(layer: _Layer) -> None:
    """``ValueError`` for attention that no ``AttentionInputs`` can express."""
    module = layer.module
    kinds, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = "" if kinds is None or index is None else kinds[index]
    if hasattr(module, "indexer") or any(word in kind for word in ("chunked", "sparse", "compressed")):
        raise ValueError(f"layer: {layer.name!r} attends to chosen keys only ({kind or 'indexer'})")
    for _, _, function in _lookups(module):
        if inspect.unwrap(function).__module__.split(".")[0] in _SHARDS_KEYS:
            raise ValueError(f"model: {function.__module__} shards the keys over devices (ring attention)")


def _is_inside(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(f"{parent}.")


def _pooling_head(models: Sequence[PreTrainedModel]) -> PreTrainedModel | str | None:
    """The model whose head scores what ``_pooled`` says; the class of one that differs; None for no head."""
    for model in models:
        kinds = [kind for kind in type(model).__mro__ if "forward" in vars(kind)]
        for kind in kinds:
            code = inspect.unwrap(vars(kind)["forward"]).__code__
            # The one name that all heads of transformers give to the last token that is not padding.
            if "last_non_pad_token" in code.co_varnames:
                return type(model).__name__ if model.config.is_encoder_decoder else model
            if "super" not in code.co_names:
                break
        if any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__):
            return type(model).__name__
    return None


@dataclass
class _Probe:
    """An open tap as its modules carry it; ``index`` is the module's place in the tap."""

    tap: AttentionTap
    index: int


def _attach(module: nn.Module, probe: _Probe) -> None:
    setattr(module, _PROBES, (*getattr(module, _PROBES, ()), probe))


def _detach(module: nn.Module, tap: AttentionTap) -> bool:
    """Take the tap off the module; whether any other is left."""
    left = tuple(probe for probe in getattr(module, _PROBES, ()) if probe.tap is not tap)
    if left:
        setattr(module, _PROBES, left)
    elif hasattr(module, _PROBES):
        delattr(module, _PROBES)
    return bool(left)


def _on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for probe in getattr(module, _PROBES, ()):
        probe.tap._on_call(probe.index, args, kwargs)


def _on_return(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for probe in getattr(module, _PROBES, ()):
        probe.tap._on_return(probe.index)


def _hook(module: nn.Module) -> None:
    # The same functions for every tap: with a function of its own each tap would be compiled anew.
    if not hasattr(module, _HOOKS):
        before = module.register_forward_pre_hook(_on_call, with_kwargs=True)
        setattr(module, _HOOKS, (before, module.register_forward_hook(_on_return)))


def _unhook(module: nn.Module) -> None:
    for handle in vars(module).pop(_HOOKS):
        handle.remove()


def _watched(function: AttentionFunction) -> AttentionFunction:
    """``function`` that tells the taps on its module what it is called with."""

    @functools.wraps(function)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Any
    ) -> Any:
        probes = getattr(module, _PROBES, ())
        for probe in probes:
            value = probe.tap._on_attention(probe.index, function, query, key, value, attention_mask, options)
        output = function(module, query, key, value, attention_mask, **options)
        for probe in probes:
            probe.tap._on_attended(probe.index, value, output)
        return output

    return attend


_tapped = functools.cache(_watched)
"""One object per function: with another each tap would be compiled anew."""


def _watched_method(method: MethodType) -> AttentionFunction:
    """The same of a module's own method: GPT-J's, which scales by a divisor and returns heads first."""
    module: Any = method.__self__

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask = None, *rest: Any) -> Any:
        def function(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any) -> Any:
            heads, weights = method(query, key, value, mask, *rest)
            return heads.transpose(1, 2), weights

        scaling = 1 / float(module.scale_attn)
        heads, weights = _watched(function)(module, query, key, value, mask, scaling=scaling)
        return heads.transpose(1, 2), weights

    return attend


@dataclass(eq=False)
class _Entry:
    """A function that open taps have replaced in a table."""

    table: dict[str, Any]
    name: str
    replacement: AttentionFunction
    previous: AttentionFunction | None
    users: int = 0


_entries: list[_Entry] = []


def _install(table: dict[str, Any], name: str, function: AttentionFunction) -> _Entry:
    entry = next((e for e in _entries if e.table is table and e.name == name), None)
    if entry is None:
        replacement = _watched_method(function) if isinstance(function, MethodType) else _tapped(function)
        entry = _Entry(table, name, replacement, table.get(name))
        _entries.append(entry)
        table[name] = replacement
    entry.users += 1
    return entry


def _uninstall(entry: _Entry) -> None:
    entry.users -= 1
    if entry.users:
        return
    _entries.remove(entry)
    # What somebody else put there meanwhile stays.
    if entry.table.get(entry.name) is not entry.replacement:
        return
    if entry.previous is None:
        del entry.table[entry.name]
    else:
        entry.table[entry.name] = entry.previous
