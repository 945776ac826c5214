"""A response inside the text that a reward model reads: weights carried from its tokens to the policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from attnshape.text.align import Alignment, Spans, align
from attnshape.text.place import Block, Messages, Place, check_contents, place_of_reply, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Target: TypeAlias = str | Sequence[int] | Tensor
"""A response: its text, or its token ids."""
Source: TypeAlias = str | Messages
"""What a reward model reads: a text, or a conversation."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class TextAlignment(Alignment):
    """An ``Alignment`` from the tokens of a text; made by ``align_texts``."""

    input_ids: Tensor
    """int64, ``source_shape``: the tokens whose weights it carries, for the reward model to read."""
    attention_mask: Tensor
    """int64, ``source_shape``: 0 at padding."""
    changed: Tensor
    """bool ``[B]``, or ``[]``: the chat template changed this response; what it dropped gets no weight."""

    def __call__(self, weights: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """As ``Alignment``; with ``input_ids``, those that the weights belong to, it checks them.

        Raises:
            ValueError: ``weights`` of another width, or other ``input_ids``.
        """
        if input_ids is not None and (
            input_ids.shape != self.input_ids.shape or not torch.equal(input_ids.cpu(), self.input_ids)
        ):
            raise ValueError(
                f"input_ids: got {list(input_ids.shape)} that are not the {list(self.input_ids.shape)} "
                "tokens that this alignment was made for"
            )
        return super().__call__(weights)


def align_texts(
    source_tokenizer: PreTrainedTokenizerBase,
    source: Source | Sequence[Source],
    target_tokenizer: PreTrainedTokenizerBase,
    target: Target | Sequence[Target],
    *,
    start: int | Sequence[int] | None = None,
    input_ids: Tensor | Sequence[Any] | None = None,
) -> TextAlignment:
    """``align`` for a response inside what a reward model reads, which has another tokenizer.

        alignment = align_texts(reward_tokenizer, conversations, policy_tokenizer, response_ids)
        with AttentionTap(reward_model) as tap:
            score = reward_model(alignment.input_ids, attention_mask=alignment.attention_mask).logits[:, 0]
        credit = attention_credit(tap.take(), Response(alignment.source_mask, start=zeros))  # [B, S]
        out = shape_rewards(score, alignment(credit), ...)  # [B, R]

    Args:
        source_tokenizer: the reward model's, a fast one; a batch is padded on its own ``padding_side``.
        source: what the reward model reads, one or a batch: a conversation that ends with the response, which
            the tokenizer's chat template renders and in which it says where the response is; or a text.
            Conversations are tokenised without special tokens, which their template holds; texts with them,
            unless they begin with the tokenizer's own.
        target_tokenizer: the policy's tokenizer; a fast one where ``target`` is text.
        target: the response, one per source: its text, tokenised without special tokens, or the sampled
            token ids, int ``[R]``, whose spans are found by decoding (special tokens have zero width).
        start: of texts, the character at which the response begins, in each; needed where a text holds its
            response more than once.
        input_ids: the reward model's own tokens of the sources, ``[S]`` or ``[B, S]``, padded on either side,
            with or without special tokens, if there are any already.

    Returns:
        A ``TextAlignment``; its tensors are on the CPU, and what it carries is where the weights are.

    Raises:
        ValueError: a text does not hold its response, or more than once and ``start`` is not given; the
            arguments are not as many; ``input_ids`` are not the tokens of the sources; a tokenizer that must
            give offsets is not a fast one.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[user]": 0, "good": 1, "film": 2}, unk_token="[user]"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> align_texts(tokenizer, "[user] good film", tokenizer, "good film").source_mask
        tensor([False,  True,  True])
    """
    single = isinstance(source, str) or (len(source) > 0 and isinstance(source[0], Mapping))
    sources = cast("list[Source]", [source] if single else list(source))
    targets = cast("list[Target]", [target] if single else list(target))
    if len(sources) != len(targets):
        raise ValueError(f"source and target must be as many, got {len(sources)} and {len(targets)}")
    starts = [start] * len(sources) if start is None or isinstance(start, int) else list(start)
    if len(starts) != len(sources):
        raise ValueError(f"source and start must be as many, got {len(sources)} and {len(starts)}")
    _require_fast(source_tokenizer, "source_tokenizer")
    texts = [item if isinstance(item, str) else render(item, source_tokenizer) for item in sources]
    for item, text in zip(sources, texts, strict=True):
        if not isinstance(item, str):
            check_contents(item, text)
    bos = source_tokenizer.bos_token
    special = [isinstance(item, str) and not (bos and item.startswith(str(bos))) for item in sources]
    if input_ids is None:
        encoded = _encoded(source_tokenizer, texts, special)
    else:
        rows = torch.as_tensor(input_ids, device="cpu")
        encoded = _given(source_tokenizer, texts, rows[None] if single and rows.ndim == 1 else rows)
    target_offsets, changed = [], []
    for b, (item, text, response) in enumerate(zip(sources, texts, targets, strict=True)):
        if isinstance(response, str):
            _require_fast(target_tokenizer, "target_tokenizer")
            spans = target_tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
        else:
            response, spans = decoded_spans(target_tokenizer, response)
        if isinstance(item, str):
            place = _place_in_text(source_tokenizer, item, response, starts[b], encoded, b)
        else:
            place = place_of_reply(item, source_tokenizer, text, response)
        target_offsets.append([place.in_text(*span) for span in spans])
        changed.append(place.changed)
    found = align(encoded.offsets[0], target_offsets[0]) if single else align(encoded.offsets, target_offsets)
    shape = found.source_shape
    return TextAlignment(
        **vars(found),
        input_ids=encoded.input_ids.view(shape),
        attention_mask=encoded.attention_mask.view(shape),
        changed=torch.tensor(changed[0] if single else changed, dtype=torch.bool, device="cpu"),
    )


class _Encoded(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    offsets: list[Spans]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: list[bool]) -> _Encoded:
    """Tokens of the texts, padded where they are several."""
    rows = [
        tokenizer(text, add_special_tokens=add, return_offsets_mapping=True)
        for text, add in zip(texts, special, strict=True)
    ]
    width = max((len(row["input_ids"]) for row in rows), default=0)
    if any(len(row["input_ids"]) < width for row in rows) and tokenizer.pad_token_id is None:
        raise ValueError("source_tokenizer has no padding token, want one, or texts one by one")
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    offsets: list[Spans] = []
    for b, row in enumerate(rows):
        n = len(row["input_ids"])
        first = width - n if tokenizer.padding_side == "left" else 0
        ids[b, first : first + n] = torch.tensor(row["input_ids"], dtype=torch.int64, device="cpu")
        mask[b, first : first + n] = 1
        offsets.append([(0, 0)] * first + row["offset_mapping"] + [(0, 0)] * (width - n - first))
    return _Encoded(ids, mask, offsets)


def _given(tokenizer: PreTrainedTokenizerBase, texts: list[str], rows: Tensor) -> _Encoded:
    """The same of tokens that were made already: with special tokens or without, padded on either side."""
    if rows.ndim != 2 or len(rows) != len(texts) or rows.is_floating_point():
        raise ValueError(f"input_ids: got {rows.dtype} {list(rows.shape)} for {len(texts)} texts")
    rows = rows.cpu().long()
    width = rows.shape[1]
    mask = torch.zeros_like(rows)
    offsets: list[Spans] = []
    for b, (text, row) in enumerate(zip(texts, rows.tolist(), strict=True)):
        for add in (True, False):
            encoded = tokenizer(text, add_special_tokens=add, return_offsets_mapping=True)
            ids, spans = encoded["input_ids"], encoded["offset_mapping"]
            n = len(ids)
            first = next(
                (at for at in (0, width - n) if at >= 0 and _is_padded(tokenizer, row, ids, at)), None
            )
            if first is not None:
                break
        else:
            raise ValueError(
                f"input_ids: sequence {b} is not source {b} tokenised by source_tokenizer and padded "
                "(truncated, or of another text or tokenizer?)"
            )
        mask[b, first : first + n] = 1
        offsets.append([(0, 0)] * first + spans + [(0, 0)] * (width - n - first))
    return _Encoded(rows, mask, offsets)


def _is_padded(tokenizer: PreTrainedTokenizerBase, row: list[int], ids: list[int], first: int) -> bool:
    around = {*row[:first], *row[first + len(ids) :]}
    return row[first : first + len(ids)] == ids and len(around) <= 1 and around <= {tokenizer.pad_token_id}


def _place_in_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    response: str,
    start: int | None,
    encoded: _Encoded,
    b: int,
) -> Place:
    """Where a text holds a response as it is, or without the whitespace around it."""
    for part in (response, response.strip()):
        shift = response.find(part)
        if start is not None:
            found = [low for low in (start, start + shift) if text.startswith(part, low)][:1]
        elif not part:
            found = [len(text)]
        else:
            found = _occurrences(tokenizer, text, part, encoded.input_ids[b].tolist(), encoded.offsets[b])
        if len(found) > 1:
            raise ValueError(
                f"source {b} holds its response {response!r} {len(found)} times: want start=, the character "
                "at which it begins, or a conversation in place of the text"
            )
        if found:
            blocks = (Block(shift, found[0], len(part)),) if part else ()
            return Place(found[0], found[0] + len(part), blocks, changed=part != response)
    where = "" if start is None else f" at {start}"
    raise ValueError(f"source {b} does not contain its response: {response!r} is not in {text!r}{where}")


def _occurrences(
    tokenizer: PreTrainedTokenizerBase, text: str, part: str, ids: Sequence[int], offsets: Spans
) -> list[int]:
    """Where ``text``, of these tokens, holds ``part`` without cutting through a special token."""
    added = tokenizer.added_tokens_decoder
    special_ids = {i for i, token in added.items() if token.special and i != tokenizer.unk_token_id}
    special = [span for i, span in zip(ids, offsets, strict=True) if i in special_ids and span[0] < span[1]]
    found, start = [], text.find(part)
    while start >= 0:
        end = start + len(part)
        if not any(s < end and start < e and not (start <= s and e <= end) for s, e in special):
            found.append(start)
        start = text.find(part, start + 1)
    return found


def _require_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name} must be a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}"
        )


def decoded_spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor
) -> tuple[str, list[tuple[int, int]]]:
    """The text of sampled tokens, and the span of each in it: what they have in place of an offset mapping.

    Every token is decoded behind the last ones that gave text, so that spaces survive; tokens that hold parts
    of a character share it; special tokens have zero width.

    Args:
        ids: of one sequence, int ``[R]``.

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"good": 0, "film": 1}, unk_token="good"))
        >>> decoded_spans(PreTrainedTokenizerFast(tokenizer_object=words), [0, 1])
        ('good film', [(0, 4), (4, 9)])
    """
    ids = list(map(int, ids))

    def decode(part: list[int]) -> str:
        text: str = tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    spans: list[tuple[int, int]] = []
    done = 0  # characters of the text whose tokens are complete
    context, read, known, fresh = 0, 0, "", ""
    for i in range(len(ids)):
        start = done + len(fresh) - fresh.endswith(REPLACEMENT)
        fresh = decode(ids[context : i + 1])[len(known) :]
        spans.append((start, max(start + 1, done + len(fresh))) if fresh else (done, done))
        if fresh and not fresh.endswith(REPLACEMENT):
            done += len(fresh)
            # Some decoders write one replacement per byte: a whole character may be shorter than its parts.
            spans[read:] = [(min(s, done - 1), min(e, done)) if s < e else (s, e) for s, e in spans[read:]]
            context, read = read, i + 1
            known, fresh = decode(ids[context:read]), ""
    return decode(ids), spans
