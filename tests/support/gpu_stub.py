"""``make gpu`` where there is no GPU: ``python -m support.gpu_stub FOLDER [real]``.

The whole program runs, its runner, its parts and its tables, over the driver that launches nothing: kernels
of ``LAUNCHED`` (``real``: all) are compiled and go through Triton's real launcher, of others only the
source and the key are made. Tensors lie in the host's memory and nobody fills them. What is faked: every
time, every comparison with the reference and of bits, and the results of compiling ahead and of the tests.
Nothing but torch, triton and numpy can be imported of what the project may use.

Each scenario writes to a folder of its own. In ``some`` one part is asked for. In ``faults`` one kernel
hangs, one dies, one leaves a context that cannot be used a number is wrong; in ``late`` a part never ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ABSENT = ("numba", "typer", "rich", "matplotlib", "pytest_benchmark", "transformers", "hypothesis", "pytest")
for name in ABSENT:
    sys.modules[name] = None  # type: ignore[assignment]

from benchmarks.on_gpu import __main__ as program  # noqa: E402
from benchmarks.on_gpu import runner  # noqa: E402
from benchmarks.on_gpu.carried import CACHE  # noqa: E402
from benchmarks.on_gpu.parts import first  # noqa: E402

LAUNCHED = ("moments_kernel", "whiten_kernel", "fold_kernel")
KEYS_OF_BEST = 32
"""What the faked times favour."""


class Faults:
    """What happens when a kernel is to be started, by its name."""

    def __init__(self, **of: str) -> None:
        self.of, self.events, self.wrong = of, -1, False

    def __call__(self, kernel: str) -> None:
        match self.of.get(kernel):
            case "hang":
                # The watcher is told to be patient for a moment only, so that the test need not be.
                os.write(self.events, b'{"event": "patience", "limit": 0.2}\n')
                time.sleep(600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                time.sleep(600)
            case "poison":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            case "wrong":
                self.wrong = True


FAULTS = Faults()


def stub() -> Any:
    from attnshape.bench.measure import WrongResultError
    from attnshape.bench.timing import Timing
    from benchmarks.on_gpu.machine import Dry
    from csrc_triton.host import attention

    class Stub(Dry):
        def time(self, calls: Mapping[str, Sequence[Any]], seconds: float) -> dict[str, Timing]:
            ours = 12e-6 if attention.KEYS != KEYS_OF_BEST else 9e-6
            return {name: Timing((ours if name == "ours" else 1e-5,) * 20, "faked", 1e-5) for name in calls}

        def launches(self, call: Any) -> list[str]:
            return ["a_kernel"]

        def error(self, measure: Callable[[], float]) -> float:
            if FAULTS.wrong:
                FAULTS.wrong = False
                raise WrongResultError("the error of credit is 3 times its bound")
            return 0.5

    return Stub()


def bind_most(launched: Sequence[str] | None) -> None:
    """Launches those named (None: all); of the others makes what a launch would need."""
    from csrc_triton.launch import Launcher

    launch = Launcher.__call__

    def launch_or_bind(self: Any, programs: int, options: dict[str, int], **arguments: Any) -> None:
        name = self.kernel.__name__
        FAULTS(name)
        if launched is None or name in launched:
            launch(self, programs, options, **arguments)
            return
        key = self.key(arguments, options)
        if key not in self.compiled:
            self.compiled[key] = self.source(arguments).hash()

    Launcher.__call__ = launch_or_bind  # type: ignore[method-assign]


class Forked:
    """A copy of this process, as the runner sees one."""

    def __init__(self, process: BaseProcess) -> None:
        self.process, self.pid = process, process.pid or 0

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        import subprocess

        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a copy", timeout or 0.0)
        return self.process.exitcode


REPORT = """<testsuites><testsuite tests="2" failures="1"><testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure message="it broke">here</failure></testcase>
</testsuite></testsuites>
"""


def faked(part: runner.Part) -> None:
    """What compiling ahead and the tests would leave."""
    if part.name == "ahead":
        line = {"compiled": 0, "seconds": 0, "cpu_seconds": 0, "errors": "faked"}
        Path(part.command[-1]).write_text(json.dumps(line))
    else:
        folder = Path(part.command[-2])
        (folder / "shard 00.log").write_text("faked\n")
        (folder / "shard 00.xml").write_text(REPORT)


def work(part: runner.Part, told: dict[str, Any], events: int) -> None:
    if not part.watched:
        faked(part)
        return
    from benchmarks.on_gpu.asked import work

    FAULTS.events = events
    work(part.name, stub(), told, events)


def start(part: runner.Part, told: dict[str, Any], events: int, log: Path) -> runner.Process:
    """Begins a part as a copy of this process, so that nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=lead, args=(part, told, events, log))
    process.start()
    return Forked(process)


def lead(part: runner.Part, told: dict[str, Any], events: int, log: Path) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    work(part, told, events)


def main(folder: Path, real: bool) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    from support.driver import activate, built

    library = folder / "driver"
    library.mkdir()
    os.environ |= {"CUDA_LOG": str(folder / "launches"), "TRITON_CACHE_DIR": str(CACHE)}
    activate(built(library))
    import benchmarks.on_gpu.asked  # noqa: F401  # once, for all copies

    bind_most(None if real else LAUNCHED)
    program.main(folder / "whole", start=start)
    if real:
        return
    program.main(folder / "some", "first", "facts", start=start)
    FAULTS.of = {
        "rows_kernel": "wrong",
        "chunks_kernel": "hang",
        "means_kernel": "die",
        "column_kernel": "poison",
    }
    few = [
        part._replace(seconds=200) for part in first(folder / "faults") if part.name in ("smoke", "budgets")
    ]
    runner.Runner(folder / "faults", start).run(few)
    FAULTS.of = {"chunks_kernel": "sleep"}
    late = [part._replace(seconds=2 if part.name == "smoke" else 0) for part in few]
    runner.GRACE = 0.5
    runner.Runner(folder / "late", start).run(late)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["real"])
