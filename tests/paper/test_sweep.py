import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.paper_models import save_models, tiny_models
from support.processes import FORK, start

from attnshape.demo.models import TrainingMetrics
from attnshape.demo.ppo import Rollout, source_of
from benchmarks.paper import sweep as sweep_module
from benchmarks.paper import testbed as testbed_module
from benchmarks.paper.cells import Cell
from benchmarks.paper.store import collect
from benchmarks.paper.sweep import RUNS, TRAINING, sweep, write_training
from benchmarks.paper.testbed import CURVES, Models, run_cell

CELLS = [Cell(method=m, length="8-16", seed=s, steps=3) for s in (0, 1) for m in ("sparse", "ABC")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture
def testbed(folder: Path) -> Models:
    return tiny_models(folder)


@pytest.fixture(autouse=True)
def poisoned_empty() -> None:
    """Not here: loading a model would draw other random numbers than in the child process."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outcome(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "cpu_seconds"}


def outcomes(folder: Path) -> list[dict]:
    """Of every run, after the new ones became lines."""
    collect(folder, [RUNS])
    return [outcome(found) for found in RUNS.read(folder).values()]


def test_a_line_says_what_was_run_where_and_on_what(testbed: Models, tmp_path: Path) -> None:
    sweep(CELLS[:1], testbed, tmp_path)
    [loaded] = outcomes(tmp_path)
    assert Cell(**loaded["cell"]) == CELLS[0]
    assert set(loaded["curves"]) == set(CURVES)
    assert all(len(curve) == 3 for curve in loaded["curves"].values())
    assert loaded["versions"]["torch"] == torch.__version__
    assert loaded["machine"]["cpus"] == os.cpu_count()
    assert len(loaded["commit"]) >= 7
    assert loaded == outcome(run_cell(CELLS[0], testbed))


def test_training_is_added_to_what_is_known_of_earlier_runs(testbed: Models, tmp_path: Path) -> None:
    write_training(testbed, tmp_path)
    assert not (tmp_path / TRAINING).exists()
    for name, accuracy in (("long", 0.5), ("testbed", 0.6), ("long", 0.7)):
        write_training(replace(testbed, training={name: TrainingMetrics(1.0, accuracy, 0.9)}), tmp_path)
    known = json.loads((tmp_path / TRAINING).read_text())
    assert {name: x["accuracy"] for name, x in known.items()} == {"long": 0.5, "testbed": 0.6}


def test_a_cells_critic_is_the_one_it_names(testbed: Models) -> None:
    shared = run_cell(replace(CELLS[0], lr=1e-2), testbed)["curves"]
    separate = run_cell(replace(CELLS[0], lr=1e-2, critic="separate"), testbed)["curves"]
    assert separate["true_reward"][0] == shared["true_reward"][0]
    assert separate["value_loss"] != shared["value_loss"]


def test_a_killed_sweep_goes_on_where_it_stopped(
    testbed: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, it goes on to the results of a sweep that nobody killed."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORK)
    out = tmp_path / "out"
    program = start(sweep, CELLS, testbed, out, workers=2)
    deadline = time.monotonic() + 400
    while not list(out.rglob("*seed=*.json")) and time.monotonic() < deadline:
        assert program.is_alive()
        time.sleep(0.01)
    os.killpg(program.pid, signal.SIGKILL)
    program.join()
    left = RUNS.missing(CELLS, out)
    kept = outcomes(out)
    assert 1 <= len(kept) == len(CELLS) - len(left)
    before = RUNS.path(out).read_text().splitlines()
    done: list[Cell] = []
    sweep(CELLS, testbed, out, workers=2, on_done=done.append)
    assert sorted(cell.name for cell in done) == sorted(cell.name for cell in left)
    sweep(CELLS, testbed, tmp_path / "whole", workers=2)
    assert outcomes(out) == outcomes(tmp_path / "whole")
    assert set(before) <= set(RUNS.path(out).read_text().splitlines())


def test_what_another_process_ran_meanwhile_is_not_run_again(
    testbed: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is there, or already a line, when this sweep comes to the cell."""
    ran: list[Cell] = []

    def run(cell: Cell, *_: object) -> dict:
        ran.append(cell)
        if cell == CELLS[0]:
            for other in CELLS[1:3]:
                RUNS.add({**result, "cell": asdict(other)}, tmp_path, other.name)
                if other == CELLS[1]:
                    collect(tmp_path, [RUNS])
        return {**result, "cell": asdict(cell)}

    result = run_cell(replace(CELLS[0], steps=1), testbed)
    monkeypatch.setattr(sweep_module, "run_cell", run)
    sweep(CELLS, testbed, tmp_path)
    assert ran == [CELLS[0], CELLS[3]]
    collect(tmp_path, [RUNS])
    assert sorted(Cell(**found["cell"]).name for found in RUNS.read(tmp_path).values()) == sorted(
        cell.name for cell in CELLS
    )


def test_workers_must_be_at_least_one(testbed: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers: got 0"):
        sweep(CELLS, testbed, tmp_path, workers=0)


def test_seeds_are_paired(testbed: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a seed see the same prompts whatever the method, and start from the same completions."""
    rollouts: list[Rollout] = []

    def recording(method: str, **_: object):
        def judged(actor, judge, rollout):
            rollouts.append(rollout)
            return source_of(method)(actor, judge, rollout)  # type: ignore[arg-type]

        return judged

    monkeypatch.setattr(testbed_module, "source_for", recording)
    seen = {}
    for cell in CELLS:
        rollouts.clear()
        run_cell(cell, testbed)
        seen[cell.method, cell.seed] = [r.ids[:, : r.prompt_length] for r in rollouts], rollouts[0].ids
    for seed in (0, 1):
        (prompts, first), (others, other_first) = seen["sparse", seed], seen["ABC", seed]
        assert len(prompts) == 3
        assert all(torch.equal(a, b) for a, b in zip(prompts, others, strict=True))
        assert torch.equal(first, other_first)
    assert not torch.equal(seen["ABC", 0][1], seen["ABC", 1][1])


def test_a_shift_moves_what_is_redistributed_not_what_is_recorded(
    testbed: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = []

    def recording(method: str, **_: object):
        def judged(actor, judge, rollout):
            judgement = source_of(method)(actor, judge, rollout)  # type: ignore[arg-type]
            scores.append(judgement.score)
            return judgement

        return judged

    monkeypatch.setattr(testbed_module, "source_for", recording)
    records = [run_cell(replace(CELLS[1], shift=shift, steps=1), testbed) for shift in (0.0, 5.0)]
    torch.testing.assert_close(scores[1], scores[0] + 5)
    for curve in ("score", "true_reward"):
        assert records[1]["curves"][curve] == pytest.approx(records[0]["curves"][curve], abs=1e-3)


def test_unknown_models_are_named(testbed: Models) -> None:
    with pytest.raises(ValueError, match=r"models: got 'long', want one of \['testbed'\]"):
        run_cell(replace(CELLS[0], models="long"), testbed)
