"""Tiny models of the experiments' kinds, untrained: a policy, reward models and prompts in local folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from attnshape.demo.corpus import build_tokenizer, vocabulary
from attnshape.demo.run import REVIEWS_TRUTH, Setup, review_prompts
from benchmarks.paper.testbed import Models

GPT2_SIZE = {"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA_SIZE = {
    "max_position_embeddings": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
FAMILIES: dict[str, tuple[type, type, type, dict[str, Any]]] = {
    "GPT-2": (GPT2Config, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2_SIZE),
    "GPT-J": (GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification, {**GPT2_SIZE, "rotary_dim": 4}),
    "Llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LLAMA_SIZE),
}
"""The architectures of the paper's models: IMDb's, TL;DR's and those of helpful-base."""


def save_models(folder: Path, labels: int = 1, seed: int = 0, family: str = "GPT-2") -> None:
    """``folder/policy`` and ``folder/reward_model`` of a family, and ``folder/prompts.jsonl``."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    configuration, causal, classifier, size = FAMILIES[family]
    config = configuration(
        **size,
        vocab_size=len(vocabulary()),
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=labels,
    )
    for model, name in (
        (causal(config), "policy"),
        (classifier(config), "reward_model"),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [f'{{"prompt": "{prompt}"}}' for prompt in review_prompts(0)[:20]]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def tiny_models(folder: Path) -> Models:
    """The testbed on the models that ``save_models`` saved."""
    setup = Setup(
        str(folder / "policy"),
        str(folder / "reward_model"),
        review_prompts(0)[:20],
        "logit",
        "cpu",
        REVIEWS_TRUTH,
    )
    return Models({"testbed": setup})
