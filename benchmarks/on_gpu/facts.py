"""What machine this is, and the bandwidth that budgets are shares of."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata, util
from typing import Any

import torch

from attnshape.bench.machine import machine_facts
from attnshape.bench.timing import Call
from benchmarks.on_gpu.carried import source_digest
from benchmarks.on_gpu.machine import Machine
from benchmarks.on_gpu.work import Item, Worker

SIZES = (1 << 31, 1 << 28, 1 << 24)
"""Bytes that a copy moves; a large one's bandwidth is what budgets are shares of."""
PACKAGES = ("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "numba", "vllm", "openrlhf", "verl")


def items(machine: Machine) -> Iterator[Item]:
    yield Item("machine", lambda worker: facts_of(worker.machine), 60)
    for size in SIZES:
        calls = functools.partial(machine.copies, size, 2)
        yield Item(f"copy of {size >> 20} MB", functools.partial(bandwidth, size=size, calls=calls))
    reads = functools.partial(machine.reads, SIZES[0], 2)
    yield Item("read of 2048 MB", functools.partial(bandwidth, size=SIZES[0], calls=reads), 60)
    yield Item("a launch", launch_seconds)


def facts_of(machine: Machine) -> dict[str, Any]:
    facts = machine_facts(machine.device)
    if machine.device.type == "cuda":
        of = torch.cuda.get_device_properties(machine.device)
        facts |= {
            "multiprocessors": of.multi_processor_count,
            "cache_bytes": of.L2_cache_size,
            "memory_bytes": of.total_memory,
            "capability": [of.major, of.minor],
            "cuda": torch.version.cuda,
        }
    return facts | {
        "source": source_digest(),
        "commit": said("git", "rev-parse", "HEAD"),
        "smi": said(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu",
            "--format=csv,noheader",
        ),
        "compiler": said("gcc", "--version").split("\n")[0],
        "packages": {name: metadata.version(name) for name in PACKAGES if there(name)},
        "tools": [name for name in ("compute-sanitizer", "ncu", "nvcc", "cuobjdump") if shutil.which(name)],
    }


def there(package: str) -> bool:
    try:
        return bool(metadata.version(package)) or util.find_spec(package) is not None
    except metadata.PackageNotFoundError:
        return False


def said(*command: str) -> str:
    """What a program prints, if it is there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def bandwidth(worker: Worker, size: int, calls: Callable[[], list[Call]]) -> dict[str, Any]:
    """Bytes that move in a second, those of a copy read and written."""
    timing = worker.machine.time({"it": calls()}, 0.3)["it"]
    return {"bytes": size, "bytes_per_s": size / timing.seconds, "samples": timing.samples[:50]}


def launch_seconds(worker: Worker) -> dict[str, Any]:
    """What a launch adds that has next to nothing to do: replayed in a graph, and eagerly by its thread."""
    x = torch.ones(1, device=worker.machine.device)
    timing = worker.machine.time({"it": [lambda: x.add_(1)] * 20}, 0.1)["it"]
    return {
        "launch_seconds": timing.seconds,
        "host_seconds": worker.machine.host_time(lambda: x.add_(1)).seconds,
    }
