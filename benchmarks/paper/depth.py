"""Which credit finds the words that matter, in reward models of several depths, qualities and training seeds.

The truth of a token is its leave-one-out effect: how much the true reward falls when it is deleted.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from attnshape import credit, shape_rewards
from attnshape.demo.agreement import precision_at_k
from attnshape.demo.corpus import BOS, build_tokenizer, leave_one_out, true_reward, vocabulary, write_review
from attnshape.demo.models import ModelConfig, train_language_model, train_reward_model
from benchmarks.paper.cells import DEPTHS, MODEL_SEEDS, QUALITIES, QUALITY_LAYERS
from benchmarks.paper.contextual import contextual_leave_one_out, contextual_reward
from benchmarks.paper.sources import SOURCES
from benchmarks.paper.store import Table
from benchmarks.paper.testbed import provenance, whole_folder

RewardName: TypeAlias = Literal["lexical", "contextual"]


class Truth(NamedTuple):
    reward: Callable[[Sequence[str]], float]
    effects: Callable[[Sequence[str]], list[float]]


REWARDS: dict[RewardName, Truth] = {
    "lexical": Truth(true_reward, leave_one_out),
    "contextual": Truth(contextual_reward, contextual_leave_one_out),
}
CONFIG = ModelConfig(
    positions=144,
    review_words=(40, 72),
    pair_words=(4, 72),
    frozen_layers=0,
    lm_steps=400,
    rm_steps=400,
    rm_batch_size=48,
)
"""Smaller than the testbed's training, and no layer frozen; a depth's language model starts all its seeds."""
LENGTHS = (12, 50)
DOCUMENTS = 200
PROMPT_WORDS = 4
DOCUMENT_SEED = 77
BATCH = 50
GRADIENT = "gradient x value"
"""Every source's top tenth of tokens is compared with this one's."""


@dataclass(frozen=True)
class DeepModel:
    """One reward model of the study, trained for ``steps``."""

    layers: int
    seed: int
    reward: RewardName = "lexical"
    steps: int = CONFIG.rm_steps

    @property
    def name(self) -> str:
        context = "" if self.reward == "lexical" else f", {self.reward}"
        quality = "" if self.steps == CONFIG.rm_steps else f", {self.steps} steps"
        return f"{self.layers} layers, seed {self.seed}{context}{quality}"

    @property
    def key(self) -> str:
        """Orders models by their names."""
        return self.name


STUDY = [
    *(DeepModel(layers, seed) for seed in MODEL_SEEDS for layers in DEPTHS),
    *(DeepModel(QUALITY_LAYERS, seed, steps=steps) for steps in QUALITIES for seed in MODEL_SEEDS),
    *(DeepModel(layers, seed, "contextual") for seed in MODEL_SEEDS for layers in DEPTHS),
]
"""Every reward model of the study."""


def _key(record: dict[str, Any]) -> str:
    return DeepModel(*(record[f.name] for f in fields(DeepModel))).key


MODELS = Table("models", _key)


def train_deep(model: DeepModel, cache: Path, config: ModelConfig = CONFIG) -> Path:
    """The folder of the trained reward model, found in ``cache`` or trained into it."""
    folder = cache / model.name
    if folder.is_dir():
        return folder
    base = cache / "language models" / f"{model.layers} layers"
    if not base.is_dir():
        trained, _ = train_language_model(replace(config, layers=model.layers))
        whole_folder(base, trained.save_pretrained)
    language_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = replace(config, layers=model.layers, seed=config.seed + 10 * model.seed, rm_steps=model.steps)
    reward_model, accuracy, true_accuracy = train_reward_model(
        changed, language_model, reward=REWARDS[model.reward].reward
    )

    def save(new: Path) -> None:
        reward_model.save_pretrained(new)
        build_tokenizer().save_pretrained(new)
        (new / "accuracy.json").write_text(json.dumps([accuracy, true_accuracy]))

    whole_folder(folder, save)
    return folder


class Documents(NamedTuple):
    """Reviews after a prompt of ``PROMPT_WORDS``: ids ``[n, S]`` and effects of the response ``[n, R]``."""

    ids: Tensor
    effects: Tensor


@functools.lru_cache
def documents(length: int, reward: RewardName, count: int = DOCUMENTS) -> Documents:
    """Reviews whose responses have ``length`` words, with each word's leave-one-out effect."""
    rng = random.Random(DOCUMENT_SEED)
    index = {word: i for i, word in enumerate(vocabulary())}
    total = PROMPT_WORDS + length
    reviews = [write_review(rng, total)[:total] for _ in range(count)]
    effects = [REWARDS[reward].effects(words)[PROMPT_WORDS:] for words in reviews]
    ids = [[index[BOS], *(index[w] for w in words)] for words in reviews]
    return Documents(torch.tensor(ids), torch.tensor(effects))


def measure(model: Any, reward: RewardName, length: int, count: int = DOCUMENTS) -> dict[str, Any]:
    """For each source the means over documents of how well it finds the effects, and its CPU time.

    ``precision_at_k``: share of true ones among the ``k`` tokens with most credit, ``k`` the number of tokens
    with an effect; ``signed`` and ``absolute``: rank correlation with the effects and with their sizes. Two
    measures need no truth: ``entropy`` of the credit over that of uniform credit, and ``overlap``, the share
    of its top tenth that is in gradient x value's. ``cost`` is CPU time over that of a forward that only
    scores.
    """
    found = documents(length, reward, count)
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    start = torch.full((BATCH,), 1 + PROMPT_WORDS, dtype=torch.int32)
    batches = found.ids.split(BATCH)
    attend = torch.ones_like(batches[0])

    with torch.no_grad():
        for _ in range(2):  # the first is the warm-up
            begun = time.process_time()
            for ids in batches:
                model(ids, attention_mask=attend)
            plain = time.process_time() - begun
    chance = sum(float((e != 0).float().mean()) for e in found.effects) / len(found.effects)
    weights, cost = {}, {}
    for name, source in SOURCES.items():
        begun = time.process_time()
        weights[name] = torch.cat([source.compute(model, ids, attend, mask, start)[1] for ids in batches])
        cost[name] = (time.process_time() - begun) / plain
    everywhere = torch.ones_like(found.effects)
    measures = {
        name: {
            **agreement(w, found.effects),
            "entropy": relative_entropy(w),
            "overlap": credit.top_overlap(w, weights[GRADIENT], everywhere).mean().item(),
            "cost": cost[name],
        }
        for name, w in weights.items()
    }
    rounded = {
        name: {key: round(value, 4) for key, value in found.items()} for name, found in measures.items()
    }
    return {"chance": round(chance, 4), "sources": rounded}


def agreement(weights: Tensor, effects: Tensor) -> dict[str, float]:
    """Means over the rows of ``[n, R]`` in which a token has an effect."""
    rows = [(w, e) for w, e in zip(weights, effects, strict=True) if bool((e != 0).any())]
    return {
        "precision_at_k": _mean(precision_at_k(w.abs(), e) for w, e in rows),
        "signed": _mean(rank_correlation(w, e) for w, e in rows),
        "absolute": _mean(rank_correlation(w.abs(), e.abs()) for w, e in rows),
    }


def _mean(values: Iterable[float | None]) -> float:
    return statistics.fmean(x for x in values if x is not None)


def relative_entropy(weights: Tensor) -> float:
    """``credit_entropy`` of the rows' sizes ``[n, R]`` over that of uniform credit: 1 is uniform."""
    shaped = shape_rewards(weights.new_zeros(len(weights)), weights.abs(), torch.ones_like(weights))
    return shaped.metrics["credit_entropy"].item() / math.log(weights.shape[1])


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, ties at their mean rank; 0 where either is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    below = (x[None] < x[:, None]).double().sum(1)
    return below + 0.5 * (x[None] == x[:, None]).double().sum(1)


def study(model: DeepModel, cache: Path, out: Path) -> None:
    """Trains the model if need be, and measures every source at every length."""
    folder = train_deep(model, cache)
    accuracy, true_accuracy = json.loads((folder / "accuracy.json").read_text())
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    record = {
        **asdict(model),
        "accuracy": accuracy,
        "true_accuracy": true_accuracy,
        **provenance(),
        "lengths": {str(n): measure(network, model.reward, n) for n in LENGTHS},
    }
    MODELS.add(record, out, model.name)
