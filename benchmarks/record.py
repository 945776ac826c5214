"""One benchmark's samples and figures, put into pytest-benchmark's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pytest_benchmark.fixture import BenchmarkFixture

from attnshape.bench.timing import Ratio, Timing


class Promise(NamedTuple):
    """A budget and what was measured; one that is missed is a result, not a failure."""

    text: str
    value: float
    limit: float
    at_most: bool = True
    unit: Literal["s", "x"] = "s"

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


class Clock:
    """The timer of pytest-benchmark: it stands still but for the samples that the project's clock took."""

    __name__ = "attnshape.bench.timing"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


class Recorder:
    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self.benchmark = benchmark

    def untimed(self) -> bool:
        """True with ``--benchmark-disable``: results are checked and kernels compiled, nothing is timed."""
        if self.benchmark.disabled:
            self.benchmark.pedantic(lambda: None)
        return bool(self.benchmark.disabled)

    def __call__(
        self,
        suite: str,
        timing: Timing,
        *,
        ratios: Mapping[str, Ratio] | None = None,
        promise: Promise | None = None,
        **facts: Any,
    ) -> None:
        """``ratios``: how much better the benchmark is than what they name; the larger, the better."""
        self.benchmark.group = suite
        shown = {name: ratio._asdict() for name, ratio in (ratios or {}).items()}
        figures = {"how": timing.how, "seconds": timing.seconds, "wall_seconds": timing.wall, "ratios": shown}
        self.benchmark.extra_info.update(facts | figures)
        if promise is not None:
            self.benchmark.extra_info["budget"] = promise._asdict() | {"met": promise.met}
        samples = iter(timing.samples)

        def pass_time() -> None:
            clock.now += next(samples)

        self.benchmark.pedantic(pass_time, rounds=len(timing.samples))
