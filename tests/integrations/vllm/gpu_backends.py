"""vLLM's attention backends for GPUs on a CPU: Triton's in its interpreter, FlashAttention's over plain code.

What is replaced are kernels (FlashAttention's, and the copy of new keys into the cache). Metadata, layouts of
the cache and the layer's own code are vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    block_table: Tensor,
    softcap: float,
    **_: Any,
) -> None:
    """FlashAttention's paged forward: ``q [tokens, Hq, D]``, ``k, v [blocks, tokens, Hkv, D]``."""
    assert causal is True
    for b in range(len(seqused_k)):
        low, high, length = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]), int(seqused_k[b])
        if high == low:
            continue
        pages = block_table[b, : -(-length // k.shape[1])].long()
        keys, values = (
            x[pages].flatten(0, 1)[:length].float().repeat_interleave(q.shape[1] // k.shape[2], 1)
            for x in (k, v)
        )
        scores = torch.einsum("qhd,nhd->hqn", q[low:high].float(), keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at, key = torch.arange(length - (high - low), length)[:, None], torch.arange(length)[None]
        visible = key <= at
        if window_size and window_size[0] >= 0:
            visible &= key >= at - window_size[0]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[low:high] = torch.einsum("hqn,nhd->qhd", weights, values).to(out.dtype)


def write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, *_: Any, **__: Any
) -> None:
    """``reshape_and_cache_flash``: new keys and values into ``[blocks, tokens, Hkv, D]``."""
    size = key_cache.shape[1]
    live = slots >= 0
    place = slots[live]
    key_cache[place // size, place % size] = key[: len(slots)][live]
    value_cache[place // size, place % size] = value[: len(slots)][live]


def install(backend: str) -> object:
    """Has every attention layer use this backend; what is returned must be kept."""
    import vllm.v1.attention.backends.fa_utils as fa
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    library = torch.library.Library("_C_cache_ops", "FRAGMENT")
    library.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
    )
    library.impl("reshape_and_cache_flash", write, "CPU")
    for name, kernel in {
        "flash_attn_varlen_func": attend,
        "reshape_and_cache_flash": write,
        "get_scheduler_metadata": lambda **_: None,
        "compile_flash_attn_varlen_func_from_specs": None,
        "is_flash_attn_varlen_func_available": lambda: True,
        "get_flash_attn_version": lambda *_, **__: 2,
    }.items():
        setattr(fa, name, kernel)
    path = AttentionBackendEnum[backend].get_path()
    CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *_, **__: path)
    return library
