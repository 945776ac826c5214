"""The GPU as the parts see it; a test has another one, over a driver that launches nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attnshape.bench.cases import Case, random_arguments
from attnshape.bench.timing import Call, Timing, copy_calls, host_timing, time_calls
from benchmarks.beside import forward_call, read_calls

Outputs = dict[str, Tensor]


class Machine(Protocol):
    device: torch.device

    def arguments(self, case: Case, seed: int = 0) -> dict[str, Any]:
        """Random arguments of a case."""

    def call(self, case: Case, arguments: dict[str, Any]) -> Any:
        """The case, by the kernels."""

    def drawn(self, x: Any) -> Any:
        """What was drawn on the host, there."""

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, Timing]:
        """The same work by each name; the calls of one name have tensors of their own, more than a cache."""

    def copies(self, size: int, sets: int) -> list[Call]:
        """Copies that move so many bytes, half of them read."""

    def reads(self, size: int, sets: int) -> list[Call]:
        """Passes that only read so many."""

    def forwards(self, arguments: Sequence[dict[str, Any]]) -> list[Call]:
        """FlashAttention-2's forward of the layers that are among arguments, as PyTorch has it."""

    def load(self) -> Callable[[int], None]:
        """Keeps another stream busy, each turn with other work."""

    def host_time(self, call: Call) -> Timing: ...

    def launches(self, call: Call) -> list[str]:
        """The kernels of a call, as a profile sees them."""

    def error(self, measure: Callable[[], float]) -> float:
        """What a comparison with the reference finds, as a share of its bound."""

    def differ(self, got: Outputs, want: Outputs) -> Tensor:
        """How many outputs differ in a bit; stays there."""

    def capture(self, call: Callable[[], Outputs]) -> tuple[Call, Outputs]:
        """A graph of the call: its replay, and what that fills."""

    def compiled(self, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """``torch.compile(mode="reduce-overhead")``."""

    def stream(self) -> Any: ...

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]: ...

    def synchronize(self) -> None: ...

    def tidy(self) -> None:
        """Memory that nobody holds is given back."""


class Cuda:
    """The current GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def arguments(self, case: Case, seed: int = 0) -> dict[str, Any]:
        return random_arguments(case, self.device, seed)

    def call(self, case: Case, arguments: dict[str, Any]) -> Any:
        return case.call(arguments, "triton")

    def drawn(self, x: Any) -> Any:
        from attnshape.problems import mapped

        return mapped(x, lambda t: t.to(self.device))

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, Timing]:
        return time_calls(calls, self.device, seconds)

    def copies(self, size: int, sets: int) -> list[Call]:
        return copy_calls(size, sets, self.device)

    def reads(self, size: int, sets: int) -> list[Call]:
        return read_calls(size, sets, self.device)

    def forwards(self, arguments: Sequence[dict[str, Any]]) -> list[Call]:
        return [forward_call(x["inputs"]) for x in arguments]

    def load(self) -> Callable[[int], None]:
        stream = torch.cuda.Stream()
        x = torch.randn(2048, 2048, device=self.device)
        big = torch.ones(1 << 26, device=self.device)

        def start(turn: int) -> None:
            with torch.cuda.stream(stream):
                if turn % 3 == 0:
                    x @ x
                elif turn % 3 == 1:
                    big[: 1 << (10 + turn % 16)].add_(1)

        return start

    def host_time(self, call: Call) -> Timing:
        return host_timing(call, self.device)

    def launches(self, call: Call) -> list[str]:
        from torch.profiler import ProfilerActivity, profile

        call()
        for _ in range(2):  # the first time the profiler may begin too late
            self.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                call()
                self.synchronize()
        return [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    def error(self, measure: Callable[[], float]) -> float:
        return measure()

    def differ(self, got: Outputs, want: Outputs) -> Tensor:
        pairs = [(got[name].view(torch.int32), want[name].view(torch.int32)) for name in want]
        return torch.stack([(x != y).any() for x, y in pairs]).sum()

    def capture(self, call: Callable[[], Outputs]) -> tuple[Call, Outputs]:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return graph.replay, outputs

    def compiled(self, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return torch.compile(call, mode="reduce-overhead")

    def stream(self) -> Any:
        return torch.cuda.Stream()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Dry:
    """A machine that computes nothing: tensors of the host that nobody fills, and times that nobody took.

    What is started on it is what would be started on a GPU. ``Launcher.__call__`` is to be replaced before.
    """

    def __init__(self) -> None:
        from attnshape import triton_backend

        self.device = torch.device("cpu")
        triton_backend.unsupported = lambda *_: None

    def arguments(self, case: Case, seed: int = 0) -> dict[str, Any]:
        return case.arguments(self.device)

    def call(self, case: Case, arguments: dict[str, Any]) -> Any:
        return case.call(arguments, "triton")

    def drawn(self, x: Any) -> Any:
        return x

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, Timing]:
        return {name: Timing((1e-5,) * 20, "nothing was timed", 1e-5) for name in calls}

    def copies(self, size: int, sets: int) -> list[Call]:
        return []

    def reads(self, size: int, sets: int) -> list[Call]:
        return []

    def forwards(self, arguments: Sequence[dict[str, Any]]) -> list[Call]:
        return []

    def load(self) -> Callable[[int], None]:
        return lambda turn: None

    def host_time(self, call: Call) -> Timing:
        return Timing((1e-5,) * 20, "nothing was timed", 1e-5)

    def launches(self, call: Call) -> list[str]:
        return []

    def error(self, measure: Callable[[], float]) -> float:
        return 0.0

    def differ(self, got: Outputs, want: Outputs) -> Tensor:
        return torch.zeros((), dtype=torch.int64)

    def capture(self, call: Callable[[], Outputs]) -> tuple[Call, Outputs]:
        return lambda: None, call()

    def compiled(self, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return call

    def stream(self) -> Any:
        return None

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def tidy(self) -> None:
        pass
