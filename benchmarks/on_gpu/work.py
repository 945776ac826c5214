"""A worker: one part's items, one after the other, on a machine.

Each item is announced before it begins, and in it each kernel before it starts, so that whoever watches knows
what hangs. A kernel that is known to be broken is not started again: what needs it is skipped.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from attnshape.bench.cases import Case
from attnshape.bench.measure import WrongResultError
from attnshape.bench.timing import sets_for
from benchmarks.on_gpu.machine import Machine
from csrc_triton.launch import COUNTERS, Launcher

GPU_ERRORS = ("CUDA error", "illegal memory access", "misaligned address", "unspecified launch failure")
"""What is said of a context that no later call can use."""
ROUNDING = 10.0
"""Times its bound that an error is at most where it may be rounding: it is wrong, and yet worth its time."""


class Item(NamedTuple):
    """One question. ``ask`` returns what is to be kept of the answer."""

    name: str
    ask: Callable[[Worker], dict[str, Any]]
    limit: float = 30.0
    """Seconds that may pass between two signs of life."""


class BrokenError(Exception):
    """A kernel that is known to be broken would be started."""


class Worker:
    def __init__(self, machine: Machine, told: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
        self.machine, self.say = machine, say
        self.done: set[str] = set(told["done"])
        self.broken: dict[str, str] = told["broken"]
        self.until = time.monotonic() + told["seconds"]
        self._held: tuple[Case, list[dict[str, Any]]] | None = None

    def arguments(self, case: Case) -> list[dict[str, Any]]:
        """Random arguments, so many times that together they are several times the cache."""
        if self._held is None or self._held[0] != case:
            self._held = None
            self.machine.tidy()
            sets = sets_for(case.bytes, self.machine.device)
            self._held = case, [self.machine.arguments(case, seed) for seed in range(sets)]
        return self._held[1]

    def run(self, items: Iterator[Item]) -> None:
        """Every item that is not done."""
        for item in items:
            if item.name in self.done:
                continue
            if time.monotonic() > self.until:
                self.say({"event": "line", "item": item.name, "status": "skipped", "error": "no time left"})
                continue
            COUNTERS.forget()  # the graphs of the item before are gone
            self.say({"event": "item", "name": item.name, "limit": item.limit})
            begun = time.monotonic()
            try:
                line = {"status": "ok", **item.ask(self)}
            except Exception as error:
                line = failed(error)
            line["seconds"] = round(time.monotonic() - begun, 2)
            self.say({"event": "line", "item": item.name, **line})
            if line.get("on_gpu"):
                self.say({"event": "again"})
                raise SystemExit(1)
        self.say({"event": "finished"})

    def error(self, measure: Callable[[], float]) -> dict[str, Any]:
        """What a comparison with the reference finds; a line that says ``wrong`` where it is rounding.

        Raises:
            WrongResultError: another function was computed.
        """
        try:
            return {"error_of_bound": self.machine.error(measure)}
        except WrongResultError as error:
            if not error.of_bound <= ROUNDING:
                raise
            return {
                "error_of_bound": error.of_bound,
                "status": "wrong",
                "error": str(error),
                "rounding": True,
            }

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[str]]:
        """Kernels are announced, and waited for one by one; yields the names of those that ran."""
        launch, ran = Launcher.__call__, list[str]()

        def announced(launcher: Any, programs: int, options: dict[str, int], **arguments: Any) -> None:
            tag = tag_of(launcher, arguments)
            for name in (tag, tag.split()[0]):
                if name in self.broken:
                    raise BrokenError(f"needs {name}: {self.broken[name]}")
            what = described(arguments)
            self.say({"event": "launch", "tag": tag, "programs": programs, "options": options, "given": what})
            launch(launcher, programs, options, **arguments)
            self.machine.synchronize()
            ran.append(launcher.kernel.__name__)

        Launcher.__call__ = announced  # type: ignore[method-assign]
        try:
            yield ran
        finally:
            Launcher.__call__ = launch  # type: ignore[method-assign]


def failed(error: Exception) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    if isinstance(error, BrokenError):
        return {"status": "skipped", "error": str(error)}
    if isinstance(error, WrongResultError):
        return {"status": "wrong", "error": str(error)}
    on_gpu = any(words in text for words in GPU_ERRORS)
    return {"status": "failed", "error": text[-3000:], **({"on_gpu": True} if on_gpu else {})}


def tag_of(launcher: Any, arguments: dict[str, Any]) -> str:
    """What a launch's kernel is in short: what finishes it or feeds it, packed or not, the dtype of keys."""
    tag = [launcher.kernel.__name__]
    tag += [str(arguments[name] or "alone") for name in ("FINISH", "SOURCE") if name in arguments]
    if getattr(arguments.get("response"), "p_cu", None) is not None:
        tag.append("packed")
    layer = arguments.get("layer")
    if layer is not None:
        tag.append(str(layer.p_key.dtype).removeprefix("torch."))
    return " ".join(tag)


def described(x: Any) -> Any:
    """Arguments, for JSON: of tensors their dtype, shape and alignment."""
    if isinstance(x, Tensor):
        aligned = "" if x.data_ptr() % 16 == 0 else " misaligned"
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{aligned}"
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return {name: described(held) for name, held in zip(x._fields, x, strict=True) if held is not None}
    if isinstance(x, dict):
        return {name: described(held) for name, held in x.items() if held is not None}
    return x if isinstance(x, int | float | str) else str(x)
