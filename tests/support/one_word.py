"""A reward model whose truth is known: one word decides the score, and one layer looks elsewhere."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

PLAIN = "the a film plot was with and its old long scene actor".split()
VERDICTS = {"superb": 1.0, "dreadful": -1.0}
DECOYS = ("camera", "music")
WORDS = ["<pad>", *PLAIN, *VERDICTS, *DECOYS]
CONSTANT, SALIENT, VALUE, FOUND, DECOY, UNREAD = range(6)
SLOW = 7
"""A dimension that the position hardly rotates."""


def save_one_word(folder: Path, reads_at: int) -> Path:
    """Two layers: ``reads_at`` moves a verdict's value to the last token, the other looks at decoys only."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[:, CONSTANT] = 1
        for word, value in VERDICTS.items():
            embedding[WORDS.index(word), [SALIENT, VALUE]] = torch.tensor([1.0, value])
        for word in DECOYS:
            embedding[WORDS.index(word), DECOY] = 1
        for i, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            attention.q_proj.weight[SLOW, CONSTANT] = 1.5
            attention.k_proj.weight[SLOW, SALIENT if i == reads_at else DECOY] = 1.5
            attention.v_proj.weight[UNREAD, CONSTANT] = 0.01  # moves nothing that is read
            attention.o_proj.weight[UNREAD, UNREAD] = 1
            if i == reads_at:
                attention.v_proj.weight[FOUND, VALUE] = 1
                attention.o_proj.weight[FOUND, FOUND] = 1
        model.score.weight[0, FOUND] = 1
    model.save_pretrained(folder)
    return folder


def completion(rng: random.Random, length: int = 12) -> str:
    """Plain words, two decoys, and a verdict somewhere."""
    words = rng.choices(PLAIN, k=length - 3) + list(DECOYS) + [rng.choice(list(VERDICTS))]
    rng.shuffle(words)
    return " ".join(words)
