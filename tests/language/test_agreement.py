import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.language import sources
from benchmarks.language.agreement import (
    Lexicon,
    Read,
    Weighed,
    agreement,
    deletions,
    matched_roc,
    measured_on,
    with_people,
)
from benchmarks.language.data import Review, Sentence, Texts
from benchmarks.language.rewards import Scorer, pair_accuracy
from benchmarks.language.sources import integrated_gradients, leave_one_out, sources_of


@pytest.fixture
def scorer(saved: tuple[Path, Path]) -> Scorer:
    return Scorer.load(saved[1])


class Bag(nn.Module):
    """A score that is the sum of its tokens' values: every exact source must give those."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(values[:, None].repeat(1, 2), freeze=False)
        self.config = SimpleNamespace(num_hidden_layers=1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=(self.embed(input_ids).mean(-1) * attention_mask).sum(1, keepdim=True))


def test_exact_sources_give_what_a_bag_of_words_holds() -> None:
    values = torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0])
    ids = torch.tensor([[4, 1, 2, 3], [1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    inside = torch.tensor([[False, True, True, True], [True, True, False, False]])
    want = values[ids] * inside
    bag = Bag(values)
    for (score, weights), base in (
        (leave_one_out(bag, ids, mask, inside, 0), 0.0),
        (integrated_gradients(bag, ids, mask, inside), values.mean()),
    ):
        torch.testing.assert_close(score.detach(), torch.tensor([4.5, 1.0]))
        torch.testing.assert_close(weights, want - base * inside)
    pairs = torch.tensor([[-1, 0, 0, 1], [0, 0, -1, -1]])
    _, shared = leave_one_out(bag, ids, mask, inside, 0, pairs)
    torch.testing.assert_close(shared, torch.tensor([[0.0, 0.5, 0.5, 0.5], [0.0] * 4]))


def test_integrated_gradients_add_up_to_the_score(
    scorer: Scorer, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "STEPS", 64)
    read = Read.by(scorer, texts.test[:2])
    inside = read.units >= 0
    score, weights = integrated_gradients(scorer.model, read.ids, read.mask, inside)
    with torch.no_grad():
        embed = scorer.model.get_input_embeddings()
        states = torch.where(inside[..., None], embed.weight.mean(0), embed(read.ids))
        out = scorer.model.model(inputs_embeds=states, attention_mask=read.mask).last_hidden_state
        base = scorer.model.score(out[torch.arange(2), read.mask.sum(1) - 1])[:, 0]
    assert (score - base).abs().min() > 0.3
    torch.testing.assert_close(weights.sum(1), score - base, atol=0.05, rtol=0.05)


def test_every_source_gives_the_models_score_and_nothing_outside(scorer: Scorer, texts: Texts) -> None:
    read = Read.by(scorer, texts.test[:3])
    inside = read.units >= 0
    want = scorer.score_all([s.text for s in texts.test[:3]])
    for name, weigh in sources_of(scorer.model).items():
        score, weights = weigh(scorer.model, read.ids, read.mask, inside)
        torch.testing.assert_close(score, want, msg=name)
        assert weights.shape == read.ids.shape, name
        assert (weights[~inside] == 0).all(), name
        assert weights.isfinite().all(), name
        assert (weights != 0).any(), name
    _, added = sources_of(scorer.model)["incremental"](scorer.model, read.ids, read.mask, inside)
    first = scorer.model(input_ids=read.ids[:, :1], attention_mask=read.mask[:, :1]).logits[:, 0]
    torch.testing.assert_close(added.sum(1), (want - first).detach())


def test_every_token_belongs_to_a_word_and_takes_its_weight(scorer: Scorer, texts: Texts) -> None:
    sentences = texts.test[:3]
    read = Read.by(scorer, sentences)
    assert (read.units[:, 0] == -1).all()
    for row, s in zip(read.units, sentences, strict=True):
        assert set(row[row >= 0].tolist()) == set(range(len(s.spans)))
    words = [[float(i + 1) for i in range(len(s.spans))] for s in sentences]
    assert torch.equal(read.by_token(words), (read.units + 1).float())


def test_people_agree_with_themselves_and_not_with_their_opposite(texts: Texts) -> None:
    sentences = measured_on(texts.test)
    # A word's last token but one is there twice: it may not count for more than its words say.
    units = [torch.tensor([*range(len(s.spans)), len(s.spans) - 2]) for s in sentences]
    people = [
        torch.tensor([float(x - 2) for x in s.word_labels])[u] for s, u in zip(sentences, units, strict=True)
    ]
    rarities = [u % 2 * 5.0 for u in units]
    found = with_people(sentences, people, units, rarities, signed=True)
    assert found["roc"] == found["precision"] == 1.0
    assert found["signed"] == pytest.approx(1.0)
    # "n't" and the word behind it: labelled the word's way, and called the other.
    assert found["negated"] == found["phrases"] > 0
    assert found["negated_sign"] == 0.0
    turned = with_people(sentences, [-p for p in people], units, rarities, signed=True)
    assert turned["signed"] == pytest.approx(-1.0)
    assert turned["negated_sign"] == 1.0
    blind = with_people(sentences, [torch.ones(len(p)) for p in people], units, rarities, signed=False)
    assert blind["roc"] == blind["roc_matched"] == 0.5
    assert blind["precision"] == pytest.approx(2 / 11)


def test_a_lexicon_knows_sides_from_reviews_alone() -> None:
    reviews = [Review("a good film", True), Review("a bad film", False)] * 10
    lexicon = Lexicon(reviews)
    assert lexicon.weight("good") > 0.5
    assert lexicon.weight("bad") == pytest.approx(-lexicon.weight("good"))
    assert lexicon.weight("film") == lexicon.weight("unheard") == 0.0
    assert lexicon.rarity("film") == 0.0
    assert lexicon.rarity("good") == pytest.approx(math.log(21 / 11))
    assert lexicon.rarity("good-unheard") == lexicon.rarity("good")
    assert lexicon.rarity("unheard") == pytest.approx(math.log(21))
    assert lexicon.rarity("--") == 0.0  # no word, and no rare one


def test_rarity_alone_finds_nothing_among_words_as_rare() -> None:
    rarity = torch.tensor([0.1, 0.0, 3.0, 3.2, 3.1, 6.0])
    polar = torch.tensor([False, False, True, False, True, False])
    assert pair_accuracy(rarity, polar) == pytest.approx(4 / 8)
    assert matched_roc(rarity, polar, rarity) == 0.0
    weights = torch.tensor([9.0, 9.0, 2.0, 1.0, 1.0, 9.0])
    assert matched_roc(weights, polar, rarity) == pytest.approx(1.5 / 2)
    assert math.isnan(matched_roc(weights[1:3], polar[1:3], rarity[1:3]))


def test_the_score_falls_most_without_the_words_that_hold_it() -> None:
    values = torch.cat([torch.zeros(5), torch.linspace(-2, 2, 10)])
    ids = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(i)) + 5 for i in range(6)])
    ids[3:] = torch.where(ids[3:] > 9, ids[3:] - 5, ids[3:])
    bag = Bag(values)
    scorer: Any = SimpleNamespace(model=bag, tokenizer=SimpleNamespace(pad_token_id=0))
    read = Read(ids, torch.ones_like(ids), torch.arange(10).expand(6, -1))
    batch = Weighed(
        read,
        values[ids].sum(1),
        {"leave-one-out": values[ids], "last row": -values[ids].abs().neg().neg()},
    )
    found = deletions(scorer, [batch])
    assert found["leave-one-out"]["moved"] > found["random"]["moved"]
    assert found["leave-one-out"]["fell_signed"] > found["random"]["fell"] + 0.2


def test_everything_of_a_model(scorer: Scorer, texts: Texts) -> None:
    found = agreement(scorer, measured_on(texts.test, 4), Lexicon(texts.reviews["a"]))
    by_source = found["sources"]
    assert found["sentences"] == 4
    assert by_source["lexicon"]["roc"] > 0.9
    assert by_source["leave-one-out"]["with_leave_one_out"] == pytest.approx(1.0)
    assert {"roc", "roc_matched", "precision", "moved", "fell", "entropy"} <= set(by_source["last row"])
    assert "signed" not in by_source["last row"]
    assert "signed" in by_source["gradient x value"]


def test_neutral_and_one_sided_sentences_are_left_out(texts: Texts) -> None:
    one = texts.test[0]
    neutral = Sentence(one.text, 2, one.spans, one.word_labels, one.phrases)
    plain = Sentence(one.text, 3, one.spans, (2,) * len(one.spans), one.phrases)
    assert measured_on([neutral, plain]) == []
