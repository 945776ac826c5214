"""The tap on the engine's last attention layer, and the pooler that gives rows to requests that ask."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.pooler.special import DispatchPooler
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from attnshape.integrations.vllm import support
from attnshape.integrations.vllm.pages import as_bytes
from attnshape.integrations.vllm.rows import Layer, Step, rows_of
from attnshape.integrations.vllm.support import ASKED, REFUSED
from attnshape.ops import attention_row
from attnshape.types import AttentionInputs

FIRST_CHECKED, CHECKED_EVERY = 16, 64
"""Rows that are held against the engine's output: so many of a process' first, and one of so many then."""
COMMON = "_attnshape_common"
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def install() -> None:
    """Has poolers of sequence classification made as ``CreditPooler``; a second call changes nothing."""
    plain = DispatchPooler.for_seq_cls.__func__
    if getattr(plain, ASKED, False):
        return

    def for_seq_cls(cls: type[DispatchPooler], /, pooler_config: Any, **options: Any) -> DispatchPooler:
        # The model's layers exist by now, and vLLM's configuration is the current one.
        pooler: CreditPooler = plain(CreditPooler, pooler_config, **options)
        pooler.watch(str(pooler_config.get_seq_pooling_type()))
        return pooler

    setattr(for_seq_cls, ASKED, True)
    DispatchPooler.for_seq_cls = classmethod(for_seq_cls)


class CreditPooler(DispatchPooler):  # type: ignore[misc]
    """Adds the attention row behind the logits of requests that ask, or ``REFUSED`` where there is none."""

    tap: Tap | None = None
    off: str | None = None
    """Why no rows are given."""
    warm = False
    rows = 0
    """Given so far; the same on every tensor parallel rank, and so are those that are checked."""

    def watch(self, pooling: str) -> None:
        """Taps the last attention layer, or says why not."""
        config = get_current_vllm_config()
        support.Settings.of(config.additional_config)
        self.off = support.config_refusal(config, pooling)
        layers = get_layers_from_vllm_config(config, Attention)
        decoders = {name: x for name, x in layers.items() if x.attn_type == AttentionType.DECODER}
        if self.off is None and not get_pp_group().is_last_rank:
            return  # the pooler of this pipeline rank is never called
        if self.off is None and not decoders:
            self.off = "there is no decoder's attention layer on the pipeline rank that pools"
        if self.off is None:
            layer = decoders[max(decoders, key=extract_layer_index)]
            self.off = support.layer_refusal(layer)
        if self.off is not None:
            support.refuse(self.off)
            return
        self.tap = Tap(layer)
        support.logger.info(
            "%s reads the attention of %s (%s)", ASKED, layer.layer_name, layer.attn_backend.get_name()
        )

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> Any:
        outputs = super().forward(hidden_states, pooling_metadata)
        step = None
        if self.tap is not None:
            step, self.tap.step = self.tap.step, None
            if not self.warm:  # in the dummy batch that vLLM pools at its start
                self.warm = True
                with contextlib.suppress(Exception):  # a request would find it, on all ranks
                    self.tap.warm_up()
        asked = [
            i
            for i, params in enumerate(pooling_metadata.pooling_params)
            if params.extra_kwargs and params.extra_kwargs.get(ASKED)
        ]
        if not asked:
            return outputs
        cursor = pooling_metadata.get_pooling_cursor()
        whole, seen = cursor.prompt_lens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        asked = [i for i in asked if whole[i] == seen[i]]  # the others are prefilled on in later steps
        if not asked:
            return outputs
        outputs = list(outputs)  # one tensor in vLLM 0.33, where all requests are of one task
        lengths = [int(whole[i]) for i in asked]
        rows = torch.split(self._rows(step, asked, lengths), lengths)
        for i, row in zip(asked, rows, strict=True):
            outputs[i] = torch.cat([outputs[i].float(), row.to(outputs[i].device)])
        return outputs

    @torch.inference_mode()
    def _rows(self, step: Step | None, asked: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """``[sum(lengths)]``; a row that the check refuses turns all off, on every rank."""
        nothing = torch.full((sum(lengths),), REFUSED)
        if self.off is not None or self.tap is None:
            return nothing
        checked = [
            i
            for i, n in enumerate(range(self.rows, self.rows + len(asked)))
            if n < FIRST_CHECKED or n % CHECKED_EVERY == 0
        ]
        self.rows += len(asked)
        device = self.tap.layer.kv_cache.device
        total, wrong = nothing.new_zeros(len(nothing), device=device), None
        try:
            if step is None:
                raise RuntimeError("the layer was not called in this step")
            total, wrong = rows_of(self.tap.described(), step, asked, lengths, checked)
        except Exception as error:  # a request's credit is lost, not the engine
            wrong = f"{type(error).__name__}: {error}"
        ranks = get_tensor_model_parallel_world_size()
        failures = float(wrong is not None)
        if ranks > 1:  # all ranks get the same, and so decide alike
            summed = tensor_model_parallel_all_reduce(torch.cat([total, total.new_tensor([failures])]))
            total, failures = summed[:-1] / ranks, float(summed[-1])
        if failures == 0:
            return total
        self.off = wrong or "another tensor parallel rank refused its part of a row"
        support.logger.error("%s gives no attention rows from here on: %s", ASKED, self.off)
        self.tap.remove()
        return nothing


class Tap:
    """Keeps what one attention layer is called with, at the last token of each request.

    It sits in ``impl.forward`` of the instance, inside the opaque operator: neither the compiled graph nor
    other layers know of it.
    """

    def __init__(self, layer: Attention) -> None:
        self.layer = layer
        self.step: Step | None = None
        self._forward = layer.impl.forward
        layer.impl.forward = self._tapped
        if layer.attn_backend.get_name() == "FLASHINFER":
            keep_common(layer.attn_backend.get_builder_cls())

    def remove(self) -> None:
        """The layer computes alone again."""
        del self.layer.impl.forward

    def described(self) -> Layer:
        """The layer as of now: how a CPU packs keys, and a cache's scales, may be chosen after the start.

        Raises:
            ValueError: its rows cannot be read.
        """
        if reason := support.layer_refusal(self.layer):
            raise ValueError(reason)
        layer, impl = self.layer, self.layer.impl
        quantised = FP8.get(layer.kv_cache_dtype)
        return Layer(
            layer.layer_name,
            float(impl.scale),
            softcap=getattr(impl, "logits_soft_cap", None) or None,
            window=window(impl.sliding_window),
            sinks=getattr(impl, "sinks", None),
            transposed=layer.attn_backend.get_name() == "CPU_ATTN",
            quantised=quantised,
            key_scale=float(layer._k_scale_float) if quantised else 1.0,
            value_scale=float(layer._v_scale_float) if quantised else 1.0,
            query_scale=float(layer._q_scale_float) if quantised else 1.0,
        )

    def warm_up(self) -> None:
        """Compiles what computes a row, before a request waits for it."""
        impl, dtype = self.layer.impl, self.layer.dtype
        where = self.layer._k_scale.device
        query = torch.zeros(1, impl.num_heads, self.layer.head_size, dtype=dtype, device=where)
        key = torch.zeros(2, impl.num_kv_heads, self.layer.head_size, dtype=dtype, device=where)
        ends = torch.tensor([0, 2], dtype=torch.int32, device=where)
        attention_row(AttentionInputs(query, key, 1.0, cu_seqlens=ends))

    def _tapped(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        result = self._forward(
            layer, query, key, value, kv_cache, attn_metadata, output, *arguments, **options
        )
        if attn_metadata is not None:  # None while memory is profiled
            common = getattr(attn_metadata, COMMON, None)
            table = attn_metadata.block_table if common is None else common.block_table_tensor
            ends = (attn_metadata if common is None else common).query_start_loc[1:]
            # Copies: a graph's memory is used again by what follows. Requests of a dummy batch may be empty.
            last = (ends - 1).clamp_(min=0)
            if query.element_size() == 1:
                rows = as_bytes(query).index_select(0, last).view(query.dtype)
            else:
                rows = query.index_select(0, last)
            self.step = Step(rows, output.index_select(0, last), kv_cache, table)
        return result


def keep_common(builder: Any) -> None:
    """Has a metadata builder keep what it builds from, for a backend whose metadata has no block table."""
    build = builder.build
    if getattr(build, ASKED, False):
        return

    def kept(self: Any, common_prefix_len: int, common_attn_metadata: Any, *rest: Any, **options: Any) -> Any:
        metadata = build(self, common_prefix_len, common_attn_metadata, *rest, **options)
        setattr(metadata, COMMON, common_attn_metadata)
        return metadata

    setattr(kept, ASKED, True)
    builder.build = kept


def window(found: Any) -> int | None:
    """Keys that a query sees, itself included. Backends say ``(left, right)``, their number, or -1."""
    if isinstance(found, tuple | list):
        return None if found[0] < 0 else found[0] + 1
    return None if found is None or found < 0 else found
