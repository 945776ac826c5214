"""The HTTP side: what is let in, what is refused, and how the server starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

import attnshape
from attnshape.serve.batching import BatchQueue
from attnshape.serve.metrics import Metrics
from attnshape.serve.page import page
from attnshape.serve.process import Job, work
from attnshape.serve.protocol import BODY, EXAMPLE, Answer, Completion, Failure, answer, parse
from attnshape.serve.workers import Pool, State
from attnshape.text.load import RewardModelConfig, check_device, load_reading
from attnshape.text.reader import Example, Reader

BODIES = 16
"""Times the largest body that all bodies being read may hold together."""
READ_SECONDS = 60.0
"""A body that is not here by then is refused: it keeps others out."""
HEAD_SECONDS = 20.0
"""Seconds after which a connection is closed whose request has no head yet, whose answer is not read on, or
that goes on sending what was refused; not at once, so that the refusal is read."""
RETRY_AFTER = {"Retry-After": "1"}
CHALLENGE = {"WWW-Authenticate": "Bearer"}
CLIENT_GONE = 499
"""In the metrics; nobody is there to see it."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RewardModelConfig):
    """What ``attnshape serve`` serves, and how much at once.

    Args:
        devices: one worker each; a device may be named several times.
        max_batch_tokens: of a batch, padding included; longer completions are refused.
        max_pending: completions that may wait or be scored at once; more are asked to come again.
        max_body_bytes: of a request.
        api_key: a token that ``POST /score`` wants as ``Authorization: Bearer``.
    """

    devices: tuple[str, ...] = ("cpu",)
    max_batch_tokens: int = 16384
    max_pending: int = 2048
    max_body_bytes: int = 4 << 20
    api_key: str | None = None

    def __post_init__(self) -> None:
        # It travels in a header, where spaces and what is not ASCII would be lost.
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("api_key: want visible ASCII characters without spaces, at least one")


class Door:
    """Lets requests in as far as there is room for them."""

    def __init__(self, max_pending: int, max_body_bytes: int) -> None:
        self.max_pending, self.max_body_bytes = max_pending, max_body_bytes
        self.pending = 0
        self._bytes = 0
        # One thread: a tokenizer is not to be shared, and this one needs little time beside the model.
        self._reading = ThreadPoolExecutor(1, "reading")

    @contextlib.asynccontextmanager
    async def completions(
        self, request: Request, reader: Reader
    ) -> AsyncIterator[tuple[list[Example | str], bool]]:
        """What the model reads of a request's completions, and whether they came as a list.

        Of one that cannot be scored it is the reason. There is room for them while the block is open.
        """
        with contextlib.ExitStack() as room:
            async with self.body(request) as body:
                try:
                    parsed = parse(body)
                    many = isinstance(parsed, list)
                    completions = parsed if isinstance(parsed, list) else [parsed]
                    room.enter_context(self.room_for(len(completions)))
                    examples = await asyncio.get_running_loop().run_in_executor(
                        self._reading, read_all, completions, reader
                    )
                    if isinstance(examples[0], str) and not many:
                        raise ValueError(examples[0])
                except SyntaxError as error:
                    raise HTTPException(400, str(error)) from error
                except ValueError as error:
                    raise HTTPException(422, str(error)) from error
            yield examples, many

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Of a request; counted while the block is open, and never held beyond the limit."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Also keeps web pages from posting here unasked: for this type a browser asks the server first.
        if media_type != "application/json":
            raise HTTPException(415, f"content-type: got {media_type!r}, want 'application/json'")
        too_long = HTTPException(413, f"the body is longer than {self.max_body_bytes} bytes")
        if int(request.headers.get("content-length", 0)) > self.max_body_bytes:
            raise too_long
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    async for part in request.stream():
                        self._bytes += len(part)
                        body += part
                        if len(body) > self.max_body_bytes:
                            raise too_long
                        if self._bytes > BODIES * self.max_body_bytes:
                            raise HTTPException(429, "too many requests at once", RETRY_AFTER)
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {READ_SECONDS:g} s") from None
            yield bytes(body)
        finally:
            self._bytes -= len(body)

    @contextlib.contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """For so many completions, until they are answered."""
        if count > self.max_pending:
            raise HTTPException(413, f"got {count} completions, want at most {self.max_pending} in a request")
        if self.pending + count > self.max_pending:
            raise HTTPException(429, f"{self.pending} completions are waiting already", RETRY_AFTER)
        self.pending += count
        try:
            yield
        finally:
            self.pending -= count


def build(
    config: ServeConfig,
    on_failure: Callable[[], None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
) -> tuple[FastAPI, Pool]:
    """The application, and the workers that it needs, not yet started.

    Raises:
        ValueError: there is no such model or device, or the model's tokenizer is not a fast one.
    """
    for device in dict.fromkeys(config.devices):
        check_device(device)
    tokenizer, reading, most = load_reading(config.model, trust_remote_code=config.trust_remote_code)
    most = config.max_batch_tokens if most is None else min(most, config.max_batch_tokens)
    reader = Reader(tokenizer, reading, most)
    cpus = config.devices.count("cpu")
    threads = max(1, torch.get_num_threads() // max(1, cpus))
    jobs = [Job(config, device, threads, config.max_batch_tokens) for device in config.devices]
    targets = [(job.device, functools.partial(work, job)) for job in jobs]
    queue = BatchQueue(config.max_batch_tokens)
    pool = Pool(targets, queue, Metrics(), on_failure=on_failure, on_ready=on_ready)
    return create_app(config, reader, pool), pool


def create_app(config: ServeConfig, reader: Reader, pool: Pool) -> FastAPI:
    """The endpoints in front of a pool."""
    # FastAPI's pages of documentation fetch their scripts from elsewhere; /docs is one of our own.
    app = FastAPI(
        title="attnshape",
        version=attnshape.__version__,
        description="Score and credit per token of a reward model.",
        docs_url=None,
        redoc_url=None,
    )
    door = Door(config.max_pending, config.max_body_bytes)
    pool.metrics.gauge("pending_completions", "Completions accepted, not yet answered.", lambda: door.pending)

    async def scored(request: Request) -> Response:
        if config.api_key is not None and not is_let_in(request, [config.api_key]):
            raise HTTPException(401, "want the header 'Authorization: Bearer' with the API key", CHALLENGE)
        if not pool.count(State.READY):
            raise HTTPException(503, "no worker is ready", RETRY_AFTER)
        async with door.completions(request, reader) as (examples, many):
            answers = await _answers(request, examples, pool.queue)
        return JSONResponse(answers if many else answers[0])

    @app.post(
        "/score",
        response_model=Answer | Failure | list[Answer | Failure],
        responses={status: {"model": Failure} for status in (400, 401, 408, 413, 415, 422, 429, 503)},
        dependencies=[] if config.api_key is None else [Depends(HTTPBearer(auto_error=False))],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": BODY, "example": EXAMPLE}},
            }
        },
    )
    async def score(request: Request) -> Response:
        """Score and credit of one completion, or of each of a list.

        A completion that has no score (too long, not finite) gets an error in its place; alone, status 422
        where the model cannot read it.
        """
        started, status = time.monotonic(), 500
        try:
            response = await scored(request)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = CLIENT_GONE
            return Response(status_code=status)
        finally:
            pool.metrics.requests.labels(str(status)).inc()
            pool.metrics.request_seconds.observe(time.monotonic() - started)

    @app.head("/health", include_in_schema=False)  # as some load balancers ask
    @app.get("/health", responses={503: {"description": "No worker is ready."}})
    async def health() -> Response:
        """Whether requests can be answered: 200, or 503 while the model is loaded."""
        ready = pool.count(State.READY) > 0
        workers = [
            {
                "device": worker.device,
                "state": worker.state,
                "pid": worker.pid,
                "restarts": worker.restarts,
                "failure": worker.failure,
            }
            for worker in pool.workers
        ]
        body = {"status": "ready" if ready else "not ready", "model": config.model, "workers": workers}
        return JSONResponse(body, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(pool.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page(app.openapi()))

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return app


def is_let_in(request: Request, api_keys: Sequence[str]) -> bool:
    """Whether it brings one of the keys."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in api_keys]
    return kind.lower() == "bearer" and any(matches)


def read_all(completions: Sequence[Completion], reader: Reader) -> list[Example | str]:
    """What the model reads, or why a completion cannot be scored."""
    examples: list[Example | str] = []
    for completion in completions:
        try:
            examples.append(completion.read(reader))
        except ValueError as error:
            examples.append(str(error))
    return examples


async def _answers(
    request: Request, examples: Sequence[Example | str], queue: BatchQueue
) -> list[dict[str, Any]]:
    """Raises ClientDisconnect when nobody waits any more; what no worker has is then taken out."""
    waiting = {
        i: asyncio.wrap_future(queue.put(example))
        for i, example in enumerate(examples)
        if not isinstance(example, str)
    }
    futures = list(waiting.values())
    answered = asyncio.create_task(_all_of(futures))
    gone = asyncio.create_task(hung_up(request))
    try:
        await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise ClientDisconnect
        errors = [str(error) for future in futures if (error := future.exception()) is not None]
        if errors:
            raise HTTPException(503, errors[0], RETRY_AFTER)
        return [
            {"error": example} if isinstance(example, str) else answer(example, waiting[i].result())
            for i, example in enumerate(examples)
        ]
    finally:
        tasks: list[asyncio.Future[Any]] = [answered, gone, *futures]
        for task in tasks:
            task.cancel()


async def _all_of(futures: Sequence[asyncio.Future[Any]]) -> None:
    if futures:
        await asyncio.wait(futures)


async def hung_up(request: Request) -> None:
    """Returns when nobody waits for the answer any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def run(config: ServeConfig, host: str, port: int, on_listen: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM, then answers what was accepted and returns.

    Args:
        port: 0 for any free one.
        on_listen: called with the address, from another thread, when the first worker is ready to answer.

    Raises:
        ValueError, OSError: as ``build``; the address cannot be had; a worker cannot load the model.
    """
    said = threading.Event()

    def stop() -> None:
        server.should_exit = True

    def ready() -> None:
        while not (server.started or server.should_exit):
            time.sleep(0.01)
        if server.started and not said.is_set():
            said.set()
            on_listen(f"http://{shown}:{listener.getsockname()[1]}")

    app, pool = build(config, stop, ready)
    server = uvicorn.Server(http_config(app))
    shown = f"[{host}]" if ":" in host else host
    try:
        listener = socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise OSError(f"http://{shown}:{port}: {error.strerror or error}") from error
    with listener, _signals_obeyed(), pool:
        server.run(sockets=[listener])
    if pool.failure is not None:
        raise ValueError(pool.failure)


def http_config(app: FastAPI) -> uvicorn.Config:
    """Of the HTTP server in front of the application."""
    return uvicorn.Config(
        app,
        http=Impatient,
        log_level="warning",
        access_log=False,
        lifespan="off",
        # Kept open for longer than clients do, which then never send into a connection that is just closing.
        timeout_keep_alive=75,
    )


class Impatient(H11Protocol):
    """HTTP that closes connections of clients who dribble: bytes of a request's head, or an answer unread."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._wait_no_more()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@contextlib.contextmanager
def _signals_obeyed() -> Iterator[None]:
    """uvicorn ends at these signals and then raises them again, when all they asked for is done."""
    handlers = {name: signal.signal(name, lambda *_: None) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
