import random

import pytest

from attnshape.demo.corpus import write_review
from benchmarks.paper.contextual import contextual_leave_one_out, contextual_reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("the plot was great .", 1.0),
        ("the plot was great . the cast was good .", 1.5),  # agreement: both count
        ("the plot was great . the cast was bad .", 1.0 + 0.5),  # a contradiction counts half and turned
        ("the plot was bad . we left . the cast was great .", -1.0 - 0.5),  # no value, no opinion
        ("the plot was not bad . the cast was great .", 2.0),  # negation within the sentence
        ("great . bad . bad .", 1.0 + 0.5 - 1.0),  # the third agrees with the second
        ("", 0.0),
    ],
)
def test_by_hand(text: str, reward: float) -> None:
    assert contextual_reward(text.split()) == pytest.approx(reward)


def test_effects_against_brute_force() -> None:
    rng = random.Random(0)
    turned = 0
    for length in [1, 2, 7, *range(10, 60)]:
        words = write_review(rng, length)[: length + rng.randint(0, 3)]
        whole = contextual_reward(words)
        expected = [whole - contextual_reward(words[:i] + words[i + 1 :]) for i in range(len(words))]
        assert contextual_leave_one_out(words) == pytest.approx(expected)
        turned += any(e != 0 for e, word in zip(expected, words, strict=True) if word == ".")
    assert turned > 3  # a stop's deletion joins sentences, and must have mattered somewhere
