"""The table of models says what is so: of every class, and a sample of it tried again."""

from __future__ import annotations

import re

import pytest
import transformers

from attnshape.tap import AttentionTap
from attnshape.tap.relevance import FixedNorms
from tests.model_sweep import ROOT, SOURCES, TABLE, cells, sentence, sweep
from tests.support import zoo

TEXT = TABLE.read_text()
LINES = re.findall(r"^\| (\w+) \| (.*) \|$", TEXT, re.M)
ROWS = {name: row.split(" | ") for name, row in LINES if name != "class"}
REASONS = dict(re.findall(r"^(\d+)\. (.*)$", TEXT, re.M))
NOT_BUILT = re.findall(r"^- (\w+): ", TEXT, re.M)
SAMPLE = [
    "AlbertForSequenceClassification",
    "BartForSequenceClassification",
    "BertForSequenceClassification",
    "BloomForCausalLM",
    "DogeForCausalLM",
    "Gemma2ForCausalLM",
    "GPTNeoXForSequenceClassification",
    "GraniteMoeHybridForCausalLM",
    "LlamaForSequenceClassification",
    "ModernBertForSequenceClassification",
]

tried_with = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in TEXT, reason="the table is of another transformers"
)


def test_the_table_differs_nowhere():
    assert not any(reason.startswith("differs") for reason in REASONS.values())
    for name, row in ROWS.items():
        assert len(row) == len(SOURCES), name
        for cell in row:
            assert cell in ("equal", r"equal\*") or cell in REASONS, (name, cell)


def test_the_page_says_what_the_table_says():
    page = " ".join((ROOT / "docs" / "tap.md").read_text().split())
    assert sentence(TEXT) in page


@tried_with
def test_the_table_has_every_class():
    assert set(ROWS) | set(NOT_BUILT) == set(zoo.classes())


@tried_with
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_table(name):
    assert cells(sweep(name)) == [REASONS.get(cell, cell) for cell in ROWS[name]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["norms", "attention"])
def test_the_sweep_sees_what_relevance_does_not_hold_fixed(part, monkeypatch):
    if part == "norms":
        monkeypatch.setattr(FixedNorms, "open", lambda self: setattr(self, "seen", 1))
    else:
        own = AttentionTap.on_attention
        monkeypatch.setattr(AttentionTap, "on_attention", lambda *args: own(*args) and args[3:])
    assert sweep("LlamaForCausalLM", ["relevance"])["relevance"].startswith("differs: the gradient")
