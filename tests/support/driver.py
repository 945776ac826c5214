"""Triton's real launcher over a CUDA driver that launches nothing: ``python -m support.driver FOLDER``.

Prints a line for every launch of the calls below: the kernel, whether it was compiled for this launch, and
what of its grid, its threads and its parameters' bytes is not what the call passed.
"""

from __future__ import annotations

import ctypes
import json
import os
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


def recorded(log: Path, call: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """What a call launched, against what reached the driver."""
    from csrc_triton.launch import Launcher

    started: list[tuple[str, Any, dict[str, Any], int]] = []
    launch = Launcher.__call__

    def launch_and_note(self: Any, programs: int, options: dict[str, int], **arguments: Any) -> None:
        before = len(self.compiled)
        launch(self, programs, options, **arguments)
        compiled = self.compiled[self.key(arguments, options)]
        how = "again" if len(self.compiled) == before else "compiled"
        started.append((how, compiled, arguments, programs))

    seen = len(log.read_text().splitlines()) if log.exists() else 0
    Launcher.__call__ = launch_and_note  # type: ignore[method-assign]
    try:
        call()
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]
    launches = [json.loads(line) for line in log.read_text().splitlines()[seen:]]
    assert len(launches) == len(started), (len(launches), len(started))
    for reached, (how, compiled, arguments, programs) in zip(launches, started, strict=True):
        kinds = dict(x for name, kind in compiled.src.signature.items() for x in leaves(kind, name))
        passed = dict(x for name, value in arguments.items() for x in leaves(value, name))
        kinds = {name: kind for name, kind in kinds.items() if kind != "constexpr"}
        want = [bytes_of(kind, passed[name]) for name, kind in kinds.items()] + SCRATCH
        names = [*kinds, *("scratch" for _ in SCRATCH)]
        wrong = [
            f"{name}: got {got}, want {expected}"
            for name, got, expected in zip(names, reached["parameters"], want, strict=True)
            if got != expected
        ]
        if reached["grid"] != [programs, 1, 1]:
            wrong.append(f"grid: got {reached['grid']}, want {programs}")
        if reached["threads"] != 32 * compiled.metadata.num_warps:
            wrong.append(f"threads: got {reached['threads']}, want {compiled.metadata.num_warps} warps")
        numbers = [kind for kind in kinds.values() if not kind.startswith("*")]
        yield {"kernel": reached["name"], "how": how, "wrong": wrong, "numbers": numbers}


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every launch path of the package, by one call or a few that may share what was compiled."""
    import torch

    import csrc_triton
    from attnshape import AttentionInputs, Response

    half = torch.float16

    def layer(keys: int, **options: Any) -> AttentionInputs:
        query, key = torch.empty(2, 4, keys, 16, dtype=half), torch.empty(2, 2, keys, 16, dtype=half)
        return AttentionInputs(query, key, 0.25, **options)

    def response(width: int, batch: int = 2) -> Response:
        return Response(torch.ones(batch, width), start=torch.zeros(batch, dtype=torch.int64))

    def sweep(width: int, batch: int, outputs: tuple[str, ...], **given: Any) -> Callable[[], Any]:
        tokens = torch.empty(batch, width)
        place = response(width, batch)
        return lambda: csrc_triton.sweep(
            place, outputs, token_rewards=tokens, values=tokens, min_mass=1e-30, **given
        )

    everything = ("rewards", "advantages", "returns", "credit", "status", "stats", "moments")
    scores = {batch: torch.empty(batch) for batch in (1, 2)}
    for cap in (50, 30.5):
        credit = [layer(40, softcap=cap, attention_mask=torch.ones(2, 40))]
        yield "attend", sweep(20, 2, everything, score=scores[2], credit=credit, gl=0.95)
    spread = ("rewards", "credit", "status", "moments")
    yield "groups", sweep(20, 2, spread, score=scores[2], credit=[layer(40)], even=True)
    for gl in (0.5, 0.25):
        yield "rows", sweep(30, 2, ("advantages", "returns"), gl=gl)
    for width in (1300, 1400):
        yield "chunks", sweep(width, 1, everything, score=scores[1], credit="uniform", gl=0.95)
    yield "terms, mean", lambda: csrc_triton.attention_row([layer(2100)])
    yield (
        "columns",
        lambda: csrc_triton.column_credit_raw(layer(40), response(20), variant="mean", shift=0),
    )
    norms = {"value_norms": [torch.empty(2, 4, 40)], "residual_norms": [torch.empty(2, 40)]}
    yield "rollout", lambda: csrc_triton.rollout_raw([layer(40)], response(20), **norms)
    yield "whiten", lambda: csrc_triton.whiten(torch.empty(3, 50), torch.ones(3, 50))
    many = torch.ones(5000, 3)
    yield "whiten, many parts", lambda: csrc_triton.whiten(torch.empty(3, 50), torch.ones(3, 50), many)
    yield from mixed_calls()


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

    from csrc_triton.launch import Launcher

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
            launcher(4, {"num_warps": 1}, p_out=out, mixed=mixed, BLOCK=32)

        yield f"mixed {change.keys()}", call


def main(log: Path) -> None:
    for name, call in calls():
        for launch in recorded(log, call):
            print(json.dumps({"call": name, **launch}))


if __name__ == "__main__":
    activate(built(Path(sys.argv[1])))
    main(Path(os.environ["CUDA_LOG"]))
