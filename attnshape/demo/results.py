"""What the runs showed: summary figures, the table, and the files."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from attnshape.bench.machine import run_facts
from attnshape.demo.config import DemoConfig
from attnshape.demo.curves import rounded, steps_to
from attnshape.demo.models import TrainingMetrics
from attnshape.demo.plots import learning_curves
from attnshape.demo.ppo import Completion, Method, Record
from attnshape.files import json_rows
from attnshape.text.html import CreditItem, View, credit_page

END_SHARE = 0.1
"""Figures "at the end" are means over this share of the steps."""
SHOWN_COMPLETIONS = 8


@dataclass(frozen=True)
class Run:
    """One method on one seed: a record per step, and the last step's completions."""

    method: Method
    seed: int
    records: list[Record]
    completions: list[Completion]
    seconds: float

    def curve(self, name: str) -> list[float]:
        return [record[name] for record in self.records]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.curve(name))

    def end(self, name: str) -> float:
        curve = self.curve(name)
        return statistics.fmean(curve[-math.ceil(END_SHARE * len(curve)) :])

    def steps_to(self, threshold: float) -> int | None:
        """First step at which the smoothed score reaches the threshold; None if it never does."""
        return steps_to(self.curve("score"), threshold)


@dataclass(frozen=True)
class Results:
    """Everything a demo found out."""

    config: DemoConfig
    training: TrainingMetrics | None
    initial_score: float
    initial_true_reward: float | None
    runs: list[Run]
    seconds: float

    def of(self, method: Method) -> list[Run]:
        """The method's runs, in the order of the seeds."""
        return [run for run in self.runs if run.method == method]

    @property
    def objective(self) -> str:
        """What methods are judged by: the true reward where there is one."""
        return "score" if self.initial_true_reward is None else "true_reward"

    def verdict(self, method: Method) -> str:
        """In words, how ``method`` compares with the first method, seed by seed, over all steps."""
        base = self.config.methods[0]
        pairs = list(zip(self.of(method), self.of(base), strict=True))
        leads = [a.mean(self.objective) - b.mean(self.objective) for a, b in pairs]
        lead = statistics.fmean(leads)
        names = {"true_reward": "true reward", "score": "reward model's reward", "kl": "KL"}
        if self.objective == "score":
            del names["true_reward"]
        text = f"{names[self.objective]}, mean over all steps, {lead:+.2f}"
        if len(leads) > 1:
            error = statistics.stdev(leads) / math.sqrt(len(leads))
            text += f" ± {error:.2f} (standard error over {len(leads)} paired seeds)"
        wins = sum(x > 0 for x in leads)
        text += f", ahead in {wins} of {len(leads)}"
        if wins == len(leads):
            outcome = "beats"
        elif lead <= 0:
            outcome = "LOSES to"
        else:
            outcome = "is not clearly better than"
        at_end = ", ".join(
            f"{label} {statistics.fmean(a.end(name) - b.end(name) for a, b in pairs):+.2f}"
            for name, label in names.items()
        )
        return f"{method} {outcome} {base}: {text}. At the end: {at_end}."

    def table(self) -> Table:
        """A row per run, and each method's mean."""
        unit = " sd" if self.config.standardize else ""
        threshold = self.config.threshold
        columns: dict[str, Callable[[Run], float | None]] = {
            "RM\nmean": lambda run: run.mean("score"),
            "RM\nend": lambda run: run.end("score"),
            "KL\nend": lambda run: run.end("kl"),
            f"steps to\nRM {threshold:+g}{unit}": lambda run: run.steps_to(threshold),
        }
        initial = {"RM\nmean": self.initial_score}
        caption = f"RM: reward model's reward; mean: over all steps; end: over the last {END_SHARE:.0%}"
        if self.initial_true_reward is not None:
            columns = {
                "true\nmean": lambda run: run.mean("true_reward"),
                "true\nend": lambda run: run.end("true_reward"),
                **columns,
                "credit\nP@k": lambda run: run.mean("precision_at_k"),
                "credit\nAUC": lambda run: run.mean("auc"),
            }
            initial["true\nmean"] = self.initial_true_reward
            caption = (
                f"true: true reward; {caption}\ncredit P@k, AUC: whether credit falls on the words "
                "whose deletion changes the true reward"
            )

        table = Table(
            title="PPO, same settings for every method",
            caption=caption,
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in ("method", "seed"):
            table.add_column(name, no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row("initial", "", *(_cell(initial[x]) if x in initial else "" for x in columns))
        table.add_section()
        for method in self.config.methods:
            rows = [[value(run) for value in columns.values()] for run in self.of(method)]
            for run, row in zip(self.of(method), rows, strict=True):
                table.add_row(method, str(run.seed), *map(_cell, row))
            means = [_mean(column) for column in zip(*rows, strict=True)]
            table.add_row(method, "mean", *map(_cell, means), style="bold", end_section=True)
        return table

    def print(self, console: Console) -> None:
        console.print(self.table())
        for method in self.config.methods[1:]:
            console.print(self.verdict(method), style="bold")
        if self.training:
            console.print(
                f"Reward model: held-out accuracy {self.training.accuracy:.3f} on noisy preferences, "
                f"{self.training.true_accuracy:.3f} on the true order."
            )
        console.print(f"Wall time {self.seconds:.0f} s. Files in {self.config.out}", highlight=False)

    def to_json(self) -> dict[str, Any]:
        config = asdict(self.config)
        return {
            "config": {name: str(x) if isinstance(x, Path) else x for name, x in config.items()},
            "training": asdict(self.training) if self.training else None,
            "initial_score": self.initial_score,
            "initial_true_reward": self.initial_true_reward,
            "verdicts": [self.verdict(method) for method in self.config.methods[1:]],
            "runs": [
                {
                    "method": run.method,
                    "seed": run.seed,
                    "seconds": round(run.seconds, 1),
                    "steps_to_threshold": run.steps_to(self.config.threshold),
                    "curves": {name: rounded(run.curve(name)) for name in run.records[0]},
                }
                for run in self.runs
            ],
            "seconds": round(self.seconds, 1),
            **run_facts(),
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _cell(value: float | None) -> str:
    if value is None:
        return "—"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def write_results(results: Results, folder: Path) -> None:
    """``results.json``, ``credit.html``, then ``learning_curves.png``; each replaces an older one at once."""
    items = [
        CreditItem(
            c.prompt,
            c.tokens,
            c.score,
            [View("attention", [c.score * weight for weight in c.credit])],
            _note(run, c),
        )
        for method in reversed(results.config.methods)
        for run in results.of(method)[:1]
        for c in run.completions[:SHOWN_COMPLETIONS]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as scratch:
        new = Path(scratch)
        page = credit_page("Completions after PPO, coloured by credit", items)
        (new / "credit.html").write_text(page, encoding="utf-8")
        (new / "results.json").write_text(json_rows(results.to_json(), levels=2))
        for name in ("results.json", "credit.html"):
            (new / name).replace(folder / name)
        curves = {
            method: [{name: run.curve(name) for name in run.records[0]} for run in results.of(method)]
            for method in results.config.methods
        }
        last = results.of(results.config.methods[-1])[0].completions[0]
        title = "PPO with sparse reward and with attention-based credit"
        learning_curves(curves, last, new / "learning_curves.png", title=title)
        (new / "learning_curves.png").replace(folder / "learning_curves.png")


def _note(run: Run, completion: Completion) -> str:
    note = f"{run.method}, seed {run.seed}"
    return note if completion.true_reward is None else f"{note}, true reward {completion.true_reward:+.2f}"
