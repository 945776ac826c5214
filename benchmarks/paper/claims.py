"""The paper's claims and our own, as differences between runs of a seed: they hold, fail or are not shown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.paper.cells import (
    CONTROLS,
    DEEP,
    DEEP_SOURCES,
    HEADLINE,
    KL_MARKS,
    LAM,
    LENGTHS,
    ONE_MODEL,
    PAPER,
    RTO_BEST,
    SHIFTS,
    SPARSE_BEST,
    TRAINING_METHODS,
    TRAINING_SEEDS,
    TRAININGS,
    Length,
    Method,
)
from benchmarks.paper.runs import Lead, Results, Run, best_of, differences, lead_of, paired

OTHERS: tuple[Method, ...] = ("sparse", "uniform")


def claims(results: Results) -> dict[str, list[dict[str, Any]]]:
    """By heading; all at 40-60 tokens, of the mean reward over all steps, where a claim says nothing else."""
    best = best_of(results.selection("sparse", "lam", "lr"))
    by_objective = best_of(results.selection("sparse", "lam", "lr"), Run.penalised)

    def of(method: Method, length: Length = HEADLINE, **settings: Any) -> list[Run]:
        return results.of(method, length, **settings)

    def claim(text: str, found: Lead | None, missing: str = "not run") -> dict[str, Any]:
        return {"claim": text, "lead": found, "verdict": found.verdict if found else missing}

    def ahead(
        first: Method,
        second: Method,
        note: str = "",
        length: Length = HEADLINE,
        value: Callable[[Run], float | None] = Run.mean,
        verb: str = "is ahead of",
        **settings: Any,
    ) -> dict[str, Any]:
        """Of two methods that differ in nothing else."""
        runs = of(first, length, **settings), of(second, length, **settings)
        missing = "not reached" if all(runs) else "not run"
        return claim(f"{first} {verb} {second}{note and f', {note}'}", paired(*runs, value), missing)

    def growth(long: Length, note: str = "", **settings: Any) -> dict[str, Any]:
        """How much larger ABC's lead over sparse is, each in its length's initial standard deviations."""
        leads = [
            differences(
                of("ABC", n, **settings), of("sparse", n, **settings), lambda run: run.mean() / run.unit
            )
            for n in (long, PAPER)
        ]
        text = f"ABC's lead over sparse, in initial sd, is larger at {long} tokens than at {PAPER}{note}"
        return claim(text, lead_of([x - leads[1][seed] for seed, x in leads[0].items() if seed in leads[1]]))

    def against_the_best() -> list[dict[str, Any]]:
        if best is None or by_objective is None:
            return []
        (lam, lr), (objective_lam, objective_lr) = best, by_objective
        at_best = {"lam": lam, "lr": lr}
        objective = of("sparse", lam=objective_lam, lr=objective_lr)
        return [
            claim(
                f"ABC is ahead of sparse at its best (lambda {lam:g}, lr {lr:g})",
                paired(of("ABC"), of("sparse", **at_best)),
            ),
            *[
                ahead("ABC", other, "both at sparse's best", **at_best)
                for other in ("sparse", "uniform", "ABC shuffled")
            ],
            claim(
                "ABC has more score less KL penalty than sparse at its best by that measure "
                f"(lambda {objective_lam:g}, lr {objective_lr:g})",
                paired(of("ABC"), objective, Run.penalised),
            ),
        ]

    def deep(note: str = "", **settings: Any) -> list[dict[str, Any]]:
        pairs: list[tuple[Method, Method]] = [("ABC", "sparse"), ("ABC", "ABC shuffled")]
        pairs += [(source, "ABC") for source in DEEP_SOURCES]
        pairs.append((DEEP_SOURCES[-1], "sparse"))
        return [ahead(*pair, f"4-layer reward model{note}", models=DEEP, **settings) for pair in pairs]

    def over_trainings(
        first: Method,
        second: Method,
        lam: float,
        value: Callable[[Run], float | None] = Run.mean,
        verb: str = "is ahead of",
        note: str = "",
    ) -> dict[str, Any]:
        """Pairs of reward-model trainings: of each the mean over its policy seeds."""
        leads = []
        for models in TRAININGS:
            runs = (of(method, models=models, lam=lam) for method in (first, second))
            found = differences(*runs, value)
            if all(seed in found for seed in TRAINING_SEEDS):
                leads.append(statistics.fmean(found[seed] for seed in TRAINING_SEEDS))
        text = f"{first} {verb} {second}, both at lambda {lam:g}{note}, by training"
        return claim(text, lead_of(leads))

    def by_training(lam: float) -> list[dict[str, Any]]:
        """Relevance goes further from the initial policy than the rest: it is held against them there too."""
        kl = KL_MARKS[-1]
        at_kl = partial(Run.reward_at_kl, kl=kl), "has more reward than", f", where KL first reaches {kl:g}"
        penalised = Run.penalised, "has more score less KL penalty than"
        relevance: Method = "relevance, signed"
        others: tuple[Method, ...] = ("sparse", "gradient x value, signed")
        return [
            *[over_trainings(method, "sparse", lam) for method in TRAINING_METHODS[1:]],
            over_trainings(relevance, others[1], lam),
            *[over_trainings(relevance, other, lam, *at_kl) for other in others],
            *[over_trainings(relevance, other, lam, *penalised) for other in others],
        ]

    return {
        "Over five trainings of the reward model": [*by_training(LAM), *by_training(1.0)],
        "The paper's claims": [
            *[ahead("ABC", "sparse", f"{n} tokens", n, **settings) for n, settings in LENGTHS],
            *[ahead("ABC", "uniform", f"{n} tokens", n, **settings) for n, settings in LENGTHS],
            ahead("ABC", "sparse", "last 10 steps", value=Run.end, verb="ends above"),
            ahead("ABC", "sparse", f"{PAPER} tokens, last 10 steps", PAPER, Run.end, "ends above"),
            growth(HEADLINE),
            *[
                growth(n, f", one reward model ({models})", models=models)
                for models, lengths in ONE_MODEL
                for n in (HEADLINE, lengths[-1])
            ],
            *[
                ahead(
                    "ABC",
                    other,
                    f"where KL first reaches {kl:g}",
                    value=partial(Run.reward_at_kl, kl=kl),
                    verb="has more reward than",
                )
                for other in OTHERS
                for kl in KL_MARKS
            ],
            claim(
                f"beta 1 is ahead of beta 0, {PAPER} tokens",
                paired(of("ABC", PAPER, beta=1.0), of("ABC", PAPER, beta=0.0)),
            ),
            claim(
                f"beta 1 ends above beta 0, {PAPER} tokens, last 10 steps",
                paired(of("ABC", PAPER, beta=1.0), of("ABC", PAPER, beta=0.0), Run.end),
            ),
        ],
        "Against sparse at other settings": [
            *against_the_best(),
            claim(
                "ABC at lambda .95 is ahead of sparse at lambda 1", paired(of("ABC"), of("sparse", lam=1.0))
            ),
            ahead("ABC", "sparse", "both at lambda .99", lam=0.99),
            ahead("ABC", "sparse", "both at lambda 1", lam=1.0),
            ahead(
                "ABC", "sparse", "both at lambda 1, last 10 steps", value=Run.end, verb="ends above", lam=1.0
            ),
            *[
                ahead("ABC", "sparse", f"{n} tokens, both at lambda 1", n, lam=1.0, **settings)
                for n, settings in LENGTHS[3:]
            ],
            ahead("ABC", "sparse", "separate critic", critic="separate"),
            ahead("ABC", "ABC shuffled", "separate critic", critic="separate"),
            ahead("ABC", "sparse", "separate critic, both at lambda 1", critic="separate", lam=1.0),
            *[
                ahead("ABC", "sparse", f"{PAPER} tokens, scores shifted by {shift:+g}", PAPER, shift=shift)
                for shift in SHIFTS
            ],
        ],
        "Controls": [ahead("ABC", other, f"{n} tokens", n) for n in (PAPER, HEADLINE) for other in CONTROLS],
        "With a 4-layer reward model": [
            *deep(),
            *deep(", both at lambda 1", lam=1.0),
            *deep(", both at sparse's best", **SPARSE_BEST),
        ],
        "Neighbouring methods": [
            ahead("R3HF", "ABC"),
            ahead("R3HF", "sparse", "both at sparse's best", **SPARSE_BEST),
            ahead("RTO", "ABC"),
            *[
                claim(
                    f"RTO at its chosen beta, {RTO_BEST:g}, is ahead of {other}",
                    paired(of("RTO", beta=RTO_BEST), of(other)),
                )
                for other in ("sparse", "ABC")
            ],
        ],
    }
