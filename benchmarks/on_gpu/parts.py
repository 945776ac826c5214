"""Which parts there are, in which order, and how long each may take."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.on_gpu.runner import Line, Part, read_lines

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
WORK = [*PYTHON, "benchmarks.on_gpu.asked"]

SECONDS = {"facts": 45, "smoke": 105, "budgets": 110, "tuning": 110, "races": 70, "tests": 90}
"""Of each part, 530 in all; what one leaves is the next one's."""
AHEAD = 150
"""Seconds that compiling ahead may take, beside the first parts."""
SPARE = 2
"""Cores that compiling and tests leave to whoever measures."""


def workers() -> int:
    return max((os.cpu_count() or 2) - SPARE, 1)


def first(out: Path) -> list[Part]:
    """``make gpu``: the most valuable first, and what others depend on."""
    asked = [Part(name, SECONDS[name], [*WORK, name]) for name in SECONDS if name != "tests"]
    return [*asked, tests(SECONDS["tests"])]


def ahead(out: Path, capability: int) -> Part:
    """All that will be started, compiled on every core while the first parts run."""
    report = Path(tempfile.mkdtemp()) / "compiled.json"
    command = [*PYTHON, "benchmarks.on_gpu.ahead", "compile", str(capability), str(workers()), str(report)]
    return Part("ahead", AHEAD, command, False, functools.partial(read_lines, report))


def tests(seconds: float) -> Part:
    """The tests on compiled kernels, in as many processes as there are cores; as far as they get."""
    folder = Path(tempfile.mkdtemp())
    command = [*PYTHON, "benchmarks.on_gpu.shards", str(folder), str(workers())]
    return Part("tests", seconds, command, False, functools.partial(shards_of, folder))


def shards_of(folder: Path) -> Iterator[Line]:
    """What the shards' reports say: a line for each, and one for each test that failed."""
    for log in sorted(folder.glob("*.log")):
        report = log.with_suffix(".xml")
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        line: Line = {"item": log.stem, "tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        try:
            suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            yield line | {"status": "out of time", "error": f"no report; the last it said: {last[0]}"}
            continue
        for suite in suites:
            for name in ("tests", "failures", "errors", "skipped"):
                line[name] += int(suite.get(name, 0))
        bad = [
            case
            for suite in suites
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        yield line | {"status": "failed" if bad else "ok", "error": f"{len(bad)} tests" if bad else last[0]}
        for case in bad:
            found = case.find("failure") if case.find("failure") is not None else case.find("error")
            text = "" if found is None else f"{found.get('message', '')}\n{found.text or ''}"
            yield {
                "item": f"{case.get('classname')}::{case.get('name')}",
                "status": "failed",
                "error": text[-2500:],
            }


# Another day, or another ten minutes

OURS = "regex:^(attend|rows)_kernel$"
"""Kernels that ncu looks at: those of PyTorch that fill tensors end in _kernel too."""


def more(out: Path) -> tuple[list[Part], dict[str, str]]:
    """``make gpu-more``: what depends on tools and packages that may be there; and of the rest, why not."""
    found: list[Part] = []
    missing: dict[str, str] = {}

    def part(name: str, seconds: float, command: list[str], needs: str) -> None:
        there = bool(shutil.which(needs)) if needs in ("compute-sanitizer", "ncu") else util.find_spec(needs)
        if there:
            found.append(Part(f"more: {name}", seconds, command, False))
        else:
            missing[f"more: {name}"] = f"{needs} is not there"

    pytest = [*PYTHON, "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "benchmarks"]
    timed = [*pytest, "--benchmark-quiet"]
    part(
        "forward and memory",
        150,
        [*timed, "-k", "forward or memory", f"--benchmark-json={out / 'bench.json'}"],
        "pytest_benchmark",
    )
    for case in ("fused, B 32 S 2048 R 1024", "sweep, 2048x4096"):
        command = [
            "ncu",
            "--clock-control",
            "none",
            "--csv",
            "--page",
            "raw",
            "-k",
            OURS,
            "-c",
            "2",
        ]
        for section in (
            "SpeedOfLight",
            "Occupancy",
            "WarpStateStats",
            "SchedulerStats",
            "MemoryWorkloadAnalysis",
        ):
            command += ["--section", section]
        part(f"ncu, {case}", 45, [*command, *WORK, "once", case], "ncu")
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        part(tool, 75, [*command, *WORK, "smoke"], "compute-sanitizer")
    part(
        "compare",
        60,
        [*PYTHON, "attnshape", "compare", "--backend", "triton", "--device", "cuda", "--quick"],
        "typer",
    )
    part("every suite", 240, [*timed, f"--benchmark-json={out / 'suites.json'}"], "pytest_benchmark")
    part("vllm", 500, [*PYTHON, "integrations.vllm.on_gpu", str(out / "vllm")], "vllm")
    part("openrlhf", 500, [*PYTHON, "parity.openrlhf_on_gpu", str(out / "openrlhf")], "openrlhf")
    return found, missing
