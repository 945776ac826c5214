"""Whether a repeated call passes to the driver what the same call made anew does, and what it takes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.driver import noted, reached
from torch import Tensor

from attnshape import plans
from attnshape.problems import mapped
from csrc_triton.launch import COUNTERS


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


COEFFICIENTS = itertools.count(0.125)
"""Of a KL penalty, another in each call."""


def repeated(log: Path, call: functools.partial[Any]) -> dict[str, Any]:
    """The third call of a layout, beside the same call made anew."""

    def function(*args: Any, **kwargs: Any) -> Any:
        result = call.func(*args, **kwargs)
        return Pair(*result) if type(result) is tuple else result

    plans.is_on_current_gpu = lambda *_: True
    repeating = plans.Repeating(function)
    for _ in range(2):
        others = again(call)
        repeating.call(others.args, others.keywords)
    given = again(call)
    inputs: set[int] = set()
    mapped([*given.args, given.keywords], lambda x: inputs.add(x.data_ptr()) or x)
    inputs |= {x.data_ptr() for x in COUNTERS._of_stream.values()}
    anew = functools.partial(function, *given.args, **given.keywords)
    repeat = functools.partial(repeating.call, given.args, given.keywords)

    want, launches, started = noted(log, anew)
    got, launched = reached(log, repeat)
    memory: dict[int, int] = {}  # from where it lies in a call made anew to where it lies in the repeated one
    sizes: dict[int, int] = {}
    for x, y in zip(*map(outputs, (want, got)), strict=True):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        whole = x.untyped_storage()
        begin = y.data_ptr() - (x.data_ptr() - whole.data_ptr())
        memory[whole.data_ptr()], sizes[begin] = begin, whole.nbytes()
    returned, wrong = len(sizes), []
    for expected, found, asked in zip(launches, launched, started, strict=True):
        wrong += [key for key in ("name", "grid", "threads", "attributes") if expected[key] != found[key]]
        parameters = asked.parameters()
        for (name, (_, value)), *both in zip(
            parameters.items(), expected["parameters"], found["parameters"], strict=False
        ):
            if isinstance(value, Tensor) and value.data_ptr() not in inputs:
                before, now = (int.from_bytes(bytes.fromhex(x), "little") for x in both)
                if memory.setdefault(before, now) != now or (now % 16 and not before % 16):
                    wrong.append(f"{name}: got {now:x}, want {memory[before]:x}")
                sizes[now] = max(sizes.get(now, 0), value.nbytes)
            elif both[0] != both[1]:
                wrong.append(f"{name}: got {both[1]}, want {both[0]}")
    if len(set(memory.values())) < len(memory):
        wrong.append("what lies apart in one lies at one place in the other")
    spans = sorted(sizes.items())
    for (begin, size), (after, _) in itertools.pairwise(spans):
        if begin + size > after:
            wrong.append(f"{size} bytes at {begin:x} reach to {after:x}")
    with torch.autograd.profiler.profile() as profile:
        repeat()
    return {
        "repeated": [callable(x) for x in repeating.known.values()],
        "wrong": wrong,
        "launched": len(launched),
        "returned": len(outputs(got)),
        "outputs": len({x.untyped_storage().data_ptr() for x in outputs(got)}),
        "between": len(sizes) - returned,
        "operators": collections.Counter(e.name for e in profile.function_events or ()),
        "functions": [functions(anew), functions(repeat)],
    }


def again(call: functools.partial[Any]) -> functools.partial[Any]:
    """The call with tensors of its own; one that was given twice is one again."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        return copies.setdefault(id(x), x.clone())

    args, keywords = mapped([*call.args], copied), mapped(call.keywords, copied)
    if "kl" in keywords:
        keywords["kl"] = dataclasses.replace(keywords["kl"], coef=next(COEFFICIENTS))
    return functools.partial(call.func, *args, **keywords)


def outputs(result: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(result, lambda x: found.append(x) or x)
    return found


def functions(call: Callable[[], Any]) -> int:
    """Functions of Python that a call enters."""
    entered = [0]

    def count(frame: Any, event: str, _: Any) -> None:
        entered[0] += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[0]
