"""Measures every budget on this machine, beside a copy and a read-only pass over the same bytes.

``python -m benchmarks.budgets OUT [--device cpu] [--quick] [--once]`` writes ``OUT/budgets.json`` and
``budgets.md``. A result is first compared with the PyTorch backend in float64, and not timed if it is wrong.
The exit status is 1 if one was wrong or could not be had; a budget that is missed is a result. ``--quick``:
small shapes, to exercise all of it; ``--once``: nothing is timed, so that kernels are compiled ahead.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import attnshape
from attnshape.compare import mapped
from attnshape.tolerance import credit_bound, error_fraction, gae_bound, kl_bound, reward_bound
from benchmarks.cases import (
    COLUMN,
    GAMMA,
    KL_COEF,
    LAM,
    SMALL,
    SWEEPS,
    Budget,
    Case,
    Shape,
    budget_cases,
    outputs_of,
    random_arguments,
)
from benchmarks.cost_model import Gpu, estimate
from benchmarks.timing import Timing, copy_calls, host_seconds, read_calls, seconds_once, sets_for, time_calls

Row = dict[str, Any]


class Bench:
    """One run: what it measured so far, and on what."""

    def __init__(self, device: torch.device, quick: bool, once: bool) -> None:
        self.device, self.quick, self.once = device, quick, once
        self.rows: list[Row] = []
        self.gpu = Gpu()
        if not once:
            self.gpu = self.gpu._replace(bandwidth=self._bandwidth())
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            self.gpu = self.gpu._replace(processors=processors)

    def _bandwidth(self) -> float:
        size = 1 << 20 if self.quick else 1 << 31
        return size / self.seconds(copy_calls(size, 2, self.device))

    def timed(self, calls: list[Callable[[], Any]]) -> Timing:
        return time_calls(calls, self.device, 0.002 if self.quick else 0.1)

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        return self.timed(calls).seconds

    def add(self, name: str, measure: Callable[[], Row]) -> None:
        """One row of the report, whatever happens in it."""
        row = {"case": name}
        try:
            row |= measure()
        except Exception as error:
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        print(line_of(row), flush=True)

    @functools.cache  # noqa: B019
    def ceilings(self, size: int) -> dict[str, float]:
        """Seconds that a copy and a read-only pass of ``size`` bytes take."""
        sets = sets_for(size, self.device)
        kinds = {"copy_seconds": copy_calls, "read_seconds": read_calls}
        return {name: self.seconds(calls(size, sets, self.device)) for name, calls in kinds.items()}

    def call(self, case: Case, budget: Budget) -> Row:
        size = case.read + case.written
        sets = 1 if self.once or case.shape == SMALL else sets_for(size, self.device)
        arguments = [random_arguments(case, self.device, seed) for seed in range(sets)]
        row: Row = {
            "bytes_read": case.read,
            "bytes_written": case.written,
            "error": error_of(case, arguments[0]),
        }
        if row["error"] > 1:
            return row | {"failed": "wrong: the error is a multiple of its bound"}
        if self.once:
            return row
        timing = self.timed([functools.partial(case.call, x) for x in arguments])
        row |= timing._asdict() | self.ceilings(size)
        limit = budget.limit(row["copy_seconds"])
        row |= {
            "budget": str(budget),
            "limit_seconds": limit,
            "of_copy": row["copy_seconds"] / row["seconds"],
        }
        return row | {"model_seconds": estimate(case, self.gpu).seconds, "met": met(timing.seconds, limit)}


def met(seconds: float, limit: float | None) -> bool | None:
    return None if limit is None else seconds <= limit


# Whether a result is right


def sample(case: Case, arguments: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of the arguments, in float64; all of them where they are packed."""

    def part(x: Tensor) -> Tensor:
        x = x if case.shape.packed else x[rows]
        return x.double() if x.is_floating_point() else x

    return {name: mapped(x, part) for name, x in arguments.items()}


def error_of(case: Case, arguments: dict[str, Any]) -> float:
    """The largest error as a share of its bound, against float64 on the first and the last row."""
    if case.what == "whiten":  # over the whole batch
        rows = torch.arange(case.shape.batch, device=arguments["x"].device)
    else:
        rows = torch.tensor(sorted({0, case.shape.batch - 1}), device=tensor_of(arguments).device)
    exact = sample(case, arguments, rows)
    want = outputs_of(case.what, case.call(exact, "torch"))
    got = outputs_of(case.what, case.call(arguments))
    if not case.shape.packed:
        got = {name: x[rows] for name, x in got.items()}
    bounds = bounds_of(case, exact, want)
    return max(error_fraction(got[name], want[name], bound).max().item() for name, bound in bounds.items())


def tensor_of(arguments: dict[str, Any]) -> Tensor:
    inputs = arguments.get("inputs")
    return inputs.key if inputs is not None else next(x for x in arguments.values() if isinstance(x, Tensor))


def bounds_of(case: Case, exact: dict[str, Any], want: dict[str, Tensor]) -> dict[str, Tensor]:
    max_logit: float | Tensor = 0.0
    if "inputs" in exact:
        # No product is larger than that of the largest lengths.
        lengths = [
            x.norm(dim=-1).flatten(1).amax(1).cpu() for x in (exact["inputs"].query, exact["inputs"].key)
        ]
        max_logit = lengths[0] * lengths[1] * exact["inputs"].scaling
    if case.what in ("row", "credit", "column"):
        return {case.what: credit_bound(want[case.what], max_logit)}
    if case.what == "whiten":
        return {"whiten": gae_bound(want["whiten"], 1.0, 1.0)}
    bounds = {name: gae_bound(want[name], GAMMA, LAM) for name in ("advantages", "returns")}
    if case.what == "gae":
        return bounds
    mask = exact["response_mask"]
    ratio = torch.where(mask, exact["logprobs"] - exact["ref_logprobs"], 0.0)
    score = exact["score"][:, None]
    if case.shape.packed:
        score = exact["score"].repeat_interleave(exact["response_cu_seqlens"].diff().long())
        max_logit = 0.0
    terms = [score * want["credit"], KL_COEF * ratio]
    return bounds | {
        "credit": credit_bound(want["credit"], max_logit),
        "rewards": reward_bound(want["rewards"], *terms, max_logit=max_logit),
        "kl": kl_bound(want["kl"], ratio),
    }


# What is not one call against its bytes


def host_row(bench: Bench, case: Case, limit: float) -> Row:
    arguments = random_arguments(case, bench.device, 0)
    call = functools.partial(case.call, arguments)
    call()
    if bench.once:
        return {}
    seconds = host_seconds(call, bench.device, *((3, 3) if bench.quick else ()))
    return {"seconds": seconds, "how": "clock", "limit_seconds": limit, "met": met(seconds, limit)}


def peer_row(bench: Bench, case: Case) -> Row:
    """The same rows by rl-triton, which computes the advantages alone."""
    if importlib.util.find_spec("rl_triton") is None:
        return {"missing": "rl_triton is not installed"}
    import rl_triton

    sets = sets_for(case.read + case.written, bench.device)
    arguments = [random_arguments(case, bench.device, seed) for seed in range(sets)]
    done = torch.zeros_like(arguments[0]["values"])
    decay = {"gamma": GAMMA, "lambda_": LAM}
    calls = [
        functools.partial(rl_triton.compute_gae, x["rewards"], x["values"], done, **decay) for x in arguments
    ]
    return time_calls(calls, bench.device)._asdict()


def column_row(bench: Bench, shape: Shape) -> Row:
    """The column mean beside one causal FlashAttention-2 forward of the same layer."""
    case = Case("column", shape)
    arguments = random_arguments(case, bench.device, 0)
    query, key = arguments["inputs"].query, arguments["inputs"].key
    value = torch.randn_like(key)
    backends = [torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    if bench.device.type != "cuda":
        backends.append(torch.nn.attention.SDPBackend.MATH)

    def forward() -> Tensor:
        with torch.nn.attention.sdpa_kernel(backends):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    calls = [forward, functools.partial(case.call, arguments)]
    if bench.once:
        calls[1]()
        return {}
    flash, seconds = (bench.seconds([call]) for call in calls)
    return {
        "seconds": seconds,
        "flash_seconds": flash,
        "budget": "1.3 x FlashAttention-2",
        "limit_seconds": 1.3 * flash,
        "met": met(seconds, 1.3 * flash),
    }


def reward_model(bench: Bench) -> torch.nn.Module:
    """A reward model of Llama 3 8B's geometry with random weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    geometry = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    if bench.quick:
        geometry = dict(zip(geometry, (64, 128, 2, 4, 2, 128), strict=True))
    config = LlamaConfig(**geometry, num_labels=1, pad_token_id=0, attn_implementation="sdpa")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device:
            return LlamaForSequenceClassification(config).eval()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def model_row(bench: Bench, batch: int, keys: int) -> Row:
    """Forward with tap and shaping over the forward without, turn by turn, and the memory it adds."""
    model = reward_model(bench)
    shape = Shape(batch, keys // 2)
    arguments = random_arguments(Case("sweep", shape), bench.device, 0)
    del arguments["score"], arguments["credit"]
    tokens = torch.randint(1, model.config.vocab_size, (batch, keys), device=bench.device)
    start = torch.full((batch,), keys - shape.response, dtype=torch.int32, device=bench.device)
    tap = attnshape.AttentionTap(model)

    def forward() -> Any:
        return model(tokens, use_cache=False)

    def shaped() -> Any:
        with tap:
            score = forward().logits[:, 0].float()
        return attnshape.shape_rewards(score, tap.take(), **arguments, response_start=start, kl_coef=KL_COEF)

    shaped()
    if bench.once:
        return {}
    times: dict[Callable[[], Any], list[float]] = {forward: [], shaped: []}
    for _ in range(3 if bench.quick else 15):
        for call, samples in times.items():
            samples.append(seconds_once(call, bench.device))
    plain, tapped = (statistics.median(samples) for samples in times.values())
    row = {
        "seconds": tapped,
        "plain_seconds": plain,
        "budget": "1.002 x the forward",
        "limit_seconds": 1.002 * plain,
        "met": met(tapped, 1.002 * plain),
        "note": f"{tapped / plain:.4f} x the forward",
    }
    if bench.device.type == "cuda":
        extra = peak_memory(shaped) - peak_memory(forward)
        unit = 4 * batch * shape.heads * (shape.response + model.config.head_dim)
        row["extra_bytes"] = extra
        row["note"] += f", {extra:,} bytes more at once, {extra / unit:.2f} x 4 B Hq (R + D)"
    return row


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds at once, its outputs included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


# The report


def measure(bench: Bench) -> None:
    cases = dict(quick_cases()) if bench.quick else dict(budget_cases())
    for case, budget in cases.items():
        bench.add(case.name, functools.partial(bench.call, case, budget))
    for shape in SWEEPS[:1] if bench.quick else SWEEPS:
        bench.add(f"rl-triton gae, {shape}", functools.partial(peer_row, bench, Case("gae", shape)))
    host = {"sweep": 40e-6, "fused": 40e-6, "gae": 25e-6}
    for what, limit in host.items():
        shape = Shape(SMALL.batch, SMALL.response, SMALL.keys if what == "fused" else 0)
        bench.add(f"host cost, {what}", functools.partial(host_row, bench, Case(what, shape), limit))
    column = Shape(2, 16, 32, heads=4, kv_heads=2, width=16) if bench.quick else COLUMN
    bench.add(f"column mean, {column}", functools.partial(column_row, bench, column))
    batch, keys = (2, 16) if bench.quick else (4, 2048)
    name = f"reward model forward, tapped and shaped, B {batch} S {keys}"
    bench.add(name, functools.partial(model_row, bench, batch, keys))


def quick_cases() -> Iterator[tuple[Case, Budget]]:
    """The same calls at small shapes."""
    for case, budget in budget_cases():
        lengths = (5,) * (len(case.shape.lengths) - 1) + (40,) if case.shape.lengths else ()
        batch = len(lengths) or 3
        shape = case.shape._replace(batch=batch, response=40, lengths=lengths, heads=4, kv_heads=2, width=16)
        shape = shape._replace(keys=64 if shape.keys else 0)
        yield case._replace(shape=shape), budget


def line_of(row: Row) -> str:
    def microseconds(name: str) -> str:
        return f"{row[name] * 1e6:.1f}" if row.get(name) is not None else ""

    verdict = {True: "met", False: "missed"}.get(row.get("met"), "")
    outcome = "; ".join(filter(None, [verdict, *map(row.get, ("note", "missing", "failed"))]))
    size = row.get("bytes_read", 0) + row.get("bytes_written", 0)
    share = f"{row['of_copy']:.0%}" if "of_copy" in row else ""
    cells = [row["case"], f"{size:,}" if size else ""]
    cells += [microseconds(name) for name in ("seconds", "copy_seconds", "read_seconds", "model_seconds")]
    cells += [share, row.get("budget", ""), microseconds("limit_seconds"), outcome]
    return f"| {' | '.join(cells)} |"


def machine(bench: Bench) -> Row:
    commit = os.environ.get("COMMIT")
    if commit is None:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = head.stdout.strip() or None
    name = platform.processor() or platform.machine()
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name(bench.device)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"device": name, "commit": commit, **versions, **bench.gpu._asdict()}


def report(bench: Bench, out: Path) -> None:
    facts = machine(bench)
    (out / "budgets.json").write_text(json.dumps({"machine": facts, "rows": bench.rows}, indent=1) + "\n")
    lines = [
        "# Budgets",
        "",
        ", ".join(f"{name} {x}" for name, x in facts.items()),
        "",
        "Times in microseconds: the call, a device copy and a read-only pass over the same bytes in the same",
        "run, and the cost model's estimate.",
        "",
        "| case | bytes | time | copy | read | model | of copy | budget | limit | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(line_of, bench.rows),
    ]
    (out / "budgets.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(torch.device(options.device), options.quick, options.once)
    measure(bench)
    if not options.once:
        report(bench, options.out)
    sys.exit(any("failed" in row for row in bench.rows))


if __name__ == "__main__":
    main()
