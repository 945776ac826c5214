"""Credit of every completion in a JSONL file, in batches: what ``attnshape credit`` runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TextIO

from attnshape.files import kept_file
from attnshape.text.html import PAGE_FOOT, CreditItem, View, credit_section, page_head
from attnshape.text.model import NOT_FINITE, CreditModel, Scored
from attnshape.text.partial import Partial
from attnshape.text.reader import Example, Reader
from attnshape.text.source import CreditSource

BLOCK_BATCHES = 16
"""Of a block of lines, beyond which no batch reaches: blocks are credited apart with the same bits."""


class Counts(NamedTuple):
    written: int
    skipped: int
    changed: int
    """Of those written, how many responses the chat template changed."""


class Line(NamedTuple):
    """A readable line of the file."""

    number: int
    keys: dict[str, Any]
    """What is passed on."""
    example: Example


class Credited(NamedTuple):
    """What is written at once: of a batch, or of more."""

    rows: str
    sections: str
    """Of the page, if there is one."""
    written: int
    changed: int
    skipped: list[tuple[int, str]]
    """Number of each line that cannot be read or scored, and the reason."""
    size: int
    """In bytes, of what was read."""

    @classmethod
    def joined(cls, parts: Sequence[Credited]) -> Credited:
        """One after another."""
        return cls(
            "".join(part.rows for part in parts),
            "".join(part.sections for part in parts),
            sum(part.written for part in parts),
            sum(part.changed for part in parts),
            [line for part in parts for line in part.skipped],
            sum(part.size for part in parts),
        )


def credited(
    model: CreditModel,
    lines: Iterable[bytes],
    *,
    first: int = 1,
    with_page: bool = False,
    beside: Sequence[CreditSource] = (),
    batch_size: int = 16,
    done: Iterable[int] = (),
) -> Iterator[Credited]:
    """One JSON object per readable line, and its section of the coloured page, batch by batch.

    A line is ``{"prompt": str, "response": str}``, read as one text, or ``{"messages": [...]}``, which ends
    with the assistant's and is rendered with the tokenizer's chat template (``Reader`` says how); an ``"id"``
    is passed on. What is written holds ``line, id, score, tokens, offsets, credit`` and ``metrics``;
    ``tokens`` are slices of the response and ``offsets`` their characters in it. A source with signs gives
    ``token_rewards``, and null as ``credit``. No more than a batch is held in memory.

    Args:
        first: the number of the first line.
        beside: other sources that the page shows too, where they have an answer.
        batch_size: sequences per forward.
        done: the numbers of lines that are passed over, in order.
    """
    skipped: list[tuple[int, str]] = []
    size = 0

    def skip(line: int, reason: str) -> None:
        skipped.append((line, reason))

    def count(read: int) -> None:
        nonlocal size
        size += read

    ahead = readable(lines, model.reader(), iter(done), skip, count, first)
    for _, block in itertools.groupby(ahead, lambda line: block_of(line.number, batch_size)):
        while batch := list(itertools.islice(block, batch_size)):
            examples = [line.example for line in batch]
            others = {str(source): model.score_each(examples, source) for source in beside if with_page}
            rows, sections, changed = [], [], 0
            for i, (line, scored) in enumerate(zip(batch, model.score_each(examples), strict=True)):
                if isinstance(scored, str) or not scored.finite:
                    skip(line.number, scored if isinstance(scored, str) else NOT_FINITE)
                    continue
                rows.append(json.dumps(_row(line, scored), ensure_ascii=False) + "\n")
                changed += line.example.changed
                if with_page:
                    views = {str(model.source): scored}
                    for name, answers in others.items():
                        if not isinstance(other := answers[i], str) and other.finite:
                            views[name] = other
                    sections.append(credit_section(line.number, page_item(line.example, views)))
            yield Credited("".join(rows), "".join(sections), len(rows), changed, skipped, size)
            skipped, size = [], 0
    if skipped or size:
        yield Credited("", "", 0, 0, skipped, size)


def block_of(line: int, batch_size: int) -> int:
    """The number of a line's block."""
    return (line - 1) // (BLOCK_BATCHES * batch_size)


def write(
    found: Iterable[Credited],
    out: TextIO,
    page: TextIO | None = None,
    *,
    title: str = "",
    on_skip: Callable[[int, str], None] = lambda line, reason: None,
    on_read: Callable[[int], None] = lambda size: None,
) -> Counts:
    """Writes what was found, each in whole before the next is asked for.

    Args:
        title: of the page.
        on_skip: called with the number of a line that cannot be read or scored, and the reason.
        on_read: called with the number of bytes that were read.
    """
    written = skipped = changed = 0
    if page is not None and not page.tell():
        page.write(page_head(title))
    for some in found:
        out.write(some.rows)
        out.flush()
        if page is not None:
            page.write(some.sections)
            page.flush()
        for line, reason in some.skipped:
            on_skip(line, reason)
        on_read(some.size)
        written += some.written
        skipped += len(some.skipped)
        changed += some.changed
    if page is not None:
        page.write(PAGE_FOOT)
    return Counts(written, skipped, changed)


def write_files(found: Iterable[Credited], partial: Partial, **options: Any) -> Counts:
    """``write`` into the files of ``partial``, which take their names when complete.

    If it is interrupted they stay under the names that they have till then.
    """
    with ExitStack() as files:
        out = files.enter_context(kept_file(partial.target, partial.path))
        page = None
        if partial.html is not None and partial.page is not None:  # takes its name before the file
            page = files.enter_context(kept_file(partial.html, partial.page))
        return write(found, out, page, **options)


def readable(
    lines: Iterable[bytes],
    reader: Reader,
    done: Iterator[int],
    skip: Callable[[int, str], None],
    on_read: Callable[[int], None] = lambda size: None,
    first: int = 1,
) -> Iterator[Line]:
    """Those of the lines, numbered from ``first`` on, that can be read and are not done."""
    next_done = next(done, None)
    for number, line in enumerate(lines, first):
        on_read(len(line))
        if number == next_done:
            next_done = next(done, None)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            if not isinstance(record, dict):
                raise ValueError(f"want a JSON object, got {type(record).__name__}")
            keys = {"id": record["id"]} if "id" in record else {}
            _check_id(keys)
            yield Line(number, keys, reader.read_record(record))
        except (ValueError, RecursionError) as error:
            skip(number, " ".join(str(error).split()))


def _check_id(keys: dict[str, Any]) -> None:
    """Raises ValueError for what cannot be written as JSON in UTF-8."""
    try:
        json.dumps(keys, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f'"id" cannot be written again: {error}') from None


def _row(line: Line, scored: Scored) -> dict[str, Any]:
    example = line.example
    return {
        "line": line.number,
        **line.keys,
        "score": scored.score,
        "tokens": [example.response[start:end] for start, end in example.offsets],
        "offsets": example.offsets,
        **scored.values,
        "metrics": scored.metrics,
    }


def page_item(example: Example, views: Mapping[str, Scored]) -> CreditItem:
    """A completion as it is shown, by each source: pieces that tile the response.

    Text without a token joins the next, a shared character is one. Where the chat template changed the
    response, text without a token is what it dropped, and stands alone.
    """
    tokens: list[str] = []
    rewards: dict[str, list[float]] = {name: [] for name in views}
    columns = {name: scored.rewards for name, scored in views.items()}

    def add(start: int, end: int, at: int | None) -> None:
        tokens.append(example.response[start:end])
        for name, column in columns.items():
            rewards[name].append(0.0 if at is None else column[at])

    shown = 0
    for i, (start, end) in enumerate(example.offsets):
        if example.changed and start > shown:
            add(shown, start, None)
            shown = start
        if end > shown:
            add(shown, end, i)
            shown = end
        elif tokens:
            for name, column in columns.items():
                rewards[name][-1] += column[i]
    if example.changed and shown < len(example.response):
        add(shown, len(example.response), None)
    (first, *_) = views.values()
    notes = {
        "the chat template changed the response: what it dropped has no credit": first.metrics["changed"],
        "no attention on the response: all credit on its last token": first.metrics["fallback"],
    }
    shown_metrics = ("entropy", "response_attention")
    return CreditItem(
        example.prompt,
        tokens,
        first.score,
        [
            View(name, rewards[name], {m: scored.metrics[m] for m in shown_metrics if m in scored.metrics})
            for name, scored in views.items()
        ],
        "; ".join(text for text, holds in notes.items() if holds),
    )
