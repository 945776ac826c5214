"""Python processes beside the tests', which can be killed."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start(program: str, *arguments: object, modules: Path) -> "subprocess.Popen[bytes]":
    """Runs a program that can import the project, what tests share, and the modules of a folder.

    It leads a process group of its own.
    """
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, modules)))
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )
