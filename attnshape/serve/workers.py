"""One process per device that scores batches, and the thread that feeds it and starts it again."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import torch
from transformers.utils.logging import disable_progress_bar

from attnshape.score_fn import ScoreFn
from attnshape.scoring import Example, Scored, load_reward_model, score_examples
from attnshape.serve.batching import BatchQueue, Item
from attnshape.serve.metrics import Metrics
from attnshape.tap import AttentionTap

logger = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between a waiting thread's looks at its process and at the wish to stop."""
LONGEST_DELAY = 30.0
"""Seconds between attempts to start a worker that keeps dying; the first is after one."""


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"


@dataclass(frozen=True)
class Job:
    """What a worker process loads; ``threads`` are those of PyTorch on a CPU."""

    model: str
    device: str
    score_fn: ScoreFn
    layer: int
    threads: int


class LoadError(Exception):
    """A worker cannot load its model."""


def work(pipe: Connection, job: Job) -> None:
    """The process: says None when it is ready, or why it will not be; then a list of answers per batch.

    It ends with its pipe. Signals that end the server are the server's, which lets its workers finish.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    disable_progress_bar()
    try:
        model, _ = load_reward_model(job.model, job.device)
        job.score_fn.check(model.config.num_labels)
        tap = AttentionTap(model, job.layer)
    except Exception as error:
        pipe.send(f"{job.device}: {error}")
        return

    def score(examples: Sequence[Example]) -> list[Scored]:
        return score_examples(model, tap, examples, job.score_fn)

    with tap:
        try:
            # The first forward compiles kernels, and shows whether this model can be tapped at all.
            token = int(model.config.get_text_config().pad_token_id == 0)
            score([Example("", "a", [token, token], [1], [(0, 1)])])
        except Exception as error:
            pipe.send(f"{job.device}: {error}")
            return
        pipe.send(None)
        while True:
            try:
                examples = pipe.recv()
            except EOFError:
                return
            pipe.send(score_in_parts(examples, score))


def score_in_parts(
    examples: Sequence[Example], score: Callable[[Sequence[Example]], list[Scored]]
) -> list[Scored | str]:
    """In halves where the memory of the device does not hold them together."""
    try:
        return [*score(examples)]
    except torch.OutOfMemoryError as error:
        if len(examples) == 1:
            return [f"out of memory: {error}"]
    # Outside the handler, whose error keeps the tensors of the forward.
    torch.cuda.empty_cache()
    half = len(examples) // 2
    return [*score_in_parts(examples[:half], score), *score_in_parts(examples[half:], score)]


class Worker(threading.Thread):
    """Feeds one process from the queue, and starts it again when it dies."""

    def __init__(self, pool: Pool, job: Job) -> None:
        super().__init__(name=f"worker on {job.device}", daemon=True)
        self.pool, self.job = pool, job
        self.state = State.LOADING
        self.restarts = 0
        self.pid: int | None = None
        self._held: list[Item] = []

    def run(self) -> None:
        was_ready, delay = False, 0.0
        while not self.pool.stopping.wait(delay):
            try:
                with self._process() as (process, pipe):
                    self._await_load(process, pipe)
                    self.state, was_ready, delay = State.READY, True, 0.0
                    self._feed(process, pipe)
            except LoadError as error:
                self.state = State.DEAD
                if not was_ready:
                    self.pool.fail(str(error))
                    return
                logger.warning("%s cannot load: %s", self.name, error)
                self.pool.refuse_if_dead(str(error))
                delay = min(2 * delay + 1, LONGEST_DELAY)
            except Exception as error:
                self.state = State.DEAD
                logger.warning("%s died: %s", self.name, error)
                self.pool.metrics.retries.inc(sum(item.attempts == 1 for item in self._held))
            self.pool.queue.put_back(self._held)
            self._held = []
            if not self.pool.stopping.is_set():
                self.restarts += 1
                self.pool.metrics.restarts.labels(self.job.device).inc()

    @contextmanager
    def _process(self) -> Iterator[tuple[BaseProcess, Connection]]:
        pipe, end = multiprocessing.Pipe()
        # A forked process could not use a GPU, and would hold the other workers' pipes open.
        process = multiprocessing.get_context("spawn").Process(
            target=self.pool.target, args=(end, self.job), daemon=True
        )
        self.state = State.LOADING
        try:
            process.start()
            self.pid = process.pid
            end.close()
            yield process, pipe
        finally:
            self.pid = None
            if process.pid is not None:
                process.kill()
                process.join()
            end.close()
            pipe.close()

    def _await_load(self, process: BaseProcess, pipe: Connection) -> None:
        while not pipe.poll(POLL):
            if self.pool.stopping.is_set():
                return
        try:
            reason = pipe.recv()
        except (EOFError, OSError):
            process.join()
            reason = f"{self.job.device}: the process died with exit code {process.exitcode}"
        if reason is not None:
            raise LoadError(reason)

    def _feed(self, process: BaseProcess, pipe: Connection) -> None:
        """Until the server stops; raises when the process dies."""
        while not self.pool.stopping.is_set():
            self._held = self.pool.queue.take(POLL)
            if not process.is_alive():
                raise RuntimeError(f"exit code {process.exitcode}")
            if not self._held:
                continue
            started = time.monotonic()
            pipe.send([item.example for item in self._held])
            while not pipe.poll(POLL):
                if self.pool.stopping.is_set():
                    return
                if time.monotonic() - started > self.pool.batch_timeout:
                    raise TimeoutError(f"killed after {self.pool.batch_timeout:g} s without an answer")
            answers = pipe.recv()
            tokens = [item.tokens for item in self._held]
            self.pool.metrics.observe_batch(tokens, answers, time.monotonic() - started)
            for item, answer in zip(self._held, answers, strict=True):
                item.answer.set_result(answer)
            self._held = []


class Pool:
    """Context manager around a worker for each job, all of which take from one queue.

    Args:
        batch_timeout: seconds after which a worker that does not answer is killed.
        on_failure: called from a worker's thread when it cannot load its model at the start; ``failure`` then
            says why.
        target: what the processes run; it speaks as ``work`` does.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        queue: BatchQueue,
        metrics: Metrics,
        *,
        batch_timeout: float = 600.0,
        on_failure: Callable[[], None] = lambda: None,
        target: Callable[[Connection, Job], None] = work,
    ) -> None:
        self.queue, self.metrics, self.batch_timeout, self.target = queue, metrics, batch_timeout, target
        self.on_failure = on_failure
        self.stopping = threading.Event()
        self.failure: str | None = None
        self.workers = [Worker(self, job) for job in jobs]
        metrics.gauge("workers_ready", "Workers that can score.", lambda: self.count(State.READY))
        metrics.gauge("waiting_completions", "Completions in the queue.", lambda: len(queue))

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
