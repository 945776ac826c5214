"""Every kernel and every path once, on small problems, against the float64 reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnshape
from attnshape import compare, reference
from attnshape.bench.cases import Case, Shape
from attnshape.bench.measure import WrongResultError, check
from attnshape.problems import Problem, make_problem, mapped, to_float64
from attnshape.tolerance import credit_bound, error_fraction
from attnshape.types import KL, Response
from benchmarks.on_gpu.machine import Machine
from benchmarks.on_gpu.work import Item, Worker

HEADS = {"heads": 8, "kv_heads": 2, "width": 128}
LIMIT = 20.0
"""Seconds for one launch, its compilation with it where that was not done ahead."""
WALK = 3000
"""Tokens of a row over which the reference walks; longer ones are compared with the vectorised PyTorch."""


class Path(NamedTuple):
    """A way through the kernels, which the case's size or layout chooses."""

    name: str
    case: Case


def paths() -> Iterator[Path]:
    """From the shortest to the longest: what fails first is the simplest thing that does."""
    packed = {"lengths": (5, 0, 700, 1), "packed": True}
    yield Path("a program sweeps a row", Case("sweep", Shape(3, 700)))
    yield Path("rows that begin where they may", Case("sweep", Shape(3, 511)))
    yield Path("the recurrence alone", Case("gae", Shape(3, 700)))
    yield Path("turns, masked tokens skipped", Case("sweep", Shape(3, 700, holes=True)))
    yield Path("turns, masked tokens steps", Case("gae", Shape(3, 700, holes=True), mask_semantics="zero"))
    yield Path("programs share a row", Case("sweep", Shape(1, 5200)))
    yield Path("programs share a row, in groups", Case("sweep", Shape(2, 40000)))
    yield Path("programs share a row, recurrence alone", Case("gae", Shape(2, 40000)))
    yield Path("packed rows", Case("sweep", Shape(4, 700, **packed)))
    yield Path("packed rows, long", Case("sweep", Shape(4, 20000, lengths=(9, 20000, 0, 3000), packed=True)))
    yield Path("the last program of a row shapes it", Case("fused", Shape(3, 200, 300, **HEADS)))
    yield Path("float16", Case("fused", Shape(3, 200, 300, **HEADS), torch.float16))
    yield Path("float32", Case("fused", Shape(3, 200, 300, **HEADS), torch.float32))
    yield Path("several splits of a row", Case("fused", Shape(32, 1024, 2048)))
    yield Path("credit", Case("credit", Shape(3, 200, 300, **HEADS)))
    yield Path("a row of attention", Case("row", Shape(3, 200, 300, **HEADS)))
    yield Path("a row of attention, long", Case("row", Shape(2, 100, 2600, **HEADS)))
    yield Path("scores, then programs share a row", Case("fused", Shape(2, 5200, 5600, **HEADS)))
    yield Path(
        "scores, then a program sweeps a row", Case("credit", Shape(600, 2100, 2200, heads=2, kv_heads=1))
    )
    yield Path("whitening", Case("whiten", Shape(30, 701)))
    yield Path("columns", Case("column", Shape(2, 200, 300, **HEADS)))


def items(machine: Machine) -> Iterator[Item]:
    for path in paths():
        yield Item(path.name, functools.partial(checked, case=path.case), LIMIT)
    for i, case in enumerate(compare.grid(quick=True)):
        if case.shape == compare.SMALL[1 + i % 2]:
            setting = " ".join(f"{name} {x}" for name, x in case.setting._asdict().items() if x)
            name = f"drawn: {str(case.dtype)[6:]}, {setting}, width {case.shape.D}"
            yield Item(name, functools.partial(compared, case=case), LIMIT)
    for other in (no_number, groups, rollout, packed_keys, many_moments):
        yield Item(other.__name__.replace("_", " "), other, LIMIT)


def checked(worker: Worker, case: Case) -> dict[str, Any]:
    """A case; its kernels one by one."""
    machine = worker.machine
    arguments = machine.arguments(case)
    exactly = "vectorized" if max(case.shape.response, case.shape.keys) > WALK else "reference"
    with worker.watched() as ran:
        machine.call(case, arguments)
        # Once more: counters were left as they were found.
        error = worker.error(lambda: check(case, arguments, exactly))
    return {"case": case.name, "kernels": ran, "exactly": exactly, **error}


def within(
    worker: Worker, call: Callable[[], Any], errors: Callable[[Any], dict[str, float]]
) -> dict[str, Any]:
    """A call, whose result's errors are shares of their bounds."""

    def measure() -> float:
        fractions = errors(mapped(call(), lambda x: x.cpu()))
        name = max(fractions, key=lambda name: fractions[name])
        if not fractions[name] <= 1:
            text = f"the error of {name} is {fractions[name]:.3g} times its bound"
            raise WrongResultError(text, fractions[name])
        return fractions[name]

    with worker.watched() as ran:
        call()
        error = worker.error(measure)
    return {"kernels": ran, **error}


def compared(worker: Worker, case: compare.Case) -> dict[str, Any]:
    """A drawn problem of ``attnshape compare``."""
    problem = case.problem()
    there = worker.machine.drawn(problem)

    def errors(got: Any) -> dict[str, float]:
        want = to_float64(problem).shaped(reference.shape_rewards)
        return {name: worst.fraction for name, worst in compare.errors(problem, got, want).items()}

    return within(worker, lambda: there.shaped(attnshape.shape_rewards, backend="triton"), errors)


def no_number(worker: Worker) -> dict[str, Any]:
    """A row whose query holds a NaN, in one head: all of it is lost, and nothing of the others."""
    problem = make_problem(5, batch=3, keys=90, width=40, head_dim=64, dtype=torch.float16)
    problem.inputs.query[1, 0] = float("nan")
    there = worker.machine.drawn(problem)

    def errors(got: Any) -> dict[str, float]:
        want = to_float64(problem).shaped(reference.shape_rewards)
        found = {name: worst.fraction for name, worst in compare.errors(problem, got, want).items()}
        return found | {"status": 0.0 if got.status.equal(want.status) else math.inf}

    return within(worker, lambda: there.shaped(attnshape.shape_rewards, backend="triton"), errors)


def rows_within(problem: Problem, got: Tensor, want: Tensor, times: float = 1.0) -> dict[str, float]:
    found = [
        error_fraction(got_row, row, times * credit_bound(row, problem.max_score)).max().item()
        for got_row, row in zip(problem.rows(got), problem.rows(want), strict=True)
        if row.numel()
    ]
    return {"credit": max(found)}


def groups(worker: Worker) -> dict[str, Any]:
    """Advantages of a group of completions, from queries and keys."""
    problem = make_problem(1, batch=4, keys=90, width=40, head_dim=64, dtype=torch.bfloat16)
    there = worker.machine.drawn(problem)

    def call() -> Any:
        options = {"group": 2, "credit": there.credit, "response": there.response}
        return attnshape.group_advantages(there.score, **options, backend="triton")

    def errors(got: Any) -> dict[str, float]:
        exact = to_float64(problem)
        options = {"group": 2, "credit": exact.credit, "response": exact.response}
        want = reference.group_advantages(exact.score, **options)
        found = rows_within(problem, got.credit, want.credit)
        close = 1e-4 * (1 + want.advantages.abs())
        return found | {"advantages": error_fraction(got.advantages, want.advantages, close).max().item()}

    return within(worker, call, errors)


def rollout(worker: Worker) -> dict[str, Any]:
    """Two layers, with weights of keys and of what passes by."""
    problem = make_problem(2, batch=2, keys=90, width=40, head_dim=64, whole_query=True)
    generator = torch.Generator().manual_seed(0)
    shape, heads = problem.inputs.key.shape, problem.inputs.query.shape[1]
    norms = {
        "value_norm": torch.rand(shape[0], heads, shape[2], generator=generator),
        "residual_norm": torch.rand(shape[0], shape[2], generator=generator) + 0.5,
    }
    layers = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1), **norms) for i in range(2)]
    there, response = worker.machine.drawn(layers), worker.machine.drawn(problem.response)

    def errors(got: Tensor) -> dict[str, float]:
        return rows_within(
            problem, got, reference.attention_rollout(to_float64(layers), problem.response), 2.0
        )

    return within(worker, lambda: attnshape.attention_rollout(there, response, backend="triton"), errors)


def packed_keys(worker: Worker) -> dict[str, Any]:
    """Rows of keys side by side, one of them empty, and rewards on them."""
    generator = torch.Generator().manual_seed(3)
    cu = torch.tensor([0, 70, 70, 300], dtype=torch.int32)
    n = torch.tensor([30, 0, 200])
    query = torch.randn(3, 8, 128, generator=generator).half()
    key = torch.randn(300, 2, 128, generator=generator).half()
    inputs = attnshape.AttentionInputs(query, key, 0.1, cu_seqlens=cu)
    lengths = torch.cat([torch.zeros(1, dtype=torch.int32), n.cumsum(0).int()])
    start = torch.tensor([40, 0, 30], dtype=torch.int32)
    response = Response(torch.ones(230, dtype=torch.bool), start=start, cu_seqlens=lengths)
    kl = KL(*torch.randn(2, 230, generator=generator), 0.1)
    given = {"values": torch.randn(230, generator=generator), "kl": kl}
    problem = Problem(torch.randn(3, generator=generator), inputs, response, given)
    there = worker.machine.drawn(problem)

    def errors(got: Any) -> dict[str, float]:
        want = to_float64(problem).shaped(reference.shape_rewards)
        return {name: worst.fraction for name, worst in compare.errors(problem, got, want).items()}

    return within(worker, lambda: there.shaped(attnshape.shape_rewards, backend="triton"), errors)


def many_moments(worker: Worker) -> dict[str, Any]:
    """Whitening with the moments of more parts than every program folds for itself."""
    generator = torch.Generator().manual_seed(4)
    x, mask = torch.randn(5000, 3, generator=generator), torch.ones(5000, 3, dtype=torch.bool)
    mean = x.double().mean(1)
    spread = (x.double() - mean[:, None]).square().sum(1)
    moments = torch.stack([torch.full((5000,), 3.0).double(), mean, spread], 1).float()
    there = worker.machine.drawn({"x": x, "response": mask, "moments": moments})

    def errors(got: Tensor) -> dict[str, float]:
        want = reference.whiten(x.double(), mask)
        return {"whiten": error_fraction(got, want, 1e-4 * (1 + want.abs())).max().item()}

    return within(worker, lambda: attnshape.whiten(**there, backend="triton"), errors)
