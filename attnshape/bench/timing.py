"""How long calls take: the one clock of the project."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

WINDOW = 5e-4
"""Seconds of one sample, at least: a call alone may be too short for the clock."""
SETTLED = 5e-3
"""What takes less on a CPU is called once before a sample, untimed: its first call after another entry's pays
for code and data that the other has put out of the caches, several times what it takes by itself."""
CAPTURED = 5e-3
"""Calls that take longer are not captured: users run them eagerly, and launches no longer count."""
MOST_REPEATS = 200


class Timing(NamedTuple):
    """Seconds of one call, sample by sample."""

    samples: tuple[float, ...]
    how: str
    """``"graph"``: replays of a CUDA graph; ``"events"``: eager calls on a GPU; ``"clock"``: on a CPU."""
    wall: float
    """Seconds of one eager call from Python until its result is there, the median."""

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


class Ratio(NamedTuple):
    """A median over repeats, with the 10th and the 90th percentile."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.value >= 100 else 1 if self.value >= 10 else 2
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio_of(timing: Timing, to: Timing) -> Ratio:
    """How many times as long a call took as another one in the same repeat."""
    return _ratio([a / b for a, b in zip(timing.samples, to.samples, strict=True)])


def steady_ratio(timing: Timing, to: Timing) -> Ratio | None:
    """``ratio_of``; None if it moved, from the first half of the repeats to the second, by more than it
    spreads within one of them: the machine was another one, and the median of both is nobody's."""
    ratios = [a / b for a, b in zip(timing.samples, to.samples, strict=True)]
    first, second = _ratio(ratios[: len(ratios) // 2]), _ratio(ratios[len(ratios) // 2 :])
    spread = max(first.high - first.low, second.high - second.low)
    # The clock's own grain, a hundredth, is no move.
    moved = abs(first.value - second.value) > max(spread, 0.01 * first.value)
    return None if moved else _ratio(ratios)


def _ratio(ratios: Sequence[float]) -> Ratio:
    ordered, tenth = sorted(ratios), len(ratios) // 10
    return Ratio(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def time_calls(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float = 0.2,
    least: int = 5,
    eager: Collection[str] = (),
) -> dict[str, Timing]:
    """Times every entry in every repeat, so that all of them see the same moments of the machine.

    Args:
        calls: the same work by each name, over tensors of its own each time. On a GPU together they should be
            several times the second-level cache (``sets_for``), so that none is found there.
        device: where they compute.
        seconds: how long all of it may take, about; ``least`` repeats are made in any case.
        eager: names that are not captured on a GPU, because users run them as they are.

    Returns:
        A ``Timing`` by name, all with the same number of samples: those of one repeat stand at one index.
    """
    samplers = {name: _Sampler(each, device, name not in eager) for name, each in calls.items()}
    order = list(samplers)
    cost = sum(sampler.once * sampler.turns for sampler in samplers.values())
    repeats = min(max(round(seconds / cost), least), MOST_REPEATS)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for i in range(repeats):
        start = i % len(order)  # no entry always follows the same one
        for name in order[start:] + order[:start]:
            samples[name].append(samplers[name].sample())
    timings = {}
    for name, sampler in samplers.items():
        wall = sampler.wall() if device.type == "cuda" else statistics.median(samples[name])
        timings[name] = Timing(tuple(samples[name]), sampler.how, wall)
    return timings


class _Sampler:
    """Takes samples of one entry, of a CUDA graph where that is possible."""

    def __init__(self, calls: Sequence[Call], device: torch.device, captured: bool) -> None:
        self.calls, self.device, self.how = calls, device, "clock"
        self._replayed: Sequence[Call] = calls
        for call in calls:
            call()
        self.once = self._between(1)  # seconds of all of them
        if device.type == "cuda":
            self.how = "events"
            if captured and self.once < CAPTURED * len(calls):
                self._capture()
                self.once = self._between(1)
        self.turns = max(1, round(WINDOW / max(self.once, 1e-7)))

    def _capture(self) -> None:
        # Outputs are kept until all calls are captured, so that they have memory of their own too.
        torch.cuda.synchronize(self.device)
        try:
            graph, kept = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph):
                for call in self.calls:
                    kept.append(call())
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return
        self._replayed, self.how = [graph.replay], "graph"

    def _between(self, turns: int) -> float:
        if self.device.type == "cuda":
            return _between_events(self._replayed, turns)
        return _between_clocks(self._replayed, turns)

    def sample(self) -> float:
        """Seconds of one call."""
        if self.device.type != "cuda" and self.once < SETTLED:
            self._between(1)
        return self._between(self.turns) / (self.turns * len(self.calls))

    def wall(self) -> float:
        def finished() -> None:
            self.calls[0]()
            torch.cuda.synchronize(self.device)

        finished()
        return statistics.median(_between_clocks([finished], 1) for _ in range(5))


def _between_events(calls: Sequence[Call], turns: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(turns):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _between_clocks(calls: Sequence[Call], turns: int) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        for call in calls:
            call()
    return time.perf_counter() - start


def host_timing(call: Call, device: torch.device, calls: int = 50, repeats: int = 21) -> Timing:
    """What a call costs its thread before it returns; at most ``calls`` of them wait for the GPU."""
    call()
    samples = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(_between_clocks([call], calls) / calls)
    return Timing(tuple(samples), "clock", statistics.median(samples))


def copy_calls(size: int, sets: int, device: torch.device) -> list[Call]:
    """Copies that move ``size`` bytes each: half of them read, half written."""
    halves = [torch.ones(2, max(size // 8, 1), device=device) for _ in range(sets)]
    return [lambda x=x: x[0].copy_(x[1]) for x in halves]  # type: ignore[misc]


def fresh_copy_calls(size: int, parts: int) -> list[Call]:
    """Copies that move ``size`` bytes each into memory that nobody has touched yet, as outputs are written:
    into ``parts`` new tensors on the CPU."""
    halves = [torch.ones(max(size // 8 // parts, 1)) for _ in range(parts)]
    return [lambda: [torch.empty_like(x).copy_(x) for x in halves]]


def sets_for(size: int, device: torch.device) -> int:
    """How many sets of tensors of ``size`` bytes are four times the second-level cache; two at least."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-4 * cache // max(size, 1)), 2), 256)
