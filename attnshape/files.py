"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that takes its name when the block ends, and vanishes if the block raises."""
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
        if not part.stat().st_size:
            part.unlink()
        raise
    part.replace(path)
