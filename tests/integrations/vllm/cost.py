"""What rows cost on a CPU: ``python -m integrations.vllm cost``, on a machine that does nothing else.

Batches with and without rows take turns; what the plugin adds to a step in which nobody asks is timed alone.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from integrations.vllm import models
from integrations.vllm.inside import Cell, Run, pooler_of
from transformers import LlamaConfig, LlamaForSequenceClassification

from attnshape.bench.machine import machine_facts
from attnshape.integrations.vllm.pages import Tokens

ROUNDS, REQUESTS, TOKENS, REPEATS = 4, 4, 256, 2000
SHAPE = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "num_labels": 1,
}


def make(path: Path) -> None:
    if not (path / "config.json").exists():
        torch.manual_seed(0)
        models.tokenizer().save_pretrained(path)
        LlamaForSequenceClassification(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(path)


class Seconds(NamedTuple):
    wall: float
    cpu: float
    """Of all threads: what a machine takes that does something else beside."""


def seconds(call: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def clocked(call: Callable[..., Any], times: list[Seconds]) -> Callable[..., Any]:
    """The call, whose seconds are kept."""

    def timed(*arguments: Any) -> Any:
        found: list[Any] = []
        times.append(seconds(lambda: found.append(call(*arguments))))
        return found[0]

    return timed


def by_clock(times: Sequence[Seconds]) -> dict[str, list[float]]:
    return {name: [getattr(x, name) for x in times] for name in Seconds._fields}


def share(part: Sequence[Seconds], whole: Sequence[Seconds]) -> dict[str, float]:
    """Of medians."""
    parts, wholes = by_clock(part), by_clock(whole)
    return {name: statistics.median(parts[name]) / statistics.median(wholes[name]) for name in parts}


def peak() -> int:
    """Of this process' memory, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.inference_mode()  # as the engine calls them
def per_step(pooler: Any, run: Run) -> dict[str, float]:
    """Microseconds that tap and pooler add to a step of this batch in which nobody asks; medians."""
    tap, kept = pooler.tap, []
    engine = tap._forward

    def watched(*arguments: Any, **options: Any) -> Any:
        kept.append((arguments, options))
        return engine(*arguments, **options)

    tap._forward = watched
    run.data(lambda i: False)
    arguments, options = kept[-1]
    tap._forward = lambda *_, **__: None
    of_tap = by_clock([seconds(lambda: tap._tapped(*arguments, **options)) for _ in range(REPEATS)])
    tap._forward = engine
    base = type(pooler).__mro__[1]
    forward, base.forward = base.forward, lambda self, hidden_states, metadata: []
    metadata = SimpleNamespace(pooling_params=[SimpleNamespace(extra_kwargs=None)] * REQUESTS)
    try:
        of_pooler = by_clock([seconds(lambda: pooler.forward(None, metadata)) for _ in range(REPEATS)])
    finally:
        base.forward = forward
    return {
        name: 1e6 * (statistics.median(of_tap[name]) + statistics.median(of_pooler[name])) for name in of_tap
    }


def main() -> None:
    folder, out = Path(sys.argv[2]), Path(sys.argv[3])
    make(folder / "cost")
    models.KINDS["cost"] = (None, None, {})
    options = {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "max_num_batched_tokens": REQUESTS * TOKENS,
    }
    run = Run(Cell("cost", options), folder)
    run.prompts = [ids * TOKENS for ids in ([3], [4], [5], [6])]
    (pooler,) = run.llm.apply_model(pooler_of)
    pooler.rows = 10**6 + 1  # past the first, which are all checked
    in_rows: list[Seconds] = []
    in_gather: list[Seconds] = []
    pooler._rows = clocked(pooler._rows, in_rows)
    Tokens.of = clocked(Tokens.of, in_gather)  # type: ignore[method-assign]
    for _ in range(2):
        run.data(lambda i: False)
    before = peak()
    run.data(lambda i: True)
    grown = peak() - before
    with_rows, without = [], []
    for _ in range(ROUNDS):
        with_rows.append(seconds(lambda: run.data(lambda i: True)))
        without.append(seconds(lambda: run.data(lambda i: False)))
    assert len(in_rows) == len(in_gather) == ROUNDS + 1, "a batch is one step"
    found = {
        "machine": machine_facts(torch.device("cpu")),
        "model": SHAPE,
        "requests": REQUESTS,
        "tokens": TOKENS,
        "dtype": "float32",
        "batch_with_rows_s": by_clock(with_rows),
        "batch_without_s": by_clock(without),
        "rows_s": by_clock(in_rows[1:]),
        "gather_s": by_clock(in_gather[1:]),
        "rows_share": share(in_rows[1:], without),
        "peak_memory_grown_kib": grown,
        "step_without_asking_us": per_step(pooler, run),
    }
    out.write_text(json.dumps({"loading": run.loading, **found}))


if __name__ == "__main__":
    main()
