import json
import random
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.language.data import Texts, read_texts
from benchmarks.language.models import LanguageConfig, build_tokenizer

GOOD, BAD, PLAIN = ("good", "lovely", "great"), ("bad", "dull", "awful"), ("film", "plot", "scene", "it")


def review(rng: random.Random, positive: bool) -> str:
    words = [rng.choice(PLAIN if rng.random() < 0.6 else GOOD if positive else BAD) for _ in range(60)]
    return " ".join(words).capitalize()


def sentence(rng: random.Random, split: str) -> dict[str, object]:
    positive = rng.random() < 0.5
    words = ["The", rng.choice(PLAIN), "is", "n't", rng.choice(BAD if positive else GOOD)]
    words += [",", rng.choice(GOOD if positive else BAD), "and", rng.choice(PLAIN), "."]
    labels = [3 if w in GOOD else 1 if w in BAD else 2 for w in words]
    side = 3 if positive else 1
    return {
        "split": split,
        "label": side,
        "words": words,
        "word_labels": labels,
        "phrases": [[3, 5, side], [0, 10, side]],
    }


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Reviews and a treebank of words whose side is plain."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    rows = [{"id": str(i), "label": i // 2 % 2, "text": review(rng, i // 2 % 2 == 1)} for i in range(60)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    splits = ["train"] * 40 + ["dev"] * 12 + ["test"] * 16
    tree = [sentence(rng, split) for split in splits]
    (folder / "tree.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tree))
    return folder / "reviews.jsonl", folder / "tree.jsonl"


@pytest.fixture(scope="package")
def texts(files: tuple[Path, Path]) -> Texts:
    return read_texts(*files)


@pytest.fixture(scope="package")
def saved(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny policy and a tiny reward model with one tokenizer, untrained."""
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer(texts, LanguageConfig(vocabulary=300))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.3,
        num_labels=1,
    )
    for name, kind in (("policy", LlamaForCausalLM), ("judge", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "policy", folder / "judge"
