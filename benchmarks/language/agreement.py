"""Credit against people's word labels, and against the model's own score when words are deleted.

All is by word: a word's weight is the sum over its tokens, so that tokenizers can be compared.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnshape.credit import picked
from benchmarks.language.data import NEUTRAL, Review, Sentence
from benchmarks.language.rewards import Scorer, pair_accuracy
from benchmarks.language.sources import SIGNED, integrated_gradients, leave_one_out, left_out, sources_of

SENTENCES, WORDS = 160, (8, 30)
"""How many of the test sentences, and their fewest and most words."""
LONG = 16
"""Sentences of so many words are the longer ones."""
DELETED = 0.2
"""Share of a sentence's words that is deleted."""
RANDOM_DRAWS = 3
BATCH = 20
PHRASE_WORDS = (2, 5)


def measured_on(sentences: Sequence[Sentence], count: int = SENTENCES) -> list[Sentence]:
    """Polar sentences in which people called some words positive or negative, and not all."""
    fit = [
        s
        for s in sentences
        if s.label != NEUTRAL
        and WORDS[0] <= len(s.spans) <= WORDS[1]
        and 0 < sum(label != NEUTRAL for label in s.word_labels) < len(s.word_labels)
    ]
    drawn = random.Random(0).sample(fit, min(count, len(fit)))
    return sorted(drawn, key=lambda s: len(s.spans))


class Lexicon:
    """Smoothed log-odds of a word in positive against negative reviews: no model, no labels of words."""

    def __init__(self, reviews: Sequence[Review]) -> None:
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for review in reviews:
            counts[review.positive].update(set(re.findall(r"[\w']+", review.text)))
        self.counts = counts
        self.reviews = {p: sum(r.positive == p for r in reviews) for p in (True, False)}

    def weight(self, word: str) -> float:
        rates = [(self.counts[p][word] + 1) / (self.reviews[p] + 2) for p in (True, False)]
        rare = sum(self.counts[p][word] for p in (True, False))
        return math.log(rates[0] / rates[1]) * rare / (rare + 10)


@dataclass(frozen=True)
class Read:
    """A batch of sentences as a model reads them."""

    ids: Tensor
    mask: Tensor
    units: Tensor
    """int ``[B, S]``: the word that a token is most of, -1 for special tokens."""

    @classmethod
    def by(cls, scorer: Scorer, sentences: Sequence[Sentence]) -> Read:
        encoded = scorer.tokenizer(
            [s.text for s in sentences], padding=True, return_offsets_mapping=True, return_tensors="pt"
        )
        units = torch.full(encoded["input_ids"].shape, -1)
        for b, sentence in enumerate(sentences):
            for i, (start, end) in enumerate(encoded["offset_mapping"][b].tolist()):
                shared = [min(end, to) - max(start, at) for at, to in sentence.spans]
                if end > start and max(shared) > 0:
                    units[b, i] = shared.index(max(shared))
        return cls(encoded["input_ids"], encoded["attention_mask"], units)

    def by_word(self, weights: Tensor) -> Tensor:
        """Weights ``[B, S]`` of tokens to ``[B, words]``."""
        out = torch.zeros(len(weights), int(self.units.max()) + 1)
        return out.scatter_add(1, self.units.clamp(min=0), weights.float() * (self.units >= 0))


Weights = dict[str, list[Tensor]]
"""Of each source, each sentence's weights by word."""


def all_weights(
    scorer: Scorer, sentences: Sequence[Sentence], lexicon: Lexicon
) -> tuple[Tensor, Weights, dict[str, float]]:
    """Scores, weights, and the CPU seconds of each source."""
    scores: list[Tensor] = []
    found: Weights = {}
    seconds: Counter[str] = Counter()
    pad = scorer.tokenizer.pad_token_id

    def keep(name: str, by_word: Tensor, rows: Sequence[Sentence]) -> None:
        found.setdefault(name, []).extend(w[: len(s.spans)] for w, s in zip(by_word, rows, strict=True))

    for first in range(0, len(sentences), BATCH):
        rows = sentences[first : first + BATCH]
        read = Read.by(scorer, rows)
        inside = read.units >= 0
        for name, weigh in sources_of(scorer.model).items():
            start = time.process_time()
            score, weights = weigh(scorer.model, read.ids, read.mask, inside)
            seconds[name] += time.process_time() - start
            keep(name, read.by_word(weights), rows)
        start = time.process_time()
        score, drops = leave_one_out(scorer.model, read.ids, read.mask, read.units, pad)
        seconds["leave-one-out"] += time.process_time() - start
        keep("leave-one-out", drops, rows)
        start = time.process_time()
        _, weights = integrated_gradients(scorer.model, read.ids, read.mask, inside)
        seconds["integrated gradients"] += time.process_time() - start
        keep("integrated gradients", read.by_word(weights), rows)
        scores.append(score)
        found.setdefault("lexicon", []).extend(
            torch.tensor([lexicon.weight(s.text[a:b]) for a, b in s.spans]) for s in rows
        )
    return torch.cat(scores), found, dict(seconds)


def _mean(values: Sequence[float]) -> float | None:
    kept = [x for x in values if not math.isnan(x)]
    return sum(kept) / len(kept) if kept else None


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = (x.norm() * y.norm()).item()
    return (x @ y).item() / size if size > 0 else math.nan


def with_people(sentences: Sequence[Sentence], weights: Sequence[Tensor], signed: bool) -> dict[str, Any]:
    """How well weights find the words that people called positive or negative, and with which sign.

    ``roc``: of |weight| over such words against the others, mean over sentences, chance .5 (also of the
    shorter and the longer sentences); ``precision`` at as many words as people named; ``signed``:
    correlation with the word's label; ``phrase_sign``: share of short polar phrases whose summed weight has
    the sign of the phrase's label; ``negated_sign``: of those whose words people labelled the other way.
    """
    roc, precision, signs, phrases, negated = [], [], [], [], []
    for s, w in zip(sentences, weights, strict=True):
        labels = torch.tensor(s.word_labels) - NEUTRAL
        polar = labels != 0
        roc.append(pair_accuracy(w.abs(), polar))
        k = polar.sum()[None, None]
        top = picked(w.abs()[None], torch.ones(1, len(w), dtype=torch.bool), k)[0]
        precision.append(top[polar].sum().item() / k.item())
        if not signed:
            continue
        signs.append(_correlation(w, labels))
        for start, end, label in s.phrases:
            if not PHRASE_WORDS[0] <= end - start <= PHRASE_WORDS[1] or label == NEUTRAL:
                continue
            right = float((w[start:end].sum().item() > 0) == (label > NEUTRAL))
            phrases.append(right)
            inner = int(labels[start:end].sum())
            if inner * (label - NEUTRAL) < 0:
                negated.append(right)
    long = [len(s.spans) >= LONG for s in sentences]
    out: dict[str, Any] = {
        "roc": _mean(roc),
        "roc_short": _mean([x for x, far in zip(roc, long, strict=True) if not far]),
        "roc_long": _mean([x for x, far in zip(roc, long, strict=True) if far]),
        "precision": _mean(precision),
    }
    if signed:
        out |= {"signed": _mean(signs), "phrase_sign": _mean(phrases), "negated_sign": _mean(negated)}
        out["phrases"], out["negated"] = len(phrases), len(negated)
    return out


def _chosen(weights: Sequence[Tensor], words: int) -> Tensor:
    """Rows for ``left_out``: of each text the share ``DELETED`` of its words with the largest weights."""
    out = torch.zeros(len(weights), 1 + words)
    for b, w in enumerate(weights):
        out[b, 0] = b
        out[b, 1 + w.topk(max(1, round(DELETED * len(w)))).indices] = 1
    return out


def deletions(
    scorer: Scorer, sentences: Sequence[Sentence], scores: Tensor, found: Weights
) -> dict[str, dict[str, float]]:
    """What happens to the score when the words that a source names go, in standard deviations of the scores.

    ``moved``: mean size of the change when the words of the largest |weight| go; ``fell``: how far the score
    then moves against its own verdict (which side of the median it is on); ``fell_signed``: the same for the
    words that a signed source says speak most for the verdict. ``random`` is the mean of a few draws.
    """
    unit, verdict = scores.std().item(), torch.where(scores > scores.median(), 1.0, -1.0)
    generator = torch.Generator().manual_seed(0)
    named = dict(found)
    for i in range(RANDOM_DRAWS):
        named[f"random {i}"] = [torch.rand(len(s.spans), generator=generator) for s in sentences]
    kinds = {name: [w.abs() for w in ws] for name, ws in named.items()}
    signed = {
        name: [v * w for v, w in zip(verdict, ws, strict=True)]
        for name, ws in found.items()
        if name in SIGNED
    }
    out: dict[str, dict[str, float]] = {name: {} for name in named}
    pad = scorer.tokenizer.pad_token_id
    changes: dict[tuple[str, str], list[Tensor]] = {}
    for first in range(0, len(sentences), BATCH):
        part = slice(first, first + BATCH)
        read = Read.by(scorer, sentences[part])
        words = int(read.units.max()) + 1
        for kind, of in (("size", kinds), ("signed", signed)):
            for name, ws in of.items():
                after = left_out(scorer.model, read.ids, read.mask, read.units, _chosen(ws[part], words), pad)
                changes.setdefault((kind, name), []).append(scores[part] - after)
    for (kind, name), parts in changes.items():
        change = torch.cat(parts) / unit
        if kind == "size":
            out[name] |= {"moved": change.abs().mean().item(), "fell": (change * verdict).mean().item()}
        else:
            out[name]["fell_signed"] = (change * verdict).mean().item()
    draws = [out.pop(f"random {i}") for i in range(RANDOM_DRAWS)]
    out["random"] = {key: sum(d[key] for d in draws) / RANDOM_DRAWS for key in draws[0]}
    return out


def _entropy(w: Tensor) -> float:
    p = w.abs().double() / w.abs().double().sum().clamp(min=1e-30)
    return -(p * p.clamp(min=1e-30).log()).sum().item() / math.log(len(w))


def agreement(scorer: Scorer, sentences: Sequence[Sentence], lexicon: Lexicon) -> dict[str, Any]:
    """Everything about every source of one reward model."""
    start = time.process_time()
    scores, found, seconds = all_weights(scorer, sentences, lexicon)
    deleted = deletions(scorer, sentences, scores, found)
    labels = torch.tensor([s.label > NEUTRAL for s in sentences])
    sources = {}
    for name, weights in found.items():
        sources[name] = with_people(sentences, weights, name in SIGNED) | deleted[name]
        exact = found["leave-one-out"]
        sources[name]["with_leave_one_out"] = _mean(
            [_correlation(w.abs(), e.abs()) for w, e in zip(weights, exact, strict=True)]
        )
        sources[name]["entropy"] = _mean([_entropy(w) for w in weights])
        if name in seconds:
            sources[name]["cpu_seconds"] = round(seconds[name], 2)
    chance = _mean([sum(x != NEUTRAL for x in s.word_labels) / len(s.word_labels) for s in sentences])
    sources["random"] = {"roc": 0.5, "precision": chance} | deleted["random"]
    return {
        "sentences": len(sentences),
        "pairs": pair_accuracy(scores, labels),
        "cpu_seconds": round(time.process_time() - start, 1),
        "sources": sources,
    }
