"""What got worse: ``python -m benchmarks.guard NEW [BASE]`` compares the ratios of two runs.

BASE is the committed run of the same type of machine. Worse, or better, is a ratio whose range over its own
repeats (10th to 90th percentile) lies below, or above, the other run's. It only tells: the exit status is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from attnshape.bench.timing import Ratio
from benchmarks.results import NAME, RESULTS, Run, load, ratio


class Change(NamedTuple):
    benchmark: str
    over: str
    """The baseline of the same run: a copy, plain PyTorch, a peer."""
    before: Ratio
    now: Ratio

    @property
    def worse(self) -> bool:
        return self.now.high < self.before.low

    @property
    def better(self) -> bool:
        return self.now.low > self.before.high

    def __str__(self) -> str:
        return f"{self.benchmark}, over {self.over}: {self.before} before, {self.now} now"


def changes(base: Run, new: Run) -> Iterator[Change]:
    """Every ratio that both runs have."""
    for name, info in new.benchmarks.items():
        for over in info["ratios"]:
            before = ratio(base.benchmarks[name], over) if name in base.benchmarks else None
            now = ratio(info, over)
            if before is not None and now is not None:
                yield Change(name, over, before, now)


def report(base: Run, new: Run) -> str:
    found = list(changes(base, new))
    worse = sorted((c for c in found if c.worse), key=lambda c: c.now.value / c.before.value)
    better = sum(c.better for c in found)
    lines = [f"{len(found)} ratios compared with {base.path}: {len(worse)} worse, {better} better"]
    lines += [f"worse: {change}" for change in worse]
    lines += [f"not measured now: {name}" for name in base.benchmarks if name not in new.benchmarks]
    lines += [f"missing: {name}: {reason}" for name, reason in new.missing.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("new", type=Path)
    parser.add_argument("base", type=Path, nargs="?")
    options = parser.parse_args()
    new = load(options.new)
    base = options.base or RESULTS / new.machine["kind"] / NAME
    if base.exists():
        print(report(load(base), new))
    else:
        print(f"nothing to compare with: there is no {base}, no run of this type of machine is committed")


if __name__ == "__main__":
    main()
