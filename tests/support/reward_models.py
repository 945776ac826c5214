"""Reward models and tokenizers that are made on the spot and saved like real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)
LIMIT = 64


def tokenizer(pad_token: str | None = "<pad>") -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tok.train_from_iterator(
        ["It was great, not bad at all! How was the film? awful plot"] * 8,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        pad_token=pad_token,
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
        padding_side="left",
    )


def save(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": LIMIT,
        "pad_token_id": None if kind == "no_pad" else 1,
    }
    if kind == "causal":
        model = LlamaForCausalLM(LlamaConfig(**shape, **llama))
    elif kind == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=4, n_positions=LIMIT, num_labels=1)
        )
    else:
        labels = 2 if kind == "two_labels" else 1
        model = LlamaForSequenceClassification(LlamaConfig(**shape, **llama, num_labels=labels))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # attention far from uniform
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(20)
            elif parameter.ndim == 2:
                parameter.mul_(50)
    model.save_pretrained(folder)
    tokenizer(None if kind == "gpt2" else "<pad>").save_pretrained(folder)
    return folder
