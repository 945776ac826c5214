"""What only a GPU can show of bits: under load, on streams, in graphs, in another batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnshape.bench.cases import Case, Shape, outputs_of
from attnshape.problems import mapped
from benchmarks.cases import COLUMN, LONG, SMALL, UNEQUAL
from benchmarks.on_gpu.machine import Machine, Outputs
from benchmarks.on_gpu.tuning import Constants, Cut, injected
from benchmarks.on_gpu.work import Item, Worker

LONGER = Case("fused", Shape(2, 8192, 16384))
"""In three launches."""
CASES = [
    Case("fused", SMALL),
    Case("fused", Shape(8, 1024, 2048)),
    LONGER,
    Case("credit", Shape(8, 1024, 2048)),
    Case("row", Shape(8, 1024, 2048)),
    *(Case("sweep", shape) for shape in (Shape(300, 700), *LONG, *UNEQUAL)),
    Case("gae", Shape(300, 700)),
    Case("gae", LONG[0]),
    Case("whiten", Shape(300, 700)),
    Case("column", COLUMN._replace(batch=1)),
]
REPEATS = 200
COMPILED = (CASES[0], CASES[2], CASES[6], CASES[10])


def items(machine: Machine) -> Iterator[Item]:
    for ask in (repeats_under_load, rows_in_any_batch, replays, two_streams, two_graphs):
        for case in CASES:
            if ask is not rows_in_any_batch or divisible(case):
                name = f"{ask.__name__.replace('_', ' ')}: {case.name}"
                yield Item(name, functools.partial(asked, case=case, ask=ask))
    for how, case, constants in (
        ("dependent launches", LONGER, {"attention.DEPENDENT": True}),
        ("reading on", CASES[1], {"attention.chunks_per_program": Cut(21, None)}),
    ):
        for ask in (repeats_under_load, replays, two_streams):
            name = f"{ask.__name__.replace('_', ' ')}, {how}: {case.name}"
            yield Item(name, functools.partial(asked, case=case, ask=ask, constants=constants))
    for case in COMPILED:
        yield Item(f"torch.compile: {case.name}", functools.partial(asked, case=case, ask=compiled), 120)


def divisible(case: Case) -> bool:
    """Whether its rows are their own."""
    return case.what != "whiten" and not case.shape.packed and case.shape.batch > 1


def asked(
    worker: Worker, case: Case, ask: Callable[[Machine, Case], Tensor], constants: Constants | None = None
) -> dict[str, Any]:
    """How many outputs differed, and of how many calls."""
    machine = worker.machine
    with injected(constants or {}):
        with worker.watched():
            prepared(machine, case)()
        differed = int(ask(machine, case).sum())
    line: dict[str, Any] = {
        "case": case.name,
        "asked": ask.__name__,
        "differed": differed,
    }
    return (
        line if differed == 0 else line | {"status": "wrong", "error": f"{differed} outputs differ in a bit"}
    )


def prepared(machine: Machine, case: Case, seed: int = 0) -> Callable[[], Outputs]:
    arguments = machine.arguments(case, seed)
    return lambda: outputs_of(case.what, machine.call(case, arguments))


def repeats_under_load(machine: Machine, case: Case) -> Tensor:
    """The same call again and again, while others have the multiprocessors at times."""
    call, load = prepared(machine, case), machine.load()
    want = call()
    found = torch.zeros((), dtype=torch.int64, device=machine.device)
    for turn in range(REPEATS):
        load(turn)
        found += machine.differ(call(), want)
    machine.synchronize()
    return found


def rows_in_any_batch(machine: Machine, case: Case) -> Tensor:
    """Some rows alone, where programs are as many as they need, against the same in the whole batch."""
    arguments, batch = machine.arguments(case), case.shape.batch
    whole = outputs_of(case.what, machine.call(case, arguments))
    found = torch.zeros((), dtype=torch.int64, device=machine.device)
    for low, high in {(0, 1), (batch - 1, batch), (batch // 3, batch // 3 + max(batch // 2, 1))}:
        part = mapped(arguments, lambda x, low=low, high=high: x[low:high] if x.ndim else x)
        got = outputs_of(case.what, machine.call(case, part))
        found += machine.differ(got, {name: x[low:high] for name, x in whole.items()})
    return found


def replays(machine: Machine, case: Case) -> Tensor:
    """A graph's replays, with inputs that are other ones by then."""
    arguments, others = (machine.arguments(case, seed) for seed in range(2))
    replay, outputs = machine.capture(lambda: outputs_of(case.what, machine.call(case, arguments)))
    want = outputs_of(case.what, machine.call(case, others))
    copy_into(arguments, others)
    found = torch.zeros((), dtype=torch.int64, device=machine.device)
    for _ in range(50):
        replay()
        found += machine.differ(outputs, want)
    return found


def copy_into(arguments: Any, others: Any) -> None:
    """The other tensors' elements."""
    pairs = zip(tensors_in(arguments), tensors_in(others), strict=True)
    for x, y in pairs:
        x.copy_(y)


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for held in x.values():
            yield from tensors_in(held)
    elif dataclasses.is_dataclass(x):
        yield from tensors_in(vars(x))


def two_streams(machine: Machine, case: Case) -> Tensor:
    calls = [prepared(machine, case, seed) for seed in range(2)]
    wants = [call() for call in calls]
    streams = [machine.stream() for _ in calls]
    found = [torch.zeros((), dtype=torch.int64, device=machine.device) for _ in calls]
    machine.synchronize()
    for _ in range(50):
        for call, want, stream, count in zip(calls, wants, streams, found, strict=True):
            with machine.on(stream):
                count += machine.differ(call(), want)
    machine.synchronize()
    return torch.stack(found)


def two_graphs(machine: Machine, case: Case) -> Tensor:
    calls = [prepared(machine, case, seed) for seed in range(2)]
    wants = [call() for call in calls]
    graphs = [machine.capture(call) for call in calls]
    streams = [machine.stream() for _ in calls]
    found = torch.zeros((), dtype=torch.int64, device=machine.device)
    machine.synchronize()
    for _ in range(50):
        for (replay, _), stream in zip(graphs, streams, strict=True):
            with machine.on(stream):
                replay()
        machine.synchronize()
        for (_, outputs), want in zip(graphs, wants, strict=True):
            found += machine.differ(outputs, want)
    return found


def compiled(machine: Machine, case: Case) -> Tensor:
    """By ``torch.compile(mode="reduce-overhead")``, which warms up, captures and then replays."""
    call = prepared(machine, case)
    want, faster = call(), machine.compiled(call)
    found = torch.zeros((), dtype=torch.int64, device=machine.device)
    for _ in range(5):
        found += machine.differ(faster(), want)
    machine.synchronize()
    return found
