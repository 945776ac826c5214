"""That the benchmarks measure what they say, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Ended, run

from attnshape.bench.cases import Case, Shape, random_arguments
from benchmarks import report
from benchmarks.beside import read_calls
from benchmarks.cases import Budget, budget_cases, made_small, suite_cases, with_plain
from benchmarks.kernel_table import programs_per_multiprocessor
from benchmarks.memory import memory_of
from benchmarks.peers import install, measure
from benchmarks.peers.measure import PEERS, doubling, measured
from benchmarks.record import Promise
from benchmarks.results import ROOT, load
from benchmarks.test_forward import redistributed
from benchmarks.test_peers import PeerMissingError, PeerRuns

CPU = torch.device("cpu")


def test_limits() -> None:
    assert Budget(of_copy=0.8).limit(8.0) == 10.0
    assert Budget(times_copy=1.3).limit(10.0) == 13.0
    assert Budget(times_forward=1.3).limit(1.0, forward_seconds=10.0) == 13.0
    assert Budget(seconds=7e-6).limit(1.0) == 7e-6
    assert Budget().limit(1.0) is None


def test_the_notes_say_what_was_measured() -> None:
    """Microseconds of the first contact and of the last run, and the share of a pass that reads as much."""
    folder = ROOT / "benchmarks" / "results" / "nvidia-h200"
    first, last = (
        {x["item"]: x for x in map(json.loads, (folder / name).read_text().splitlines()) if "read_us" in x}
        for name in ("first.jsonl", "results.jsonl")
    )
    rows = re.findall(
        r"^\| (.*?) \| ([\d.]+) \| ([\d.]+) \| (\d+%) \| ", (ROOT / "docs" / "kernels.md").read_text(), re.M
    )
    assert len(rows) == 9
    for case, before, now, of_read in rows:
        us, read = last[case]["us"]["value"], last[case]["read_us"]["value"]
        found = f"{first[case]['us']['value']:.1f}", f"{us:.1f}", f"{read / us:.0%}"
        assert (before, now, of_read) == found, case


@pytest.mark.parametrize(
    ("target", "registers", "shared", "programs"),
    [
        ("sm_90", 168, 0, 3),  # 5376 registers a warp: 3 in a quarter of 16384
        ("sm_90", 128, 0, 4),
        ("sm_90", 32, 0, 16),  # 64 warps
        ("sm_89", 32, 0, 12),  # 48 warps
        ("sm_90", 32, 45056, 5),  # 228 KB of memory
        ("sm_120", 32, 45056, 2),
        ("gfx942", 128, 0, 4),
    ],
)
def test_programs_per_multiprocessor(target: str, registers: int, shared: int, programs: int) -> None:
    assert programs_per_multiprocessor(target, registers, shared, warps=4) == programs


def test_a_read_only_pass_reads_its_bytes() -> None:
    assert read_calls(8192, 2, CPU)[0]().item() == 8192 / 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites(device: str) -> None:
    cases = [case for case, _ in suite_cases(device)]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.what for case in cases} == {
        "fused", "apart", "credit", "row", "column", "sweep", "gae", "whiten"
    }  # fmt: skip
    gaes = [case for case in cases if case.what == "gae"]
    assert {(case.shape.batch, case.shape.response) for case in gaes} >= {
        (64, 128),
        (8192, 4096),
        (1, 131072),
    }
    assert {case.lam for case in gaes} == {0.95, 1.0}
    assert {case.mask_semantics for case in gaes if case.shape.holes} == {"skip", "zero"}
    assert len({case.shape[5:8] for case in cases if case.model}) == 5
    assert any(with_plain(case) for case in cases)
    small = {made_small(case) for case in cases}
    assert {case.what for case in small} == {case.what for case in cases}
    assert max(case.bytes for case in small) < 1e6


def test_budgets_of_a_gpu_come_first() -> None:
    count = len(list(budget_cases()))
    assert list(suite_cases("cuda"))[:count] == list(budget_cases())


def test_promises() -> None:
    assert Promise("", 1.0, 1.0).met
    assert not Promise("", 1.1, 1.0).met
    assert Promise("", 50.0, 50.0, at_most=False).met
    assert not Promise("", 49.0, 50.0, at_most=False).met


def test_memory_is_counted_to_the_byte() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1000, dtype=torch.float64)  # 8000
        second = first.repeat(2)  # 16000 more
        del first
        return second.float()  # 8000 more, 8000 less

    call()
    memory = memory_of(call, CPU)
    assert memory.held == 8000
    assert 24000 <= memory.peak < 24100


def test_redistribution_of_the_paper() -> None:
    attentions = torch.rand(2, 3, 6, 6)
    credit, rewards = redistributed(torch.tensor([2.0, -1.0]), attentions, 4, dense_share=0.75)
    row = attentions[1, :, 5, 4:].mean(0)
    torch.testing.assert_close(credit[1], row / row.sum())
    torch.testing.assert_close(rewards[1], -0.75 * credit[1] + torch.tensor([0.0, -0.25]))
    torch.testing.assert_close(rewards.sum(1), torch.tensor([2.0, -1.0]))


# Every suite, at small shapes


def pytest_alone(arguments: list[str]) -> None:
    """``python -m pytest`` in the project's folder."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]  # pytest-benchmark takes no times among parallel workers
    os.chdir(ROOT)
    sys.exit(pytest.main(arguments))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make bench` writes; peers apart, which have tests of their own."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    arguments = [
        "benchmarks",
        "-q",
        "-p",
        "no:cacheprovider",
        "--device",
        "cpu",
        "--small",
        "--benchmark-quiet",
    ]
    arguments += [
        f"--benchmark-json={out}",
        "-k",
        "not doubling and not compiled",
        "--peers",
        str(out.parent),
    ]
    ended = run(pytest_alone, arguments)
    assert ended.returncode == 0, ended.stdout[-3000:]
    return out


def test_every_suite_leaves_its_figures(dry_run: Path) -> None:
    run = load(dry_run)
    suites = {*report.SUITES, "forward", "memory", "host", "loops"}
    assert {info["suite"] for info in run.benchmarks.values()} == suites
    for info in run.benchmarks.values():
        assert info["seconds"] > 0
        assert all(x["low"] <= x["value"] <= x["high"] for x in info["ratios"].values())
    for info in run.suite(*report.SUITES):
        assert info["error_of_bound"] <= 1
        assert info["bytes_read"] > 0
        assert {"ours", "copy"} <= set(info["seconds_of"])
        assert info["ratios"]["copy"]["value"] > 0
    column = run.benchmarks["test_case[column, B 3 S 64 R 40, float32]"]
    assert set(column["ratios"]) == {"copy", "copy into fresh memory", "plain PyTorch", "attention forward"}
    held = run.suite("memory")[0]["held_bytes"]
    assert held["tapped"] < held["eager_forward"]
    assert set(run.missing) == set(PEERS) - {"doubling"}
    assert run.missing["verl"] == "not installed: python -m benchmarks.peers.install verl"
    assert run.missing["rl-triton"] == "needs a GPU"


def test_the_clock_of_the_harness_is_the_projects(dry_run: Path) -> None:
    """pytest-benchmark's own statistics are over the same samples."""
    for result in json.loads(dry_run.read_text())["benchmarks"]:
        assert result["stats"]["median"] == pytest.approx(result["extra_info"]["seconds"], rel=1e-6, abs=1e-9)


# Peers


def fake_slime(folder: Path, factor: float) -> Path:
    """A package with slime's function in it, right if ``factor`` is 1."""
    package = folder / "slime" / "utils"
    package.mkdir(parents=True)
    (package / "ppo_utils.py").write_text(
        f"""import torch
def chunked_gae(rewards, values, gamma, lambd):
    out, a, v = [], 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        a = rewards[:, t] + gamma * v - values[:, t] + {factor} * gamma * lambd * a
        v = values[:, t]
        out.append(a)
    advantages = torch.stack(out[::-1], 1)
    return advantages, advantages + values
"""
    )
    return folder


def measure_in_a_copy(command: list[str], **_: Any) -> Ended:
    """In place of ``subprocess.run``: the same without importing everything anew."""
    return run(measure_as_told, command[3:])


def measure_as_told(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    measure.main()


def runs_with(monkeypatch: pytest.MonkeyPatch, folder: Path) -> PeerRuns:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return PeerRuns(folder / "none", CPU, True, folder)


def test_a_peer_is_measured_beside_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = runs_with(monkeypatch, fake_slime(tmp_path, 1.0))["slime"]
    assert result["version"] == "slime from a path"
    assert len(result["rows"]) == 2
    for row in result["rows"]:
        assert row["disagreement"] < 1e-5
        assert len(row["ours"]["samples"]) == len(row["theirs"]["samples"]) >= 5


def test_a_peer_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", measure_in_a_copy)
    result = runs_with(monkeypatch, fake_slime(tmp_path, 1.01))["slime"]
    for row in result["rows"]:
        assert "does not compute the same" in row["failed"]
        assert "theirs" not in row


def test_a_peer_that_breaks_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", measure_in_a_copy)
    (tmp_path / "slime").mkdir()
    (tmp_path / "slime" / "__init__.py").write_text("")
    runs = runs_with(monkeypatch, tmp_path)
    for _ in range(2):  # it is asked once, and answers every time
        with pytest.raises(PeerMissingError, match=r"does not run: .*No module named 'slime.utils'"):
            runs["slime"]


def test_what_was_measured_stays_where_the_rest_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = runs_with(monkeypatch, fake_slime(tmp_path, 1.0))

    def cut_off(command: list[str], **_: Any) -> None:
        Path(command[4]).write_text(json.dumps({"version": "", "rows": [{"case": "first"}]}))
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", cut_off)
    assert runs["slime"]["rows"] == [{"case": "first"}]
    assert runs["slime"]["ended"].startswith("took longer than")


def test_the_doubling_scan_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for case in PEERS["doubling"].cases("cpu", small=True):
        assert measured(PEERS["doubling"], case, CPU, 0.0)["disagreement"] < 1e-5
    case = Case("gae", Shape(2, 1000), gamma=0.9, lam=0.5)
    arguments = random_arguments(case, CPU, 0)
    for got, want in zip(doubling(case, arguments)(), case.reference(arguments)[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_loops_are_given_what_they_finish() -> None:
    for name, peer in PEERS.items():
        cases = list(peer.cases("cpu", small=False))
        assert cases, name
        if peer.most is not None:
            rows, width = peer.most
            assert all(case.shape.batch <= rows and case.shape.response <= width for case in cases)
        if peer.ragged:
            assert all(len(case.shape.lengths) == case.shape.batch for case in cases)
            assert all(case.shape.live_tokens < case.shape.tokens for case in cases)


def test_installer_pins_versions(tmp_path: Path) -> None:
    for name in install.INSTALLED:
        checkout = tmp_path if name in ("slime", "rl-triton") else None
        calls = install.pip_arguments(name, checkout)
        assert any(pin.startswith("torch==") for pin in calls[0])
        assert any(name in pin for call in calls for pin in call) or checkout is not None
        if checkout is not None:
            assert calls[-1][-1] == str(checkout)
    with pytest.raises(ValueError, match="--path slime=FOLDER"):
        install.pip_arguments("slime", None)
