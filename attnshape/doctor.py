"""What this installation can do: ``attnshape doctor``."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import attnshape
from attnshape.bench.machine import machine_facts
from attnshape.compare import Case, Setting, Shape, compare
from attnshape.ops import chosen_backend
from attnshape.types import Backend

NEEDED = ("torch", "triton", "transformers", "numba", "numpy")
EXTRAS = {
    "demo": ("typer", "rich", "matplotlib"),
    "serve": ("typer", "rich", "fastapi", "uvicorn", "prometheus-client"),
}
USED_WITH = tuple("trl verl openrlhf slime vllm ray accelerate peft deepspeed flash-attn".split())
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPE = Shape(B=2, S=24, R=12, Hq=4, Hkv=2, D=16)
SETTING = Setting(False, True, "skip", 1.0, 0.95, "k1")


@dataclass(frozen=True)
class Checked:
    """A small ``shape_rewards`` on one device, from attention in one dtype, held against the reference."""

    device: str
    dtype: str
    backend: Backend | None
    """None: it raised."""
    why_not_triton: str | None
    error: float | str
    """Of the worst output, as a share of its bound, at most 1 where it is right; or what was raised."""

    @property
    def right(self) -> bool:
        return not isinstance(self.error, str) and self.error <= 1


@dataclass(frozen=True)
class Report:
    """What ``attnshape doctor`` prints."""

    versions: dict[str, str | None]
    """Python's, attnshape's and those of the packages it needs; None: missing."""
    devices: dict[str, str]
    no_gpu: str | None
    """Why torch sees none."""
    checked: list[Checked]
    kept_in: Path | None
    """Where loops that were compiled for the CPU are kept; None: nowhere, each process compiles them."""
    missing: dict[str, list[str]]
    """Of each extra the packages that are not installed."""
    used_with: dict[str, str]
    """Frameworks that are installed, and their versions."""

    @property
    def healthy(self) -> bool:
        return all(self.versions[name] for name in NEEDED if name != "triton") and all(
            x.right for x in self.checked
        )


def examine() -> Report:
    """Looks at the installation and tries every kind of input on every device."""
    from attnshape.cpu.jit import kept_in

    devices = {"cpu": f"{machine_facts(torch.device('cpu'))['device']}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    return Report(
        versions={
            "python": platform.python_version(),
            "attnshape": attnshape.__version__,
            **{name: _version(name) for name in NEEDED},
        },
        devices=devices,
        no_gpu=_no_gpu(),
        checked=[_checked(device, dtype) for device in devices for dtype in DTYPES],
        kept_in=kept_in(),
        missing={
            extra: [name for name in packages if _version(name) is None] for extra, packages in EXTRAS.items()
        },
        used_with={name: version for name in USED_WITH if (version := _version(name)) is not None},
    )


def _checked(device: str, dtype: torch.dtype) -> Checked:
    case = Case(SHAPE, dtype, SETTING)
    name = str(dtype).removeprefix("torch.")
    backend, reason = None, None
    try:
        layer = case.problem().inputs
        backend, reason = chosen_backend(
            "auto", torch.device(device), [layer], torch.empty(0, dtype=dtype, device=device)
        )
        worst = max(found.fraction for found in compare(case, "auto", device).values())
    except Exception as error:  # whatever an installation makes of it is what is wanted
        return Checked(device, name, backend, reason, f"{type(error).__name__}: {error}")
    return Checked(device, name, backend, reason, worst)


def _no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built for CPUs"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them"
    return "torch finds no GPU or no driver"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
