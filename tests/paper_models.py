"""Tiny models of the experiments' kinds, untrained: a policy, reward models and prompts in local folders."""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from attnshape.demo.corpus import build_tokenizer, vocabulary
from attnshape.demo.run import REVIEWS_TRUTH, Setup, review_prompts
from benchmarks.paper.testbed import Models


def save_models(folder: Path, labels: int = 1, seed: int = 0) -> None:
    """``folder/policy`` and ``folder/reward_model``, GPT-2-shaped, and ``folder/prompts.jsonl``."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(vocabulary()),
        n_positions=48,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=labels,
    )
    for model, name in (
        (GPT2LMHeadModel(config), "policy"),
        (GPT2ForSequenceClassification(config), "reward_model"),
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
