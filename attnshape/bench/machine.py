"""What a figure names: the machine, its versions and its settings, and nothing of who ran it."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import attnshape

PACKAGES = ("triton", "transformers", "numpy")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """``kind`` is the type of the machine: figures of one kind can be compared with each other."""
    kind = name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    if device.type == "cpu":
        kind = f"{name} {os.cpu_count()} cpus"
    return {
        "kind": re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", kind.lower())).strip("-"),
        "device": name,
        "device_type": device.type,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        # torch itself says which build it is, a package's name need not.
        "versions": {"torch": torch.__version__}
        | {name: found for name in PACKAGES if (found := _version(name))},
    }


def run_facts() -> dict[str, Any]:
    """What a training run's file names: the versions and the machine that its figures depend on."""
    return {
        "versions": {
            "attnshape": attnshape.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
        },
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def in_words(facts: dict[str, Any]) -> str:
    """One line for a table."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cpus = f"{facts['threads']} threads" if facts["device_type"] == "cpu" else f"{facts['cpus']} CPUs"
    return f"{facts['device']}, {cpus}, Python {facts['python']}, {versions}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, with family and model, which some makers' names lack."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"
