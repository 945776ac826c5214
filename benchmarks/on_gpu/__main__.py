"""``python -m benchmarks.on_gpu OUT [first|more [WORD...]]``: what ``make gpu`` and ``make gpu-more`` run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.on_gpu.carried import CACHE, unpacked
from benchmarks.on_gpu.parts import ROOT, ahead, first, more
from benchmarks.on_gpu.runner import Part, Runner, Start, started


def capability() -> int:
    """Of the first GPU, such as 90."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(said.split("\n")[0].replace(".", ""))
    except (OSError, subprocess.SubprocessError, ValueError):
        return 90


def chosen(parts: Sequence[Part], words: Sequence[str]) -> list[Part]:
    """Those that are asked for, with the seconds that are said."""
    if not words:
        return list(parts)
    asked = [word.partition("=") for word in words]
    said = (
        (part, next((seconds for name, _, seconds in asked if name in part.name), None)) for part in parts
    )
    return [part._replace(seconds=float(x)) if x else part for part, x in said if x is not None]


def main(out: Path, what: str = "first", *only: str, start: Start = started) -> int:
    """Only parts whose names have one of the words, if there are any; ``tests=50`` gives one 50 seconds."""
    for name in ("TRITON_INTERPRET", "PYTHONWARNINGS"):
        os.environ.pop(name, None)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(CACHE),
    }
    runner = Runner(out, start)

    def interrupted(number: int, frame: FrameType | None) -> None:
        runner.stop()
        sys.exit(f"ended by signal {number}; what was found is in {out}")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    runner.write("cache", {"said": unpacked()})
    print(runner.lines[-1]["said"], flush=True)
    parts, missing = (first(out), {}) if what == "first" else more(out)
    for name, why in missing.items():
        runner.write(name, {"item": name, "status": "skipped", "error": why})
    runner.run(chosen(parts, only), beside=ahead(out, capability()) if what == "first" else None)
    print((out / "summary.md").read_text())
    bad = [x for x in runner.lines if x.get("status") in ("wrong", "failed", "hung", "died")]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
