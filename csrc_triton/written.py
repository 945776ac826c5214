"""Functions that are written out, once what each call would look up and loop over is known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any


class Written:
    """A function of Python, line by line."""

    def __init__(self, head: str) -> None:
        self.lines = [f"def {head}:"]
        self.constants: dict[str, Any] = {}

    def line(self, line: str) -> None:
        self.lines.append(f"    {line}")

    def constant(self, x: Any) -> str:
        """The name of ``x``: two functions that differ in constants alone are compiled once."""
        name = f"constant{len(self.constants)}"
        self.constants[name] = x
        return name

    def function(self) -> Callable[..., Any]:
        names = {**self.constants}
        exec(_compiled("\n".join(self.lines)), names)
        return names[self.lines[0].removeprefix("def ").partition("(")[0]]  # type: ignore[no-any-return]


@functools.lru_cache
def _compiled(text: str) -> CodeType:
    return compile(text, "<written>", "exec")


def tuple_of(written: Iterable[str]) -> str:
    """How a tuple of them is written."""
    return f"({''.join(f'{x}, ' for x in written)})"
