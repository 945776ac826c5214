"""A tiny random model of any class of transformers: its config, made small by the names of its fields."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

VOCABULARY, PAD, BOS, EOS = 64, 0, 1, 2
LAYERS, HEADS, KEY_HEADS, WIDTH, HIDDEN = 2, 4, 2, 8, 32

# The first pattern that fits a field's name gives its value.
SIZES: list[tuple[str, int]] = [
    (r"pad_token_id", PAD),
    (r"bos_token_id|decoder_start_token_id|cls_token_id", BOS),
    (r"(eos|sep)_token_id", EOS),
    (r"\w+_token_id|\w+_token_index", VOCABULARY - 1),
    (r"vocab_size|n_vocab|vocab_size_per_layer_input", VOCABULARY),
    (r"n_positions|n_ctx|max_position_embeddings|max_seq_len|max_position|max_source_positions", 64),
    (r"max_target_positions|seq_length|original_max_position_embeddings", 64),
    (
        r"(num_)?(hidden_layers|layers)|n_layers?|num_(encoder|decoder)_layers|(encoder|decoder)_layers",
        LAYERS,
    ),
    (r"num_(experts|local_experts)_per_tok\w*|moe_topk|top_k_experts|num_selected_experts|moe_k|top_k", 2),
    (r"\w*num_(experts|local_experts|routed_experts)|n_routed_experts|moe_num_experts|num_expert", 4),
    (r"n_group|num_expert_group|topk_group|num_expert_groups|n_expert_groups|topk_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"\w*(num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads)", KEY_HEADS),
    (r"\w*(num_attention_heads|attention_heads|num_heads|n_heads?|heads)", HEADS),
    (r"kv_lora_rank", 12),
    (r"q_lora_rank|index_\w*dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim|v_head_dim|\w*head_dim|d_kv|attention_head_size", WIDTH),
    (r"\w*(intermediate_size|ffn_dim|d_?ff|ffn_hidden_size|n_inner|mlp_dim|feed_forward_proj_dim)", 48),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|word_embed_proj_dim|lru_width",
        HIDDEN,
    ),
    (r"\w*(sliding_window|attention_window|local_attention|window_size)", 6),
    (r"attention_chunk_size", 6),
    (r"(mamba_)?chunk_size", 8),
]
"""What one field of a config becomes; fields that are not set, or no whole numbers, stay."""

ALWAYS = ("head_dim", "num_key_value_heads")
"""Fields that get their value where they are not set as well."""

EXTRA: dict[str, dict[str, Any]] = {
    "t5": {"decoder_start_token_id": PAD},
    "mt5": {"decoder_start_token_id": PAD},
    "umt5": {"decoder_start_token_id": PAD},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "zamba": {"layer_types": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "perceiver": {"d_latents": HIDDEN, "num_latents": 8, "num_self_attends_per_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""What single kinds of model need besides, by model type."""


def classes() -> dict[str, tuple[str, str]]:
    """Every causal and sequence-classification class of transformers: its model type, and which it is."""
    found = {}
    for kind, names in (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("classifier", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        for model_type, name in names.items():
            found.setdefault(name, (model_type, kind))
    return dict(sorted(found.items()))


def size_of(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def shrunk(config: PreTrainedConfig, model_type: str) -> PreTrainedConfig:
    """The same kind of config, small."""
    given: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "architectures"):
            continue
        if isinstance(value, PreTrainedConfig):
            given[name] = shrunk(value, value.model_type)
        elif size_of(name) is not None and (type(value) is int or (value is None and name in ALWAYS)):
            given[name] = size_of(name)
    if "qk_rope_head_dim" in given and "head_dim" in given:
        given["head_dim"] = given["qk_rope_head_dim"]  # what the rotary embedding is made for
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = HEADS
    given |= _fewer_layers(config)
    given |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    given |= EXTRA.get(config.model_type, {})
    return type(config)(**given)


def _fewer_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """The first layer of each kind, where a config lists its layers, and as many as ``LAYERS`` at least."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and not name.startswith("_")
    }
    kinds = next((lists[name] for name in ("layer_types", "layers_block_type") if name in lists), None)
    if kinds is None or not isinstance(count, int):
        return {}
    chosen = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    chosen += [i for i in range(count) if i not in chosen][: max(0, LAYERS - len(chosen))]
    fewer: dict[str, Any] = {name: [value[i] for i in sorted(chosen)] for name, value in lists.items()}
    return fewer | {"num_hidden_layers": len(chosen)}


def build(name: str, **options: Any) -> PreTrainedModel:
    """A model of the class, with attention far from uniform."""
    model_type, kind = classes()[name]
    made = getattr(transformers, name)
    config = shrunk((made.config_class or CONFIG_MAPPING[model_type])(), model_type)
    for key, value in options.items():
        setattr(config, key, value)
    if kind == "classifier":
        config.num_labels = 1
    elif hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    return made(config).eval()
