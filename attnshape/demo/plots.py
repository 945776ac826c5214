"""Learning curves, beside a completion coloured by its credit, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from attnshape.demo.curves import smooth
from attnshape.demo.ppo import Completion, Method

PANELS = {"true_reward": "true reward", "score": "reward model's reward", "kl": "KL to the initial policy"}
WIDTH, HEIGHT = 9.0, 5.0
"""Inches; at a page's width text of 10 points can be read."""
CHARACTERS_PER_LINE, LINES = 94, 6
CHARACTER, LINE = (6.05, 17.0)
"""Points between neighbours in text of 10 points."""
GAIN, LOSS = "#f5a623", "#5b8ec9"
STRONG = 4.0
"""Times the uniform share of credit at which a token's ground is as strong as it gets."""
COLORS: dict[Method, str] = {
    "sparse": "#777777",
    "uniform": "#30638e",
    "ABC": "#d1495b",
    "ABC-D mean": "#66a182",
    "ABC-D last": "#2e4057",
}


def learning_curves(
    curves: Mapping[Method, Sequence[Mapping[str, Sequence[float]]]],
    completion: Completion,
    path: Path,
    *,
    title: str,
) -> None:
    """A completion of the last method across the page, below it one panel per quantity.

    Seeds are thin lines, their mean a thick one with one standard deviation shaded; curves are means over the
    last 5 steps. ``curves[method][i][quantity]`` is the curve of the method's ``i``-th seed over the steps; a
    quantity that no run has is left out.
    """
    recorded = next(iter(curves.values()))[0]
    panels = {name: label for name, label in PANELS.items() if name in recorded}
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, len(panels), height_ratios=[0.6, 1])
    text = figure.add_subplot(grid[0, :])
    row = [figure.add_subplot(grid[1, i]) for i in range(len(panels))]
    text.set_title(
        f"a completion after PPO with {list(curves)[-1]}, its score {completion.score:+.1f}: "
        f"each token's part of it ({'gain' if completion.score >= 0 else 'loss'})",
        fontsize="medium",
    )
    _draw_completion(text, completion)
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
    row[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _draw_completion(axes: Axes, completion: Completion) -> None:
    """The prompt in grey, then every token on a ground of the score's sign, as strong as its credit is above
    the uniform share; cut where the panel ends."""
    axes.set_axis_off()
    background, full = np.array(to_rgb("white")), np.array(to_rgb(GAIN if completion.score >= 0 else LOSS))
    pieces: list[tuple[str, dict[str, Any]]] = [(completion.prompt, {"color": "#777777"})]
    for token, credit in zip(completion.tokens, completion.credit, strict=True):
        strength = min(max(credit, 0.0) * len(completion.tokens) / STRONG, 1.0)
        face = background + (full - background) * strength
        pieces.append((token, {"bbox": {"facecolor": face, "edgecolor": "none", "pad": 1.2}}))
    line = column = 0
    for piece, style in pieces:
        for i, word in enumerate(piece.split(" ")):
            shown = "".join(c if c.isascii() and c.isprintable() else "\N{MIDDLE DOT}" for c in word)
            column += bool(i and column)
            if column and column + len(shown) > CHARACTERS_PER_LINE:
                line, column = line + 1, 0
            if line == LINES:
                return
            drawn = axes.annotate(
                shown,
                (0, 1),
                xycoords="axes fraction",
                xytext=(CHARACTER * column, -LINE * (line + 1)),
                textcoords="offset points",
                family="monospace",
                fontsize=10,
                parse_math=False,
                annotation_clip=False,
                **style,
            )
            drawn.set_in_layout(False)  # else the panels below would make room for it
            column += len(shown)
