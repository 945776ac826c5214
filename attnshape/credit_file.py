"""Credit of every completion in a JSONL file, in batches: what ``attnshape credit`` runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnshape.alignment import find_response
from attnshape.files import whole_file
from attnshape.html import PAGE_FOOT, CreditItem, credit_section, page_head
from attnshape.ops import shape_rewards
from attnshape.score_fn import ScoreFn
from attnshape.tap import AttentionTap
from attnshape.types import Status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Counts(NamedTuple):
    written: int
    skipped: int


@dataclass(frozen=True)
class Example:
    """A line of the file as the reward model reads it."""

    line: int
    keys: dict[str, Any]
    """What is passed on."""
    prompt: str
    """All that the model reads before the response."""
    response: str
    input_ids: list[int]
    positions: list[int]
    """Of the response tokens among ``input_ids``."""
    offsets: list[tuple[int, int]]
    """Of the response tokens, in characters of ``response``."""


def load_reward_model(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer, from a folder or the hub, ready to score.

    Raises:
        ValueError: the checkpoint lacks weights of the model, such as a classification head; or the tokenizer
            is not a fast one.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: want a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}"
        )
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, dtype="auto", output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{name} is no reward model: it lacks {', '.join(sorted(info['missing_keys']))}")
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


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
    with the assistant's and is rendered with the tokenizer's chat template; an ``"id"`` is passed on. What is
    written holds ``line, id, score, tokens, offsets, credit`` and ``metrics``; ``tokens`` are slices of the
    response and ``offsets`` their characters in it. No file is held in memory, and the new ones appear only
    when complete.

    Args:
        batch_size: sequences per forward; 1 if there is no padding token.
        layer: the attention layer that is read.
        on_skip: called with the number of a line that cannot be read or scored, and the reason.
        on_read: called with the number of bytes of ``source`` that were read.
    """
    score_fn.check(model.config.num_labels)
    pad = model.config.get_text_config().pad_token_id
    limit = _max_length(model, tokenizer)
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
        examples = _examples(lines, tokenizer, limit, skip, on_read)
        while batch := list(itertools.islice(examples, 1 if pad is None else batch_size)):
            for example, row in zip(batch, _score(model, tap, batch, score_fn), strict=True):
                if not math.isfinite(row["score"]) or not all(map(math.isfinite, row["credit"])):
                    skip(example.line, "the model's score or attention is not finite")
                    continue
                written += 1
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                if page:
                    page.write(credit_section(example.line, _item(example, row)))
        if page:
            page.write(PAGE_FOOT)
    return Counts(written, skipped)


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit: int = tokenizer.model_max_length
    return limit if positions is None else min(limit, positions)


def _examples(
    lines: Iterable[bytes],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    skip: Callable[[int, str], None],
    on_read: Callable[[int], None],
) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        on_read(len(line))
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            if not isinstance(record, dict):
                raise ValueError(f"want a JSON object, got {type(record).__name__}")
            yield _example(number, record, tokenizer, limit)
        except (ValueError, TemplateError, RecursionError) as error:
            skip(number, str(error))


def _example(number: int, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> Example:
    """Raises ValueError if the record is not one that can be scored."""
    templated = "messages" in record
    if templated:
        text, response = _render(record["messages"], tokenizer)
    else:
        prompt, response = _text(record, "prompt"), _text(record, "response")
        text = prompt + response
    text.encode()  # an unpaired surrogate is no text
    encoded = tokenizer(
        text,
        add_special_tokens=not templated,
        truncation=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) > limit:
        raise ValueError(f"{len(ids)} tokens are more than the {limit} that the model takes")
    span = find_response(tokenizer, text, response, ids, spans) if templated else (len(prompt), len(text))
    if span is None:
        raise ValueError("the chat template does not hold the response as it stands")
    low, high = span
    positions = [i for i, (start, end) in enumerate(spans) if max(start, low) < min(end, high)]
    if not positions:
        raise ValueError("the response has no token")
    return Example(
        line=number,
        keys={"id": record["id"]} if "id" in record else {},
        prompt=text[:low],
        response=text[low:high],
        input_ids=ids,
        positions=positions,
        offsets=[(max(spans[i][0], low) - low, min(spans[i][1], high) - low) for i in positions],
    )


def _render(messages: object, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a conversation, and its last message."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('"messages" must be a list of objects')
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError('"messages" must end with one whose role is "assistant"')
    response = _text(messages[-1], "content")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TypeError, KeyError) as error:  # a template that trips over a message's content
        raise ValueError(f"the chat template fails: {error}") from error
    return text, response


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str):
        raise ValueError(f'"{name}" must be a string, got {json.dumps(record.get(name))[:40]}')
    text: str = record[name]
    return text


@torch.inference_mode()
def _score(
    model: PreTrainedModel, tap: AttentionTap, batch: Sequence[Example], score_fn: ScoreFn
) -> list[dict[str, Any]]:
    pad = model.config.get_text_config().pad_token_id or 0
    input_ids = _padded([example.input_ids for example in batch], pad).to(model.device)
    lengths = torch.tensor([len(example.input_ids) for example in batch], device=model.device)
    attention_mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
    index = _padded([example.positions for example in batch], -1).to(model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask.long()).logits
    score = score_fn(logits.float())
    shaped = shape_rewards(score, tap.take(), response_mask=index >= 0, response_index=index)
    stats = shaped.row_stats
    columns = {
        "entropy": stats.entropy,
        "last_share": stats.last_share,
        "response_attention": stats.response_share,
    }
    rows = []
    for b, example in enumerate(batch):
        metrics = {name: _rounded(column[b].item()) for name, column in columns.items() if column is not None}
        row = {
            "line": example.line,
            **example.keys,
            "score": _rounded(score[b].item()),
            "tokens": [example.response[start:end] for start, end in example.offsets],
            "offsets": example.offsets,
            "credit": [_rounded(c) for c in shaped.credit[b, : len(example.positions)].tolist()],
            "metrics": metrics | {"fallback": bool(int(shaped.status[b]) & Status.FALLBACK)},
        }
        rows.append(row)
    return rows


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _rounded(x: float) -> float:
    """To the digits that float32 has."""
    return float(f"{x:.8g}")


def _item(example: Example, row: dict[str, Any]) -> CreditItem:
    """Pieces that tile the response: text without a token joins the next, a shared character is one."""
    tokens: list[str] = []
    credit: list[float] = []
    shown = 0
    for (_, end), c in zip(example.offsets, row["credit"], strict=True):
        if end > shown:
            tokens.append(example.response[shown:end])
            credit.append(c)
            shown = end
        else:
            credit[-1] += c
    note = "no attention on the response: all credit on its last token" if row["metrics"]["fallback"] else ""
    return CreditItem(example.prompt, tokens, credit, row["score"], note)
