"""The kernels by name, and the sources as they are where nothing interprets them."""

import os
import re
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

from support.processes import run

import csrc_triton

ROOT = Path(csrc_triton.__file__).parents[1]
REBUILT = {"attnshape", "benchmarks", "csrc_triton", "support", "triton"}
"""Packages that look at TRITON_INTERPRET when they are imported, or hold what does."""


def kernels() -> set[str]:
    """Of all that a launch may start; other functions of Triton's are called by them."""
    written: set[str] = set()
    for path in Path(csrc_triton.__file__).parent.rglob("*.py"):
        written |= set(re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return written


def printed_compiled(module: str, *arguments: str, root: Path = ROOT, **environment: str) -> str:
    """What ``python -m module`` prints where kernels are compiled, of the sources under ``root``.

    In a copy of this process, which imports anew what an interpreter has changed, and nothing else.
    """
    ended = run(_run_compiled, module, arguments, root, environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def _run_compiled(module: str, arguments: tuple[str, ...], root: Path, environment: dict[str, str]) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] in REBUILT and not name.startswith("triton._C"):
            del sys.modules[name]
    os.environ.pop("TRITON_INTERPRET", None)
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.argv = [module, *arguments]
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, **environment}
        runpy.run_module(module, run_name="__main__", alter_sys=True)
