"""Drawn cases in great numbers, each against the float64 reference: ``python -m soak`` in ``tests``.

What is done and what failed is written down as it goes; a run that was stopped goes on from there. A case
that fails is made as plain as it can be while it still fails, and printed as a call of ``problem_of``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from attnshape import ShapingConfig
from attnshape.files import whole_file
from attnshape.problems import Problem, make_problem, mapped, pack
from attnshape.reference import advantages
from benchmarks.on_gpu.tuning import injected

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
Case = dict[str, Any]
PLAIN: Case = {
    "batch": 1, "width": 1, "keys": 2, "heads": 1, "kv_heads": 1, "head_dim": 8, "dtype": "float32",
    "source": "weights", "packed": False, "holes": False, "values": False, "kl": "", "extras": False,
    "left_padding": False, "use_index": False, "whole_query": False, "attention_mask": True, "softcap": None,
    "sliding_window": None, "sinks": False, "lse": False, "head_mask": False, "nonfinite": None,
    "exact": False, "dense_share": 0.8, "gamma": 1.0, "lam": 1.0, "lam_value": None, "mask_semantics": "skip",
    "carry_masked": False, "normalization": "sum_to_one", "score_index": "last_unmasked", "score_clip": None,
    "kl_estimator": "k1", "kl_input_clip": None, "kl_output_clip": None, "on_nan": "propagate", "path": None,
    "lost": None,
}  # fmt: skip
"""The plainest value of everything that is drawn."""
MADE = (
    "batch", "width", "keys", "heads", "kv_heads", "head_dim", "holes", "values", "kl", "extras",
    "left_padding", "use_index", "whole_query", "attention_mask", "softcap", "sliding_window", "sinks", "lse",
    "head_mask",
)  # fmt: skip
"""What ``make_problem`` takes as it is."""
COINS = (
    "holes",
    "values",
    "extras",
    "left_padding",
    "use_index",
    "whole_query",
    "attention_mask",
    "sinks",
    "lse",
)


def drawn(seed: int, longest: int) -> Case:
    r = random.Random(seed)
    pick, coin = lambda *choices: r.choice(choices), lambda: r.random() < 0.5
    source = pick("weights", "weights", "attention", "uniform", "sparse")
    kv_heads, head_dim = (pick(1, 2, 3), pick(8, 16, 24, 80)) if source == "attention" else (1, 1)
    width = max(1, round(longest ** r.random()))
    carry_masked = pick(False, False, True)
    return {
        "seed": seed,
        "batch": r.randint(1, 6),
        "width": width,
        "keys": width + r.randint(1, 12),
        "heads": kv_heads * pick(1, 2, 5) if source == "attention" else 1,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": pick("float32", "bfloat16", "float16"),
        "source": source,
        "packed": not carry_masked and coin(),
        **{
            name: coin() for name in ("holes", "values", "extras", "left_padding", "use_index", "whole_query")
        },
        "kl": pick("logprobs", "kl", ""),
        "softcap": pick(None, 5.0),
        "sliding_window": pick(None, None, 1, 7),
        "head_mask": pick(False, False, True),
        "nonfinite": pick(None, None, None, "nan", "inf", "-inf"),
        "exact": pick(False, False, True),
        "dense_share": pick(1.0, 0.8, 0.0),
        "gamma": pick(1.0, 0.99, 0.5),
        "lam": pick(1.0, 0.95, 0.3, 0.0, "per row"),
        "lam_value": pick(None, None, 1.0, 0.9),
        "mask_semantics": pick("skip", "zero"),
        "carry_masked": carry_masked,
        "normalization": pick("sum_to_one", "sum_to_one", "sum_to_length", "none"),
        "score_index": pick("last_unmasked", "last_unmasked", "last_token", "given"),
        "score_clip": pick(None, 0.5, (-0.25, 1.0)),
        "kl_estimator": pick("k1", "abs", "k2", "k3"),
        "kl_input_clip": pick(None, 0.25),
        "kl_output_clip": pick(None, 0.125),
        "on_nan": pick("propagate", "zero_row"),
        # Whether one launch does all, whether programs share rows, and the chunks of keys that each reads.
        "path": pick(None, (coin(), coin(), *pick((1, 1), (2, 2), (r.randint(1, 9), None)))),
        "lost": pick(None, None, None, -3, 10**6),
    }


def problem_of(**case: Any) -> Problem:
    case = PLAIN | case
    g = torch.Generator().manual_seed(case["seed"] + 1)
    batch, width = case["batch"], case["width"]
    config = {name: case[name] for name in vars(ShapingConfig()) if name in case}
    if config["lam"] == "per row":
        config["lam"] = torch.rand(batch, generator=g)
    if config["score_index"] == "given":
        config["score_index"] = torch.randint(-1, width + 1, (batch,), generator=g)
    made = {name: case[name] for name in MADE}
    dtype = getattr(torch, case["dtype"])
    problem = make_problem(case["seed"], dtype=dtype, config=ShapingConfig(**config), **made)
    if case["nonfinite"] is not None and "values" in problem.given:
        problem.given["values"].view(-1)[int(torch.randint(0, batch * width, (), generator=g))] = float(
            case["nonfinite"]
        )
    if case["packed"]:
        problem = pack(problem)
    if case["lost"] is not None:  # a row that is out of range
        response, row = problem.response, int(torch.randint(0, batch, (), generator=g))
        where = response.start if response.cu_seqlens is None else response.cu_seqlens
        if where is not None and case["source"] == "attention":
            where[row] = case["lost"]
    if case["source"] == "weights":
        weights = torch.rand(problem.response.mask.shape, generator=g) ** 4
        if torch.rand((), generator=g) < 0.1:
            weights.view(-1)[0] *= -1
        problem.credit = weights
    elif case["source"] != "attention":
        problem.credit = case["source"]
    if case["exact"]:
        problem = mapped(problem, lambda x: x.double() if x.is_floating_point() else x)
    return problem


def failure(case: Case, backend: str) -> str | None:
    """What is wrong; None where nothing is."""
    from support.bounds import in_any_order
    from support.problems import check_shaped

    try:
        crossing = case.get("packed") and case.get("lost") is not None
        with taken(case.get("path") if backend == "triton" else None), in_any_order(is_fine=crossing):
            check_shaped(problem_of(**case), backend)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


@contextlib.contextmanager
def taken(path: tuple[bool, bool, int, int | None] | None) -> Iterator[None]:
    """With short chunks, and kernels that take this path; as they are if there is none."""
    if path is None:
        yield
        return
    one_launch, in_chunks, split, step = path
    constants = {
        "attention.CHUNK": 16,
        "attention.KEYS": 32,
        "attention.ONE_LAUNCH": 1 << 30 if one_launch else -1,
        "attention.chunks_per_program": lambda *_: (split, step),
        "rewards.in_chunks": lambda *_: in_chunks,
    }
    with injected(constants):
        yield


def _kind(found: str | None) -> str | None:
    return found and found.partition(":")[0]


def shrunk(case: Case, backend: str) -> Case:
    """The plainest case found that fails in the same way."""
    changed, kind = True, _kind(failure(case, backend))
    while changed:
        changed = False
        for name, plain in PLAIN.items():
            halved = [case[name] // 2] if name in ("batch", "width") and case[name] > 1 else []
            for value in [plain, *halved]:
                simpler = case | {name: value}
                simpler["keys"] = max(simpler["keys"], simpler["width"] + 1)
                if simpler != case and _kind(failure(simpler, backend)) == kind:
                    case, changed = simpler, True
                    break
    return case


def check(job: tuple[int, int, str]) -> tuple[int, Case | None, str | None]:
    seed, longest, backend = job
    case = drawn(seed, longest)
    if backend == "triton":
        case["exact"] = False
    found = failure(case, backend)
    if found is None:
        return seed, None, None
    case = shrunk(case, backend)
    return seed, {k: v for k, v in case.items() if v != PLAIN.get(k)}, failure(case, backend) or found


def compiled_recurrence() -> Any:
    """The reference's loop over a row's tokens, compiled as it stands."""
    walk = numba.njit(advantages._walk)

    def recurrence(rewards: Tensor, values: Tensor, live: Tensor, *settings: Any) -> Tensor:
        out = torch.empty_like(rewards)  # float64, as everything is in the reference here
        walk(rewards.numpy(), values.numpy(), live.numpy(), out.numpy(), *settings)
        return out

    return recurrence


def begin() -> None:
    torch.set_num_threads(1)
    advantages._recurrence = compiled_recurrence()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support import bounds, fast_interpreter

        bounds.install()
        fast_interpreter.install()


def commit() -> str:
    """Whose cases these are, as far as git knows; the results themselves may have changed."""

    def git(*of: str) -> str:
        ran = subprocess.run(["git", "-C", str(ROOT), *of], capture_output=True, text=True, check=False)
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", type=int, default=100_000)
    parser.add_argument("--kernels", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, help="as many as there are CPUs, if not given")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    os.environ["TRITON_INTERPRET"] = "1"
    kinds = {"loop": (options.loop, 4096, "cpu"), "kernels": (options.kernels, 40, "triton")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # else the pool's processes would stay
    state, now = json.loads(options.out.read_text()) if options.out.exists() else {}, commit()
    with multiprocessing.get_context("spawn").Pool(options.processes, initializer=begin) as pool:
        for name, (count, longest, backend) in kinds.items():
            done = state.setdefault(name, {"backend": backend, "longest": longest, "cases": 0, "failed": []})
            while done["cases"] < count and time.monotonic() < end:
                seeds = range(done["cases"], min(done["cases"] + 500, count))
                for seed, case, found in pool.imap(check, [(i, longest, backend) for i in seeds], 10):
                    if case is not None:
                        done["failed"].append({"seed": seed, "case": case, "found": found})
                        print(f"{name}: problem_of(**{case}): {found}", flush=True)
                done["cases"] = seeds.stop
                done["of_commit"] = done.get("of_commit", {})
                done["of_commit"][now] = done["of_commit"].get(now, 0) + len(seeds)
                with whole_file(options.out) as file:
                    file.write(json.dumps(state, indent=1) + "\n")
                print(f"{name}: {done['cases']} of {count}, {len(done['failed'])} failed", flush=True)


if __name__ == "__main__":
    main()
