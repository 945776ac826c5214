"""What ``attnshape audit`` prints and writes."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attnshape.cli.base import errors, progress_bar, standard
from attnshape.files import whole_file
from attnshape.text.audit import SOURCES, Audit, SourceAudit, audit, disputed_items
from attnshape.text.file import readable
from attnshape.text.html import PAGE_FOOT, credit_section, page_head
from attnshape.text.load import RewardModelConfig
from attnshape.text.model import CreditModel

WIDTH = 120
"""Characters that both tables take."""


def audit_file(
    config: RewardModelConfig,
    completions: Path,
    device: str,
    names: Collection[str] | None,
    limit: int,
    span: int,
    batch_tokens: int,
    json_file: Path | None,
    html: Path | None,
) -> int:
    """Audits the first ``limit`` completions of a file; returns how many of them were left out."""
    skipped = 0

    def skip(number: int, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        errors.print(f"{completions}:{number}: skipped: {reason}")

    known = list(dict.fromkeys(source.name for source in SOURCES))
    for name in names or ():
        if name not in known:
            raise ValueError(f"--source: got {name!r}, want one of {', '.join(known)}")
    sources = [source for source in SOURCES if not names or source.name in names]
    model = CreditModel.load(config, device, batch_tokens)
    with contextlib.ExitStack() as stack:
        is_file = str(completions) != "-"
        lines = stack.enter_context(completions.open("rb")) if is_file else standard(sys.stdin).buffer
        rows = list(itertools.islice(readable(lines, model.reader(), iter(()), skip), limit))
    examples = [row.example for row in rows]
    with progress_bar() as progress:
        task = progress.add_task(completions.name, total=len(sources) + 3)
        found = audit(
            model,
            examples,
            sources=sources,
            span=span,
            on_step=lambda: progress.advance(task),
            on_skip=lambda i, reason: skip(rows[i].number, reason),
        )
    try:  # what was measured is in one of the two, if the disk is full or nobody reads on
        if json_file is not None:
            with whole_file(json_file) as out:
                out.write(json.dumps(found.to_json(), indent=1) + "\n")
    finally:
        _print(found)
    if html is not None:
        items = disputed_items(model, examples, found, sources, span)
        with whole_file(html) as out:
            out.write(page_head(f"Where sources disagree in {completions.name}", found.advice))
            for i, item in zip(found.disputed, items, strict=True):
                out.write(credit_section(rows[i].number, item))
            out.write(PAGE_FOOT)
    return skipped


def _print(found: Audit) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a file wraps nothing
        console.width = max(console.width, WIDTH)
    console.print(_table(found))
    for reason in dict.fromkeys(refused.reason for refused in found.refused):
        without = (refused.source for refused in found.refused if refused.reason == reason)
        console.print(f"without {', '.join(without)}: {reason}", soft_wrap=True, markup=False)
    console.print(_overlaps([found.ceiling, *found.sources]))
    console.print(found.advice, soft_wrap=True)


def _table(found: Audit) -> Table:
    shares = " ".join(f"{fraction:.0%}" for fraction in found.fractions)
    caption = (
        f"{found.completions} completions. moves: of the score against its verdict, when so many tokens are "
        "deleted; of leave-one-out: their mean as a share, random deletion taken off (± two standard "
        "errors); in: share of completions beyond random; entropy: 100% is even credit; attention: on the "
        "response; cost: time, in forwards. ±: a source with signs."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("source", overflow="fold")
    for heading in (f"moves at {shares}", "of leave-one-out", "in", "entropy", "attention", "cost"):
        table.add_column(heading, justify="right")
    table.add_row("random", _curve(found.random), "0", "", "", "", "")
    for row in (found.ceiling, *found.sources):
        attention = "" if row.response_attention is None else f"{row.response_attention:.0%}"
        table.add_row(
            f"{row.source} ±" if row.signed else row.source,
            _curve(row.curve),
            str(row.of_ceiling),
            f"{row.beyond_random:.0%}",
            f"{row.entropy:.0%}",
            attention,
            f"{row.cost:.1f}",
        )
    return table


def _curve(moves: Collection[float]) -> str:
    return " ".join(f"{move:.3g}" for move in moves)


def _overlaps(rows: Collection[SourceAudit]) -> Table:
    table = Table()
    table.add_column("overlap of the top tenth", overflow="fold")
    for number in range(1, len(rows) + 1):
        table.add_column(str(number))
    for number, row in enumerate(rows, 1):
        cells = ["" if other is row else f"{row.overlap[other.source]:.2f}" for other in rows]
        table.add_row(f"{number} {row.source}", *cells)
    return table
