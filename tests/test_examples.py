"""Every example runs as it stands, and fits a page."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    command = [sys.executable, "-W", "error", str(path)]
    ended = subprocess.run(
        command, cwd=path.parents[1], env=None, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip()


def test_there_are_some() -> None:
    assert EXAMPLES
