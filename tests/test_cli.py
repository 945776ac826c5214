"""`attnshape credit` on reward models made here, and the command line around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reward_models import LIMIT, save, tokenizer
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from typer.testing import CliRunner, Result

from attnshape.cli import app
from attnshape.demo.ppo import PPOConfig
from attnshape.demo.run import DemoConfig
from attnshape.text import file, reader

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
        b'{"prompt": "a"}': '"response" must be a string, got null',
        b'{"prompt": 1, "response": "a"}': '"prompt" must be a string, got 1',
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
    assert "<b>" not in text
    assert "😀" in text
    rows = read(tmp_path / "completions.credit.jsonl")
    assert rows[1]["tokens"].count("😀") > 1
    assert text.count("😀") == 1  # one character, one piece
    assert "∅" not in text
    for row in rows[:1]:
        for c in row["credit"]:
            assert f'title="{c:.4g}"' in text


def test_reads_no_further_than_a_batch(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = reader.load_reward_model(str(llama), "cpu")
    source = tmp_path / "in.jsonl"
    source.write_text((json.dumps(RECORDS[0]) + "\n") * 10)
    read_sizes: list[int] = []
    ahead: list[int] = []
    score = file.score_examples

    def spy(*args: Any) -> Any:
        ahead.append(len(read_sizes))
        return score(*args)

    monkeypatch.setattr(file, "score_examples", spy)
    counts = file.credit_file(
        model,
        tok,
        source,
        tmp_path / "out.jsonl",
        score_fn=file.ScoreFn(((1.0, None),)),
        batch_size=4,
        on_read=read_sizes.append,
    )
    assert counts == (10, 0)
    assert ahead == [4, 8, 10]
    assert sum(read_sizes) == source.stat().st_size


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_no_file(
    llama: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    old = tmp_path / "out.jsonl"
    old.write_text("as before")
    score, calls = file.score_examples, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return score(*args)

    monkeypatch.setattr(file, "score_examples", interrupted)
    result = invoke(llama, source, "--out", old, "--html", tmp_path / "page.html", "--batch-size", 1)
    assert result.exit_code != 0
    assert len(calls) == 3
    assert old.read_text() == "as before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completions.jsonl", "out.jsonl"]


def test_a_model_without_padding_token_takes_its_tokenizers(tmp_path: Path) -> None:
    model, _ = reader.load_reward_model(str(save(tmp_path, "no_pad")), "cpu")
    assert model.config.pad_token_id == 1


def test_empty_file(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.touch()
    assert invoke(llama, source).exit_code == 0
    assert (tmp_path / "in.credit.jsonl").read_text() == ""


def test_what_cannot_work_is_one_line(llama: Path, source: Path, tmp_path: Path) -> None:
    causal = save(tmp_path / "causal", "causal")
    for arguments, message in [
        ((causal, source), "is no reward model: it lacks score.weight"),
        ((tmp_path / "nothing", source), "nothing"),
        ((llama, source, "--out", source), "must be different ones"),
        ((llama, source, "--html", tmp_path / "completions.credit.jsonl"), "must be different ones"),
        ((llama, source, "--out", tmp_path / "no" / "out.jsonl"), "there is no folder"),
        ((llama, source, "--score-fn", "logit +"), "score_fn: got 'logit +'"),
        ((llama, source, "--layer", "7"), "layer"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr.replace("\n", " "), result.stderr
        assert "Traceback" not in result.output
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


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import attnshape.__main__, attnshape.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "the command line needs: pip install 'attnshape[demo]'\n"


def test_module_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "attnshape", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("bench", "compare", "credit", "demo", "serve"):
        assert command in result.stdout
