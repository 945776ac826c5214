"""Copies of the tests' process, which can be killed, or made to forget what they have imported."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")
"""Copies have what this process has imported, and draw the numbers that it would draw."""


def like_spawned(*imported: str) -> BaseContext:
    """Each a copy of one new process, which imports these modules: for many that would import them anew.

    As where they are spawned, what they are given is pickled, and they have nothing else of this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*imported])
    return context


def start(function: Callable[..., Any], *arguments: Any, **options: Any) -> BaseProcess:
    """Runs a function in a process that leads a group of its own."""
    process = FORK.Process(target=_lead, args=(function, arguments, options))
    process.start()
    return process


def _lead(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    os.setsid()
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    function(*arguments, **options)


def _end_with_the_tests() -> None:
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)


Ended = subprocess.CompletedProcess[str]


def run(function: Callable[..., Any], *arguments: Any, forget: Iterable[str] = ()) -> Ended:
    """What a function prints and ends with in a process that has not imported these packages."""
    [ended] = run_together(1, function, *arguments, forget=forget)
    return ended


def run_together(
    count: int, function: Callable[..., Any], *arguments: Any, forget: Iterable[str] = ()
) -> list[Ended]:
    """The same in several processes at once."""
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"{i}.out"), Path(folder, f"{i}.err")) for i in range(count)]
        begun = [start(_print_to, *pair, tuple(forget), function, arguments) for pair in files]
        for process in begun:
            process.join()
        return [
            Ended([], process.exitcode or 0, *(path.read_text(encoding="utf-8") for path in pair))
            for process, pair in zip(begun, files, strict=True)
        ]


def _print_to(
    out: Path, err: Path, forget: tuple[str, ...], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Open to the end: what is not caught here is printed afterwards.
    sys.stdout = out.open("w", encoding="utf-8", buffering=1)
    sys.stderr = err.open("w", encoding="utf-8", buffering=1)
    for name in [*sys.modules]:
        if any(f"{name}.".startswith(f"{package}.") for package in forget):
            del sys.modules[name]
    function(*arguments)
