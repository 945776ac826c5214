"""``docs/sources.md``: its table, its calls, its costs."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from attnshape import credit

PAGE = (Path(__file__).parents[1] / "docs" / "sources.md").read_text()


def test_the_page_names_every_source() -> None:
    table = PAGE.split("## Deep reward models")[0]
    for name in credit.__all__:
        assert f"{name}(" in table or f"`{name}`" in table, name


def by_letter() -> transformers.PreTrainedTokenizerFast:
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("? abdfghilmow")}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="?")


def test_the_calls_on_the_page_run() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0
    )
    names: dict[str, Any] = {
        "torch": torch,
        "reward_model": transformers.GPT2ForSequenceClassification(config).eval(),
        "input_ids": torch.randint(1, 50, (4, 12)),
        "mask": torch.ones(4, 12, dtype=torch.long),
        "response_mask": torch.ones(4, 5, dtype=torch.long),
        "response_start": torch.full((4,), 7),
        "values": torch.randn(4, 5),
        "tokenizer": by_letter(),
        "pairs": [("how ", "good film"), ("how ", "a bad film")],
    }
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
        if "out =" not in block:
            continue
        score = names["score"].detach()
        if "incremental" in block:
            score = score - names["scores"][:, 6].detach()
        torch.testing.assert_close(names["out"].rewards.sum(1), score)
    assert 0 <= names["agreement"] <= 1
    assert "(2 completions)" in names["found"].advice or "2 completions do not tell" in names["found"].advice


def test_costs_on_the_page_are_those_that_were_counted() -> None:
    counted = json.loads((Path(__file__).parents[1] / "benchmarks/results/credit_cost.json").read_text())
    lines = [line.split("|")[1:] for line in PAGE.splitlines() if line.startswith("| ")]
    page = {cells[0].strip(): (cells[1].strip(), cells[2].strip()) for cells in lines}
    names = {
        "forward alone": "forward alone, with its cache",
        "last row": "last row; mean over layers; increments",
        "mean over layers": "last row; mean over layers; increments",
        "incremental (R3HF)": "last row; mean over layers; increments",
        "value-weighted last row": "value-weighted last row",
        "plain rollout": "plain rollout",
        "norm-weighted rollout": "norm-weighted rollout",
        "signed rollout": "signed rollout",
        "gradient x value": "gradient × value, first layer",
        "gradient x embedding": "gradient × embedding",
        "relevance": "relevance, first layer",
        "relevance a third up": "relevance, a third of the way up",
    }
    for source in {row["source"] for row in counted["rows"]}:
        rows = sorted(
            (row for row in counted["rows"] if row["source"] == source), key=lambda row: row["length"]
        )
        memory = ", ".join(f"{row['peak_bytes'] / 1e6:.1f}" for row in rows)
        assert page[names[source]] == (f"{rows[-1]['flops_of_forward']:.2f}", memory), source
