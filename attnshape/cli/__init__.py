"""The command line: ``attnshape …``, also ``python -m attnshape``."""

from attnshape.cli.base import app  # first: it says what is not installed

# isort: split
from attnshape.cli import demo, measure, models  # they add their commands

__all__ = ["app", "demo", "main", "measure", "models"]


def main() -> None:
    app()
