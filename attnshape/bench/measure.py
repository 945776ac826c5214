"""One case: first whether its result is right, then how long it takes beside a copy and plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from attnshape.bench.cases import Case, Shape, outputs_of, random_arguments
from attnshape.bench.plain import plain_call
from attnshape.bench.timing import (
    Call,
    Ratio,
    Timing,
    copy_calls,
    ratio_of,
    sets_for,
    steady_ratio,
    time_calls,
)
from attnshape.compare import errors
from attnshape.problems import Problem, mapped
from attnshape.tolerance import credit_bound, error_fraction, gae_bound
from attnshape.types import ShapedRewards

PLAIN = "plain PyTorch"
TORCH = "torch backend"
PLAIN_ERROR = 0.05
"""Of the largest element: what a baseline in half precision may be off, and still be the same function."""


class WrongResultError(ValueError):
    """A result is beyond its bound of the reference: there is nothing to be timed."""

    def __init__(self, text: str, of_bound: float = math.inf) -> None:
        super().__init__(text)
        self.of_bound = of_bound
        """The error, as a share of its bound."""


@dataclass(frozen=True)
class Measurement:
    """One case on one machine."""

    case: Case
    error: float
    """Of the worst element, as a share of its bound; at most 1."""
    ours: Timing
    copy: Timing
    """Of a copy that moves as many bytes, in the same repeats."""
    baselines: dict[str, Timing]
    """The same result in plain PyTorch, and on a GPU by the library's vectorised PyTorch too."""

    @property
    def of_copy(self) -> Ratio:
        """Bandwidth as a share of the copy's."""
        return ratio_of(self.copy, self.ours)

    def steady_gain(self, baseline: str) -> Ratio | None:
        """``gain``; None where the machine did not stay the same meanwhile."""
        return steady_ratio(self.baselines[baseline], self.ours)

    def gain(self, baseline: str) -> Ratio:
        """How many times as long the baseline takes."""
        return ratio_of(self.baselines[baseline], self.ours)

    def facts(self) -> dict[str, Any]:
        """For JSON: the case, its bytes, its error and the seconds of each call."""
        timings = {"ours": self.ours, "copy": self.copy, **self.baselines}
        return {
            "case": self.case.name,
            "what": self.case.what,
            "bytes_read": self.case.read,
            "bytes_written": self.case.written,
            "error_of_bound": self.error,
            "seconds_of": {name: timing.seconds for name, timing in timings.items()},
        }

    @property
    def ratios(self) -> dict[str, Ratio]:
        """The share of a copy's bandwidth, and the gain over each baseline."""
        return {"copy": self.of_copy} | {name: self.gain(name) for name in self.baselines}


def measure(
    case: Case,
    device: torch.device,
    seconds: float = 0.5,
    *,
    plain: bool = True,
    more: Mapping[str, Sequence[Call]] = MappingProxyType({}),
) -> Measurement:
    """Checks and times a case.

    Args:
        case: what is measured.
        device: where.
        seconds: how long the timing may take, about.
        plain: time the same in plain PyTorch too.
        more: further baselines by name, which are not checked.

    Raises:
        WrongResultError: the result, or that of a baseline, is not the reference's.
    """
    sets = sets_for(case.bytes, device)
    arguments = [random_arguments(case, device, seed) for seed in range(sets)]
    error = check(case, arguments[0])
    calls: dict[str, list[Call]] = {
        "ours": [functools.partial(case.call, x) for x in arguments],
        "copy": copy_calls(case.bytes, sets, device),
    }
    if plain and not case.shape.packed:
        check_plain(case, arguments[0])
        # Few tensors are enough: launches bound it, not memory.
        calls[PLAIN] = [functools.partial(plain_call, case, x) for x in arguments[:2]]
    if device.type == "cuda":
        calls[TORCH] = [functools.partial(case.call, x, "torch") for x in arguments]
    timings = time_calls(calls | dict(more), device, seconds, eager=(PLAIN, TORCH))
    return Measurement(case, error, timings.pop("ours"), timings.pop("copy"), timings)


def check(
    case: Case, arguments: dict[str, Any], exactly: Literal["reference", "vectorized"] = "reference"
) -> float:
    """The largest error of the first and the last row (of all where they are packed, or whitened together)
    as a share of its bound, against the float64 reference; or in float64 the vectorised PyTorch, on the
    arguments' device, where the reference would walk over a hundred thousand tokens.

    Raises:
        WrongResultError: it is more than 1.
    """
    whole = case.shape.packed or case.what == "whiten"
    rows = list(range(case.shape.batch)) if whole else sorted({0, case.shape.batch - 1})
    # The reference walks over tokens on the host; only its whole attention matrices are for the device.
    there = case.what == "column" or exactly == "vectorized"
    exact = _sample(case, arguments, rows, None if there else "cpu")
    exact_result = case.reference(exact) if exactly == "reference" else case.call(exact, "torch")
    result = case.call(arguments)
    exact = mapped(exact, lambda x: x.cpu())

    def sampled(x: Tensor) -> Tensor:
        return (x if case.shape.packed or len(x) == len(rows) else x[rows]).cpu()

    if isinstance(result, ShapedRewards):
        worst = errors(
            _problem(case, exact), mapped(result, sampled), mapped(exact_result, lambda x: x.cpu())
        )
        fractions = {name: found.fraction for name, found in worst.items()}
    else:
        want = {name: x.cpu() for name, x in outputs_of(case.what, exact_result).items()}
        got = {name: sampled(x) for name, x in outputs_of(case.what, result).items()}
        bounds = _bounds(case, exact, want)
        fractions = {name: error_fraction(got[name], want[name], bounds[name]).max().item() for name in want}
    name = max(fractions, key=lambda name: fractions[name])
    if not fractions[name] <= 1:
        text = f"{case.name}: the error of {name} is {fractions[name]:.3g} times its bound"
        raise WrongResultError(text, fractions[name])
    return fractions[name]


def _problem(case: Case, exact: dict[str, Any]) -> Problem:
    given = dict(exact)
    credit = given.pop("credit" if case.what == "sweep" else "inputs")
    return Problem(given.pop("score"), credit, given.pop("response"), given, case.config)


def check_plain(case: Case, arguments: dict[str, Any]) -> None:
    """That the baseline computes the same.

    Raises:
        WrongResultError: an element is further off than ``PLAIN_ERROR`` of the largest.
    """
    want = outputs_of(case.what, case.call(arguments))
    for name, got in plain_call(case, arguments).items():
        error = ((got - want[name]).abs().max() / want[name].abs().max()).item()
        if not error <= PLAIN_ERROR:
            raise WrongResultError(
                f"{case.name}: {name} of the baseline is off by {error:.2g} of the largest"
            )


def _sample(case: Case, arguments: dict[str, Any], rows: list[int], device: str | None) -> dict[str, Any]:
    """Some rows of the arguments in float64; all of them where they are packed."""

    def part(x: Tensor) -> Tensor:
        x = (x if case.shape.packed else x[rows]).to(device or x.device)
        return x.double() if x.is_floating_point() else x

    return {name: mapped(x, part) for name, x in arguments.items()}


def _bounds(case: Case, exact: dict[str, Any], want: dict[str, Tensor]) -> dict[str, Tensor]:
    if case.what == "whiten":
        return {"whiten": gae_bound(want["whiten"], 1.0, 1.0)}
    if case.what == "gae":
        return {name: gae_bound(x, case.gamma, case.lam) for name, x in want.items()}
    # No product is larger than that of the largest lengths.
    inputs = exact["inputs"]
    lengths = [x.norm(dim=-1).flatten(1).amax(1) for x in (inputs.query, inputs.key)]
    return {case.what: credit_bound(want[case.what], lengths[0] * lengths[1] * inputs.scaling)}


def quick_cases(device: torch.device) -> Iterator[Case]:
    """What ``attnshape bench`` measures: every operation once or twice, at sizes that suit the device."""
    if device.type == "cuda":
        attention, columns = (Shape(32, 1024, 2048), Shape(128, 4096, 8192)), Shape(2, 1024, 2048)
        tokens, dtype = (Shape(256, 1024), Shape(2048, 4096)), torch.bfloat16
    else:
        heads = Shape(8, 256, 512, heads=8, kv_heads=2, width=64)
        attention, columns = (
            (heads, heads._replace(batch=4, response=1024, keys=2048)),
            heads._replace(batch=1),
        )
        tokens, dtype = (Shape(64, 128), Shape(256, 1024)), torch.float32
    for shape in attention:
        yield Case("fused", shape, dtype)
    yield Case("apart", attention[-1], dtype)
    yield Case("row", attention[-1], dtype)
    yield Case("column", columns, dtype)
    for shape in tokens:
        yield Case("sweep", shape)
        yield Case("gae", shape)
        yield Case("whiten", shape)
