"""How long calls take: the one clock of the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOW = 5e-4
"""Seconds between two events, at least: a replay alone is too short for them."""


class Timing(NamedTuple):
    seconds: float  # of one call, the median over repeats
    spread: float  # between the 10th and the 90th percentile, as a share of it
    how: str  # "graph": replays of a CUDA graph; "events": eager calls between events; "clock": on the CPU


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float = 0.1) -> Timing:
    """Times ``calls``, made one after another, for about ``seconds``.

    Give each its own tensors, together several times the second-level cache, so that none is found there. In
    a graph outputs are kept until all calls are captured, so that they have their own memory too.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return _timing(calls, _between_clocks, "clock", seconds)
    torch.cuda.synchronize(device)
    try:
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for call in calls:
                kept.append(call())
    except RuntimeError:
        torch.cuda.synchronize(device)
        return _timing(calls, _between_events, "events", seconds)
    timing = _timing([graph.replay], _between_events, "graph", seconds)
    return timing._replace(seconds=timing.seconds / len(calls))


def _timing(
    calls: Sequence[Callable[[], Any]],
    between: Callable[[Sequence[Callable[[], Any]], int], float],
    how: str,
    seconds: float,
) -> Timing:
    once = between(calls, 1)
    turns = max(1, round(WINDOW / max(once, 1e-7)))
    repeats = min(max(round(seconds / (turns * once)), 5), 200)
    samples = sorted(between(calls, turns) / (turns * len(calls)) for _ in range(repeats))
    low, high = samples[repeats // 10], samples[repeats - 1 - repeats // 10]
    median = statistics.median(samples)
    return Timing(median, (high - low) / median, how)


def _between_events(calls: Sequence[Callable[[], Any]], turns: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(turns):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _between_clocks(calls: Sequence[Callable[[], Any]], turns: int) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        for call in calls:
            call()
    return time.perf_counter() - start


def seconds_once(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one eager call, for calls far longer than a launch."""
    return (_between_events if device.type == "cuda" else _between_clocks)([call], 1)


def host_seconds(call: Callable[[], Any], device: torch.device, calls: int = 50, repeats: int = 21) -> float:
    """What a call costs its thread before it returns, the median; at most ``calls`` wait for the GPU."""
    samples = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(_between_clocks([call], calls) / calls)
    return statistics.median(samples)


@triton.jit
def read_kernel(p_x, p_out, n_blocks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * STEPS
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(STEPS):
        inside = start + i < n_blocks
        acc += tl.load(p_x + (start + i) * BLOCK + tl.arange(0, BLOCK), mask=inside, other=0.0)
    tl.store(p_out + tl.program_id(0), tl.sum(acc))


def copy_calls(size: int, sets: int, device: torch.device) -> list[Callable[[], Any]]:
    """Copies that move ``size`` bytes each: half of them read, half written."""
    halves = [torch.ones(2, max(size // 8, 1), device=device) for _ in range(sets)]
    return [lambda x=x: x[0].copy_(x[1]) for x in halves]


def read_calls(size: int, sets: int, device: torch.device) -> list[Callable[[], Any]]:
    """Passes that read ``size`` bytes each and write next to nothing."""
    steps, block = 8, 2048
    buffers = [torch.ones(triton.cdiv(size, 4 * block) * block, device=device) for _ in range(sets)]

    def read(x: Tensor) -> Tensor:
        if device.type != "cuda":
            return x.sum()
        n_blocks = len(x) // block
        out = torch.empty(triton.cdiv(n_blocks, steps), device=device)
        read_kernel[(len(out),)](x, out, n_blocks, STEPS=steps, BLOCK=block, num_warps=4)
        return out

    return [lambda x=x: read(x) for x in buffers]


def sets_for(size: int, device: torch.device) -> int:
    """How many sets of tensors of ``size`` bytes are four times the second-level cache; two at least."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(triton.cdiv(4 * cache, max(size, 1)), 2), 256)
