"""Where a reward model's text holds what the policy sampled: one response, or the turns of a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from attnshape.text.align import decoded_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
Messages: TypeAlias = Sequence[Mapping[str, Any]]
Render: TypeAlias = Callable[[Messages], str]
"""A conversation through the reward model's chat template, as the reward model reads it."""


class Turn(NamedTuple):
    """Characters that the policy wrote: ``text``, which the reward model reads from ``low`` to ``high``."""

    text: str
    low: int
    high: int


def spans_of(
    tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int], mask: Sequence[int | bool]
) -> tuple[str, list[Span]]:
    """The text of the policy's tokens, special ones left out, and the span of each in it.

    Spans of masked tokens, such as a tool's, are empty: these get no credit.
    """
    text, spans = decoded_spans(tokenizer, list(response_ids))
    return text, [(s, e) if m else (s, s) for (s, e), m in zip(spans, mask, strict=True)]


def turns_of(render: Render, prompt: Messages, completion: Messages, text: str) -> list[Turn | None]:
    """The assistant's turns in ``completion``, in order; None for one whose place in ``text`` is not sure.

    Args:
        render: gives ``text`` for ``prompt`` and ``completion``. It is called again with a marker in a turn's
            place: what stands before and after the marker is the template's.
    """
    messages = [*prompt, *completion]
    marker = next(m for n in itertools.count() if (m := f"Zq{n}Xj") not in text)
    turns: list[Turn | None] = []
    for i in range(len(prompt), len(messages)):
        content = messages[i].get("content")
        if messages[i].get("role") != "assistant":
            continue
        turns.append(None)
        if not isinstance(content, str):
            continue
        before, found, after = render(
            [*messages[:i], {**messages[i], "content": marker}, *messages[i + 1 :]]
        ).partition(marker)
        low, high = len(before), len(text) - len(after)
        if found and marker not in after and low <= high and text.startswith(before) and text.endswith(after):
            turns[-1] = Turn(content, low, high)
    return turns


def spans_in_text(
    text: str,
    turns: Sequence[Turn | None],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    mask: Sequence[int | bool],
) -> list[Span] | None:
    """Each of the policy's tokens in characters of ``text``; None if none of its turns is found there.

    Empty for masked tokens, special ones and those that the template or the parser of the policy's reply
    dropped.

    Args:
        turns: of the assistant; if there are several, each is a run of unmasked tokens.
        ids, mask: sampled by the policy, and which of them are its own.
    """
    ids = list(ids)
    runs = [(0, len(ids))] if len(turns) == 1 else list(_runs(mask))
    spans: list[Span] = [(0, 0)] * len(ids)
    found = False
    for (first, last), turn in zip(runs, turns, strict=False):
        if turn is None:
            continue
        written, own = spans_of(tokenizer, ids[first:last], mask[first:last])
        place = _place(text, turn, written)
        if place is None:
            continue
        found = True
        at, low, size = place
        for i, (start, end) in enumerate(own, first):
            start, end = max(start - at, 0), min(end - at, size)
            spans[i] = (low + start, low + end) if start < end else (0, 0)
    return spans if found else None


def _place(text: str, turn: Turn, written: str) -> tuple[int, int, int] | None:
    """Where ``written`` and ``text`` share the turn: a character of each, and how many follow."""
    read = text[turn.low : turn.high]
    for part in (read, read.strip()):
        # What the reader sees is a part of the message, and that of what was sampled: thoughts come first.
        if part and part in turn.text and part in written:
            return written.rindex(part), turn.low + read.index(part), len(part)
    return None


def _runs(mask: Sequence[int | bool]) -> Iterator[Span]:
    """Of unmasked tokens: where each begins and ends."""
    for own, group in itertools.groupby(enumerate(mask), key=lambda item: bool(item[1])):
        places = [i for i, _ in group]
        if own:
            yield places[0], places[-1] + 1
