"""The routes on vLLM's server and its IO processor, with transformers in the engine's place."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from fastapi import FastAPI
from support.reward_models import LIMIT, save
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from attnshape.integrations.vllm import answers, endpoint
from attnshape.integrations.vllm.endpoint import Endpoint
from attnshape.integrations.vllm.support import REFUSED
from attnshape.serve import app as serve_app
from attnshape.text.load import RewardModelConfig
from attnshape.text.model import CreditModel

PAIR = {"prompt": "How was it? ", "response": "great"}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "How was the film?"},
        {"role": "assistant", "content": " great, not bad"},
    ],
    "offsets": [[0, 6], [6, 11], [11, 15]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


class Engine:
    """What the routes ask of vLLM's engine; rows are those of eager attention."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
        self.renderer = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder))
        self.model_config = SimpleNamespace(
            model=str(folder), hf_config=self.model.config, max_model_len=LIMIT
        )
        self.vllm_config = SimpleNamespace(additional_config={}, model_config=self.model_config)
        self.credit, self.alive, self.held, self.asked, self.aborted = True, True, False, 0, 0

    def data(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(torch.tensor([ids]), output_attentions=True)
        row = out.attentions[-1][0, :, -1].mean(0)
        return torch.cat([out.logits[0], row if self.credit else torch.full_like(row, REFUSED)])

    async def encode(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        assert params == "asking"
        self.asked += 1
        try:
            while self.held:
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        yield SimpleNamespace(outputs=SimpleNamespace(data=self.data(prompt["prompt_token_ids"])))

    async def check_health(self) -> None:
        if not self.alive:
            raise RuntimeError("the engine is dead")


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(answers, "asking", lambda: "asking")
    monkeypatch.setattr(endpoint, "asking", lambda: "asking")
    return Engine(folder)


def serve(engine: Engine, test: Callable[[httpx2.AsyncClient], Awaitable[None]], **args: Any) -> None:
    async def in_time() -> None:
        app, plugin = FastAPI(), Endpoint()
        plugin.attach_router(app)
        await plugin.init_state(engine, app.state, Namespace(**args))
        transport = httpx2.ASGITransport(app)
        async with (
            asyncio.timeout(60),
            httpx2.AsyncClient(transport=transport, base_url="http://here/attnshape") as client,
        ):
            await test(client)

    asyncio.run(in_time())


def test_answers_are_those_of_the_model_in_this_process(engine: Engine, folder: Path) -> None:
    model = CreditModel.load(RewardModelConfig(model=str(folder)), "cpu")
    reader = model.reader()
    examples = [reader.read_record(PAIR), reader.read_record(MESSAGES, [(0, 6), (6, 11), (11, 15)])]
    want = model.score(examples)

    async def test(client: httpx2.AsyncClient) -> None:
        one = (await client.post("/score", json=PAIR)).json()
        both = (await client.post("/score", json=[PAIR, MESSAGES])).json()
        assert both[0] == one
        assert one["offsets"] == [list(x) for x in examples[0].offsets]
        assert "offsets" not in both[1]
        for found, expected in zip(both, want, strict=True):
            assert found["score"] == pytest.approx(expected.score, abs=1e-5)
            assert found["credit"] == pytest.approx(expected.credit, abs=1e-5)
            assert found["metrics"] == pytest.approx(expected.metrics, abs=1e-5)
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ready")

    serve(engine, test)


def test_what_cannot_be_scored_is_refused_by_the_parser_of_attnshape_serve(engine: Engine) -> None:
    async def test(client: httpx2.AsyncClient) -> None:
        for content, status, message in (
            (b"{", 400, "Invalid JSON"),
            (b"{}", 422, "want prompt and response, or messages, got neither"),
            (b'{"prompt": "a", "response": "b", "x": 1}', 422, "x: Extra inputs are not permitted"),
            (b'{"prompt": "a", "response": "b", "offsets": [[0, 9]]}', 422, "offsets[0]: got [0, 9]"),
            (b'{"prompt": "%s", "response": "b"}' % (b"a b " * 99), 422, "that the model takes"),
        ):
            kind = {"content-type": "application/json"}
            reply = await client.post("/score", content=content, headers=kind)
            assert reply.status_code == status
            assert message in reply.json()["error"]
        assert (await client.post("/score", content=b"{}")).status_code == 415
        assert engine.asked == 0

    serve(engine, test)


def test_a_refused_row_is_an_error_and_the_health_says_so(engine: Engine) -> None:
    engine.credit = False

    async def test(client: httpx2.AsyncClient) -> None:
        reply = await client.post("/score", json=[PAIR, PAIR])
        assert reply.status_code == 200
        assert reply.json() == [{"error": answers.NO_ROW}] * 2
        health = await client.get("/health")
        assert (health.status_code, health.json()["failure"]) == (503, answers.NO_ROW)

    serve(engine, test)


def test_an_engine_without_the_plugin_gives_no_row(engine: Engine) -> None:
    data = engine.data
    engine.data = lambda ids: data(ids)[:1]  # type: ignore[method-assign]

    async def test(client: httpx2.AsyncClient) -> None:
        assert (await client.post("/score", json=PAIR)).json() == {"error": answers.NO_ROW}

    serve(engine, test)


def test_attention_that_is_not_finite_is_an_error_and_credit_stays_on(engine: Engine) -> None:
    data = engine.data
    engine.data = lambda ids: data(ids) * torch.nan  # type: ignore[method-assign]

    async def test(client: httpx2.AsyncClient) -> None:
        assert "not finite" in (await client.post("/score", json=PAIR)).json()["error"]
        assert (await client.get("/health")).status_code == 200

    serve(engine, test)


def test_a_dead_engine_is_not_healthy(engine: Engine) -> None:
    engine.alive = False

    async def test(client: httpx2.AsyncClient) -> None:
        health = await client.get("/health")
        assert (health.status_code, health.json()["failure"]) == (503, "the engine is dead")

    serve(engine, test)


@pytest.mark.parametrize("variable", [False, True])
def test_the_servers_api_key_guards_the_route(
    engine: Engine, variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("VLLM_API_KEY", "secret")

    async def test(client: httpx2.AsyncClient) -> None:
        assert (await client.post("/score", json=PAIR)).status_code == 401
        wrong = await client.post("/score", json=PAIR, headers={"Authorization": "Bearer other"})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
        right = await client.post("/score", json=PAIR, headers={"Authorization": "Bearer secret"})
        assert right.status_code == 200
        assert (await client.get("/health")).status_code == 200

    serve(engine, test, api_key=None if variable else ["first", "secret"])


def test_a_body_that_dribbles_is_cut_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "READ_SECONDS", 0.05)

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def test(client: httpx2.AsyncClient) -> None:
        kind = {"content-type": "application/json"}
        reply = await client.post("/score", content=body(), headers=kind)
        assert (reply.status_code, reply.json()) == (408, {"error": "the body took longer than 0.05 s"})
        assert engine.asked == 0

    serve(engine, test)


def test_who_hangs_up_is_not_computed_for(engine: Engine) -> None:
    engine.held = True

    async def test(client: httpx2.AsyncClient) -> None:
        app, plugin = FastAPI(), Endpoint()
        plugin.attach_router(app)
        await plugin.init_state(engine, app.state, Namespace())
        body = b'[{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c"}]'
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(messages, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            return None

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/attnshape/score",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        asking = asyncio.create_task(app(scope, receive, send))
        while engine.asked < 2:
            await asyncio.sleep(0.001)
        gone.set()
        await asking
        assert engine.aborted == 2

    serve(engine, test)


def test_one_that_cannot_be_read_is_an_error_in_its_place(engine: Engine) -> None:
    async def test(client: httpx2.AsyncClient) -> None:
        long = {**PAIR, "prompt": "a b " * 99}
        first, second = (await client.post("/score", json=[long, PAIR])).json()
        assert "that the model takes" in first["error"]
        assert sum(second["credit"]) == pytest.approx(1)
        assert engine.asked == 1

    serve(engine, test)


def test_one_that_the_engine_refuses_is_an_error_in_its_place(engine: Engine) -> None:
    theirs, short = (
        engine.data,
        len(engine.renderer.tokenizer(PAIR["prompt"] + PAIR["response"])["input_ids"]),
    )

    def refuses(ids: list[int]) -> torch.Tensor:
        if len(ids) > short:
            raise ValueError("prompt is too long for the cache")
        return theirs(ids)

    engine.data = refuses  # type: ignore[method-assign]
    long = {**PAIR, "response": "great, not bad at all"}

    async def test(client: httpx2.AsyncClient) -> None:
        reply = await client.post("/score", json=[PAIR, long, PAIR])
        first, second, third = reply.json()
        assert (reply.status_code, second) == (200, {"error": "prompt is too long for the cache"})
        assert first == third
        assert sum(first["credit"]) == pytest.approx(1)
        reply = await client.post("/score", json=long)
        assert (reply.status_code, reply.json()) == (422, second)

    serve(engine, test)


def test_an_engine_that_dies_is_asked_again_later(engine: Engine) -> None:
    def dead(ids: list[int]) -> torch.Tensor:
        raise RuntimeError("the engine is dead")

    engine.data = dead  # type: ignore[method-assign]

    async def test(client: httpx2.AsyncClient) -> None:
        reply = await client.post("/score", json=PAIR)
        assert (reply.status_code, reply.json()) == (503, {"error": "the engine is dead"})
        assert reply.headers["retry-after"] == "1"

    serve(engine, test)


def test_a_template_that_would_not_be_read_ends_the_start(engine: Engine) -> None:
    start = Endpoint().init_state(engine, None, Namespace(chat_template="chat.jinja"))
    with pytest.raises(ValueError, match=r"--chat-template: got 'chat\.jinja', but completions are read"):
        asyncio.run(start)


def test_a_slow_tokenizer_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="want a fast one, which gives offsets, got SimpleNamespace"):
        answers.reader_of(engine.model_config, SimpleNamespace(is_fast=False))
