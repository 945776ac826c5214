"""A policy's tokenizer and a reward model with another one, in folders; and credit computed the plain way.

The plain way is eager attention, ``output_attentions=True``, one unpadded row at a time, and characters
counted one by one; it shares no code with ``attnshape``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

POLICY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] | trim }} [/]\n{% endfor %}"
)
CORPUS = [
    "Was the film any good? Tell me about the plot and the ending.",
    "It was not bad, but the ending was weak; the actors were superb.",
    "Let me look that up. The search found three reviews, all of them good.",
    "[USER] [ASSISTANT] [/] system tool user assistant",
] * 8
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def _tokenizer(size: int, special: list[str], template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[-1], chat_template=template
    )


def save_policy(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer and a model's configuration, without weights: responses are scripted."""
    tokenizer = _tokenizer(300, SPECIAL, POLICY_TEMPLATE)
    tokenizer.save_pretrained(folder)
    Qwen2Config(vocab_size=len(tokenizer), architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return tokenizer


def small_llama(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaConfig:
    """Of one label and two layers, for this tokenizer."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**settings, **changes})


def small_gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """A policy of two layers for this tokenizer, without dropout."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def save_reward_model(folder: Path) -> None:
    tokenizer = _tokenizer(340, ["<pad>", "</s>"], REWARD_TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Heads as narrow as engines take them.
    config = small_llama(tokenizer, initializer_range=0.3, head_dim=32)
    LlamaForSequenceClassification(config).save_pretrained(folder)


@contextmanager
def another_server(model: Path) -> Iterator[str | None]:
    """URL of what the variable ``ATTNSHAPE_SERVER`` starts with this model, if there is one."""
    command = os.environ.get("ATTNSHAPE_SERVER", "").split()
    if not command:
        yield None
        return
    with subprocess.Popen([*command, str(model)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


class Offline:
    """Scores and credit of the reward model in ``folder``."""

    def __init__(self, folder: Path, policy: PreTrainedTokenizerFast) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()
        self.policy = policy

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[dict[str, Any]], response_ids: Sequence[int], mask: Sequence[int]
    ) -> tuple[float, torch.Tensor]:
        """Score, and credit ``[R]``, float64, of a prompt (text, or messages) and the policy's tokens."""
        texts = [
            self.policy.decode(response_ids[:i], skip_special_tokens=True)
            for i in range(len(response_ids) + 1)
        ]
        response = texts[-1]
        if isinstance(prompt, str):
            text = prompt + response
        else:
            messages = [*prompt, {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        kept = response if isinstance(prompt, str) else response.strip()  # the template strips
        low = text.rindex(kept)
        start = low - response.index(kept)
        owner = [-1] * len(text)  # the policy's unmasked token that each character belongs to
        for j, m in enumerate(mask):
            for i in range(start + len(texts[j]), start + len(texts[j + 1])):
                if m and low <= i < low + len(kept):
                    owner[i] = j
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        out = self.model(torch.tensor([encoded["input_ids"]]), output_attentions=True)
        row = out.attentions[-1][0].double().mean(0)[-1].tolist()
        credit = [0.0] * len(mask)
        for weight, (low, high) in zip(row, encoded["offset_mapping"], strict=True):
            owners = [owner[i] for i in range(low, high) if owner[i] >= 0]
            for j in owners:
                credit[j] += weight / len(owners)
        return out.logits[0, 0].item(), torch.tensor(credit).double() / sum(credit)

    def rewards(
        self,
        prompt: str | Sequence[dict[str, Any]],
        response_ids: Sequence[int],
        mask: Sequence[int],
        dense_share: float = 0.8,
    ) -> torch.Tensor:
        """Token rewards ``[R]``, float64: a share of the score by credit, the rest on the last unmasked."""
        score, credit = self(prompt, response_ids, mask)
        rewards = dense_share * score * credit
        rewards[max(j for j, m in enumerate(mask) if m)] += (1 - dense_share) * score
        return rewards
