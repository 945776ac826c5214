import random

import pytest

from attnshape.demo.corpus import (
    BOS,
    CONTRASTS,
    EOS,
    NEGATORS,
    PAD,
    STOP,
    UNK,
    VALUES,
    build_tokenizer,
    leave_one_out,
    true_reward,
    vocabulary,
    word_effects,
    write_review,
)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("", 0.0),
        ("the plot was", 0.0),
        ("the plot was great .", 1.0),
        ("the plot was awful .", -1.5),
        ("the plot was great . the cast was dull .", 0.0),
        # a negator turns the next valued word within three words around, once
        ("the plot was not bad .", 1.0),
        ("the plot was hardly great .", -1.0),
        ("the plot was not really very bad .", 1.0),
        ("the plot was not the very worst bad .", -1.0),
        ("not bad bad .", 0.0),
        ("not . bad .", -1.0),
        ("not but bad .", -1.5),
        # a contrast halves what precedes it in its sentence and raises what follows by half
        ("the plot was great but the cast was slow .", 0.5 * 1.0 - 1.5 * 0.5),
        ("the plot was slow yet the cast was great .", -0.5 * 0.5 + 1.5 * 1.0),
        ("great . slow but nice . great", 1.0 - 0.5 * 0.5 + 1.5 * 0.5 + 1.0),
        ("great but not bad .", 0.5 + 1.5),
        ("great but fresh yet dull", 0.25 * 1.0 + 0.5 * 1.5 * 1.0 - 1.5),
    ],
)
def test_true_reward_by_hand(text: str, reward: float) -> None:
    assert true_reward(text.split()) == pytest.approx(reward)


def test_reward_is_no_sum_of_word_values() -> None:
    rng = random.Random(0)
    reviews = [write_review(rng, 50) for _ in range(200)]
    plain = [sum(VALUES.get(word, 0.0) for word in words) for words in reviews]
    different = sum(true_reward(words) != total for words, total in zip(reviews, plain, strict=True))
    assert different > 100


def test_leave_one_out_gives_negators_and_contrasts_their_due() -> None:
    words = "the plot was not bad .".split()
    assert leave_one_out(words) == pytest.approx([0, 0, 0, 2.0, 1.0, 0])
    words = "great but slow .".split()
    # without "but" both count plainly: 1 - 0.5; with it: 0.5 - 0.75
    assert leave_one_out(words) == pytest.approx([0.5, -0.75, -0.75, 0])


def test_leave_one_out_is_what_deletion_costs() -> None:
    rng = random.Random(4)
    for _ in range(20):
        words = write_review(rng, 40)[: rng.randint(1, 40)]
        rng.shuffle(words)
        deleted = [true_reward(words[:i] + words[i + 1 :]) for i in range(len(words))]
        assert leave_one_out(words) == pytest.approx([true_reward(words) - reward for reward in deleted])


def test_effects_stand_on_valued_words_only() -> None:
    words = write_review(random.Random(3), 60)
    assert all(
        (effect != 0) == (word in VALUES) for word, effect in zip(words, word_effects(words), strict=True)
    )


def test_reviews_are_whole_sentences_with_one_sentiment() -> None:
    rng = random.Random(1)
    reviews = [write_review(rng, 50) for _ in range(300)]
    assert all(50 <= len(words) < 50 + 20 and words[-1] == STOP for words in reviews)
    words = [word for review in reviews for word in review]
    assert 0.03 < sum(word in VALUES for word in words) / len(words) < 0.1
    assert set(words) >= NEGATORS | CONTRASTS
    # the sentiment is shared: a review's first and last valued words agree more often than chance
    signs = [[effect > 0 for effect in word_effects(review) if effect] for review in reviews]
    agree = [row[0] == row[-1] for row in signs if len(row) >= 3]
    assert sum(agree) / len(agree) > 0.55


def test_sizes_promised() -> None:
    assert len(VALUES) == 40
    assert sum(value > 0 for value in VALUES.values()) == 20
    assert 180 <= len(vocabulary()) <= 220
    assert len(set(vocabulary())) == len(vocabulary())


def test_one_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    index = {word: i for i, word in enumerate(vocabulary())}
    words = write_review(random.Random(2), 40)
    encoded = tokenizer(" ".join(words), return_offsets_mapping=True)
    assert encoded["input_ids"] == [index[BOS], *(index[word] for word in words)]
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == " ".join(words)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)
    assert tokenizer("zebra")["input_ids"] == [index[BOS], index[UNK]]
    assert tokenizer(["a", "a plot"], padding=True)["attention_mask"] == [[1, 1, 0], [1, 1, 1]]
