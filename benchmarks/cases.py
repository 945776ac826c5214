"""The cases of the suites, for a GPU and for a CPU, and the budgets of those that have one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from attnshape.bench.cases import Case, Shape, What

ATTENTION = (Shape(32, 1024, 2048), Shape(64, 2048, 4096), Shape(128, 4096, 8192))
SWEEPS = (Shape(4096, 512), Shape(2048, 4096), Shape(512, 32768))
LONG = (Shape(1, 131072), Shape(8, 32768))
UNEQUAL = tuple(Shape(64, 32768, lengths=(200,) * 63 + (32768,), packed=packed) for packed in (False, True))
SMALL = Shape(8, 256, 512)
CPU_ROWS = Shape(4, 1024, 2048)
COLUMN = Shape(4, 2048, 4096)
HOLES = Shape(256, 1024, holes=True)

MODELS = {
    "GPT-2 small": (12, 12, 64),
    "Llama 3 8B, Mistral 7B": (32, 8, 128),
    "Llama 3 70B": (64, 8, 128),
    "Qwen3 14B": (40, 8, 128),
    "Gemma 7B": (16, 16, 256),
}
"""Query heads, key heads and head width, as the models' configurations say."""

FRESH, FORWARD = "copy into fresh memory", "attention forward"
PLAIN_TOKENS, PLAIN_WIDTH = 1 << 22, 2048
"""A loop over tokens is not timed on more: it only takes longer."""


class Budget(NamedTuple):
    """A limit in seconds, from the time that a copy of the same bytes takes."""

    of_copy: float = 0.0  # this share of the copy's bandwidth
    of_fresh: float = 0.0  # this share of the bandwidth of a copy into fresh memory
    times_copy: float = 0.0  # this many times its time
    times_forward: float = 0.0  # this many times FlashAttention-2's forward of the layer
    seconds: float = 0.0
    of_plain: float = 0.0  # plain PyTorch takes this many times as long, at least

    def limit(
        self, copy_seconds: float, fresh_seconds: float = 0.0, forward_seconds: float = 0.0
    ) -> float | None:
        """None where there is no budget, or one over plain PyTorch, or one over what was not timed."""
        if self.of_copy:
            return copy_seconds / self.of_copy
        if self.of_fresh:
            return fresh_seconds / self.of_fresh
        return self.times_copy * copy_seconds or self.times_forward * forward_seconds or self.seconds or None

    def __str__(self) -> str:
        if self.of_copy:
            return f"{self.of_copy:.0%} of a copy"
        if self.of_fresh:
            return f"{self.of_fresh:.0%} of a copy into fresh memory"
        if self.of_plain:
            return f"{self.of_plain:g} x plain PyTorch"
        if self.times_copy:
            return f"{self.times_copy} x a copy"
        if self.times_forward:
            return f"{self.times_forward} x an attention forward"
        return f"{self.seconds * 1e6:.0f} us" if self.seconds else "none"


NONE = Budget()


def launches(case: Case) -> int:
    """Of kernels that a call starts on a GPU."""
    from csrc_triton.host.attention import ONE_LAUNCH  # triton is there on Linux only

    apart = max(case.shape.response, case.shape.keys * (case.what == "row")) > ONE_LAUNCH
    by_what = {"fused": 1 + 2 * apart, "credit": 1 + 2 * apart, "row": 1 + apart, "whiten": 2, "column": 6}
    return by_what.get(case.what, 1)


def budget_cases() -> Iterator[tuple[Case, Budget]]:
    """The calls that a GPU has budgets for."""
    for what in ("fused", "credit", "row"):
        for shape, share in zip(ATTENTION, (0.8, 0.9, 0.95), strict=True):
            yield Case(what, shape), Budget(of_copy=share)
    for shape in SWEEPS:
        yield Case("sweep", shape), Budget(of_copy=0.85)
    for shape in SWEEPS:
        yield Case("gae", shape), NONE
    for shape, seconds in zip(LONG, (15e-6, 17e-6), strict=True):
        yield Case("sweep", shape), Budget(seconds=seconds)
    for shape in UNEQUAL:
        yield Case("sweep", shape), Budget(times_copy=1.3)
    yield Case("whiten", SWEEPS[0]), NONE
    yield Case("fused", SMALL), Budget(seconds=10e-6)
    yield Case("column", COLUMN), Budget(times_forward=1.3)


def suite_cases(device_type: str) -> Iterator[tuple[Case, Budget]]:
    """Every call that is timed by itself on such a device; on a GPU those with a budget come first."""
    if device_type == "cuda":
        yield from budget_cases()
    budgeted = {case for case, _ in budget_cases()} if device_type == "cuda" else set()
    cases = _gpu_cases() if device_type == "cuda" else _cpu_cases()
    for case in dict.fromkeys(cases):
        if case not in budgeted:
            yield case, NONE if device_type == "cuda" else cpu_budget(case)


def cpu_budget(case: Case) -> Budget:
    if case.what in ("whiten", "column"):
        return Budget(of_plain=1)
    if case.what == "gae" and case.shape.tokens == 64 * 128:
        return Budget(seconds=60e-6)
    if case.what in ("gae", "sweep") and case.shape.tokens >= 1 << 20 and not case.shape.lengths:
        return Budget(of_fresh=0.35)
    if case.what in ("fused", "row") and case.shape == CPU_ROWS:
        return Budget(of_fresh=0.6)
    return NONE


def _gpu_cases() -> Iterator[Case]:
    for batch in (1, 8, 64):
        for keys in (512, 2048, 8192):
            yield Case("fused", Shape(batch, keys // 2, keys))
    yield Case("fused", Shape(1, 16384, 32768))
    for batch, keys in ((8, 8192), (64, 2048)):
        yield Case("fused", Shape(batch, keys // 8, keys))
    yield from _of_models(Shape(16, 2048, 4096), torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        yield Case("fused", ATTENTION[0], dtype)
    for shape in ATTENTION:
        yield Case("apart", shape)
    squares = (Shape(64, 128), Shape(256, 1024), *SWEEPS, Shape(8192, 4096), *LONG)
    yield from _recurrences(squares, squares)
    yield from (Case("whiten", shape) for shape in (Shape(256, 1024), *SWEEPS[1:]))
    yield Case("column", Shape(1, 1024, 2048))


def _cpu_cases() -> Iterator[Case]:
    for batch in (1, 4):
        for keys in (512, 2048):
            yield Case("fused", Shape(batch, keys // 2, keys), torch.float32)
    yield Case("fused", Shape(4, 256, 2048), torch.float32)
    yield Case("fused", CPU_ROWS, torch.float32)
    yield Case("fused", CPU_ROWS)
    yield from _of_models(Shape(2, 512, 1024), torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        yield Case("fused", Shape(4, 256, 512), dtype)
    parts: tuple[What, ...] = ("apart", "credit", "row")
    yield from (Case(what, CPU_ROWS, torch.float32) for what in parts)
    sweeps = (Shape(64, 128), Shape(256, 1024), Shape(1024, 2048), LONG[0])
    yield from _recurrences(sweeps, (*sweeps, Shape(64, 32768)))
    yield from (Case("gae", Shape(8192, 4096), lam=lam) for lam in (0.95, 1.0))
    yield from (Case("whiten", shape) for shape in sweeps[:3])
    yield Case("column", Shape(1, 256, 512), torch.float32)


def _of_models(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for model, (heads, kv_heads, width) in MODELS.items():
        of_model = shape._replace(heads=heads, kv_heads=kv_heads, width=width)
        yield Case("fused", of_model, dtype, model=model)


def _recurrences(sweeps: tuple[Shape, ...], gaes: tuple[Shape, ...]) -> Iterator[Case]:
    """The sweep and ``gae`` at gamma lam = 1 and below, with unequal lengths and both mask semantics."""
    for lam in (0.95, 1.0):
        yield from (Case("gae", shape, lam=lam) for shape in gaes)
    yield from (Case("sweep", shape) for shape in (*sweeps, *UNEQUAL))
    yield Case("sweep", sweeps[1], lam=1.0)
    for what in ("sweep", "gae"):
        yield Case(what, HOLES)
        yield Case(what, HOLES, mask_semantics="zero")


def with_plain(case: Case) -> bool:
    """Whether the same is timed in plain PyTorch too."""
    return case.shape.response <= PLAIN_WIDTH and case.shape.tokens <= PLAIN_TOKENS


def made_small(case: Case) -> Case:
    """The same call at a shape that takes no time, to exercise what measures it."""
    lengths = (5,) * (len(case.shape.lengths) - 1) + (40,) if case.shape.lengths else ()
    shape = case.shape._replace(batch=len(lengths) or 3, response=40, lengths=lengths)
    heads = {"heads": 4, "kv_heads": 2, "width": 16}
    return case._replace(shape=shape._replace(keys=64 if shape.keys else 0, **heads))
