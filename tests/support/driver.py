"""Triton's real launcher over a CUDA driver that launches nothing: ``python -m support.driver LOG``.

Prints a line for every launch of the calls below: the kernel, whether it was compiled for this launch, and
what of its grid, its threads and its parameters' bytes is not what the call passed.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FORMATS = {"i1": "?", "i8": "b", "i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}
SCRATCH = ["00" * 8] * 2
"""Parameters that Triton adds: pointers to memory that these kernels do not ask for."""


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


def recorded(log: Path, call: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """What a call launched, against what reached the driver."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    started: list[tuple[str, Any, dict[str, Any], Any]] = []
    run, item = JITFunction.run, CompiledKernel.__getitem__

    def compile_and_launch(self: Any, *arguments: Any, grid: Any, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, **options)
        named = dict(zip(self.arg_names, arguments, strict=False))
        started.append(("compiled", compiled, named | options, grid))
        return compiled

    def launch_again(self: Any, grid: Any) -> Callable[..., None]:
        runner = item(self, grid)

        def launch(*arguments: Any) -> None:
            runner(*arguments)
            named = dict(zip(self.src.fn.arg_names, arguments, strict=True))
            started.append(("again", self, named, grid))

        return launch

    seen = len(log.read_text().splitlines()) if log.exists() else 0
    JITFunction.run, CompiledKernel.__getitem__ = compile_and_launch, launch_again
    try:
        call()
    finally:
        JITFunction.run, CompiledKernel.__getitem__ = run, item
    launches = [json.loads(line) for line in log.read_text().splitlines()[seen:]]
    assert len(launches) == len(started), (len(launches), len(started))
    for launch, (how, compiled, named, grid) in zip(launches, started, strict=True):
        signature = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
        want = [bytes_of(kind, named[name]) for name, kind in signature.items()] + SCRATCH
        names = [*signature, *("scratch" for _ in SCRATCH)]
        wrong = [
            f"{name}: got {got}, want {expected}"
            for name, got, expected in zip(names, launch["parameters"], want, strict=True)
            if got != expected
        ]
        if launch["grid"] != [*grid, 1, 1][:3]:
            wrong.append(f"grid: got {launch['grid']}, want {grid}")
        if launch["threads"] != 32 * compiled.metadata.num_warps:
            wrong.append(f"threads: got {launch['threads']}, want {compiled.metadata.num_warps} warps")
        kinds = [kind for kind in signature.values() if not kind.startswith("*")]
        yield {"kernel": launch["name"], "how": how, "wrong": wrong, "numbers": kinds}


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
    yield "rollout", lambda: csrc_triton.rollout_raw([layer(40)], response(20))
    yield "whiten", lambda: csrc_triton.whiten(torch.empty(3, 50), torch.ones(3, 50))
    yield from mixed_calls()


def mixed_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Numbers of every kind, and None, through one launcher."""
    import torch
    import triton.language as tl

    from csrc_triton.launch import Launcher, kernel

    @kernel("p_in")
    def mixed_kernel(p_out, p_in, p_none, window, n, scale, BLOCK: tl.constexpr):
        x = tl.arange(0, BLOCK).to(tl.float32) * scale + n.to(tl.float32)
        if window is not None:
            x += window
        if p_none is not None:
            x += tl.load(p_none)
        tl.store(p_out + tl.arange(0, BLOCK), x + tl.load(p_in + tl.arange(0, BLOCK)))

    defaults = {
        "p_out": None,
        "p_in": None,
        "p_none": None,
        "window": None,
        "n": 0,
        "scale": 0.0,
        "BLOCK": 32,
    }
    launcher = Launcher(mixed_kernel, defaults, ("p_in",))
    out, x = torch.empty(32), torch.empty(64)
    base = {"p_out": out, "p_in": x, "n": 3, "scale": 0.5}
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
        yield f"mixed {change.keys()}", lambda given=base | change: launcher(4, given, {"num_warps": 1})


def main(log: Path) -> None:
    for name, call in calls():
        for launch in recorded(log, call):
            print(json.dumps({"call": name, **launch}))


if __name__ == "__main__":
    activate(Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1")
    main(Path(sys.argv[1]))
