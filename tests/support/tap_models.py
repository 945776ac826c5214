"""Tiny random models of every family the tap is tested on, and the inputs they are given."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from attnshape.reference import attention_row
from attnshape.types import AttentionInputs

VOCABULARY, PAD, EOS = 64, 0, 2
LENGTH = 14


@dataclass(frozen=True)
class Family:
    """How to make one; ``classifier`` is None where transformers has no sequence-classification model."""

    config: str
    options: dict[str, Any]
    classifier: str | None
    causal: str
    fast: str = "sdpa"
    """The attention implementation that is tapped."""


SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 1,
}


def _family(
    name: str, *, classifier: bool = True, causal: str | None = None, fast: str = "sdpa", **options: Any
) -> Family:
    return Family(
        f"{name}Config",
        {**SIZE, **options},
        f"{name}ForSequenceClassification" if classifier else None,
        causal or f"{name}ForCausalLM",
        fast,
    )


FAMILIES = {
    "llama": _family("Llama"),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", head_dim=12),
    "mistral": _family("Mistral", sliding_window=5),
    "mixtral": _family("Mixtral", num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
    "gemma": _family("Gemma", head_dim=16, num_key_value_heads=1),
    "gemma2": _family(
        "Gemma2",
        head_dim=8,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        sliding_window=5,
        fast="eager",
    ),
    "gemma3": _family(
        "Gemma3Text",
        causal="Gemma3ForCausalLM",
        head_dim=8,
        query_pre_attn_scalar=24,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "phi3": _family("Phi3", sliding_window=6),
    "gpt2": Family(
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": 1,
        },
        "GPT2ForSequenceClassification",
        "GPT2LMHeadModel",
    ),
    "gptj": Family(
        "GPTJConfig",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 4,
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": 1,
        },
        "GPTJForSequenceClassification",
        "GPTJForCausalLM",
        fast="eager",
    ),
    "gpt_neox": _family("GPTNeoX", rotary_pct=0.5),
    "opt": _family("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "olmo2": _family("Olmo2", classifier=False),
    "cohere": _family("Cohere", classifier=False, use_qk_norm=True),
    "granite": _family("Granite", classifier=False, attention_multiplier=0.61),
    "starcoder2": _family("Starcoder2", sliding_window=6),
    "stablelm": _family("StableLm", partial_rotary_factor=0.5),
    "gpt_oss": _family(
        "GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5, fast="eager"
    ),
    "deepseek_v3": _family(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=10,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights so large that attention is far from uniform, the same for the same structure."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.data.normal_(2, 0.5, generator=generator)
        elif parameter.ndim > 1:
            parameter.data.normal_(0, 0.4, generator=generator)
        elif "bias" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
        elif "sinks" in name:
            parameter.data.normal_(0, 2, generator=generator)


def build(name: str, *, head: bool = True, implementation: str | None = None, **options: Any) -> Any:
    """A model of the family: its sequence classifier if it has one and ``head``, else its causal model."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.options | options)
    config.num_labels = 1
    kind = getattr(transformers, family.classifier if head and family.classifier else family.causal)
    model = kind._from_config(config, attn_implementation=implementation or family.fast)
    randomise(model)
    return model.eval()


class ValueHead(nn.Module):
    """A wrapper as PPO codes have it: scores the last attended token."""

    def __init__(self, model: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.model = model
        self.value = nn.Linear(width, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        last = (attention_mask * torch.arange(input_ids.shape[1])).argmax(-1)
        return self.value(out.hidden_states[-1])[torch.arange(len(last)), last, 0]


class Lora(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Adapted(nn.Module):
    """A wrapper as PEFT has it: calls the model's ``forward``, which passes over the model's own hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model["model"].forward(*args, **kwargs)


def offload(model: Any) -> Any:
    """Weights are on the device while their own module runs, and on none else, as accelerate has it."""

    def run(module: nn.Module, forward: Any, own: dict[str, nn.Parameter], *args: Any, **kwargs: Any) -> Any:
        module._parameters.update(own)
        try:
            return forward(*args, **kwargs)
        finally:
            for name, parameter in own.items():
                module._parameters[name] = nn.Parameter(parameter.to("meta"))

    for module in model.modules():
        own, forward = dict(module.named_parameters(recurse=False)), module.forward
        module.forward = functools.update_wrapper(functools.partial(run, module, forward, own), forward)
        for name, parameter in own.items():
            module._parameters[name] = nn.Parameter(parameter.to("meta"))
    return model


def batch(padding: str, pad: int = PAD) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` of three sequences of 14, 9 and 5 tokens, or all of 14."""
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((LENGTH, 9, 5) if padding != "none" else ()):
        padded = slice(None, LENGTH - length) if padding == "left" else slice(length, None)
        ids[row, padded], mask[row, padded] = pad, 0
    return ids, mask


def eager_rows(model: Any, layer: int, positions: list[int], **inputs: Any) -> Tensor:
    """Head mean of the attention that an eager model returns, one row per sequence, ``[B, S]``."""
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True, use_cache=False).attentions[layer]
    return torch.stack([attention[b, :, p].mean(0) for b, p in enumerate(positions)]).double()


def reference_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a flash attention function computes, in its calling convention."""
    group, length = query.shape[1] // key.shape[1], key.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = distance >= 0
    if sliding_window is not None:
        visible = visible & (distance < sliding_window)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool()
    sequence = torch.zeros(length)
    if cu_seq_lens_q is not None:
        sequence = torch.searchsorted(cu_seq_lens_q, torch.arange(length), right=True)
    elif position_ids is not None and attention_mask is None and query.shape[0] == 1:
        sequence = (position_ids[0] == 0).cumsum(0)
    visible = visible & (sequence[:, None] == sequence)
    scores = scores.masked_fill(~visible, -1e30)
    if s_aux is not None:
        sink = s_aux[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def state(model: nn.Module) -> dict[str, Any]:
    """What a tap could leave behind in a model."""
    return {
        name: (
            set(vars(m)),
            dict(m._forward_hooks),
            dict(m._forward_pre_hooks),
            dict(m._forward_pre_hooks_with_kwargs),
        )
        for name, m in model.named_modules()
    }


def positions_of(mask: Tensor) -> list[int]:
    return [int(row.nonzero().max()) for row in mask]


def square(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The causal mask ``[B, 1, S, S]`` of ``mask [B, S]``: bool, or added to the scores."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


def assert_row(inputs: AttentionInputs, expected: Tensor) -> None:
    torch.testing.assert_close(attention_row(inputs).double(), expected, rtol=2e-4, atol=2e-6)


def assert_same(a: AttentionInputs, b: AttentionInputs) -> None:
    assert torch.equal(a.query, b.query)
    assert torch.equal(a.key, b.key)
    assert torch.equal(a.query_position, b.query_position)
