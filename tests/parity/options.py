"""What both halves of ``make parity`` are told."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple


class Options(NamedTuple):
    frameworks: list[str]
    """Empty: all of them."""
    environments: Path
    checkouts: dict[str, Path]


def parse(description: str | None, known: Collection[str]) -> Options:
    """``trl`` names every ``trl-VERSION`` that is known."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("frameworks", nargs="*", metavar="FRAMEWORK", help=f"of {', '.join(sorted(known))}")
    parser.add_argument("--environments", type=Path, default=Path(".parity"), metavar="FOLDER")
    parser.add_argument("--checkout", action="append", default=[], metavar="FRAMEWORK=FOLDER")
    given = parser.parse_args()
    checkouts = {name: Path(path) for name, _, path in (x.partition("=") for x in given.checkout)}
    found = {
        asked: [name for name in sorted(known) if asked in (name, name.partition("-")[0])]
        for asked in [*given.frameworks, *checkouts]
    }
    if unknown := [asked for asked, names in found.items() if not names]:
        parser.error(f"no such framework: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    frameworks = [name for asked in given.frameworks for name in found[asked]]
    return Options(frameworks, given.environments.absolute(), checkouts)
