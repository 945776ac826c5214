"""Worker processes that die, hang or cannot load, and what becomes of the completions they held."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.playing_worker import DIES_LOADING, HUNG, LOADS_NO_MORE, Act, play

from attnshape.serve.batching import TWO_DIED, BatchQueue, Unavailable
from attnshape.serve.metrics import Metrics
from attnshape.serve.workers import Pool, State

PATIENCE = 120.0


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def pool(notes: Path) -> Iterator[Pool]:
    targets = [("cpu", functools.partial(play, notes))]
    with Pool(targets, BatchQueue(100, window=0), Metrics()) as pool:
        wait_for(lambda: pool.count(State.READY))
        yield pool


def put(pool: Pool, act: Act) -> Future[Any]:
    completion: Any = SimpleNamespace(input_ids=[act])
    return pool.queue.put(completion)


def restarts(pool: Pool) -> int:
    return pool.workers[0].restarts


def test_who_kills_two_workers_is_answered_and_its_neighbours_are_scored(pool: Pool) -> None:
    with pool.queue._changed:  # in one batch
        neighbours = [put(pool, Act.ANSWER), put(pool, Act.ANSWER)]
        killer = put(pool, Act.DIE)
    assert killer.result(PATIENCE) == f"{TWO_DIED}: SIGKILL, as when memory runs out"
    assert pool.workers[0].failure == "SIGKILL, as when memory runs out"
    assert [future.result(PATIENCE) for future in neighbours] == ["answered", "answered"]
    wait_for(lambda: restarts(pool) == 2)
    text = pool.metrics.text().decode()
    assert 'attnshape_worker_restarts_total{device="cpu"} 2.0' in text
    assert "attnshape_retried_completions_total 3.0" in text


def test_a_worker_that_hangs_is_killed_and_its_completion_scored(
    pool: Pool, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It may have failed to load meanwhile, whereupon whoever waits is refused.
    wait_for(lambda: pool.count(State.READY))
    before = restarts(pool)
    held = put(pool, Act.HANG_ONCE)
    wait_for((notes / HUNG).exists)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "batch_timeout", 0.0)
        wait_for(lambda: restarts(pool) == before + 1)
    assert held.result(PATIENCE) == "answered"


def test_an_idle_worker_that_dies_is_started_again(pool: Pool) -> None:
    wait_for(lambda: pool.count(State.READY))
    before, pid = restarts(pool), pool.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: restarts(pool) == before + 1 and pool.count(State.READY))
    assert pool.workers[0].pid not in (None, pid)
    assert put(pool, Act.ANSWER).result(PATIENCE) == "answered"


def test_nobody_waits_for_workers_that_may_never_come_back(pool: Pool, notes: Path) -> None:
    with pytest.raises(Unavailable, match=LOADS_NO_MORE):
        put(pool, Act.DIE_AND_LOAD_NO_MORE).result(PATIENCE)
    assert pool.count(State.READY) == 0
    assert pool.failure is None
    (notes / LOADS_NO_MORE).unlink()  # it goes on trying
    wait_for(lambda: pool.count(State.READY))


@pytest.mark.parametrize(
    ("note", "reason"),
    [(LOADS_NO_MORE, LOADS_NO_MORE), (DIES_LOADING, "cpu: the process died: exit code 3")],
)
def test_a_worker_that_cannot_load_at_the_start_fails_the_pool(
    tmp_path: Path, note: str, reason: str
) -> None:
    (tmp_path / note).touch()
    failures: list[bool] = []
    targets = [("cpu", functools.partial(play, tmp_path))]
    with Pool(targets, BatchQueue(100), Metrics(), on_failure=lambda: failures.append(True)) as pool:
        with pytest.raises(Unavailable, match=reason):
            put(pool, Act.ANSWER).result(PATIENCE)
        wait_for(lambda: failures)
    assert pool.failure == reason


def test_a_process_that_cannot_be_started_fails_the_pool() -> None:
    failures: list[bool] = []
    targets = [("cpu", lambda pipe: None)]  # a process that is spawned cannot be given it
    with Pool(targets, BatchQueue(100), Metrics(), on_failure=lambda: failures.append(True)) as pool:
        wait_for(lambda: failures)
    assert (pool.failure or "").startswith("cpu: no process can be started: ")
    assert pool.workers[0].restarts == 0


def test_attempts_to_start_a_process_again_come_ever_less_often(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for(lambda: pool.count(State.READY))
    waits: list[float] = []
    stopping = pool.stopping

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return stopping.wait(0.01)

    def no_pipe() -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "stopping", SimpleNamespace(wait=wait, is_set=stopping.is_set))
        patch.setattr(multiprocessing, "Pipe", no_pipe)
        killed = put(pool, Act.DIE)
        with pytest.raises(Unavailable, match="cpu: no process can be started: too many open files"):
            killed.result(PATIENCE)
        wait_for(lambda: len(waits) > 7)
    assert waits[:7] == [0.0, 1.0, 3.0, 7.0, 15.0, 30.0, 30.0]
    wait_for(lambda: pool.count(State.READY))
    assert put(pool, Act.ANSWER).result(PATIENCE) == "answered"


def test_a_pool_that_stops_answers_what_its_workers_held(tmp_path: Path) -> None:
    with Pool([("cpu", functools.partial(play, tmp_path))], BatchQueue(100), Metrics()) as pool:
        held = put(pool, Act.HANG_ONCE)
        wait_for((tmp_path / HUNG).exists)
        pid = pool.workers[0].pid
    with pytest.raises(Unavailable, match="the server stops"):
        held.result(0)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


SERVER = """
import functools, pathlib, sys, time
from support.playing_worker import play
from attnshape.serve.batching import BatchQueue
from attnshape.serve.metrics import Metrics
from attnshape.serve.workers import Pool, State
with Pool([("cpu", functools.partial(play, pathlib.Path(sys.argv[1])))], BatchQueue(100), Metrics()) as pool:
    while not pool.count(State.READY):
        time.sleep(0.01)
    print(pool.workers[0].pid, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_workers_do_not_outlive_a_killed_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path), str(PATIENCE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        worker = int(server.stdout.readline())
        assert is_running(worker)
        server.kill()
    wait_for(lambda: not is_running(worker))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
