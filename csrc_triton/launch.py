"""What the launchers share."""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

COMPILER = {"num_warps": 4, "enable_fp_fusion": False}
"""Unfused: no result depends on what a compiler happens to contract."""


def registers(most: int) -> dict[str, int]:
    """Left alone, ptxas spills one or two to fit one more program on a multiprocessor."""
    return {} if torch.version.hip else {"maxnreg": most}


def kernel(*aligned: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` that specialises only ``constexpr`` parameters and the alignment of the pointers named.

    Alignment and divisibility choose layouts, and layouts choose the order of additions.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        plain = [name for name, constant in _parameters(function).items() if not constant]
        return triton.jit(function, do_not_specialize=[name for name in plain if name not in aligned])

    return decorate


def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Whether each parameter of a kernel is ``constexpr``."""
    return {p.name: "constexpr" in str(p.annotation) for p in inspect.signature(function).parameters.values()}


class Launcher:
    """Starts a kernel with what was compiled for arguments of the same kinds.

    Triton finds that out anew at every launch, parameter by parameter. Kinds are those of ``kernel``:
    constants, dtypes, the types of numbers, what is None, and of ``aligned`` pointers whether they are, and
    whether 32 bits reach all of their memory. Pointers are named ``p_``.
    """

    def __init__(self, kernel: Any, defaults: dict[str, Any], aligned: Sequence[str]) -> None:
        self.kernel, self.defaults = kernel, {name: defaults[name] for name in _parameters(kernel.fn)}
        self.compiled: dict[tuple[Any, ...], Any] = {}
        constant = _parameters(kernel.fn)
        numbers = [name for name in constant if not constant[name] and not name.startswith("p_")]

        def chosen(names: Iterable[str]) -> Callable[[Any], Any]:
            names = tuple(names)
            return operator.itemgetter(*names) if len(names) != 1 else lambda found: (found[names[0]],)

        self.in_order = chosen(constant)
        self.constants = chosen(name for name in constant if constant[name])
        self.pointers = chosen(name for name in constant if name.startswith("p_"))
        self.numbers = chosen(numbers)
        self.integers = chosen(name for name in numbers if type(defaults[name]) is int)
        self.aligned = chosen(aligned)

    def __call__(self, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """``arguments`` by name; what is left out has its default.

        Raises:
            TypeError: a name is no parameter's.
        """
        arguments = self.defaults | arguments
        if len(arguments) > len(self.defaults):
            unknown = ", ".join(sorted(arguments.keys() - self.defaults.keys()))
            raise TypeError(f"{self.kernel.fn.__name__}: got {unknown}, want names of its parameters")
        key = self.key(arguments, options)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[(programs, 1, 1)](*self.in_order(arguments), **options)
            # The interpreter compiles nothing, and which integers are wide is left to Triton.
            if compiled is not None and max(self.integers(arguments)) < 2**31:
                self.compiled[key] = compiled
        else:
            compiled[(programs, 1, 1)](*self.in_order(arguments))

    def key(self, arguments: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
        """What arguments have in common that are served by one compilation."""
        pointers, aligned = self.pointers(arguments), self.aligned(arguments)
        return (
            next(x.device for x in pointers if x is not None),
            tuple([None if x is None else x.dtype for x in pointers]),
            tuple([x is None or x.data_ptr() % 16 == 0 for x in aligned]),
            tuple([x is None or x.untyped_storage().nbytes() < 2**31 for x in aligned]),  # AMD
            tuple([type(x) for x in self.numbers(arguments)]),
            max(self.integers(arguments)) < 2**31,  # others are passed in 64 bits
            self.constants(arguments),
            *options.values(),
        )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    return bool(triton.knobs.runtime.interpret)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tokens(x: Tensor | None) -> Tensor | None:
    """``x`` with neighbouring tokens neighbours in memory; kernels take any stride between rows."""
    if x is None:
        return None
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def contiguous(x: object) -> Tensor | None:
    """``x``, if it is a tensor, with its elements side by side."""
    return x.contiguous() if isinstance(x, Tensor) else None


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.ndim == 1 else x.stride(0)


def stride_unit(*strides: int) -> int:
    """What strides are counted in: 16 bytes or more where all allow it, so that loads may be that wide."""
    return 1 if any(stride % 8 for stride in strides) else 8


def padded(size: int) -> int:
    """The power of two at or above ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's where there is none, for the interpreter to take the same paths."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _zeros_for_good(count: int, device: torch.device) -> Tensor:
    """Zeros that outlive the call, whatever memory pool it runs in, and that every stream may read at once.

    A CUDA graph of inductor's owns what the calling thread allocates; what another thread does, it does not.
    """

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


class Counters:
    """Zeroed int32 counters by which programs of a launch find each other; each launch leaves them zero.

    A stream has its own, since its launches follow one another. A captured graph has its own for good: it may
    be replayed beside anything. They come from memory zeroed ahead, so that a replay needs no memset.
    """

    SPARE = 1 << 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self._spare: dict[torch.device, Tensor] = {}

    def take(self, device: torch.device, count: int) -> Tensor:
        """At least ``count`` counters for the next launch on the current stream."""
        on_gpu = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else threading.get_ident()
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return self._for_graph(device, count)
        counters = self._of_stream.get((device, stream))
        if counters is None or len(counters) < count:
            counters = _zeros_for_good(padded(max(count, 4096)), device)
            with self._lock:
                self._of_stream[device, stream] = counters
                if on_gpu and device not in self._spare:
                    self._spare[device] = _zeros_for_good(self.SPARE, device)
        return counters

    def _for_graph(self, device: torch.device, count: int) -> Tensor:
        with self._lock:
            spare = self._spare.get(device)
            if spare is None or len(spare) < count:
                # Zeroed by the graph itself, at each replay.
                return torch.zeros(count, dtype=torch.int32, device=device)
            counters, self._spare[device] = spare[:count], spare[ceil_div(count, 32) * 32 :]
            return counters

    def discard(self, device: torch.device) -> None:
        """After a launch that broke off: what its programs left is of no use."""
        with self._lock:
            self._of_stream = {key: x for key, x in self._of_stream.items() if key[0] != device}


COUNTERS = Counters()
