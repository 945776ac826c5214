"""Where a reward model's text holds what the policy sampled: one response, or the turns of a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from attnshape.text.place import Messages, Place, place_of_reply
from attnshape.text.texts import decoded_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]


class Turn(NamedTuple):
    """A message of the policy's, and where the reward model reads it."""

    content: str
    place: Place


def spans_of(
    tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int], mask: Sequence[int | bool]
) -> tuple[str, list[Span]]:
    """The text of the policy's tokens, special ones left out, and the span of each in it.

    Spans of masked tokens, such as a tool's, are empty: these get no credit.
    """
    text, spans = decoded_spans(tokenizer, list(response_ids))
    return text, [(s, e) if m else (s, s) for (s, e), m in zip(spans, mask, strict=True)]


def turns_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    completion: Messages,
    text: str,
    options: Mapping[str, Any],
) -> list[Turn | None]:
    """The assistant's turns in ``completion``, in order; None for one that has no text.

    Args:
        tokenizer: the reward model's, whose template gives ``text`` for ``prompt`` and ``completion``.
        options: of the template.
    """
    messages = [*prompt, *completion]
    turns: list[Turn | None] = []
    for i in range(len(prompt), len(messages)):
        if messages[i].get("role") != "assistant":
            continue
        content = messages[i].get("content")
        if isinstance(content, str) and content.strip():
            turns.append(Turn(content, place_of_reply(messages, tokenizer, text, at=i, **options)))
        else:
            turns.append(None)
    return turns


def spans_in_text(
    turns: Sequence[Turn | None],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    mask: Sequence[int | bool],
) -> list[Span] | None:
    """Each of the policy's tokens in characters of what the reward model reads; None if none is found there.

    Empty for masked tokens, special ones and those that the template or the parser of the policy's reply
    dropped.

    Args:
        turns: of the assistant; if there are several, each is a run of unmasked tokens.
        tokenizer: the policy's.
        ids, mask: sampled by the policy, and which of them are its own.
    """
    ids = list(ids)
    runs = [(0, len(ids))] if len(turns) == 1 else list(_runs(mask))
    spans: list[Span] = [(0, 0)] * len(ids)
    for (first, last), turn in zip(runs, turns, strict=False):
        if turn is None:
            continue
        written, own = spans_of(tokenizer, ids[first:last], mask[first:last])
        # A parser of replies may keep a part of what was sampled: thoughts come first.
        part = turn.content if turn.content in written else turn.content.strip()
        if part not in written:
            continue
        shift = turn.content.index(part) - written.rindex(part)
        for i, (start, end) in enumerate(own, first):
            start, end = max(start + shift, 0), min(end + shift, len(turn.content))
            if start < end:
                spans[i] = turn.place.in_text(start, end)
    return spans if any(start < end for start, end in spans) else None


def _runs(mask: Sequence[int | bool]) -> Iterator[Span]:
    """Of unmasked tokens: where each begins and ends."""
    for own, group in itertools.groupby(enumerate(mask), key=lambda item: bool(item[1])):
        places = [i for i, _ in group]
        if own:
            yield places[0], places[-1] + 1
