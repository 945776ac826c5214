"""How long each budget's call should take: bytes, instructions, steps in turn, and the last wave.

``python -m benchmarks.cost_model`` prints the table of docs/kernels.md. These are estimates to hold
measurements against; an assumption that a measurement refutes is to be replaced by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnshape.bench.cases import Case
from benchmarks.cases import budget_cases
from csrc_triton.host.attention import CHUNK, KEYS, ONE_LAUNCH, chunks_per_program
from csrc_triton.host.rewards import in_chunks, warps_of
from csrc_triton.launch import ceil_div


class Gpu(NamedTuple):
    """An H200 (NVIDIA's data sheet: 4.8 TB/s, 989 dense bfloat16 TFLOP/s), where nothing was measured."""

    bandwidth: float = (
        4.8e12  # bytes per second, read and written together; better the copy's of the same run
    )
    processors: int = 132
    flops: float = 989e12
    clock: float = 1.7e9  # cycles per second
    cache: float = 50e6  # bytes of the second level


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
PROGRAM = (
    3.5e-6  # of a program that reads keys, what is not keys: bounds, the query, the first tiles, the end
)
STEP = 3e-6  # one chunk of a row by a program of four warps that has it to itself: loads, scan, carry
WARP_CYCLES = 8  # from one instruction to the next of a warp that sweeps a row, its loads waited for
SHARED_STEP = 4e-6  # each of the two tasks of a chunk whose row is shared
SHARING = 300  # more instructions of a warp for a chunk whose row is shared
COMPOSE = 20e-9  # one link of the chain of carries
AVERAGING = 6e-6  # more for a chunk whose heads are averaged by the second launch, eight key heads in turn

# And otherwise.
CYCLES = 9  # from one instruction of a warp to its next, on average
MATMUL = 0.5  # share of the matrix rate that score tiles reach
GROUP = 16  # chunks whose carry is published together
FOLD = 128  # partials folded at once


class Code(NamedTuple):
    """What the compiler made of a kernel, for sm_90 (docs/kernels.md)."""

    instructions: float  # of its warps together, per chunk
    programs: int  # that a multiprocessor holds
    warps: int = 4


READ = {
    "fused": Code(4 * 239, 3),
    "credit": Code(4 * 239, 3),
    "row": Code(4 * 239, 4),
    "terms": Code(4 * 239, 4),
}
"""Per chunk of 64 keys."""
SWEPT = {
    "sweep": {1: Code(1079 + 221, 12, 1), 4: Code(4 * (458 + 122), 3)},
    "gae": {1: Code(637 + 130, 12, 1), 4: Code(4 * (333 + 51), 5)},
}
"""Per 512 tokens, by warps of a program."""


class Estimate(NamedTuple):
    launches: int
    transfer: float  # bytes over bandwidth
    issue: float  # instructions over what the warps that fit can issue
    serial: float  # steps that follow each other while bytes move, and hide behind them or do not
    last: float  # what the last wave of programs, which does not fill the GPU, takes beyond its bytes
    tail: float  # steps that follow after the last byte was read

    @property
    def seconds(self) -> float:
        return self.launches * LAUNCH + max(self.transfer, self.issue, self.serial) + self.last + self.tail


def issue_seconds(chunks: float, code: Code, gpu: Gpu) -> float:
    """A multiprocessor issues four instructions a cycle at most, and one for each warp every ``CYCLES``."""
    a_cycle = min(4.0, code.warps * code.programs / CYCLES)
    return chunks * code.instructions / (a_cycle * gpu.processors * gpu.clock)


def estimate(case: Case, gpu: Gpu) -> Estimate:
    """Estimate of one call on warm code, its inputs in device memory."""
    if case.what in ("fused", "credit", "row"):
        return _of_keys(case, gpu)
    s, transfer = case.shape, (case.read + case.written) / gpu.bandwidth
    if case.what in ("sweep", "gae"):
        issue, serial = _swept(case, SWEPT[case.what], gpu)
        return Estimate(1, transfer, issue, serial, 0.0, 0.0)
    if case.what == "column":
        # Every response query against the keys before it, then against those of the response once more.
        inside = s.response * (s.response + 1) // 2
        products = s.batch * s.heads * (s.response * (s.keys - s.response) + 2 * inside)
        return Estimate(6, transfer, 0.0, 2 * s.width * products / (MATMUL * gpu.flops), 0.0, 0.0)
    return Estimate(2 if case.what == "whiten" else 1, transfer, 0.0, 0.0, 0.0, 0.0)


def _swept(case: Case, codes: dict[int, Code], gpu: Gpu) -> tuple[float, float]:
    """Seconds to issue a sweep's instructions, and of its steps."""
    s = case.shape
    longest = ceil_div(s.response, CHUNK)
    n_chunks = sum(ceil_div(n, CHUNK) for n in s.lengths) if s.packed else s.batch * longest
    live = sum(ceil_div(n, CHUNK) for n in s.lengths) if s.lengths else n_chunks
    alone = not s.packed and s.response % 4 == 0
    if not in_chunks(s.batch, longest, n_chunks, gpu.processors, alone):
        code = codes[warps_of(s.batch, gpu.processors, alone)["num_warps"]]
        step = STEP if code.warps > 1 else WARP_CYCLES * code.instructions / gpu.clock
        issue = issue_seconds(live, code, gpu)
        return issue, ceil_div(s.batch, code.programs * gpu.processors) * longest * step
    code = codes[warps_of(2 * n_chunks, gpu.processors, alone)["num_warps"]]
    shared = code._replace(instructions=code.instructions + SHARING * code.warps)
    issue = issue_seconds(live, shared, gpu)
    # Facts, everybody's facts, the carry of a group, and of the groups before.
    chain = 3 * HANDOFF + COMPOSE * (GROUP + ceil_div(longest, GROUP))
    waves = ceil_div(2 * n_chunks, code.programs * gpu.processors)
    return issue, waves * SHARED_STEP + chain


def _of_keys(case: Case, gpu: Gpu) -> Estimate:
    """A launch that reads keys, and what finishes its rows."""
    s, row = case.shape, case.what == "row"
    tokens = s.keys if row else s.response
    two = tokens > ONE_LAUNCH
    code = READ["terms" if two else case.what]
    keys = 32 if s.width * case.dtype.itemsize >= 512 else KEYS
    chunks = ceil_div(s.keys, keys)
    split = chunks_per_program(s.batch * s.kv_heads, chunks, gpu.processors)
    programs = s.batch * s.kv_heads * ceil_div(chunks, split)
    of_program = split * keys * s.width * case.dtype.itemsize
    # Terms that the cache does not keep are written, and read by whoever finishes.
    terms = 4 * s.batch * s.heads * tokens
    transfer = (case.read + case.written + (2 * terms if terms > gpu.cache / 2 else 0)) / gpu.bandwidth
    issue = issue_seconds(s.batch * s.kv_heads * chunks, code, gpu)
    # Three tiles of a program are on their way at a time.
    alone = PROGRAM + of_program / (3 * keys * s.width * case.dtype.itemsize / TRIP)
    at_once = code.programs * gpu.processors
    full, rest = divmod(programs, at_once)
    last = max(alone - rest * of_program / gpu.bandwidth, 0.0) if rest else 0.0
    folds = 3 * TRIP * ceil_div(s.keys // 16, FOLD)
    longest = ceil_div(tokens, CHUNK)
    if not two:
        # A key head's programs fold and average it, then the last of them shapes the row.
        shaping = {"fused": STEP, "credit": 2 * TRIP, "row": TRIP}[case.what]
        tail = 2 * HANDOFF + folds + longest * (2 * TRIP + shaping)
        return Estimate(1, transfer, issue, full * alone, last, tail)
    if row:
        finish = ceil_div(s.batch * longest, at_once) * (AVERAGING + TRIP)
    else:
        finish = max(_swept(case, SWEPT["sweep"], gpu))
    return Estimate(2, transfer, issue, full * alone, last, HANDOFF + folds + finish)


# The table

CARDS = {"H100": Gpu(3.0e12), "H200": Gpu(4.3e12, cache=60e6)}
"""Bandwidth of a large copy, read and written together."""


def table() -> str:
    """Predictions beside budgets, in Markdown."""
    lines = [
        f"| case | budget | {' | '.join(f'{card}: us, of a copy' for card in CARDS)} | what bounds it |",
        "|---|---|" + "---|" * len(CARDS) + "---|",
    ]
    for case, budget in budget_cases():
        cells, bounds = [], ""
        for gpu in CARDS.values():
            e = estimate(case, gpu)
            copy = LAUNCH + (case.read + case.written) / gpu.bandwidth
            limit = budget.limit(copy)
            met = "" if limit is None else ", met" if e.seconds <= limit else ", missed"
            cells.append(f"{e.seconds * 1e6:.1f}, {copy / e.seconds:.0%}{met}")
            bounds = bounding(e)
        lines.append(f"| {case.name} | {budget} | {' | '.join(cells)} | {bounds} |")
    return "\n".join(lines) + "\n"


def bounding(e: Estimate) -> str:
    """The largest of what runs side by side, and what comes after it, if it is a tenth."""
    beside = {"bytes": e.transfer, "instructions": e.issue, "steps": e.serial}
    after = {"last wave": e.last, "tail": e.tail, "launches": e.launches * LAUNCH}
    most = max(beside, key=lambda name: beside[name])
    return ", ".join([most, *(name for name, x in after.items() if x > e.seconds / 10)])


if __name__ == "__main__":
    print(table(), end="")
