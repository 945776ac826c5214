"""Whether interpreted kernels read and write what they were given, nothing beside it, and in order.

Beyond a tensor lies another one, or nothing: on a GPU the result is a wrong number elsewhere, now and then.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from support.order import Order
from triton._C.libtriton import interpreter as memory
from triton.runtime import interpreter

MOST, PROGRAMS = 1 << 22, 1024
"""Bytes of memory and programs, at most, of a launch whose accesses are looked at for their order: what is
known of each byte takes 48."""


class Given:
    """The memory of a launch's tensors: where each piece begins and ends, in bytes."""

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.is_looking = True  # at the order of accesses, too
        self.order: Order | None = None  # of this launch's, from its first on

    def take(self, arguments: Any) -> None:
        """Of these arguments, in place of those of the launch before."""
        self.begins, self.ends, self.order = [], [], None
        for begin, end in sorted(pieces(arguments)):
            if self.ends and begin <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.begins.append(begin)
                self.ends.append(end)

    def check(
        self,
        what: str,
        addresses: np.ndarray,
        mask: np.ndarray | None,
        size: int,
        values: np.ndarray | None = None,
        semantics: Any = None,
    ) -> None:
        """Looks at one access.

        Args:
            what: it is, for a sentence.
            mask: which of the addresses, of ``size`` bytes each, count.
            values: that are stored.
            semantics: of an atomic.

        Raises:
            IndexError: one of the addresses is of no tensor.
            RaceError: nothing says that it comes before or after another of the same address.
        """
        if mask is None:
            mask = np.ones(addresses.shape, np.bool_)
        at = addresses[np.broadcast_to(mask, addresses.shape)]
        if not at.size:
            return
        self.within(what, at, size)
        builder = interpreter.interpreter_builder
        if not self.is_looking or sum(self.ends) - sum(self.begins) > MOST or builder.grid_dim[0] > PROGRAMS:
            return
        if self.order is None:
            self.order = Order(self.begins, self.ends, builder.grid_dim[0])
        self.order.turn(builder.grid_idx[0])
        if semantics is not None:
            self.order.atomic(at, semantics.name)
        elif values is None:
            self.order.load(at)
        else:
            there = memory.load(addresses, mask, np.zeros(addresses.shape, values.dtype), values.dtype)
            if not np.array_equal(there[mask], values[mask]):  # who stores what is there changes nothing
                self.order.store(at)

    def within(self, what: str, at: np.ndarray, size: int) -> None:
        low, high = int(at.min()), int(at.max())
        piece = bisect.bisect_right(self.begins, low) - 1
        if piece >= 0 and high + size <= self.ends[piece]:
            return
        begins, ends = np.array(self.begins, np.uint64), np.array(self.ends, np.uint64)
        places = np.searchsorted(begins, at, "right") - 1
        within = (places >= 0) & (at + np.uint64(size) <= ends[places])
        if not within.all():
            wrong = int(at[~within][0])
            piece = bisect.bisect_right(self.begins, wrong) - 1
            where = f"{wrong - self.ends[piece]} bytes behind one" if piece >= 0 else "before all of them"
            raise IndexError(
                f"{what} at {(~within).sum()} of {at.size} addresses that are in no tensor of the launch; "
                f"the first is {where}"
            )


GIVEN = Given()


def pieces(x: Any) -> Iterator[tuple[int, int]]:
    if isinstance(x, torch.Tensor):
        if x.numel():
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            yield x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
    elif isinstance(x, (tuple, list)):
        for held in x:
            yield from pieces(held)


@contextmanager
def in_any_order(*, is_fine: bool = True) -> Iterator[None]:
    """For launches whose programs store one thing in the end, whoever is first."""
    GIVEN.is_looking = not is_fine
    try:
        yield
    finally:
        GIVEN.is_looking = True


def install() -> None:
    """Looks at each access of Triton's interpreter from now on."""
    init_args, builder = interpreter.GridExecutor._init_args_hst, interpreter.InterpreterBuilder

    def begun(executor: Any, arguments: Any, named: dict[str, Any]) -> Any:
        there = init_args(executor, arguments, named)
        GIVEN.take([*there[0], *there[1].values()])
        return there

    def looked_at(name: str, place: int | None) -> Any:
        method, what = getattr(builder, name), name.removeprefix("create_")
        first = 1 if name == "create_atomic_rmw" else 0

        def checked(self: Any, *arguments: Any) -> Any:
            pointers = arguments[first]
            size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            mask = None if place is None else arguments[place].data
            values = arguments[1].data if "store" in name else None
            semantics = arguments[-2] if "atomic" in name else None
            GIVEN.check(what, pointers.data, mask, size, values, semantics)
            return method(self, *arguments)

        return checked

    def barrier(_: Any) -> None:
        if GIVEN.order is not None:
            GIVEN.order.barrier()

    interpreter.GridExecutor._init_args_hst = begun
    builder.create_barrier = barrier
    for name, place in {
        "create_masked_load": 1,
        "create_masked_store": 2,
        "create_atomic_rmw": 3,
        "create_atomic_cas": None,
    }.items():
        setattr(builder, name, looked_at(name, place))
