"""The adapters' tests in the frameworks' environments: the second half of ``make parity``.

verl, TRL and OpenRLHF are installed from their pins, slime from a checkout; without one it is left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from parity.__main__ import HERE, environment
from parity.cases import CHOICES
from parity.options import parse

ADAPTERS = {
    "verl": "verl",
    "slime": "slime",
    "openrlhf": "openrlhf",
    "trl-0.9.6": "trl",
    "trl-0.11.4": "trl",
    "trl-1.16.0": "trl_grpo",
}
"""Environment of each adapter's tests."""
PYTEST = "pytest==9.2.0"
# Without the settings of `make test`: its plugins and its conftest are not there, and frameworks warn.
ALONE = (
    "--noconftest",
    "-o",
    "addopts=",
    "-o",
    "filterwarnings=",
    "-p",
    "no:cacheprovider",
    "-q",
    "-W",
    "ignore",
)


def prove(framework: str, folder: Path, checkout: Path | None) -> bool:
    """Runs the adapter's tests; whether they pass."""
    python = environment(framework, folder)
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, PYTEST], check=True)
    if checkout:
        subprocess.run([*install, "--no-deps", checkout], check=True)
    print(f"{framework}: the adapter")
    tests = HERE / f"test_{ADAPTERS[framework]}_adapter.py"
    return subprocess.run([python, "-m", "pytest", *ALONE, tests], cwd=HERE.parents[1]).returncode == 0


def main() -> None:
    options = parse(__doc__, {*CHOICES, *ADAPTERS})
    failed = []
    for framework in options.frameworks or ADAPTERS:
        if framework not in ADAPTERS or (framework == "slime" and framework not in options.checkouts):
            continue
        if not prove(framework, options.environments, options.checkouts.get(framework)):
            failed.append(framework)
    if failed:
        sys.exit(f"the adapter's tests fail: {', '.join(failed)}")


if __name__ == "__main__":
    main()
