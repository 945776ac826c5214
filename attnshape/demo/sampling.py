"""Sampling from a small GPT-2: what ``generate`` does, without its cost per token.

A small model's token costs less than ``generate``'s bookkeeping around it, so a run on a CPU would spend half
its time there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel


def can_sample(model: Any) -> bool:
    """Whether ``sample_gpt2`` computes what this model does."""
    if type(model) is not GPT2LMHeadModel:
        return False
    config = model.config
    plain = not (config.add_cross_attention or config.scale_attn_by_inverse_layer_idx)
    return bool(plain and config.scale_attn_weights and not model.training)


@torch.inference_mode()
def sample_gpt2(
    model: GPT2LMHeadModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    new_tokens: int,
    min_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
) -> Tensor:
    """Draws at temperature 1 from the whole vocabulary, with the draws that ``generate`` would make.

    Args:
        prompt_ids, prompt_mask: ``[B, P]``, padded on the left.
        new_tokens, min_new_tokens: bounds of the response; no end before ``min_new_tokens``.
        end_ids: tokens that end a response; what follows them is ``pad_id``.

    Returns:
        Prompts and responses, ``[B, P + R]``, ``R`` that of the longest response.
    """
    batch, length = prompt_ids.shape
    total, blocks = length + new_tokens, model.transformer.h
    outputs = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = []
    for layer in outputs.past_key_values.layers:
        shape = (*layer.keys.shape[:2], total, layer.keys.shape[3])
        keys, values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
        keys[:, :, :length], values[:, :, :length] = layer.keys, layer.values
        cache.append((keys, values))
    heads, width = cache[0][0].shape[1], cache[0][0].shape[3]
    visible = F.pad(prompt_mask.bool(), (0, new_tokens), value=True)[:, None, None]
    position = prompt_mask.sum(1)
    ids = F.pad(prompt_ids, (0, new_tokens), value=pad_id)
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    ends = torch.tensor(list(end_ids), device=ids.device)
    logits = outputs.logits[:, -1]
    for step in range(new_tokens):
        now = length + step
        if step < min_new_tokens:
            logits[:, ends] = -torch.inf
        token = torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)
        ids[:, now] = token = token.masked_fill(ended, pad_id)
        ended |= torch.isin(token, ends)
        if step == new_tokens - 1 or ended.all():
            break
        x = model.transformer.wte(token) + model.transformer.wpe(position + step)
        for block, (keys, values) in zip(blocks, cache, strict=True):
            states = block.attn.c_attn(block.ln_1(x))
            query, keys[:, :, now], values[:, :, now] = states.view(batch, 3, heads, width).unbind(1)
            seen = slice(0, now + 1)
            attended = F.scaled_dot_product_attention(
                query[:, :, None], keys[:, :, seen], values[:, :, seen], attn_mask=visible[..., seen]
            )
            x = x + block.attn.c_proj(attended.reshape(batch, heads * width))
            x = x + block.mlp.c_proj(block.mlp.act(block.mlp.c_fc(block.ln_2(x))))
        logits = model.lm_head(model.transformer.ln_f(x))
    return ids[:, : now + 1]
