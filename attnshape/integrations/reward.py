"""A reward model's score and credit per policy token, from this process or from ``attnshape serve``."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, Protocol, TypeGuard
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.ops import shape_rewards
from attnshape.text.load import Layers, RewardModelConfig, SourceName, parse_query_position
from attnshape.text.model import NOT_FINITE, CreditModel, Prompt, Scored
from attnshape.text.score_fn import parse_score_fn
from attnshape.text.turns import Span

REQUESTS = 128
"""At once to a server, which makes batches of them."""
ATTEMPTS, FIRST_PAUSE, LAST_PAUSE = 8, 1.0, 30.0
"""Of a request, and seconds between them: two minutes in all, or less."""
LATER = (429, 503)
"""A server that is there, and full or loading its model (again): asked for ``LOADING_SECONDS``."""
ASK_AGAIN = (408, *LATER)
CANNOT_BE_SCORED = 422
API_KEY = "ATTNSHAPE_API_KEY"
SHOWN = 200
"""Characters of an answer in an error."""
CHECK_SECONDS, LOADING_SECONDS, ANSWER_SECONDS = 10.0, 600.0, 600.0


class Unscored(ValueError):
    """The reward model has no score for this completion: too long, no text, not finite, …"""


class RewardModel(Protocol):
    """Scores one completion, with credit per span of ``offsets``, in characters of ``response``.

    Raises ``Unscored`` where there is no score; anything else is wrong with more than this completion.
    """

    async def __call__(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored: ...


class LocalRewardModel:
    """A reward model of this process; completions are scored one after another on one thread.

    Args:
        device: where it runs.
    """

    def __init__(self, config: RewardModelConfig, device: str) -> None:
        self._model = CreditModel.load(config, device)
        self._reader = self._model.reader()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward model")

    async def __call__(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._score, prompt, response, offsets)

    def _score(self, prompt: Prompt, response: str, offsets: Sequence[Span]) -> Scored:
        try:
            example = self._reader.read_reply(prompt, response, offsets)
        except ValueError as error:
            raise Unscored(str(error)) from error
        (scored,) = self._model.score([example])
        if not scored.finite:
            raise Unscored(NOT_FINITE)
        return scored


class ServedRewardModel:
    """``attnshape serve`` at ``url``, asked without a proxy.

    A server that is not there is asked again, ``ATTEMPTS`` times in all; one that is overloaded or loads its
    model again (429, 503) for ten minutes, as one that loads it at the start.

    Args:
        api_key: the server's ``--api-key``; by default the environment's ``ATTNSHAPE_API_KEY``.

    Raises:
        ValueError: a key that no header can carry.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        api_key = api_key or os.environ.get(API_KEY)
        # Told now, and without the key, which http.client would show.
        if api_key and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", api_key):
            raise ValueError(
                f"api_key, or {API_KEY} in the environment: want visible ASCII characters in one line, "
                "without a line break at the end"
            )
        self._headers = {} if not api_key else {"Authorization": f"Bearer {api_key}"}
        self._open = build_opener(ProxyHandler({})).open
        self._threads = ThreadPoolExecutor(REQUESTS, thread_name_prefix="reward model")

    def check(self) -> None:
        """Waits while the server loads its model; raises RuntimeError if there is none."""
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            try:
                with self._open(f"{self._url}/health", timeout=CHECK_SECONDS) as answer:
                    body = answer.read()
                if json_object(f"{self._url}/health", body).get("status") == "ready":
                    return
                raise ValueError(f"got {_shown(body)}")
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
        body = json.dumps(request).encode()
        return await loop.run_in_executor(self._threads, self._ask, body, len(offsets))

    def _ask(self, body: bytes, tokens: int) -> Scored:
        url = f"{self._url}/score"
        request = Request(url, body, {"Content-Type": "application/json", **self._headers})
        started, attempts, code = time.monotonic(), 0, 0
        while attempts < ATTEMPTS or (code in LATER and time.monotonic() - started < LOADING_SECONDS):
            if attempts:
                pause = min(FIRST_PAUSE * 2 ** min(attempts, ATTEMPTS), LAST_PAUSE)
                time.sleep(pause * random.uniform(0.5, 1.0))
            attempts, code = attempts + 1, 0
            try:
                with self._open(request, timeout=ANSWER_SECONDS) as answer:
                    found = answer.read()
                return read_answer(url, found, tokens)
            except HTTPError as error:
                code, problem = error.code, f"{error.code} {_shown(_body_of(error))}"
                if code == CANNOT_BE_SCORED:
                    raise Unscored(f"{url}: {problem}") from error
                if code < 500 and code not in ASK_AGAIN:
                    raise ValueError(f"{url}: {problem}") from error
            except (OSError, HTTPException) as error:
                problem = str(error)
        raise RuntimeError(f"{url}: {problem}, {attempts} times in {time.monotonic() - started:.0f} s")


def _body_of(error: HTTPError) -> bytes:
    """What there is of it: the status says enough where the connection broke on the way."""
    try:
        return error.read()
    except (OSError, HTTPException):
        return b""


def read_answer(url: str, body: bytes, tokens: int) -> Scored:
    """What a reward server answers to one completion with spans of so many of the policy's tokens.

    Raises:
        Unscored: it says that there is no score.
        ValueError: it is something else; the message names the URL.
    """
    found = json_object(url, body)
    if "error" in found:
        raise Unscored(f"{url}: {found['error']}")
    score, credit, metrics = (found.get(name) for name in ("score", "credit", "metrics"))
    if isinstance(score, bool) or not _is_finite(score):
        raise ValueError(f"{url}: want a finite number as score, got {_shown(body)}")
    signed = credit is None and "token_rewards" in found  # of a source with signs
    name, values = ("token_rewards", found["token_rewards"]) if signed else ("credit", credit)
    if not isinstance(values, list) or len(values) != tokens:
        raise ValueError(f"{url}: want {name} of {tokens} tokens, got {_shown(body)}")
    if not all(_is_finite(x) and (signed or x >= 0) for x in values):
        kind = "finite" if signed else "finite and not negative"
        raise ValueError(f"{url}: want {name} that are {kind}, got {_shown(body)}")
    if not isinstance(metrics, dict) or not all(map(_is_finite, metrics.values())):
        raise ValueError(f"{url}: want metrics that are finite numbers by name, got {_shown(body)}")
    numbers = [float(x) for x in values]
    return Scored(float(score), None if signed else numbers, metrics, numbers if signed else None)


def json_object(url: str, body: bytes) -> dict[str, Any]:
    """Raises ValueError, which names the URL and shows how the answer begins, if it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{url}: want a JSON object, got {_shown(body)}")
    return found


def _is_finite(x: object) -> TypeGuard[float]:
    return isinstance(x, (int, float)) and abs(x) <= sys.float_info.max


def _shown(body: bytes) -> str:
    """How an answer begins, in one line."""
    text = " ".join(body[: 4 * SHOWN].decode(errors="replace").split())
    return f"{text[:SHOWN]}…" if len(text) > SHOWN or len(body) > 4 * SHOWN else text or "nothing"


def reward_model(
    *,
    url: str | None = None,
    api_key: str | None = None,
    model: str | None = None,
    score_fn: str = "logit",
    source: SourceName = "attention",
    layer: Layers | None = None,
    span: int = 1,
    query_position: str = "pooled",
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> RewardModel:
    """The reward model served at ``url``, or ``model`` in this process; the same one for the same settings.

    Args:
        api_key: of the server.
        model, score_fn, source, layer, span, query_position, trust_remote_code: as in ``RewardModelConfig``,
            the score function and the position as on the command line; a server has its own.
        device: of ``model``.

    Raises:
        ValueError: not one of ``url`` and ``model``, or ``model`` is no reward model.
        RuntimeError: nothing answers at ``url``.
    """
    if (url is None) == (model is None):
        raise ValueError(f"want either url or model of the reward model, got url={url!r}, model={model!r}")
    if url is not None:
        return _served(url, api_key)
    config = RewardModelConfig(
        model=str(model),
        score_fn=parse_score_fn(score_fn),
        source=source,
        layer=layer if isinstance(layer, int | str) or layer is None else tuple(layer),
        span=span,
        query_position=parse_query_position(str(query_position)),
        trust_remote_code=trust_remote_code,
    )
    return _local(config, device)


@functools.cache
def _served(url: str, api_key: str | None) -> RewardModel:
    served = ServedRewardModel(url, api_key)
    served.check()
    return served


@functools.cache
def _local(config: RewardModelConfig, device: str) -> RewardModel:
    return LocalRewardModel(config, device)


def checked(values: Sequence[float], count: int, signed: bool) -> list[float]:
    """Credit, or signed token rewards, of so many tokens; a reward function of the user's may have made them.

    Raises:
        ValueError: they are not as many, not finite, or credit that is negative.
    """
    if len(values) != count:
        raise ValueError(f"credit: got {len(values)} weights for a response of {count} tokens")
    numbers = [float(x) for x in values]
    name = "token_rewards" if signed else "credit"
    want = "finite ones" if signed else "finite weights, 0 or more (token_rewards have signs)"
    for x in numbers:
        if not _is_finite(x) or (x < 0 and not signed):
            raise ValueError(f"{name}: got {x:g}, want {want}")
    return numbers


def token_rewards(
    score: float,
    credit: Sequence[float] | None,
    mask: Sequence[int | bool],
    *,
    dense_share: float,
    signed: Sequence[float] | None = None,
    terminal_reward: float = 0.0,
) -> Tensor:
    """``dense_share`` of the score by credit, the rest and ``terminal_reward`` on the last unmasked token.

    Args:
        signed: a ``Scored``'s token rewards, in place of credit: as large a share of them, beside a share of
            the score that is spread evenly.

    Returns:
        ``[R]`` float32.

    Raises:
        ValueError: neither or both; ``mask`` and they are not as many, or as ``checked``.
    """
    if (credit is None) == (signed is None):
        raise ValueError("want either credit or signed token rewards")
    values = credit if signed is None else signed
    assert values is not None
    given = torch.tensor([checked(values, len(mask), signed is not None)], dtype=torch.float32)
    shaped = shape_rewards(
        torch.tensor([score], dtype=torch.float32),
        given if signed is None else "uniform",
        torch.tensor([mask]) != 0,
        token_rewards=None if signed is None else dense_share * given,
        terminal_reward=torch.tensor([terminal_reward], dtype=torch.float32),
        config=ShapingConfig(dense_share=dense_share),
    )
    return shaped.rewards[0]
