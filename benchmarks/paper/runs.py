"""Runs from their lines, and what is read off them: means and their spread, steps to a mark, differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attnshape.demo.curves import smooth, steps_to
from benchmarks.paper.cells import (
    COLLAPSE,
    FEW,
    KL_MARKS,
    LR_SEEDS,
    RISES,
    RUNAWAY_KL,
    SIGNED,
    Cell,
    Length,
    Method,
)
from benchmarks.paper.depth import MODELS
from benchmarks.paper.sweep import RUNS, TRAINING

END = 10
"""Figures "at the end" are means over this many steps."""
KL_COEF = 0.1


@dataclass(frozen=True)
class Run:
    """One cell's record."""

    cell: Cell
    initial: dict[str, float]
    curves: dict[str, list[float]]

    @property
    def objective(self) -> str:
        """The true reward, or the reward model's where there is no true one."""
        return "true_reward" if "true_reward" in self.curves else "score"

    @property
    def rewards(self) -> list[float]:
        return self.curves[self.objective]

    def mean(self, curve: str | None = None) -> float:
        return statistics.fmean(self.curves[curve or self.objective])

    def penalised(self) -> float:
        """Mean score less the KL penalty, which is what PPO maximises, in initial standard deviations."""
        return self.mean("score") - KL_COEF * self.mean("kl")

    def end(self, curve: str | None = None) -> float:
        return statistics.fmean(self.curves[curve or self.objective][-END:])

    def mark(self, rise: float) -> float:
        """The reward that is ``rise`` standard deviations above the initial policy's mean."""
        if self.objective == "score":
            return rise
        return self.initial["true_mean"] + rise * self.initial["true_std"]

    @property
    def unit(self) -> float:
        """Standard deviation of the initial policy's reward."""
        return self.mark(1) - self.mark(0)

    def steps_to(self, rise: float) -> int | None:
        """First step, from 1, at which the 5-step mean reward has risen so far; None if it never does."""
        return steps_to(self.rewards, self.mark(rise))

    @property
    def entropy(self) -> float:
        """Entropy of the credit over that of uniform credit (of the mean length), mean over steps."""
        pairs = zip(self.curves["credit_entropy"], self.curves["length"], strict=True)
        return statistics.fmean(entropy / math.log(length) for entropy, length in pairs)

    @property
    def collapsed(self) -> bool:
        windows = [self.rewards[i : i + END] for i in range(len(self.rewards) - END + 1)]
        best = max(statistics.fmean(window) for window in windows)
        return best - self.end() > COLLAPSE * self.unit

    @property
    def ran_away(self) -> bool:
        """Whether it ends far from the initial policy, which need not show in a reward that never rose."""
        return self.end("kl") > RUNAWAY_KL

    def reward_at_kl(self, kl: float) -> float | None:
        """5-step mean reward at the first step whose 5-step mean KL reaches ``kl``; None if none does."""
        for reward, reached in zip(smooth(self.rewards), smooth(self.curves["kl"]), strict=True):
            if reached >= kl:
                return reward
        return None


class Estimate(NamedTuple):
    """A mean over ``n`` seeds, twice its standard error, and the standard deviation over seeds."""

    mean: float
    two_se: float
    sd: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), 2 * sd / math.sqrt(len(values)), sd, len(values))


class Lead(NamedTuple):
    """How far one group of runs is ahead of another, seed by seed."""

    mean: float
    two_se: float
    wins: int
    n: int

    @property
    def verdict(self) -> str:
        """Whether the lead is larger than twice its standard error, and which way; of few seeds neither."""
        if self.n < len(FEW):
            return f"{self.n} seed{'s' * (self.n > 1)} only"
        if self.mean - self.two_se > 0:
            return "holds"
        return "fails" if self.mean + self.two_se < 0 else "not shown"


def paired(
    first: Iterable[Run], second: Iterable[Run], value: Callable[[Run], float | None] = Run.mean
) -> Lead | None:
    """Lead of ``first`` in ``value``, the mean reward over all steps; None where no seed has both."""
    return lead_of(list(differences(first, second, value).values()))


def differences(
    first: Iterable[Run], second: Iterable[Run], value: Callable[[Run], float | None] = Run.mean
) -> dict[int, float]:
    """By seed, ``first``'s value less ``second``'s, where both have one."""
    values = [{run.cell.seed: x for run in runs if (x := value(run)) is not None} for runs in (first, second)]
    return {seed: x - values[1][seed] for seed, x in values[0].items() if seed in values[1]}


def lead_of(leads: Sequence[float]) -> Lead | None:
    if not leads:
        return None
    found = estimate(leads)
    return Lead(found.mean, found.two_se, sum(x > 0 for x in leads), found.n)


class Results:
    """All runs of a folder, by cell, and the reward models of the depth study."""

    def __init__(self, folder: Path) -> None:
        runs = (
            Run(Cell(**found["cell"]), found["initial"], found["curves"])
            for found in RUNS.read(folder).values()
        )
        self.runs = {run.cell: run for run in runs}
        training = folder / TRAINING
        self.training: dict[str, Any] = json.loads(training.read_text()) if training.is_file() else {}
        self.models = list(MODELS.read(folder).values())

    def of(self, method: Method, length: Length, **settings: Any) -> list[Run]:
        """Runs of one setting, by seed; those that learning rates were chosen on are left out."""
        like = Cell(method=method, length=length, seed=0, **settings).setting
        found = [r for c, r in self.runs.items() if c.setting == like and c.seed not in LR_SEEDS]
        return sorted(found, key=lambda run: run.cell.seed)

    def selection(self, method: Method, *names: str) -> dict[tuple[float, ...], list[Run]]:
        """By the settings of these names, a method's runs on the seeds of the choice."""
        out: dict[tuple[float, ...], list[Run]] = {}
        for cell, run in self.runs.items():
            if cell.seed in LR_SEEDS and cell.method == method:
                out.setdefault(tuple(getattr(cell, name) for name in names), []).append(run)
        return dict(sorted(out.items()))


def group(runs: Sequence[Run], base: Sequence[Run] = ()) -> dict[str, Any]:
    """The figures of runs that differ in their seed only; ``lead`` is over ``base``, seed by seed."""
    rows: dict[str, Any] = {"n": len(runs)}
    if not runs:
        return rows
    rows["mean"] = estimate([r.mean() for r in runs])
    rows["end"] = estimate([r.end() for r in runs])
    rows["score"] = estimate([r.mean("score") for r in runs])
    rows["penalised"] = estimate([r.penalised() for r in runs])
    rows["kl_end"] = estimate([r.end("kl") for r in runs])
    rows["kl_least"] = min(min(r.curves["kl"]) for r in runs)
    rows["end_mass"] = estimate([r.end("end_mass") for r in runs])
    rows["steps"] = {f"{rise:g}": median_steps([r.steps_to(rise) for r in runs]) for rise in RISES}
    rows["collapsed"] = sum(r.collapsed for r in runs)
    rows["ran_away"] = sum(r.ran_away for r in runs)
    if "precision_at_k" in runs[0].curves:
        known = [[x for x in r.curves["precision_at_k"] if not math.isnan(x)] for r in runs]
        rows["precision_at_k"] = estimate([statistics.fmean(x) for x in known])
    rows["reward_at_kl"] = {
        f"{kl:g}": estimate(reached)
        for kl in KL_MARKS
        if len(reached := [x for r in runs if (x := r.reward_at_kl(kl)) is not None]) == len(runs)
    }
    if runs[0].cell.method not in SIGNED:
        rows["entropy"] = estimate([r.entropy for r in runs])
    lead = paired(runs, base)
    if lead is not None:
        rows["lead"] = lead
        rows["lead_sd"] = paired(runs, base, lambda run: run.mean() / run.unit)
    return rows


def median_steps(steps: Sequence[int | None]) -> float | None:
    """Median, where runs that never arrive come last; None if it is such a run."""
    ordered = sorted(math.inf if s is None else s for s in steps)
    middle = statistics.median(ordered)
    return None if math.isinf(middle) or math.isnan(middle) else middle


def best_of(
    selection: dict[tuple[float, ...], list[Run]], value: Callable[[Run], float] = Run.mean
) -> tuple[float, ...] | None:
    """The setting with the highest mean ``value``, of those run on all seeds of the choice."""
    means = {
        setting: statistics.fmean(value(r) for r in runs)
        for setting, runs in selection.items()
        if len(runs) == len(LR_SEEDS)
    }
    return max(means, key=means.__getitem__, default=None)
