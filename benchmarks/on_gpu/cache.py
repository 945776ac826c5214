"""What kernels compile to, before a GPU's minutes are spent on it.

``compile`` fills Triton's cache with every specialisation that the parts will start, on all cores: a
process beside the first part. ``build`` does so on a machine without a GPU and packs the result, to be
carried to one whose Triton is the same build; ``unpacked`` lays it where it was made, since Triton's cache
holds whole paths.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CACHE = Path(tempfile.gettempdir()) / "attnshape-on-gpu"
"""Where Triton's cache lies, the same on both machines."""
PACKED = ROOT / ".gpu-cache"
ARCHIVE, MANIFEST = "cache.tgz", "manifest.json"
LEFT_OUT = (".llir", ".ttgir", ".ttir", ".source")
"""Stages that nobody reads again."""


@functools.cache
def source_digest() -> str:
    """Of the kernels and what launches them."""
    files = sorted((ROOT / "csrc_triton").rglob("*.py"))
    text = b"".join(path.relative_to(ROOT).as_posix().encode() + path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:16]


def compiler_digest() -> str:
    """Of Triton's own code, as far as a build differs from another of the same version."""
    found = util.find_spec("triton")
    if found is None or found.origin is None:
        return "none"
    library = Path(found.origin).parent / "_C" / "libtriton.so"
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def manifest() -> dict[str, str]:
    """What a cache is good for."""
    return {
        "triton": metadata.version("triton"),
        "build": compiler_digest(),
        "python": sysconfig.get_config_var("SOABI") or platform.python_version(),
        "machine": platform.machine(),
        "source": source_digest(),
        "folder": str(CACHE),
    }


def unpacked(packed: Path = PACKED) -> str:
    """Lays a carried cache where Triton will look; says what became of it."""
    if not (packed / MANIFEST).exists():
        return "no cache was carried: kernels are compiled here"
    carried, here = json.loads((packed / MANIFEST).read_text()), manifest()
    other = [
        f"{name} is {here[name]}, of the cache {carried.get(name)}"
        for name in here
        if carried.get(name) != here[name]
    ]
    if other:
        return f"the carried cache is not used: {'; '.join(other)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tarfile.open(packed / ARCHIVE) as archive:
        archive.extractall(CACHE, filter="data")
    return f"a cache of {len(list(CACHE.iterdir()))} entries was carried"


def pack(packed: Path = PACKED) -> int:
    """Packs Triton's cache, without what nobody reads again; its bytes."""
    packed.mkdir(exist_ok=True)
    (packed / MANIFEST).write_text(json.dumps(manifest(), indent=1) + "\n")
    with tarfile.open(packed / ARCHIVE, "w:gz") as archive:
        for path in sorted(CACHE.rglob("*")):
            if path.is_file() and path.suffix not in LEFT_OUT:
                archive.add(path, path.relative_to(CACHE))
    return (packed / ARCHIVE).stat().st_size


# What is to be compiled


class Wanted(NamedTuple):
    """A specialisation; ``item`` is the first that starts it."""

    item: str
    source: Any
    options: dict[str, Any]


def wanted(parts: Sequence[str] = ("smoke", "budgets", "races", "tuning")) -> tuple[list[Wanted], list[str]]:
    """Every specialisation that the parts start, in their order; and the items that failed, and why.

    The parts run on a machine that computes nothing, with a launcher that launches nothing.
    """
    from benchmarks.on_gpu.machine import Dry
    from benchmarks.on_gpu.work import Worker, items_of
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
            told = {"done": [], "broken": {}, "seconds": math.inf, "bandwidth": None}
            Worker(machine, told, say).run(items_of(part, machine))
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]
    return list(found.values()), failures


_TO_COMPILE: list[Wanted] = []
"""Of this process and its copies."""


def _compile(place: int, capability: int) -> tuple[str, float, str]:
    import triton
    from triton.backends.compiler import GPUTarget

    begun, (item, source, options) = time.monotonic(), _TO_COMPILE[place]
    error = ""
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
