"""What a call costs its thread, where no GPU is: ``python -m benchmarks.host``.

Over the driver of the tests, which launches nothing: Triton's launcher runs, tensors lie in the host's memory
and nobody fills them. A call that is made anew and one that is repeated stand side by side. What a GPU's own
driver and its allocator take comes on top.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from attnshape import plans
from attnshape.bench.timing import time_calls
from benchmarks.on_gpu.budgets import HOST
from benchmarks.on_gpu.machine import Dry

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SECONDS = 6.0


def called(call: functools.partial[Any], repeated: bool) -> None:
    plans.is_on_current_gpu = lambda *_: repeated
    call()


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    os.environ.pop("TRITON_INTERPRET", None)
    from support.driver import activate, built

    # Memory that was freed is kept, as a GPU's allocator does.
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 1 << 30)
    machine = Dry()
    calls = {}
    for case, limit in HOST:
        call = functools.partial(machine.call, case, machine.arguments(case))
        for name, repeated in (("anew", False), ("repeated", True)):
            once = functools.partial(called, call, repeated)
            calls[f"{case.name}, budget {limit * 1e6:.0f} us, {name}"] = [once]
    with tempfile.TemporaryDirectory() as folder:
        activate(built(Path(folder)))
        for each in calls.values():
            for _ in range(3):
                each[0]()
        for name, timing in time_calls(calls, torch.device("cpu"), SECONDS).items():
            print(f"{name}: {timing.seconds * 1e6:.1f} us, least {min(timing.samples) * 1e6:.1f}")


if __name__ == "__main__":
    main()
