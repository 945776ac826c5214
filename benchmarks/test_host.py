"""What a call costs the thread that makes it, before it returns: eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnshape.bench.cases import Case, Shape, What, outputs_of, random_arguments
from attnshape.bench.measure import check
from attnshape.bench.timing import host_timing
from benchmarks.cases import SMALL, made_small
from benchmarks.record import Promise, Recorder

LIMITS: dict[What, float] = {"fused": 40e-6, "sweep": 40e-6, "gae": 25e-6}
"""Budgets on a GPU, whose work does not wait for the host."""


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own compiler
@pytest.mark.filterwarnings("ignore:(?s).*functools.lru_cache.*")  # the case's own settings
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", LIMITS)
def test_host_cost(what: What, compiled: bool, device: torch.device, small: bool, record: Recorder) -> None:
    case = Case(what, Shape(SMALL.batch, SMALL.response, SMALL.keys if what == "fused" else 0))
    case = made_small(case) if small else case
    arguments = random_arguments(case, device, 0)
    error = check(case, arguments)
    call: Callable[..., Any] = functools.partial(case.call, arguments)
    if compiled:
        if device.type == "cpu" and what != "gae":
            pytest.skip("on a CPU one call is enough to see what compiling costs or saves")
        call = torch.compile(lambda: outputs_of(what, case.call(arguments)), fullgraph=True)
        for name, got in call().items():
            torch.testing.assert_close(got, outputs_of(what, case.call(arguments))[name], rtol=0, atol=0)
    if record.untimed():
        call()
        return
    timing = host_timing(call, device, *((3, 3) if small else ()))
    promise = None
    if device.type == "cuda" and not compiled:
        promise = Promise(f"{LIMITS[what] * 1e6:.0f} us", timing.seconds, LIMITS[what])
    name = f"{case.name}, {'compiled' if compiled else 'eager'}"
    record("host", timing, promise=promise, case=name, error_of_bound=error)
