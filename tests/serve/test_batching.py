"""Batches by tokens: their size, their order, and what becomes of completions whose worker died."""

from __future__ import annotations

import threading
from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnshape.serve.batching import TWO_DIED, BatchQueue, Unavailable
from attnshape.text.model import Scored
from attnshape.text.reader import Example

AT_ONCE = 0.0
FOREVER = 60.0


def example(tokens: int, name: str = "") -> Example:
    return Example(name, "", [0] * tokens, [], [])


def lengths(queue: BatchQueue) -> list[int]:
    return [item.tokens for item in queue.take(AT_ONCE)]


def most_tokens(waiting: list[int], limit: int) -> int:
    """Of any run of neighbours in length that holds the first to come and fits, by trying them all."""
    ordered = sorted(waiting)
    place = ordered.index(waiting[0])
    runs = (
        ordered[start:end]
        for start, end in combinations_with_replacement(range(len(ordered) + 1), 2)
        if start <= place < end
    )
    return max(sum(run) for run in runs if len(run) == 1 or len(run) * run[-1] <= limit)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(40, 200))
def test_batches_are_full_hold_the_oldest_and_lose_nobody(arrivals: list[int], limit: int) -> None:
    queue = BatchQueue(limit, window=0)
    for i, tokens in enumerate(arrivals):
        queue.put(example(tokens, str(i)))
    waiting = dict(enumerate(arrivals))
    while waiting:
        batch = {int(item.example.prompt): item.tokens for item in queue.take(AT_ONCE)}
        assert len(batch) * max(batch.values()) <= limit
        assert min(waiting) in batch
        assert sum(batch.values()) == most_tokens(list(waiting.values()), limit)
        for i, tokens in batch.items():
            assert waiting.pop(i) == tokens
    assert queue.take(AT_ONCE) == []
    assert len(queue) == 0


def test_lengths_that_are_near_share_a_batch() -> None:
    queue = BatchQueue(100, window=0)
    for tokens in (10, 50, 9, 49, 11, 10):
        queue.put(example(tokens))
    assert lengths(queue) == [9, 10, 10, 11]
    assert lengths(queue) == [49, 50]


def test_the_oldest_decides_which_lengths() -> None:
    queue = BatchQueue(100, window=0)
    for tokens in (10, 50, 50, 50, 50):
        queue.put(example(tokens))
    # Beside the 10 fits one 50 at most; the pairs of 50 have to wait.
    assert lengths(queue) == [10, 50]
    assert lengths(queue) == [50, 50]
    assert lengths(queue) == [50]


def test_a_batch_waits_until_it_is_full() -> None:
    queue = BatchQueue(10, window=FOREVER)
    taken: list[int] = []
    taker = threading.Thread(target=lambda: taken.extend(item.tokens for item in queue.take(FOREVER)))
    taker.start()
    queue.put(example(5))
    taker.join(0.2)
    assert taken == []
    queue.put(example(5))
    taker.join(FOREVER / 2)
    assert taken == [5, 5]


def test_the_window_ends() -> None:
    queue = BatchQueue(10, window=0.01)
    queue.put(example(5))
    assert lengths(queue) == [5]


def test_who_gave_up_is_not_scored() -> None:
    queue = BatchQueue(100, window=0)
    futures = [queue.put(example(tokens)) for tokens in (1, 2, 3)]
    assert futures[1].cancel()
    assert lengths(queue) == [1, 3]
    assert not futures[0].cancel()  # too late: a worker has it
    assert queue.put(example(4)).cancel()
    assert lengths(queue) == []


def test_whoever_saw_a_worker_die_comes_next_and_alone_and_only_once() -> None:
    queue = BatchQueue(100, window=0)
    futures = [queue.put(example(tokens)) for tokens in (1, 2)]
    held = queue.take(AT_ONCE)
    assert [item.tokens for item in held] == [1, 2]
    younger = queue.put(example(3))
    queue.put_back(held, "SIGKILL")
    first = queue.take(AT_ONCE)
    second = queue.take(AT_ONCE)
    assert [[item.tokens for item in batch] for batch in (first, second)] == [[1], [2]]
    assert lengths(queue) == [3]
    queue.put_back(first, "SIGSEGV")
    assert futures[0].result(AT_ONCE) == f"{TWO_DIED}: SIGSEGV"
    second[0].answer.set_result(Scored(0.0, [], {}))
    assert futures[1].result(AT_ONCE).score == 0
    assert not younger.done()


def test_the_young_do_not_share_a_batch_with_a_retried_one() -> None:
    queue = BatchQueue(100, window=0)
    queue.put(example(1))
    held = queue.take(AT_ONCE)
    queue.put(example(2))
    taken = queue.take(AT_ONCE)
    queue.put(example(3))
    queue.put_back(held, "SIGKILL")
    queue.put_back(taken, "SIGKILL")
    assert [lengths(queue) for _ in range(3)] == [[2], [1], [3]]


def test_a_closed_queue_refuses_everybody() -> None:
    queue = BatchQueue(100, window=0)
    held_by_a_worker = queue.put(example(1))
    held = queue.take(AT_ONCE)
    waiting, gone = queue.put(example(2)), queue.put(example(3))
    gone.cancel()
    queue.close("the server stops")
    queue.put_back(held, "SIGKILL")
    for future in (held_by_a_worker, waiting, queue.put(example(4))):
        with pytest.raises(Unavailable, match="the server stops"):
            future.result(AT_ONCE)
    assert queue.take(FOREVER) == []
