"""A reward model's score and credit per policy token, from this process or from ``attnshape serve``."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.ops import shape_rewards
from attnshape.tap import AttentionTap
from attnshape.text.credit_model import Prompt
from attnshape.text.reader import Reader, Scored, load_reward_model, score_examples
from attnshape.text.score_fn import parse_score_fn
from attnshape.text.turns import Span

REQUESTS = 128
"""At once to a server, which makes batches of them."""
ATTEMPTS, FIRST_PAUSE, LAST_PAUSE = 8, 1.0, 30.0
"""Of a request, and seconds between them: two minutes in all, or less."""
ASK_AGAIN = (408, 429)
CHECK_SECONDS, LOADING_SECONDS, ANSWER_SECONDS = 10.0, 600.0, 600.0


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
        if isinstance(prompt, str):
            example = self._reader.read(prompt, response, offsets)
        else:
            messages = [*prompt, {"role": "assistant", "content": response}]
            example = self._reader.read_messages(messages, offsets)
        with AttentionTap(self._model, self._layer) as tap:
            (scored,) = score_examples(self._model, tap, [example], self._score_fn)
        if not scored.finite:
            raise ValueError("the reward model's score or attention is not finite")
        return scored


class ServedRewardModel:
    """``attnshape serve`` at ``url``, asked without a proxy.

    A server that is overloaded, not there or starting again is asked again, ``ATTEMPTS`` times in all.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._open = build_opener(ProxyHandler({})).open
        self._threads = ThreadPoolExecutor(REQUESTS, thread_name_prefix="reward model")

    def check(self) -> None:
        """Waits while the server loads its model; raises RuntimeError if there is none."""
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            try:
                with self._open(f"{self._url}/health", timeout=CHECK_SECONDS):
                    return
            except (OSError, HTTPException, ValueError) as error:
                loading = isinstance(error, HTTPError) and error.code == 503
                if not loading or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self._url}/health: {error}; is `attnshape serve` running there?"
                    ) from error
            time.sleep(FIRST_PAUSE)

    async def __call__(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored:
        request: dict[str, Any] = {"offsets": list(offsets)}
        if isinstance(prompt, str):
            request |= {"prompt": prompt, "response": response}
        else:
            request["messages"] = [*prompt, {"role": "assistant", "content": response}]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, json.dumps(request).encode())

    def _ask(self, body: bytes) -> Scored:
        request = Request(f"{self._url}/score", body, {"Content-Type": "application/json"})
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(FIRST_PAUSE * 2**attempt, LAST_PAUSE) * random.uniform(0.5, 1.0))
            try:
                with self._open(request, timeout=ANSWER_SECONDS) as answer:
                    found = json.load(answer)
                if "error" in found:
                    raise ValueError(f"{self._url}/score: {found['error']}")
                return Scored(found["score"], found["credit"], found["metrics"])
            except HTTPError as error:
                problem = f"{error.code} {error.read().decode(errors='replace')}"
                if error.code < 500 and error.code not in ASK_AGAIN:
                    raise ValueError(f"{self._url}/score: {problem}") from error
            except (OSError, HTTPException) as error:
                problem = str(error)
        raise RuntimeError(f"{self._url}/score: {problem}, {ATTEMPTS} times")


def reward_model(
    *,
    url: str | None = None,
    model: str | None = None,
    score_fn: str = "logit",
    layer: int = -1,
    device: str = "cpu",
) -> RewardModel:
    """The reward model served at ``url``, or ``model`` in this process; the same one for the same settings.

    Raises:
        ValueError: not one of ``url`` and ``model``, or ``model`` is no reward model.
        RuntimeError: nothing answers at ``url``.
    """
    return _reward_model(url, model, score_fn, layer, device)


@functools.cache
def _reward_model(url: str | None, model: str | None, score_fn: str, layer: int, device: str) -> RewardModel:
    if (url is None) == (model is None):
        raise ValueError(f"want either url or model of the reward model, got url={url!r}, model={model!r}")
    if url is not None:
        served = ServedRewardModel(url)
        served.check()
        return served
    return LocalRewardModel(str(model), score_fn, layer, device)


def token_rewards(
    score: float,
    credit: Sequence[float],
    mask: Sequence[int | bool],
    *,
    dense_share: float,
    terminal_reward: float = 0.0,
) -> Tensor:
    """``dense_share`` of the score by credit, the rest and ``terminal_reward`` on the last unmasked token.

    Returns:
        ``[R]`` float32.

    Raises:
        ValueError: ``credit`` and ``mask`` are not as many.
    """
    if len(credit) != len(mask):
        raise ValueError(f"credit: got {len(credit)} weights for a response of {len(mask)} tokens")
    shaped = shape_rewards(
        torch.tensor([score], dtype=torch.float32),
        torch.tensor([credit], dtype=torch.float32),
        torch.tensor([mask]) != 0,
        terminal_reward=torch.tensor([terminal_reward], dtype=torch.float32),
        config=ShapingConfig(dense_share=dense_share),
    )
    return shaped.rewards[0]
