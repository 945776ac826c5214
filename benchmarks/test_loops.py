"""What the compiled loops promise on a CPU beside speed: little memory, and a machine that may be busy."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from attnshape.bench.cases import Case, Shape, random_arguments
from attnshape.bench.measure import check, measure
from attnshape.bench.plain import plain_call
from attnshape.bench.timing import Timing, ratio_of
from benchmarks.cases import made_small
from benchmarks.memory import memory_of
from benchmarks.record import Promise, Recorder
from benchmarks.results import ROOT

SHARE = 0.01
"""Of the inputs: what a call may hold beside its outputs."""
SLOWER = 2.0
"""Times that the ratio to a copy may grow where other processes keep every core busy."""
BUSY = (Shape(64, 128), Shape(256, 1024), Shape(512, 4096))


@pytest.fixture(autouse=True)
def cpu_alone(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the loops on a CPU")


@pytest.mark.parametrize("what", ["gae", "sweep"])
def test_memory(what: str, device: torch.device, small: bool, record: Recorder) -> None:
    case = Case(what, Shape(1024, 4096))  # type: ignore[arg-type]
    case = made_small(case) if small else case
    arguments = random_arguments(case, device, 0)
    check(case, arguments)
    if record.untimed():
        return
    tensors = memory_of(lambda: case.call(arguments), device)
    tracemalloc.start()  # numpy's memory, which the loops work in
    begin = time.perf_counter()
    case.call(arguments)
    took = time.perf_counter() - begin
    scratch = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    beyond = tensors.peak - tensors.held + scratch
    text = f"{beyond / 1e3:.3g} kB beside the outputs, of {case.read / 1e6:.3g} MB read"
    promise = Promise("1% of the inputs", beyond / case.read, SHARE, unit="x")
    record(
        "loops", Timing((took,), "clock", took), promise=promise, case=f"memory, {case.name}", measured=text
    )


FIRST = """
import time
import torch
begin = time.perf_counter()
import attnshape
imported = time.perf_counter()
from attnshape import cpu
loops = time.perf_counter()
x = torch.ones(2, 3)
attnshape.shape_rewards(torch.ones(2), x, x, values=x)
print(imported - begin, loops - imported, time.perf_counter() - loops)
"""


@pytest.fixture(scope="module")
def first_and_second(small: bool, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """Seconds that a process takes to import the package and the loops and to call: the first, the second."""
    if small:
        pytest.skip("what is compiled is never small")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    folder = str(tmp_path_factory.mktemp("cache"))
    environment = os.environ | {"PYTHONPATH": paths, "NUMBA_CACHE_DIR": folder}
    command, found = [sys.executable, "-c", FIRST], []
    for _ in range(2):
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found.append(tuple(map(float, text.split())))
    return found


@pytest.mark.parametrize("which", ["first call ever", "first call of a later process", "import of the loops"])
def test_first_call(
    which: str, request: pytest.FixtureRequest, device: torch.device, record: Recorder
) -> None:
    if record.untimed():
        return
    (_, _, compiled), (_, imported, loaded) = request.getfixturevalue("first_and_second")
    value, limit = {
        "first call ever": (compiled, 10.0),
        "first call of a later process": (loaded, 0.5),
        "import of the loops": (imported, None),
    }[which]
    promise = None if limit is None else Promise(f"{limit:g} s", value, limit)
    text = f"{value:.3g} s"
    record("loops", Timing((value,), "clock", value), promise=promise, case=which, measured=text)


def test_after_other_work(device: torch.device, small: bool, record: Recorder) -> None:
    """What a training loop pays: its one call finds other work's code and data in the caches."""
    case = made_small(Case("gae", BUSY[0])) if small else Case("gae", BUSY[0])
    arguments = random_arguments(case, device, 0)
    check(case, arguments)
    if record.untimed():
        return
    samples = []
    for _ in range(3 if small else 60):
        plain_call(case, arguments)
        begin = time.perf_counter()
        case.call(arguments)
        samples.append(time.perf_counter() - begin)
    timing = Timing(tuple(samples), "clock", statistics.median(samples))
    text = f"{timing.seconds * 1e6:.3g} us after the same in plain PyTorch"
    record("loops", timing, case=f"after other work, {case.name}", measured=text)


@contextmanager
def every_core_busy() -> Iterator[None]:
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(torch.get_num_threads())
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.parametrize("shape", BUSY, ids=str)
def test_a_busy_machine(
    shape: Shape, device: torch.device, small: bool, seconds: float, record: Recorder
) -> None:
    case = made_small(Case("gae", shape)) if small else Case("gae", shape)
    if record.untimed():
        check(case, random_arguments(case, device, 0))
        return
    idle = measure(case, device, seconds, plain=False)
    with every_core_busy():
        busy = measure(case, device, 4 * seconds, plain=False)
    before, now = (ratio_of(m.ours, m.copy).value for m in (idle, busy))
    text = f"{before:.3g} times as long as a copy alone, {now:.3g} beside busy processes"
    promise = Promise(f"grows {SLOWER:g} x at most", now / before, SLOWER, unit="x")
    record("loops", busy.ours, promise=promise, case=f"busy, {case.name}", measured=text)
