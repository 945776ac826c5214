"""Makes an environment for each peer: ``python -m benchmarks.peers.install [PEER ...] [--path PEER=FOLDER]``.

Versions are pinned: by the parity tests, where they run the same framework. Peers that are on no package
index (slime, rl-triton) come from a checkout, ``--path slime=FOLDER``, and get the torch of the interpreter
that runs this. Needs the network; an environment takes a gigabyte.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import torch

from benchmarks.peers.measure import PEERS
from benchmarks.results import ROOT

REQUIREMENTS: dict[str, dict[str, list[str]]] = tomllib.loads(
    (ROOT / "tests" / "parity" / "requirements.toml").read_text()
)
PINS = {"verl": "verl", "trl": "trl-0.9.6", "openrlhf": "openrlhf", "torchrl": "torchrl"}
TORCH = [f"torch=={torch.__version__.split('+')[0]}", "numpy", "setuptools", "wheel"]
FLASHINFER = "flashinfer-python==0.7.2.post1"
INSTALLED = [name for name, peer in PEERS.items() if peer.module]


def pip_calls(environment: str) -> list[list[str]]:
    """What pip installs, one call after another, in an environment of ``requirements.toml``."""
    pins = REQUIREMENTS[environment]
    calls = [pins["packages"]]
    if "no_deps" in pins:
        calls.append(["--no-deps", "--no-build-isolation", *pins["no_deps"]])
    return calls


def pip_arguments(name: str, path: Path | None) -> list[list[str]]:
    """What pip is called with, one call after another, in the peer's new environment.

    Raises:
        ValueError: the peer is on no package index, and no path was given.
    """
    if path is not None:
        return [TORCH, ["--no-deps", "--no-build-isolation", str(path)]]
    if name == "flashinfer":
        return [[*TORCH, FLASHINFER]]
    if name not in PINS:
        raise ValueError(f"{name} is on no package index: give its checkout, --path {name}=FOLDER")
    return pip_calls(PINS[name])


def install(name: str, environments: Path, path: Path | None) -> None:
    """Raises:
    ValueError, subprocess.CalledProcessError: it cannot be had.
    """
    calls = pip_arguments(name, path)
    folder = environments / name
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
    paths = {
        name: Path(folder).absolute() for name, _, folder in (given.partition("=") for given in options.path)
    }
    if unknown := {*options.peers, *paths} - {*INSTALLED}:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(INSTALLED)}")
    failed = False
    for name in options.peers or INSTALLED:
        try:
            install(name, options.folder, paths.get(name))
            print(f"{name}: installed")
        except (subprocess.CalledProcessError, ValueError) as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
