"""`attnshape credit` on reward models made here, and the command line around it."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import operator
import os
import re
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run
from support.reward_models import LIMIT, save, tokenizer
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from typer.testing import CliRunner, Result

import attnshape
from attnshape.cli import app
from attnshape.demo.config import DemoConfig
from attnshape.demo.ppo import PPOConfig
from attnshape.files import is_stream
from attnshape.text import file
from attnshape.text.load import RewardModelConfig, load_reward_model
from attnshape.text.model import CreditModel

RECORDS: list[dict[str, Any]] = [
    {"prompt": "How was the film? ", "response": "It was great, not bad at all!"},
    {"prompt": "", "response": "Yes 😀 and <b>no</b>\nbad", "id": "second"},
    {
        "messages": [
            {"role": "user", "content": "Was it bad? Say bad or great."},
            {"role": "assistant", "content": "  bad "},
        ],
        "id": 3,
    },
    {"prompt": "And the plot?", "response": " awful"},
]


@pytest.fixture(scope="module", params=["llama", "no_pad", "gpt2"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["credit", *map(str, arguments), "--device", "cpu"])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def eager(folder: Path, record: dict[str, Any], layer: int = -1) -> tuple[float, str, list[float], float]:
    """Score, response, credit per response token and attention on the response, from `output_attentions`."""
    tok = tokenizer()
    if "messages" in record:
        response = record["messages"][-1]["content"].strip()
        text = tok.apply_chat_template(record["messages"], tokenize=False)
        low = text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
    else:
        response = record["response"]
        text, low = record["prompt"] + response, len(record["prompt"])
    encoded = tok(text, add_special_tokens="messages" not in record, return_offsets_mapping=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([encoded["input_ids"]]), output_attentions=True)
    row = out.attentions[layer][0, :, -1].double().mean(0)
    inside = [low <= start < end <= low + len(response) for start, end in encoded["offset_mapping"]]
    raw = row[torch.tensor(inside)]
    return out.logits[0, 0].item(), response, (raw / raw.sum()).tolist(), raw.sum().item()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("layer", [-1, 0])
def test_credit_is_the_eager_models(
    any_model: Path, source: Path, tmp_path: Path, batch_size: int, layer: int
) -> None:
    out = tmp_path / "out.jsonl"
    result = invoke(any_model, source, "--out", out, "--batch-size", batch_size, "--layer", layer)
    assert result.exit_code == 0, result.output
    assert "4 completions written" in result.stderr
    rows = read(out)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("id") for row in rows] == [None, "second", 3, None]
    assert "id" not in rows[0]
    for row, record in zip(rows, RECORDS, strict=True):
        score, response, credit, share = eager(any_model, record, layer)
        assert row["score"] == pytest.approx(score, rel=1e-4, abs=1e-5)
        assert row["credit"] == pytest.approx(credit, rel=2e-4, abs=1e-6)
        assert sum(row["credit"]) == pytest.approx(1, abs=2e-6)
        assert len(credit) == 1 or max(credit) > 1.5 / len(credit)
        given = record["response"] if "response" in record else record["messages"][-1]["content"]
        assert row["tokens"] == [given[start:end] for start, end in row["offsets"]]
        characters = {c for start, end in row["offsets"] for c in range(start, end)}
        first = given.index(response)  # the template strips it
        assert characters == set(range(first, first + len(response)))
        probabilities = torch.tensor(credit, dtype=torch.float64)
        assert row["metrics"]["entropy"] == pytest.approx(
            torch.special.entr(probabilities).sum().item(), abs=1e-3
        )
        assert row["metrics"]["last_share"] == pytest.approx(credit[-1], abs=1e-4)
        assert row["metrics"]["response_attention"] == pytest.approx(share, abs=1e-4)
        assert row["metrics"]["fallback"] is False


def test_lines_that_cannot_be_read_are_named_and_skipped(llama: Path, tmp_path: Path) -> None:
    def user(*messages: tuple[str, object]) -> str:
        return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})

    bad = {
        b"{": "Expecting property name",
        b"\xff\xfe": "can't decode byte",
        b"[1]": "want a JSON object, got list",
        b'{"prompt": "a"}': "want prompt and response, or messages, got prompt",
        b'{"prompt": 1, "response": "a"}': '"prompt" must be a string, got int',
        b'{"prompt": "a", "response": "b", "messages": []}': "got messages and prompt and response",
        b'{"prompt": "a", "response": "b", "id": "\\ud800"}': '"id" cannot be written again',
        b'{"prompt": "a", "response": "b", "id": {"a": ["\\udfff"]}}': '"id" cannot be written again',
        b'{"prompt": "a", "response": "b", "id": NaN}': '"id" cannot be written again',
        b'{"prompt": "a", "response": "b", "id": [1e999]}': '"id" cannot be written again',
        b'{"prompt": "a", "response": "b", "id": ' + b"9" * 5000 + b"}": "digits",
        b'{"prompt": "a", "response": ""}': "the response has no token",
        b'{"prompt": "a", "response": "\\ud800"}': "surrogates not allowed",
        b'{"messages": []}': 'must end with one whose role is "assistant"',
        b'{"messages": "a"}': "must be a list of objects",
        user(("user", "a")).encode(): 'must end with one whose role is "assistant"',
        user(("user", "a"), ("assistant", None)).encode(): '"content" must be a string',
        user(("nobody", "a"), ("assistant", "b")).encode(): "who?",
        json.dumps(
            {"prompt": "", "response": "word " * LIMIT}
        ).encode(): f"more than the {LIMIT} that the model",
        b"[" * 100_000: "recursion",
    }
    good = json.dumps(RECORDS[0]).encode()
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + b"\n".join(bad) + b"\n" + good)
    result = invoke(llama, source, "--out", out)
    assert result.exit_code == 1
    first, last = read(out)
    assert (first["line"], last["line"]) == (1, 3 + len(bad))
    assert first["credit"] == last["credit"]
    messages = result.stderr.splitlines()
    for number, reason in enumerate(bad.values(), 3):
        (message,) = (m for m in messages if m.startswith(f"{source}:{number}: skipped: "))
        assert reason in message
    assert f"2 completions written to {out}, {len(bad)} lines skipped" in messages


def test_the_longest_input_is_scored_and_the_next_is_not(llama: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        json.dumps({"prompt": "", "response": "é" * ((LIMIT - 1) // 2) + "!" * n}) + "\n" for n in (1, 2)
    ]
    source.write_text("".join(lines))
    assert invoke(llama, source, "--out", out).exit_code == 1
    (row,) = read(out)
    assert len(row["credit"]) == LIMIT - 1  # and one <s>


def test_scores_that_are_not_finite_are_skipped(tmp_path: Path, source: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    model = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer().convert_tokens_to_ids("?")] = torch.nan
    model.save_pretrained(folder)
    result = invoke(folder, source)
    assert result.exit_code == 1
    rows = read(tmp_path / "completions.credit.jsonl")
    assert [row["line"] for row in rows] == [2]
    assert f"{source}:1: skipped: the model's score or attention is not finite" in result.stderr


def test_two_labels_need_an_expression(tmp_path: Path, source: Path) -> None:
    folder, out = save(tmp_path / "model", "two_labels"), tmp_path / "out.jsonl"
    result = invoke(folder, source, "--out", out)
    assert result.exit_code == 1
    assert "the model has 2 labels" in result.stderr
    assert not out.exists()
    assert invoke(folder, source, "--out", out, "--score-fn", "logit[1] - logit[0]").exit_code == 0
    difference = [row["score"] for row in read(out)]
    each = []
    for label in (0, 1):
        assert invoke(folder, source, "--out", out, "--score-fn", f"logit[{label}]").exit_code == 0
        each.append([row["score"] for row in read(out)])
    assert difference == pytest.approx([b - a for a, b in zip(*each, strict=True)], abs=1e-5)
    assert each[0][0] == pytest.approx(eager(folder, RECORDS[0])[0], rel=1e-4, abs=1e-5)


def test_page_shows_every_completion(llama: Path, source: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert invoke(llama, source, "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.endswith("</html>\n")
    assert text.count("<section") == 4
    assert "and <b>" not in text
    assert "😀" in text
    rows = read(tmp_path / "completions.credit.jsonl")
    assert rows[1]["tokens"].count("😀") > 1
    assert text.count("😀") == 1  # one character, one piece
    assert "∅" not in text
    for c in rows[0]["credit"]:
        shares = c * len(rows[0]["credit"])
        assert f'title="{rows[0]["score"] * c:.3g}, {shares:.1f} × even"' in text


def test_a_source_with_signs_gives_token_rewards(any_model: Path, source: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke(any_model, source, "--source", "leave_one_out", "--html", page)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "completions.credit.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(any_model).eval()
    text = RECORDS[0]["prompt"] + RECORDS[0]["response"]
    ids = tokenizer()(text)["input_ids"]
    with torch.no_grad():
        n = len(rows[0]["tokens"])
        left = [ids[:i] + ids[i + 1 :] for i in range(len(ids) - n, len(ids))]
        moves = rows[0]["score"] - torch.stack([model(torch.tensor([x])).logits[0, 0] for x in left])
    assert rows[0]["token_rewards"] == pytest.approx((moves - moves.mean()).tolist(), rel=1e-3, abs=1e-4)
    for row in rows:
        assert row["credit"] is None
        assert sum(row["token_rewards"]) == pytest.approx(0, abs=1e-4 * (1 + max(row["token_rewards"])))
    paid = rows[0]["score"] / n + rows[0]["token_rewards"][0]
    assert f'title="{paid:.3g}, ' in page.read_text(encoding="utf-8")
    spans = invoke(any_model, source, "--source", "leave_one_out", "--span", 100)
    assert spans.exit_code == 0
    assert not any(any(row["token_rewards"]) for row in read(tmp_path / "completions.credit.jsonl"))


def test_sources_beside_each_other_on_the_page(llama: Path, source: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke(llama, source, "--html", page, "--beside", "rollout", "--beside", "leave_one_out")
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure>") == 3 * len(RECORDS)
    assert re.findall(r"<figcaption><b>([^<]*)", text)[:3] == ["attention", "rollout", "leave_one_out"]
    assert invoke(llama, source, "--source", "rollout", "--out", tmp_path / "rollout.jsonl").exit_code == 0
    row = read(tmp_path / "rollout.jsonl")[0]
    shown = text.split("<b>rollout</b>")[1].split("<figure>")[0]
    for c in row["credit"]:
        assert f'title="{row["score"] * c:.3g}, ' in shown
    for arguments, message in (
        (("--beside", "rollout"), "--beside: want --html"),
        (("--html", page, "--beside", "magic"), "source: got 'magic', want one of"),
    ):
        refused = invoke(llama, source, *arguments)
        assert refused.exit_code == 1
        assert message in refused.stderr


def test_layers(llama: Path, source: Path, tmp_path: Path) -> None:
    every = []
    for layers in (["0"], ["1"], ["0,1"], ["all"]):
        assert invoke(llama, source, "--layer", *layers).exit_code == 0
        (first, *_) = read(tmp_path / "completions.credit.jsonl")
        attention = first["metrics"]["response_attention"]
        every.append(torch.tensor(first["credit"], dtype=torch.float64) * attention)
    for both in every[2:]:
        torch.testing.assert_close(both, (every[0] + every[1]) / 2, rtol=1e-4, atol=1e-6)
    assert "layer: got 'x', want an integer" in invoke(llama, source, "--layer", "x").stderr
    refused = invoke(llama, source, "--source", "rollout", "--layer", "0")
    assert refused.exit_code == 1
    assert "layer: got 0, want none for source='rollout'" in refused.stderr


def test_reads_no_further_than_a_batch(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CreditModel.load(RewardModelConfig(model=str(llama)), "cpu")
    lines = [(json.dumps(RECORDS[0]) + "\n").encode()] * 10
    ahead: list[int] = []
    sizes: list[int] = []
    score, left = CreditModel.score_each, iter(lines)

    def spy(*args: Any) -> Any:
        ahead.append(len(lines) - operator.length_hint(left))
        return score(*args)

    monkeypatch.setattr(CreditModel, "score_each", spy)
    with (tmp_path / "out.jsonl").open("w") as out:
        counts = file.write(file.credited(model, left, batch_size=4), out, on_read=sizes.append)
    assert counts == (10, 0, 0)
    assert ahead == [4, 8, 10]
    assert sizes == [sum(map(len, part)) for part in (lines[:4], lines[4:8], lines[8:])]


def interrupt(monkeypatch: pytest.MonkeyPatch, error: type[BaseException], calls: int) -> None:
    """The given call of the model raises; those before it score."""
    score, done = CreditModel.score, []

    def interrupted(*args: Any) -> Any:
        done.append(1)
        if len(done) == calls + 1:  # the first is the probe
            raise error
        return score(*args)

    monkeypatch.setattr(CreditModel, "score", interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("with_page", [False, True])
def test_what_an_interrupted_run_wrote_is_gone_on_with(
    llama: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    with_page: bool,
) -> None:
    with source.open("a", encoding="utf-8") as lines:
        lines.write("\n{\n" + "".join(json.dumps(record) + "\n" for record in RECORDS))
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    arguments = [llama, source, "--batch-size", 1, *(["--html", page] if with_page else [])]
    whole = invoke(*arguments, "--out", out)
    assert "8 completions written" in whole.stderr
    want, want_page = out.read_text(), page.read_text() if with_page else None
    out.write_text("as before")
    with monkeypatch.context() as patched:
        interrupt(patched, error, 3)
        result = invoke(*arguments, "--out", out)
    assert result.exit_code == (130 if error is KeyboardInterrupt else 1)
    assert out.read_text() == "as before"
    (part,) = tmp_path.glob("out.jsonl.*.partial")
    assert part.read_text() == "".join(want.splitlines(keepends=True)[:2])
    if error is KeyboardInterrupt:
        assert f"interrupted; what is written is in {part}, --resume goes on behind it" in result.stderr

    again = invoke(*arguments, "--out", out)
    assert again.exit_code == 1
    assert f"{part} holds what an interrupted run has written: --resume goes on" in again.stderr
    other = invoke(*arguments, "--out", out, "--resume", "--layer", "0")
    assert other.exit_code == 1
    assert f"--resume: {part} is of another model, input or other options" in other.stderr
    scored: list[int] = []
    score = CreditModel.score
    monkeypatch.setattr(CreditModel, "score", lambda *args: scored.append(len(args[1])) or score(*args))
    result = invoke(*arguments, "--out", out, "--resume")
    assert len(scored) == 1 + 6  # the probe
    assert result.exit_code == 1  # of the line that is no JSON
    assert f"{source}:6: skipped" in result.stderr
    assert "6 completions written" in result.stderr
    assert out.read_text() == want
    if with_page:
        assert page.read_text() == want_page
    assert not [*tmp_path.glob("*.partial")]


def test_a_line_torn_off_is_written_anew(llama: Path, source: Path, tmp_path: Path) -> None:
    """As after a power cut: the two files end somewhere, the page before the other."""
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    arguments = [llama, source, "--out", out, "--html", page]
    assert invoke(*arguments).exit_code == 0
    want, want_page = out.read_bytes(), page.read_bytes()
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, KeyboardInterrupt, 2)
        assert invoke(*arguments, "--batch-size", 1).exit_code == 130
    (part,) = tmp_path.glob("out.jsonl.*.partial")
    (page_part,) = tmp_path.glob("page.html.*.partial")
    second = want_page.index(b'<section id="c2"')
    for end in (want_page.index(b"</section>"), second + 20, second, 40, len(want_page) - 20):
        part.write_bytes(want[: want.index(b"\n") + 30] if end != second else want[:-30])
        page_part.write_bytes(want_page[:end])
        assert invoke(*arguments, "--resume").exit_code == 0
        assert out.read_bytes() == want
        assert page.read_bytes() == want_page


def test_an_error_on_the_way_says_what_is_written(
    llama: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, OSError, 2)
    result = invoke(llama, source, "--batch-size", 1)
    assert result.exit_code == 1
    (part,) = tmp_path.glob("*.partial")
    assert f"; what is written is in {part}, --resume goes on behind it" in result.stderr
    (llama / "config.json").touch()
    other = invoke(llama, source, "--resume")
    assert f"--resume: {part} is of another model, input or other options" in other.stderr


def test_resuming_what_was_never_begun_is_a_beginning(llama: Path, source: Path, tmp_path: Path) -> None:
    result = invoke(llama, source, "--resume")
    assert result.exit_code == 0
    assert "4 completions written" in result.stderr


def test_an_interruption_before_anything_is_written_leaves_nothing(
    llama: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, KeyboardInterrupt, 1)
    result = invoke(llama, source)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["completions.jsonl"]


def test_standard_input_and_output(llama: Path, source: Path, tmp_path: Path) -> None:
    assert invoke(llama, source).exit_code == 0
    want = (tmp_path / "completions.credit.jsonl").read_text(encoding="utf-8")
    for arguments, written in [
        ((llama, "-"), None),
        ((llama, "-", "--out", tmp_path / "other.jsonl"), tmp_path / "other.jsonl"),
        ((llama, source, "--out", "-"), None),
    ]:
        command = ["credit", *map(str, arguments), "--device", "cpu"]
        result = CliRunner().invoke(app, command, input=source.read_bytes())
        assert result.exit_code == 0
        assert (result.stdout if written is None else written.read_text(encoding="utf-8")) == want
        assert "4 completions written to" in result.stderr


def test_pipes_are_read_and_written_and_never_replaced(llama: Path, source: Path, tmp_path: Path) -> None:
    assert invoke(llama, source).exit_code == 0
    want = (tmp_path / "completions.credit.jsonl").read_text(encoding="utf-8")
    given, taken, page = (tmp_path / name for name in ("given", "taken", "page"))
    for pipe in (given, taken, page):
        os.mkfifo(pipe)
    end = os.open(taken, os.O_RDWR)
    assert invoke(llama, source, "--out", taken).exit_code == 0
    assert os.read(end, 1 << 16).decode() == want
    os.close(end)
    threading.Thread(target=given.write_bytes, args=(source.read_bytes(),), daemon=True).start()
    result = invoke(llama, given)  # as of <(…)
    assert (result.exit_code, result.stdout) == (0, want)
    for arguments, message in [
        (("--html", page), f"--html: got {page}, want a file"),
        (("--out", taken, "--resume"), "--resume: want files"),
    ]:
        result = invoke(llama, source, *arguments)
        assert (result.exit_code, message in result.stderr) == (1, True)
    assert all(is_stream(pipe) for pipe in (given, taken, page))


def test_a_link_is_followed(llama: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    links = tmp_path / "out.jsonl", tmp_path / "page.html"
    for link in links:
        link.symlink_to(tmp_path / "far" / link.name)
    assert invoke(llama, source, "--out", links[0], "--html", links[1]).exit_code == 0
    assert all(link.is_symlink() and link.read_text(encoding="utf-8") for link in links)


def test_a_file_of_another_kind_is_refused_whole(llama: Path, source: Path, tmp_path: Path) -> None:
    text = source.read_bytes()
    packed = gzip.compress(text), lzma.compress(text), text.decode().encode("utf-16"), b"PAR1\x15\4" + text
    listed = json.dumps(RECORDS, indent=1).encode()
    for i, content in enumerate([*packed, listed, b"\xef\xbb\xbf" + listed]):
        (other := tmp_path / f"{i}.jsonl").write_bytes(content)
        result = invoke(llama, other)
        (said,) = result.stderr.splitlines()
        want = "is no text in UTF-8" if i < len(packed) else "is one JSON list, want an object per line"
        assert (result.exit_code, want in said) == (1, True)
    assert not list(tmp_path.glob("*.credit.jsonl"))


def test_a_conversation_that_the_template_changes_is_flagged(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'].split('</think>')[-1] | trim }}{% endfor %}"
        "<|im_end|>Was it polite?"
    )
    tok.save_pretrained(folder)
    reply = "<think>polite</think>\n\npolite"
    source, page = tmp_path / "in.jsonl", tmp_path / "page.html"
    source.write_text(json.dumps({"messages": [{"role": "assistant", "content": reply}]}) + "\n")
    result = invoke(folder, source, "--html", page)
    assert result.exit_code == 0
    assert "1 completions written" in result.stderr
    assert "1 of them changed by the chat template" in result.stderr
    (row,) = read(tmp_path / "in.credit.jsonl")
    assert row["metrics"]["changed"] is True
    assert [reply[start:end] for start, end in row["offsets"]] == row["tokens"]
    assert row["offsets"][0][0] == len(reply) - len("polite")
    assert "".join(row["tokens"]) == "polite"
    text = page.read_text(encoding="utf-8")
    assert "what it dropped has no credit" in text
    assert 'title="0, 0.0 × even" tabindex="0">&lt;think&gt;polite&lt;/think&gt;' in text


def test_batches_need_no_padding_token(tmp_path: Path, source: Path) -> None:
    """Scores are those of a batch of one, as the checkpoint has them, also where a text ends in any token."""
    folder, out = save(tmp_path / "model", "no_pad"), tmp_path / "out.jsonl"
    model, _ = load_reward_model(str(folder), "cpu")
    assert model.config.pad_token_id is None
    assert invoke(folder, source, "--out", out, "--batch-size", 4).exit_code == 0
    for row, record in zip(read(out), RECORDS, strict=True):
        assert row["score"] == pytest.approx(eager(folder, record)[0], rel=1e-4, abs=1e-5)


def test_empty_file(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.touch()
    assert invoke(llama, source).exit_code == 0
    assert (tmp_path / "in.credit.jsonl").read_text() == ""


def test_what_cannot_work_is_one_line(llama: Path, source: Path, tmp_path: Path) -> None:
    causal = save(tmp_path / "causal", "causal")
    for arguments, message in [
        ((causal, source), "is no reward model: it lacks score.weight"),
        ((tmp_path / "nothing", source), "nothing: there is no such folder"),
        ((source, source), "is a file, want a model's folder"),
        ((tmp_path, source), "is no model: it holds no config.json"),
        ((llama, tmp_path / "no.jsonl"), "no.jsonl: there is no such file"),
        ((llama, tmp_path), "there is no such file"),
        ((llama, source, "--device", "foo"), "device: got 'foo', want cpu, cuda, cuda:1"),
        ((llama, source, "--device", "meta"), "device: got 'meta'"),
        ((llama, source, "--batch-size", "0"), "'--batch-size'"),
        ((llama, source, "--batch-size", "many"), "'--batch-size'"),
        ((llama, source, "--bath-size", "3"), "No such option"),
        ((llama,), "JSONL"),
        ((llama, source, "--query-position", "first"), "query_position: got 'first', want pooled"),
        ((llama, source, "--out", tmp_path), "is a folder, want a file"),
        ((llama, source, "--html", "-"), "--html: got -, want a file"),
        ((llama, "-", "--resume"), "--resume: want files"),
        ((llama, source, "--out", source), "must be different ones"),
        ((llama, source, "--html", tmp_path / "completions.credit.jsonl"), "must be different ones"),
        ((llama, source, "--out", tmp_path / "no" / "out.jsonl"), "there is no folder"),
        ((llama, source, "--score-fn", "logit +"), "score_fn: got 'logit +'"),
        ((llama, source, "--layer", "7"), "layer"),
    ]:
        result = CliRunner().invoke(app, ["credit", *map(str, arguments)])
        assert result.exit_code in (1, 2), result.output
        (said,) = result.stderr.splitlines()
        assert message in said
    assert source.read_text(encoding="utf-8").count("\n") == len(RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["causal", "completions.jsonl"]


def test_demo_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[DemoConfig] = []
    monkeypatch.setattr("attnshape.demo.run.run_demo", configs.append)
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    arguments = """
        --policy p --reward-model r --prompts f --score-fn logit[1] --method ABC --seeds 2 --raw-scores
        --threshold 8 --steps 2 --batch-size 3 --new-tokens 9 --min-new-tokens 4 --lr 0.5 --kl-coef 0.25
        --dense-share 0.5 --lam 1
    """.split()
    arguments += ["--workers", "1", "--cache-dir", str(tmp_path), "--out", "o", "--device", "cpu"]
    assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == 0
    ppo = PPOConfig(
        steps=2, batch_size=3, new_tokens=9, min_new_tokens=4, lr=0.5, kl_coef=0.25, dense_share=0.5, lam=1.0
    )
    want = DemoConfig(
        policy="p",
        reward_model="r",
        prompts=Path("f"),
        score_fn="logit[1]",
        methods=("ABC",),
        seeds=(0, 1),
        standardize=False,
        threshold=8.0,
        ppo=ppo,
        workers=1,
        cache_dir=tmp_path,
        out=Path("o"),
        device="cpu",
    )
    assert configs == [DemoConfig(), want]


def test_demo_options_that_do_not_fit_are_one_line() -> None:
    result = CliRunner().invoke(app, ["demo", "--policy", "p"])
    assert result.exit_code == 1
    assert "policy, reward_model and prompts go together" in result.stderr
    assert "Traceback" not in result.output


def test_the_demo_says_at_once_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnshape.demo.run._prepare", lambda *_: pytest.fail("work has begun"))
    file = tmp_path / "file"
    file.touch()
    for arguments, message in [
        (("--out", file), "out: got"),
        (("--out", file / "folder"), "a file, want a folder"),
        (("--device", "foo"), "device: got 'foo'"),
        (("--score-fn", "logit +"), "score_fn: got 'logit +'"),
    ]:
        result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), *map(str, arguments)])
        assert result.exit_code == 1
        (said,) = result.stderr.splitlines()
        assert message in said
    result = run(
        call_without, "matplotlib", "demo", "--out", str(tmp_path / "out"), forget=(*CALLED, "matplotlib")
    )
    assert result.returncode == 1
    assert result.stderr == "attnshape demo needs: pip install matplotlib\n"


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"attnshape {attnshape.__version__}\n")


def test_other_commands_name_a_bad_device_in_one_line() -> None:
    for command in ("compare", "bench"):
        result = CliRunner().invoke(app, [command, "--device", "cuda:x"])
        assert result.exit_code == 1
        (said,) = result.stderr.splitlines()
        assert "device: got 'cuda:x'" in said


CALLED = ("attnshape.cli", "attnshape.__main__", "attnshape.demo")


def call_without(package: str, *arguments: str) -> None:
    sys.modules[package] = None  # type: ignore[assignment]
    importlib.import_module("attnshape.cli").app(arguments)


def test_without_the_extra_it_says_what_to_install() -> None:
    result = run(call_without, "typer", forget=CALLED)
    assert result.returncode == 1
    assert result.stderr == "the command line needs: pip install typer rich\n"


def test_module_runs() -> None:
    result = run(run_module, "attnshape", "--help", forget=CALLED)
    assert result.returncode == 0, result.stderr
    for command in ("bench", "compare", "credit", "demo", "serve"):
        assert command in result.stdout


def run_module(name: str, *arguments: str) -> None:
    """As `python -m name` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
