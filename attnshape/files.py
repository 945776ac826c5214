"""Output files that appear whole or not at all, and JSON that a reader and a diff can follow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def is_stream(path: Path) -> bool:
    """Whether it is a device or a pipe, such as ``/dev/stdout``: written into, and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def followed(path: Path) -> Path:
    """Where a link leads, so that what is written replaces the file and not the link; else ``path``."""
    return path.resolve() if path.is_symlink() and not is_stream(path) else path


def state(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def states(folder: Path) -> list[tuple[str, int, int]]:
    """Name and ``state`` of each file in a folder; of what is no folder, nothing."""
    return [(path.name, *state(path)) for path in sorted(folder.glob("*")) if path.is_file()]


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that takes its name when the block ends, and vanishes if the block raises.

    A stream (``is_stream``) is written as it comes.
    """
    if is_stream(path):
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    path = followed(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def kept_file(path: Path, part: Path) -> Iterator[TextIO]:
    """A UTF-8 text file, written behind what ``part`` holds, that becomes ``path`` when the block ends.

    If the block raises, what was written stays in ``part``; one that is empty vanishes.
    """
    try:
        with part.open("a", encoding="utf-8", newline="\n") as file:
            yield file
    except BaseException:
        with suppress(OSError):  # it could not be opened, which is what is said
            if not part.stat().st_size:
                part.unlink()
        raise
    part.replace(path)


def json_rows(value: Any, levels: int = 1) -> str:
    """JSON with a line for each row: what holds a number, a text or null beside whatever else.

    The outermost ``levels`` of objects and lists have a line for each of their items in any case.
    """
    return _rows(value, levels, "\n") + "\n"


def _rows(value: Any, levels: int, end: str) -> str:
    names = list(value) if isinstance(value, dict) else None
    items = list(value.values()) if names else list(value) if isinstance(value, list | tuple) else []
    if not items or (levels < 1 and not all(isinstance(item, dict | list | tuple) for item in items)):
        return json.dumps(value)
    inside = end + " "
    lines = [_rows(item, levels - 1, inside) for item in items]
    if names is None:
        return "[" + inside + ("," + inside).join(lines) + end + "]"
    named = [f"{json.dumps(name)}: {line}" for name, line in zip(names, lines, strict=True)]
    return "{" + inside + ("," + inside).join(named) + end + "}"
