"""One cell of the matrix, inside vLLM's environment: ``python -m integrations.vllm.inside``.

``__main__.py`` calls it with the cell's name, the folder of models and the file for what is found, and with
the variables that the cell wants.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from integrations.vllm import gpu_backends, models
from torch import Tensor

SCORE_FN = "logit[1] - logit[0]"
SCORE_BOUND, ROW_BOUND = 2e-4, 3e-5
"""float32, two implementations of the whole model apart."""


@dataclass
class Cell:
    """An engine, and what is asked of it."""

    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    prompts: int = 24
    longest: int = 200
    shared: int = 0
    """Tokens that all prompts begin with."""
    rounds: int = 1
    cached: bool = False
    """Whether the cache must have been read."""
    backend: str | None = None
    """One of a GPU's, on this CPU."""
    environment: dict[str, str] = field(default_factory=dict)
    checks: tuple[Callable[[Run], dict[str, Any]], ...] = ()
    """After the comparison with transformers."""
    compares: bool = True


class Run:
    """An engine with its prompts; every fifth request does not ask for its row."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        from vllm import LLM

        self.cell = cell
        self.path = models.save(folder, cell.model)
        self.prompts = models.prompts_of(cell.prompts, cell.longest, cell.shared)
        self.kept = gpu_backends.install(cell.backend) if cell.backend else None
        started = time.perf_counter()
        self.llm = LLM(
            str(self.path),
            runner="pooling",
            **{"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}
            | cell.options,
        )
        self.loading = time.perf_counter() - started

    def asks(self, i: int) -> bool:
        return i % 5 != 4

    @property
    def labels(self) -> int:
        return int(models.KINDS[self.cell.model][2].get("num_labels", 1))

    def encode(self, asks: Callable[[int], bool] | None = None) -> list[Any]:
        from vllm import PoolingParams

        asks = asks or self.asks
        return self.llm.encode(
            [{"prompt_token_ids": ids} for ids in self.prompts],
            pooling_params=[
                PoolingParams(
                    task="classify",
                    use_activation=False,
                    extra_kwargs={"attnshape": True} if asks(i) else None,
                )
                for i in range(len(self.prompts))
            ],
            pooling_task="classify",
            use_tqdm=False,
        )

    def data(self, asks: Callable[[int], bool] | None = None) -> list[Tensor]:
        return [out.outputs.data.float() for out in self.encode(asks)]

    @property
    def pooler(self) -> Any:
        """Of the engine in this process."""
        (found,) = self.llm.apply_model(pooler_of)
        return found


def compared(run: Run) -> dict[str, Any]:
    """Largest errors of scores and rows against eager transformers."""
    wanted = models.expected(run.path, run.prompts)
    cell, score, row, cached, rows = run.cell, 0.0, 0.0, 0, 0
    for _ in range(cell.rounds):
        for i, out in enumerate(run.encode()):
            cached += out.num_cached_tokens
            found, logits, expected = out.outputs.data.float(), wanted.logits[i], wanted.rows[i]
            score = max(score, float((found[: len(logits)] - logits).abs().max()))
            if not run.asks(i):
                assert len(found) == len(logits), "a request that did not ask got more than its logits"
                continue
            assert len(found) == len(logits) + len(expected), (len(found), len(expected))
            row = max(row, float((found[len(logits) :] - expected).abs().max()))
            rows += 1
    assert score <= SCORE_BOUND, score
    assert row <= ROW_BOUND, row
    assert (cached > 0) == cell.cached, f"{cached} tokens came from the cache"
    peaks = [float(x.max()) * len(x) for x in wanted.rows]
    assert max(peaks) > 3, "attention is nearly uniform: nothing would be shown"
    return {"score": score, "row": row, "rows": rows, "cached": cached}


def text_in_and_credit_out(run: Run) -> dict[str, Any]:
    """The IO processor, offline, against the same model in this process; one completion is too long."""
    from attnshape.text.load import RewardModelConfig
    from attnshape.text.model import CreditModel
    from attnshape.text.score_fn import parse_score_fn

    given = [
        {
            "prompt": f"Was film {i} any good? ",
            "response": "It was not bad, but the ending was weak." * (i + 1),
        }
        for i in range(4)
    ]
    messages = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": " superb actors "}]
    given.append({"messages": messages, "offsets": [[0, 7], [7, 14], [14, 15]]})
    too_long = {"prompt": "a b " * 600, "response": "c"}
    (out,) = run.llm.encode({"data": [*given, too_long]}, pooling_task="plugin", use_tqdm=False)
    *found, refused = out.outputs
    assert "that the model takes" in refused["error"]
    config = RewardModelConfig(model=str(run.path), score_fn=parse_score_fn(SCORE_FN))
    model = CreditModel.load(config, "cpu")
    reader = model.reader()
    examples = [reader.read_record(x, x.get("offsets")) for x in given]
    score = credit = 0.0
    for x, wanted in zip(found, model.score(examples), strict=True):
        score = max(score, abs(x["score"] - wanted.score))
        credit = max([credit, *(abs(a - b) for a, b in zip(x["credit"], wanted.credit, strict=True))])
    assert score <= SCORE_BOUND, score
    assert credit <= ROW_BOUND, credit
    return {"score of text": score, "credit of text": credit}


def kept_plain(run: Run) -> dict[str, Any]:
    """Without the plugin: what every request gets, for ``same_bits``."""
    found = run.data(lambda i: False)
    torch.save(found, run.path / "plain.pt")
    return {"requests": len(found)}


def same_bits(run: Run) -> dict[str, Any]:
    """What others get beside requests that ask, against an engine without the plugin."""
    plain = torch.load(run.path / "plain.pt")
    for asks in (run.asks, lambda i: False):
        for i, found in enumerate(run.data(asks)):
            assert torch.equal(found[: len(plain[i])], plain[i]), f"request {i} has other bits"
            assert (len(found) > len(plain[i])) == asks(i)
    return {"requests with the same bits": len(plain)}


def common_kept(run: Run) -> dict[str, Any]:
    """The metadata that FlashInfer's own is built from, which is where its block table is found."""
    from attnshape.integrations.vllm.pooler import COMMON, keep_common

    tap = run.pooler.tap
    keep_common(tap.layer.attn_backend.get_builder_cls())
    engine, seen = tap._forward, []

    def forward(
        layer: Any, q: Any, k: Any, v: Any, cache: Any, metadata: Any, *rest: Any, **options: Any
    ) -> Any:
        result = engine(layer, q, k, v, cache, metadata, *rest, **options)
        if metadata is not None:  # nobody reads it after the last layer, and FlashInfer's has neither
            seen.append(hasattr(metadata, COMMON))
            metadata.block_table = metadata.query_start_loc = None
        return result

    tap._forward = forward
    found = compared(run)
    assert seen
    assert all(seen)
    return {f"{k}, FlashInfer's way to a block table": found[k] for k in ("score", "row")}


def mutations(run: Run) -> dict[str, Any]:
    """What is read wrongly is found: those that asked are refused, and nothing else changes."""
    from attnshape.integrations.vllm.pages import Tokens
    from attnshape.integrations.vllm.pooler import Tap
    from attnshape.integrations.vllm.support import REFUSED

    pooler = run.pooler
    right, layer = run.data(), pooler.tap.layer
    described, of = Tap.described, Tokens.of
    tapped = Tap._tapped

    def of_another(self: Any, *arguments: Any, **options: Any) -> Any:
        result = tapped(self, *arguments, **options)
        if self.step is not None:
            self.step.query = self.step.query.roll(1, 0)
        return result

    def broken(self: Any) -> Any:
        raise RuntimeError("a fault of ours")

    def layer_with(**changes: Any) -> Callable[[Any], Any]:
        def changed(self: Any) -> Any:
            found = described(self)
            return found._replace(**{k: v(getattr(found, k)) for k, v in changes.items()})

        return changed

    cases: dict[str, tuple[Any, str, Any]] = {
        "none": (Tap, "described", described),
        "keys read in another backend's layout": (Tap, "described", layer_with(transposed=lambda x: not x)),
        "blocks in another order": (
            Tokens,
            "of",
            lambda self, x: of(self._replace(block=self.block.roll(x.shape[2])), x),
        ),
        "another request's query": (Tap, "_tapped", of_another),
        "scale 10% off": (Tap, "described", layer_with(scaling=lambda x: 1.1 * x)),
        "window ignored": (Tap, "described", layer_with(window=lambda x: None)),
        "window one key short": (Tap, "described", layer_with(window=lambda x: x - 1)),
        "softcap ignored": (Tap, "described", layer_with(softcap=lambda x: None)),
        "an exception": (Tap, "described", broken),
    }
    said = {}
    for name, (owner, attribute, mutant) in cases.items():
        if pooler.off:
            pooler.tap = Tap(layer)
        pooler.off, pooler.rows = None, 0
        original = getattr(owner, attribute)
        setattr(owner, attribute, mutant)
        if attribute == "_tapped":
            layer.impl.forward = pooler.tap._tapped
        run.llm.reset_prefix_cache()
        try:
            found = run.data()
        finally:
            setattr(owner, attribute, original)
        labels = run.labels
        for i, (x, y) in enumerate(zip(found, right, strict=True)):
            assert torch.equal(x[:labels], y[:labels]), f"{name}: the score of request {i} has other bits"
            if not run.asks(i):
                continue
            row = x[labels:]
            assert len(row) == len(run.prompts[i])
            if name == "none":
                assert torch.equal(row, y[labels:])
            else:
                assert bool((row == REFUSED).all()), f"{name}: request {i} got a row"
        assert (pooler.off is None) == (name == "none"), f"{name}: {pooler.off}"
        said[name] = pooler.off
    return {"said": said}


def one_rank_refuses(run: Run) -> dict[str, Any]:
    """Tensor parallel: what one rank's check finds, all ranks decide by; nothing hangs."""
    from attnshape.integrations.vllm.support import REFUSED

    assert all(bool((x[run.labels :] != REFUSED).all()) for x in run.data())
    run.llm.apply_model(break_second_rank)
    for _ in range(2):
        for i, x in enumerate(run.data()):
            assert len(x) == run.labels + (len(run.prompts[i]) if run.asks(i) else 0)
            assert bool((x[run.labels :] == REFUSED).all())
    off = run.llm.apply_model(off_of)
    assert off[0] == "another tensor parallel rank refused its part of a row", off
    assert off[1].startswith("model.layers.2.self_attn.attn: its attention row times its values"), off
    return {"said": off}


def pooler_of(model: Any) -> Any:
    from attnshape.integrations.vllm.pooler import CreditPooler

    return next(x for x in model.modules() if isinstance(x, CreditPooler))


def break_second_rank(model: Any) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank

    pooler = pooler_of(model)
    pooler.rows = 0
    described = pooler.tap.described
    if get_tensor_model_parallel_rank() == 1:
        pooler.tap.described = lambda: described()._replace(scaling=1.0)


def off_of(model: Any) -> Any:
    return pooler_of(model).off


NO_CACHE = {"enable_prefix_caching": False}
CACHE = {"enable_prefix_caching": True}
SMALL_BLOCKS = {"block_size": 32}
"""Of 128 tokens by default on a CPU."""
V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": f"{Path(__file__).parent / 'v2'}:{os.environ.get('PYTHONPATH', '')}",
}
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
CELLS = {
    "llama": Cell(options=NO_CACHE, checks=(common_kept,)),
    "llama, prefix caching": Cell(options=CACHE, rounds=2, cached=True),
    "llama, chunked prefill": Cell(
        options={"max_num_batched_tokens": 64, "enable_chunked_prefill": True, **NO_CACHE}
    ),
    "llama, shared prefix in chunks": Cell(
        options={"max_num_batched_tokens": 48, "enable_chunked_prefill": True, **CACHE},
        shared=150,
        longest=100,
        cached=True,
    ),
    "llama, a cache too small": Cell(
        options={"num_gpu_blocks_override": 36, "enable_chunked_prefill": True, **SMALL_BLOCKS, **CACHE},
        rounds=2,
        shared=64,
        cached=True,
    ),
    "llama, heads of 80": Cell("wide", NO_CACHE),
    "two labels": Cell(
        "two_labels",
        {
            "io_processor_plugin": "attnshape",
            "additional_config": {"attnshape": {"score_fn": SCORE_FN}},
            **SMALL_BLOCKS,
            **CACHE,
        },
        rounds=2,
        cached=True,
        checks=(text_in_and_credit_out,),
    ),
    "qwen2, torch.compile": Cell("qwen2", {"enforce_eager": False, **NO_CACHE}),
    "qwen3": Cell("qwen3", {**SMALL_BLOCKS, **NO_CACHE}),
    "mistral": Cell("mistral", {**SMALL_BLOCKS, **CACHE}, rounds=2, cached=True),
    "gemma2": Cell("gemma2", NO_CACHE, checks=(mutations,)),
    "gemma2, last layer full": Cell("gemma2_full", {**SMALL_BLOCKS, **CACHE}, rounds=2, cached=True),
    "no plugin": Cell(environment={"VLLM_PLUGINS": "none"}, checks=(kept_plain,), compares=False),
    "others' bits": Cell(checks=(same_bits,), compares=False),
    "tensor parallel 2": Cell(
        options={"tensor_parallel_size": 2, **NO_CACHE}, environment=TWO, checks=(one_rank_refuses,)
    ),
    "V2 runner, FLASH_ATTN": Cell(
        "gemma2", {**SMALL_BLOCKS, **NO_CACHE}, backend="FLASH_ATTN", environment=V2, prompts=10
    ),
    **{
        f"V2 runner, TRITON_ATTN, {layout}": Cell(
            "mistral" if layout == "LBNHC" else "llama",
            NO_CACHE,
            backend="TRITON_ATTN",
            environment=V2 | {"VLLM_KV_CACHE_LAYOUT": layout},
            prompts=9,
            longest=60,
        )
        for layout in ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC")
    },
}


def main() -> None:
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    run = Run(CELLS[name], folder)
    found: dict[str, Any] = {"loading": run.loading}
    for check in ((compared,) if run.cell.compares else ()) + run.cell.checks:
        found |= check(run)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
