"""Tables of results, a JSON line each record; ``machine.json`` holds what the lines share.

What runs writes every record into a file of its own below ``new``, which git ignores: cut off anywhere, it
leaves only whole ones, and processes do not get in each other's way. ``collect`` folds them into the tables.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from attnshape.files import json_rows, whole_file

Record: TypeAlias = dict[str, Any]
Key: TypeAlias = Any
"""What sorts, and is equal for two records of one thing only."""

NEW, MACHINES = "new", "machine.json"
SHARED = ("versions", "machine")
"""What ``machine.json`` has by name; a line gives the name as its ``machine``."""


@dataclass(frozen=True)
class Table:
    """Lines of ``name.jsonl`` in the order of their ``key``, which no two of them share."""

    name: str
    key: Callable[[Record], Key]

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.jsonl"

    def new(self, folder: Path, name: str) -> Path:
        """Where a record that no line has yet is kept."""
        return folder / NEW / self.name / f"{name.replace(',', '').replace(' ', '_')}.json"

    def add(self, record: Record, folder: Path, name: str) -> None:
        """Keeps a record, whole or not at all, for ``collect``."""
        path = self.new(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(_line(record))

    def missing(self, items: Sequence[Any], folder: Path) -> list[Any]:
        """Those without a record, in order; each has a ``name`` and the ``key`` of its record.

        Raises:
            ValueError: as ``read``.
        """
        unkept = [item for item in items if not self.new(folder, item.name).is_file()]
        known = self.read(folder)  # after the files, which are taken away when their lines are there
        return [item for item in unkept if item.key not in known]

    def read(self, folder: Path) -> dict[Key, Record]:
        """The records of all lines with what ``machine.json`` says of them, by key.

        Raises:
            ValueError: a line that is no record, comes twice or has an unknown machine, with its number.
        """
        records = self._lines(folder)
        machines = _machines(folder)
        return {key: record | machines[record["machine"]] for key, record in records.items()}

    def _lines(self, folder: Path) -> dict[Key, Record]:
        """As they are written."""
        path = self.path(folder)
        if not path.is_file():
            return {}
        text = path.read_text(encoding="utf-8")
        machines = _machines(folder)  # after the lines, which come last
        records: dict[Key, Record] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            where = f"{path}, line {number}"
            key, record = self._parsed(line, where, ("commit", "machine"))
            if key in records:
                raise ValueError(f"{where}: got a second record of {key}, want one")
            if record["machine"] not in machines:
                raise ValueError(f"{where}: {MACHINES} has no machine {record['machine']!r}")
            records[key] = record
        return records

    def _parsed(self, text: str, where: str, needed: Sequence[str]) -> tuple[Key, Record]:
        try:
            record = json.loads(text)
            absent = [name for name in needed if name not in record]
            if absent:
                raise ValueError(f"no {', '.join(absent)}")
            return self.key(record), record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: got {text[:60]!r} ({error}), want a record of {self.name}; "
                "restore it, or take it away to make it again"
            ) from error

    def fold(self, folder: Path) -> None:
        """Moves the new records into the table: they are there before they are taken away."""
        paths = sorted((folder / NEW / self.name).glob("*.json"))
        if not paths:
            return
        records, machines = self._lines(folder), _machines(folder)
        for path in paths:
            key, record = self._parsed(path.read_text(encoding="utf-8"), str(path), ("commit", *SHARED))
            shared = {name: record[name] for name in SHARED}
            name = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]
            machines[name] = shared
            line = {n: name if n == "machine" else x for n, x in record.items() if n != "versions"}
            if _line(records.setdefault(key, line)) != _line(line):  # as text: no NaN equals another
                raise ValueError(
                    f"{path}: {self.path(folder)} has another record of the same; take one of them away"
                )
        with whole_file(folder / MACHINES) as file:
            file.write(json_rows(machines))
        with whole_file(self.path(folder)) as file:
            file.writelines(_line(records[key]) for key in sorted(records))
        for path in paths:
            path.unlink()


def collect(folder: Path, tables: Sequence[Table]) -> None:
    """Folds what was newly run into the tables, one process at a time.

    Raises:
        ValueError: a broken line or file, or a new record that differs from a line of the same key; nothing
            of that table is changed.
    """
    if folder.is_dir():
        with _alone(folder):
            for table in tables:
                table.fold(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that a process that dies gives back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _machines(folder: Path) -> dict[str, Record]:
    path = folder / MACHINES
    try:
        found: dict[str, Record] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore it") from error
    return found


def _line(record: Record) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
