import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.paper_models import save_models
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.paper import __main__ as main
from benchmarks.paper.__main__ import app
from benchmarks.paper.cells import DEEP, Cell
from benchmarks.paper.options import Options
from benchmarks.paper.store import collect
from benchmarks.paper.sweep import RUNS


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT2LMHeadModel and a two-label GPT2ForSequenceClassification, as the paper's IMDb models are."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, labels=2)
    return folder


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    # As rich wraps words in a box; a long path is cut anywhere.
    words = result.output.replace("│", " ").split()
    return result.exit_code, " ".join(words) or repr(result.exception)


def own(folder: Path, out: Path) -> list[object]:
    return [
        "--policy",
        folder / "policy",
        "--reward-model",
        folder / "reward_model",
        "--prompts",
        folder / "prompts.jsonl",
        "--score-fn",
        "logit[1] - logit[0]",
        "--device",
        "cpu",
        "--out",
        out,
    ]


@pytest.mark.parametrize("method", ["ABC", "ABC-D mean", "R3HF", "gradient x value, signed", "ABC shuffled"])
def test_a_cell_on_local_folders(folder: Path, tmp_path: Path, method: str) -> None:
    arguments = ["cell", method, "--length", "8-16", "--steps", 2, *own(folder, tmp_path)]
    status, printed = call(*arguments)
    assert status == 0, printed
    cell = Cell(method=method, length="8-16", seed=0, steps=2)  # type: ignore[arg-type]
    path = RUNS.new(tmp_path, cell.name)
    assert str(path) in printed
    loaded = json.loads(path.read_text())
    assert Cell(**loaded["cell"]) == cell
    assert "true_reward" not in loaded["curves"]  # nobody knows it of a user's models
    assert len(loaded["curves"]["score"]) == 2
    written = path.stat().st_mtime_ns
    assert call(*arguments)[0] == 0
    assert path.stat().st_mtime_ns == written  # it was not run again
    collect(tmp_path, [RUNS])
    status, printed = call(*arguments)
    assert status == 0
    assert f"{cell.name} is in {tmp_path}/runs.jsonl" in printed
    assert not path.exists()  # nor was it when it had become a line


@pytest.mark.parametrize("family", ["GPT-J", "Llama"])
def test_the_papers_other_architectures(tmp_path: Path, family: str) -> None:
    """Those of its TL;DR and helpful-base models, with one label."""
    save_models(tmp_path, family=family)
    options = ["--length", "8-16", "--steps", 1, "--score-fn", "logit"]
    for method in ("ABC", "ABC-D mean", "norm-weighted rollout", "gradient x value, signed", "R3HF"):
        arguments = [
            x for x in own(tmp_path, tmp_path / "out") if x not in ("--score-fn", "logit[1] - logit[0]")
        ]
        status, printed = call("cell", method, *options, *arguments)
        assert status == 0, printed


def test_cells_wait_for_models_that_are_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that have not been run."""
    cells = [Cell(method="sparse", length="8-16", seed=s, steps=1, models=DEEP) for s in (0, 1)]
    monkeypatch.setattr(main, "chosen", lambda names: [*cells, replace(cells[0], models="testbed")])
    done = RUNS.new(tmp_path, cells[0].name)
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    status, printed = call("all", *own(folder, tmp_path))
    assert status == 0, printed
    assert "1 cells wait for the reward models" in printed
    assert len(list(done.parent.iterdir())) == 2
    RUNS.new(tmp_path, cells[1].name).write_text("{}")
    assert "all 3 cells have been run" in call("all", *own(folder, tmp_path))[1]


def test_rto_takes_a_dpo_policy(folder: Path, tmp_path: Path) -> None:
    arguments = ["cell", "RTO", "--length", "8-16", "--steps", 1, *own(folder, tmp_path)]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(result.exception, ValueError)
    assert "RTO needs a DPO-trained policy" in str(result.exception)
    result = CliRunner().invoke(app, [*map(str, arguments), "--dpo-policy", str(folder / "policy")])
    assert "log-ratios to the policy are all alike" in str(result.exception)
    save_models(tmp_path / "dpo", seed=3)
    assert call(*arguments, "--dpo-policy", tmp_path / "dpo" / "policy")[0] == 0


def test_summary_of_a_users_runs(folder: Path, tmp_path: Path) -> None:
    for method in ("sparse", "ABC"):
        assert call("cell", method, "--length", "8-16", "--steps", 11, *own(folder, tmp_path))[0] == 0
    for path in [*RUNS.new(tmp_path, "any").parent.iterdir()]:
        # As if they had been run in full, and so with another seed.
        text = path.read_text().replace('"steps":11', '"steps":100')
        path.write_text(text)
        path.with_name(path.name.replace("seed=0", "seed=1")).write_text(text.replace('"seed":0', '"seed":1'))
    status, printed = call("summary", "--out", tmp_path)
    assert status == 0, printed
    assert len(RUNS.read(tmp_path)) == 4
    assert not list(tmp_path.rglob("*seed=*"))
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["methods 8-16"]["ABC"]["lead"][3] == 2
    for name in ("learning_curves", "lengths", "beta_and_kl", "credit", "credit_and_speed"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_use_is_named(folder: Path, tmp_path: Path) -> None:
    status, printed = call("cell", "ABC", "--policy", folder / "policy", "--out", tmp_path)
    assert status == 2
    assert "--reward-model, --prompts" in printed
    status, printed = call("cell", "ABC", *own(folder, tmp_path)[:-2])
    assert status == 2
    assert "--out" in printed
    status, printed = call("all", "--only", "nonsense", "--out", tmp_path)
    assert status == 2
    assert "nonsense" in printed
    status, printed = call("summary", "--out", tmp_path)
    assert status == 2
    assert "no runs" in printed


@pytest.mark.parametrize("command", ["summary", "all", "cell ABC --length 8-16 --steps 1"])
def test_a_broken_line_is_named_in_a_sentence(folder: Path, tmp_path: Path, command: str) -> None:
    RUNS.path(tmp_path).write_text('{"cell":{"method":"AB')
    models = ["--out", tmp_path] if command == "summary" else own(folder, tmp_path)
    status, printed = call(*command.split(), *models)
    assert status == 2
    assert "runs.jsonl,line1:got" in printed.replace(" ", "")


def test_commands_share_one_set_of_options() -> None:
    shared = {field.name for field in fields(Options)}
    by_name = {
        command.name: {p.name: p for p in command.params} for command in get_command(app).commands.values()
    }
    for name in ("cell", "all"):
        assert shared < set(by_name[name])
    for name in shared:
        cell, every = by_name["cell"][name], by_name["all"][name]
        assert (cell.opts, cell.default, cell.help) == (every.opts, every.default, every.help)
        assert cell.help
