"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from attnshape.text.model import Scored

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own; every name begins with ``attnshape_``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"attnshape_{name}", help, labels, registry=self._registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"attnshape_{name}", help, buckets=buckets, registry=self._registry)

        self.requests = counter("requests", "Requests answered, by HTTP status.", "status")
        self.request_seconds = histogram("request_seconds", "From a request to its answer.", SECONDS)
        self.batches = histogram("batch_completions", "Completions in a batch.", SIZES)
        self.batch_seconds = histogram("batch_seconds", "A batch in its worker.", SECONDS)
        self.tokens = counter("tokens", "Tokens scored.")
        self.padding = counter("padding_tokens", "Padding scored beside them.")
        self.fallbacks = counter("fallback_completions", "Completions whose response got no attention.")
        self.changed = counter("changed_completions", "Completions that the chat template changed.")
        self.nonfinite = counter("nonfinite_completions", "Completions with a score or credit not finite.")
        self.retries = counter("retried_completions", "Completions scored again after their worker died.")
        self.restarts = counter("worker_restarts", "Workers that died and were started again.", "device")

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A value that is read when Prometheus asks."""
        Gauge(f"attnshape_{name}", help, registry=self._registry).set_function(read)

    def observe_batch(self, lengths: Sequence[int], answers: Sequence[Scored | str], seconds: float) -> None:
        """A batch of completions of these lengths in tokens was scored."""
        self.batches.observe(len(lengths))
        self.batch_seconds.observe(seconds)
        self.tokens.inc(sum(lengths))
        self.padding.inc(max(lengths) * len(lengths) - sum(lengths))
        scored = [answer for answer in answers if not isinstance(answer, str)]
        self.fallbacks.inc(sum(bool(answer.metrics["fallback"]) for answer in scored))
        self.changed.inc(sum(bool(answer.metrics["changed"]) for answer in scored))
        self.nonfinite.inc(sum(not answer.finite for answer in scored))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
