"""Each budget's call timed beside a copy of its bytes, and what its thread pays for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from attnshape.bench.cases import Case, Shape
from attnshape.bench.measure import check
from attnshape.bench.timing import Ratio, ratio_of
from benchmarks.cases import FORWARD, SMALL, Budget, budget_cases, launches
from benchmarks.on_gpu.machine import Machine
from benchmarks.on_gpu.work import Item, Worker

HOST = (
    (Case("fused", SMALL), 40e-6),
    (Case("sweep", Shape(SMALL.batch, SMALL.response)), 40e-6),
    (Case("gae", Shape(SMALL.batch, SMALL.response)), 25e-6),
)
"""What a call may cost the thread that makes it, in seconds."""
SECONDS = 0.4
"""Of one timing, about."""


def items(machine: Machine) -> Iterator[Item]:
    for case, budget in budget_cases():
        yield Item(case.name, functools.partial(timed, case=case, budget=budget), 60)
    for case, limit in HOST:
        yield Item(f"host, {case.name}", functools.partial(host, case=case, limit=limit))
    for case, _ in budget_cases():
        yield Item(f"profile, {case.name}", functools.partial(profiled, case=case), 60)


def timed(worker: Worker, case: Case, budget: Budget) -> dict[str, Any]:
    machine = worker.machine
    arguments = worker.arguments(case)
    with worker.watched() as ran:
        machine.call(case, arguments[0])
    started = len(ran)
    with worker.watched():
        error = worker.error(lambda: check(case, arguments[0], "vectorized"))
    calls = {
        "ours": [functools.partial(machine.call, case, x) for x in arguments],
        "copy": machine.copies(case.bytes, len(arguments)),
        "read": machine.reads(case.bytes, len(arguments)),
    }
    if budget.times_forward:
        calls[FORWARD] = machine.forwards(arguments)
    timings = machine.time(calls, SECONDS)
    ours, copy = timings["ours"], timings["copy"]
    forward = timings.get(FORWARD)
    limit = budget.limit(copy.seconds, forward_seconds=forward.seconds if forward else 0.0)
    return {
        "case": case.name,
        **error,
        "started": started,
        "us": spread(ours.samples),
        "how": ours.how,
        "copy_us": spread(copy.samples),
        "read_us": spread(timings["read"].samples),
        **({"forward_us": spread(forward.samples)} if forward else {}),
        "bytes": case.bytes,
        "share_of_copy": ratio_of(copy, ours)._asdict(),
        "budget": str(budget),
        "budget_us": None if limit is None else limit * 1e6,
        "met": None if limit is None else ours.seconds <= limit,
    }


def spread(samples: tuple[float, ...]) -> dict[str, float]:
    """Microseconds: the median, and the 10th and 90th percentile."""
    ordered = sorted(samples)
    tenth = len(ordered) // 10
    middle = Ratio(ordered[len(ordered) // 2], ordered[tenth], ordered[-1 - tenth])
    return {name: round(x * 1e6, 3) for name, x in middle._asdict().items()}


def host(worker: Worker, case: Case, limit: float) -> dict[str, Any]:
    machine = worker.machine
    arguments = machine.arguments(case)
    with worker.watched():
        machine.call(case, arguments)
    timing = machine.host_time(functools.partial(machine.call, case, arguments))
    return {
        "case": f"host, {case.name}",
        "us": spread(timing.samples),
        "budget": f"{limit * 1e6:.0f} us of its thread",
        "budget_us": limit * 1e6,
        "met": timing.seconds <= limit,
    }


def profiled(worker: Worker, case: Case) -> dict[str, Any]:
    """The launches of a call: what is called fused is one."""
    machine = worker.machine
    arguments = machine.arguments(case)
    with worker.watched():
        machine.call(case, arguments)
    seen = machine.launches(functools.partial(machine.call, case, arguments))
    return {"case": case.name, "launches": seen, "as_promised": len(seen) == launches(case)}
