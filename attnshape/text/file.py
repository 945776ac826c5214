"""Credit of every completion in a JSONL file, in batches: what ``attnshape credit`` runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attnshape.files import whole_file
from attnshape.tap import AttentionTap
from attnshape.text.html import PAGE_FOOT, CreditItem, credit_section, page_head
from attnshape.text.reader import Example, Reader, Scored, score_examples
from attnshape.text.score_fn import ScoreFn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Counts(NamedTuple):
    written: int
    skipped: int


class Line(NamedTuple):
    """A readable line of the file."""

    number: int
    keys: dict[str, Any]
    """What is passed on."""
    example: Example


def credit_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    target: Path,
    *,
    score_fn: ScoreFn,
    html: Path | None = None,
    batch_size: int = 16,
    layer: int = -1,
    on_skip: Callable[[int, str], None] = lambda line, reason: None,
    on_read: Callable[[int], None] = lambda size: None,
) -> Counts:
    """Writes one JSON object per readable line of ``source``, and the coloured page if ``html`` is given.

    A line is ``{"prompt": str, "response": str}``, read as one text, or ``{"messages": [...]}``, which ends
    with the assistant's and is rendered with the tokenizer's chat template (``scoring.Reader`` says how); an
    ``"id"`` is passed on. What is written holds ``line, id, score, tokens, offsets, credit`` and ``metrics``;
    ``tokens`` are slices of the response and ``offsets`` their characters in it. No file is held in memory,
    and the new ones appear only when complete.

    Args:
        batch_size: sequences per forward; 1 if there is no padding token.
        layer: the attention layer that is read.
        on_skip: called with the number of a line that cannot be read or scored, and the reason.
        on_read: called with the number of bytes of ``source`` that were read.
    """
    score_fn.check(model.config.num_labels)
    reader = Reader(tokenizer, model.config)
    written = skipped = 0

    def skip(line: int, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        on_skip(line, reason)

    with ExitStack() as stack:
        lines = stack.enter_context(source.open("rb"))
        out = stack.enter_context(whole_file(target))
        page = stack.enter_context(whole_file(html)) if html else None
        tap = stack.enter_context(AttentionTap(model, layer))
        if page:
            page.write(page_head(f"Credit of {source.name}"))
        readable = _lines(lines, reader, skip, on_read)
        while batch := list(itertools.islice(readable, batch_size if reader.pads else 1)):
            examples = [line.example for line in batch]
            for line, scored in zip(batch, score_examples(model, tap, examples, score_fn), strict=True):
                if not scored.finite:
                    skip(line.number, "the model's score or attention is not finite")
                    continue
                written += 1
                out.write(json.dumps(_row(line, scored), ensure_ascii=False) + "\n")
                if page:
                    page.write(credit_section(line.number, _item(line.example, scored)))
        if page:
            page.write(PAGE_FOOT)
    return Counts(written, skipped)


def _lines(
    lines: Iterable[bytes],
    reader: Reader,
    skip: Callable[[int, str], None],
    on_read: Callable[[int], None],
) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        on_read(len(line))
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            if not isinstance(record, dict):
                raise ValueError(f"want a JSON object, got {type(record).__name__}")
            keys = {"id": record["id"]} if "id" in record else {}
            yield Line(number, keys, _read(record, reader))
        except (ValueError, RecursionError) as error:
            skip(number, str(error))


def _read(record: dict[str, Any], reader: Reader) -> Example:
    """Raises ValueError if the record is not one that can be scored."""
    if "messages" in record:
        return reader.read_messages(record["messages"])
    return reader.read(_text(record, "prompt"), _text(record, "response"))


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str):
        raise ValueError(f'"{name}" must be a string, got {json.dumps(record.get(name))[:40]}')
    text: str = record[name]
    return text


def _row(line: Line, scored: Scored) -> dict[str, Any]:
    example = line.example
    return {
        "line": line.number,
        **line.keys,
        "score": scored.score,
        "tokens": [example.response[start:end] for start, end in example.offsets],
        "offsets": example.offsets,
        "credit": scored.credit,
        "metrics": scored.metrics,
    }


def _item(example: Example, scored: Scored) -> CreditItem:
    """Pieces that tile the response: text without a token joins the next, a shared character is one."""
    tokens: list[str] = []
    credit: list[float] = []
    shown = 0
    for (_, end), c in zip(example.offsets, scored.credit, strict=True):
        if end > shown:
            tokens.append(example.response[shown:end])
            credit.append(c)
            shown = end
        else:
            credit[-1] += c
    note = "no attention on the response: all credit on its last token" if scored.metrics["fallback"] else ""
    return CreditItem(example.prompt, tokens, credit, scored.score, note)
