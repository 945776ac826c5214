"""Every call that is timed by itself: fused and in parts, columns, the recurrence, whitening."""

from __future__ import annotations

import pytest
import torch

from attnshape.bench.cases import Case, random_arguments
from attnshape.bench.measure import PLAIN, check, measure
from attnshape.bench.timing import fresh_copy_calls, sets_for, time_calls
from benchmarks.beside import forward_call, read_calls
from benchmarks.cases import FORWARD, FRESH, Budget, made_small, suite_cases, with_plain
from benchmarks.record import Promise, Recorder

OUTPUTS = {"fused": 5, "apart": 5, "sweep": 5, "gae": 2}
"""How many tensors a call makes."""
SUITES = {
    "fused": "fused",
    "apart": "stages",
    "credit": "stages",
    "row": "stages",
    "sweep": "recurrence",
    "gae": "recurrence",
    "whiten": "whitening",
    "column": "columns",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = torch.device(metafunc.config.getoption("--device")).type
    cases = list(suite_cases(kind))
    if metafunc.config.getoption("--small"):
        cases = list({made_small(case): (made_small(case), budget) for case, budget in cases}.values())
    metafunc.parametrize(("case", "budget"), cases, ids=[case.name for case, _ in cases])


def test_case(
    case: Case,
    budget: Budget,
    device: torch.device,
    seconds: float,
    record: Recorder,
) -> None:
    if record.untimed():
        check(case, random_arguments(case, device, 0))
        return
    more = {}
    if case.what == "column":
        more[FORWARD] = [forward_call(random_arguments(case, device, 0)["inputs"])]
    if device.type == "cpu":
        more[FRESH] = fresh_copy_calls(case.bytes, OUTPUTS.get(case.what, 1))
    m = measure(case, device, seconds, plain=with_plain(case), more=more)
    facts = m.facts()
    fresh = m.baselines[FRESH].seconds if FRESH in more else 0.0
    forward = m.baselines[FORWARD].seconds if FORWARD in more else 0.0
    limit = budget.limit(m.copy.seconds, fresh, forward)
    promise = None if limit is None else Promise(str(budget), m.ours.seconds, limit)
    if budget.of_plain:
        promise = Promise(str(budget), m.gain(PLAIN).value, budget.of_plain, at_most=False, unit="x")
    if device.type == "cuda":
        reads = {"read": read_calls(case.bytes, sets_for(case.bytes, device), device)}
        facts["read_seconds"] = time_calls(reads, device, seconds / 2)["read"].seconds
    record(SUITES[case.what], m.ours, ratios=m.ratios, promise=promise, **facts)
