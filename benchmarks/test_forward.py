"""A reward model's forward end to end: bare, with tap and shaping, and the paper's way by eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor, nn

import attnshape
from attnshape.bench.cases import Case, Shape, random_arguments
from attnshape.bench.measure import WrongResultError
from attnshape.bench.timing import Call, Ratio, ratio_of, time_calls
from attnshape.problems import mapped
from benchmarks.memory import memory_of
from benchmarks.record import Promise, Recorder

GEOMETRIES = {
    "cuda": {  # Llama 3 8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        # With the default .02 scores of so wide a model are so far apart that what bfloat16 rounds moves the
        # credit by a quarter of the largest.
        "initializer_range": 0.01,
    },
    "cpu": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
TIMED = {"cuda": ((4, 512), (4, 1024), (4, 2048), (2, 4096)), "cpu": ((2, 512), (2, 1024), (1, 2048))}
HELD = {
    "cuda": ((1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 16384)),
    "cpu": ((1, 256), (1, 512), (1, 1024), (1, 2048), (1, 4096)),
}
MOST_TIME = {"cuda": 1.002, "cpu": 1.03}
BUDGETED = {"cuda": (4, 2048), "cpu": (2, 1024)}
"""Budget: bare forwards that one with tap and shaping takes, at this batch and number of keys."""
LEAST_MEMORY, MEMORY_BUDGETED = 20, 2048
"""Budget on a CPU: how many times as much extra memory eager attention takes, at so many keys."""

Models: TypeAlias = tuple[nn.Module, nn.Module]


class Paths(NamedTuple):
    """The calls that are compared."""

    bare: Callable[[], Any]
    shaped: Callable[[], Any]
    micro_batched: Callable[[], Any]
    eager: Callable[[], Any]
    tapped: Callable[[], Any]
    """The forward alone: what is held until the shaping."""
    eager_forward: Callable[[], Any]


@pytest.fixture(scope="module")
def models(device: torch.device, small: bool) -> Models:
    """A reward model with random weights on sdpa, and the same weights on eager attention."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        **GEOMETRIES["small" if small else device.type],
        num_labels=1,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            model = LlamaForSequenceClassification(config).eval()
    finally:
        torch.set_default_dtype(default)
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    eager = copy.deepcopy(model, shared)
    eager.set_attn_implementation("eager")
    return model, eager


def redistributed(score: Tensor, attentions: Tensor, start: int, dense_share: float) -> tuple[Tensor, Tensor]:
    """The paper's: last layer, head mean, row of the last response token, normalised over the response."""
    weights = attentions.float().mean(1)[:, -1, start:]
    credit = weights / weights.sum(1, keepdim=True)
    rewards = dense_share * score[:, None] * credit
    rewards[:, -1] += (1 - dense_share) * score
    return credit, rewards


def paths_of(models: Models, batch: int, keys: int, device: torch.device) -> Paths:
    model, eager = models
    response = keys // 2
    arguments = random_arguments(Case("sweep", Shape(batch, response)), device, 0)
    mask = arguments.pop("response").mask
    del arguments["score"], arguments["credit"]
    tokens = torch.randint(1, model.config.vocab_size, (batch, keys), device=device)
    start = torch.full((batch,), keys - response, dtype=torch.int32, device=device)
    place = attnshape.Response(mask, start=start)
    tap = attnshape.AttentionTap(model)
    dense_share = attnshape.ShapingConfig().dense_share

    def forward(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits[:, 0].float()

    def tapped() -> Any:
        with tap:
            score = forward(tokens)
        return score, tap.take()

    def shaped() -> Any:
        return attnshape.shape_rewards(*tapped(), place, **arguments)

    def micro_batched() -> Any:
        scores, credits = [], []
        with tap:
            for row in range(batch):
                part = slice(row, row + 1)
                scores.append(forward(tokens[part]))
                here = mapped(place, lambda x, part=part: x[part])
                credits.append(attnshape.attention_credit(tap.take(), here))
        return attnshape.shape_rewards(torch.cat(scores), torch.cat(credits), place, **arguments)

    def eager_forward() -> Any:
        out = eager(tokens, use_cache=False, output_attentions=True)
        return out.logits[:, 0].float(), out.attentions

    def by_eager() -> Any:
        score, attentions = eager_forward()
        return redistributed(score, attentions[-1], keys - response, dense_share)

    return Paths(lambda: forward(tokens), shaped, micro_batched, by_eager, tapped, eager_forward)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = torch.device(metafunc.config.getoption("--device")).type
    sizes = TIMED if metafunc.function is test_forward else HELD
    chosen = ((2, 16),) if metafunc.config.getoption("--small") else sizes[kind]
    metafunc.parametrize(("batch", "keys"), chosen, ids=[f"B {batch} S {keys}" for batch, keys in chosen])


@torch.no_grad()
def test_forward(
    batch: int, keys: int, models: Models, device: torch.device, seconds: float, record: Recorder
) -> None:
    paths = paths_of(models, batch, keys, device)
    out = paths.shaped()
    check_credit(paths.micro_batched().credit, out.credit, device)
    if record.untimed():
        return
    # In a first comparison the two that differ by little, often; then those that take long.
    timings = time_calls({"bare": [paths.bare], "ours": [paths.shaped]}, device, 10 * seconds, least=9)
    ours, overhead = timings["ours"], ratio_of(timings["ours"], timings["bare"])
    others: dict[str, list[Call]] = {"ours": [paths.shaped]}
    if batch > 1:
        others["micro-batched"] = [paths.micro_batched]
    if eager_agrees(paths, out.credit, device):
        others["eager"] = [paths.eager]
    compared = time_calls(others, device, 5 * seconds, least=3)
    ratios = {"bare forward": ratio_of(timings["bare"], ours)}
    ratios |= {name: ratio_of(compared[name], compared["ours"]) for name in others if name != "ours"}
    promise = None
    if (batch, keys) == BUDGETED.get(device.type):
        limit = MOST_TIME[device.type]
        promise = Promise(f"{limit} x the bare forward", overhead.value, limit, unit="x")
    record(
        "forward",
        ours,
        ratios=ratios,
        promise=promise,
        case=f"forward, B {batch} S {keys}",
        overhead=overhead._asdict(),
        seconds_of={name: timing.seconds for name, timing in (compared | timings).items()},
        out_of_memory=[] if "eager" in others else ["eager"],
    )


@torch.no_grad()
def test_memory(batch: int, keys: int, models: Models, device: torch.device, record: Recorder) -> None:
    if record.untimed():
        pytest.skip("memory is measured with the times")
    paths = paths_of(models, batch, keys, device)
    timing = time_calls({"ours": [paths.shaped]}, device, 0, least=1)["ours"]
    memory = {}
    for name in ("bare", "shaped", "tapped", "eager", "eager_forward"):
        try:
            memory[name] = memory_of(getattr(paths, name), device)
        except torch.OutOfMemoryError:
            break
    extra = {name: memory[name].peak - memory["bare"].peak for name in ("shaped", "eager") if name in memory}
    ratios, promise = {}, None
    if "eager" in extra:
        saved = extra["eager"] / extra["shaped"]
        ratios["eager"] = Ratio(saved, saved, saved)
        if keys == MEMORY_BUDGETED and device.type == "cpu":
            text = f"1/{LEAST_MEMORY} of eager's extra memory"
            promise = Promise(text, saved, LEAST_MEMORY, at_most=False, unit="x")
    record(
        "memory",
        timing,
        ratios=ratios,
        promise=promise,
        case=f"memory, B {batch} S {keys}",
        keys=keys,
        bare_peak_bytes=memory["bare"].peak,
        extra_peak_bytes=extra,
        held_bytes={name: memory[name].held for name in ("tapped", "eager_forward") if name in memory},
        unit_bytes=4 * batch * models[0].config.num_attention_heads * (keys // 2 + models[0].config.head_dim),
        out_of_memory=[] if "eager" in memory else ["eager"],
    )


def eager_agrees(paths: Paths, credit: Tensor, device: torch.device) -> bool:
    """Whether eager attention fits into memory; where it does, its credit is the same."""
    try:
        want, _ = paths.eager()
    except torch.OutOfMemoryError:
        return False
    check_credit(credit, want, device)
    return True


def check_credit(credit: Tensor, want: Tensor, device: torch.device) -> None:
    """Within what another path through a model rounds otherwise, in bfloat16 on a GPU."""
    error = ((credit - want).abs().amax(1) / want.amax(1)).max().item()
    if not error <= (0.05 if device.type == "cuda" else 1e-3):
        raise WrongResultError(f"credit is off by {error:.2g} of the largest")
