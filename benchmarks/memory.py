"""What a call holds: exact counts of the allocator, not the size of a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes beyond what was allocated before the call."""

    peak: int
    """The most that were held at once."""
    held: int
    """What its result still holds."""


def memory_of(call: Callable[[], Any], device: torch.device) -> Memory:
    """Memory of a call that has run before, so that what it makes once is not counted.

    On a GPU the caching allocator's own peak; on a CPU the running sum of every allocation and release that
    torch's profiler records (``profile_memory``), temporaries inside operators included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device) - before
        del result
        return Memory(torch.cuda.max_memory_allocated(device) - before, held)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del result
    return Memory(peak, total)
