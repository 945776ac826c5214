"""The tables of README.md and TABLES.md, made from summary.json and put between their markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.paper.cells import KL_MARKS, LR_SEEDS, MAIN, ONE_MODEL, RISES
from benchmarks.paper.sources import SOURCES

Summary = dict[str, Any]


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with each table between ``<!-- begin: name -->`` and ``<!-- end: name -->``.

    Raises:
        ValueError: the page and the tables do not have the same names.
    """
    names = re.findall(r"<!-- begin: (.+?) -->", page)
    if sorted(names) != sorted(tables):
        raise ValueError(f"page: got the markers {sorted(names)}, want {sorted(tables)}")
    for name, table in tables.items():
        pattern = rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end: {re.escape(name)} -->)"
        page = re.sub(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)
    return page


def tables(summary: Summary, paper: dict[str, Any]) -> dict[str, str]:
    """Every table, by the name of its marker: README.md has the claims, TABLES.md the others."""
    out = {
        "coverage": coverage(summary["coverage"]),
        "testbed": testbed(summary["testbed"]),
        "claims": claims(summary["claims"]),
        "learning rates": choices(summary["learning rates"]),
        "RTO's share": choices(summary["RTO's share"]),
        "kl": reward_at_kl(summary["KL"]),
        "credit and speed": credit_and_speed(summary["credit and speed"]),
        "paper": paper_table(paper),
        "beside the paper": beside(summary["lengths"], summary["one reward model"], paper),
        "spread": spread(summary["lengths"], paper),
        "credit by quality": credit(summary["credit by quality"], "step"),
        "without the truth": without_the_truth(summary["without the truth"]),
    }
    for name in (
        "headline",
        "methods 40-60",
        "methods 8-16",
        "trainings",
        "lambda",
        "lengths",
        "beta",
        "shifted scores",
        "lengths at lambda 1",
        "separate critic",
        "one reward model",
        "deep reward model",
        "deep reward model, lambda 1",
        "deep reward model, sparse's best",
    ):
        out[name] = groups(summary[name])
    for name, depths in summary["credit by depth"].items():
        out[f"credit, {name}"] = credit(depths)
    for name in CREDIT_TABLES:
        out.setdefault(f"credit, {name}", "Not run yet.")
    return out


IN_SHORT = (
    "ABC is ahead of sparse, 8-16 tokens",
    "ABC is ahead of sparse, 40-60 tokens",
    "ABC is ahead of sparse, 140-160 tokens",
    "ABC is ahead of ABC shuffled, 40-60 tokens",
    "ABC at lambda .95 is ahead of sparse at lambda 1",
    "ABC is ahead of sparse, both at lambda 1",
    "ABC is ahead of sparse, both at sparse's best",
    "ABC is ahead of sparse, separate critic",
    "ABC is ahead of sparse, 8-16 tokens, scores shifted by +5",
    "norm-weighted rollout is ahead of ABC, 4-layer reward model",
    "gradient x value, signed is ahead of ABC, 4-layer reward model",
    "ABC is ahead of sparse, 4-layer reward model, both at lambda 1",
    "gradient x value, signed is ahead of sparse, 4-layer reward model, both at lambda 1",
)
"""The claims that docs/evidence.md shows."""
IN_SHORT_TABLE = "the paper's claims, in short"
CREDIT_TABLES = [f"{reward}, {n} tokens" for reward in ("lexical", "contextual") for n in (12, 50)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not run yet."
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(x: Sequence[float] | None, digits: int = 2) -> str:
    """``mean ± two standard errors`` of an ``Estimate`` or a ``Lead``."""
    if x is None:
        return ""
    return f"{x[0]:.{digits}f}" if x[1] is None else f"{x[0]:.{digits}f} ± {x[1]:.{digits}f}"


def _lead(x: Sequence[float] | None) -> str:
    """A ``Lead``, with how many of its seeds are ahead."""
    if x is None:
        return ""
    return f"{x[0]:+.2f}{'' if x[1] is None else f' ± {x[1]:.2f}'} ({x[2]} of {x[3]})"


def groups(rows: dict[str, Any]) -> str:
    """A row per group of runs that differ in their seed only."""
    heads = [
        "",
        "seeds",
        "true reward, mean",
        "last 10 steps",
        "sd there",
        *[f"steps to +{rise:g} sd" for rise in RISES],
        "KL, last 10",
        "score less KL penalty",
        "P@k",
        "collapsed, ran away",
        "lead (seeds ahead)",
    ]
    body = []
    for label, row in rows.items():
        if not row["n"]:
            continue
        steps = [row["steps"][f"{rise:g}"] for rise in RISES]
        body.append(
            [
                label,
                str(row["n"]),
                _spread(row["mean"]),
                _spread(row["end"]),
                "" if row["n"] == 1 else f"{row['end'][2]:.2f}",
                *["never" if s is None else f"{s:g}" for s in steps],
                f"{row['kl_end'][0]:.1f}",
                f"{row['penalised'][0]:.2f}",
                f"{row['precision_at_k'][0]:.2f}" if "precision_at_k" in row else "",
                f"{row['collapsed']}, {row['ran_away']}",
                _lead(row.get("lead")),
            ]
        )
    return _table(heads, body)


CLAIM_HEADS = ("claim", "here", "lead", "pairs ahead")


def _claim(found: dict[str, Any]) -> list[str]:
    lead, _, ahead = _lead(found["lead"]).partition(" (")
    return [found["claim"], f"**{found['verdict']}**", lead, ahead.removesuffix(")")]


def claims(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table with a row for each heading."""
    rows = [
        row
        for heading, group in found.items()
        for row in ([f"**{heading}**", "", "", ""], *[_claim(claim) for claim in group])
    ]
    return _table(CLAIM_HEADS, rows)


def in_short(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The table of docs/evidence.md, by the name of its marker."""
    by_text = {claim["claim"]: claim for group in found.values() for claim in group}
    return {IN_SHORT_TABLE: _table(CLAIM_HEADS, [_claim(by_text[text]) for text in IN_SHORT])}


def coverage(found: dict[str, list[int]]) -> str:
    return _table(["experiment", "cells run", "cells"], [[n, str(a), str(b)] for n, (a, b) in found.items()])


def testbed(found: dict[str, Any]) -> str:
    heads = ["models", "language model's loss", "reward model's held-out accuracy", "on the true order"]
    names = ("lm_loss", "accuracy", "true_accuracy")
    return _table(heads, [[name, *[f"{x[n]:.2f}" for n in names]] for name, x in found.items()])


def choices(found: dict[str, Any]) -> str:
    heads = [
        f"seeds {LR_SEEDS[0]} to {LR_SEEDS[-1]}",
        "true reward, mean",
        "score less KL penalty",
        "collapsed",
    ]
    rows = [
        [name, _spread(x["mean"]), _spread(x["penalised"]), str(x["collapsed"])] for name, x in found.items()
    ]
    return _table(heads, rows)


def reward_at_kl(rows: dict[str, Any]) -> str:
    heads = ["true reward when KL first reaches", *[f"{kl:g}" for kl in KL_MARKS]]
    body = [
        [label, *[_spread(row["reward_at_kl"].get(f"{kl:g}")) or "not by all" for kl in KL_MARKS]]
        for label, row in rows.items()
        if row["n"]
    ]
    return _table(heads, body)


def credit_and_speed(rows: dict[str, Any]) -> str:
    heads = ["40-60 tokens", "P@k during PPO", "entropy / uniform's", "lead over sparse (seeds ahead)"]
    body = [
        [
            label,
            _spread(row["precision_at_k"]),
            f"{row['entropy'][0]:.2f}" if "entropy" in row else "",
            _lead(row["lead"]),
        ]
        for label, row in rows.items()
    ]
    return _table(heads, body)


def without_the_truth(found: dict[str, Any]) -> str:
    heads = [
        f"last row of {found.get('models', 0)} reward models, 50 tokens",
        "rank correlation with P@k",
        "P@k of the worse half",
        "of the better half",
    ]
    labels = {"entropy": "low entropy", "overlap": "top tenth shared with gradient x value"}
    body = [
        [label, *[f"{found[name][x]:.2f}" for x in ("correlation", "below", "above")]]
        for name, label in labels.items()
        if name in found
    ]
    return _table(heads, body)


def paper_table(paper: dict[str, Any]) -> str:
    rows = [
        [length, method, f"{x['auc']:.2f} ± {x['two_se']:.2f}", f"{x['end_sd']:.2f}", f"{x['t8']:g}"]
        for length, methods in paper["methods"].items()
        for method, x in methods.items()
    ]
    heads = ["new tokens", "method", "reward, mean over steps", "sd over seeds, step 100", "steps to 8"]
    return _table(heads, rows)


def beside(rows: dict[str, Any], one_model: dict[str, Any], paper: dict[str, Any]) -> str:
    """ABC's lead over sparse by length: the paper's and this testbed's, each in its own unit."""
    body = []
    for length, lead in paper["lead_by_length"].items():
        row = rows.get(f"ABC, {length}", {})
        same = [one_model.get(f"{models}: ABC, {length}", {}) for models, _ in ONE_MODEL]
        cells = [row.get("lead"), row.get("lead_sd"), *[x.get("lead_sd") for x in same]]
        body.append([length, f"{lead:+.2f}", *[_lead(x) or "not run" for x in cells]])
    heads = ["new tokens", "the paper's lead", "here", "here, in initial sd"]
    return _table([*heads, *[f"the same, {models} models" for models, _ in ONE_MODEL]], body)


def spread(rows: dict[str, Any], paper: dict[str, Any]) -> str:
    """Standard deviation over seeds at the end: the paper's at step 100, here of the last 10 steps' mean."""
    body = []
    for length in paper["lead_by_length"]:
        theirs = [paper["methods"].get(length, {}).get(method, {}).get("end_sd") for method in MAIN]
        ours = [(rows.get(f"{method}, {length}", {}).get("end") or [None] * 3)[2] for method in MAIN]
        body.append([length, *["" if x is None else f"{x:.2f}" for x in (*theirs, *ours)]])
    return _table(["new tokens", *[f"the paper: {m}" for m in MAIN], *[f"here: {m}" for m in MAIN]], body)


def credit(groups: dict[str, Any], unit: str = "layer") -> str:
    """Precision at k by source and group of reward models; in brackets the rank correlations, signed and of
    sizes."""
    counts = sorted(groups, key=int)
    columns = [groups[n] for n in counts]
    heads = ["source", *[f"{n} {unit}{'s' * (n != '1')}" for n in counts]]
    if not columns:
        return _table(heads, [])
    rows = [["reward model's held-out accuracy", *[f"{x['accuracy']:.2f}" for x in columns]]]
    rows.append(["seeds", *[str(x["n"]) for x in columns]])
    rows.append(["chance", *[f"{x['chance']:.2f}" for x in columns]])
    for name in SOURCES:
        if not all(name in x["sources"] for x in columns):
            continue
        cells = []
        for x in columns:
            found = x["sources"][name]
            p, signed, size = (found[m][0] for m in ("precision_at_k", "signed", "absolute"))
            cells.append(f"{p:.2f} ({signed:+.2f}, {size:+.2f})")
        rows.append([name, *cells])
    return _table(heads, rows)
