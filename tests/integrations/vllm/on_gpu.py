"""The plugin in vLLM on a GPU: backends, dtypes, caches in fp8, with and without graphs.

    PYTHONPATH=.:tests python -m integrations.vllm.on_gpu OUT [--model FOLDER]

in an environment with vLLM 0.28 to 0.33 and attnshape. Every row is held against the engine's own attention
output, in float32 also against eager transformers; tokens per second are with and without rows, batches
taking turns. One engine per cell, each in a process of its own; a cell whose backend this GPU lacks is
named and passed over. Not run yet: it needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
DTYPES = (("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "auto"))
GRAPHS = (False, True)
ROUNDS = 6
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.05,
}
LACKING = (
    "not supported",
    "not valid",
    "No valid attention backend",
    "compute capability",
    "No module named",
)
"""What vLLM says of a backend that a machine has not."""


def cell(backend: str, dtype: str, cache: str, graphs: bool, model: Path, out: Path) -> None:
    """One engine, in this process."""
    import torch
    from integrations.vllm import models
    from integrations.vllm.inside import Cell, Run, pooler_of

    from attnshape.integrations.vllm import pooler
    from attnshape.integrations.vllm.support import REFUSED

    pooler.FIRST_CHECKED = 10**9
    models.KINDS[model.name] = (None, None, {})
    options = {
        "dtype": dtype,
        "kv_cache_dtype": cache,
        "enforce_eager": not graphs,
        "max_num_seqs": 64,
        "attention_config": {"backend": backend},
        "enable_prefix_caching": False,
    }
    run = Run(Cell(model.name, options, prompts=64, longest=480), model.parent)
    found = run.data(lambda i: True)
    (own,) = run.llm.apply_model(pooler_of)
    assert own.off is None, own.off
    assert own.tap.layer.attn_backend.get_name() == backend, own.tap.layer.attn_backend.get_name()
    assert all(bool((x[1:] != REFUSED).all()) for x in found)
    result: dict[str, Any] = {"rows_checked": own.rows}
    if dtype == "float32":
        wanted = models.expected(run.path, run.prompts)
        pairs = zip(found, wanted.logits, wanted.rows, strict=True)
        errors = [(float((x[:1] - s).abs().max()), float((x[1:] - row).abs().max())) for x, s, row in pairs]
        result |= {"score": max(e[0] for e in errors), "row": max(e[1] for e in errors)}
        assert result["row"] <= 2e-3, result  # TF32 in the kernels of float32
    pooler.FIRST_CHECKED = 16
    tokens, rates = sum(map(len, run.prompts)), {True: [], False: []}
    for _, asks in itertools.product(range(ROUNDS), (True, False)):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run.data(lambda i, asks=asks: asks)
        rates[asks].append(tokens / (time.perf_counter() - started))
    result["tokens_per_s_with_rows"] = statistics.median(rates[True][1:])
    result["tokens_per_s_without"] = statistics.median(rates[False][1:])
    out.write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder: models made here, and results.json")
    parser.add_argument("--model", type=Path, help="a reward model of one label; else a small one is made")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    found = out / "cell.json"
    if options.cell:
        backend, dtype, cache, graphs = options.cell
        cell(backend, dtype, cache, graphs == "graphs", options.model, found)
        return
    model = options.model
    if model is None:
        from integrations.vllm import models

        models.KINDS["made"] = (*models.KINDS["llama"][:2], SHAPE)
        model = models.save(out, "made")
    results: dict[str, Any] = {}
    for backend, (dtype, cache), graphs in itertools.product(BACKENDS, DTYPES, GRAPHS):
        arguments = [backend, dtype, cache, "graphs" if graphs else "eager"]
        name = " ".join(arguments)
        found.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "integrations.vllm.on_gpu",
            str(out),
            "--model",
            str(model.absolute()),
        ]
        settings = {"VLLM_PLUGINS": "attnshape", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        ran = subprocess.run(
            [*command, "--cell", *arguments],
            env=os.environ | settings,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        if ran.returncode == 0:
            results[name] = json.loads(found.read_text())
        else:
            last = ran.stdout.strip().splitlines()[-1:]
            lacking = any(word in ran.stdout for word in LACKING)
            results[name] = {"not here" if lacking else "failed": last}
            (out / f"{name.replace(' ', '_')}.log").write_text(ran.stdout)
        print(name, results[name], flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1))
    if any("failed" in x for x in results.values()):
        sys.exit("some cells failed; their logs are beside the results")


if __name__ == "__main__":
    main()
