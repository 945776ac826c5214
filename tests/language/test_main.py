import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.language import agreement, rl
from benchmarks.language.__main__ import RESULTS, app


@pytest.fixture
def given(
    files: tuple[Path, Path], saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    for name, value in (("NEW_TOKENS", 6), ("MIN_NEW_TOKENS", 4), ("REFERENCE", 32), ("GROUP", 2)):
        monkeypatch.setattr(rl, name, value)
    rl.initial.cache_clear()
    texts = ["--reviews", str(files[0]), "--treebank", str(files[1]), "--cache", str(tmp_path / "cache")]
    return [*texts, "--reward-model", str(saved[1])]


def test_models_of_ones_own_are_run_measured_and_summarised(
    given: list[str], saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement.measured_on, "__defaults__", (4,))
    out = tmp_path / "out"
    own = [*given, "--out", str(out)]
    run = ["runs", *own, "--policy", str(saved[0]), "--steps", "1", "--only", "grpo *"]
    for _ in range(2):  # one cell more each time
        done = CliRunner().invoke(app, [*run, "--count", "1"])
        assert done.exit_code == 0, done.output
    assert CliRunner().invoke(app, ["credit", *own]).exit_code == 0
    done = CliRunner().invoke(app, ["summary", "--out", str(out)])
    assert done.exit_code == 0, done.output
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert {r["cell"]["source"] for r in runs} == {"plain", "uniform"}
    assert all(r["commit"] and r["machine"] for r in runs)
    (credit,) = [json.loads(line) for line in (out / "credit.jsonl").read_text().splitlines()]
    assert credit["name"] == "judge"
    assert json.loads((out / "summary.json").read_text())["runs"] == 2
    assert (out / "credit.png").is_file()


def test_what_cannot_be_run_is_told(given: list[str], tmp_path: Path) -> None:
    texts = given[:6]
    for command, said in (
        (["credit", *given], "folder of their own"),
        (["runs", *given, "--out", str(tmp_path)], "go together"),
        (["runs", *texts, "--out", str(tmp_path), "--only", "nothing"], "nothing is called"),
        (["summary", "--out", str(tmp_path)], "has no records"),
    ):
        done = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
        assert done.exit_code == 2, command
        assert said in done.output.replace("\n", " "), done.output
    assert CliRunner().invoke(app, ["runs", *texts, "--out", str(tmp_path)]).exit_code == 0
    assert not (tmp_path / "new").exists()  # no models, no runs
    assert RESULTS.name == "language"
