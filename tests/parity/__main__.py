"""The presets held against the frameworks' real functions: ``make parity``.

Makes an environment per framework (``requirements.toml``), runs ``drivers.py`` in it on drawn cases,
compares, and writes golden vectors that ``make test`` checks without the frameworks, with a table of the
errors. Frameworks without a package come from a checkout; without one their vectors stay as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from parity import golden
from parity.cases import CHOICES, Case, draw
from parity.check import errors, excess, worst
from parity.drivers import CHECKOUTS, PACKAGES
from parity.options import parse

from benchmarks.peers.install import REQUIREMENTS, pip_calls

HERE = Path(__file__).parent
CASES = 200
WIDTHS = (3, 5, 31, 32, 33, 130, 300)
ENVIRONMENTS = {"verl-groups": "verl", "openrlhf-groups": "openrlhf", "trl-groups": "trl-1.16.0"}
"""Of frameworks that have none of their own name."""


def drawn(framework: str) -> list[Case]:
    """The golden cases, then others of many shapes."""
    cases = [draw(framework, seed) for seed in range(golden.CASES)]
    for seed in range(golden.CASES, CASES):
        cases.append(draw(framework, seed, batch=2 + seed % 5, width=WIDTHS[seed % len(WIDTHS)]))
    return cases


def environment(framework: str, folder: Path) -> Path:
    """The interpreter of the framework's environment, which is made unless its requirements are in it."""
    framework = ENVIRONMENTS.get(framework, framework)
    calls = pip_calls(framework)
    home, wanted = folder / framework, json.dumps(calls)
    python, ready = home / "bin" / "python", home / "ready"
    if ready.exists() and ready.read_text() == wanted:
        return python
    venv.create(home, with_pip=True, clear=True)
    variables = os.environ | {"DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for arguments in calls:
        command = [python, "-m", "pip", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, env=variables)
    ready.write_text(wanted)
    return python


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "of no known commit"


def hold(framework: str, folder: Path, checkout: Path | None) -> list[str]:
    """Compares one framework and writes its golden vectors; the outputs that are too far off."""
    python = Path(sys.executable) if checkout else environment(framework, folder)
    cases = drawn(framework)
    with tempfile.TemporaryDirectory() as scratch:
        given, got = Path(scratch, "cases.pt"), Path(scratch, "outputs.pt")
        torch.save([vars(case) for case in cases], given)
        command = [python, HERE / "drivers.py", framework, given, got, *([checkout] if checkout else [])]
        subprocess.run(command, check=True)
        found = torch.load(got, weights_only=True)
    ran = f"{found['ran']} {commit(checkout)}, functions from a checkout" if checkout else found["ran"]
    each = [errors(framework, case, x) for case, x in zip(cases, found["outputs"], strict=True)]
    largest = worst(each)
    too_far = excess(largest)
    if not too_far:
        few = golden.CASES
        golden.save(framework, ran, largest, len(cases), cases[:few], found["outputs"][:few])
    print(f"{framework}: {ran}, {len(cases)} cases")
    for name, (theirs, ours) in largest.items():
        print(f"  {name:10} theirs {theirs:.1e}  ours {ours:.1e}{'  TOO FAR' if name in too_far else ''}")
    return [f"{framework}: {name}" for name in too_far]


def main() -> None:
    adapters_only = {*REQUIREMENTS} - {*CHOICES, "vllm"}
    options = parse(__doc__, {*CHOICES, *adapters_only})
    failed = []
    checkouts = {
        name: options.checkouts[name.removesuffix("-groups")]
        for name in CHECKOUTS
        if name.removesuffix("-groups") in options.checkouts
    }
    for framework in options.frameworks or [*PACKAGES, *checkouts]:
        if framework in adapters_only:
            continue
        if framework in CHECKOUTS and framework not in checkouts:
            sys.exit(f"{framework} is no package: give --checkout {framework}=FOLDER")
        failed += hold(framework, options.environments, checkouts.get(framework))
    golden.write_table()
    if failed:
        sys.exit(f"more than twice as far from the formula as the framework: {', '.join(failed)}")


if __name__ == "__main__":
    main()
