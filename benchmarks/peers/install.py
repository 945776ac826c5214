"""Makes an environment for each peer: ``python -m benchmarks.peers.install [PEER ...] [--path PEER=FOLDER]``.

Versions are pinned in ``requirements/``. Peers that are on no package index (slime, rl-triton) come from a
checkout: ``--path slime=FOLDER``. The environments hold the torch of the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.peers.measure import PEERS

REQUIREMENTS = Path(__file__).parent / "requirements"
INSTALLED = [name for name, peer in PEERS.items() if peer.module]
WITHOUT_DEPENDENCIES = {"verl": "verl==0.9.1", "openrlhf": "openrlhf==0.11.2"}
"""They ask for more than the measured function needs, some of it only on a GPU."""


def pip_arguments(name: str, path: Path | None) -> list[list[str]]:
    """What pip is called with, one call after another, in the peer's new environment."""
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"
    calls = [[torch_pin, "numpy", "setuptools", "wheel"]]
    requirements = REQUIREMENTS / f"{name}.txt"
    if path is not None:
        calls.append(["--no-deps", "--no-build-isolation", str(path)])
    elif not requirements.exists() and name not in WITHOUT_DEPENDENCIES:
        raise SystemExit(f"{name} is on no package index: give its checkout, --path {name}=FOLDER")
    elif name in WITHOUT_DEPENDENCIES:
        calls.append(["--no-deps", WITHOUT_DEPENDENCIES[name]])
    if requirements.exists():
        calls.append(["--no-build-isolation", torch_pin, "--requirement", str(requirements)])
    return calls


def install(name: str, environments: Path, path: Path | None) -> None:
    folder = environments / name
    calls = pip_arguments(name, path)
    venv.create(folder, with_pip=True, clear=True)
    environment = os.environ | {"DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for arguments in calls:
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(INSTALLED)}; all, if none")
    parser.add_argument("--path", action="append", default=[], metavar="PEER=FOLDER", help="its checkout")
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="where environments are made")
    options = parser.parse_args()
    paths: Mapping[str, Path] = {
        name: Path(folder).absolute() for name, _, folder in (given.partition("=") for given in options.path)
    }
    if unknown := {*options.peers, *paths} - {*INSTALLED}:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(INSTALLED)}")
    failed = []
    for name in options.peers or INSTALLED:
        try:
            install(name, options.folder, paths.get(name))
        except (subprocess.CalledProcessError, SystemExit) as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
