"""The files that a run of the suites leaves, as the report and the guard read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from attnshape.bench.timing import Ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "bench.json"

Info = dict[str, Any]


class Run(NamedTuple):
    """One file."""

    path: Path
    machine: Info
    commit: Info
    date: str
    benchmarks: dict[str, Info]
    """What was recorded of each, by its test's name; ``suite`` among it."""
    missing: dict[str, str]

    def suite(self, *names: str) -> list[Info]:
        return [info for info in self.benchmarks.values() if info["suite"] in names]


def load(path: Path) -> Run:
    """Raises:
    ValueError: not such a file.
    """
    try:
        data = json.loads(path.read_text())
        benchmarks = {b["name"]: b["extra_info"] | {"suite": b["group"]} for b in data["benchmarks"]}
        return Run(
            path, data["machine_info"], data["commit"], data["datetime"][:10], benchmarks, data["missing"]
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a result of `make bench`: {error!r}") from error


def committed(results: Path = RESULTS) -> list[Run]:
    return [load(path) for path in sorted(results.glob(f"*/{NAME}"))]


def cards(results: Path = RESULTS) -> list[Path]:
    """What ``make gpu`` found, a file for each card."""
    return sorted(path.with_name("summary.json") for path in results.glob("*/results.jsonl"))


def ratio(info: Info, name: str) -> Ratio | None:
    found = info["ratios"].get(name)
    return None if found is None else Ratio(**found)
