"""The parts that are workers: ``python -m benchmarks.on_gpu.asked PART``; ``once CASE`` is for a profiler."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.cases import budget_cases
from benchmarks.on_gpu import budgets, facts, races, smoke, tuning
from benchmarks.on_gpu.machine import Cuda, Machine
from benchmarks.on_gpu.work import Item, Worker

ROOMS = {"facts": facts, "smoke": smoke, "budgets": budgets, "tuning": tuning, "races": races}


def items_of(part: str, machine: Machine) -> Iterator[Item]:
    return ROOMS[part].items(machine)  # type: ignore[attr-defined, no-any-return]


def work(part: str, machine: Machine, told: dict[str, Any], events: int) -> None:
    """All of a part; ``events`` is where the watcher listens."""
    with os.fdopen(events, "w", buffering=1) as out:

        def say(event: dict[str, Any]) -> None:
            out.write(json.dumps(event, default=str) + "\n")

        machine.synchronize()  # a GPU that does not answer is found here
        Worker(machine, told, say).run(items_of(part, machine))


def once(name: str, machine: Machine) -> None:
    """One call of a budget's case, for a profiler: compiled before, then alone."""
    [case] = [case for case, _ in budget_cases() if case.name == name]
    arguments = machine.arguments(case)
    for _ in range(2):
        machine.call(case, arguments)
        machine.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "once":
        once(sys.argv[2], Cuda())
    else:
        # By hand, or below another tool, nobody listens and nothing is known.
        alone = json.dumps({"done": [], "broken": {}, "seconds": 1e9})
        told = json.loads(os.environ.get("ON_GPU_TOLD", alone))
        work(sys.argv[1], Cuda(), told, int(os.environ.get("ON_GPU_EVENTS", "1")))
