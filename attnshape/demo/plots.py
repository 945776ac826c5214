"""Learning curves as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnshape.demo.ppo import Method
from attnshape.demo.results import smooth

PANELS = {"true_reward": "true reward", "score": "reward model's reward", "kl": "KL to the initial policy"}
COLORS: dict[Method, str] = {"sparse": "#777777", "ABC": "#d1495b", "uniform": "#30638e"}


def learning_curves(
    curves: Mapping[Method, Sequence[Mapping[str, Sequence[float]]]], path: Path, *, title: str
) -> None:
    """One panel per quantity: seeds as thin lines, their mean as a thick one, one standard deviation shaded.

    ``curves[method][i][quantity]`` is the curve of the method's ``i``-th seed over the steps; a quantity that
    no run has is left out. Curves are means over the last 5 steps.
    """
    recorded = next(iter(curves.values()))[0]
    panels = {name: label for name, label in PANELS.items() if name in recorded}
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, label) in zip(row, panels.items(), strict=True):
        for method, runs in curves.items():
            ys = np.array([smooth(run[name]) for run in runs])
            x = np.arange(1, ys.shape[1] + 1)
            mean, spread = ys.mean(0), ys.std(0, ddof=1 if len(ys) > 1 else 0)
            color = COLORS[method]
            axes.plot(x, ys.T, color=color, alpha=0.3, linewidth=0.8)
            axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
            axes.plot(x, mean, color=color, linewidth=2, label=f"{method} ({len(ys)} seeds)")
        axes.set_xlabel("PPO step")
        axes.set_title(label, fontsize="medium")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
