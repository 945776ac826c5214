"""Short film reviews from a grammar whose words carry known values: the demo's ground truth.

A word's value depends on its sentence: a negator turns the next valued word around at half its strength
("not bad" is faint praise), and a contrast word halves what stands before it and raises what stands after
it by half ("great but slow" is a complaint). The true reward is therefore no plain sum over words.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"

_PRAISE = {
    1.5: "brilliant stunning wonderful superb".split(),
    1.0: "great lovely clever moving charming gripping funny fresh".split(),
    0.5: "good nice warm solid neat lively tidy pleasant".split(),
}
_BLAME = {
    1.5: "awful dreadful terrible horrible".split(),
    1.0: "bad dull clumsy boring annoying painful stale ugly".split(),
    0.5: "slow weak flat thin cold tired messy bland".split(),
}
VALUES: dict[str, float] = {
    word: sign * value
    for sign, table in ((1.0, _PRAISE), (-1.0, _BLAME))
    for value, words in table.items()
    for word in words
}
NEGATORS = frozenset({"not", "hardly"})
CONTRASTS = frozenset({"but", "yet"})
STOP = "."

NEGATION_REACH = 3
NEGATION_FACTOR = -1.0
BEFORE_CONTRAST, AFTER_CONTRAST = 0.5, 1.5

_SLOTS: dict[str, list[str]] = {
    "PART": "plot ending acting music script cast story dialogue pacing camera lighting humour opening "
    "direction soundtrack finale costume drama".split(),
    "PERSON": "critics neighbours students teachers parents everyone nobody friends viewers sailors".split(),
    "MAKER": "director writer producer actor actress composer editor narrator singer villain hero".split(),
    "PLACE": "cinema theatre festival library school village city airport museum hotel harbour park".split(),
    "DAY": "monday tuesday wednesday thursday friday saturday sunday".split(),
    "TIME": "morning evening night summer winter autumn spring".split(),
    "KIND": "comedy thriller western musical documentary romance mystery cartoon sequel remake".split(),
    "SAW": "watched saw rented borrowed streamed finished started discussed filmed".split(),
    "WAS": "was seemed felt looked sounded".split(),
    "DEGREE": "very quite rather really truly so".split(),
    "ABOUT": "family war train robbery wedding island detective garden river painting king ghost "
    "letter horse doctor farmer".split(),
    "NUMBER": "two three four five ten twenty".split(),
}
_NEUTRAL = [
    "PERSON SAW the KIND at the PLACE on DAY .",
    "the KIND is about a ABOUT and a ABOUT .",
    "it runs for NUMBER hours and has NUMBER songs .",
    "the MAKER also made a KIND about a ABOUT .",
    "PERSON went to the PLACE in the TIME with NUMBER friends .",
    "the MAKER plays a ABOUT from the PLACE .",
    "in the TIME PERSON talked about the PART and the PART .",
    "the PART was recorded in a PLACE near the ABOUT .",
]
_OPINION = [
    "the PART WAS TONE .",
    "PERSON said the PART WAS DEGREE TONE .",
    "the MAKER made the PART TONE for PERSON .",
]
_CONTRAST = [
    "the PART WAS COUNTER CONTRAST the PART WAS TONE .",
    "PERSON found the MAKER COUNTER CONTRAST the PART DEGREE TONE .",
]
_OPINION_SHARE, _CONTRAST_SHARE, _NEGATION_SHARE = 0.45, 0.3, 0.3
_SENTIMENTS = (0.15, 0.85)


def word_effects(words: Sequence[str]) -> list[float]:
    """What each word adds to the true reward where it stands; the true reward is the sum."""
    effects = [0.0] * len(words)
    sentence, negated_until, contrasted = 0, -1, False
    for i, word in enumerate(words):
        if word in NEGATORS:
            negated_until = i + NEGATION_REACH
        elif word in CONTRASTS:
            effects[sentence:i] = [BEFORE_CONTRAST * e for e in effects[sentence:i]]
            negated_until, contrasted = -1, True
        elif word == STOP:
            sentence, negated_until, contrasted = i + 1, -1, False
        elif word in VALUES:
            effect = VALUES[word]
            if i <= negated_until:
                effect, negated_until = NEGATION_FACTOR * effect, -1
            if contrasted:
                effect *= AFTER_CONTRAST
            effects[i] = effect
    return effects


def true_reward(words: Sequence[str]) -> float:
    """The review's value to its reader: the sum of its words' effects."""
    return sum(word_effects(words))


def leave_one_out(words: Sequence[str]) -> list[float]:
    """How much the true reward falls when each word is deleted: the truth that credit is compared with."""
    effects: list[float] = []
    for sentence, following in itertools.pairwise([*_sentences(words), []]):
        joined = tuple(following) if sentence and sentence[-1] == STOP else ()
        effects += _deletions(tuple(sentence), joined)
    return effects


@functools.lru_cache(maxsize=1 << 16)  # a policy that learns writes the same sentences again and again
def _deletions(sentence: tuple[str, ...], following: tuple[str, ...]) -> tuple[float, ...]:
    """Effect of deleting each word; without its stop a sentence runs on into the following one."""
    reward = true_reward(sentence)
    effects: list[float] = []
    for i, word in enumerate(sentence):
        rest = (*sentence[:i], *sentence[i + 1 :])
        if word == STOP:
            effects.append(reward + true_reward(following) - true_reward((*rest, *following)))
        else:
            effects.append(reward - true_reward(rest))
    return tuple(effects)


def _sentences(words: Sequence[str]) -> list[list[str]]:
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word == STOP:
            sentences.append([])
    return sentences


def write_review(rng: random.Random, length: int) -> list[str]:
    """Whole sentences of one latent sentiment, drawn per review, until there are ``length`` words."""
    positive = rng.choice(_SENTIMENTS)
    words: list[str] = []
    while len(words) < length:
        words += _write_sentence(rng, rng.random() < positive)
    return words


def _write_sentence(rng: random.Random, positive: bool) -> list[str]:
    if rng.random() >= _OPINION_SHARE:
        template = rng.choice(_NEUTRAL)
    else:
        template = rng.choice(_CONTRAST if rng.random() < _CONTRAST_SHARE else _OPINION)
    words: list[str] = []
    for slot in template.split():
        if slot in ("TONE", "COUNTER"):
            words += _write_tone(rng, positive == (slot == "TONE"))
        elif slot == "CONTRAST":
            words.append(rng.choice(sorted(CONTRASTS)))
        else:
            words.append(rng.choice(_SLOTS.get(slot, [slot])))
    return words


def _write_tone(rng: random.Random, positive: bool) -> list[str]:
    negated = rng.random() < _NEGATION_SHARE
    table = _PRAISE if positive != negated else _BLAME
    word = rng.choice(table[rng.choice(sorted(table))])
    return [rng.choice(sorted(NEGATORS)), word] if negated else [word]


def vocabulary() -> list[str]:
    """Special tokens, then every word that the grammar can write, in a fixed order."""
    templates = " ".join([*_NEUTRAL, *_OPINION, *_CONTRAST]).split()
    slots = {*_SLOTS, "TONE", "COUNTER", "CONTRAST"}
    words = {w for w in templates if w not in slots} | NEGATORS | CONTRASTS | VALUES.keys()
    words.update(w for choices in _SLOTS.values() for w in choices)
    return [PAD, BOS, EOS, UNK, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; texts get a leading ``<s>``, and batches are padded on the right."""
    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
