"""What kernels say in PTX, executed by Triton's interpreter, which refuses it."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.bounds import GIVEN
from triton._C.libtriton import interpreter as memory
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from csrc_triton.host import attention, rewards


class Executed:
    """How often each instruction was, and the addresses that were asked for ahead."""

    def __init__(self) -> None:
        self.instructions: collections.Counter[str] = collections.Counter()
        self.prefetched: set[int] = set()

    def assembly(self, code: str, operands: Sequence[np.ndarray], n: int) -> list[np.ndarray]:
        """The ``n`` results of a block: ``$0`` and on, before its operands.

        Raises:
            NotImplementedError: an instruction that no kernel holds.
        """
        values: dict[str, Any] = {f"${n + i}": x for i, x in enumerate(operands)}
        for statement in filter(None, map(str.strip, code.strip().strip("{}").split(";"))):
            found = re.fullmatch(r"(?:@(\w+) )?(\S+) (.*)", statement)
            if found is None:
                raise NotImplementedError(statement)
            guard, name, rest = found.groups()
            if name != ".reg":
                where = np.ones(operands[0].shape, np.bool_) if guard is None else values[guard]
                names = re.findall(r"[$\w]+", rest)
                self.instructions[name] += 1
                self.instruction(name, names, values, where)
        return [np.broadcast_to(values[f"${i}"], operands[0].shape) for i in range(n)]

    def instruction(self, name: str, names: list[str], values: dict[str, Any], where: np.ndarray) -> None:
        to, *given = names
        read = [values[x] if x in values else int(x, 0) for x in given]
        if name == "setp.ne.s32":
            values[to] = read[0] != read[1]
        elif name == "mov.b32":
            values[to] = np.int32(read[0])
        elif name == "and.b32":
            values[to] = read[0] & read[1]
        elif name == "or.b32":
            values[to] = read[0] | read[1]
        elif name == "add.u32":
            values[to] = read[0] + read[1]
        elif name == "prmt.b32":
            values[to] = permuted(*read)
        elif name == "lg2.approx.ftz.f32":
            values[to] = np.log2(read[0])
        elif name == "prefetch.global.L2":
            self.prefetched |= set(values[to][where].tolist())
        elif name in ("st.global.f32", "st.global.v2.f32"):
            assert len(read) == (2 if "v2" in name else 1)
            for i, x in enumerate(read):
                assert x.dtype == np.float32
                at = (values[to] + 4 * i).astype(np.uint64)
                GIVEN.check(name, at, where, 4, x)
                assert not (at[where] % (4 * len(read)) != 4 * i).any(), "a store that is not aligned"
                memory.store(at, np.ascontiguousarray(x), np.ascontiguousarray(where))
        else:
            raise NotImplementedError(name)


def permuted(a: np.ndarray, b: int, selector: int) -> np.ndarray:
    """Four bytes of ``a`` (uint32) and then ``b``, or as many times the sign of one."""
    source = [(x >> 8 * i) & 0xFF for x in (a, b) for i in range(4)]
    made = np.zeros_like(a)
    for i in range(4):
        chosen = selector >> 4 * i
        byte = source[chosen & 7]
        made |= (np.where(byte & 0x80, 0xFF, 0) if chosen & 8 else byte).astype(a.dtype) << 8 * i
    return made


@contextmanager
def executed() -> Iterator[Executed]:
    """With kernels as they are where there is PTX."""
    done = Executed()

    class Results(list[TensorHandle]):
        def get_result(self, i: int) -> TensorHandle:
            return self[i]

    def create_inline_asm(
        _: Any, code: str, constraints: str, operands: Any, types: Any, pure: bool, pack: int
    ) -> Results:
        assert constraints.count("=") == pack * len(types)
        given = [x.data for x in operands]
        if pack > 1:  # so many elements of a byte in a register of each operand
            assert pack == 4
            assert all(x.dtype.itemsize == 1 for x in given)
            given = [np.ascontiguousarray(x).view(np.uint32) for x in given]
        found = done.assembly(code, given, pack * len(types))
        if pack > 1:
            found = [np.stack(found[i : i + pack], axis=-1).ravel() for i in range(0, len(found), pack)]
        results = []
        for x, kind in zip(found, types, strict=True):
            x = np.ascontiguousarray(x)
            results.append(TensorHandle(x.view(np.int32) if x.dtype == np.uint32 else x, kind.scalar))
        return Results(results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
        for room in (attention, rewards):
            patch.setattr(room, "has_ptx", lambda: True)
        yield done
