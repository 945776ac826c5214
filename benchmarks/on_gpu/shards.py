"""``python -m benchmarks.on_gpu.shards FOLDER COUNT``: the tests on compiled kernels, side by side.

The first shard has the tests that need the GPU, the others share the rest, those of the kernels before all.
Interrupted, they stop and report what they have; reports and logs lie in FOLDER.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
ON_GPU = re.compile(r"cuda\.is_available\(\)|^from support\.(backends|columns|shaping) import", re.MULTILINE)
"""Of a test file that runs on a GPU what it can."""
# Warnings are errors where the versions are pinned; here they are whatever the machine has.
PYTEST = [sys.executable, "-m", "pytest", "-v", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
WAIT = 3.5
"""Seconds that an interrupted shard has for its report."""


def files() -> list[Path]:
    """Test files that run on a GPU, those of the kernels first."""
    found = [p for p in TESTS.rglob("test_*.py") if ON_GPU.search(p.read_text()) and p.name != "test_gpu.py"]
    return sorted(found, key=lambda path: (path.parent.name != "kernels", path))


def commands(folder: Path, count: int) -> dict[str, list[str]]:
    """By the name of a shard."""
    # What the part before them has asked is left out.
    shards = {"of the GPU": ["-k", "not test_bits", str(TESTS / "test_gpu.py")]}
    for i in range(max(count - 1, 1)):
        shards[f"shard {i:02}"] = [f"--shard={i}/{max(count - 1, 1)}", *map(str, files())]
    return {name: [*PYTEST, f"--junitxml={folder / name}.xml", *rest] for name, rest in shards.items()}


def main(folder: Path, count: int) -> int:
    running: list[subprocess.Popen[bytes]] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + WAIT
        while time.monotonic() < until and any(process.poll() is None for process in running):
            time.sleep(0.1)
        for process in running:
            process.kill()
        os._exit(1)

    signal.signal(signal.SIGINT, interrupted)
    for name, command in commands(folder, count).items():
        log = (folder / f"{name}.log").open("wb")
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in running]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
