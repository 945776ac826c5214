"""Triton's real launcher over a CUDA driver that launches nothing: ``python -m support.driver FOLDER``.

Prints a line for every launch of the calls below: the kernel, whether it was compiled for this launch, and
what of its grid, its threads and its parameters' bytes is not what the call passed.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = {"i1": "?", "i8": "b", "i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}
SCRATCH = ["00" * 8] * 2
"""Parameters that Triton adds: pointers to memory that these kernels do not ask for."""


def built(folder: Path) -> Path:
    """The driver that launches nothing, compiled into the folder, where Triton is told to look."""
    from triton.backends import nvidia

    include = Path(nvidia.__file__ or nvidia.__path__[0]).parent / "include"
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("libcuda.c")
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", str(source), "-o", str(library)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True, capture_output=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return library


def activate(library: Path) -> None:
    """Makes Triton launch over ``library``, with tensors of the CPU, as for an H100."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda *_: (9, 0)
            self.get_current_device = lambda: 0
            self.set_current_device = lambda *_: None
            self.get_current_stream = lambda *_: 0

    driver.set_active(Driver())


def bytes_of(kind: str, value: Any) -> str:
    """What a parameter of this kind holds, in hexadecimal."""
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr()).hex()
    return struct.pack(f"<{FORMATS[kind]}", value).hex()


def leaves(x: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a group holds, or the value itself, by name."""
    if isinstance(x, tuple):
        for field, held in zip(x._fields, x, strict=True):
            yield f"{name}.{field}", held
    else:
        yield name, x


class Started(NamedTuple):
    """A launch, as the launcher was asked for it."""

    how: str
    compiled: Any
    arguments: dict[str, Any]
    programs: int

    def parameters(self) -> dict[str, tuple[str, Any]]:
        """Kinds and values of what is passed, by name."""
        kinds = dict(x for name, kind in self.compiled.src.signature.items() for x in leaves(kind, name))
        passed = dict(x for name, value in self.arguments.items() for x in leaves(value, name))
        return {name: (kind, passed[name]) for name, kind in kinds.items() if kind != "constexpr"}


def reached(log: Path, call: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
    """What a call returns, and the launches that reached the driver."""
    seen = len(log.read_text().splitlines()) if log.exists() else 0
    result = call()
    return result, [json.loads(line) for line in log.read_text().splitlines()[seen:]]


def noted(log: Path, call: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]], list[Started]]:
    """The same, and what the launcher was asked for."""
    from csrc_triton.launch import Launcher

    started: list[Started] = []
    launch = Launcher.__call__

    def launch_and_note(self: Any, programs: int, options: dict[str, int], **arguments: Any) -> None:
        before = len(self.compiled)
        launch(self, programs, options, **arguments)
        compiled = self.compiled[self.key(arguments, options)]
        how = "again" if len(self.compiled) == before else "compiled"
        started.append(Started(how, compiled, arguments, programs))

    Launcher.__call__ = launch_and_note  # type: ignore[method-assign]
    try:
        result, launches = reached(log, call)
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]
    assert len(launches) == len(started), (len(launches), len(started))
    return result, launches, started


def recorded(log: Path, call: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """What a call launched, against what reached the driver."""
    _, launches, started = noted(log, call)
    for got, asked in zip(launches, started, strict=True):
        parameters = asked.parameters()
        want = [bytes_of(*x) for x in parameters.values()] + SCRATCH
        names = [*parameters, *("scratch" for _ in SCRATCH)]
        wrong = [
            f"{name}: got {found}, want {expected}"
            for name, found, expected in zip(names, got["parameters"], want, strict=True)
            if found != expected
        ]
        if got["grid"] != [asked.programs, 1, 1]:
            wrong.append(f"grid: got {got['grid']}, want {asked.programs}")
        if got["threads"] != 32 * asked.compiled.metadata.num_warps:
            wrong.append(f"threads: got {got['threads']}, want {asked.compiled.metadata.num_warps} warps")
        numbers = [kind for kind, _ in parameters.values() if not kind.startswith("*")]
        attributes = {
            "attributes": got["attributes"],
            "ptx": memory_and_dependence(asked.compiled.asm["ptx"]),
        }
        yield {"kernel": got["name"], "how": asked.how, "wrong": wrong, "numbers": numbers, **attributes}


def memory_and_dependence(ptx: str) -> list[str]:
    """Instructions by which launches depend on each other, and the first that touches global memory."""
    found = re.findall(
        r"griddepcontrol\.\w+|(?:ld|st|atom|red)\.\S*global|cp\.async\.\w+\.shared\.global", ptx
    )
    touched = next((i for i, x in enumerate(found) if not x.startswith("grid")), len(found))
    return [*found[:touched], "memory", *(x for x in found[touched:] if x.startswith("grid"))]


def calls() -> Iterator[tuple[str, functools.partial[Any]]]:
    """Every launch path of the package, by one call or a few that may share what was compiled."""
    import torch

    import attnshape
    import csrc_triton
    from attnshape import KL, AttentionInputs, Response, triton_backend

    half = torch.float16

    def layer(keys: int, **options: Any) -> AttentionInputs:
        query, key = torch.empty(2, 4, keys, 16, dtype=half), torch.empty(2, 2, keys, 16, dtype=half)
        return AttentionInputs(query, key, 0.25, **options)

    def response(width: int, batch: int = 2) -> Response:
        return Response(torch.ones(batch, width), start=torch.zeros(batch, dtype=torch.int64))

    def sweep(width: int, batch: int, outputs: tuple[str, ...], **given: Any) -> functools.partial[Any]:
        tokens = torch.empty(batch, width)
        place = response(width, batch)
        # One tensor as two inputs, too.
        given |= {"token_rewards": tokens, "values": tokens, "min_mass": 1e-30}
        return functools.partial(csrc_triton.sweep, place, outputs, **given)

    everything = ("rewards", "advantages", "returns", "credit", "status", "stats", "moments")
    scores = {batch: torch.empty(batch) for batch in (1, 2)}
    for cap in (50, 30.5):
        credit = [layer(40, softcap=cap, attention_mask=torch.ones(2, 40))]
        attend = sweep(20, 2, everything, score=scores[2], credit=credit, gl=0.95)
        yield "attend", attend
    yield "reading on", changed(attend, MOST=0, READ_ON=("shape",))
    spread = ("rewards", "credit", "status", "moments")
    yield "groups", sweep(20, 2, spread, score=scores[2], credit=[layer(40)], even=True)
    for gl in (0.5, 0.25):
        yield "rows", sweep(30, 2, ("advantages", "returns"), gl=gl)
    for width in (5200, 5300):
        yield "chunks", sweep(width, 1, everything, score=scores[1], credit="uniform", gl=0.95)
    for width in (2100, 5200):
        long = sweep(width, 2, everything, score=scores[2], credit=[layer(width + 100)])
        yield "dependent", changed(long, DEPENDENT=True)
    yield "scores, mean", functools.partial(csrc_triton.attention_row, [layer(2100)])
    yield (
        "columns",
        functools.partial(csrc_triton.column_credit_raw, layer(40), response(20), variant="mean", shift=0),
    )
    norms = {"value_norms": [torch.empty(2, 4, 40)], "residual_norms": [torch.empty(2, 40)]}
    yield "rollout", functools.partial(csrc_triton.rollout_raw, [layer(40)], response(20), **norms)
    given = torch.empty(3, 50), torch.ones(3, 50)
    yield "whiten", functools.partial(csrc_triton.whiten, *given)
    # The public function, checks and all.
    scored = (scores[2], layer(40), response(20))
    tokens = {"values": torch.empty(2, 20), "kl": KL(torch.empty(2, 20), torch.empty(2, 20), 0.5)}
    triton_backend.unsupported = lambda *_: None
    shape_rewards = attnshape.shape_rewards.__wrapped__
    yield "fused", functools.partial(shape_rewards, *scored, **tokens, backend="triton")
    yield "whiten, many parts", functools.partial(csrc_triton.whiten, *given, torch.ones(5000, 3))


def changed(call: functools.partial[Any], **constants: Any) -> functools.partial[Any]:
    """With other constants of the launches that read queries and keys."""
    from csrc_triton.host import attention

    def function(*args: Any, **kwargs: Any) -> Any:
        before = {name: getattr(attention, name) for name in constants}
        for name, value in constants.items():
            setattr(attention, name, value)
        try:
            return call.func(*args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(attention, name, value)

    return functools.partial(function, *call.args, **call.keywords)


class Mixed(NamedTuple):
    p_in: Any
    p_none: Any = None
    window: Any = None
    n: Any = 3
    scale: Any = 0.5


def mixed_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Numbers of every kind, and None, through one launcher."""
    import torch
    import triton
    import triton.language as tl

    from csrc_triton.launch import COMPILER, Launcher

    @triton.jit
    def mixed_kernel(p_out, mixed, BLOCK: tl.constexpr):
        x = tl.arange(0, BLOCK).to(tl.float32) * mixed.scale + mixed.n.to(tl.float32)
        if mixed.window is not None:
            x += mixed.window
        if mixed.p_none is not None:
            x += tl.load(mixed.p_none)
        tl.store(p_out + tl.arange(0, BLOCK), x + tl.load(mixed.p_in + tl.arange(0, BLOCK)))

    launcher = Launcher(mixed_kernel, "mixed.p_in")
    out, x = torch.empty(32), torch.empty(64)
    for change in (
        {},
        {"n": 2**31 - 1, "scale": -2.5},
        {"p_none": x},
        {"window": 7},
        {"window": 30.5},
        {"window": 7},
        {"scale": 1},
        {"n": 2**31},
        {"n": 2**40},
        {"p_in": x[1:]},
        {"n": 5},
    ):
        mixed = Mixed(**{"p_in": x} | change)

        def call(mixed: Mixed = mixed) -> None:
            launcher(4, COMPILER | {"num_warps": 1}, p_out=out, mixed=mixed, BLOCK=32)

        yield f"mixed {change.keys()}", call


def main(log: Path) -> None:
    from support.repeats import repeated

    given = list(calls())
    for name, call in [*given, *mixed_calls()]:
        for launch in recorded(log, call):
            print(json.dumps({"call": name, **launch}))
    for name, call in given:
        print(json.dumps({"call": name, **repeated(log, call)}))


if __name__ == "__main__":
    activate(built(Path(sys.argv[1])))
    main(Path(os.environ["CUDA_LOG"]))
