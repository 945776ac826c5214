"""A call's launches, kept to be started again on other tensors of the same layout.

What a call passes to its kernels follows from the layout of its tensors: sizes, strides, dtypes, alignment.
Only addresses differ. A plan is made by watching one call, and written as a function that allocates, launches
and returns, nothing else. All memory between its launches is one allocation, and so are outputs of one shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton.launch import COUNTERS, WATCHED, Launcher, ceil_div, stream_of
from csrc_triton.written import Written, tuple_of

MOST = 1 << 25
"""Bytes between launches, at most: a plan has them all at once, a call that is made anew one after the other.
Where they are more, kernels take longer than the host."""
TOGETHER = 1 << 20
"""Bytes of outputs that are one allocation, at most: who keeps one of them keeps the memory of all."""
ALIGNED = 256
"""Bytes at whose multiples a tensor between launches begins."""
NUMBER = "settings", "kl_coef"
"""The argument that may be another number in each call."""

aten = torch.ops.aten
EMPTY = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
)
ZEROS = (aten.zeros.default, aten.zeros_like.default)


class Source(NamedTuple):
    """What an argument is: the address of what is ``given`` or made, or of ``counters``; so many bytes on."""

    kind: str
    place: int
    offset: int = 0


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is made and launched within.

    Args:
        given: addresses of the inputs, and ``NUMBER``.
    """

    def __init__(self, given: Sequence[float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = given
        # Of several inputs at one address the first.
        self.inputs = {address: i for i, address in reversed([*enumerate(given[:-1])])}
        self.sound = 0 not in self.inputs
        """Whether nothing else is done: no operator computes, and no address is another one's by chance."""
        self.made: list[Tensor] = []  # held, so that no address is given twice
        self.zeroed: list[bool] = []
        self.bytes = 0
        self.counters: list[tuple[int, int]] = []  # address, and how many
        self.launches: list[tuple[Callable[..., Any], list[Any]]] = []

    def __enter__(self) -> Self:
        WATCHED.by = self
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        WATCHED.by = None
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op in EMPTY or op in ZEROS:
            self.made.append(out)
            self.zeroed.append(op in ZEROS)
            self.bytes += out.nbytes
            if self.bytes > 8 * MOST:  # outputs too
                self.sound, self.made = False, []
        elif not op.is_view:
            self.sound = False
        elif args[0].data_ptr() in self.inputs:
            # Further on in an input another one may begin.
            self.sound &= isinstance(out, Tensor) and out.data_ptr() == args[0].data_ptr()
        return out

    def taken(self, counters: Tensor, count: int) -> None:
        """Counters for the next launch."""
        self.counters.append((counters.data_ptr(), count))

    def launched(self, launcher: Launcher, start: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Notes where each argument comes from."""
        values: list[Any] = []
        for name, constant in launcher.constant.items():
            value = arguments[name]
            if isinstance(value, tuple) and not constant:
                fields = zip(value._fields, value, strict=True)  # type: ignore[attr-defined]
                values.append([self.source(x, name, field) for field, x in fields])
            else:
                values.append(self.source(value, name))
        self.launches.append((start, values))

    def source(self, x: Any, *path: str) -> Any:
        """Where an argument comes from; itself, if it is the same in every call."""
        if path == NUMBER:
            self.sound &= x == self.given[-1]
            return Source("given", len(self.given) - 1)
        if not isinstance(x, Tensor):
            return x
        address = x.data_ptr()
        if address in self.inputs:
            return Source("given", self.inputs[address])
        for i, (counters, _) in reversed([*enumerate(self.counters)]):
            if address == counters:
                return Source("counters", i)
        found = self.within(x)
        self.sound &= found is not None
        return found

    def within(self, x: Tensor) -> Source | None:
        """Where in what was made."""
        for i, whole in enumerate(self.made):
            offset = x.data_ptr() - whole.data_ptr()
            if 0 <= offset < whole.nbytes:
                return Source("made", i, offset)
        return None


class Plan:
    """The launches that were watched, written as a function of what a call has of its own.

    Raises:
        ValueError: the call did more than launch kernels on what it was given and what it made.
    """

    def __init__(self, watch: Watch, result: Any) -> None:
        self.watch, self.text = watch, Written("repeat(given)")
        returned = list(_tensors(result))
        places = [source.place for source in map(watch.within, returned) if source]
        if not watch.sound or not watch.launches or not returned or len(places) < len(returned):
            raise ValueError("got a call that computes by itself, want one that only launches")
        if any(watch.zeroed[i] for i in places):
            raise ValueError("got an output of zeros, want one that is filled")
        self.device = returned[0].device
        self.begins: dict[int, tuple[int, int]] = {}
        """Of each tensor that is made: in which allocation, and how many bytes on."""
        self.outputs: dict[int, str] = {}
        """Those that are returned, as they are written."""
        self.allocations = 0

        line, constant = self.text.line, self.text.constant
        line(f"{tuple_of(f'given{i}' for i in range(len(watch.given)))} = given")
        for group in self._alike(returned, places):
            self._allocate_outputs(group)
        self._allocate_between()
        line(f"stream = {constant(stream_of(self.device))}()")
        device = constant(self.device)
        for i, (_, count) in enumerate(watch.counters):
            line(f"counters{i} = {constant(COUNTERS.of)}({device}, stream, {constant(count)})")
        line("try:")
        for start, values in watch.launches:
            arguments = [self._argument(x) for x in values]
            line(f"    {constant(start)}({', '.join(arguments)}, stream=stream)")
        line("except BaseException:")
        line(f"    {constant(COUNTERS.discard)}({device})")
        line("    raise")
        line(f"return {self._returned(result)}")

    def function(self) -> Callable[[Sequence[float]], Any]:
        """Starts them again; what the call would return."""
        return self.text.function()

    def _alike(self, returned: list[Tensor], places: list[int]) -> list[list[int]]:
        """Outputs, those together that may be one allocation."""
        made, groups = self.watch.made, dict[Any, list[int]]()
        for place in dict.fromkeys(places):
            whole = _layout(made[place])
            as_made = [_layout(x) for x, i in zip(returned, places, strict=True) if i == place] == [whole]
            even = made[place].ndim and made[place].is_contiguous() and made[place].nbytes % 16 == 0
            groups.setdefault(whole if as_made and even else place, []).append(place)
        found: list[list[int]] = []
        for group in groups.values():
            few = len(group) * made[group[0]].nbytes <= TOGETHER
            found += [group] if few else [[place] for place in group]
        return found

    def _allocate_outputs(self, group: list[int]) -> None:
        first, count = self.watch.made[group[0]], len(group)
        self.begins |= {place: (self.allocations, i * first.nbytes) for i, place in enumerate(group)}
        if count == 1:
            self.outputs[group[0]] = self._allocate(first.shape, first.stride(), first.dtype)
            return
        rows, *rest = first.shape
        whole = self._allocate((count * rows, *rest), first.stride(), first.dtype)
        self.outputs |= {place: f"output{place}" for place in group}
        # Not views to autograd: one may be changed in place while another is needed as it is.
        parts = tuple_of(self.outputs[place] for place in group)
        self.text.line(f"{parts} = {whole}.unsafe_split_with_sizes({self.text.constant((rows,) * count)})")

    def _allocate_between(self) -> None:
        """What is not returned, zeros first."""
        size = zeroed = 0
        for i in sorted(range(len(self.watch.made)), key=lambda i: not self.watch.zeroed[i]):
            if i not in self.begins:
                self.begins[i] = (self.allocations, size)
                size += ceil_div(self.watch.made[i].nbytes, ALIGNED) * ALIGNED
                zeroed = size if self.watch.zeroed[i] else zeroed
        if size > MOST:
            raise ValueError(f"got {size} bytes between launches, want at most {MOST}")
        if size:
            whole = self._allocate((size,), (1,), torch.uint8)
            if zeroed:
                self.text.line(f"{whole}[:{self.text.constant(zeroed)}].zero_()")

    def _allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> str:
        # `torch.empty` takes twice what `empty_like` does, of a tensor that has no memory itself.
        like = torch.empty_strided(tuple(size), stride, dtype=dtype, device=self.device)
        if torch.empty_like(like).stride() != stride:
            raise ValueError(f"got an output of strides {stride}, want one without gaps")
        like.untyped_storage().resize_(0)
        make = functools.partial(torch.empty_like, like)
        made = f"made{self.allocations}"
        self.text.line(f"{made} = {self.text.constant(make)}()")
        self.text.line(f"at{self.allocations} = {made}.data_ptr()")
        self.allocations += 1
        return made

    def _argument(self, x: Any) -> str:
        if isinstance(x, list):
            varies = any(isinstance(value, Source) for value in x)
            return tuple_of(map(self._argument, x)) if varies else self.text.constant(tuple(x))
        if not isinstance(x, Source):
            return self.text.constant(x)
        if x.kind == "given":
            return f"given{x.place}"
        if x.kind == "counters":
            return f"counters{x.place}.data_ptr()"
        allocation, begin = self.begins[x.place]
        return f"at{allocation} + {self.text.constant(begin + x.offset)}"

    def _returned(self, x: Any) -> str:
        if isinstance(x, tuple):
            make: Any = type(x)
            return f"{self.text.constant(make._make)}({tuple_of(map(self._returned, x))})"
        if not isinstance(x, Tensor):
            return self.text.constant(x)
        source = self.watch.within(x)
        assert source is not None
        whole, output = self.watch.made[source.place], self.outputs[source.place]
        if _layout(x) == _layout(whole):
            return output
        if x.dtype != whole.dtype:
            raise ValueError(f"got an output of {whole.dtype} that is returned as {x.dtype}")
        part = tuple(x.shape), x.stride(), source.offset // x.element_size()
        return f"{output}.as_strided(*{self.text.constant(part)})"


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _tensors(result: Any) -> Iterator[Tensor]:
    """Of what a call returned: tensors, NamedTuples of them, None, and whether something is so."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        for x in result:
            yield from _tensors(x)
    elif not isinstance(result, bool | None):
        raise ValueError(f"got a result of {type(result).__name__}, want tensors")
