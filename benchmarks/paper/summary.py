"""Everything that the page shows, from the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, get_args

import torch

from attnshape.files import json_rows
from benchmarks.paper.cells import (
    BETAS,
    CONTROLS,
    DEEP,
    DEEP_METHODS,
    EXPERIMENTS,
    HEADLINE,
    LAM,
    LAMS,
    LENGTHS,
    LR,
    MAIN,
    ONE_MODEL,
    PAPER,
    QUALITY_LAYERS,
    RTO_BEST,
    SHIFTS,
    SPARSE_BEST,
    TRAINING_METHODS,
    TRAININGS,
    Length,
    Method,
)
from benchmarks.paper.claims import claims
from benchmarks.paper.depth import CONFIG, rank_correlation
from benchmarks.paper.runs import Results, Run, best_of, estimate, group

PAIR: tuple[Method, ...] = ("sparse", "ABC")
QUALITY_LENGTH = "50"


def summarise(results: Results) -> dict[str, Any]:
    """Everything that the page shows, in the order in which it shows it."""

    def methods(length: Length) -> dict[str, Any]:
        names: tuple[Method, ...] = (*MAIN, "ABC-D mean", "ABC-D last", *CONTROLS)
        rows: list[tuple[str, Method, dict[str, Any]]] = [(m, m, {}) for m in names]
        rows.insert(2, ("uniform, beta 1", "uniform", {"beta": 1.0}))
        if length == HEADLINE:
            rows += [("R3HF", "R3HF", {}), ("RTO", "RTO", {})]
            rows.append((f"RTO, beta {RTO_BEST:g}", "RTO", {"beta": RTO_BEST}))
        base = results.of("sparse", length)
        return {
            label: group(results.of(method, length, **settings), () if label == "sparse" else base)
            for label, method, settings in rows
        }

    shifts: dict[str, Any] = {}
    for shift in (0.0, *SHIFTS):
        for method in ("sparse", "ABC"):
            settings = {"shift": shift} if shift else {}
            base = results.of(method, PAPER)
            runs = results.of(method, PAPER, **settings)
            shifts[f"{method}, {shift:+g}"] = group(runs, base if shift else ())

    def over_sparse(label: str, methods: Sequence[Method], length: Length, **settings: Any) -> dict[str, Any]:
        """A group per method; leads are over sparse at the same settings."""
        base = results.of("sparse", length, **settings)
        return {
            label.format(m): group(results.of(m, length, **settings), () if m == "sparse" else base)
            for m in methods
        }

    lambdas, critics, lengths, undiscounted, one_model = ({} for _ in range(5))
    for lam in sorted(LAMS):
        lambdas |= over_sparse(f"{{}}, lambda {lam:g}", MAIN, HEADLINE, lam=lam)
    for lam, names in ((LAM, (*PAIR, "ABC shuffled")), (1.0, PAIR)):
        critics |= over_sparse(f"{{}}, lambda {lam:g}", names, HEADLINE, lam=lam, critic="separate")
    for length, settings in LENGTHS:
        lengths |= over_sparse(f"{{}}, {length}", MAIN, length, **settings)
    for length, settings in LENGTHS[2:]:
        undiscounted |= over_sparse(f"{{}}, {length}", PAIR, length, lam=1.0, **settings)
    for models, lengths_of in ONE_MODEL:
        for length in lengths_of:
            one_model |= over_sparse(f"{models}: {{}}, {length}", PAIR, length, models=models)

    betas = {}
    for beta in BETAS:
        base = results.of("ABC", PAPER, beta=BETAS[0])
        betas[f"beta {beta:g}"] = group(results.of("ABC", PAPER, beta=beta), base if beta else ())

    def deep(**settings: Any) -> dict[str, Any]:
        return over_sparse("{}", DEEP_METHODS, HEADLINE, models=DEEP, **settings)

    def of_trainings(method: Method, lam: float) -> list[Run]:
        return [run for models in TRAININGS for run in results.of(method, HEADLINE, models=models, lam=lam)]

    return {
        "coverage": coverage(results),
        "testbed": results.training,
        "methods 40-60": methods(HEADLINE),
        "methods 8-16": methods(PAPER),
        "trainings": {
            f"{method}, lambda {lam:g}": group(of_trainings(method, lam))
            for lam in (LAM, 1.0)
            for method in TRAINING_METHODS
        },
        "learning rates": choice(results.selection("sparse", "lam", "lr"), "sparse, lambda {:g}, lr {:g}"),
        "RTO's share": choice(results.selection("RTO", "beta"), "RTO, beta {:g}"),
        "headline": headline(results),
        "lambda": lambdas,
        "lengths": lengths,
        "lengths at lambda 1": undiscounted,
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
    precision = torch.tensor([x["precision_at_k"] for x in last], dtype=torch.float64)
    out: dict[str, Any] = {"models": len(last)}
    for name, sign in (("entropy", -1), ("overlap", 1)):
        seen = sign * torch.tensor([x[name] for x in last], dtype=torch.float64)
        out[name] = {
            "correlation": rank_correlation(seen, precision),
            "below": float(precision[seen <= seen.median()].mean()),
            "above": float(precision[seen > seen.median()].mean()),
        }
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

    return json_rows(rounded(summary))
