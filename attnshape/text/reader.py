"""A reward model's score and credit for completions given as text: what ``credit`` and ``serve`` compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnshape.ops import shape_rewards
from attnshape.tap import AttentionTap
from attnshape.text.align import align, find_response
from attnshape.text.score_fn import ScoreFn
from attnshape.types import Response, Status

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A reward model's tokenizer, from a folder or the hub.

    Raises:
        ValueError: it is not a fast one.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: want a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}"
        )
    return tokenizer


def load_reward_model(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer, from a folder or the hub, ready to score.

    Raises:
        ValueError: the checkpoint lacks weights of the model, such as a classification head; or the tokenizer
            is not a fast one.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, dtype="auto", output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{name} is no reward model: it lacks {', '.join(sorted(info['missing_keys']))}")
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


@dataclass(frozen=True)
class Example:
    """A completion as the reward model reads it."""

    prompt: str
    """All that the model reads before the response."""
    response: str
    """As it was given; a chat template may have stripped it."""
    input_ids: list[int]
    positions: list[int]
    """Among ``input_ids``, of the tokens that share a character with the response or, where the policy's
    tokens are given, with one of them: the tokens that get credit."""
    offsets: list[tuple[int, int]]
    """Their spans in characters of ``response``."""
    policy_offsets: list[tuple[int, int]] | None = None
    """The same of the policy's tokens."""


@dataclass(frozen=True)
class Scored:
    """What the reward model says of one completion."""

    score: float
    credit: list[float]
    """Per token of the policy where its offsets were given, else per token of the reward model; sums to 1, or
    is all 0 where none of the policy's tokens has text."""
    metrics: dict[str, float | bool]
    """``entropy`` (nats) and ``last_share`` of the credit on the reward model's tokens;
    ``response_attention``, the share of the attention that falls on them; ``fallback``, whether it was
    nothing, and all credit is on the last token."""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.score, *self.credit, *self.metrics.values())))


class Reader:
    """Turns completions into what a reward model reads.

    Args:
        tokenizer: the reward model's, a fast one.
        config: the reward model's.
        max_length: the longest input in tokens, if shorter than what the model takes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int | None = None
    ) -> None:
        text_config = config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        limits = (tokenizer.model_max_length, positions, max_length)
        self.tokenizer = tokenizer
        self.max_length = int(min(limit for limit in limits if limit is not None))
        self.pads = text_config.pad_token_id is not None or tokenizer.pad_token_id is not None
        """Whether several inputs can share a forward."""
        self._max_characters = self.max_length * max(map(len, tokenizer.get_vocab()))

    def read(
        self, prompt: str, response: str, policy_offsets: Sequence[tuple[int, int]] | None = None
    ) -> Example:
        """Prompt and response as one text, with special tokens if it does not begin with one already.

        Args:
            policy_offsets: spans of the policy's tokens in characters of ``response``, in order; text that
                none covers (a tool's turn) gets no credit, and neither do tokens of zero width.

        Raises:
            ValueError: too long, no text, no token in the response; or offsets that are no such spans.
        """
        text = prompt + response
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and text.startswith(str(bos)))
        ids, spans = self._encode(text, add_special_tokens)
        return _example(text, response, (len(prompt), len(text)), 0, ids, spans, policy_offsets)

    def read_messages(
        self, messages: object, policy_offsets: Sequence[tuple[int, int]] | None = None
    ) -> Example:
        """A conversation, through the tokenizer's chat template; its last message is the response.

        Args:
            policy_offsets: as for ``read``; the template may strip whitespace around the response.

        Raises:
            ValueError: as for ``read``; messages that are none, or that the template does not render.
        """
        text, response = _render(messages, self.tokenizer)
        ids, spans = self._encode(text, add_special_tokens=False)
        found = find_response(self.tokenizer, text, response, ids, spans)
        if found is None:
            raise ValueError("the chat template does not hold the response as it stands")
        stripped = response.find(text[found[0] : found[1]])
        return _example(text, response, found, stripped, ids, spans, policy_offsets)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        text.encode()  # an unpaired surrogate is no text
        if len(text) > self._max_characters:  # told before the memory of so many tokens is spent
            raise ValueError(
                f"{len(text)} characters are more than the {self.max_length} tokens that the model takes"
            )
        encoded = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) > self.max_length:
            raise ValueError(f"{len(ids)} tokens are more than the {self.max_length} that the model takes")
        return ids, spans


def _example(
    text: str,
    response: str,
    found: tuple[int, int],
    stripped: int,
    ids: list[int],
    spans: list[tuple[int, int]],
    policy_offsets: Sequence[tuple[int, int]] | None,
) -> Example:
    """``found`` is where the text holds the response, less ``stripped`` characters before it."""
    low, high = found
    shift = low - stripped
    if policy_offsets is not None:
        _check_offsets(policy_offsets, len(response))
    covered = bytearray(len(text))
    for start, end in [(0, len(response))] if policy_offsets is None else policy_offsets:
        start, end = max(start + shift, low), min(end + shift, high)
        if start < end:  # else the template has stripped it
            covered[start:end] = b"\1" * (end - start)
    positions = [i for i, (start, end) in enumerate(spans) if 1 in covered[start:end]]
    if not positions and policy_offsets is None:
        raise ValueError("the response has no token")
    return Example(
        prompt=text[:low],
        response=response,
        input_ids=ids,
        positions=positions,
        offsets=[(max(spans[i][0], low) - shift, min(spans[i][1], high) - shift) for i in positions],
        policy_offsets=None if policy_offsets is None else list(policy_offsets),
    )


def _check_offsets(offsets: Sequence[tuple[int, int]], length: int) -> None:
    last = (0, 0)
    covered = 0
    for i, (start, end) in enumerate(offsets):
        if not 0 <= start <= end <= length:
            raise ValueError(
                f"offsets[{i}]: got [{start}, {end}], want 0 <= start <= end <= {length}, "
                "the characters of the response"
            )
        if start == end:
            continue
        if start < last[0] or end < last[1]:
            raise ValueError(f"offsets[{i}]: got [{start}, {end}] after {list(last)}, want them in order")
        last = (start, end)
        covered += end - start
    # The bytes of a character share it; without a limit the work would grow with the square of the offsets.
    if covered > 8 * length:
        raise ValueError(f"offsets: got {covered} characters in all for a response of {length}")


def _render(messages: object, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a conversation, and its last message."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('"messages" must be a list of objects')
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError('"messages" must end with one whose role is "assistant"')
    response = messages[-1].get("content")
    if not isinstance(response, str):
        raise ValueError(f'"content" must be a string, got {type(response).__name__}')
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the chat template fails: {error}") from error
    return text, response


@torch.inference_mode()
def score_examples(
    model: PreTrainedModel, tap: AttentionTap, examples: Sequence[Example], score_fn: ScoreFn
) -> list[Scored]:
    """One forward of the model, which the tap is open on."""
    inputs, index = batch_of(model, examples)
    logits = model(**inputs).logits
    score = score_fn(logits.float())
    shaped = shape_rewards(score, tap.take(), Response(index >= 0, index=index))
    stats = shaped.row_stats
    columns = {
        "entropy": stats.entropy,
        "last_share": stats.last_share,
        "response_attention": stats.response_share,
    }
    metrics = {name: column.tolist() for name, column in columns.items() if column is not None}
    fallback = (shaped.status & int(Status.FALLBACK | Status.EMPTY) != 0).tolist()
    scored = []
    for b, example in enumerate(examples):
        credit = shaped.credit[b, : len(example.positions)].cpu()
        if example.policy_offsets is not None:
            credit = align(example.offsets, example.policy_offsets)(credit)
        scored.append(
            Scored(
                score=_rounded(score[b].item()),
                credit=[_rounded(c) for c in credit.tolist()],
                metrics={
                    **{name: _rounded(column[b]) for name, column in metrics.items()},
                    "fallback": fallback[b],
                },
            )
        )
    return scored


def batch_of(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
    """What the model is called with, padded on the right, and int64 ``[B, R]`` positions, -1 in padding."""
    pad = model.config.get_text_config().pad_token_id or 0
    input_ids = _padded([example.input_ids for example in examples], pad).to(model.device)
    lengths = torch.tensor([len(example.input_ids) for example in examples], device=model.device)
    attention_mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
    index = _padded([example.positions for example in examples], -1).to(model.device)
    return {"input_ids": input_ids, "attention_mask": attention_mask.long()}, index


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=value
    )


def _rounded(x: float) -> float:
    """To the digits that float32 has."""
    return float(f"{x:.8g}")
