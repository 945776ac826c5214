"""Curves over the steps of a run: smoothed, compared with a mark, rounded for a file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

SMOOTHING = 5
"""Steps over which curves are averaged before they are drawn or compared with the threshold."""
DIGITS = 4
"""Of a curve in a file."""


def smooth(curve: Sequence[float]) -> list[float]:
    """Mean over the last ``SMOOTHING`` steps, or as many as there are."""
    windows = [curve[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(curve))]
    return [statistics.fmean(window) for window in windows]


def steps_to(curve: Sequence[float], mark: float) -> int | None:
    """First step, from 1, at which the smoothed curve reaches the mark; None if it never does."""
    return next((i for i, x in enumerate(smooth(curve), start=1) if x >= mark), None)


def rounded(curve: Iterable[float]) -> list[float]:
    """To ``DIGITS`` significant digits."""
    return [float(f"{x:.{DIGITS}g}") for x in curve]
