"""One process per device that scores batches, and the thread that feeds it and starts it again."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from attnshape.serve.batching import BatchQueue, Item
from attnshape.serve.metrics import Metrics

if TYPE_CHECKING:
    from attnshape.text.model import Scored

Target: TypeAlias = Callable[[Connection], None]
"""What a process runs, such as ``process.work``."""

logger = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between a waiting thread's looks at its process and at the wish to stop."""
LONGEST_DELAY = 30.0
"""Seconds between attempts at a process that could not be started, or could not load its model; the first is
after one."""


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"


class LoadError(Exception):
    """A worker has no process, or one that cannot load its model."""


class Died(Exception):
    """A worker's process ended; the message says of what."""


class Worker(threading.Thread):
    """Feeds one process from the queue, and starts it again when it dies."""

    def __init__(self, pool: Pool, device: str, target: Target) -> None:
        super().__init__(name=f"worker on {device}", daemon=True)
        self.pool, self.device, self.target = pool, device, target
        self.state = State.LOADING
        self.restarts = 0
        self.pid: int | None = None
        self.failure: str | None = None
        """Why the last process ended."""
        self._held: list[Item] = []

    def run(self) -> None:
        was_ready, delay = False, 0.0
        while not self.pool.stopping.wait(delay):
            try:
                with self._process() as (process, pipe):
                    self._await_load(process, pipe)
                    self.state, was_ready, delay = State.READY, True, 0.0
                    self.pool.on_ready()
                    self._feed(process, pipe)
            except LoadError as error:
                self.state, self.failure = State.DEAD, str(error)
                if not was_ready:
                    self.pool.fail(str(error))
                    return
                logger.warning("%s cannot load: %s", self.name, error)
                self.pool.refuse_if_dead(str(error))
                delay = min(2 * delay + 1, LONGEST_DELAY)
            except Exception as error:
                self.state, self.failure = State.DEAD, str(error)
                logger.warning("%s died: %s", self.name, error)
                self.pool.metrics.retries.inc(sum(item.attempts == 1 for item in self._held))
            self.pool.queue.put_back(self._held, self.failure or "")
            self._held = []
            if not self.pool.stopping.is_set():
                self.restarts += 1
                self.pool.metrics.restarts.labels(self.device).inc()

    @contextmanager
    def _process(self) -> Iterator[tuple[BaseProcess, Connection]]:
        self.state = State.LOADING
        with ExitStack() as pipes:
            try:
                pipe, end = (pipes.enter_context(x) for x in multiprocessing.Pipe())
                # A forked process could not use a GPU, and would hold the other workers' pipes open.
                context = multiprocessing.get_context("spawn")
                process = context.Process(target=self.target, args=(end,), daemon=True)
                process.start()
            except Exception as error:
                raise LoadError(f"{self.device}: no process can be started: {error}") from error
            end.close()
            self.pid = process.pid
            try:
                yield process, pipe
            finally:
                self.pid = None
                process.kill()
                process.join()

    def _await_load(self, process: BaseProcess, pipe: Connection) -> None:
        while not pipe.poll(POLL):
            if self.pool.stopping.is_set():
                return
        try:
            reason = pipe.recv()
        except (EOFError, OSError):
            reason = f"{self.device}: the process died: {_end_of(process)}"
        if reason is not None:
            raise LoadError(reason)

    def _feed(self, process: BaseProcess, pipe: Connection) -> None:
        """Until the server stops; raises when the process dies."""
        while not self.pool.stopping.is_set():
            self._held = self.pool.queue.take(POLL)
            if not process.is_alive():
                raise Died(_end_of(process))
            if not self._held:
                continue
            started = time.monotonic()
            try:
                answers = self._ask(pipe, started)
            except (EOFError, ConnectionError):
                raise Died(_end_of(process)) from None
            if answers is None:
                return
            if isinstance(answers, str):
                raise Died(answers)
            tokens = [item.tokens for item in self._held]
            self.pool.metrics.observe_batch(tokens, answers, time.monotonic() - started)
            for item, answer in zip(self._held, answers, strict=True):
                item.answer.set_result(answer)
            self._held = []

    def _ask(self, pipe: Connection, started: float) -> list[Scored | str] | str | None:
        """Answers of the process to what is held, why it ends, or None if the server stops meanwhile."""
        pipe.send([item.example for item in self._held])
        while not pipe.poll(POLL):
            if self.pool.stopping.is_set():
                return None
            if time.monotonic() - started > self.pool.batch_timeout:
                raise TimeoutError(f"killed after {self.pool.batch_timeout:g} s without an answer")
        answers: list[Scored | str] | str = pipe.recv()
        return answers


def _end_of(process: BaseProcess) -> str:
    """How a process ended that has closed its pipe."""
    process.join()
    code = process.exitcode or 0
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as when memory runs out" if name == "SIGKILL" else name


class Pool:
    """Context manager around workers that take from one queue.

    Args:
        targets: the device of each worker, which names it, and what its process runs.
        batch_timeout: seconds after which a worker that does not answer is killed.
        on_failure: called from a worker's thread when it has no process or no model at the start;
            ``failure`` then says why.
        on_ready: called from a worker's thread whenever it is ready.
    """

    def __init__(
        self,
        targets: Sequence[tuple[str, Target]],
        queue: BatchQueue,
        metrics: Metrics,
        *,
        batch_timeout: float = 600.0,
        on_failure: Callable[[], None] = lambda: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue, self.metrics = queue, metrics
        self.batch_timeout, self.on_failure, self.on_ready = batch_timeout, on_failure, on_ready
        self.stopping = threading.Event()
        self.failure: str | None = None
        self.workers = [Worker(self, device, target) for device, target in targets]
        metrics.gauge("workers_ready", "Workers that can score.", lambda: self.count(State.READY))
        metrics.gauge("waiting_completions", "Completions in no batch yet.", lambda: len(queue))

    def count(self, *states: State) -> int:
        """Workers in one of these states."""
        return sum(worker.state in states for worker in self.workers)

    def __enter__(self) -> Pool:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.queue.close("the server stops")
        for worker in self.workers:
            worker.join()

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.queue.refuse(reason)
        self.on_failure()

    def refuse_if_dead(self, reason: str) -> None:
        """Nobody shall wait for workers that may never come."""
        if not self.count(State.READY, State.LOADING):
            self.queue.refuse(reason)
