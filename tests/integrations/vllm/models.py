"""Reward models whose attention is far from uniform, in folders, and what eager transformers says of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

VOCABULARY = 512
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
    "initializer_range": 0.2,
}
GEMMA = {"sliding_window": 48, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForSequenceClassification, {}),
    "wide": (LlamaConfig, LlamaForSequenceClassification, {"head_dim": 80}),
    "two_labels": (LlamaConfig, LlamaForSequenceClassification, {"num_labels": 2}),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification, {"hidden_size": 128}),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification, {}),
    "gemma2": (Gemma2Config, Gemma2ForSequenceClassification, GEMMA),  # the last layer has a window
    "gemma2_full": (Gemma2Config, Gemma2ForSequenceClassification, {**GEMMA, "num_hidden_layers": 4}),
    "mistral": (MistralConfig, MistralForSequenceClassification, {"sliding_window": 40}),
}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>\n{% endfor %}"
WORDS = "Was the film any good? It was not bad, but the ending was weak; the actors were superb. system tool"


def tokenizer() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 12,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([WORDS] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        chat_template=TEMPLATE,
    )


def save(folder: Path, kind: str) -> Path:
    """The folder's model of this kind, made if it is not there."""
    path = folder / kind
    if not (path / "config.json").exists():
        config, model_class, changes = KINDS[kind]
        torch.manual_seed(0)
        model = model_class(config(**{**SIZE, **changes})).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)
                elif "q_proj" in name or "k_proj" in name:
                    parameter.mul_(1.5)
        tokenizer().save_pretrained(path)
        model.save_pretrained(path)
    return path


def prompts_of(count: int, longest: int, shared: int) -> list[list[int]]:
    """Token ids: lengths around a block's, then drawn ones, behind so many tokens that all share."""
    draw = random.Random(1)
    prefix = [draw.randrange(3, 300) for _ in range(shared)]
    lengths = [1, 2, 31, 32, 33, 64, 65, 97][:count]
    lengths += [draw.randrange(1, longest) for _ in range(count - len(lengths))]
    return [prefix + [draw.randrange(3, 300) for _ in range(n)] for n in lengths]


class Expected(NamedTuple):
    logits: list[Tensor]
    rows: list[Tensor]


@torch.no_grad()
def expected(path: Path, prompts: Sequence[list[int]], dtype: torch.dtype = torch.float32) -> Expected:
    """Logits and the last layer's row of eager attention, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()
    logits, rows = [], []
    for ids in prompts:
        out = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
        logits.append(out.logits[0].float())
        rows.append(out.attentions[-1][0, :, -1].float().mean(0))
    return Expected(logits, rows)
