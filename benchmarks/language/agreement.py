"""Credit against people's word labels, and against the model's own score when words are deleted.

All is by token, which counts as its word was labelled: a word's sum would favour what has many tokens, as
rare words do, whatever a source says.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnshape import Response
from attnshape.credit import deletion_scores, picked
from benchmarks.language.data import NEUTRAL, Review, Sentence
from benchmarks.language.rewards import Scorer, pair_accuracy
from benchmarks.language.sources import (
    SIGNED,
    TOKENS,
    integrated_gradients,
    leave_one_out,
    scoring,
    sources_of,
)

SENTENCES, WORDS = 100, (8, 30)
"""How many of the test sentences, and their fewest and most words."""
LONG = 16
"""Sentences of so many words are the longer ones."""
DELETED = 0.2
"""Share of a sentence's tokens that is deleted."""
RANDOM_DRAWS = 3
BATCH = 20
PHRASE_WORDS = (2, 5)
ALIKE = 1.0
"""Words are as rare as each other whose log document frequencies differ by less."""


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
    """What word counts alone say: no model, no labels of words."""

    def __init__(self, reviews: Sequence[Review]) -> None:
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for review in reviews:
            counts[review.positive].update(set(re.findall(r"[\w']+", review.text)))
        self.counts = counts
        self.reviews = {p: sum(r.positive == p for r in reviews) for p in (True, False)}

    def rarity(self, word: str) -> float:
        """Inverse document frequency, in nats; of the most frequent part of what is no single word."""
        reviews = sum(self.reviews.values())
        seen = [sum(self.counts[p][part] for p in (True, False)) for part in re.findall(r"[\w']+", word)]
        return math.log((reviews + 1) / (max(seen, default=reviews) + 1))

    def weight(self, word: str) -> float:
        """Smoothed log-odds in positive against negative reviews."""
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

    def by_token(self, words: Sequence[Sequence[float]]) -> Tensor:
        """Each word's weight on all of its tokens, ``[B, S]``."""
        out = torch.zeros(self.ids.shape)
        for b, row in enumerate(words):
            out[b] = torch.where(self.units[b] >= 0, torch.tensor(row)[self.units[b].clamp(min=0)], 0.0)
        return out


@dataclass(frozen=True)
class Weighed:
    """A batch of sentences with its scores, and each source's weights of its tokens ``[B, S]``."""

    read: Read
    scores: Tensor
    weights: dict[str, Tensor]

    def falls(self, scorer: Scorer, weights: Tensor, seed: int = 0) -> Tensor:
        """How far each score falls, ``[B]``, without the share ``DELETED`` of the largest weights."""
        read = self.read
        inside = Response(read.units >= 0, start=torch.zeros(len(read.ids), dtype=torch.int64))
        after = deletion_scores(
            scoring(scorer.model),
            read.ids,
            weights,
            inside,
            fractions=(DELETED,),
            attention_mask=read.mask,
            pad_token_id=scorer.tokenizer.pad_token_id,
            batch_tokens=TOKENS,
            seed=seed,
        )
        return self.scores - after[:, 0]


def weigh_all(
    scorer: Scorer, sentences: Sequence[Sentence], lexicon: Lexicon
) -> tuple[list[Weighed], dict[str, float]]:
    """Batches, and the CPU seconds of each source."""
    seconds: Counter[str] = Counter()
    model, pad = scorer.model, scorer.tokenizer.pad_token_id
    out = []
    for first in range(0, len(sentences), BATCH):
        rows = sentences[first : first + BATCH]
        read = Read.by(scorer, rows)
        sources = sources_of(model) | {
            "leave-one-out": partial(leave_one_out, pad_id=pad),
            "integrated gradients": integrated_gradients,
        }
        weights = {}
        for name, weigh in sources.items():
            start = time.process_time()
            scores, weights[name] = weigh(model, read.ids, read.mask, read.units >= 0)
            seconds[name] += time.process_time() - start
        for name, of_word in (("lexicon", lexicon.weight), ("rarity", lexicon.rarity)):
            weights[name] = read.by_token([[of_word(s.text[a:b]) for a, b in s.spans] for s in rows])
        out.append(Weighed(read, scores, weights))
    return out, dict(seconds)


def _mean(values: Sequence[float]) -> float | None:
    kept = [x for x in values if not math.isnan(x)]
    return sum(kept) / len(kept) if kept else None


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = (x.norm() * y.norm()).item()
    return (x @ y).item() / size if size > 0 else math.nan


def matched_roc(weights: Tensor, polar: Tensor, rarity: Tensor) -> float:
    """As ``pair_accuracy``, of pairs of words as rare as each other only; NaN where there are none.

    People call few function words positive or negative, so whatever prefers rare words finds theirs.
    """
    alike = (rarity[polar][:, None] - rarity[~polar][None]).abs() < ALIKE
    above = (weights[polar][:, None] - weights[~polar][None])[alike]
    return ((above > 0).float() + 0.5 * (above == 0).float()).mean().item()


def with_people(
    sentences: Sequence[Sentence],
    weights: Sequence[Tensor],
    units: Sequence[Tensor],
    rarities: Sequence[Tensor],
    signed: bool,
) -> dict[str, Any]:
    """How well weights find the words that people called positive or negative, and with which sign.

    ``roc``: of |weight| over tokens of such words against the others, mean over sentences, chance .5 (also of
    the shorter and the longer sentences); ``roc_matched``: the same among words as rare as each other;
    ``precision`` at as many tokens as those words have; ``signed``:
    correlation with the label; ``phrase_sign``: share of short polar phrases whose summed weight has the sign
    of the phrase's label; ``negated_sign``: of those whose words people labelled the other way.

    Args:
        weights: of each sentence's tokens.
        units: the words that they belong to.
        rarities: of those words.
    """
    roc, matched, precision, signs, phrases, negated = [], [], [], [], [], []
    for s, w, unit, rarity in zip(sentences, weights, units, rarities, strict=True):
        of_words = torch.tensor(s.word_labels) - NEUTRAL
        labels = of_words[unit]
        polar = labels != 0
        roc.append(pair_accuracy(w.abs(), polar))
        matched.append(matched_roc(w.abs(), polar, rarity))
        k = polar.sum()[None, None]
        top = picked(w.abs()[None], torch.ones(1, len(w), dtype=torch.bool), k)[0]
        precision.append(top[polar].sum().item() / k.item())
        if not signed:
            continue
        signs.append(_correlation(w, labels))
        for start, end, label in s.phrases:
            if not PHRASE_WORDS[0] <= end - start <= PHRASE_WORDS[1] or label == NEUTRAL:
                continue
            inside = (unit >= start) & (unit < end)
            right = float((w[inside].sum().item() > 0) == (label > NEUTRAL))
            phrases.append(right)
            inner = int(of_words[start:end].sum())
            if inner * (label - NEUTRAL) < 0:
                negated.append(right)
    long = [len(s.spans) >= LONG for s in sentences]
    out: dict[str, Any] = {
        "roc": _mean(roc),
        "roc_short": _mean([x for x, far in zip(roc, long, strict=True) if not far]),
        "roc_long": _mean([x for x, far in zip(roc, long, strict=True) if far]),
        "roc_matched": _mean(matched),
        "precision": _mean(precision),
    }
    if signed:
        out |= {"signed": _mean(signs), "phrase_sign": _mean(phrases), "negated_sign": _mean(negated)}
        out["phrases"], out["negated"] = len(phrases), len(negated)
    return out


def deletions(scorer: Scorer, batches: Sequence[Weighed]) -> dict[str, dict[str, float]]:
    """What happens to the score when the tokens that a source names go, in the scores' standard deviation.

    ``moved``: mean size of the change when those of the largest |weight| go; ``fell``: how far the score then
    moves against its own verdict (which side of the median it is on); ``fell_signed``: the same for those
    that a signed source says speak most for the verdict. ``random`` is the mean of a few draws.
    """
    scores = torch.cat([b.scores for b in batches])
    unit, middle = scores.std().item(), scores.median()
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for batch in batches:
        verdict = torch.where(batch.scores > middle, 1.0, -1.0)
        for name, weights in batch.weights.items():
            against = verdict * batch.falls(scorer, weights.abs()) / unit
            parts.setdefault((name, "fell"), []).append(against)
            parts.setdefault((name, "moved"), []).append(against.abs())
            if name in SIGNED:
                signed = verdict * batch.falls(scorer, weights * verdict[:, None]) / unit
                parts.setdefault((name, "fell_signed"), []).append(signed)
        for seed in range(RANDOM_DRAWS):
            drawn = verdict * batch.falls(scorer, torch.ones(batch.read.ids.shape), seed) / unit
            parts.setdefault(("random", "fell"), []).append(drawn)
            parts.setdefault(("random", "moved"), []).append(drawn.abs())
    out: dict[str, dict[str, float]] = {}
    for (name, measure), changes in parts.items():
        out.setdefault(name, {})[measure] = torch.cat(changes).mean().item()
    return out


def _entropy(w: Tensor) -> float:
    p = w.abs().double() / w.abs().double().sum().clamp(min=1e-30)
    return -(p * p.clamp(min=1e-30).log()).sum().item() / math.log(len(w))


def agreement(scorer: Scorer, sentences: Sequence[Sentence], lexicon: Lexicon) -> dict[str, Any]:
    """Everything about every source of one reward model."""
    begun = time.process_time()
    batches, seconds = weigh_all(scorer, sentences, lexicon)
    deleted = deletions(scorer, batches)
    units = [row[row >= 0] for batch in batches for row in batch.read.units]
    by_token = {name: list(_by_token(batches, name)) for name in batches[0].weights}
    exact, rarities = by_token["leave-one-out"], by_token["rarity"]
    sources = {}
    for name, weights in by_token.items():
        sources[name] = with_people(sentences, weights, units, rarities, name in SIGNED) | deleted[name]
        sources[name]["with_leave_one_out"] = _mean(
            [_correlation(w.abs(), e.abs()) for w, e in zip(weights, exact, strict=True)]
        )
        sources[name]["entropy"] = _mean([_entropy(w) for w in weights])
        if name in seconds:
            sources[name]["cpu_seconds"] = round(seconds[name], 2)
    even = with_people(sentences, [torch.ones(len(unit)) for unit in units], units, rarities, signed=False)
    sources["random"] = {n: even[n] for n in ("roc", "roc_matched", "precision")} | deleted["random"]
    scores = torch.cat([b.scores for b in batches])
    return {
        "sentences": len(sentences),
        "pairs": pair_accuracy(scores, torch.tensor([s.label > NEUTRAL for s in sentences])),
        "cpu_seconds": round(time.process_time() - begun, 1),
        "sources": sources,
    }


def _by_token(batches: Sequence[Weighed], name: str) -> Iterator[Tensor]:
    for batch in batches:
        for weights, units in zip(batch.weights[name], batch.read.units, strict=True):
            yield weights[units >= 0].float()
