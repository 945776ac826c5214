"""A reward model's score and credit per policy token, from this process or from ``attnshape serve``."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from attnshape.alignment import decoded_spans
from attnshape.score_fn import parse_score_fn
from attnshape.scoring import Reader, Scored, load_reward_model, score_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = str | Sequence[dict[str, Any]]
"""Text, which the response continues, or messages, which the reward model's chat template renders with it."""
Span: TypeAlias = tuple[int, int]

ATTEMPTS = 8
"""Of a request that meets an overloaded or restarting server, about 2 minutes in all."""


class RewardModel(Protocol):
    """Scores one completion, with credit per span of ``offsets``, in characters of ``response``."""

    async def __call__(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored: ...


class LocalRewardModel:
    """A sequence classifier of this process; completions are scored one after another on one thread.

    Args:
        name: folder or hub name.
        score_fn: the score, such as ``"logit[1] - logit[0]"``.
        layer: the attention layer that is read, negative from the last.
    """

    def __init__(self, name: str, score_fn: str, layer: int, device: str) -> None:
        self._score_fn, self._layer = parse_score_fn(score_fn), layer
        self._model, tokenizer = load_reward_model(name, device)
        self._score_fn.check(self._model.config.num_labels)
        self._reader = Reader(tokenizer, self._model.config)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward model")

    async def __call__(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._score, prompt, response, offsets)

    def _score(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored:
        from attnshape.tap import AttentionTap

        if isinstance(prompt, str):
            example = self._reader.read(prompt, response, offsets)
        else:
            messages = [*prompt, {"role": "assistant", "content": response}]
            example = self._reader.read_messages(messages, offsets)
        with AttentionTap(self._model, self._layer) as tap:
            return score_examples(self._model, tap, [example], self._score_fn)[0]


class ServedRewardModel:
    """``attnshape serve`` at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")


@functools.cache
def reward_model(
    *,
    url: str | None = None,
    model: str | None = None,
    score_fn: str = "logit",
    layer: int = -1,
    device: str = "cpu",
) -> RewardModel:
    """The served reward model at ``url``, or ``model`` in this process; the same one for the same settings."""
    if (url is None) == (model is None):
        raise ValueError(f"want either url or model, got url={url!r} and model={model!r}")
    if url is not None:
        return ServedRewardModel(url)
    return LocalRewardModel(str(model), score_fn, layer, device)


def masked_spans(spans: Sequence[Span], mask: Sequence[int | bool]) -> list[Span]:
    """``spans`` with those of masked tokens, such as a tool's, made empty: they get no credit."""
    return [(s, e) if m else (s, s) for (s, e), m in zip(spans, mask, strict=True)]
