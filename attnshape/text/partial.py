"""What an interrupted run over a file has written, and where another goes on."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECTION = re.compile(rb'<section id="c(\d+)"')
SUFFIX = ".partial"


class Refused(ValueError):
    """A file that is not this run's to write."""


@dataclass(frozen=True)
class Partial:
    """The unfinished forms of a file of credit and of its page.

    Args:
        target: the file, a JSON object with its ``line`` per line.
        html: its page.
        settings: what the file depends on; with others it has another partial file.
        resumable: whether its input can be read again.
    """

    target: Path
    html: Path | None
    settings: Mapping[str, Any]
    resumable: bool = True

    @property
    def path(self) -> Path:
        return self._of(self.target)

    @property
    def page(self) -> Path | None:
        return None if self.html is None else self._of(self.html)

    def _of(self, path: Path) -> Path:
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return path.with_name(f"{path.name}.{key}{SUFFIX}")

    def check(self, resume: bool) -> None:
        """Before work starts.

        Raises:
            Refused: there is something and ``resume`` is False; or something of other settings only.
        """
        there = self.path.exists() and self.path.stat().st_size > 0
        if there and not resume:
            again = "remove it" if self.resumable else "move or remove it"
            hint = "--resume goes on behind it; to start again, " if self.resumable else ""
            raise Refused(f"{self.path} holds what an interrupted run has written: {hint}{again}")
        others = sorted(self.target.parent.glob(f"{glob.escape(self.target.name)}.*{SUFFIX}"))
        others = [path for path in others if path != self.path]
        if resume and not there and others:
            raise Refused(
                f"--resume: {others[0]} is of another model, input or other options; to start again, "
                "remove it"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block is open nobody else writes it: two runs would write each line twice.

        Raises:
            Refused: somebody does.
        """
        with self.path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"{self.path}: another run is writing it, want it to end first") from None
            except OSError:  # a file system without locks
                pass
            try:
                yield
            finally:
                with suppress(FileNotFoundError):  # it has its name by now
                    if not self.path.stat().st_size:
                        self.path.unlink()

    def done(self) -> Iterator[int]:
        """The numbers of the lines that are written, in order; cuts off what is not in both files, whole."""
        if not self.path.exists():
            return iter(())
        line, end = max(self._last(self._rows(), self._last_section()), default=(0, 0))
        _cut(self.path, end)
        if self.page is not None and self.page.exists():
            _cut(self.page, max((at for number, at in self._sections() if number <= line), default=0))
        return (number for number, at in self._rows() if at <= end)

    @staticmethod
    def _last(rows: Iterator[tuple[int, int]], most: float) -> Iterator[tuple[int, int]]:
        last = None
        for row in rows:
            if row[0] > most:
                break
            last = row
        if last is not None:
            yield last

    def _last_section(self) -> float:
        if self.page is None:
            return float("inf")
        return max((number for number, _ in self._sections()), default=0)

    def _rows(self) -> Iterator[tuple[int, int]]:
        """Number and end, in bytes, of each whole line."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as file:
            for row in file:
                end += len(row)
                try:
                    number = json.loads(row)["line"]
                except (ValueError, KeyError, TypeError):  # torn off when the machine stopped
                    return
                if not row.endswith(b"\n"):
                    return
                yield number, end

    def _sections(self) -> Iterator[tuple[int, int]]:
        """The same of the page's sections; its texts are escaped, so none looks like one."""
        if self.page is None or not self.page.exists():
            return
        end, number = 0, 0
        with self.page.open("rb") as file:
            for row in file:
                end += len(row)
                if match := _SECTION.match(row):
                    number = int(match[1])
                if row.endswith(b"</section>\n"):
                    yield number, end


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
