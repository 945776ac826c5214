import json
from pathlib import Path

import pytest

from benchmarks.language.data import Texts, as_text, read_texts


def test_words_become_text_as_people_write_it() -> None:
    words = ["It", "'s", "``", "Good", "''", ",", "-LRB-", "is", "n't", "it", "?", "-RRB-"]
    text, spans = as_text(words)
    assert text == "it's \"good\", (isn't it?)"
    assert [text[a:b] for a, b in spans] == [
        "it",
        "'s",
        '"',
        "good",
        '"',
        ",",
        "(",
        "is",
        "n't",
        "it",
        "?",
        ")",
    ]


def test_the_splits_share_nothing_and_lose_nothing(files: tuple[Path, Path], texts: Texts) -> None:
    rows = [json.loads(line)["text"].lower() for line in files[0].read_text().splitlines()]
    parts = [[r.text for r in part] for part in (*texts.reviews.values(), texts.held_out)]
    assert sorted(x for part in parts for x in part) == sorted(rows)
    assert len(texts.held_out) == len(rows) // 10
    assert not set(parts[0]) & set(parts[1])
    assert not set(parts[0]) & set(parts[2])
    assert [len(x) for x in (*texts.sentences.values(), texts.dev, texts.test)] == [20, 20, 12, 16]


def test_a_sentence_keeps_its_labels(texts: Texts) -> None:
    for sentence in texts.test:
        for (a, b), label in zip(sentence.spans, sentence.word_labels, strict=True):
            word = sentence.text[a:b]
            assert (label > 2) == (word in ("good", "lovely", "great")), word


def test_a_line_that_is_no_record_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "reviews.jsonl"
    broken.write_text('{"label": 1, "text": "x"}\n{"label": 1}\n')
    with pytest.raises(ValueError, match=r"line 2.*label, text"):
        read_texts(broken, files[1])
    broken.write_text('{"label": 1, "text": "x"}\n')
    with pytest.raises(ValueError, match="too few records"):
        read_texts(broken, files[1])
