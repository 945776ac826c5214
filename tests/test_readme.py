"""The README's calls run as they stand there."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
B, S, R = 4, 12, 5


@pytest.fixture
def names() -> dict[str, Any]:
    """What the README leaves to the reader: a reward model and a batch."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0
    )
    ids, mask = torch.randint(1, 50, (B, S)), torch.ones(B, S, dtype=torch.long)
    response_mask = torch.ones(B, R, dtype=torch.long)
    start = torch.full((B,), S - R)
    halves = [
        SimpleNamespace(
            input_ids=ids[half],
            attention_mask=mask[half],
            response_mask=response_mask[half],
            start=start[half],
        )
        for half in (slice(0, 2), slice(2, 4))
    ]
    return {
        "torch": torch,
        "reward_model": GPT2ForSequenceClassification(config).eval(),
        "input_ids": ids,
        "mask": mask,
        "response_mask": response_mask,
        "response_start": start,
        "micro_batches": halves,
        "values": torch.randn(B, R),
        "logprobs": -torch.rand(B, R),
        "ref_logprobs": -torch.rand(B, R),
    }


def test_both_shapes_of_loop_agree(names: dict[str, Any]) -> None:
    together, apart, _ = BLOCKS
    exec(together, names)
    credit, score = names["out"].credit, names["score"]
    assert names["out"].rewards.shape == (B, R)
    assert credit[:, :-1].sum() > 0
    exec(apart, names)
    torch.testing.assert_close(names["score"], score)
    torch.testing.assert_close(names["out"].credit, credit)
    torch.testing.assert_close(names["out"].rewards.sum(1), score)
    torch.testing.assert_close(names["advantages"].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_credit_of_another_tokenizer(names: dict[str, Any]) -> None:
    vocabulary = ["<pad>", "good", "plot", "but", "slow", "user", "assistant"]
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    by_letter = Tokenizer(models.BPE({letter: i for i, letter in enumerate("godpltbuswĠ")}, []))
    by_letter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_letter.decoder = decoders.ByteLevel()
    reward_tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="<pad>")
    policy_tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_letter)
    texts = ["user plot assistant good plot", "user plot assistant slow but good"]
    batch = reward_tokenizer(texts, padding=True, return_tensors="pt")
    responses = [policy_tokenizer(text.split("assistant ")[1])["input_ids"] for text in texts]
    width = max(map(len, responses))
    names |= {
        "input_ids": batch["input_ids"],
        "mask": batch["attention_mask"],
        "templated_texts": texts,
        "response_ids": responses,
        "reward_tokenizer": reward_tokenizer,
        "policy_tokenizer": policy_tokenizer,
        "zeros": torch.zeros(2, dtype=torch.int32),
    }
    first_lines = BLOCKS[0].split("out =")[0]
    exec(first_lines, names)
    names["response_mask"] = torch.tensor([[i < len(ids) for i in range(width)] for ids in responses])
    exec(BLOCKS[2], names)
    torch.testing.assert_close(names["out"].rewards.sum(1), names["score"])
    # Letters of one word share that word's credit equally: "good" of the first response.
    word = names["credit"][0, 3]
    torch.testing.assert_close(names["out"].credit[0, :4], (word / 4).expand(4))
