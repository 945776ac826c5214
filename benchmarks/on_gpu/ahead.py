"""Compiling ahead: Triton's cache filled with every specialisation that the parts will start.

``compile`` does so on all cores, a process beside the first part; ``build`` where there is no GPU, over a
driver that launches nothing, and packs the result to be carried.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.on_gpu.carried import CACHE, PACKED, ROOT, manifest, pack


class Wanted(NamedTuple):
    """A specialisation; ``item`` is the first that starts it."""

    item: str
    source: Any
    options: dict[str, Any]


def wanted(parts: Sequence[str] = ("smoke", "budgets", "races", "tuning")) -> tuple[list[Wanted], list[str]]:
    """Every specialisation that the parts start, in their order; and the items that failed, and why.

    The parts run on a machine that computes nothing, with a launcher that launches nothing.
    """
    from benchmarks.on_gpu.asked import items_of
    from benchmarks.on_gpu.machine import Dry
    from benchmarks.on_gpu.work import Worker
    from csrc_triton.launch import Launcher

    found: dict[Any, Wanted] = {}
    at, failures = [""], list[str]()

    def capture(self: Any, programs: int, options: dict[str, Any], **arguments: Any) -> None:
        source = self.source(arguments)
        found.setdefault((source.hash(), *sorted(options.items())), Wanted(at[0], source, dict(options)))

    def say(event: dict[str, Any]) -> None:
        at[0] = event.get("name", at[0])
        if event.get("status", "ok") != "ok":
            failures.append(f"{event['item']}: {event.get('error')}")

    launch, Launcher.__call__ = Launcher.__call__, capture  # type: ignore[method-assign]
    try:
        for part in parts:
            machine = Dry()
            told = {"done": [], "broken": {}, "seconds": math.inf}
            Worker(machine, told, say).run(items_of(part, machine))
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]
    return list(found.values()), failures


_TO_COMPILE: list[Wanted] = []
"""Of this process and its copies."""


def _compile(place: int, capability: int) -> tuple[str, float, str]:
    import triton
    from triton.backends.compiler import GPUTarget

    from csrc_triton.launch import fitted

    begun, (item, source, options) = time.monotonic(), _TO_COMPILE[place]
    error = ""
    try:
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=fitted(options, target))
        # Older Tritons compile a launcher in C for each signature.
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    except Exception as found:
        error = f"{type(found).__name__}: {found}"[:500]
    return f"{source.fn.__name__}, {item}", time.monotonic() - begun, error


def compile_all(capability: int, workers: int, report: Path) -> None:
    """Fills Triton's cache; writes what it took."""
    import triton  # noqa: F401  # before the processes part

    begun = time.monotonic()
    specialisations, failures = wanted()
    _TO_COMPILE.extend(specialisations)
    captured = time.monotonic() - begun
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        found = list(pool.map(functools.partial(_compile, capability=capability), range(len(_TO_COMPILE))))
    errors = failures + [f"{name}: {error}" for name, _, error in found if error]
    line = {
        "compiled": sum(not error for _, _, error in found),
        "seconds": round(time.monotonic() - begun, 1),
        "seconds_to_find_them": round(captured, 1),
        "cpu_seconds": round(sum(seconds for _, seconds, _ in found), 1),
        "workers": workers,
        "errors": errors,
    }
    report.write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


def build(capability: int, workers: int) -> None:
    """``make gpu-cache``: where no GPU is, over a driver that launches nothing."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.driver import activate, built

    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        activate(built(Path(folder)))
        compile_all(capability, workers, Path(folder) / "report")
    print(f"{PACKED}: {pack() / 1e6:.1f} MB for {json.dumps(manifest())}")
    print("carry it with the working tree; `make gpu` lays it out, or says why not")


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    os.environ.pop("TRITON_INTERPRET", None)
    match sys.argv[1:]:
        case ["compile", capability, workers, report]:
            compile_all(int(capability), int(workers), Path(report))
        case ["build"] | ["build", _] as given:
            build(int([*given, "90"][1]), os.cpu_count() or 1)
        case other:
            sys.exit(f"got {' '.join(other)}; want compile CAPABILITY WORKERS REPORT, or build [CAPABILITY]")
