"""How long each budget's call should take: bytes over bandwidth, and what waits for something else.

``python -m benchmarks.cost_model [bandwidth in bytes per second]`` prints the table. These are estimates to
hold measurements against; an assumption that a measurement refutes is to be replaced by it.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from attnshape.bench.cases import Case
from benchmarks.cases import budget_cases
from csrc_triton.host.attention import CHUNK, ONE_LAUNCH
from csrc_triton.host.rewards import in_chunks
from csrc_triton.launch import ceil_div


class Gpu(NamedTuple):
    """An H200 (NVIDIA's data sheet: 4.8 TB/s, 989 dense bfloat16 TFLOP/s), where nothing was measured."""

    bandwidth: float = (
        4.8e12  # bytes per second, read and written together; better the copy's of the same run
    )
    processors: int = 132
    flops: float = 989e12


def gpu_of(device: torch.device, bandwidth: float | None = None) -> Gpu:
    """The GPU that is there, with the bandwidth that was measured on it."""
    gpu = Gpu() if bandwidth is None else Gpu(bandwidth)
    if device.type != "cuda":
        return gpu
    return gpu._replace(processors=torch.cuda.get_device_properties(device).multi_processor_count)


# Assumptions, in seconds.
LAUNCH = 2e-6  # from the end of the kernel before to the first instructions, and from the last to the end
TRIP = (
    0.6e-6  # a load whose address or time depends on the one before; about 480 cycles of latency and queues
)
HANDOFF = 2 * TRIP  # stores made visible and a counter raised, then loads of what others stored
STEP = 3e-6  # one chunk of a row by a program that has it to itself: loads, scan, carry
SHARED_STEP = 4e-6  # each of the two tasks of a chunk whose row is shared
AVERAGING = 6e-6  # more for a chunk whose heads are averaged by the second launch, eight key heads in turn
AT_ONCE = 3  # programs that a multiprocessor holds of the sweep
MATMUL = 0.5  # share of the matrix rate that score tiles reach


class Estimate(NamedTuple):
    launches: int
    transfer: float  # bytes over bandwidth
    serial: float  # steps that follow each other while bytes move, and hide behind them or do not
    tail: float  # steps that follow after the last byte was read

    @property
    def seconds(self) -> float:
        return self.launches * LAUNCH + max(self.transfer, self.serial) + self.tail


def estimate(case: Case, gpu: Gpu) -> Estimate:
    """Estimate of one call on warm code, its inputs in device memory."""
    s, transfer = case.shape, (case.read + case.written) / gpu.bandwidth
    at_once = AT_ONCE * gpu.processors
    longest = ceil_div(s.response, CHUNK)
    n_chunks = sum(ceil_div(n, CHUNK) for n in s.lengths) if s.packed else s.batch * longest
    averaging = case.what in ("fused", "credit") and s.response > ONE_LAUNCH
    more = AVERAGING if averaging else 0.0
    shared = in_chunks(s.batch, longest, n_chunks, gpu.processors, averaging)
    alone = ceil_div(s.batch, at_once) * longest * (STEP + more)
    steps = ceil_div(2 * n_chunks, at_once) * (SHARED_STEP + more / 2) + HANDOFF if shared else alone
    if case.what in ("sweep", "gae"):
        return Estimate(1, transfer, steps, 0.0)
    if case.what in ("fused", "credit", "row"):
        if (s.keys if case.what == "row" else s.response) > ONE_LAUNCH:
            # The second begins when all terms are there.
            return Estimate(2, transfer, 0.0, HANDOFF + (2 * TRIP if case.what == "row" else steps))
        # The last row's programs fold its partials, then the last of them shapes it.
        return Estimate(
            1, transfer, 0.0, 2 * HANDOFF + longest * (STEP if case.what == "fused" else 2 * TRIP)
        )
    if case.what == "column":
        # Every response query against the keys before it, then against those of the response once more.
        inside = s.response * (s.response + 1) // 2
        products = s.batch * s.heads * (s.response * (s.keys - s.response) + 2 * inside)
        return Estimate(6, transfer, 2 * s.width * products / (MATMUL * gpu.flops), 0.0)
    return Estimate(1, transfer, 0.0, 0.0)


HEADINGS = ("launches", "MB", "transfer", "serial", "tail", "all us")


def main(bandwidth: float = Gpu().bandwidth) -> None:
    gpu = Gpu(bandwidth)
    print(f"{'case':44}", *(f"{heading:>9}" for heading in HEADINGS), " budget")
    for case, budget in budget_cases():
        e = estimate(case, gpu)
        times = [f"{x * 1e6:.1f}" for x in (e.transfer, e.serial, e.tail, e.seconds)]
        cells = [e.launches, f"{(case.read + case.written) / 1e6:.1f}", *times]
        limit = budget.limit(LAUNCH + e.transfer)
        verdict = (
            "" if limit is None else f", {limit * 1e6:.1f} us: {'met' if e.seconds <= limit else 'missed'}"
        )
        print(f"{case.name:44}", *(f"{cell:>9}" for cell in cells), f" {budget}{verdict}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
