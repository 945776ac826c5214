"""What the stored records say, by the marks of the plan."""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from attnshape.text.audit import CLOSE
from benchmarks.language.cells import LR, Cell
from benchmarks.language.sources import COSTLY

Record: TypeAlias = dict[str, Any]

AS_GOOD = 0.9
"""Of the best source's lift over chance."""
PAIRS, FEWEST, SHARE = 10, 5, 0.8
"""Pairs of a full claim, the fewest that anything is claimed of, and the share of them that must agree."""
FALL = 0.25
KL_MARKS = (5.0, 10.0, 20.0)
"""Nats a completion at which methods are compared, where the mean over five steps first reaches them."""
NO_SOURCE = ("random", "lexicon", "rarity")


class Estimate(NamedTuple):
    """A mean over trainings with two standard errors, which one training does not have."""

    mean: float
    two_se: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.two_se:.3f}" if self.two_se is not None else "")


def estimate(values: Iterable[float]) -> Estimate:
    found = list(values)
    spread = 2 * statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Estimate(statistics.fmean(found), spread, len(found))


def setting_of(name: str) -> str:
    """A reward model's name without its seed; all of one that has none."""
    return name.rpartition("_seed-")[0] or name


def _by_setting(records: Iterable[Record]) -> dict[str, list[Record]]:
    out: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        out[setting_of(record["name"])].append(record)
    return dict(out)


def sources_by_setting(records: Iterable[Record]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Of each setting and source, every measure over the trainings."""
    out: dict[str, dict[str, dict[str, Estimate]]] = {}
    for setting, rows in _by_setting(records).items():
        names = [n for n in rows[0]["sources"] if all(n in r["sources"] for r in rows)]
        out[setting] = {
            name: {
                measure: estimate(r["sources"][name][measure] for r in rows)
                for measure, value in rows[0]["sources"][name].items()
                if value is not None and all(r["sources"][name].get(measure) is not None for r in rows)
            }
            for name in names
        }
    return out


def cheap(sources: dict[str, Any]) -> list[str]:
    """Sources of one forward, or one and its backward."""
    return [name for name in sources if name not in (*COSTLY, *NO_SOURCE)]


def _faithful(found: dict[str, Any]) -> float:
    """The fall without the named tokens; of a signed source, without those that speak for the verdict."""
    return float(found.get("fell_signed", found["fell"]))


def audited(sources: dict[str, Any]) -> str:
    """As ``attnshape audit`` advises: the cheapest that reaches nine tenths of the most faithful's fall."""
    floor = sources["random"]["fell"]
    falls = {name: _faithful(sources[name]) - floor for name in cheap(sources)}
    near = [name for name, fall in falls.items() if fall >= CLOSE * max(falls.values())]
    return min(near, key=lambda name: (_passes(name), -falls[name]))


def _passes(name: str) -> int:
    """Order of cost: rows and increments, rollouts, the last layer's backward, the whole backward."""
    if "gradient" in name or "relevance" in name:
        return 3
    return 2 if name == "value-weighted last row" else int("rollout" in name)


def _like_leave_one_out(sources: dict[str, Any]) -> str:
    return max(cheap(sources), key=lambda name: sources[name]["with_leave_one_out"])


def _below_the_last(sources: dict[str, Any]) -> str:
    return "row below the last" if "row below the last" in sources else "last row"


RULES: dict[str, Callable[[dict[str, Any]], str]] = {
    "audit": audited,
    "like leave-one-out": _like_leave_one_out,
    "always the last row": lambda _sources: "last row",
    "always gradient x value": lambda _sources: "gradient x value",
    "always the row below the last": _below_the_last,
    "always relevance": lambda _sources: "relevance",
    "always relevance a third up": lambda _sources: "relevance a third up",
}
"""What picks a source for one model without labels."""


def lift(record: Record, source: str) -> float:
    """Over chance, among words as rare as each other."""
    return float(record["sources"][source]["roc_matched"]) - 0.5


def best_lift(record: Record) -> float:
    """Of all sources that look at the model, the costly ones included."""
    return max(lift(record, name) for name in record["sources"] if name not in NO_SOURCE)


def rules(records: Iterable[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each setting and rule: the share of the best lift that its source has, and what it picked."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for setting, rows in _by_setting(records).items():
        out[setting] = {}
        for name, rule in RULES.items():
            picks = [rule(r["sources"]) for r in rows]
            out[setting][name] = {
                "share": estimate(lift(r, p) / best_lift(r) for r, p in zip(rows, picks, strict=True)),
                "picked": sorted(set(picks)),
            }
    return out


def gold_lead(record: Record) -> float:
    """The gold judge's mean score over the run, less that of the initial policy."""
    return statistics.fmean(gold for _, gold, _ in record["gold"]) - float(record["initial"]["gold"])


def score_lead(record: Record) -> float:
    """The reward model's own mean score over the run, in the initial policy's standard deviations."""
    return statistics.fmean(record["curves"]["score"])


def gold_at_kl(record: Record, mark: float) -> float | None:
    """The gold judge's gain where KL first reaches ``mark``, a mean of the three nearest evaluations."""
    kl = record["curves"]["kl"]
    reached = (i for i in range(2, len(kl) - 2) if statistics.fmean(kl[i - 2 : i + 3]) >= mark)
    at = next(reached, None)
    if at is None:
        return None
    near = sorted(record["gold"], key=lambda found: abs(found[0] - at))[:3]
    return statistics.fmean(gold for _, gold, _ in near) - float(record["initial"]["gold"])


def over_optimised(record: Record) -> bool:
    """Gold, as a mean of three, ends ``FALL`` below its best while the model's own score does not fall."""
    golds, scores = [gold for _, gold, _ in record["gold"]], record["curves"]["score"]
    smooth = [statistics.fmean(golds[i : i + 3]) for i in range(len(golds) - 2)]
    if not smooth:
        return False
    rises = statistics.fmean(scores[-5:]) >= statistics.fmean(scores[-10:-5])
    return rises and max(smooth) - smooth[-1] > FALL


def method_of(cell: Cell) -> str:
    """Its source; of a learning rate that is not the study's, that too."""
    return cell.source if cell.lr == LR else f"{cell.source}, lr {cell.lr:g}"


def comparisons(records: Iterable[Record], measure: Callable[[Record], float | None]) -> list[dict[str, Any]]:
    """Every source against ``plain`` of the same loop and lambda, by kind of reward model.

    The lead is the mean over trainings of the reward model, ``two_se`` over them; ``pairs`` are of training
    and policy seed, ``ahead`` those in which the source leads. A run of another learning rate is held against
    ``plain`` at the study's; one without the measure counts for nothing.
    """
    values: dict[tuple[Any, ...], dict[tuple[str, int], float]] = defaultdict(dict)
    for record in records:
        cell = Cell(**record["cell"])
        share = None if cell.source == "plain" else cell.dense_share
        key = (cell.loop, cell.lam, setting_of(cell.reward_model), cell.steps, method_of(cell), share)
        found = measure(record)
        if found is not None:
            values[key][cell.reward_model, cell.seed] = found
    out = []
    for key, runs in sorted(values.items(), key=str):
        *same, source, share = key
        base = values.get((*same, "plain", None), {})
        pairs = [pair for pair in runs if pair in base]
        if source == "plain" or not pairs:
            continue
        by_training: dict[str, list[float]] = defaultdict(list)
        for model, seed in pairs:
            by_training[model].append(runs[model, seed] - base[model, seed])
        lead = estimate(statistics.fmean(leads) for leads in by_training.values())
        ahead = sum(x > 0 for leads in by_training.values() for x in leads)
        loop, lam, setting, *_ = key
        out.append(
            {
                "loop": loop,
                "lam": lam,
                "reward_model": setting,
                "source": source,
                "dense_share": share,
                "lead": lead,
                "pairs": len(pairs),
                "ahead": ahead,
                "verdict": verdict(lead, ahead, len(pairs)),
            }
        )
    return out


def verdict(lead: Estimate, ahead: int, pairs: int) -> str:
    """By the marks of the plan: ``"faster"``, ``"slower"``, ``"no difference shown"`` or ``"too few"``."""
    if pairs < FEWEST or lead.two_se is None:
        return "too few"
    needed = pairs if pairs < PAIRS else math.ceil(SHARE * pairs)
    if lead.mean > lead.two_se and ahead >= needed:
        return "faster"
    if -lead.mean > lead.two_se and pairs - ahead >= needed:
        return "slower"
    return "no difference shown"


def summarise(models: Sequence[Record], credit: Sequence[Record], runs: Sequence[Record]) -> dict[str, Any]:
    """Everything that the page and the figures show."""
    accuracy: dict[str, dict[str, Estimate]] = {}
    judges = [r for r in models if "held_out_nats" not in r]
    for setting, rows in _by_setting(judges).items():
        measures = [m for m in rows[0] if m.endswith(("_accuracy", "_pairs"))]
        accuracy[setting] = {m: estimate(r[m] for r in rows) for m in measures}
    judged = [r for r in runs if "gold" in r["initial"]]
    return {
        "accuracy": accuracy,
        "credit": sources_by_setting(credit),
        "rules": rules(credit),
        "gold": comparisons(judged, gold_lead),
        "score": comparisons(runs, score_lead),
        "gold_at_kl": {
            f"{mark:g}": comparisons(judged, functools.partial(gold_at_kl, mark=mark)) for mark in KL_MARKS
        },
        "over_optimised": sorted(r["name"] for r in judged if over_optimised(r)),
        "trained": sum("steps" in r for r in judges),
        "measured": len(credit),
        "runs": len(runs),
    }
