"""Completions as a reward model reads them: its tokens, and which of them are the response's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnshape.text.place import Place, check_contents, place_of_reply, render, whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A completion as the reward model reads it."""

    prompt: str
    """All that the model reads before the response."""
    response: str
    """As it was given; a chat template may have changed it."""
    input_ids: list[int]
    positions: list[int]
    """Among ``input_ids``, of the tokens that share a character with the response or, where the policy's
    tokens are given, with one of them: the tokens that get credit."""
    offsets: list[tuple[int, int]]
    """Their spans in characters of ``response``."""
    policy_offsets: list[tuple[int, int]] | None = None
    """The same of the policy's tokens."""
    spans: Sequence[tuple[int, int]] = ()
    """Of ``positions`` in characters of the text that the model reads."""
    policy_spans: Sequence[tuple[int, int]] = ()
    """The same of the policy's tokens; of no width where the chat template dropped them."""
    changed: bool = False
    """Whether the chat template changed the response: what it dropped gets no credit."""


def check_form(record: Mapping[str, Any]) -> None:
    """Raises ValueError unless it has ``prompt`` and ``response``, or ``messages``, and not both."""
    given = [name for name in ("messages", "prompt", "response") if record.get(name) is not None]
    if given not in (["prompt", "response"], ["messages"]):
        got = " and ".join(given) or "neither"
        raise ValueError(f"want prompt and response, or messages, got {got}")


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
        self._vocabulary = getattr(text_config, "vocab_size", None)
        self._max_characters = self.max_length * max(map(len, tokenizer.get_vocab()))

    def read_record(
        self, record: Mapping[str, Any], policy_offsets: Sequence[tuple[int, int]] | None = None
    ) -> Example:
        """A completion by names: ``prompt`` and ``response``, or ``messages``; None is as good as not there.

        Raises:
            ValueError: as for ``read`` and ``read_messages``; both forms or neither.
        """
        check_form(record)
        if record.get("messages") is not None:
            return self.read_messages(record["messages"], policy_offsets)
        given = {name: record[name] for name in ("prompt", "response")}
        for name, value in given.items():
            if not isinstance(value, str):
                raise ValueError(f'"{name}" must be a string, got {type(value).__name__}')
        return self.read(given["prompt"], given["response"], policy_offsets)

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
        return _example(text, response, whole(response, len(prompt)), ids, spans, policy_offsets)

    def read_messages(
        self, messages: object, policy_offsets: Sequence[tuple[int, int]] | None = None
    ) -> Example:
        """A conversation, through the tokenizer's chat template; its last message is the response.

        Args:
            policy_offsets: as for ``read``. What the template drops of the response gets no credit.

        Raises:
            ValueError: as for ``read``; messages that are none, or that the template does not render.
        """
        checked = _checked(messages)
        text = render(checked, self.tokenizer)
        check_contents(checked, text)
        ids, spans = self._encode(text, add_special_tokens=False)
        place = place_of_reply(checked, self.tokenizer, text)
        return _example(text, checked[-1]["content"], place, ids, spans, policy_offsets)

    def read_reply(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        response: str,
        policy_offsets: Sequence[tuple[int, int]],
    ) -> Example:
        """A response to text, which it continues, or to messages.

        Raises:
            ValueError: as for ``read`` and ``read_messages``.
        """
        if isinstance(prompt, str):
            return self.read(prompt, response, policy_offsets)
        return self.read_messages([*prompt, {"role": "assistant", "content": response}], policy_offsets)

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
        if not ids:
            raise ValueError("the text has no token")
        # An index that is out of range ends a process that uses a GPU.
        if self._vocabulary is not None and max(ids) >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"token {token!r} is {max(ids)}, the model has embeddings for {self._vocabulary}"
            )
        return ids, spans


def _example(
    text: str,
    response: str,
    place: Place,
    ids: list[int],
    spans: list[tuple[int, int]],
    policy_offsets: Sequence[tuple[int, int]] | None,
) -> Example:
    if policy_offsets is not None:
        _check_offsets(policy_offsets, len(response))
    covered = bytearray(len(text))
    for start, end in [(0, len(response))] if policy_offsets is None else policy_offsets:
        for block in place.blocks:
            low, high = max(start, block.reply), min(end, block.reply + block.size)
            if low < high:
                shift = block.text - block.reply
                covered[low + shift : high + shift] = b"\1" * (high - low)
    positions = [i for i, (start, end) in enumerate(spans) if 1 in covered[start:end]]
    if not positions and policy_offsets is None and not place.changed:
        raise ValueError("the response has no token")
    return Example(
        prompt=text[: place.low],
        response=response,
        input_ids=ids,
        positions=positions,
        offsets=[place.in_reply(*spans[i]) for i in positions],
        policy_offsets=None if policy_offsets is None else list(policy_offsets),
        spans=[spans[i] for i in positions],
        policy_spans=[place.in_text(*span) for span in policy_offsets or ()],
        changed=place.changed,
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


def _checked(messages: object) -> list[dict[str, Any]]:
    """Raises ValueError for what is no conversation that ends with the assistant's text."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('"messages" must be a list of objects')
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError('"messages" must end with one whose role is "assistant"')
    if not isinstance(response := messages[-1].get("content"), str):
        raise ValueError(f'"content" must be a string, got {type(response).__name__}')
    return messages
