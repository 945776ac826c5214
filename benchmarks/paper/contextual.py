"""A reward that no word decides alone: a sentence counts by whether it agrees with the one before it.

A sentence's value is its true reward (negation and contrast included). One that contradicts the last valued
sentence before it counts half, and the other way round, so a word's effect changes its sign with what stands
sentences before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from attnshape.demo.corpus import STOP, true_reward

CONTRADICTION = -0.5


def contextual_reward(words: Sequence[str]) -> float:
    """Sum over sentences of their value, times ``CONTRADICTION`` where its sign changes."""
    return _combined([true_reward(sentence) for sentence in _sentences(words)])


def contextual_leave_one_out(words: Sequence[str]) -> list[float]:
    """How much the contextual reward falls when each word is deleted."""
    sentences = _sentences(words)
    values = [true_reward(sentence) for sentence in sentences]
    reward = _combined(values)
    effects = []
    for s, (sentence, following) in enumerate(itertools.pairwise([*sentences, []])):
        for i, word in enumerate(sentence):
            rest = [*sentence[:i], *sentence[i + 1 :]]
            if word == STOP:  # without it two sentences are one
                changed = [*values[:s], true_reward([*rest, *following]), *values[s + 2 :]]
            else:
                changed = [*values[:s], true_reward(rest), *values[s + 1 :]]
            effects.append(reward - _combined(changed))
    return effects


def _combined(values: Sequence[float]) -> float:
    total, previous = 0.0, 0.0
    for value in values:
        total += CONTRADICTION * value if value * previous < 0 else value
        previous = value or previous
    return total


def _sentences(words: Sequence[str]) -> list[list[str]]:
    sentences: list[list[str]] = []
    for word in words:
        if not sentences or sentences[-1][-1] == STOP:
            sentences.append([])
        sentences[-1].append(word)
    return sentences
