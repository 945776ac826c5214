"""A call's launches, kept to be started again on other tensors of the same layout.

What a call passes to its kernels follows from the layout of its tensors: sizes, strides, dtypes, alignment.
Only addresses differ. A plan is made by watching one call. Started again it computes addresses and launches,
nothing else, and all memory between its launches is one allocation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton.launch import COUNTERS, WATCHED, Launcher, ceil_div

MOST = 1 << 25
"""Bytes between launches, at most: a plan has them all at once, a call that is made anew one after the other.
Where they are more, kernels take longer than the host."""
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
    """The launches that were watched, of which ``returned`` is what they filled for the caller.

    Raises:
        ValueError: the call did more than launch kernels on what it was given and what it made.
    """

    def __init__(self, watch: Watch, returned: Sequence[Tensor]) -> None:
        found = [source for source in map(watch.within, returned) if source]
        outputs = list(dict.fromkeys(source.place for source in found))
        if not watch.sound or not watch.launches or len(found) < len(returned):
            raise ValueError("got a call that computes by itself, want one that only launches")
        if any(watch.zeroed[i] for i in outputs):
            raise ValueError("got an output of zeros, want one that is filled")
        self.device = returned[0].device
        whole = [watch.made[i] for i in outputs]
        self.outputs = [(tuple(x.shape), x.stride(), x.dtype) for x in whole]
        self.returned: list[tuple[int, Any]] = []
        for x, source in zip(returned, found, strict=True):
            i = outputs.index(source.place)
            part = (tuple(x.shape), x.stride(), source.offset // x.element_size())
            self.returned.append((i, None if part == (*self.outputs[i][:2], 0) else part))
        begins = self._between(watch, outputs)
        self.counters = [count for _, count in watch.counters]

        # A launch reads its arguments from a table: what each call has of its own, then what all have.
        sources = dict.fromkeys(
            x for _, values in watch.launches for x in _flat(values) if isinstance(x, Source)
        )
        made = [x for x in sources if x.kind == "made"]
        self.parts = [(begins[x.place][0], begins[x.place][1] + x.offset) for x in made]
        first = {"given": 0, "counters": len(watch.given)}
        places = {x: first[x.kind] + x.place for x in sources if x.kind != "made"}
        own = len(watch.given) + len(self.counters)
        places |= {x: own + i for i, x in enumerate(made)}
        own += len(made)
        self.constants: list[Any] = []

        def reader(value: Any) -> Callable[[list[Any]], Any]:
            at = []
            for x in _flat([value]):
                at.append(places[x] if isinstance(x, Source) else own + len(self.constants))
                if not isinstance(x, Source):
                    self.constants.append(x)
            return operator.itemgetter(*at)

        self.launches = [(start, [reader(value) for value in values]) for start, values in watch.launches]

    def _between(self, watch: Watch, outputs: list[int]) -> dict[int, tuple[int, int]]:
        """Lays out what is not returned, zeros first; where each tensor begins, in which allocation."""
        begins = {place: (i, 0) for i, place in enumerate(outputs)}
        self.size = self.zeroed = 0
        for i in sorted(range(len(watch.made)), key=lambda i: not watch.zeroed[i]):
            if i not in begins:
                begins[i] = (len(outputs), self.size)
                self.size += ceil_div(watch.made[i].nbytes, ALIGNED) * ALIGNED
                self.zeroed = self.size if watch.zeroed[i] else self.zeroed
        if self.size > MOST:
            raise ValueError(f"got {self.size} bytes between launches, want at most {MOST}")
        return begins

    def __call__(self, given: list[Any]) -> list[Tensor]:
        """Starts them again; what they fill for the caller."""
        device = self.device
        outputs = [
            torch.empty_strided(size, stride, dtype=dtype, device=device)  # half of what `torch.empty` costs
            for size, stride, dtype in self.outputs
        ]
        begins = [x.data_ptr() for x in outputs]
        if self.size:
            between = torch.empty_strided((self.size,), (1,), dtype=torch.uint8, device=device)
            begins.append(between.data_ptr())
            if self.zeroed:
                between[: self.zeroed].zero_()
        counters = [COUNTERS.take(device, count) for count in self.counters]
        table = [*given, *[x.data_ptr() for x in counters], *[begins[i] + offset for i, offset in self.parts]]
        table += self.constants
        try:
            for start, readers in self.launches:
                start(*[read(table) for read in readers])
        except BaseException:
            COUNTERS.discard(device)
            raise
        return [outputs[i] if part is None else outputs[i].as_strided(*part) for i, part in self.returned]


def _flat(values: list[Any]) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]
