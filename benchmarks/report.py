"""Tables, plots and the documentation's page on performance: ``python -m benchmarks.report [FILE ...]``.

Without a file: of every committed ``results/*/bench.json``, and the section of docs/performance.md is
written anew, with what ``make gpu`` left in ``results/*/summary.json``. With files: of those alone. Beside
each file it leaves ``report.md``, ``roofline.png``, ``peers.png`` and ``memory.png``, as far as there is
something to be drawn.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from attnshape.bench.machine import in_words
from attnshape.bench.measure import PLAIN, TORCH
from benchmarks.cases import FRESH
from benchmarks.on_gpu.summary import budget_table
from benchmarks.results import ROOT, Info, Run, cards, committed, load, ratio

PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- performance: written by python -m benchmarks.report -->"
END = "<!-- end of performance -->"
SUITES = {
    "fused": "`shape_rewards` on queries and keys",
    "stages": "Its stages, and in two calls (`apart`: credit, then sweep)",
    "recurrence": "Sweep and `gae`",
    "whitening": "Whitening",
    "columns": "Columns of the policy's own attention (ABC-D)",
}
COLORS = ("#30638e", "#d1495b", "#edae49", "#00798c", "#6a4c93", "#777777", "#8ac926", "#000000")
MARKERS = "osD^vPX*"


# Words and figures


def seconds_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def times_text(info: Info, name: str) -> str:
    """How many times as long the baseline takes, and in which range."""
    found = ratio(info, name)
    return "" if found is None else f"{found.value:.3g} x ({found.low:.3g} to {found.high:.3g})"


def budget_text(info: Info) -> str:
    if "budget" not in info:
        return ""
    return f"{info['budget']['text']}: {'met' if info['budget']['met'] else '**missed**'}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Nothing, if there are no rows."""
    rows = list(rows)
    if not rows:
        return []
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


# The report of one run


def report(run: Run) -> str:
    lines = [
        "# Measured",
        "",
        f"{run.path.name} of {run.date}, commit {commit_text(run)}: {in_words(run.machine)}.",
        "",
        "Medians over repeats in which every call of a line took its turn; in brackets the 10th and the 90th",
        "percentile. Each result was first checked against the float64 reference. The copy moves as many",
        "bytes on the same device in the same repeats. `x` says how many times as long the other takes.",
    ]
    sections = {title: case_table(run.suite(suite)) for suite, title in SUITES.items()}
    sections["Peers"] = [*peer_table(run), "", *(f"- missing: {x}, {why}" for x, why in run.missing.items())]
    sections["A reward model's forward"] = [*forward_table(run), "", *memory_table(run)]
    sections["What a call costs the host"] = host_table(run)
    sections["On a CPU: memory, and a machine that is busy"] = loops_table(run)
    for title, content in sections.items():
        if any(content):
            lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def commit_text(run: Run) -> str:
    return f"{(run.commit['id'] or 'unknown')[:12]}{' with changes' if run.commit['dirty'] else ''}"


def case_table(infos: Sequence[Info]) -> list[str]:
    names = (FRESH, PLAIN, TORCH, "attention forward")
    others = [name for name in names if any(ratio(x, name) for x in infos)]
    of_gpu = (
        ("wall_seconds", "read_seconds", "estimate_seconds") if "read_seconds" in (infos or [{}])[0] else ()
    )
    headings = ["call", "time", "bytes", "copy", "share of copy", *others]
    headings += ["full call", "read-only pass", "estimate"] if of_gpu else []
    rows = []
    for info in infos:
        share = info["ratios"]["copy"]
        row = [info["case"], seconds_text(info["seconds"])]
        row += [bytes_text(info["bytes_read"] + info["bytes_written"])]
        row += [seconds_text(info["seconds_of"]["copy"])]
        row += [f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"]
        row += [times_text(info, name) for name in others]
        row += [seconds_text(info[name]) for name in of_gpu]
        rows.append([*row, budget_text(info)])
    return table([*headings, "budget"], rows)


def peer_table(run: Run) -> list[str]:
    rows = []
    for info in run.suite("peers"):
        peer, of = info["peer"], info["seconds_of"]
        version = info["peer_version"] or peer
        times = [seconds_text(of["ours"]), seconds_text(of[peer]), times_text(info, peer)]
        rows.append([version, info["case"], *times, f"{info['disagreement']:.1e}", budget_text(info)])
    return table(["peer", "call", "ours", "theirs", "gain", "disagreement", "budget"], rows)


def forward_table(run: Run) -> list[str]:
    names = ("bare", "ours", "micro-batched", "eager")
    rows = []
    for info in run.suite("forward"):
        over, of = info["overhead"], info["seconds_of"]
        times = [seconds_text(of[name]) if name in of else "" for name in names]
        if info["out_of_memory"]:
            times[-1] = "out of memory"
        text = f"{over['value']:.4f} ({over['low']:.4f} to {over['high']:.4f})"
        rows.append([info["case"], *times, text, budget_text(info)])
    headings = ["", "bare", "tap and shaping", "micro-batched", "eager, as the paper", "over bare", "budget"]
    return table(headings, rows)


def memory_table(run: Run) -> list[str]:
    rows = []
    for info in run.suite("memory"):
        extra, held = info["extra_peak_bytes"], info["held_bytes"]
        cells = [bytes_text(x) for x in (info["bare_peak_bytes"], extra["shaped"])]
        for found, name in ((extra, "eager"), (held, "tapped"), (held, "eager_forward")):
            cells.append(bytes_text(found[name]) if name in found else "out of memory")
        rows.append([info["case"], *cells, times_text(info, "eager").split(" (")[0], budget_text(info)])
    headings = ["bytes at most", "bare", "more: tap and shaping", "more: eager"]
    headings += ["held until shaping: tap", "held: eager", "eager over tap", "budget"]
    return table(headings, rows)


def loops_table(run: Run) -> list[str]:
    rows = [[x["case"], x["measured"], budget_text(x)] for x in run.suite("loops")]
    return table(["", "measured", "budget"], rows)


def host_table(run: Run) -> list[str]:
    rows = [[x["case"], seconds_text(x["seconds"]), budget_text(x)] for x in run.suite("host")]
    return table(["call", "before it returns", "budget"], rows)


# Plots


def roofline(run: Run, axes: Axes) -> bool:
    """Achieved bandwidth beside the copy's, over the megabytes that are moved."""
    infos = run.suite(*SUITES)
    if not infos:
        return False
    size = [(info["bytes_read"] + info["bytes_written"]) / 1e6 for info in infos]
    copies = sorted((s, s / info["seconds_of"]["copy"] / 1e3) for s, info in zip(size, infos, strict=True))
    axes.plot(*zip(*copies, strict=True), "_", color="#555555", label="copy of as many bytes")
    whats = list(dict.fromkeys(info["what"] for info in infos))
    for i, what in enumerate(whats):
        points = [(s, s / x["seconds"] / 1e3) for s, x in zip(size, infos, strict=True) if x["what"] == what]
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(*zip(*sorted(points), strict=True), linestyle="", markersize=5, label=what, **style)
    axes.set(xscale="log", yscale="log", xlabel="MB read and written", ylabel="GB/s")
    axes.set_title("bandwidth beside a copy's")
    return True


def peers(run: Run, axes: Axes) -> bool:
    """Gain over each peer, over the tokens of a batch."""
    infos = run.suite("peers")
    if not infos:
        return False
    axes.axhline(1, color="#bbbbbb", linewidth=1)
    for i, peer in enumerate(dict.fromkeys(info["peer"] for info in infos)):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        for undiscounted in (False, True):
            found = [x for x in infos if x["peer"] == peer and ("lam 1.0" in x["case"]) == undiscounted]
            if not found:
                continue
            points = sorted((x["tokens"], x["ratios"][peer]["value"]) for x in found)
            label = None if undiscounted else infos_version(found)
            line = "--" if undiscounted else "-"
            axes.plot(*zip(*points, strict=True), line, label=label, linewidth=1.2, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the batch", ylabel="times as long as ours")
    axes.set_title("how long each peer takes (lam 0.95; dashed: lam 1)")
    return True


def infos_version(infos: Sequence[Info]) -> str:
    return str(infos[0]["peer_version"] or f"torch.compile, {infos[0]['peer']} scan")


def memory(run: Run, axes: Axes) -> bool:
    """Extra bytes of the tap and of eager attention, over the length of a sequence."""
    infos = sorted(run.suite("memory"), key=lambda x: x["keys"])
    if not infos:
        return False
    lines = {
        ("extra_peak_bytes", "eager"): ("eager with output_attentions, at most", COLORS[1], "-"),
        ("held_bytes", "eager_forward"): ("eager, held until shaping", COLORS[1], "--"),
        ("extra_peak_bytes", "shaped"): ("tap and shaping, at most", COLORS[0], "-"),
        ("held_bytes", "tapped"): ("tap, held until shaping", COLORS[0], "--"),
    }
    for (kind, name), (label, color, line) in lines.items():
        points = [(x["keys"], x[kind][name] / 1e6) for x in infos if name in x[kind]]
        if points:
            marker = "o" if line == "-" else "x"
            axes.plot(*zip(*points, strict=True), line, marker=marker, markersize=5, color=color, label=label)
    keys = [x["keys"] for x in infos]
    axes.set(xscale="log", yscale="log", xlabel="tokens of the sequence", ylabel="MB beyond the bare forward")
    axes.set_xticks(keys, [str(k) for k in keys])
    axes.minorticks_off()
    axes.set_title("memory of a reward model's forward")
    return True


PLOTS: dict[str, Callable[[Run, Axes], bool]] = {
    "roofline.png": roofline,
    "peers.png": peers,
    "memory.png": memory,
}
CAPTIONS = {
    "roofline.png": "Bandwidth of every call beside that of a copy of as many bytes",
    "peers.png": "How many times as long each peer takes, over the tokens of a batch",
    "memory.png": "Memory beyond a bare forward, of the tap and of eager attention, over the sequence length",
}


def draw(run: Run) -> list[str]:
    """Writes the plots that the run has figures for."""
    drawn = []
    for name, plot in PLOTS.items():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if not plot(run, axes):
            continue
        for axis in (axes.xaxis, axes.yaxis):  # 1000, not 10 to the third
            if not isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e4 else f"{x:,.0f}"))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(f"{run.machine['device']}, torch {run.machine['versions']['torch']}", fontsize=9)
        figure.savefig(run.path.with_name(name), dpi=150)
        drawn.append(name)
    return drawn


# The section of the page


def page_section(runs: Sequence[Run], cards: Sequence[Path] = ()) -> str:
    """What stands between the page's two marks; every figure from the file it names."""
    lines = [BEGIN, ""]
    for card in cards:
        lines += [*card_section(card), ""]
    if not runs:
        lines += ["No run has been committed yet: `make bench` measures on your machine.", ""]
    for run in runs:
        lines += [*machine_section(run), ""]
    return "\n".join([*lines, END])


def card_section(path: Path) -> Iterator[str]:
    """A GPU's budgets, as ``make gpu`` found them."""
    found = json.loads(path.read_text())
    machine, files = found["machine"], path.with_name("summary.md").relative_to(ROOT)
    versions = ", ".join(f"{name} {machine['versions'].get(name)}" for name in ("torch", "triton"))
    commit = machine["commit"][:10]
    yield f"From [`{files}`](../{files}) ({machine['device']}; {versions}; commit {commit})."
    yield "Each call is timed beside a copy that moves as many bytes, and a pass that only reads as many, in"
    yield "CUDA graphs, on inputs several times the cache; medians with the 10th and 90th percentile:"
    yield ""
    yield from budget_table(found)


def machine_section(run: Run) -> Iterator[str]:
    folder = f"../{run.path.parent.relative_to(ROOT)}"
    file = run.path.relative_to(ROOT)
    yield f"From [`{file}`](../{file}) of {run.date} ({in_words(run.machine)}; commit {commit_text(run)});"
    yield f"every figure in [`report.md`]({folder}/report.md):"
    yield ""
    yield from table(["budget", "measured", ""], budget_rows(run))
    yield ""
    yield from table(["peer", "times as long as ours", "at"], peer_rows(run))
    yield ""
    headings = ["call", "shapes", f"{PLAIN}, times as long", "share of a copy's bandwidth", f"of a {FRESH}'s"]
    yield from table(headings, call_rows(run))
    yield ""
    if run.missing:
        yield f"Missing: {'; '.join(f'{name} ({reason})' for name, reason in run.missing.items())}."
        yield ""
    for name in PLOTS:
        if (run.path.parent / name).exists():
            yield f"![{CAPTIONS[name]}]({folder}/{name})"


def budget_rows(run: Run) -> Iterator[list[str]]:
    for info in run.benchmarks.values():
        if "budget" not in info:
            continue
        budget = info["budget"]
        measured = f"{budget['value']:.4g} x"
        if budget["unit"] == "s":
            measured = f"{seconds_text(budget['value'])}, limit {seconds_text(budget['limit'])}"
        yield [f"{info['case']}: {budget['text']}", measured, "met" if budget["met"] else "**missed**"]


def call_rows(run: Run) -> Iterator[list[str]]:
    """Each call's least and greatest gain over plain PyTorch, and share of a copy, over its shapes."""
    infos = run.suite(*SUITES)
    for what in dict.fromkeys(info["what"] for info in infos):
        found = [info for info in infos if info["what"] == what]
        gains = sorted(x["ratios"][PLAIN]["value"] for x in found if PLAIN in x["ratios"])
        shares = sorted(x["ratios"]["copy"]["value"] for x in found)
        gain = f"{gains[0]:.3g} to {gains[-1]:.3g}" if gains else ""
        fresh = sorted(x["ratios"][FRESH]["value"] for x in found if FRESH in x["ratios"])
        of_fresh = f"{fresh[0]:.1%} to {fresh[-1]:.1%}" if fresh else ""
        yield [f"`{what}`", str(len(found)), gain, f"{shares[0]:.1%} to {shares[-1]:.1%}", of_fresh]


def peer_rows(run: Run) -> Iterator[list[str]]:
    """Each peer's least and greatest gain, and where."""
    infos = run.suite("peers")
    for peer in dict.fromkeys(info["peer"] for info in infos):
        found = sorted(
            (x for x in infos if x["peer"] == peer), key=lambda x: float(x["ratios"][peer]["value"])
        )
        ends = [found[0], found[-1]]
        gains = " to ".join(f"{x['ratios'][peer]['value']:.3g}" for x in ends)
        yield [infos_version(found), gains, " to ".join(x["case"] for x in ends)]


def write_page(section: str, page: Path = PAGE) -> None:
    """Raises:
    ValueError: the page lacks the marks.
    """
    text = page.read_text()
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"{page} has no section between {BEGIN!r} and {END!r}")
    page.write_text(marked.sub(lambda _: section, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results of make bench or make gpu")
    options = parser.parse_args()
    runs = [load(path) for path in options.files] or committed()
    for run in runs:
        run.path.with_name("report.md").write_text(report(run))
        print(f"{run.path.parent}: report.md, {', '.join(draw(run))}")
    if not options.files:
        write_page(page_section(runs, cards()))


if __name__ == "__main__":
    main()
