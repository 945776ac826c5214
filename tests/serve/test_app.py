"""The HTTP side, with the test in the workers' place: what is let in and what is refused."""

from __future__ import annotations

import asyncio
import html
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from support.reward_models import LIMIT, save

import attnshape
from attnshape.serve import app as serve_app
from attnshape.serve.app import BODIES, ServeConfig, build, http_config
from attnshape.serve.batching import Unavailable
from attnshape.serve.protocol import Completion
from attnshape.serve.workers import Pool, State
from attnshape.text.model import Scored
from attnshape.text.score_fn import parse_score_fn

PAIR = {"prompt": "How was it? ", "response": "great"}
OFFSETS = [[0, 3], [3, 5]]
METRICS = {
    "entropy": 0.5,
    "last_share": 0.25,
    "response_attention": 0.125,
    "fallback": False,
    "changed": False,
}
GOOD = Scored(1.5, [0.75, 0.25], METRICS)
PATIENCE = 180.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


class Server:
    """The application without its worker processes; ``answer`` is what a worker does."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.app, self.pool = build(
            ServeConfig(model=str(folder), score_fn=parse_score_fn("logit"), **limits)
        )
        self.pool.workers[0].state = State.READY
        transport = httpx2.ASGITransport(self.app)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://here", timeout=PATIENCE)

    async def post(self, body: Any) -> httpx2.Response:
        return await self.client.post("/score", json=body)

    async def has_waiting(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.pool.queue) != count:
                await asyncio.sleep(0.001)

    def answer(self, *answers: Scored | str | Exception) -> None:
        batch = self.pool.queue.take(0)
        self.pool.metrics.observe_batch(
            [item.tokens for item in batch], [a for a in answers if not isinstance(a, Exception)], 0.0
        )
        for item, given in zip(batch, answers, strict=True):
            if isinstance(given, Exception):
                item.answer.set_exception(given)
            else:
                item.answer.set_result(given)

    async def counted(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        return {
            " ".join([sample.name.removeprefix("attnshape_"), *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
def server(folder: Path) -> Server:
    return Server(folder)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(in_time())


def strict_json(response: httpx2.Response) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(response.text, parse_constant=refuse)


def test_one_answer_or_a_list_in_order(server: Server) -> None:
    async def test() -> None:
        one = asyncio.create_task(server.post({**PAIR, "offsets": OFFSETS}))
        await server.has_waiting(1)
        server.answer(GOOD)
        response = await one
        assert response.status_code == 200
        assert strict_json(response) == {"score": 1.5, "credit": [0.75, 0.25], "metrics": METRICS}
        other = Scored(-1.0, [1.0], METRICS)
        both = asyncio.create_task(server.post([{**PAIR, "offsets": OFFSETS}, {**PAIR, "response": "x"}]))
        await server.has_waiting(2)
        server.answer(*[other if len(item.example.response) == 1 else GOOD for item in waiting(server.pool)])
        first, second = strict_json(await both)
        assert (first["score"], second["score"]) == (1.5, -1.0)
        assert second["offsets"] == [[0, 1]]

    run(test)


def test_a_policy_without_text_is_scored(server: Server) -> None:
    """One that ends at once must not stop a training run."""

    async def test() -> None:
        for response, offsets in (("", []), ("bad", [[1, 1]])):
            one = asyncio.create_task(server.post({"prompt": "a", "response": response, "offsets": offsets}))
            await server.has_waiting(1)
            [item] = server.pool.queue._waiting
            assert item.example.positions == []
            server.answer(Scored(1.5, [0.0] * len(offsets), METRICS))
            assert strict_json(await one)["score"] == 1.5

    run(test)


def waiting(pool: Pool) -> list[Any]:
    """In the order in which ``take`` will give them."""
    return sorted(pool.queue._waiting, key=lambda item: item.tokens)


def test_a_server_that_loads_says_so(folder: Path) -> None:
    async def test() -> None:
        server = Server(folder)
        server.pool.workers[0].state = State.LOADING
        health = await server.client.get("/health")
        assert health.status_code == 503
        worker = {"device": "cpu", "state": "loading", "pid": None, "restarts": 0, "failure": None}
        assert health.json() == {"status": "not ready", "model": str(folder), "workers": [worker]}
        response = await server.post(PAIR)
        assert (response.status_code, response.json()) == (503, {"error": "no worker is ready"})
        assert response.headers["retry-after"] == "1"
        server.pool.workers[0].state = State.READY
        health = await server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ready")

    run(test)


LONG = {"prompt": "", "response": "word " * LIMIT}
TURN = {"role": "assistant", "content": "bad"}
REFUSED: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "Invalid JSON"),
    "other fields": ({**PAIR, "x": 1}, 422, "x: Extra inputs are not permitted"),
    "too long": (LONG, 422, "tokens are more than the 64 that the model takes"),
    "empty": ({"prompt": "a", "response": ""}, 422, "the response has no token"),
    "offsets outside": ({**PAIR, "offsets": [[0, 6]]}, 422, "offsets[0]: got [0, 6]"),
    "offsets in disorder": ({**PAIR, "offsets": [[3, 5], [0, 3]]}, 422, "want them in order"),
    "a template's no": ({"messages": [{"role": "nobody"}, TURN]}, 422, "the chat template fails: who?"),
    "messages of the user": ({"messages": [{"role": "user", "content": "a"}]}, 422, "must end with one"),
    "no text": ({"messages": [{**TURN, "content": 1}]}, 422, '"content" must be a string'),
}


@pytest.mark.parametrize(("body", "status", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_requests_are_told_why(server: Server, body: Any, status: int, message: str) -> None:
    async def test() -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json; charset=utf-8"}
        response = await server.client.post("/score", content=content, headers=headers)
        assert response.status_code == status
        assert set(strict_json(response)) == {"error"}
        assert message in response.json()["error"]
        assert (await server.counted())[f"requests_total {status}"] == 1

    run(test)
    assert len(server.pool.queue) == 0


def test_one_of_a_list_that_cannot_be_read_costs_no_other(server: Server) -> None:
    async def test() -> None:
        both = asyncio.create_task(server.post([LONG, PAIR]))
        await server.has_waiting(1)
        server.answer(GOOD)
        response = await both
        assert response.status_code == 200
        first, second = strict_json(response)
        assert set(first) == {"error"}
        assert "more than the 64 that the model takes" in first["error"]
        assert second["score"] == GOOD.score
        response = await server.post([LONG, LONG])
        assert [set(one) for one in strict_json(response)] == [{"error"}] * 2

    run(test)


def test_a_source_with_signs_answers_token_rewards(server: Server) -> None:
    async def test() -> None:
        one = asyncio.create_task(server.post({**PAIR, "offsets": OFFSETS}))
        await server.has_waiting(1)
        server.answer(Scored(1.5, None, METRICS, [0.5, -0.5]))
        body = strict_json(await one)
        assert body == {"score": 1.5, "credit": None, "token_rewards": [0.5, -0.5], "metrics": METRICS}

    run(test)


def test_other_types_paths_and_methods(server: Server) -> None:
    async def test() -> None:
        response = await server.client.post(
            "/score", content=json.dumps(PAIR), headers={"content-type": "text/plain"}
        )
        assert response.status_code == 415
        assert "got 'text/plain', want 'application/json'" in response.json()["error"]
        assert (await server.client.post("/score", content=b"{}")).status_code == 415
        response = await server.client.get("/nothing")
        assert (response.status_code, response.json()) == (404, {"error": "Not Found"})
        assert (await server.client.get("/score")).status_code == 405
        paths = (await server.client.get("/openapi.json")).json()["paths"]
        assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
        assert set(paths["/health"]["get"]["responses"]) == {"200", "503"}
        schema = paths["/score"]["post"]
        body = schema["requestBody"]["content"]["application/json"]["schema"]
        assert "messages" in body["anyOf"][1]["properties"]
        assert {"200", "400", "413", "422", "429", "503"} <= set(schema["responses"])

    run(test)


async def stream(*parts: bytes, then: Awaitable[object] | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if then is not None:
        await then


def streamed(server: Server, parts: AsyncIterator[bytes]) -> Awaitable[httpx2.Response]:
    return server.client.post("/score", content=parts, headers={"content-type": "application/json"})


def test_a_long_body_is_refused_while_it_comes(folder: Path) -> None:
    server = Server(folder, max_body_bytes=1000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield b" " * 100

    async def test() -> None:
        nonlocal sent
        for _ in range(2 * BODIES):  # each gives back what it held
            sent = 0
            response = await streamed(server, endless())
            assert (response.status_code, response.json()["error"]) == (
                413,
                "the body is longer than 1000 bytes",
            )
            assert sent <= 1200
        announced = await server.client.post(
            "/score", content=b" " * 1001, headers={"content-type": "application/json"}
        )
        assert announced.status_code == 413

    run(test)


def test_bodies_together_are_bounded(folder: Path) -> None:
    server = Server(folder, max_body_bytes=1000)

    async def test() -> None:
        end = asyncio.Event()
        # All but a hundred bytes of the room, held by requests that do not end.
        held = [streamed(server, stream(b" " * 1000, then=end.wait())) for _ in range(BODIES - 1)]
        held.append(streamed(server, stream(b" " * 900, then=end.wait())))
        tasks = [asyncio.ensure_future(request) for request in held]
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            while (response := await streamed(server, stream(b" " * 101))).status_code != 429:
                assert response.status_code == 400  # those before it had not come yet
        assert response.headers["retry-after"] == "1"
        end.set()
        assert {(await task).status_code for task in tasks} == {400}
        assert (await streamed(server, stream(b" " * 1000))).status_code == 400

    run(test)


def test_a_body_that_never_ends_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "READ_SECONDS", 0.05)

    async def test() -> None:
        response = await streamed(server, stream(b"{", then=asyncio.Event().wait()))
        assert response.status_code == 408

    run(test)


def test_a_full_server_asks_to_come_again(folder: Path) -> None:
    server = Server(folder, max_pending=2)

    async def test() -> None:
        assert (await server.post([PAIR] * 3)).status_code == 413
        first = asyncio.create_task(server.post([PAIR, PAIR]))
        await server.has_waiting(2)
        refused = await server.post(PAIR)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json() == {"error": "2 completions are waiting already"}
        server.answer(GOOD, GOOD)
        assert (await first).status_code == 200
        again = asyncio.create_task(server.post(PAIR))
        await server.has_waiting(1)
        server.answer(GOOD)
        assert (await again).status_code == 200

    run(test)


def test_a_bad_request_gives_its_room_back(folder: Path) -> None:
    server = Server(folder, max_pending=1)

    async def test() -> None:
        for _ in range(3):
            assert (await server.post(LONG)).status_code == 422

    run(test)


def test_what_is_not_finite_is_an_error_in_valid_json(server: Server) -> None:
    async def test() -> None:
        both = asyncio.create_task(server.post([{**PAIR, "offsets": OFFSETS}] * 2))
        await server.has_waiting(2)
        server.answer(Scored(float("nan"), [1.0], METRICS), GOOD)
        response = await both
        assert response.status_code == 200
        bad, good = strict_json(response)
        assert bad == {"error": "the model's score or attention is not finite"}
        assert good["score"] == 1.5

    run(test)


def test_what_no_worker_could_score_is_not_lost_silently(server: Server) -> None:
    async def test() -> None:
        both = asyncio.create_task(server.post([PAIR, PAIR]))
        await server.has_waiting(2)
        server.answer(GOOD, Unavailable("the server stops"))
        response = await both
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json() == {"error": "the server stops"}

    run(test)


def test_whoever_hangs_up_is_not_scored(folder: Path) -> None:
    server = Server(folder, max_pending=1)

    async def test() -> None:
        body = json.dumps(PAIR).encode()
        hang_up = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": "/score",
            "raw_path": b"/score",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        request = asyncio.create_task(server.app(scope, receive, send))
        await server.has_waiting(1)
        hang_up.set()
        await request
        assert server.pool.queue.take(0) == []
        assert (await server.counted())["requests_total 499"] == 1
        again = asyncio.create_task(server.post(PAIR))  # there is room again
        await server.has_waiting(1)
        server.answer(GOOD)
        assert (await again).status_code == 200

    run(test)


def test_health_is_asked_either_way(server: Server) -> None:
    async def test() -> None:
        for state, status in ((State.READY, 200), (State.LOADING, 503)):
            server.pool.workers[0].state = state
            for method in ("GET", "HEAD"):
                assert (await server.client.request(method, "/health")).status_code == status

    run(test)


def test_metrics_count_what_happened(server: Server) -> None:
    async def test() -> None:
        counted = await server.counted()
        assert (counted["workers_ready"], counted["waiting_completions"]) == (1, 0)
        request = asyncio.create_task(server.post([PAIR, {**PAIR, "response": "great, great!"}, PAIR]))
        await server.has_waiting(3)
        assert (await server.counted())["waiting_completions"] == 3
        tokens = [item.tokens for item in waiting(server.pool)]
        fell_back = Scored(1.0, [1.0], {**METRICS, "fallback": True, "changed": True})
        server.answer(GOOD, fell_back, Scored(float("inf"), [1.0], METRICS))
        await request
        counted = await server.counted()
        assert counted["requests_total 200"] == counted["request_seconds_count"] == 1
        assert counted["batch_completions_sum"] == 3
        assert counted["batch_seconds_count"] == 1
        assert counted["tokens_total"] == sum(tokens)
        assert counted["padding_tokens_total"] == 3 * max(tokens) - sum(tokens) > 0
        assert counted["fallback_completions_total"] == 1
        assert counted["changed_completions_total"] == 1
        assert counted["nonfinite_completions_total"] == 1

    run(test)


def test_a_completion_must_fit_a_batch(folder: Path) -> None:
    server = Server(folder, max_batch_tokens=5)

    async def test() -> None:
        response = await server.post(PAIR)
        assert response.status_code == 422
        assert "more than the 5 that the model takes" in response.json()["error"]

    run(test)


def test_a_key_that_is_wanted(folder: Path) -> None:
    server = Server(folder, api_key="s3cret")

    async def asked(header: str | bytes | None) -> httpx2.Response:
        headers: list[tuple[Any, Any]] = [(b"content-type", b"application/json")]
        if header is not None:
            value = header.encode() if isinstance(header, str) else header
            headers.append((b"authorization", value))
        return await server.client.post("/score", content=b"{", headers=headers)

    async def test() -> None:
        for header in (
            None,
            "Bearer",
            "Bearer other",
            "s3cret",
            "Basic s3cret",
            "Bearer s3cret2",
            "Bearer \xe9",
        ):
            response = await asked(header)
            assert response.status_code == 401, header
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json() == {"error": "want the header 'Authorization: Bearer' with the API key"}
        for header in ("Bearer s3cret", "bearer  s3cret "):
            assert (await asked(header)).status_code == 400  # read, and no JSON
        assert (await server.counted())["requests_total 401"] == 7
        assert (await server.client.get("/health")).status_code == 200
        schema = (await server.client.get("/openapi.json")).json()
        assert schema["paths"]["/score"]["post"]["security"] == [{"HTTPBearer": []}]
        assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"

    run(test)


@pytest.mark.parametrize("key", ["", "two words", "é", "a\nb"])
def test_a_key_that_no_header_holds(key: str) -> None:
    with pytest.raises(ValueError, match="api_key: want visible ASCII characters"):
        ServeConfig(model="m", api_key=key)


def test_the_page_shows_the_description_and_fetches_nothing(server: Server) -> None:
    async def test() -> None:
        described = (await server.client.get("/openapi.json")).json()
        shown = await server.client.get("/docs")
        assert (shown.status_code, shown.headers["content-type"]) == (200, "text/html; charset=utf-8")
        page = html.unescape(shown.text)
        assert f"<h1>attnshape {attnshape.__version__}</h1>" in page
        [example] = re.findall(r"<pre>(.*)</pre>", page)  # on one line; schemas are longer
        completion = Completion.model_validate_json(example)
        assert completion.response is not None
        assert completion.offsets is not None
        assert [completion.response[a:b] for a, b in completion.offsets] == ["Not", " bad", "."]
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                assert f"{method.upper()} {path}" in page
                assert operation["description"].splitlines()[0] in page
        for name in described["components"]["schemas"]:
            assert f'id="{name}"' in page
        assert not re.search(r"<script|<link|<img|\bsrc=|url\(|@import", shown.text)
        assert all(to.startswith("#") for to in re.findall(r'href="([^"]*)"', shown.text))
        assert (await server.client.get("/redoc")).status_code == 404

    run(test)


class Listening:
    """The application behind its HTTP server, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.server = uvicorn.Server(http_config(Server(folder).app))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self) -> Listening:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.socket.getsockname(), timeout=PATIENCE)


def dribbled(connection: socket.socket, text: bytes, pause: float) -> bytes:
    """What is answered until the server hangs up, while ``text`` is sent byte by byte, again and again."""
    connection.settimeout(pause)
    answer = b""
    for byte in itertools.cycle(text):
        try:
            connection.send(bytes([byte]))
            part = connection.recv(4096)
            if not part:
                return answer
            answer += part
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
    raise AssertionError


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n"


def test_clients_that_dribble_are_cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(serve_app, "READ_SECONDS", 0.5)
    with Listening(folder) as server:
        with server.connect() as silent, server.connect() as head:
            assert dribbled(head, b"X-Header: x\r\n", 0.05) == b""
            assert silent.recv(1) == b""
        with server.connect() as body:
            body.sendall(HEAD + b"\r\n")
            answer = dribbled(body, b" ", 0.05)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the body took longer than 0.5 s" in answer
        with server.connect() as again:  # the head of a second request, over a connection that was kept
            for pause in (0.0, 0.8):  # between requests a client may wait
                time.sleep(pause)
                again.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += again.recv(4096)
                assert answer.startswith(b"HTTP/1.1 200 ")
            assert dribbled(again, b"X-Header: x\r\n", 0.05) == b""


def test_a_body_that_is_refused_is_not_read_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "HEAD_SECONDS", 0.5)
    with Listening(folder) as server, server.connect() as client:
        client.sendall(HEAD.replace(b"application/json", b"text/plain") + b"\r\n")
        assert dribbled(client, b" ", 0.05).startswith(b"HTTP/1.1 415 ")
