"""Where a chat template put a reply: derived from the template, never by a search alone."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, Any]]

MOST_COMPARISONS = 1_000_000
"""Of words with words where a template has changed a reply in its midst; more of it gets no credit."""
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")


class Block(NamedTuple):
    """Characters of the reply that stand in the text one after the other."""

    reply: int
    text: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where a text holds a reply, and which of its characters survived.

    ``text[low:high]`` is what became of the reply; ``blocks`` are in order in both.
    """

    low: int
    high: int
    blocks: tuple[Block, ...]
    changed: bool
    """Whether the text holds something else than the reply as it was given."""

    def in_text(self, start: int, end: int) -> tuple[int, int]:
        """Characters ``start`` to ``end`` of the reply: their span in the text."""
        # Of no width where none of them is there.
        return _carried([(b.reply, b.text, b.size) for b in self.blocks], start, end, self.low)

    def in_reply(self, start: int, end: int) -> tuple[int, int]:
        """The same from the text to the reply."""
        return _carried([(b.text, b.reply, b.size) for b in self.blocks], start, end, 0)


def _carried(blocks: Sequence[tuple[int, int, int]], start: int, end: int, first: int) -> tuple[int, int]:
    i = max(bisect_right(blocks, start, key=lambda block: block[0]) - 1, 0)
    place = None
    for here, there, size in blocks[i:]:
        if start >= here + size:
            first = there + size
            continue
        if end <= here:
            break
        low = there + max(start - here, 0)
        place = (low if place is None else place[0], there + min(end - here, size))
    return (first, first) if place is None else place


def whole(reply: str, low: int) -> Place:
    """Of a reply that stands in the text as it is."""
    return Place(low, low + len(reply), (Block(0, low, len(reply)),) if reply else (), changed=False)


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """A conversation through the tokenizer's chat template.

    Raises:
        ValueError: the template does not render it, or there is none.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the chat template fails: {' '.join(str(error).split())}") from error
    return text


def check_contents(messages: Messages, text: str) -> None:
    """Raises ValueError where ``text``, which the template made of them, has a content as Python writes it.

    A text model's template does so with a list of parts, as chat APIs have them.
    """
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | dict) and content and str(content) in text:
            raise ValueError(
                f"messages[{i}]: got a {type(content).__name__} as content, which the chat template writes "
                "as it is, brackets and all; want a string"
            )


def place_of_reply(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    reply: str | None = None,
    *,
    at: int | None = None,
    **options: Any,
) -> Place:
    """Where ``text``, which the template makes of ``messages``, holds the last message.

    The template is rendered once more with a marker in the reply's place: what is before and after the marker
    is the template's. Where it wrote the reply otherwise (stripped, cut, in other case), those characters
    are found that survived.

    Args:
        reply: what is looked for in the message's place, if not its content.
        at: of another message than the last.
        options: of the template, where ``text`` was made with some.
    """
    at = len(messages) - 1 if at is None else at
    content = str(messages[at]["content"])
    low, high = _region(messages, at, tokenizer, text, options)
    reply = content if reply is None else reply
    if text[low:high] == reply:
        return whole(reply, low)
    return Place(low, high, tuple(_surviving(reply, text, low, high)), changed=True)


def _region(
    messages: Messages, at: int, tokenizer: PreTrainedTokenizerBase, text: str, options: Mapping[str, Any]
) -> tuple[int, int]:
    """The part of ``text`` that the content of ``messages[at]`` decides."""
    seen = _folded(text)
    marker = next(m for n in itertools.count() if (m := f"Zq{n}Xj") not in text and m.casefold() not in seen)
    try:
        other = {**messages[at], "content": marker}
        marked = render([*messages[:at], other, *messages[at + 1 :]], tokenizer, **options)
    except ValueError:  # it takes this content and not another
        return len(text), len(text)
    around = _folded(marked).split(marker.casefold())
    copies = len(around) - 1
    ends = list(itertools.accumulate(len(part) for part in around))
    if copies:
        size, rest = divmod(len(text) - ends[-1], copies)
        low = ends[0]
        found = text[low : low + size]
        parts, start = [], 0
        for part in around:
            parts.append(marked[start : start + len(part)])
            start += len(part) + len(marker)
        if size >= 0 and not rest and text == found.join(parts):
            return low, low + size  # the first, where a template repeats the reply
    # The template's own text depends on the reply.
    low = _shared(text, marked)
    after = _shared(text[low:][::-1], marked[::-1])
    if copies:
        low, after = min(low, ends[0]), min(after, len(around[-1]))
    try:
        before = render(messages[:at], tokenizer, **{**options, "add_generation_prompt": True})
    except ValueError:
        before = text
    # What the template would have written itself may be how the reply begins: "<think>".
    shared = text[len(before) : low].strip()
    if text.startswith(before) and str(messages[-1]["content"]).lstrip().startswith(shared):
        low = min(low, len(before))
    return low, max(low, len(text) - after)


def _surviving(reply: str, text: str, low: int, high: int) -> list[Block]:
    """Characters of the reply that are in ``text[low:high]``, in order, in upper or lower case."""
    a, b = _folded(reply), _folded(text[low:high])
    i, j = len(a) - len(a.lstrip()), len(b) - len(b.lstrip())
    blocks = _matches(a[i:].rstrip(), b[j:].rstrip(), i, j)
    if not blocks:
        return []
    # Whitespace around it that is in both.
    first, last = blocks[0], blocks[-1]
    before = _shared(a[: first.reply][::-1], b[: first.text][::-1])
    blocks[0] = Block(first.reply - before, first.text - before, first.size + before)
    last = blocks[-1]
    after = _shared(a[last.reply + last.size :], b[last.text + last.size :])
    blocks[-1] = last._replace(size=last.size + after)
    return [Block(block.reply, block.text + low, block.size) for block in blocks]


def _matches(a: str, b: str, i: int, j: int) -> list[Block]:
    """Blocks of ``a``, which is at ``i`` of the reply, and ``b``, at ``j`` of the text."""
    start = _shared(a, b)
    end = _shared(a[::-1], b[::-1])
    shorter = min(len(a), len(b))
    if start > end:  # templates drop thoughts, which come first
        end = min(end, shorter - start)
    else:
        start = min(start, shorter - end)
    blocks = [Block(i, j, start)] if start else []
    rest_a, rest_b = a[start : len(a) - end], b[start : len(b) - end]
    blocks += _matching_words(rest_a, rest_b, i + start, j + start)
    if end:
        blocks.append(Block(i + len(a) - end, j + len(b) - end, end))
    return blocks


def _matching_words(a: str, b: str, i: int, j: int) -> list[Block]:
    words_a, words_b = _WORDS.findall(a), _WORDS.findall(b)
    if not 0 < len(words_a) * len(words_b) <= MOST_COMPARISONS:
        return []
    starts_a = [0, *itertools.accumulate(map(len, words_a))]
    starts_b = [0, *itertools.accumulate(map(len, words_b))]
    found = SequenceMatcher(None, words_a, words_b, autojunk=False).get_matching_blocks()
    return [
        Block(i + starts_a[m.a], j + starts_b[m.b], starts_a[m.a + m.size] - starts_a[m.a])
        for m in found
        if m.size
    ]


def _shared(a: str, b: str) -> int:
    """Characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _folded(text: str) -> str:
    """Without upper case, every character in its place."""
    return "".join(folded if len(folded := c.casefold()) == 1 else c for c in text)
