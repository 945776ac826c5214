"""Other constants than those that stand in ``csrc_triton``, a timing each; the best are printed to stand
there.

A round varies one room's constants together over the budgets' cases; what is best is what loses least over
all of them (the geometric mean of times over the best of each case). Results are compared with the float64
ones once for every setting. ``one_launch`` is a threshold between two ways, each of which is timed; ``steps``
chooses between two.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attnshape import plans
from attnshape.bench.cases import Case, Shape
from attnshape.bench.measure import check
from benchmarks.cases import ATTENTION, SMALL, SWEEPS
from benchmarks.on_gpu.budgets import spread
from benchmarks.on_gpu.machine import Machine
from benchmarks.on_gpu.work import Item, Worker
from csrc_triton.host import attention, rewards

SECONDS = 0.06
"""Of one timing, about."""
ROOM = "csrc_triton.host."

READING_ON = ("scores", "mean", "shape")
"""However rows are finished."""


Constants = Mapping[str, Any]
"""By name, such as ``attention.KEYS``."""


class Round(NamedTuple):
    """Constants that are tried together, over some cases."""

    name: str
    settings: Sequence[Constants]
    cases: Sequence[Case]


def product(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    names = [name.replace("__", ".") for name in choices]
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*choices.values())]


def rounds() -> Iterator[Round]:
    read = [Case("fused", ATTENTION[0]), Case("fused", ATTENTION[1]), Case("credit", ATTENTION[2])]
    tiles = [(64, 3), (64, 4), (64, 5), (32, 4), (32, 6), (128, 3), (128, 2)]
    yield Round(
        "keys",
        [
            {"attention.KEYS": keys, "attention.STAGES": stages, "attention.WARPS": warps}
            for warps in (4, 8)
            for keys, stages in tiles
        ],
        read[:2],
    )
    grids = [
        {"attention.chunks_per_program": split}
        for split in (attention.chunks_per_program, *(Cut(n, n) for n in (4, 6, 8, 11, 16, 32)))
    ]
    yield Round("split", grids, [*read[:2], Case("fused", Shape(8, 1024, 2048)), Case("fused", SMALL)])
    readers = [
        {"attention.ONE_LAUNCH": longest, "attention.READ_ON": finishes, "attention.PROGRAMS": programs}
        for longest in (attention.ONE_LAUNCH, 1024)
        for finishes, programs in (((), attention.PROGRAMS), (READING_ON, 2), (READING_ON, 3))
    ]
    many = [*read[1:], Case("row", ATTENTION[1]), Case("fused", Shape(512, 512, 1024))]
    yield Round("reading on", readers, many)
    ways = product(attention__ONE_LAUNCH=(attention.ONE_LAUNCH, 1024), attention__DEPENDENT=(False, True))
    shapes = (*ATTENTION[1:], Shape(8, 2048, 4096), Shape(8, 4096, 8192))
    long = [*(Case("fused", shape) for shape in shapes), read[2], Case("row", ATTENTION[1])]
    yield Round("dependent", ways, long)
    others = ({}, {"shape": 128}, {"shape": 96}, {"scores": 128}, {"means": 72}, {"means": 80})
    most = [attention.REGISTERS | some for some in others]
    yield Round("places", product(attention__REGISTERS=most), read)
    sweeps = [Case(what, shape) for what in ("sweep", "gae") for shape in SWEEPS]
    sweeps += [Case("sweep", shape) for shape in (Shape(1024, 4096), Shape(512, 4096))]
    settings = [
        {"rewards.warps_of": warps, "rewards.REGISTERS": registers}
        for warps, registers in (
            (rewards.warps_of, rewards.REGISTERS),
            *(
                (Fixed(n), rewards.REGISTERS | {n: registers})
                for n in (1, 2, 4)
                for registers in (128, 144, 168)
            ),
        )
    ]
    yield Round("warps", settings, sweeps)
    whitening = product(whiten__BLOCK=(2048, 1024, 4096), whiten__PROGRAMS=(4, 2, 8))
    yield Round("whitening", whitening, [Case("whiten", SWEEPS[0]), Case("whiten", SWEEPS[1])])
    widths = (512, 1024, 2048, 4096, 8192)
    fused = [Case("fused", Shape(batch, n, 2 * n)) for batch in (8, 64) for n in widths]
    yield Round("one launch", product(attention__ONE_LAUNCH=(1 << 30, 0)), fused)
    rows = [Shape(b, n) for b in (1, 32, 132, 512, 2048) for n in (1024, 4096, 16384)]
    ways = product(rewards__in_chunks=(rewards.in_chunks, always, never))
    yield Round("steps", ways, [Case("sweep", shape) for shape in rows])


class Cut(NamedTuple):
    """So many chunks of keys a program, whatever there is."""

    split: int
    step: int | None

    def __call__(self, *_: Any) -> tuple[int, int | None]:
        return self


class Fixed(int):
    """So many warps a program, whatever there is."""

    def __call__(self, *_: Any, **__: Any) -> int:
        return int(self)


def always(*_: Any, **__: Any) -> bool:
    return True


def never(*_: Any, **__: Any) -> bool:
    return False


def named(constants: Constants) -> str:
    return ", ".join(f"{name} {getattr(x, '__name__', x)}" for name, x in constants.items())


def items(machine: Machine) -> Iterator[Item]:
    for each in rounds():
        for case in each.cases:
            for constants in each.settings:
                name = f"{each.name}: {named(constants)}: {case.name}"
                ask = functools.partial(tried, name=each.name, case=case, constants=constants)
                yield Item(name, ask, 40)


@contextlib.contextmanager
def injected(constants: Constants) -> Iterator[None]:
    """With other constants in their modules."""
    before = []
    for name, value in constants.items():
        module, _, attribute = name.rpartition(".")
        of = importlib.import_module(ROOM + module)
        before.append((of, attribute, getattr(of, attribute)))
        setattr(of, attribute, value)
    plans.forget()
    try:
        yield
    finally:
        plans.forget()
        for of, attribute, value in before:
            setattr(of, attribute, value)


def tried(worker: Worker, name: str, case: Case, constants: Constants) -> dict[str, Any]:
    """One setting on one case: first whether it computes the same, then how long it takes."""
    machine = worker.machine
    arguments = worker.arguments(case)
    line: dict[str, Any] = {"round": name, "case": case.name, "constants": plain(constants)}
    with injected(constants):
        with worker.watched() as ran:
            try:
                machine.call(case, arguments[0])
            except Exception as error:
                if "OutOfResources" not in type(error).__name__:
                    raise
                return line | {"status": "refused", "error": str(error)[:200]}
        line |= worker.error(lambda: check(case, arguments[0], "vectorized"))
        timings = machine.time(
            {"ours": [functools.partial(machine.call, case, x) for x in arguments]}, SECONDS
        )
    return line | {"us": spread(timings["ours"].samples), "kernels": ran}


def plain(constants: Constants) -> dict[str, Any]:
    return {name: getattr(x, "__name__", x) for name, x in constants.items()}
