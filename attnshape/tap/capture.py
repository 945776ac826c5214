"""What one call of a layer's attention function becomes: queries and keys on their way out."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnshape.tap import check
from attnshape.tap.find import EAGER, AttentionFunction, Mask
from attnshape.tap.flow import Norms, Pulls
from attnshape.tap.sight import Extent, Sight, sight_of
from attnshape.types import AttentionInputs, SignedInputs
from attnshape.vectorized.attention import PaddedLayer, attend, padded_layer, query_chunk

QueryPosition: TypeAlias = Literal["pooled", "last_visible", "last_response", "mean", "all"] | Tensor
Pooling: TypeAlias = Literal["first", "first_visible", "last", "last_visible", "mean"]
"""Which tokens a head scores, where it does not go by their ids; ``"mean"``: all that are visible."""

SAMPLED = 4
"""Queries of a sequence that are checked where every query is handed out."""

_EVERY = ("all", "last_response", "mean")


@dataclass
class Attended:
    """One call of a layer's attention function, on its way to ``AttentionInputs``."""

    module: nn.Module
    function: AttentionFunction
    query: Tensor
    key: Tensor
    scaling: float
    options: dict[str, Any]
    position: Pooling | QueryPosition
    pooled: Tensor | None
    """The query in the place of ``position`` where the input is not packed."""
    whole: bool
    """Whether every query is kept, whatever the position."""
    given: Tensor | None
    """The caller's own mask ``[B, S]``."""
    sight: Sight
    sight_kind: Hashable
    drops: bool
    """Whether dropout is active, so that the output is not that of the row."""
    apart: bool
    """Whether the function keeps packed sequences apart without a mask."""
    cu_seqlens: Tensor | None
    position_ids: Tensor | None
    """``[B, S]``, until searched for restarts."""
    mask: Tensor | None = None
    mask_row: Tensor | None = None
    key_start: Tensor | None = None
    extent: Extent | None = None
    crosses: Tensor | None = None
    """Whether packed sequences see each other."""
    value: Tensor | None = None
    """Of a call that is to be checked."""
    output: Tensor | None = None
    """Its heads at the queries that are checked, ``[B, n, Hq, Dv]``; all, until the queries are known."""

    @property
    def kind(self) -> Hashable:
        """What tells calls apart for the check, which the first of a kind passes for the others."""
        sinks = self.options.get("sinks") is not None
        length = self.key.shape[0 if self.key.ndim == 3 else 2]
        tensors = self.query.dtype, self.key.dtype, self.key.device.type, length.bit_length()
        scores = self.scaling, self.options.get("softcap"), sinks
        return self.function, self.sight_kind, scores, tensors, self.every, self.cu_seqlens is not None

    @property
    def every(self) -> bool:
        """Whether every query is handed out, not one row per sequence."""
        return self.whole or (isinstance(self.position, str) and self.position in _EVERY)

    def locate(self) -> None:
        """Find the sequences and the queries that are read, and keep those queries only."""
        if self.position_ids is not None:
            self.cu_seqlens = _sequences(self.position_ids, self.key.shape[0])
            self.position_ids = None
        if self.cu_seqlens is None:
            self._locate_padded()
        else:
            self._locate_packed(self.cu_seqlens)
        self.sight = self.sight.without_tensors()

    def _locate_padded(self) -> None:
        batch, _, length, _ = self.key.shape
        keys = torch.arange(length, device=self.key.device)
        self.mask = self.sight.padding
        if self.pooled is not None:
            self.position = self.pooled
        if isinstance(self.position, str) and self.position not in _EVERY:
            visible = torch.ones_like(keys).expand(batch, -1)
            if self.position in ("last_visible", "first_visible"):
                visible = self._visible(batch, keys)
            place = keys if self.position.startswith("last") else length - 1 - keys
            self.position = (visible * (place + 1)).argmax(-1).to(torch.int32)
        if isinstance(self.position, Tensor):
            self.position = _checked(self.position, batch).to(keys.device)
        if self.every:
            self._extend(torch.zeros_like(keys), batch)
            return
        assert isinstance(self.position, Tensor)
        rows = self.position.clamp(0, length - 1)
        added = self.sight.rows(rows[:, None], length)
        if added is not None:
            self.mask_row = added[:, 0, 0] if added.shape[1] == 1 else added[:, :, 0]
            # Kernels count their chunks from here, whatever the padding.
            self.key_start = (added[:, :, 0] != -math.inf).any(1).int().argmax(-1).to(torch.int32)
        self.query = self.query[torch.arange(batch, device=keys.device), :, rows]

    def _visible(self, batch: int, keys: Tensor) -> Tensor:
        if self.given is not None:
            return self.given.to(keys.device) != 0
        if self.mask is not None:
            return self.mask != 0
        return self.sight.sees_itself(batch, len(keys), keys.device)

    def _locate_packed(self, cu_seqlens: Tensor) -> None:
        tokens = torch.arange(self.key.shape[2], device=self.key.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
        self.query, self.key = self.query[0].transpose(0, 1), self.key[0].transpose(0, 1)
        if isinstance(self.position, str) and self.position not in _EVERY:
            lengths = cu_seqlens.diff()
            self.position = lengths * 0 if self.position.startswith("first") else lengths - 1
        if isinstance(self.position, Tensor):
            self.position = _checked(self.position, len(cu_seqlens) - 1).to(self.key.device)
        if self.sight.square is None and not self.apart and len(cu_seqlens) > 2:
            self.crosses = torch.ones((), dtype=torch.bool, device=self.key.device)
        if self.every:
            self._extend(sequence, 1)
            return
        assert isinstance(self.position, Tensor)
        rows = (cu_seqlens[:-1] + self.position).clamp(0, len(tokens) - 1)
        added = self.sight.rows(rows[None], len(tokens))
        if added is not None:
            if self.sight.square is not None:
                own = torch.arange(len(rows), device=rows.device)[:, None] == sequence
                starts = cu_seqlens[1:-1]
                first = self.sight.rows(starts[None], len(tokens))
                assert first is not None
                # What is read, and what the first token of a sequence sees: by it the rest would be reached.
                across = ((added[0] != -math.inf) & ~own).any()
                self.crosses = across | ((first[0] != -math.inf) & (tokens < starts[:, None])).any()
            self.mask_row = added[0].transpose(0, 1)[sequence.clamp(max=len(rows) - 1), :, tokens]
            if self.mask_row.shape[1] == 1:
                self.mask_row = self.mask_row[:, 0]
        self.query = self.query[rows]

    def _extend(self, sequence: Tensor, batch: int) -> None:
        """What every query sees, where a square mask or a bias says it."""
        if self.sight.square is not None or self.sight.bias is not None:
            self.extent = self.sight.extent(self.given, sequence, batch)
            self.crosses = self.extent.crosses if self.cu_seqlens is not None else None
            self.mask = self.extent.attended if self.cu_seqlens is None else None

    def returned(self, value: Tensor, output: Any) -> None:
        """The attention function was given ``value`` and returned ``output``: keep what the check needs."""
        output = (output[0] if isinstance(output, tuple) else output).detach()
        length = self.key.shape[2 if self.key.ndim == 4 else 0]
        if output.ndim != 4 or (*output.shape[:2], output.shape[-1]) != (len(value), length, value.shape[-1]):
            raise ValueError(
                f"attention: gave {list(output.shape)} for values {list(value.shape)}, want [B, S, Hq, Dv]"
            )
        self.value = value.detach()
        self.output = output if self.position_ids is not None else self._at_checked(output)

    def _at_checked(self, output: Tensor) -> Tensor:
        positions = self._checked_positions()
        if self.cu_seqlens is not None:
            return output[0][(self.cu_seqlens[:-1, None] + positions).clamp(0, output.shape[1] - 1)]
        rows = torch.arange(len(output), device=output.device)[:, None]
        return output[rows, positions.clamp(0, output.shape[1] - 1)]

    def _checked_positions(self) -> Tensor:
        """int ``[B, n]``, counted within each sequence."""
        if not self.every:
            assert isinstance(self.position, Tensor)
            return self.position[:, None].long()
        share = torch.arange(1, SAMPLED + 1, device=self.key.device)
        if self.cu_seqlens is not None:
            return -(-self.cu_seqlens.diff()[:, None] * share // SAMPLED) - 1
        batch, _, length, _ = self.key.shape
        live = torch.ones(batch, length, device=self.key.device) if self.mask is None else self.mask != 0
        count = live.to(torch.long).cumsum(1)
        wanted = -(-count[:, -1:] * share // SAMPLED)
        return torch.searchsorted(count, wanted.clamp(min=1)).clamp(max=length - 1)

    @property
    def is_due(self) -> bool:
        """Whether no call of this kind has been checked yet."""
        return check.is_due(self.module, self.kind)

    def take(self, name: str, *, always: bool) -> AttentionInputs:
        """What is handed out, once it has been checked; ``always``: every call, not the first of its kind."""
        if self.position_ids is not None:
            self.locate()
            self.output = None if self.output is None else self._at_checked(self.output)
        inputs = self._inputs(name)
        if self.output is not None and (always or self.is_due):
            self._check(name, inputs)
        return self._mean(inputs) if self.position == "mean" and not self.whole else inputs

    def _inputs(self, name: str) -> AttentionInputs:
        if self.crosses is not None and bool(self.crosses):
            raise ValueError(
                "packed input: the layer attended across sequences; transformers keeps them apart in "
                "flash attention, and elsewhere where position_ids restart and use_cache=False"
            )
        causal, window = self.sight.causal, self.sight.window
        if self.extent is not None:
            if self.extent.differs:
                raise ValueError(
                    f"attention_mask: {name} has a square mask that says more of its queries than which "
                    "keys are padding, a window and whether later keys are seen; want one query "
                    "('pooled', 'last_visible' or given positions) or source='gradient_embedding'"
                )
            causal, window = bool(self.extent.causal), int(self.extent.window)
            window = None if window > self.key.shape[2 if self.key.ndim == 4 else 0] else window
        position: Tensor | Literal["last_response"] | None = None
        if isinstance(self.position, Tensor):
            position = self.position
        elif self.position == "last_response":
            position = "last_response"
        return AttentionInputs(
            self.query,
            self.key,
            self.scaling,
            key_start=self.key_start,
            query_position=position,
            attention_mask=self.mask,
            mask_row=self.mask_row,
            causal=causal,
            sliding_window=window,
            cu_seqlens=self.cu_seqlens,
            **self.options,
        )

    @torch.no_grad()
    def _check(self, name: str, inputs: AttentionInputs) -> None:
        assert self.value is not None
        assert self.output is not None
        with torch.autocast(self.key.device.type, enabled=False):
            layer = padded_layer(_without_position(inputs))
            weights = attend(layer, self._checked_positions().clamp(min=0))
            values = self.value
            if layer.packing is not None:
                values = layer.packing.pad(values[0].transpose(0, 1)).transpose(1, 2)
            weights = weights.masked_fill(layer.invalid[:, None, None, None], 0.0)
            scores = self._rounded_scores(layer) if self.rounds_scores else None
            wrong = check.failure(name, weights, values, self.output.transpose(1, 2), scores=scores)
        if wrong is None:
            check.passed(self.module, self.kind)
        elif wrong:
            raise ValueError(
                f"{wrong}; want source='gradient_embedding', which reads no attention, or check='never' to "
                "have the row as it is"
            )

    @property
    def rounds_scores(self) -> bool:
        """Eager attention, and flex attention that is not compiled, round scores to the model's dtype."""
        function = inspect.unwrap(self.function)
        by_hand = function.__name__.endswith(EAGER) or function is flex_attention_forward
        return by_hand and self.key.dtype in (torch.bfloat16, torch.float16)

    def _rounded_scores(self, layer: PaddedLayer) -> Tensor:
        query, key = layer.inputs.query, layer.inputs.key.to(layer.dtype)
        if query.ndim == 3:
            query = query[:, :, None]
        else:
            rows = torch.arange(len(query), device=query.device)[:, None]
            query = query.transpose(1, 2)[rows, self._checked_positions().clamp(min=0)].transpose(1, 2)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = self.scaling * (query.to(layer.dtype) @ key.mT)
        cap = layer.inputs.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @torch.no_grad()
    def _mean(self, inputs: AttentionInputs) -> AttentionInputs:
        """The mean row over the queries that are visible: in the place of scores, as its logarithm."""
        layer = padded_layer(_without_position(inputs))
        batch, length = layer.attended.shape
        place = torch.arange(length, device=inputs.key.device)
        total = torch.zeros((), dtype=layer.dtype, device=inputs.key.device)
        with torch.autocast(place.device.type, enabled=False):
            for queries in torch.split(place, query_chunk(layer)):
                rows = attend(layer, queries.expand(batch, -1))
                total = total + rows.masked_fill(~layer.attended[:, None, queries, None], 0.0).sum(2)
        row = (total / layer.attended.sum(1).clamp(min=1)[:, None, None]).log()
        heads, width = inputs.query.shape[1], inputs.query.shape[-1]
        if inputs.cu_seqlens is not None:
            tokens = torch.arange(len(inputs.key), device=row.device)
            sequence = torch.searchsorted(inputs.cu_seqlens[1:].contiguous(), tokens, right=True)
            sequence = sequence.clamp(max=batch - 1)
            row = row[sequence, :, (tokens - inputs.cu_seqlens[sequence]).clamp(max=length - 1)]
        return dataclasses.replace(
            inputs,
            query=inputs.query.new_zeros(batch, heads, width),
            mask_row=row,
            causal=False,
            softcap=None,
            sliding_window=None,
            sinks=None,
            lse=row.new_zeros(batch, heads),
        )

    def with_flow(self, inputs: AttentionInputs, moved: Norms | Pulls) -> AttentionInputs | SignedInputs:
        """``inputs`` with what the layer moved."""
        if moved.strange:
            raise ValueError(
                f"source: {type(self.module).__name__} is part of a layer that adds something else to its "
                "residual stream than a multiple of what the attention gives; want source='attention' or a "
                "gradient source"
            )
        packed = inputs.packed
        first, second = (x[0] if packed else x for x in moved[:2])
        if isinstance(moved, Pulls):
            if packed:
                first, second = first.transpose(0, 1), second.transpose(0, 1)
            return SignedInputs(inputs, first, second)
        return dataclasses.replace(inputs, value_norm=first.T if packed else first, residual_norm=second)


def _without_position(inputs: AttentionInputs) -> AttentionInputs:
    position = inputs.query_position
    return dataclasses.replace(inputs, query_position=position if isinstance(position, Tensor) else None)


def differentiable(x: Tensor) -> Tensor:
    """``x``, or the same numbers as the place where a graph begins."""
    if not torch.is_grad_enabled():
        raise ValueError(
            "source: a gradient source wants a forward under torch.enable_grad(), got one without"
        )
    # Not ``x`` itself, which other parts of the model may read too.
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


@dataclass
class Embedded:
    """The embeddings of a forward's tokens, ``[B, S, hidden]``."""

    ids: Tensor
    taken: Tensor
    turned: bool
    """Whether the model has its tokens first and its rows second (XLNet)."""

    @classmethod
    def of(cls, ids: Tensor, output: Tensor, given: Tensor | None) -> Embedded:
        """``given`` are the ids that the model was called with, if it was."""
        if not isinstance(output, Tensor):
            raise ValueError(f"input_ids: their embeddings come as a {type(output).__name__}, want a tensor")
        if given is not None and ids.shape != given.shape:
            if ids.shape != given.mT.shape or not torch.equal(ids, given.mT):
                raise ValueError(
                    f"input_ids: the model embeds {list(ids.shape)} tokens, got {list(given.shape)}"
                )
            return cls(given, differentiable(output.transpose(0, 1)), True)
        return cls(ids, differentiable(output), False)

    def passed_on(self) -> Tensor:
        """What the model goes on with: some add positions in place, which must not reach what is taken."""
        return (self.taken.transpose(0, 1) if self.turned else self.taken).clone()

    def again(self, ids: Tensor, output: Tensor) -> Tensor:
        """What a second embedding goes on with: the first, so that its gradient has both.

        Decoders beside an encoder embed the same tokens, most of them one position later.
        """
        first = self.taken
        if ids.shape == self.ids.shape:
            if torch.equal(ids, self.ids) and torch.equal(first, output):
                return self.passed_on()
            if torch.equal(self.ids[:, :-1], ids[:, 1:]) and torch.equal(first[:, :-1], output[:, 1:]):
                return torch.cat([output[:, :1], first[:, :-1]], 1)
        raise ValueError(
            "input_ids: the model embeds other tokens as well, so no one tensor has the gradient"
        )


def check_whole(query: Tensor, key: Tensor) -> None:
    """``ValueError`` where a layer had earlier keys, or room for later ones, so that positions are not those
    of the tokens."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query: the layer had {query.shape[2]} queries for {key.shape[2]} keys; a tapped forward takes "
            "whole sequences, without earlier past_key_values or a static cache"
        )


def moved(asked: dict[str, Any], given: dict[str, Any]) -> ValueError | None:
    """An error where a model inside another reads tokens at other positions than those that were asked about.

    Args:
        asked: what the outer one was called with.
        given: what that calls the inner one with.
    """
    ids, own = asked.get("input_ids"), given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or not isinstance(own, Tensor) or ids.ndim != 2 or own.ndim not in (2, 3):
        return None
    # Rows that are not as many are laid out anew, and positions in packed ones count from each row's own.
    is_packed = "attention_mask" not in given and ("position_ids" in given or "cu_seq_lens_q" in given)
    if own.shape[:2] == ids.shape or len(own) != len(ids) or is_packed:
        return None
    common = min(own.shape[1], ids.shape[1])
    if own.ndim == 2 and torch.equal(own[:, :common], ids[:, :common]):  # more padding on the right, or less
        return None
    return ValueError(
        f"input_ids: the model was given {list(ids.shape)} tokens and reads {list(own.shape[:2])}, so "
        "positions in the one are not those in the other (prompt tuning?); want a tap on the model inside, "
        "where they count what it reads"
    )


def last_non_pad(head: PreTrainedModel, input_ids: Tensor | None, query: Tensor) -> Tensor:
    """The tokens that transformers' sequence-classification heads score, int32 ``[B]``."""
    batch, _, length, _ = query.shape
    pad = head.config.get_text_config().pad_token_id
    if pad is None or input_ids is None:
        return torch.full((batch,), length - 1, dtype=torch.int32, device=query.device)
    tokens = (input_ids != pad).to(query.device, torch.int32)
    position: Tensor = (torch.arange(length, device=query.device) * tokens).argmax(-1)
    return position.to(torch.int32)


def attended_by(
    module: nn.Module,
    function: AttentionFunction,
    query: Tensor,
    key: Tensor,
    layer_mask: Mask,
    options: dict[str, Any],
    *,
    given: dict[str, Any],
    position: Pooling | QueryPosition,
    pooled: Tensor | None,
    whole: bool,
) -> Attended:
    """What the layer attended with, if ``AttentionInputs`` can express it; else ``ValueError``.

    Args:
        given: what the model was called with.
        position, pooled: the query that is read; ``pooled`` in its place where the input is not packed.
        whole: whether every query is kept, whatever the position.
    """
    if isinstance(key, DTensor):
        raise ValueError("key: sharded over devices (ring or context parallel), want every key on one device")
    batch, _, length, _ = key.shape
    check_whole(query, key)
    sight = sight_of(module, function, length, layer_mask, options)
    if sight.padding is not None and sight.padding.shape != (batch, length):
        raise ValueError(f"attention_mask: got {list(sight.padding.shape)}, want [B, S] = {[batch, length]}")
    mask = given.get("attention_mask")
    cu_seqlens = given.get("cu_seq_lens_q") if mask is None else None
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seq_lens_q: got a batch of {batch}, want 1")
    position_ids = given.get("position_ids") if mask is None and cu_seqlens is None else None
    if position_ids is not None and position_ids.ndim != 2:
        position_ids = None
    fits = isinstance(mask, Tensor) and mask.shape == (batch, length)
    attended = Attended(
        module=module,
        function=function,
        query=query,
        key=key,
        scaling=_scaling(module, function, query, options.get("scaling")),
        options=_score_options(function, options),
        position=position,
        pooled=pooled,
        whole=whole,
        given=mask if fits else None,
        sight=sight,
        sight_kind=sight.kind,
        drops=options.get("dropout", 0.0) > 0 and (module.training or not function.__name__.endswith(EAGER)),
        apart="flash" in str(getattr(module.config, "_attn_implementation", "")),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(key.device, torch.int32),
        position_ids=position_ids,
    )
    # A graph cannot depend on how many sequences there are: that waits for take().
    if position_ids is None or not torch.compiler.is_compiling():
        attended.locate()
    return attended


def _scaling(module: Any, function: AttentionFunction, query: Tensor, scaling: float | None) -> float:
    if scaling is not None:
        return scaling
    default: float = query.shape[-1] ** -0.5
    if function.__name__ != EAGER or not hasattr(module, "scale_attn_weights"):
        return default
    # GPT-2 in transformers 4.57: only its eager function knows how the layer scales.
    if not module.scale_attn_weights:
        default = 1.0
    return default / (module.layer_idx + 1 if module.scale_attn_by_inverse_layer_idx else 1)


def _score_options(function: AttentionFunction, options: dict[str, Any]) -> dict[str, Any]:
    """What else goes into the scores, by the names of ``AttentionInputs``."""
    if inspect.unwrap(function) is sdpa_attention_forward:
        # It knows neither: transformers 4.57 hands it a soft cap, which it drops.
        return {}
    sinks = options.get("s_aux")
    return {"softcap": options.get("softcap"), "sinks": None if sinks is None else sinks.detach()}


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
