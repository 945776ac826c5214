"""The texts: film reviews with their authors' verdict, and sentences whose words and phrases people labelled.

Both are read from files that a user names; nothing of them is kept here. Splits follow a record's place in
its file: a tenth of the reviews is held out, the others and the treebank's training sentences fall into two
halves that share nothing. Reward models learn from half ``a``, the gold judge from half ``b``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

Half: TypeAlias = Literal["a", "b"]

NEUTRAL = 2
"""The treebank's label of what is neither negative (0, 1) nor positive (3, 4)."""
_WRITTEN = {
    "``": '"',
    "''": '"',
    "-LRB-": "(",
    "-RRB-": ")",
    "-lrb-": "(",
    "-rrb-": ")",
    "\\*": "*",
    "\\/": "/",
}
_NO_SPACE_BEFORE = (".", ",", "!", "?", ";", ":", ")", "'s", "'re", "'ve", "'ll", "'d", "'m", "n't", "'", "%")


@dataclass(frozen=True)
class Review:
    """A film review in lower case; ``positive`` is its author's verdict."""

    text: str
    positive: bool


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence: its text in lower case, and what people said of its words and phrases.

    ``spans`` are the words' places in ``text``; labels go from 0 to 4; ``phrases`` are
    ``(first word, last word + 1, label)``.
    """

    text: str
    label: int
    spans: tuple[tuple[int, int], ...]
    word_labels: tuple[int, ...]
    phrases: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Texts:
    """Everything that is learned from or measured on."""

    reviews: dict[Half, list[Review]]
    held_out: list[Review]
    sentences: dict[Half, list[Sentence]] = field(default_factory=dict)
    dev: list[Sentence] = field(default_factory=list)
    test: list[Sentence] = field(default_factory=list)


def read_texts(reviews: Path, treebank: Path) -> Texts:
    """Reads both files, ``.jsonl`` or ``.jsonl.gz``.

    Raises:
        ValueError: a line that is no record of its kind, with its number; a split without records.
    """
    halves: dict[Half, list[Review]] = {"a": [], "b": []}
    held_out = []
    for number, row in enumerate(_records(reviews, ("label", "text"))):
        review = Review(" ".join(str(row["text"]).lower().split()), bool(row["label"]))
        if number % 10 == 9:
            held_out.append(review)
        else:
            halves["a" if number % 2 else "b"].append(review)
    sentences: dict[Half, list[Sentence]] = {"a": [], "b": []}
    others: dict[str, list[Sentence]] = {"dev": [], "test": []}
    for number, row in enumerate(_records(treebank, ("split", "label", "words", "word_labels", "phrases"))):
        if row["split"] == "train":
            sentences["a" if number % 2 else "b"].append(_sentence(row))
        elif row["split"] in others:
            others[row["split"]].append(_sentence(row))
        else:
            raise ValueError(
                f"{treebank}, line {number + 1}: got split {row['split']!r}, want train, dev, test"
            )
    for name, found in (*halves.items(), ("held out", held_out), *sentences.items(), *others.items()):
        if not found:
            raise ValueError(f"{reviews}, {treebank}: too few records, {name!r} has none")
    return Texts(halves, held_out, sentences, others["dev"], others["test"])


def _records(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                for name in fields:
                    row[name]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: got {line[:60]!r} ({error!r}), "
                    f"want an object with {', '.join(fields)}"
                ) from error
            yield row


def _sentence(row: dict[str, Any]) -> Sentence:
    text, spans = as_text(row["words"])
    return Sentence(
        text=text,
        label=int(row["label"]),
        spans=spans,
        word_labels=tuple(int(label) for label in row["word_labels"]),
        phrases=tuple((int(start), int(end), int(label)) for start, end, label in row["phrases"]),
    )


def as_text(words: list[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The treebank's words as people write them, in lower case, and each word's place.

    >>> as_text(["It", "'s", "good", ",", "-LRB-", "is", "n't", "it", "?"])[0]
    "it's good, (isn't it?"
    """
    text, spans, opened = "", [], False
    for word in words:
        written = _WRITTEN.get(word, word).lower()
        glued = opened or written in _NO_SPACE_BEFORE or word == "''"
        text += "" if glued or not text else " "
        spans.append((len(text), len(text) + len(written)))
        text += written
        opened = written == "(" or word == "``"
    return text, tuple(spans)
