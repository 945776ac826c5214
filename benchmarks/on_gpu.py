"""All that needs a GPU, in one call: ``python -m benchmarks.on_gpu OUT``; what ``make gpu`` runs.

First side by side: the tests on compiled kernels, in shards; the comparison with the reference;
compute-sanitizer where it is there; and the benchmarks untimed, which compiles their kernels. Then, with the
GPU to themselves, the tests of races and the benchmarks. Every part has a process and a time limit of its
own, and what it found is kept whatever the others do; the exit status is 1 if one failed. A budget that is
missed is a result: ``report.md`` says so.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.report import report
from benchmarks.results import NAME, ROOT, load

RACES = ROOT / "tests" / "test_gpu.py"
# Warnings are errors where the versions are pinned; here they are whatever the machine has.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
BENCHMARKS = [*PYTEST, str(ROOT / "benchmarks")]
ON_GPU = re.compile(r"cuda\.is_available\(\)|^from support\.(backends|columns|shaping) import", re.MULTILINE)
"""Of a test file that runs on a GPU what it can."""
LOG_TAIL = 200_000
"""Characters of a part's output that are kept."""


class Part(NamedTuple):
    name: str
    command: list[str]
    seconds: float


class Ended(NamedTuple):
    name: str
    status: int | str
    seconds: float
    output: str


def pytest_part(name: str, seconds: float, folder: Path, *arguments: str) -> Part:
    junit = f"--junitxml={folder / name.replace(' ', '-')}.xml"
    return Part(name, [*PYTEST, junit, *arguments], seconds)


def parts_together(folder: Path, shards: int, seconds: float) -> list[Part]:
    on_gpu = [p for p in sorted(RACES.parent.rglob("test_*.py")) if ON_GPU.search(p.read_text())]
    files = [str(p) for p in on_gpu if p != RACES]
    parts = [
        pytest_part(f"tests {i}", seconds, folder, f"--shard={i}/{shards}", *files) for i in range(shards)
    ]
    untimed = [*BENCHMARKS, "--benchmark-disable"]
    parts.append(Part("benchmarks, untimed", untimed, seconds))
    compare = [
        sys.executable,
        "-m",
        "attnshape",
        "compare",
        "--backend",
        "triton",
        "--device",
        "cuda",
        "--quick",
    ]
    parts.append(Part("compare", compare, seconds))
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *untimed, "--small"]
            parts.append(Part(tool, command, seconds))
    return parts


def benchmarks_part(out: Path, seconds: float) -> Part:
    return Part("benchmarks", [*BENCHMARKS, "--benchmark-quiet", f"--benchmark-json={out / NAME}"], seconds)


def run(parts: Sequence[Part], folder: Path) -> list[Ended]:
    """Runs the parts side by side; one that takes too long is interrupted, so that it can still report."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    running = []
    for part in parts:
        log = (folder / f"{part.name}.log").open("w+")
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        running.append((part, process, log, time.monotonic()))
    ended = []
    for part, process, log, start in running:
        status: int | str
        try:
            status = process.wait(max(start + part.seconds - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        ended.append(Ended(part.name, status, time.monotonic() - start, log.read()[-LOG_TAIL:]))
        log.close()
    return ended


def merged(reports: Sequence[Path]) -> ElementTree.ElementTree:
    """One JUnit report of several."""
    suites = ElementTree.Element("testsuites")
    for path in reports:
        suites.extend(ElementTree.parse(path).getroot().iter("testsuite"))
    return ElementTree.ElementTree(suites)


def summary(ended: Sequence[Ended], tests: ElementTree.ElementTree) -> str:
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in tests.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    lines = ["| part | status | ended after s |", "|---|---|---|"]
    lines += [f"| {x.name} | {'ok' if x.status == 0 else x.status} | {x.seconds:.0f} |" for x in ended]
    return "\n".join([*lines, "", ", ".join(f"{n} {name}" for name, n in counts.items()), ""])


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = max((os.cpu_count() or 2) - 2, 1)
        stages = [
            parts_together(folder, shards, 260),
            [pytest_part("races", 80, folder, str(RACES))],
            [benchmarks_part(out, 240)],
        ]
        ended: list[Ended] = []
        for stage in stages:
            ended += run(stage, folder)
            tests = merged(sorted(folder.glob("*.xml")))
            tests.write(out / "tests.xml")
            (out / "summary.md").write_text(summary(ended, tests))
            (out / "log.txt").write_text("\n".join(f"==== {x.name}\n{x.output}" for x in ended))
    if (out / NAME).exists() and (out / NAME).stat().st_size:
        (out / "report.md").write_text(report(load(out / NAME)))
    for x in ended:
        if x.status != 0:
            print(f"==== {x.name}\n{x.output[-3000:]}")
    print((out / "summary.md").read_text())
    return int(any(x.status != 0 for x in ended))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
