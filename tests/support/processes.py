"""Copies of the tests' process, which can be killed."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

FORK = multiprocessing.get_context("fork")
"""Copies have what this process has imported, and draw the numbers that it would draw."""


def start(function: Callable[..., Any], *arguments: Any, **options: Any) -> BaseProcess:
    """Runs a function in a process that leads a group of its own."""
    process = FORK.Process(target=_lead, args=(function, arguments, options))
    process.start()
    return process


def _lead(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    os.setsid()
    function(*arguments, **options)
