"""The report, the section of docs/performance.md and the guard: every figure from a file."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guard, report
from benchmarks.on_gpu.summary import write_summary
from benchmarks.results import ROOT, cards, committed, load

MACHINE = {
    "kind": "abacus",
    "device": "Abacus",
    "device_type": "cpu",
    "cpus": 2,
    "threads": 2,
    "python": "3.11.0",
    "system": "Linux",
    "versions": {"torch": "2.13.0"},
}


def ratio(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def info(case: str, seconds: float, **facts: Any) -> dict[str, Any]:
    return {"case": case, "how": "clock", "seconds": seconds, "wall_seconds": seconds, "ratios": {}} | facts


CASE = info(
    "gae, 256x1024",
    2e-3,
    what="gae",
    bytes_read=3_000_000,
    bytes_written=2_000_000,
    error_of_bound=0.1,
    ratios={"copy": ratio(0.25), "plain PyTorch": ratio(40.0)},
    seconds_of={"ours": 2e-3, "copy": 5e-4, "plain PyTorch": 8e-2},
)
PEER = info(
    "gae, 256 rows, 1024 the longest, padded",
    1e-3,
    peer="verl",
    peer_version="verl 0.9.1",
    tokens=262144,
    disagreement=2e-7,
    ratios={"verl": ratio(61.0)},
    seconds_of={"ours": 1e-3, "verl": 6.1e-2},
    budget={"text": "50 x verl", "value": 61.0, "limit": 50.0, "at_most": False, "unit": "x", "met": True},
)
FORWARD = info(
    "forward, B 2 S 1024",
    1.05,
    overhead=ratio(1.05, 0.01),
    seconds_of={"bare": 1.0, "ours": 1.05, "eager": 2.0},
    out_of_memory=[],
    budget={
        "text": "1.03 x the bare forward",
        "value": 1.05,
        "limit": 1.03,
        "at_most": True,
        "unit": "x",
        "met": False,
    },
)
MEMORY = info(
    "memory, B 1 S 2048",
    1.0,
    keys=2048,
    bare_peak_bytes=68_000_000,
    extra_peak_bytes={"shaped": 4_200_000},
    held_bytes={"tapped": 4_100_000},
    out_of_memory=["eager"],
)
HOST = info("gae, 8x256, eager", 2e-4)
BENCHMARKS = {
    "test_case[gae]": ("recurrence", CASE),
    "test_peer[verl]": ("peers", PEER),
    "test_forward[1024]": ("forward", FORWARD),
    "test_memory[2048]": ("memory", MEMORY),
    "test_host_cost[gae]": ("host", HOST),
}


def write(path: Path, benchmarks: dict[str, tuple[str, dict[str, Any]]], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = [{"name": n, "group": group, "extra_info": x} for n, (group, x) in benchmarks.items()]
    data = {
        "machine_info": MACHINE,
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-24T20:00:00+00:00",
        "missing": {"slime": "not installed"},
        "benchmarks": results,
    }
    path.write_text(json.dumps(data | more))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "abacus" / "bench.json", BENCHMARKS)


def test_the_pages_section_is_that_of_the_committed_runs() -> None:
    """If this fails: python -m benchmarks.report."""
    assert report.page_section(committed(), cards()) in report.PAGE.read_text()


def test_reports_are_those_of_the_committed_runs() -> None:
    for run in committed():
        assert run.path.with_name("report.md").read_text() == report.report(run)
        assert run.path.parent.name == run.machine["kind"]


def test_report(file: Path) -> None:
    lines = report.report(load(file)).splitlines()
    assert any("2026-11-24" in x and "0123456789ab" in x and "Abacus, 2 threads" in x for x in lines)
    line = {x.split(" | ")[0]: x for x in lines if x.startswith("| ")}
    assert "| 2 ms | 5 MB | 500 us | 25.0% (22.5% to 27.5%) | 40 x (36 to 44) |" in line["| gae, 256x1024"]
    assert line["| verl 0.9.1"].endswith("| 1 ms | 61 ms | 61 x (54.9 to 67.1) | 2.0e-07 | 50 x verl: met |")
    assert (
        "| 1.0500 (1.0395 to 1.0605) | 1.03 x the bare forward: **missed** |" in line["| forward, B 2 S 1024"]
    )
    assert "| 68 MB | 4.2 MB | out of memory | 4.1 MB | out of memory |" in line["| memory, B 1 S 2048"]
    assert line["| gae, 8x256, eager"] == "| gae, 8x256, eager | 200 us |  |"
    assert "- missing: slime, not installed" in lines
    assert "## Whitening" not in lines  # nothing was measured
    on_gpu = CASE | {"wall_seconds": 3e-3, "read_seconds": 4e-4, "estimate_seconds": 1e-3}
    gpu = write(file.with_name("gpu.json"), {"test_case[gae]": ("recurrence", on_gpu)})
    assert "| 3 ms | 400 us | 1 ms |  |" in report.report(load(gpu))


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (1e-7, "0.1 us")]
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(2.5e9, "2.5 GB"), (123e6, "123 MB"), (4560, "4.56 kB")])
def test_bytes_in_words(size: float, text: str) -> None:
    assert report.bytes_text(size) == text


def test_plots_are_drawn_of_what_there_is(file: Path, tmp_path: Path) -> None:
    assert report.draw(load(file)) == ["roofline.png", "peers.png", "memory.png"]
    for name in report.PLOTS:
        assert file.with_name(name).read_bytes().startswith(b"\x89PNG")
    alone = write(tmp_path / "alone" / "bench.json", {"test_host_cost[gae]": ("host", HOST)})
    assert report.draw(load(alone)) == []


def test_the_pages_section_names_file_machine_and_versions(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", file.parents[1])
    section = report.page_section([load(file)])
    assert "[`abacus/bench.json`](../abacus/bench.json) of 2026-11-24 (Abacus, 2 threads" in section
    assert "torch 2.13.0" in section
    assert "| forward, B 2 S 1024: 1.03 x the bare forward | 1.05 x | **missed** |" in section
    assert "| verl 0.9.1 | 61 to 61 |" in section
    assert "| `gae` | 1 | 40 to 40 | 25.0% to 25.0% |" in section
    assert "Missing: slime (not installed)." in section
    timed = {"part": "budgets", "item": "gae, 3x4", "case": "gae, 3x4", "met": True, "budget_us": 9.0}
    timed |= {"us": dict.fromkeys(("value", "low", "high"), 8.0), "budget": "9 us"}
    machine = {"item": "machine", "part": "facts", "device": "A card", "commit": "0123456789ab"}
    machine["versions"] = {"torch": "2.11.0"}
    write_summary(file.parent, [machine, timed])
    section = report.page_section([], [file.with_name("summary.json")])
    assert (
        "[`abacus/summary.md`](../abacus/summary.md) (A card; torch 2.11.0, triton None; commit 0123456789)"
        in section
    )
    assert "| gae, 3x4 | 8.0 (8.0 to 8.0) |  |  | 9 us | 9.0 | met |  |" in section


def test_the_pages_section_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    section = report.page_section([])
    for _ in range(2):
        report.write_page(section, page)
        assert page.read_text() == f"before\n{section}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no section between"):
        report.write_page(section, page)


def test_files_that_are_given_do_not_reach_the_page(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report.PAGE.read_text()
    monkeypatch.setattr(sys, "argv", ["report", str(file)])
    report.main()
    assert report.PAGE.read_text() == before
    assert file.with_name("report.md").read_text() == report.report(load(file))


def test_what_is_no_result_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    for text in ("", "[]", '{"benchmarks": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bench\.json: not a result of `make bench`"):
            load(path)


# The guard


def changed(tmp_path: Path, over: str, value: float, spread: float = 0.1) -> Path:
    benchmarks = copy.deepcopy(BENCHMARKS)
    benchmarks["test_case[gae]"][1]["ratios"][over] = ratio(value, spread)
    return write(tmp_path / "new" / "bench.json", benchmarks, missing={})


@pytest.mark.parametrize(
    ("value", "spread", "verdict"),
    [
        (40.0, 0.1, (0, 0)),
        (34.0, 0.1, (0, 0)),  # up to 37.4, where the base began at 36
        (30.0, 0.1, (1, 0)),  # up to 33
        (30.0, 0.3, (0, 0)),  # the run itself is that noisy
        (60.0, 0.1, (0, 1)),
    ],
)
def test_worse_is_what_the_spread_does_not_explain(
    file: Path, tmp_path: Path, value: float, spread: float, verdict: tuple[int, int]
) -> None:
    text = guard.report(load(file), load(changed(tmp_path, "plain PyTorch", value, spread)))
    worse, better = verdict
    assert text.startswith(f"3 ratios compared with {file}: {worse} worse, {better} better")
    assert ("worse: test_case[gae], over plain PyTorch: 40.0 (36.0 to 44.0) before, 30.0" in text) == bool(
        worse
    )


def test_the_guard_names_what_is_gone(file: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new" / "bench.json", {"test_case[gae]": BENCHMARKS["test_case[gae]"]})
    text = guard.report(load(file), load(new))
    assert "not measured now: test_peer[verl]" in text
    assert "missing: slime: not installed" in text


def test_the_guard_never_fails(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = changed(tmp_path, "plain PyTorch", 1.0)
    monkeypatch.setattr(sys, "argv", ["guard", str(new), str(file)])
    guard.main()
    assert "1 worse" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["guard", str(new)])
    guard.main()
    assert "no run of this type of machine is committed" in capsys.readouterr().out


def test_results_name_no_host() -> None:
    for run in committed():
        assert '"node"' not in (ROOT / run.path).read_text()
