"""Which source to trust: on reward models in which one word decides, and one layer looks elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from support.one_word import VERDICTS, WORDS, completion, save_one_word
from support.reward_models import save
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner, Result

from attnshape import CreditModel
from attnshape.cli import app
from attnshape.text.audit import SOURCES, Audit, Estimate, audit, disputed_items
from attnshape.text.source import CreditSource

N = 12
OneWord: TypeAlias = tuple[int, CreditModel]
"""The layer that reads the word, and its model."""


def texts() -> list[str]:
    rng = random.Random(0)
    return [completion(rng) for _ in range(N)]


@pytest.fixture(scope="module", params=[0, 1], ids=["first layer", "last layer"])
def one_word(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, CreditModel]:
    folder = save_one_word(tmp_path_factory.mktemp("model"), request.param)
    return request.param, CreditModel(str(folder))


@pytest.fixture(scope="module")
def found(one_word: OneWord) -> Audit:
    _, model = one_word
    steps: list[int] = []
    whole = audit(model, [model.reader().read("", text) for text in texts()], on_step=lambda: steps.append(1))
    assert len(steps) == len(SOURCES) + 3
    return whole


def test_the_layer_that_decides_is_found(one_word: OneWord, found: Audit) -> None:
    """All that name the word first reach leave-one-out; what looks elsewhere is no better than chance."""
    reads_at, model = one_word
    examples = [model.reader().read("", text) for text in texts()]
    assert not found.refused
    rows = {row.source: row for row in found.sources}
    right = {"attention, all layers", "rollout", "signed_rollout"}
    # The first layer's values hold nothing of the word where the last one reads it.
    reads, elsewhere = ("gradient_value", "attention") if reads_at == 0 else ("attention", "gradient_value")
    for name in (*right, reads):
        assert rows[name].of_ceiling == pytest.approx((1, 0), abs=1e-3), name
        assert rows[name].beyond_random == 1
    assert rows[elsewhere].of_ceiling.value < 0.2
    # The word holds all of the score: without it the score is 0, and deleted at random it goes now and then.
    score = torch.tensor([model.score([x])[0].score for x in examples])
    verdict = torch.where(score > score.mean(), 1.0, -1.0)
    assert found.mean == pytest.approx(score.mean().item(), rel=1e-4)
    whole = (verdict * score).mean().item()
    assert found.ceiling.curve == pytest.approx([whole] * len(found.fractions), rel=1e-3)
    assert found.ceiling.of_ceiling == pytest.approx((1, 0), abs=1e-6)
    counts = [max(1, round(f * 12)) for f in found.fractions]
    assert list(found.random) == sorted(found.random)
    for move, k in zip(found.random, counts, strict=True):
        assert move == pytest.approx(whole * k / 12, abs=0.25 * whole)
    assert rows["attention"].response_attention == pytest.approx(1, abs=1e-5)  # there is nothing else
    assert rows["rollout"].response_attention is None
    assert rows["rollout"].overlap["leave_one_out"] == 1
    assert rows["attention"].overlap["leave_one_out"] == (1 if reads_at == 1 else 0)
    assert all(0 < row.entropy < 1 and row.cost > 0 for row in rows.values())


def test_the_cheapest_of_the_good_is_advised(one_word: OneWord) -> None:
    reads_at, model = one_word
    examples = [model.reader().read("", text) for text in texts()]
    sources = [source for source in SOURCES if source.name in ("attention", "rollout")]
    found = audit(model, examples, sources=sources)
    rows = {row.source: row for row in found.sources}
    good = {"rollout", "attention, all layers"} | ({"attention"} if reads_at == 1 else set())
    chosen = min(good, key=lambda name: rows[name].cost)
    assert found.advice.startswith(
        f"Take {chosen}: deleting the tokens it names moves the score 1.00 ± 0.00 "
    )
    assert f"for {rows[chosen].cost:.1f} forwards against {found.ceiling.cost:.0f}" in found.advice
    if chosen != "attention":
        assert f"; attention: {rows['attention'].of_ceiling} at" in found.advice
    assert found.advice.endswith(f"({N} completions).")
    signed = audit(model, examples, sources=[CreditSource("signed_rollout")])
    assert signed.advice.startswith("Take signed_rollout, as token rewards: ")
    wrong = next(source for source in SOURCES if str(source) == ("attention", "gradient_value")[reads_at])
    bad = audit(model, examples, sources=[wrong])
    assert bad.advice.startswith("Trust no source with this model but leave_one_out, which costs ")
    assert f"the best, {wrong}, reaches {bad.sources[0].of_ceiling} of it" in bad.advice


def test_a_long_span_and_a_source_of_its_own(one_word: OneWord) -> None:
    _, model = one_word
    examples = [model.reader().read("", text) for text in texts()]
    one = [CreditSource("rollout")]
    found = audit(model, examples, sources=one, span=4, fractions=(0.34,))
    assert found.ceiling.source == "leave_one_out, 4 tokens"
    assert [row.source for row in found.sources] == ["rollout"]
    assert found.ceiling.curve == pytest.approx(found.sources[0].curve, rel=1e-3)


def test_disputed_completions_are_shown_by_every_source(one_word: OneWord, found: Audit) -> None:
    _, model = one_word
    examples = [model.reader().read("", text) for text in texts()]
    assert len(set(found.disputed)) == 5
    items = disputed_items(model, examples, found)
    assert len(items) == 5
    for item, i in zip(items, found.disputed, strict=True):
        assert "".join(item.tokens) == examples[i].response
        assert [view.source for view in item.views] == ["leave_one_out", *map(str, SOURCES)]
        (word,) = [j for j, token in enumerate(item.tokens) if token.strip() in VERDICTS]
        lone, rollout = item.views[0], item.views[4]
        for view in (lone, rollout):
            assert sum(view.rewards) == pytest.approx(item.score, rel=1e-3)
            assert max(range(12), key=lambda j: abs(view.rewards[j])) == word


def test_what_has_no_score_or_no_choice_is_left_out(one_word: OneWord) -> None:
    _, model = one_word
    reader = model.reader()
    examples = [reader.read("the film was ", "superb"), *[reader.read("", text) for text in texts()]]
    left_out: list[tuple[int, str]] = []
    found = audit(model, examples, sources=SOURCES[:1], on_skip=lambda i, why: left_out.append((i, why)))
    assert left_out == [(0, "a response of one token has nothing to choose from")]
    assert found.completions == N
    assert 0 not in found.disputed
    with pytest.raises(ValueError, match="want at least two completions that can be scored, got 1"):
        audit(model, examples[:2])


def test_a_score_that_is_not_finite_costs_no_other(tmp_path: Path) -> None:
    model = CreditModel(str(save_one_word(tmp_path, 0)))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[WORDS.index("scene")] = torch.nan
    examples = [model.reader().read("", text) for text in texts()]
    without = [i for i, text in enumerate(texts()) if "scene" in text]
    assert 0 < len(without) < N - 2
    left_out: dict[int, str] = {}
    found = audit(model, examples, sources=SOURCES[:1], on_skip=left_out.__setitem__)
    assert left_out == dict.fromkeys(without, "the model's score is not finite")
    assert found.completions == N - len(without)
    assert not set(found.disputed) & set(without)


def test_a_model_that_says_nothing_is_not_decided(one_word: OneWord) -> None:
    """All scores are one number: no deletion moves any."""
    _, model = one_word
    plain = [model.reader().read("", "the film was long and old " * 2) for _ in range(4)]
    found = audit(model, plain, sources=SOURCES[:2])
    assert found.advice.startswith(
        "These 4 completions do not tell: what leave-one-out deletes moves the score by"
    )


def test_estimates() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert Estimate.of(x) == pytest.approx((2.5, 2 * (5 / 3 / 4) ** 0.5))
    assert Estimate.share(x, 2 * x) == pytest.approx((0.5, 0))
    assert Estimate.of(x).is_positive
    assert not Estimate(1.0, 1.5).is_positive


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": "", "response": row}) + "\n" for row in rows))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments), "--device", "cpu"], env={"COLUMNS": "80"})


def test_the_command(tmp_path: Path) -> None:
    folder = save_one_word(tmp_path / "model", 0)
    source, figures, page = (
        write(tmp_path / "in.jsonl", texts()),
        tmp_path / "out.json",
        tmp_path / "page.html",
    )
    result = invoke(folder, source, "--json", figures, "--html", page, "--limit", 8)
    assert result.exit_code == 0, result.output
    saved = json.loads(figures.read_text(), parse_constant=pytest.fail)
    assert saved["completions"] == 8
    shown = result.stdout
    assert saved["advice"] in shown
    for row in [saved["ceiling"], *saved["sources"]]:
        assert f"{row['of_ceiling'][0]:.2f} ± {row['of_ceiling'][1]:.2f}" in shown
        assert row["source"] in shown
    text = page.read_text(encoding="utf-8")
    assert text.count("<section") == 5
    assert all(f'<section id="c{i + 1}"' in text for i in saved["disputed"])
    assert text.count("<figure>") == 5 * (1 + len(saved["sources"]))
    some = invoke(folder, source, "--source", "rollout", "--source", "attention")
    assert "gradient" not in some.stdout


def test_what_was_measured_outlives_a_full_disk_and_a_closed_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("gone")

    folder, figures = save_one_word(tmp_path / "model", 0), tmp_path / "out.json"
    source = write(tmp_path / "in.jsonl", texts()[:3])
    command = folder, source, "--source", "attention", "--json", figures
    for name in ("_print", "whole_file"):
        with monkeypatch.context() as broken:
            broken.setattr(f"attnshape.cli.audit.{name}", fails)
            result = invoke(*command)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "gone")
        assert ("3 completions" in result.stdout) == (name == "whole_file")
        assert (
            json.loads(figures.read_text())["completions"] == 3
        )  # of the first run, where it cannot be written


def test_what_the_command_refuses(tmp_path: Path) -> None:
    folder = save_one_word(tmp_path / "model", 0)
    source = write(tmp_path / "in.jsonl", texts()[:3])
    for arguments, message in (
        ((folder, tmp_path / "none.jsonl"), "there is no such file"),
        ((folder, source, "--html", tmp_path), "is a folder, want a file"),
        ((folder, source, "--json", tmp_path / "no" / "x"), "there is no folder"),
        ((folder, write(tmp_path / "one.jsonl", texts()[:1])), "want at least two completions"),
        ((save(tmp_path / "two", "two_labels"), source), "has 2 labels"),
        ((folder, source, "--source", "magic"), "--source: got 'magic', want one of attention, columns"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output
    with source.open("a") as lines:
        lines.write("{\n" + json.dumps({"prompt": "the ", "response": "film"}) + "\n")
    result = invoke(folder, source, "--source", "attention")
    assert result.exit_code == 1
    assert f"{source}:4: skipped: Expecting property name" in result.stderr
    assert f"{source}:5: skipped: a response of one token" in result.stderr
    assert "3 completions" in result.stdout


def test_a_source_that_cannot_be_had_is_a_line_that_says_why(tmp_path: Path) -> None:
    folder = save_one_word(tmp_path / "model", 0)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    figures = tmp_path / "out.json"
    result = invoke(folder, write(tmp_path / "in.jsonl", texts()), "--json", figures)
    assert result.exit_code == 0, result.output
    saved = json.loads(figures.read_text())
    refused = {row["source"]: row["reason"] for row in saved["refused"]}
    assert {"rollout", "signed_rollout"} <= set(refused)
    assert all(len(reason) > 20 for reason in refused.values())
    assert f"without rollout, signed_rollout: {refused['rollout']}" in result.stdout
    assert {"attention", "gradient_embedding"} <= {row["source"] for row in saved["sources"]}
