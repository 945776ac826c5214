"""The protocol of ``attnshape serve`` on vLLM's own server: ``/attnshape/score`` and ``/attnshape/health``.

vLLM adds the routes of a plugin that ``VLLM_PLUGINS`` names; the adapters take
``url=http://HOST:PORT/attnshape``.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.requests import ClientDisconnect

from attnshape.integrations.vllm.answers import NO_ROW, asking, reader_of, scored, warm_up
from attnshape.integrations.vllm.support import ASKED, Settings
from attnshape.serve.app import (
    CHALLENGE,
    CLIENT_GONE,
    RETRY_AFTER,
    Door,
    ServeConfig,
    hung_up,
    is_let_in,
)
from attnshape.serve.protocol import BODY, Answer, Failure, answer
from attnshape.text.reader import Example

_rows = Counter(
    "attnshape_rows", "Completions answered with credit, and those whose row was refused.", ["outcome"]
)


class Endpoint:
    """What the entry point of ``vllm.endpoint_plugins`` makes."""

    name = ASKED
    required_tasks = ("classify",)

    def __init__(self) -> None:
        self._door = Door(ServeConfig.max_pending, ServeConfig.max_body_bytes)
        self._keys: list[str] = []
        self._engine: Any = None
        self._off = False

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.post(
            "/attnshape/score",
            response_model=Answer | Failure | list[Answer | Failure],
            responses={status: {"model": Failure} for status in (400, 401, 408, 413, 415, 422, 429, 503)},
            openapi_extra={
                "requestBody": {"required": True, "content": {"application/json": {"schema": BODY}}}
            },
        )(self.score)
        app.get("/attnshape/health", responses={503: {"description": "There is no credit to be had."}})(
            self.health
        )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called when the engine is there.

        Raises:
            ValueError: settings, a tokenizer or a chat template that do not serve.
        """
        if template := getattr(args, "chat_template", None):
            raise ValueError(
                f"--chat-template: got {template!r}, but completions are read with the tokenizer's own: "
                "want it there"
            )
        config = engine_client.vllm_config
        self._score_fn = Settings.of(config.additional_config).score_fn
        self._reader = reader_of(config.model_config, engine_client.renderer.tokenizer)
        # vLLM's own guard is for its own paths.
        given = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        self._keys = [key for key in given if key]
        self._model = config.model_config.model
        self._engine = engine_client
        warm_up()

    async def score(self, request: Request) -> Response:
        """Score and credit of one completion, or of each of a list."""
        try:
            return await self._score(request)
        except HTTPException as error:
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)

    async def health(self) -> Response:
        """Whether requests can be answered with credit: 200, or 503."""
        failure = NO_ROW if self._off else None
        try:
            await self._engine.check_health()
        except Exception as error:
            failure = str(error) or type(error).__name__
        body = {"status": "not ready" if failure else "ready", "model": self._model, "failure": failure}
        return JSONResponse(body, 503 if failure else 200)

    async def _score(self, request: Request) -> Response:
        if self._keys and not is_let_in(request, self._keys):
            raise HTTPException(401, "want the header 'Authorization: Bearer' with the API key", CHALLENGE)
        async with self._door.completions(request, self._reader) as (examples, many):
            answers = await self._answers(request, examples)
        if many:  # one that the engine does not take costs no other
            return JSONResponse([{"error": str(x)} if isinstance(x, ValueError) else x for x in answers])
        (only,) = answers
        if isinstance(only, ValueError):
            raise HTTPException(422, str(only)) from only
        return JSONResponse(only)

    async def _answers(
        self, request: Request, examples: Sequence[Example | str]
    ) -> list[dict[str, Any] | ValueError]:
        """Answers, or why the engine does not take a completion.

        Raises ClientDisconnect when nobody waits any more; the engine then drops what it was asked.
        """
        asked = [asyncio.create_task(self._ask(example)) for example in examples]
        answered = asyncio.create_task(asyncio.wait(asked))
        gone = asyncio.create_task(hung_up(request))
        try:
            await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise ClientDisconnect
            found: list[dict[str, Any] | ValueError] = []
            for each in asked:
                error = each.exception()
                if error is not None and not isinstance(error, ValueError):
                    raise HTTPException(503, str(error) or type(error).__name__, RETRY_AFTER) from error
                found.append(each.result() if error is None else error)
            return found
        finally:
            tasks: list[asyncio.Future[Any]] = [*asked, gone, answered]
            for task in tasks:
                task.cancel()

    async def _ask(self, example: Example | str) -> dict[str, Any]:
        if isinstance(example, str):
            return {"error": example}
        prompt, data = {"prompt_token_ids": example.input_ids}, None
        async for output in self._engine.encode(prompt, asking(), f"attnshape-{uuid.uuid4().hex}"):
            data = output.outputs.data
        assert data is not None
        found = scored(example, data, self._score_fn)
        self._off = found == NO_ROW
        _rows.labels("refused" if self._off else "given").inc()
        return answer(example, found)
