"""Three figures of the study, at page width."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnshape.demo import plots
from benchmarks.language.cells import Cell
from benchmarks.language.page import SHOWN
from benchmarks.language.summary import gold_lead, setting_of

COLORS = {
    "plain": plots.COLORS["sparse"],
    "uniform": plots.COLORS["uniform"],
    "ABC": plots.COLORS["ABC"],
    "ABC shuffled": "#edae49",
    "leave-one-out, signed": "#3a7d44",
    "gradient x value, signed": "#c05299",
    "value-weighted last row, signed": "#00798c",
    "norm-weighted rollout": "#8d6a9f",
    "incremental, signed": "#9d8df1",
}
SETTING_COLORS = ("#30638e", "#d1495b", "#3a7d44", "#edae49", "#8d6a9f", "#00798c", "#b0a990", "#5c4d7d")


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.grid(alpha=0.2)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _points(records: Sequence[dict[str, Any]], source: str, measure: str) -> list[float]:
    found = [r["sources"].get(source, {}).get(measure) for r in records]
    return [x for x in found if x is not None]


def credit(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A point for each training: are people's words found, and does the score fall without a source's own?"""
    by_setting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_setting[setting_of(record["name"])].append(record)
    sources = [s for s in SHOWN if s != "random"][::-1]
    figure, (people, model) = _figure(2, 9.0, 4.6)
    for axes, measure in ((people, "roc_matched"), (model, "fell")):
        for i, (setting, rows) in enumerate(by_setting.items()):
            color = SETTING_COLORS[i % len(SETTING_COLORS)]
            for y, source in enumerate(sources):
                xs = _points(rows, source, measure)
                at = y + 0.3 * (i / max(1, len(by_setting) - 1) - 0.5)
                label = setting if y == 0 else None
                axes.plot(xs, [at] * len(xs), "o", color=color, markersize=3.5, alpha=0.8, label=label)
        axes.set_yticks(range(len(sources)), sources)
    model.set_yticklabels([])
    people.axvline(0.5, color="gray", linewidth=1, linestyle=":")
    people.set_xlabel("ROC over words that people called positive or\nnegative, of equal rarity (chance .5)")
    chance = [x for r in records for x in [r["sources"]["random"]["fell"]]]
    model.axvline(statistics.fmean(chance), color="gray", linewidth=1, linestyle=":")
    model.set_xlabel("fall of the score without a fifth of the\ntokens, in its sd (dotted: at random)")
    people.legend(frameon=False, fontsize="x-small")
    figure.savefig(path, dpi=150)


def leads(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Each pair's lead over the plain estimator, by the gold judge."""
    values: dict[tuple[str, ...], dict[tuple[str, int], float]] = defaultdict(dict)
    for record in records:
        cell = Cell(**record["cell"])
        lam = f", lam {cell.lam:g}" if cell.loop == "ppo" else ""
        where = f"{cell.loop}{lam}\n{setting_of(cell.reward_model)}"
        values[where, cell.source if cell.dense_share == 0.8 else f"{cell.source} at {cell.dense_share:g}"][
            cell.reward_model, cell.seed
        ] = gold_lead(record)
    places = sorted({where for where, _ in values})
    figure, axes = _figure(max(1, len(places)), 9.0, 3.6)
    for one, where in zip(axes, places, strict=False):
        base = values.get((where, "plain"), {})
        names = sorted(source for place, source in values if place == where and source != "plain")
        for x, name in enumerate(names):
            found = values[where, name]
            ys = [found[pair] - base[pair] for pair in found if pair in base]
            color = COLORS.get(name.split(" at ")[0], "gray")
            one.plot([x] * len(ys), ys, "o", color=color, alpha=0.7, markersize=4)
            if ys:
                one.plot([x - 0.2, x + 0.2], [statistics.fmean(ys)] * 2, color=color, linewidth=2)
        one.axhline(0, color="gray", linewidth=1, linestyle=":")
        one.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize="x-small")
        one.set_title(where, fontsize="small")
    axes[0].set_ylabel("gold judge: lead over plain")
    figure.savefig(path, dpi=150)


def frontier(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The gold judge's mean score against KL, over all runs of a method."""
    loops = sorted({r["cell"]["loop"] for r in records}) or ["ppo"]
    figure, axes = _figure(len(loops), 9.0, 3.4)
    for one, loop in zip(axes, loops, strict=True):
        by_source: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
        for record in records:
            cell = Cell(**record["cell"])
            if cell.loop == loop and cell.lam == 1.0:
                kl = record["curves"]["kl"]
                by_source[cell.source].append([(kl[int(at)], gold) for at, gold, _ in record["gold"]])
        for source, runs in by_source.items():
            length = min(map(len, runs))
            xs = [statistics.fmean(run[i][0] for run in runs) for i in range(length)]
            ys = [statistics.fmean(run[i][1] for run in runs) for i in range(length)]
            color = COLORS.get(source, "gray")
            one.plot(xs, ys, "o-", color=color, markersize=3, label=f"{source} ({len(runs)})")
        one.set_xlabel("KL to the initial policy, nats a completion")
        one.set_title(loop, fontsize="small")
        one.legend(frameon=False, fontsize="x-small")
    axes[0].set_ylabel("gold judge")
    figure.savefig(path, dpi=150)
