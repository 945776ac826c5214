"""Tables of what the parts found, written anew whenever one has ended: ``summary.md`` and ``summary.json``.

Both are made to be committed as they are, in a folder named after the card. No torch: whoever watches
imports it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ENOUGH = 0.02
"""Share of its time that another constant must save before it is worth a change."""


def write_summary(out: Path, lines: Sequence[Line]) -> None:
    found = summary_of(lines)
    (out / "summary.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    (out / "summary.md").write_text(markdown(found))


def summary_of(lines: Sequence[Line]) -> dict[str, Any]:
    machine = next((x for x in lines if x.get("item") == "machine"), {})
    return {
        "machine": {name: x for name, x in machine.items() if name not in ("part", "item", "status", "at")},
        "bandwidth": {x["item"]: x["bytes_per_s"] for x in lines if "bytes_per_s" in x},
        "launch": next(
            ({n: x[n] for n in ("launch_seconds", "host_seconds")} for x in lines if "launch_seconds" in x),
            {},
        ),
        "parts": [
            {n: x.get(n) for n in ("part", "ended", "seconds", "limit")} for x in lines if "ended" in x
        ],
        "compiled": [x for x in lines if "compiled" in x],
        "bad": [x for x in lines if x.get("status") in ("wrong", "failed", "hung", "died", "out of time")],
        "skipped": [
            {n: x.get(n) for n in ("part", "item", "error")} for x in lines if x.get("status") == "skipped"
        ],
        "counts": counts(lines),
        "budgets": [x for x in lines if x["part"] == "budgets" and "us" in x],
        "launches": [x for x in lines if x["part"] == "budgets" and "launches" in x],
        "tuned": tuned([x for x in lines if x["part"] == "tuning" and "constants" in x]),
        "tests": [x for x in lines if x["part"] == "tests" and "tests" in x],
        "more": [x for x in lines if x["part"].startswith("more") and "what" in x],
    }


def counts(lines: Iterable[Line]) -> dict[str, dict[str, int]]:
    """By part, how many items ended how."""
    found: dict[str, dict[str, int]] = {}
    for line in lines:
        if "item" in line and "status" in line:
            of_part = found.setdefault(line["part"], {})
            of_part[line["status"]] = of_part.get(line["status"], 0) + 1
    return found


# Which constants are best


def tuned(lines: Sequence[Line]) -> list[dict[str, Any]]:
    rounds: dict[str, list[Line]] = {}
    for line in lines:
        rounds.setdefault(line["round"], []).append(line)
    return [round_of(name, of_round) for name, of_round in rounds.items()]


def round_of(name: str, lines: Sequence[Line]) -> dict[str, Any]:
    """Settings by what they lose, over the cases that all of them were timed on.

    The first that was tried is what stands in the sources.
    """
    times: dict[str, dict[str, float]] = {}
    constants: dict[str, Any] = {}
    for line in lines:
        setting = json.dumps(line["constants"])
        constants[setting] = line["constants"]
        if "us" in line:
            times.setdefault(setting, {})[line["case"]] = line["us"]["value"]
    if not times:
        return {"round": name, "settings": []}
    most = max(map(len, times.values()))
    whole = {setting: by_case for setting, by_case in times.items() if len(by_case) == most}
    cases = list(next(iter(whole.values())))
    best = {case: min(x[case] for x in whole.values() if case in x) for case in cases}
    rows = []
    for setting, by_case in whole.items():
        losses = [by_case[case] / best[case] for case in cases if case in by_case]
        loss = math.exp(sum(map(math.log, losses)) / len(losses))
        rows.append({"constants": constants[setting], "loss": loss, "us": by_case})
    now = json.dumps(lines[0]["constants"])
    standing = next((x for x in rows if json.dumps(x["constants"]) == now), None)
    rows.sort(key=lambda row: row["loss"])
    return {"round": name, "cases": cases, "settings": rows, "now": standing}


def to_commit(tuned: Sequence[dict[str, Any]]) -> list[str]:
    """The lines that should stand in the sources, where another constant is better by more than noise."""
    found = []
    for each in tuned:
        if not each["settings"]:
            continue
        if each["round"] == "one launch":
            found.append(threshold(each))
        elif each["round"] == "steps":
            found.append(steps(each))
        else:
            best, now = each["settings"][0], each["now"]
            if now is None or best["loss"] < now["loss"] * (1 - ENOUGH):
                found += [
                    assignment(name, x)
                    for name, x in best["constants"].items()
                    if now is None or now["constants"][name] != x
                ]
            else:
                found.append(f"# {each['round']}: what stands there is best, or within {ENOUGH:.0%} of it")
    return found


def assignment(name: str, x: Any) -> str:
    module, _, constant = name.rpartition(".")
    return f"csrc_triton/host/{module}.py: {constant} = {x}"


def ways(each: dict[str, Any], name: str) -> dict[Any, dict[str, float]]:
    return {row["constants"][name]: row["us"] for row in each["settings"]}


def threshold(each: dict[str, Any]) -> str:
    """The longest response for which one launch is the faster, at every batch that was tried."""
    by_way = ways(each, "attention.ONE_LAUNCH")
    if len(by_way) < 2:
        return "# one launch: one of the two ways was not timed"
    one, two = by_way[max(by_way)], by_way[min(by_way)]
    width_of = {case: int(case.split(" R ")[1].split(",")[0]) for case in one if case in two}
    faster = 0
    for width in sorted(set(width_of.values())):
        if any(one[case] > two[case] for case in width_of if width_of[case] == width):
            break
        faster = width
    return assignment("attention.ONE_LAUNCH", faster)


def steps(each: dict[str, Any]) -> str:
    """What the choice between the two ways loses, against the better one of each case."""
    by_way = ways(each, "rewards.in_chunks")
    if len(by_way) < 3:
        return "# steps: one of the ways was not timed"
    lost = {
        case: us / min(way[case] for way in by_way.values() if case in way) - 1
        for case, us in by_way["in_chunks"].items()
    }
    worst = max(lost, key=lambda case: lost[case])
    average = sum(lost.values()) / len(lost)
    return f"# steps: what stands there loses {average:.1%} on average, most at {worst}: {lost[worst]:.0%}"


# To be read


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += [f"| {' | '.join(str(x).replace('|', '/') for x in row)} |" for row in rows]
    return [*lines, ""]


def short(text: Any, most: int = 300) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"...{text[-most:]}"


def us(x: Line) -> str:
    return f"{x['value']:.1f} ({x['low']:.1f} to {x['high']:.1f})"


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {x}" for name, x in machine.get("versions", {}).items())
    copies = {name: f"{x / 1e12:.2f} TB/s" for name, x in found["bandwidth"].items()}
    lines = [f"# {machine.get('device', 'A GPU that did not say its name')}", ""]
    lines += [f"{versions}; Python {machine.get('python')}; driver and clocks {machine.get('smi')}.", ""]
    lines += [f"Commit {machine.get('commit') or 'not known'}, kernels {machine.get('source')}.", ""]
    lines += ["; ".join(f"{name} {x}" for name, x in copies.items()) + ".", ""]
    if found["launch"]:
        launch = found["launch"]
        lines += [
            f"A launch takes {launch['launch_seconds'] * 1e6:.1f} us in a graph, "
            f"its thread {launch['host_seconds'] * 1e6:.1f} us.",
            "",
        ]
    statuses = ("ok", "wrong", "failed", "hung", "died", "refused", "skipped", "out of time")
    rows = []
    for part in found["parts"]:
        of_part = found["counts"].get(part["part"], {})
        seconds = "" if part["seconds"] is None else f"{part['seconds']} of {part['limit']:g}"
        rows.append([part["part"], part["ended"], seconds, *(of_part.get(x, "") for x in statuses)])
    lines += table(["part", "ended", "seconds", *statuses], rows)
    for x in found["compiled"]:
        lines += [
            f"Compiled ahead: {x['compiled']} specialisations in {x['seconds']} s "
            f"({x['cpu_seconds']} of a CPU); errors: {short(x['errors'])}.",
            "",
        ]
    lines += bad_lines(found)
    lines += budget_lines(found)
    lines += tuning_lines(found)
    if found["tests"]:
        lines += ["## Tests", ""]
        lines += table(
            ["shard", "tests", "failures", "errors", "skipped"],
            ([x["item"], x["tests"], x["failures"], x["errors"], x["skipped"]] for x in found["tests"]),
        )
    if found["more"]:
        lines += ["## More", ""]
        lines += table(
            ["what", "status", "seconds", "said"],
            ([x["what"], x["status"], x.get("seconds", ""), short(x.get("said", ""))] for x in found["more"]),
        )
    return "\n".join(lines) + "\n"


def bad_lines(found: dict[str, Any]) -> list[str]:
    lines = ["## What is wrong", ""]
    if not found["bad"]:
        lines += ["Nothing that was asked.", ""]
    else:
        rows = []
        for x in found["bad"]:
            launch = x.get("launch", {})
            rows.append(
                [
                    x["part"],
                    x.get("item", ""),
                    x["status"],
                    launch.get("tag", ""),
                    launch.get("programs", ""),
                    short(x.get("error", "")),
                ]
            )
        lines += table(["part", "item", "how", "kernel", "programs", "error"], rows)
        lines += ["The arguments of each launch stand in `results.jsonl`.", ""]
    if found["skipped"]:
        why: dict[tuple[str, str], list[str]] = {}
        for x in found["skipped"]:
            why.setdefault((x["part"], short(x["error"])), []).append(str(x["item"]))
        lines += ["## Not asked", ""]
        lines += table(
            ["part", "because", "items", "first"],
            ([part, error, len(names), names[0]] for (part, error), names in why.items()),
        )
    return lines


def budget_lines(found: dict[str, Any]) -> list[str]:
    if not found["budgets"]:
        return []
    caption = "Medians, with the 10th and 90th percentile; inputs several times the cache."
    return ["## Budgets", "", caption, "", *budget_table(found)]


def budget_table(found: dict[str, Any]) -> list[str]:
    """Each call beside a copy of its bytes, and what its budget is."""
    launches = {x["case"]: (len(x["launches"]), x["as_promised"]) for x in found["launches"]}
    rows = []
    for x in found["budgets"]:
        share = x.get("share_of_copy")
        count, promised = launches.get(x["case"], ("", True))
        met = {None: "", True: "met", False: "missed"}[x["met"]]
        limit = "" if x["budget_us"] is None else f"{x['budget_us']:.1f}"
        rows.append(
            [
                x["case"],
                us(x["us"]),
                "" if share is None else f"{share['value']:.0%}",
                "" if "read_us" not in x else f"{x['read_us']['value'] / x['us']['value']:.0%}",
                x["budget"],
                limit,
                met,
                count if promised else f"{count}, not as promised",
            ]
        )
    headings = ["case", "us", "of a copy", "of a read", "budget", "us", "", "launches"]
    return table(headings, rows)


def tuning_lines(found: dict[str, Any]) -> list[str]:
    if not found["tuned"]:
        return []
    lines = ["## Constants to commit", "", "```", *to_commit(found["tuned"]), "```", ""]
    lines += ["How much longer a setting takes than the best of each case, on average.", ""]
    rows = []
    for each in found["tuned"]:
        for row in each["settings"][:3]:
            rows.append(
                [
                    each["round"],
                    ", ".join(f"{name} {x}" for name, x in row["constants"].items()),
                    f"{row['loss'] - 1:.1%}",
                ]
            )
        if each.get("now") is not None:
            now = each["now"]
            rows.append(
                [
                    each["round"],
                    "as it stands: " + ", ".join(f"{name} {x}" for name, x in now["constants"].items()),
                    f"{now['loss'] - 1:.1%}",
                ]
            )
    return lines + table(["round", "constants", "longer by"], rows)
