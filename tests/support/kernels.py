"""The kernels by name, and the sources as they are where nothing interprets them."""

import os
import re
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from support.processes import run

import csrc_triton

ROOT = Path(csrc_triton.__file__).parents[1]
REBUILT = {"attnshape", "benchmarks", "csrc_triton", "support", "triton"}
"""Packages that look at TRITON_INTERPRET when they are imported, or hold what does."""
OF_TRITON = "AnnAssign.__init__ missing"
"""How a warning begins that Python 3.13 has for Triton 3.7's own way to make a syntax tree."""


def kernels() -> set[str]:
    """Of all that a launch may start; other functions of Triton's are called by them."""
    written: set[str] = set()
    for path in Path(csrc_triton.__file__).parent.rglob("*.py"):
        written |= set(re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return written


def tracing(module: str, *arguments: str) -> str:
    """What ``python -m module`` prints where kernels are not interpreted.

    In a copy of this process, which imports anew what an interpreter has changed, and nothing else.
    """
    ended = run(_trace, module, arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def compiling(module: str, *arguments: str, root: Path = ROOT, **environment: str) -> str:
    """The same in a new process, of the sources under ``root``: in a copy LLVM takes twice as long."""
    paths = [str(root), str(Path(__file__).parents[1])]
    with tempfile.TemporaryDirectory() as cache:
        kept = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
        warned = ["-W", "error", "-W", f"ignore:{OF_TRITON}:DeprecationWarning"]
        command = [sys.executable, *warned, "-m", module, *arguments]
        ended = subprocess.run(command, env=kept | environment, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def _trace(module: str, arguments: tuple[str, ...]) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] in REBUILT and not name.startswith("triton._C"):
            del sys.modules[name]
    os.environ.pop("TRITON_INTERPRET", None)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", OF_TRITON, DeprecationWarning)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        runpy.run_module(module, run_name="__main__", alter_sys=True)
