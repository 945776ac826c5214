"""What one call of a layer's attention function becomes: queries and keys on their way out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnshape.tap.find import EAGER, AttentionFunction, Mask
from attnshape.tap.flow import Norms, Pulls
from attnshape.types import AttentionInputs, SignedInputs

QueryPosition: TypeAlias = Literal["pooled", "last_visible", "last_response", "all"] | Tensor


@dataclass
class Attended:
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


def differentiable(x: Tensor) -> Tensor | ValueError:
    """``x``, or the same numbers as the place where a graph begins."""
    if not torch.is_grad_enabled():
        return ValueError(
            "source: a gradient source wants a forward under torch.enable_grad(), got one without"
        )
    return x if x.requires_grad else x.detach().requires_grad_()


def attended_by(
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
) -> Attended:
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
    attended = Attended(
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
    if function.__name__ != EAGER or not hasattr(module, "scale_attn_weights"):
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
    """``Attended.joined`` by the layer's mask; None in flash attention, which goes by the arguments."""
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


def pooled_position(head: PreTrainedModel, input_ids: Tensor | None, query: Tensor) -> Tensor:
    """The tokens that transformers' sequence-classification heads score, int32 ``[B]``."""
    batch, _, length, _ = query.shape
    pad = head.config.get_text_config().pad_token_id
    if pad is None or input_ids is None:
        return torch.full((batch,), length - 1, dtype=torch.int32, device=query.device)
    tokens = (input_ids != pad).to(query.device, torch.int32)
    position: Tensor = (torch.arange(length, device=query.device) * tokens).argmax(-1)
    return position.to(torch.int32)
