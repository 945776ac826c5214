"""The queue between requests and workers: batches by tokens, padding included, the oldest request first."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnshape.text.model import Scored
    from attnshape.text.reader import Example


TWO_DIED = "two workers died while scoring it"


class Unavailable(Exception):
    """An accepted completion cannot be scored now; asked again later it may be."""


@dataclass(eq=False)
class Item:
    """A completion that waits for its score."""

    example: Example
    answer: Future[Scored | str] = field(default_factory=Future)
    """``Unavailable``, or the score, or why this completion has none."""
    arrived: float = field(default_factory=time.monotonic)
    attempts: int = 0
    """Batches it was in."""

    @property
    def tokens(self) -> int:
        return len(self.example.input_ids)


class BatchQueue:
    """Completions in the order of arrival, taken in batches by the workers' threads.

    Args:
        max_batch_tokens: of a batch, padding to its longest completion included; none may be longer.
        window: seconds that a completion waits for others to fill its batch.
    """

    def __init__(self, max_batch_tokens: int, *, window: float = 0.005) -> None:
        self.max_batch_tokens, self.window = max_batch_tokens, window
        self._waiting: list[Item] = []
        self._changed = threading.Condition()
        self._closed: str | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, example: Example) -> Future[Scored | str]:
        """Cancelling the future takes the completion out again, if no worker has it."""
        item = Item(example)
        with self._changed:
            if self._closed is not None:
                item.answer.set_exception(Unavailable(self._closed))
            else:
                self._waiting.append(item)
                self._changed.notify_all()
        return item.answer

    def put_back(self, items: Sequence[Item], reason: str) -> None:
        """After their worker died of ``reason``. Whoever has seen a second one die is answered."""
        with self._changed:
            again = [item for item in items if item.attempts < 2 and self._closed is None]
            self._waiting[:0] = again
            self._changed.notify_all()
        for item in items:
            if item in again:
                continue
            if self._closed is not None:
                item.answer.set_exception(Unavailable(self._closed))
            else:  # a client that came again would kill a third
                item.answer.set_result(f"{TWO_DIED}: {reason}")

    def take(self, timeout: float) -> list[Item]:
        """A batch, or nothing if none came within ``timeout`` seconds.

        It holds the oldest completion, so that none starves, and those nearest to it in length, as many as
        bring most tokens. One whose worker died comes alone: it may be what killed it.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed is not None, timeout):
                return []
            if self._waiting:
                patience = self._waiting[0].arrived + self.window - time.monotonic()
                self._changed.wait_for(self._is_full, max(patience, 0))
            self._waiting = [item for item in self._waiting if not item.answer.cancelled()]
            if not self._waiting:
                return []
            batch = self._choose()
            chosen = set(batch)
            self._waiting = [item for item in self._waiting if item not in chosen]
        for item in batch:
            item.attempts += 1
        # On its first attempt a completion may just have been cancelled; after that it cannot be.
        return [item for item in batch if item.attempts > 1 or item.answer.set_running_or_notify_cancel()]

    def refuse(self, reason: str) -> None:
        """Answers all that wait with ``Unavailable``."""
        with self._changed:
            items, self._waiting = self._waiting, []
        for item in items:
            if item.attempts or item.answer.set_running_or_notify_cancel():
                item.answer.set_exception(Unavailable(reason))

    def close(self, reason: str) -> None:
        """Refuses all that wait and all that come."""
        with self._changed:
            self._closed = reason
            self._changed.notify_all()
        self.refuse(reason)

    def _is_full(self) -> bool:
        tokens = sum(item.tokens for item in self._waiting)
        return not self._waiting or tokens >= self.max_batch_tokens

    def _choose(self) -> list[Item]:
        oldest = self._waiting[0]
        if oldest.attempts:  # those that come again stand before all others
            return [oldest]
        items = sorted(self._waiting, key=lambda item: item.tokens)
        tokens_before = [0, *itertools.accumulate(item.tokens for item in items)]
        place = items.index(oldest)
        best, most = [oldest], oldest.tokens
        for end in range(place + 1, len(items) + 1):
            start = max(0, end - self.max_batch_tokens // items[end - 1].tokens)
            if start > place:
                break
            if (tokens := tokens_before[end] - tokens_before[start]) > most:
                best, most = items[start:end], tokens
        return best
