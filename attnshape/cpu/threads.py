"""Which threads run the loops: as many as PyTorch was given, each with some rows at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

TOKENS = 1 << 15
"""Work that a thread takes at once, at least: some 50 us, as long as waking one takes. None is woken for less
than twice as much each."""

# glibc keeps free memory up to twice the largest block that it has seen freed; more goes to the system.
# Before that a call's outputs would be mapped anew each time, page by page: more than computing them costs.
torch.empty(31 << 20, dtype=torch.uint8, device="cpu")

_own = threading.local()
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _forget() -> None:
    """A forked child has the pool's memory but none of its threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def scratch(numbers: int) -> np.ndarray:
    """This thread's memory for as many float64, with whatever it was left with."""
    found: np.ndarray | None = getattr(_own, "scratch", None)
    if found is None or len(found) < numbers:
        found = _own.scratch = np.zeros(numbers)
    return found


def _helpers(count: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < count:
            _pool = ThreadPoolExecutor(count, thread_name_prefix="attnshape")
        return _pool


def over_rows(compute: Callable[[int, int], None], rows: int, work: int, multiple: int = 1) -> None:
    """``compute(low, high)`` for all rows, in any order, by this thread and by others that have time.

    ``compute`` lets go of the interpreter's lock, and keeps alive what it reads and writes.

    Args:
        work: tokens of a row.
        multiple: of rows, that are taken at once.
    """
    threads = torch.get_num_threads()
    size = min(max(rows * work // (16 * threads), TOKENS), 16 * TOKENS)  # few takings
    step = max(size // max(work, 1) // multiple, 1) * multiple
    pieces = -(-rows // step)
    threads = min(threads, pieces, rows * work // (2 * TOKENS))
    if threads <= 1:
        compute(0, rows)
        return
    taken = itertools.count()  # its `next` is atomic
    stopped = False

    def share() -> None:
        while not stopped and (piece := next(taken)) < pieces:
            compute(piece * step, min(piece * step + step, rows))

    futures: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # an interpreter that is shutting down starts no threads
        futures += [_helpers(threads - 1).submit(share) for _ in range(threads - 1)]
    try:
        share()
        for future in futures:
            if not future.cancel():  # one that has not begun is not needed any more
                future.result()
    finally:
        stopped = True
