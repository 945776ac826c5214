"""The paper's figures from our runs, the paper's own numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnshape.demo import plots
from attnshape.demo.curves import smooth
from benchmarks.paper.cells import (
    DEEP,
    DEEP_SOURCES,
    DEPTHS,
    HEADLINE,
    LAM,
    LENGTHS,
    MAIN,
    ONE_MODEL,
    PAPER,
    Length,
)
from benchmarks.paper.runs import Results, Run
from benchmarks.paper.summary import QUALITY_LENGTH

COLORS: dict[str, str] = {
    **plots.COLORS,
    "ABC shuffled": "#edae49",
    "ABC profile": "#8d6a9f",
    "ABC, random weights": "#b0a990",
}

SOURCE_COLORS = dict(zip(DEEP_SOURCES, ("#3a7d44", "#9d8df1", "#c05299"), strict=True))


BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}


def _figure(panels: int, title: str, width: float = 4.4, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels / rows, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = list(figure.subplots(rows, panels // rows, squeeze=False).flat)
    for one in axes:
        one.grid(alpha=0.2)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="x-small", **where)


def _curves(axes: Axes, runs: Sequence[Run], curve: str, label: str) -> None:
    """Mean over seeds of 5-step means, with two standard errors."""
    ys = np.array([smooth(run.curves[curve]) for run in runs])
    x, mean = np.arange(1, ys.shape[1] + 1), ys.mean(0)
    color = COLORS[label]
    axes.plot(x, mean, color=color, linewidth=1.8, label=f"{label} ({len(runs)})")
    if len(runs) > 1:
        error = 2 * ys.std(0, ddof=1) / len(runs) ** 0.5
        axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def learning(results: Results, path: Path) -> None:
    """Learning curves of every method at both lengths and at lambda 1, and the KL they cost."""
    panels: list[tuple[str, Length, dict[str, Any]]] = [
        ("reward", PAPER, {}),
        ("reward", HEADLINE, {}),
        ("reward", HEADLINE, {"lam": 1.0}),
        ("kl", HEADLINE, {}),
    ]
    title = "Mean over seeds (their number) ± 2 standard errors; 5-step means"
    figure, axes = _figure(len(panels), title, rows=2)
    for one, (curve, length, settings) in zip(axes, panels, strict=True):
        for method in COLORS:
            runs = results.of(method, length, **settings)  # type: ignore[arg-type]
            if runs:
                _curves(one, runs, runs[0].objective if curve == "reward" else curve, method)
        kind = "true reward" if curve == "reward" else "KL to the initial policy"
        one.set_title(f"{kind}, {length} tokens, lambda {settings.get('lam', LAM):g}", fontsize="medium")
        one.set_xlabel("PPO step")
        if not one.lines:
            one.text(0.5, 0.5, "not run yet", ha="center", transform=one.transAxes)
    rewards = axes[1:3]
    for one in rewards:
        one.set_ylim(min(a.get_ylim()[0] for a in rewards), max(a.get_ylim()[1] for a in rewards))
    _legend(axes[0])
    figure.savefig(path, dpi=130)


def lengths(results: Results, summary: dict[str, Any], paper: dict[str, Any], path: Path) -> None:
    """Mean reward over steps by length of the response, the paper's and ours, and ABC's lead over sparse."""
    figure, (theirs, ours, lead) = _figure(
        3, "Mean reward over 100 steps by response length, ± 2 standard errors", width=3.3
    )
    for method in MAIN:
        found = [(n, x[method]) for n, x in paper["methods"].items() if method in x]
        middle = [_middle(n) for n, _ in found]
        theirs.errorbar(
            middle,
            [x["auc"] for _, x in found],
            [x["two_se"] for _, x in found],
            color=COLORS[method],
            marker="o",
            capsize=3,
            label=method,
        )
        run = [(_middle(n), results.of(method, n, **s)) for n, s in LENGTHS]
        _errorbar(ours, [(x, runs) for x, runs in run if runs], method)
    theirs.set_title("the paper: reward model's reward", fontsize="medium")
    ours.set_title("here: true reward", fontsize="medium")
    for table, prefix, label, style in (
        ("lengths", "", "models of each length", "o-"),
        *(
            ("one reward model", f"{m}: ", f"{m} models", f"{x}--")
            for (m, _), x in zip(ONE_MODEL, "s^", strict=True)
        ),
    ):
        rows = [(_middle(n), summary[table].get(f"{prefix}ABC, {n}", {}).get("lead_sd")) for n, _ in LENGTHS]
        points = [(x, *found[:2]) for x, found in rows if found]
        if points:
            lead.errorbar(*zip(*points, strict=True), fmt=style, capsize=3, label=label)
    lead.axhline(0, color="k", linewidth=0.8)
    lead.set_title("ABC's lead over sparse, in initial sd", fontsize="medium")
    for axes in (theirs, ours, lead):
        axes.set_xlabel("new tokens")
    for axes in (theirs, lead):
        _legend(axes)
    figure.savefig(path, dpi=130)


def _middle(length: str) -> float:
    return sum(map(int, length.split("-"))) / 2


def _errorbar(axes: Axes, points: Sequence[tuple[float, Sequence[Run]]], method: str) -> None:
    means = [np.mean([r.mean() for r in runs]) for _, runs in points]
    errors = [
        2 * np.std([r.mean() for r in runs], ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0
        for _, runs in points
    ]
    x = [p for p, _ in points]
    axes.errorbar(x, means, errors, color=COLORS[method], marker="o", capsize=3, label=method)


def beta(results: Results, betas: Sequence[float], paper: dict[str, Any], path: Path) -> None:
    """Mean reward against beta, and reward against KL."""
    figure, (theirs, ours, kl) = _figure(3, "Beta, and reward against KL")
    theirs.plot([float(b) for b in paper["beta"]], list(paper["beta"].values()), "o--", color=COLORS["ABC"])
    theirs.set_title("the paper: mean reward, 251 steps", fontsize="medium")
    points = [(b, results.of("ABC", PAPER, beta=b)) for b in betas]
    _errorbar(ours, [(b, runs) for b, runs in points if runs], "ABC")
    ours.set_title("here: mean true reward, 8-16 tokens", fontsize="medium")
    for axes in (theirs, ours):
        axes.set_xlabel("beta")
        axes.set_xlim(-0.05, 1.05)
    for method in COLORS:
        runs = results.of(method, HEADLINE)  # type: ignore[arg-type]
        if runs:
            x, y = (
                np.mean([smooth(c) for c in curves], axis=0)
                for curves in ([r.curves["kl"] for r in runs], [r.rewards for r in runs])
            )
            kl.plot(x, y, color=COLORS[method], label=method)
    kl.set_xlabel("KL to the initial policy")
    kl.set_title("true reward against KL, 40-60 tokens", fontsize="medium")
    _legend(kl)
    figure.savefig(path, dpi=130)


def credit(results: Results, summary: dict[str, Any], path: Path) -> None:
    """Precision at k by depth of the reward model, and what a user sees of it."""
    figure, (depth, seen) = _figure(2, "How well credit finds the words that matter", width=5.0)
    depths = summary["credit by depth"].get("lexical, 50 tokens", {})
    columns = sorted(depths, key=int)
    if columns:
        x = [int(n) for n in columns]
        for i, name in enumerate(next(iter(depths.values()))["sources"]):
            y = [depths[n]["sources"][name]["precision_at_k"][0] for n in columns]
            depth.plot(x, y, marker="o", label=name, color=f"C{i}")
        depth.plot(x, [depths[n]["chance"] for n in columns], "k:", label="chance")
        _legend(depth, **BESIDE)
    depth.set_xlabel("layers of the reward model")
    depth.set_title("precision at k, 50 tokens", fontsize="medium")
    for i, layers in enumerate(DEPTHS):
        last = [
            m["lengths"][QUALITY_LENGTH]["sources"]["last row"]
            for m in results.models
            if m["layers"] == layers
        ]
        if last:
            x, y = [m["overlap"] for m in last], [m["precision_at_k"] for m in last]
            seen.scatter(x, y, color=f"C{i}", label=f"{layers} layer{'s' * (layers > 1)} ({len(last)})")
    seen.set_xlabel("top tenth shared with gradient x value: needs no truth")
    seen.set_title("the last row, 50 tokens, by reward model", fontsize="medium")
    _legend(seen)
    figure.savefig(path, dpi=130)


def speed(results: Results, path: Path) -> None:
    """Whether credit that found the words went with faster learning."""
    figure, (axes,) = _figure(1, "Credit and speed of learning", width=9)
    for models, marker, note in (("testbed", "o", ""), (DEEP, "^", ", 4-layer reward model")):
        for method in (*COLORS, *DEEP_SOURCES):
            runs = [
                r
                for r in results.of(method, HEADLINE, models=models)  # type: ignore[arg-type]
                if "precision_at_k" in r.curves
            ]
            if method == "uniform" or not runs:
                continue
            p, y = [np.nanmean(r.curves["precision_at_k"]) for r in runs], [r.mean() for r in runs]
            color = (COLORS | SOURCE_COLORS)[method]
            label = f"{method}{note}"
            axes.scatter(p, y, s=14, alpha=0.5, color=color, marker=marker)
            axes.scatter([np.mean(p)], [np.mean(y)], s=70, color=color, marker=marker, label=label)
    axes.set_xlabel("precision at k during PPO")
    axes.set_title("mean true reward, 40-60 tokens", fontsize="medium")
    _legend(axes, **BESIDE)
    figure.savefig(path, dpi=130)
