"""From runs to figures: means with their spread, steps to a mark, paired differences, collapses."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from attnshape.demo.results import smooth
from benchmarks.paper.cells import (
    BETAS,
    COLLAPSE,
    CONTROLS,
    DEEP,
    DEEP_METHODS,
    DEEP_SOURCES,
    EXPERIMENTS,
    FEW,
    HEADLINE,
    KL_MARKS,
    LAM,
    LAMS,
    LENGTHS,
    LONG,
    LR,
    LR_SEEDS,
    MAIN,
    ONE_MODEL,
    PAPER,
    QUALITY_LAYERS,
    RISES,
    RTO_BEST,
    SHIFTS,
    SIGNED,
    SPARSE_BEST,
    Cell,
    Length,
    Method,
)
from benchmarks.paper.depth import CONFIG, MODELS, rank_correlation
from benchmarks.paper.sweep import RUNS, TRAINING

OTHERS: tuple[Method, ...] = ("sparse", "uniform")
END = 10
"""Figures "at the end" are means over this many steps."""
KL_COEF = 0.1
QUALITY_LENGTH = "50"


@dataclass(frozen=True)
class Run:
    """One cell's file."""

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
        mark = self.mark(rise)
        return next((i for i, x in enumerate(smooth(self.rewards), start=1) if x >= mark), None)

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
        self.runs: dict[Cell, Run] = {}
        for path in sorted((folder / RUNS).rglob("*.json")):
            if not path.name.startswith("."):
                loaded = json.loads(path.read_text())
                cell = Cell(**loaded["cell"])
                self.runs[cell] = Run(cell, loaded["initial"], loaded["curves"])
        training = folder / TRAINING
        self.training: dict[str, Any] = json.loads(training.read_text()) if training.is_file() else {}
        self.models = [json.loads(path.read_text()) for path in sorted((folder / MODELS).glob("*.json"))]

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


def labelled(results: Results, rows: Sequence[tuple[str, Method, Length, dict[str, Any]]]) -> dict[str, Any]:
    """A group per row, by label; the first row is the one that the others' leads are over."""
    base = results.of(rows[0][1], rows[0][2], **rows[0][3])
    return {
        label: group(results.of(method, length, **settings), () if i == 0 else base)
        for i, (label, method, length, settings) in enumerate(rows)
    }


def summarise(results: Results) -> dict[str, Any]:
    """Everything that the page shows, in the order in which it shows it."""

    def methods(length: Length) -> dict[str, Any]:
        names: tuple[Method, ...] = (*MAIN, "ABC-D mean", "ABC-D last", *CONTROLS)
        rows: list[tuple[str, Method, Length, dict[str, Any]]] = [(m, m, length, {}) for m in names]
        rows.insert(2, ("uniform, beta 1", "uniform", length, {"beta": 1.0}))
        if length == HEADLINE:
            rows += [("R3HF", "R3HF", length, {}), ("RTO", "RTO", length, {})]
            rows.append((f"RTO, beta {RTO_BEST:g}", "RTO", length, {"beta": RTO_BEST}))
        return labelled(results, rows)

    shifts: dict[str, Any] = {}
    for shift in (0.0, *SHIFTS):
        for method in ("sparse", "ABC"):
            settings = {"shift": shift} if shift else {}
            base = results.of(method, PAPER)
            runs = results.of(method, PAPER, **settings)
            shifts[f"{method}, {shift:+g}"] = group(runs, base if shift else ())

    lambdas: dict[str, Any] = {}
    for lam in sorted(LAMS):
        base = results.of("sparse", HEADLINE, lam=lam)
        for method in MAIN:
            runs = results.of(method, HEADLINE, lam=lam)
            lambdas[f"{method}, lambda {lam:g}"] = group(runs, () if method == "sparse" else base)

    lengths: dict[str, Any] = {}
    for length, settings in LENGTHS:
        base = results.of("sparse", length, **settings)
        for method in MAIN:
            runs = results.of(method, length, **settings)
            lengths[f"{method}, {length}"] = group(runs, () if method == "sparse" else base)

    betas = {}
    for beta in BETAS:
        base = results.of("ABC", PAPER, beta=BETAS[0])
        betas[f"beta {beta:g}"] = group(results.of("ABC", PAPER, beta=beta), base if beta else ())

    critics: dict[str, Any] = {}
    for lam, names in ((LAM, ("sparse", "ABC", "ABC shuffled")), (1.0, ("sparse", "ABC"))):
        base = results.of("sparse", HEADLINE, lam=lam, critic="separate")
        for method in names:
            runs = results.of(method, HEADLINE, lam=lam, critic="separate")  # type: ignore[arg-type]
            critics[f"{method}, lambda {lam:g}"] = group(runs, () if method == "sparse" else base)

    one_model: dict[str, Any] = {}
    for length in ONE_MODEL:
        base = results.of("sparse", length, models=LONG)
        one_model[f"sparse, {length}"] = group(base)
        one_model[f"ABC, {length}"] = group(results.of("ABC", length, models=LONG), base)

    def deep(**settings: Any) -> dict[str, Any]:
        return labelled(results, [(m, m, HEADLINE, {"models": DEEP, **settings}) for m in DEEP_METHODS])

    return {
        "coverage": coverage(results),
        "testbed": results.training,
        "methods 40-60": methods(HEADLINE),
        "methods 8-16": methods(PAPER),
        "learning rates": choice(results.selection("sparse", "lam", "lr"), "sparse, lambda {:g}, lr {:g}"),
        "RTO's share": choice(results.selection("RTO", "beta"), "RTO, beta {:g}"),
        "headline": headline(results),
        "lambda": lambdas,
        "lengths": lengths,
        "beta": betas,
        "shifted scores": shifts,
        "separate critic": critics,
        "one reward model": one_model,
        "deep reward model": deep(),
        "deep reward model, lambda 1": deep(lam=1.0),
        "deep reward model, sparse's best": deep(**SPARSE_BEST),
        "KL": {
            **{m: group(results.of(m, HEADLINE)) for m in (*MAIN, *CONTROLS)},
            **{f"{m}, lambda 1": group(results.of(m, HEADLINE, lam=1.0)) for m in MAIN},
        },
        "credit and speed": credit_and_speed(results),
        "credit by depth": credit_by_depth(results),
        "credit by quality": credit_by_quality(results),
        "without the truth": without_the_truth(results),
        "claims": claims(results),
    }


def coverage(results: Results) -> dict[str, list[int]]:
    """By experiment, how many of its cells have been run, and how many it has."""
    return {name: [sum(c in results.runs for c in cells), len(cells)] for name, cells in EXPERIMENTS.items()}


def choice(selection: dict[tuple[float, ...], list[Run]], label: str) -> dict[str, Any]:
    """What each setting of a selection gave; ``label`` takes the setting's values."""
    return {
        label.format(*setting): {
            "mean": estimate([r.mean() for r in runs]),
            "penalised": estimate([r.penalised() for r in runs]),
            "collapsed": sum(r.collapsed for r in runs),
        }
        for setting, runs in selection.items()
    }


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


def headline(results: Results) -> dict[str, Any]:
    """ABC as the paper ran it against sparse at the lambda and learning rate chosen for sparse."""
    best = best_of(results.selection("sparse", "lam", "lr"))
    if best is None:
        return {}
    lam, lr = best
    sparse = results.of("sparse", HEADLINE, lam=lam, lr=lr)
    rows = {f"sparse, lambda {lam:g}, lr {lr:g}": group(sparse)}
    for abc_lam in dict.fromkeys((LAM, lam)):
        for abc_lr in dict.fromkeys((LR, lr)):
            runs = results.of("ABC", HEADLINE, lam=abc_lam, lr=abc_lr)
            if runs:
                rows[f"ABC, lambda {abc_lam:g}, lr {abc_lr:g}"] = group(runs, sparse)
    others: tuple[Method, ...] = ("uniform", "ABC shuffled", "R3HF")
    for method in others:
        runs = results.of(method, HEADLINE, lam=lam, lr=lr)
        rows[f"{method}, lambda {lam:g}, lr {lr:g}"] = group(runs, sparse)
    return rows


def credit_and_speed(results: Results) -> dict[str, Any]:
    """Of every dense method at 40-60 tokens: precision at k during PPO, and lead over its own sparse runs.

    Uniform credit is left out, whose ties make its precision chance by construction.
    """
    rows: dict[str, Any] = {}
    for models, methods, note in (
        ("testbed", get_args(Method), ""),
        (DEEP, DEEP_METHODS, ", 4-layer reward model"),
    ):
        sparse = results.of("sparse", HEADLINE, models=models)
        for method in methods:
            found = group(results.of(method, HEADLINE, models=models), sparse)
            if method not in ("sparse", "uniform") and "lead" in found and "precision_at_k" in found:
                kept = ("precision_at_k", "entropy", "lead")
                rows[f"{method}{note}"] = {name: found[name] for name in kept if name in found}
    return dict(sorted(rows.items(), key=lambda row: -row[1]["precision_at_k"].mean))


def credit_by_depth(results: Results) -> dict[str, Any]:
    """By reward, length, depth and source, the measures' means over training seeds."""
    out: dict[str, Any] = {}
    for model in results.models:
        if model["steps"] == CONFIG.rm_steps:
            for length in model["lengths"]:
                table = out.setdefault(f"{model['reward']}, {length} tokens", {})
                table.setdefault(str(model["layers"]), []).append((model, length))
    return {name: {n: _averaged(found) for n, found in table.items()} for name, table in out.items()}


def credit_by_quality(results: Results) -> dict[str, Any]:
    """The same by the steps of training, of reward models of one depth and length."""
    out: dict[str, Any] = {}
    for model in results.models:
        if (model["layers"], model["reward"]) == (QUALITY_LAYERS, "lexical"):
            out.setdefault(str(model["steps"]), []).append((model, QUALITY_LENGTH))
    return {n: _averaged(out[n]) for n in sorted(out, key=int)}


def _averaged(found: Sequence[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """Accuracy, chance and every source's measures of reward models at a length, over training seeds."""
    measured = [model["lengths"][length] for model, length in found]
    sources: dict[str, Any] = {}
    for source, names in measured[0]["sources"].items():
        sources[source] = {
            name: estimate([one["sources"][source][name] for one in measured]) for name in names
        }
    return {
        "n": len(found),
        "accuracy": round(statistics.fmean(model["accuracy"] for model, _ in found), 4),
        "chance": round(statistics.fmean(one["chance"] for one in measured), 4),
        "sources": sources,
    }


def without_the_truth(results: Results) -> dict[str, Any]:
    """Over all reward models, how what a user can see of the last row goes with its precision at k.

    Rank correlations of the precision with low entropy and with the overlap with gradient x value, and the
    precision of rows below and above the middle of each.
    """
    last = [model["lengths"][QUALITY_LENGTH]["sources"]["last row"] for model in results.models]
    if len(last) < 2:
        return {}
    precision = torch.tensor([x["precision_at_k"] for x in last])
    out: dict[str, Any] = {"models": len(last)}
    for name, sign in (("entropy", -1), ("overlap", 1)):
        seen = sign * torch.tensor([x[name] for x in last])
        out[name] = {
            "correlation": rank_correlation(seen, precision),
            "below": float(precision[seen <= seen.median()].mean()),
            "above": float(precision[seen > seen.median()].mean()),
        }
    return out


def claims(results: Results) -> list[dict[str, Any]]:
    """The paper's claims as differences between runs of a seed; each holds, fails or is not shown here."""

    def of(method: Method, length: Length = HEADLINE, **settings: Any) -> list[Run]:
        return results.of(method, length, **settings)

    def claim(text: str, found: Lead | None) -> dict[str, Any]:
        return {"claim": text, "lead": found, "verdict": found.verdict if found else "not run"}

    def growth(long: Length, short: Length, **settings: Any) -> Lead | None:
        """How much larger ABC's lead over sparse is, each in its length's initial standard deviations."""
        leads = [
            differences(
                of("ABC", n, **settings), of("sparse", n, **settings), lambda run: run.mean() / run.unit
            )
            for n in (long, short)
        ]
        return lead_of([x - leads[1][seed] for seed, x in leads[0].items() if seed in leads[1]])

    out = [
        claim(f"ABC is ahead of sparse, {n} tokens", paired(of("ABC", n, **s), of("sparse", n, **s)))
        for n, s in LENGTHS
    ]
    selection = results.selection("sparse", "lam", "lr")
    by_objective = best_of(selection, Run.penalised)
    if by_objective:
        lam, lr = by_objective
        text = f"at sparse's best by that measure (lambda {lam:g}, lr {lr:g}), 40-60 tokens"
        found = paired(of("ABC"), of("sparse", lam=lam, lr=lr), Run.penalised)
        out.append(claim(f"ABC has more score less KL penalty than sparse {text}", found))
    best = best_of(selection)
    if best:
        sparse = of("sparse", lam=best[0], lr=best[1])
        text = f"ABC is ahead of sparse at sparse's best (lambda {best[0]:g}, lr {best[1]:g}), 40-60 tokens"
        out.append(claim(text, paired(of("ABC"), sparse)))
        at_best: dict[Method, list[Run]] = {
            m: of(m, lam=best[0], lr=best[1]) for m in ("ABC", "uniform", "ABC shuffled", "R3HF")
        }
        for method, other in (
            ("ABC", "sparse"),
            ("ABC", "uniform"),
            ("ABC", "ABC shuffled"),
            ("R3HF", "sparse"),
        ):
            text = f"{method} is ahead of {other}, both at sparse's best, 40-60 tokens"
            out.append(claim(text, paired(at_best[method], {**at_best, "sparse": sparse}[other])))
    out += [
        claim(
            "ABC at lambda .95 is ahead of sparse at lambda 1, 40-60 tokens",
            paired(of("ABC"), of("sparse", lam=1.0)),
        ),
        claim(
            "ABC at lambda 1 is ahead of sparse at lambda 1, 40-60 tokens",
            paired(of("ABC", lam=1.0), of("sparse", lam=1.0)),
        ),
        claim(
            "ABC at lambda 1 ends above sparse at lambda 1 (last 10 steps), 40-60 tokens",
            paired(of("ABC", lam=1.0), of("sparse", lam=1.0), Run.end),
        ),
    ]
    for length in (HEADLINE, PAPER):
        for other in ("uniform", *CONTROLS):
            text = f"ABC is ahead of {other}, {length} tokens"
            out.append(claim(text, paired(of("ABC", length), of(other, length))))  # type: ignore[arg-type]
    out += [
        claim(
            "ABC's lead over sparse, in initial sd, is larger at 40-60 tokens than at 8-16",
            growth(HEADLINE, PAPER),
        ),
        *[
            claim(
                f"ABC's lead over sparse, in initial sd, is larger at {n} than at 8-16, one reward model",
                growth(n, PAPER, models=LONG),
            )
            for n in (HEADLINE, ONE_MODEL[-1])
        ],
        claim(
            "ABC ends above sparse (last 10 steps), 40-60 tokens", paired(of("ABC"), of("sparse"), Run.end)
        ),
        *[
            claim(
                f"ABC has more reward than {other} where KL first reaches {kl:g}, 40-60 tokens",
                paired(of("ABC"), of(other), partial(Run.reward_at_kl, kl=kl)),
            )
            for other in OTHERS
            for kl in KL_MARKS
        ],
        claim(
            "beta 1 is ahead of beta 0, 8-16 tokens",
            paired(of("ABC", PAPER, beta=1.0), of("ABC", PAPER, beta=0.0)),
        ),
        claim(
            "beta 1 ends above beta 0 (last 10 steps), 8-16 tokens",
            paired(of("ABC", PAPER, beta=1.0), of("ABC", PAPER, beta=0.0), Run.end),
        ),
    ]
    out += [
        claim(
            f"ABC is ahead of sparse, scores shifted by {shift:+g}, 8-16 tokens",
            paired(of("ABC", PAPER, shift=shift), of("sparse", PAPER, shift=shift)),
        )
        for shift in SHIFTS
    ]
    for note, settings in (("", {}), ("lambda 1, ", {"lam": 1.0}), ("sparse's best, ", SPARSE_BEST)):
        deep = {method: of(method, models=DEEP, **settings) for method in DEEP_METHODS}
        pairs: list[tuple[Method, Method]] = [(method, "sparse") for method in ("ABC", *DEEP_SOURCES)]
        pairs += [("ABC", "ABC shuffled"), *((method, "ABC") for method in DEEP_SOURCES)]
        out += [
            claim(
                f"{first} is ahead of {second}, 4-layer reward model, {note}40-60 tokens",
                paired(deep[first], deep[second]),
            )
            for first, second in pairs
        ]
    own = {"critic": "separate"}
    out += [
        claim(
            "ABC is ahead of sparse, separate critic, 40-60 tokens",
            paired(of("ABC", **own), of("sparse", **own)),
        ),
        claim(
            "ABC is ahead of ABC shuffled, separate critic, 40-60 tokens",
            paired(of("ABC", **own), of("ABC shuffled", **own)),
        ),
        claim(
            "ABC at lambda 1 is ahead of sparse at lambda 1, separate critic, 40-60 tokens",
            paired(of("ABC", lam=1.0, **own), of("sparse", lam=1.0, **own)),
        ),
    ]
    rto = of("RTO", beta=RTO_BEST)
    out += [
        claim("R3HF is ahead of ABC, 40-60 tokens", paired(of("R3HF"), of("ABC"))),
        claim("RTO is ahead of ABC, 40-60 tokens", paired(of("RTO"), of("ABC"))),
        claim(f"RTO, beta {RTO_BEST:g}, is ahead of ABC, 40-60 tokens", paired(rto, of("ABC"))),
        claim(f"RTO, beta {RTO_BEST:g}, is ahead of sparse, 40-60 tokens", paired(rto, of("sparse"))),
    ]
    return out


def to_json(summary: dict[str, Any]) -> str:
    """Rounded to four decimals, NaN (one seed has no spread) as null."""

    def rounded(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: rounded(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [rounded(value) for value in x]
        if isinstance(x, float):
            return None if math.isnan(x) else round(x, 4)
        return x

    return json.dumps(rounded(summary), indent=1) + "\n"
