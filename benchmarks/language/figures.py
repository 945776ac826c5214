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
from benchmarks.language.cells import DENSE_SHARE, LAM, LR, Cell
from benchmarks.language.page import KINDS, SHOWN
from benchmarks.language.rewards import PRETRAINED
from benchmarks.language.summary import FEWEST, gold_lead, method_of, setting_of

COLORS = {
    "plain": plots.COLORS["sparse"],
    "uniform": plots.COLORS["uniform"],
    "ABC": plots.COLORS["ABC"],
    "ABC shuffled": "#edae49",
    "leave-one-out, signed": "#3a7d44",
    "gradient x value, signed": "#c05299",
    "value-weighted last row, signed": "#00798c",
    "relevance a third up, signed": "#1b1b1b",
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


def _kind(name: str) -> str:
    """Of the study's own reward models what they began from; of a user's its name."""
    if name.startswith(PRETRAINED):
        return "a pretrained encoder"
    return "from scratch" if name.startswith("lm-") else setting_of(name)


def _points(records: Sequence[dict[str, Any]], source: str, measure: str) -> list[float]:
    found = [r["sources"].get(source, {}).get(measure) for r in records]
    return [x for x in found if x is not None]


def credit(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A point for each training: are people's words found, and does the score fall without a source's own?"""
    by_setting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_setting[_kind(record["name"])].append(record)
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
    values: dict[str, dict[str, dict[tuple[str, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        cell = Cell(**record["cell"])
        name = method_of(cell)
        if cell.dense_share != DENSE_SHARE:
            name += f" at {cell.dense_share:g}"
        values[_where(cell)][name][cell.reward_model, cell.seed] = gold_lead(record)
    pairs: dict[str, dict[str, list[float]]] = {}
    for where, found in sorted(values.items()):
        base = found.get("plain", {})
        ys = {n: [x[p] - base[p] for p in x if p in base] for n, x in found.items() if n != "plain"}
        if kept := {n: y for n, y in ys.items() if len(y) >= FEWEST}:
            pairs[where] = kept
    names = sorted({name for found in pairs.values() for name in found}, reverse=True)
    figure, axes = _figure(max(1, len(pairs)), 9.0, 3.2)
    for one, (where, found) in zip(axes, pairs.items(), strict=False):
        for y, name in enumerate(names):
            xs = found.get(name, [])
            color = COLORS.get(name.split(" at ")[0], "gray")
            one.plot(xs, [y] * len(xs), "o", color=color, alpha=0.7, markersize=4)
            if xs:
                one.plot([statistics.fmean(xs)] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2)
        one.axvline(0, color="gray", linewidth=1, linestyle=":")
        one.set_yticks(range(len(names)), names if one is axes[0] else [], fontsize="small")
        one.set_ylim(-0.5, len(names) - 0.5)
        one.set_title(where, fontsize="x-small")
    figure.supxlabel("gold judge: lead over plain, a point for each pair", fontsize="small")
    figure.savefig(path, dpi=150)


def _where(cell: Cell) -> str:
    lam = f", lam {cell.lam:g}" if cell.loop == "ppo" else ""
    setting = setting_of(cell.reward_model)
    return f"{cell.loop}{lam}\n{KINDS.get(setting, setting)}"


def frontier(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The gold judge's mean score against KL, over all runs of a method."""
    by_place: dict[str, dict[str, list[list[tuple[float, float]]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        cell = Cell(**record["cell"])
        if cell.lam == LAM and cell.lr == LR and cell.dense_share == DENSE_SHARE:
            kl = record["curves"]["kl"]
            runs = by_place[_where(cell)][cell.source]
            runs.append([(kl[int(at)], gold) for at, gold, _ in record["gold"]])
    kept = {
        where: {source: runs for source, runs in found.items() if len(runs) >= FEWEST}
        for where, found in sorted(by_place.items())
    }
    places = {where: found for where, found in kept.items() if len(found) > 1}
    figure, axes = _figure(max(1, len(places)), 9.0, 3.8)
    handles: dict[str, Any] = {}
    for one, (where, found) in zip(axes, places.items(), strict=False):
        for source, runs in sorted(found.items()):
            length = min(map(len, runs))
            xs = [statistics.fmean(run[i][0] for run in runs) for i in range(length)]
            ys = [statistics.fmean(run[i][1] for run in runs) for i in range(length)]
            color = COLORS.get(source, "gray")
            (handles[source],) = one.plot(xs, ys, "o-", color=color, markersize=3)
        one.set_title(where, fontsize="x-small")
    axes[0].set_ylabel("gold judge")
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=4, frameon=False, fontsize="x-small"
    )
    figure.supxlabel("KL to the initial policy, nats a completion", fontsize="small")
    figure.savefig(path, dpi=150)
