"""What the launchers share."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
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


class _Watched(threading.local):
    """Who notes what a thread launches, to repeat it: see ``csrc_triton.plan``."""

    by: Any = None


WATCHED = _Watched()


def fitted(options: dict[str, Any], target: Any) -> dict[str, Any]:
    """With which to compile there: a warp with 512 tokens spills where it does not on Hopper."""
    spilling = "maxnreg" in options and options["num_warps"] == 1 and target.arch != 90
    return options | {"maxnreg": 255} if spilling else options


class Launcher:
    """Starts a kernel with what was compiled for arguments of the same kinds.

    Arguments are tensors, numbers, None, or NamedTuples of them; kinds are constants, dtypes, the types of
    numbers, what is None, and of the tensors named as ``aligned``, such as ``layer.p_key``, whether they are.
    Triton would compile for more, such as numbers that 16 divides: they choose layouts, and layouts choose
    the order of additions.
    """

    def __init__(self, kernel: Any, *aligned: str) -> None:
        self.kernel = kernel
        parameters = inspect.signature(kernel.fn).parameters.values()
        self.constant = {p.name: "constexpr" in str(p.annotation) for p in parameters}
        self.aligned: list[list[str]] = [path.split(".") for path in aligned]
        self.interpreted = interpreted()
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, programs: int, options: dict[str, Any], **arguments: Any) -> None:
        """Starts this many programs.

        Raises:
            TypeError: the names of the arguments are not those of the kernel's parameters.
        """
        if arguments.keys() != self.constant.keys():
            wrong = ", ".join(sorted(arguments.keys() ^ self.constant.keys()))
            raise TypeError(f"{self.kernel.fn.__name__}: {wrong}: want a value for each of its parameters")
        values = [arguments[name] for name in self.constant]
        if self.interpreted:
            self.kernel[(programs, 1, 1)](*values)
            return
        key = self.key(arguments, options)
        compiled = self.compiled.get(key)
        if compiled is None:
            target = triton.runtime.driver.active.get_current_target()
            compiled = triton.compile(self.source(arguments), target=target, options=fitted(options, target))
            self.compiled[key] = compiled
        start = compiled[(programs, 1, 1)]
        if WATCHED.by is not None:
            WATCHED.by.launched(self, start, arguments)
        start(*values)

    def key(self, arguments: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
        """What arguments have in common that are served by one compilation."""
        kinds: list[Any] = []
        some: Any = None
        for name, constant in self.constant.items():
            value = arguments[name]
            if constant:
                kinds.append(value)
                continue
            for x in value if isinstance(value, tuple) else (value,):
                kind = type(x)
                if x is None or kind is float:
                    kinds.append(kind)
                elif kind is int:
                    kinds.append(kind if -(2**31) <= x < 2**31 else "i64")
                else:
                    some = x
                    kinds.append(x.dtype)
        kinds += [_is_aligned(arguments, path) for path in self.aligned]
        return (some.device, *kinds, *options.values())

    def source(self, arguments: dict[str, Any]) -> Any:
        """What Triton compiles."""
        from triton.compiler import ASTSource

        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        names = list(self.constant)
        for i, (name, constant) in enumerate(self.constant.items()):
            value = arguments[name]
            if constant or value is None:
                signature[name], constants[i,] = "constexpr", value
            elif isinstance(value, tuple):
                signature[name] = type(value)(*map(kind_of, value))
                constants |= {(i, j): None for j, x in enumerate(value) if x is None}
            else:
                signature[name] = kind_of(value)
        for name, *field in self.aligned:
            if _is_aligned(arguments, (name, *field)):
                path = (names.index(name), *(arguments[name]._fields.index(x) for x in field))
                attributes[path] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


_CALL = Launcher.__call__


def launches_are_replaced() -> bool:
    """Whether somebody looks at launches one by one, as benchmarks do: none may be repeated then."""
    return Launcher.__call__ is not _CALL


def _is_aligned(arguments: dict[str, Any], path: Sequence[str]) -> bool:
    x = arguments[path[0]]
    for field in path[1:]:
        x = getattr(x, field)
    return x is not None and x.data_ptr() % 16 == 0


KINDS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def kind_of(x: Any) -> str:
    """How Triton names what an argument is passed as."""
    if isinstance(x, Tensor):
        return KINDS[x.dtype]
    if isinstance(x, float):
        return "fp32"
    if x is None:
        return "constexpr"
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    return bool(triton.knobs.runtime.interpret)


def has_ptx() -> bool:
    """Whether kernels may use instructions of NVIDIA's that Triton has no other name for."""
    return not interpreted() and torch.version.hip is None


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


def stream_of(device: torch.device) -> Callable[[], int]:
    """What says the current stream there; without a GPU the thread, whose launches follow one another too.

    Triton's own: PyTorch's ``current_stream`` makes an object of it, which takes ten times that.
    """
    if device.type != "cuda":
        return threading.get_ident
    return functools.partial(triton.runtime.driver.active.get_current_stream, device.index)


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
        counters = self.of(device, stream_of(device)(), count)
        if WATCHED.by is not None:
            WATCHED.by.taken(counters, count)
        return counters

    def of(self, device: torch.device, stream: int, count: int) -> Tensor:
        """The same, where the current stream is known and nobody watches."""
        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return self._for_graph(device, count)
        counters = self._of_stream.get((device, stream))
        if counters is None or counters.numel() < count:  # `len` is a function of Python's
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

    def forget(self) -> None:
        """As if nothing had been launched: no graph that was captured before may be replayed after.

        For whoever measures: where graphs have used up the spare ones, each replay zeroes its own.
        """
        with self._lock:
            self._of_stream, self._spare = {}, {}

    def discard(self, device: torch.device) -> None:
        """After a launch that broke off: what its programs left is of no use."""
        with self._lock:
            self._of_stream = {key: x for key, x in self._of_stream.items() if key[0] != device}


COUNTERS = Counters()
