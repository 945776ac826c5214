"""Whether what the programs of a launch leave to each other, and threads of one, is handed over in order.

Triton's interpreter runs programs one after another, and a program as if it were one thread: nothing that is
missing shows. Here each access is held to what orders it: a barrier between a program's store and its load
or store of the same address, and between programs a chain of a barrier, an atomic that releases, one of the
same address that acquires, and a barrier (vector clocks).
"""

from __future__ import annotations

import numpy as np


class RaceError(AssertionError):
    """Two accesses of one address, of which nothing says which is first."""


class Last:
    """By address, the last access of a kind: whose, when by its own clock, and behind how many barriers.

    Of several programs that load an address only the last is known.
    """

    def __init__(self, n: int) -> None:
        self.program = np.full(n, -1, np.int32)
        self.time = np.zeros(n, np.int32)
        self.barriers = np.full(n, -1, np.int64)
        self.block = np.full(n, -1, np.int64)
        self.blocks: list[np.ndarray] = []  # the places of each access

    def note(self, at: np.ndarray, program: int, time: int, barriers: int) -> None:
        self.program[at], self.time[at], self.barriers[at] = program, time, barriers
        self.block[at] = len(self.blocks)
        self.blocks.append(at)

    def is_of(self, at: np.ndarray) -> bool:
        """Whether these are the places of one access, in its order."""
        block = self.block[at[0]]
        return block >= 0 and np.array_equal(self.blocks[block], at)


class Order:
    """Of one launch: ``begins`` and ``ends`` are those of its memory, in bytes."""

    def __init__(self, begins: list[int], ends: list[int], programs: int) -> None:
        self.begins = np.array(begins, np.uint64)
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
        self.stored, self.loaded = Last(sum(sizes)), Last(sum(sizes))
        self.clocks = np.eye(programs, dtype=np.int32)
        self.released: dict[int, np.ndarray] = {}
        self.program, self.barriers = -1, 0
        self.has_stored = self.has_acquired = False  # since the last barrier

    def places(self, addresses: np.ndarray) -> np.ndarray:
        piece = np.searchsorted(self.begins, addresses, "right") - 1
        return (addresses - self.begins[piece]).astype(np.int64) + self.offsets[piece]

    def turn(self, program: int) -> None:
        if program != self.program:
            self.program = program
            self.barrier()

    def barrier(self) -> None:
        self.barriers += 1
        self.has_stored = self.has_acquired = False

    def held(self, what: str, last: Last, at: np.ndarray) -> None:
        """Raises: RaceError: what was last done at one of these places may be done at the same time."""
        programs = last.program[at]
        others = (programs >= 0) & (programs != self.program)
        own = (programs == self.program) & (last.barriers[at] == self.barriers)
        # What is stored where it was loaded was made of that: so the load is done.
        if own.any() and not (last is self.loaded and last.is_of(at[own])):
            raise RaceError(f"{what} of what this program did at that address, with no barrier between")
        if not others.any():
            return
        if (self.clocks[self.program][programs[others]] < last.time[at][others]).any():
            raise RaceError(f"{what} of what another program did at that address, which did not hand it over")
        if self.has_acquired:
            raise RaceError(f"{what} of what another program handed over, with no barrier behind that")

    def load(self, addresses: np.ndarray) -> None:
        at = self.places(addresses)
        self.held("a load", self.stored, at)
        self.loaded.note(at, self.program, self.clocks[self.program, self.program], self.barriers)

    def store(self, addresses: np.ndarray) -> None:
        at = self.places(addresses)
        self.held("a store", self.stored, at)
        self.held("a store behind a load", self.loaded, at)
        self.stored.note(at, self.program, self.clocks[self.program, self.program], self.barriers)
        self.has_stored = True

    def atomic(self, addresses: np.ndarray, order: str) -> None:
        """``order``: as CUDA names it."""
        clock = self.clocks[self.program]
        self.held("an atomic", self.stored, self.places(addresses))
        if order in ("ACQUIRE", "ACQUIRE_RELEASE"):
            self.has_acquired = True
            for address in addresses.ravel().tolist():
                if address in self.released:
                    np.maximum(clock, self.released[address], out=clock)
        if order in ("RELEASE", "ACQUIRE_RELEASE"):
            if self.has_stored:
                raise RaceError("a release of what other threads may store later: no barrier before it")
            for address in addresses.ravel().tolist():
                before = self.released.get(address, clock)
                self.released[address] = np.maximum(before, clock)
            clock[self.program] += 1
