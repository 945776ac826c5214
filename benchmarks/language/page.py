"""The tables of the study's page, from the summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.language.cells import CELLS, DENSE_SHARE, LAM, SCRATCH, TUNED
from benchmarks.language.rewards import study_models
from benchmarks.language.summary import AS_GOOD, RULES, Estimate, setting_of

CLAIMED = {
    "relevance a third up, signed": "relevance, signed",
    "leave-one-out, signed": "signed leave-one-out",
    "value-weighted last row, signed": "the value-weighted last row, signed",
    "gradient x value, signed": "gradient × value, signed",
    "ABC": "attention credit (ABC)",
}
KINDS = {setting_of(TUNED[0]): "encoder", setting_of(SCRATCH[0]): "from scratch"}
"""Of the reward models that runs learn from, in words."""
LOOPS = {("grpo", LAM): "GRPO", ("ppo", LAM): "PPO at `lam` 1", ("ppo", 0.95): "PPO at `lam` .95"}
HERE = {"faster": "holds", "slower": "fails", "no difference shown": "not shown", "too few": "too few runs"}
MEASURES = {"roc": "ROC", "roc_matched": "matched", "signed": "sign", "fell": "fall"}
SHOWN = (
    "leave-one-out",
    "integrated gradients",
    "last row",
    "row below the last",
    "mean over layers",
    "plain rollout",
    "norm-weighted rollout",
    "value-weighted last row",
    "gradient x value",
    "gradient x embedding",
    "relevance",
    "relevance a third up",
    "signed rollout",
    "incremental",
    "lexicon",
    "rarity",
    "random",
)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows or len(head) == 1:
        return "Not run yet."
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: Estimate | None) -> str:
    return "" if found is None else str(found)


def claims(summary: dict[str, Any]) -> str:
    """Who learns faster with which source, at the study's own dense share, by the gold judge."""
    found = {_key(row): row for row in summary["gold"]}
    rows = []
    for (loop, lam), name in LOOPS.items():
        for source, words in CLAIMED.items():
            claim = f"{name} learns faster with {words}"
            for setting, kind in KINDS.items():
                row = found.get((loop, lam, setting, source, DENSE_SHARE))
                if row is not None:
                    lead = f"{row['lead'].mean:+.2f}{_error(row['lead'], 2)}"
                    pairs = f"{row['ahead']} of {row['pairs']}"
                    rows.append([claim, kind, f"**{HERE[row['verdict']]}**", lead, pairs])
                    claim = ""
    return _table(["claim", "reward model", "here", "lead by the gold judge", "pairs ahead"], rows)


def accuracy(summary: dict[str, Any]) -> str:
    """How well the reward models learned."""
    names = {
        "test_sentences_accuracy": "treebank, accuracy",
        "test_sentences_pairs": "treebank, pairs",
        "held_out_windows_pairs": "windows, pairs",
        "held_out_reviews_pairs": "150 words of reviews, pairs",
    }
    rows = [
        [setting, str(next(iter(found.values())).n), *(_cell(found.get(m)) for m in names)]
        for setting, found in summary["accuracy"].items()
    ]
    return _table(["reward model", "trainings", *names.values()], rows)


def _main(summary: dict[str, Any]) -> list[str]:
    """The settings whose models RL uses; all of a study without those."""
    used = {setting_of(name) for name in (*SCRATCH, *TUNED)}
    return [s for s in summary["credit"] if s in used] or list(summary["credit"])


def credit(summary: dict[str, Any]) -> str:
    """Sources against people's labels: ROC, correlation of signs, and the fall of the score."""
    settings = _main(summary)
    rows = []
    for source in SHOWN:
        row = [source]
        for setting in settings:
            found = summary["credit"][setting].get(source)
            row.append(" / ".join(_cell(found.get(m)) or "–" for m in MEASURES) if found else "")
        rows.append(row)
    counts = [summary["credit"][s]["last row"]["roc"].n for s in settings]
    return _table(["source", *(f"{s} ({n})" for s, n in zip(settings, counts, strict=True))], rows)


def every_setting(summary: dict[str, Any]) -> str:
    """ROC among words as rare, correlation of signs with people's, and of sizes with leave-one-out's."""
    settings = summary["credit"]
    rows = []
    for source in SHOWN:
        row = [source]
        for setting in settings:
            found = settings[setting].get(source, {})
            numbers = [found.get(m) for m in ("roc_matched", "signed", "with_leave_one_out")]
            row.append(" / ".join("–" if x is None else f"{x.mean:.2f}" for x in numbers) if found else "")
        rows.append(row)
    heads = [f"{s.replace('_', ' ')} ({settings[s]['last row']['roc'].n})" for s in settings]
    return _table(["source", *heads], rows)


def signs(summary: dict[str, Any]) -> str:
    """Share of short polar phrases whose summed weight has the label's sign: all, and those turned around."""
    settings = _main(summary)
    rows = []
    for source in SHOWN:
        found = [summary["credit"][setting].get(source, {}) for setting in settings]
        if any("phrase_sign" in x for x in found):
            cells = [f"{_cell(x.get('phrase_sign'))} / {_cell(x.get('negated_sign'))}" for x in found]
            rows.append([source, *cells])
    return _table(["source", *settings], rows)


def state(summary: dict[str, Any]) -> str:
    """How much of the study has been run."""
    reward_models = len(study_models())
    rows = [
        ["reward models trained", summary["trained"], reward_models],
        ["reward models whose credit was measured", summary["measured"], reward_models],
        ["PPO and group runs", summary["runs"], len(CELLS)],
    ]
    return _table(["", "done", "of"], [[str(x) for x in row] for row in rows])


def rules(summary: dict[str, Any]) -> str:
    """Share of the best source's lift that each rule's choice has, and what was chosen where that differs."""
    rows = []
    for setting, found in summary["rules"].items():
        row = [setting]
        for name in RULES:
            share, picked = found[name]["share"], found[name]["picked"]
            holds = "**" if share.mean >= AS_GOOD else ""
            chose = "" if name.startswith("always") else f" ({', '.join(picked)})"
            row.append(f"{holds}{share.mean:.2f}{_error(share, 2)}{holds}{chose}")
        rows.append(row)
    return _table(["reward model", *RULES], rows)


def leads(summary: dict[str, Any]) -> str:
    """Every source against the plain estimator, by the gold judge and by the reward model itself."""
    own = {_key(row): row for row in summary["score"]}
    rows = []
    for row in summary["gold"]:
        score = own[_key(row)]
        share = "" if row["dense_share"] is None else f"{row['dense_share']:g}"
        lam = f"{row['lam']:g}" if row["loop"] == "ppo" else ""
        rows.append(
            [
                f"{row['loop']}, {row['reward_model']}",
                lam,
                f"{row['source']}",
                share,
                f"{row['lead'].mean:+.3f}{_error(row['lead'])}",
                f"{row['ahead']} of {row['pairs']}",
                f"**{row['verdict']}**",
                _lead(score),
            ]
        )
    head = [
        "loop, reward model",
        "lam",
        "source",
        "dense share",
        "gold lead",
        "ahead",
        "",
        "own score's lead",
    ]
    return _table(head, rows)


def at_equal_kl(summary: dict[str, Any]) -> str:
    """The gold judge's lead where both runs of a pair first reach a KL."""
    marks = list(summary["gold_at_kl"])
    at = {mark: {_key(row): row for row in summary["gold_at_kl"][mark]} for mark in marks}
    rows = []
    for row in summary["gold"]:
        if row["dense_share"] not in (None, DENSE_SHARE) or row["lam"] != LAM:
            continue
        cells = [at[mark].get(_key(row)) for mark in marks]
        rows.append([f"{row['loop']}, {row['reward_model']}", row["source"], *(_lead(x) for x in cells)])
    return _table(["loop, reward model", "source", *(f"KL {mark}" for mark in marks)], rows)


def _lead(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['lead'].mean:+.3f}{_error(row['lead'])} ({row['ahead']} of {row['pairs']})"


def _error(found: Estimate, digits: int = 3) -> str:
    return "" if found.two_se is None else f" ± {found.two_se:.{digits}f}"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("loop", "lam", "reward_model", "source", "dense_share"))


def tables(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "claims": claims(summary),
        "state": state(summary),
        "accuracy": accuracy(summary),
        "credit": credit(summary),
        "every setting": every_setting(summary),
        "signs": signs(summary),
        "rules": rules(summary),
        "leads": leads(summary),
        "at equal KL": at_equal_kl(summary),
    }
