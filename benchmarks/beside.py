"""What kernels are timed beside, besides a copy: a pass that only reads, and the attention of a layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnshape import AttentionInputs
from attnshape.bench.timing import Call
from csrc_triton.launch import COMPILER


@triton.jit
def read_kernel(p_x, p_out, n_blocks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * STEPS
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(STEPS):
        inside = start + i < n_blocks
        acc += tl.load(p_x + (start + i) * BLOCK + tl.arange(0, BLOCK), mask=inside, other=0.0)
    tl.store(p_out + tl.program_id(0), tl.sum(acc))


def read_calls(size: int, sets: int, device: torch.device) -> list[Call]:
    """Passes that read ``size`` bytes each and write next to nothing."""
    steps, block = 8, 2048
    buffers = [torch.ones(triton.cdiv(size, 4 * block) * block, device=device) for _ in range(sets)]

    def read(x: Tensor) -> Tensor:
        if device.type != "cuda":
            return x.sum()
        n_blocks = len(x) // block
        out = torch.empty(triton.cdiv(n_blocks, steps), device=device)
        read_kernel[(len(out),)](x, out, n_blocks, STEPS=steps, BLOCK=block, **COMPILER)
        return out

    return [lambda x=x: read(x) for x in buffers]


def forward_call(layer: AttentionInputs) -> Call:
    """A causal attention forward of the layer; FlashAttention-2 on a GPU, as PyTorch has it."""
    value = torch.randn_like(layer.key)

    def forward() -> Tensor:
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
            return torch.nn.functional.scaled_dot_product_attention(
                layer.query, layer.key, value, is_causal=True, enable_gqa=True
            )

    return forward
