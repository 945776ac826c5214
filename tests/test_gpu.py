"""What only a GPU can show: races, graphs, streams, launches, synchronisation."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import attnshape
from attnshape import AttentionInputs
from attnshape.bench.cases import Case, Shape, outputs_of, random_arguments
from benchmarks.cases import COLUMN, LONG, SMALL, UNEQUAL
from benchmarks.cost_model import Gpu, estimate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
CASES = [
    Case("fused", SMALL),
    Case("fused", Shape(8, 1024, 2048)),
    Case("fused", Shape(2, 8192, 16384)),
    Case("credit", Shape(8, 1024, 2048)),
    Case("row", Shape(8, 1024, 2048)),
    *(Case("sweep", shape) for shape in (Shape(300, 700), *LONG, *UNEQUAL)),
    Case("gae", Shape(300, 700)),
    Case("gae", LONG[0]),
    Case("whiten", Shape(300, 700)),
    Case("column", COLUMN._replace(batch=1)),
]


@pytest.fixture
def poisoned_empty() -> None:
    """Filling what is allocated would be a launch, and launches are counted here."""


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def prepared(case: Case, seed: int = 0) -> Callable[[], dict[str, Tensor]]:
    arguments = random_arguments(case, DEVICE, seed)
    return lambda: outputs_of(case.what, case.call(arguments, "triton"))


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> Tensor:
    """How many outputs differ in a bit; stays on the GPU."""
    pairs = [(got[name].view(torch.int32), want[name].view(torch.int32)) for name in want]
    return torch.stack([(x != y).any() for x, y in pairs]).sum()


def captured(call: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.fixture
def load() -> Iterator[Callable[[int], None]]:
    """Keeps another stream busy, each time with other work."""
    stream = torch.cuda.Stream()
    x, big = torch.randn(2048, 2048, device=DEVICE), torch.ones(1 << 26, device=DEVICE)

    def start(turn: int) -> None:
        with torch.cuda.stream(stream):
            if turn % 3 == 0:
                x @ x
            elif turn % 3 == 1:
                big[: 1 << (10 + turn % 16)].add_(1)

    yield start
    torch.cuda.synchronize()


@every_case
def test_repeats_under_load_have_the_same_bits(case: Case, load: Callable[[int], None]) -> None:
    call = prepared(case)
    want = call()
    found = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for turn in range(200):
        load(turn)
        found += differences(call(), want)
    assert found.item() == 0


@every_case
def test_calls_on_two_streams_do_not_meet(case: Case) -> None:
    calls = [prepared(case, seed) for seed in range(2)]
    wants = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in calls]
    for _ in range(50):
        for call, want, stream, count in zip(calls, wants, streams, found, strict=True):
            with torch.cuda.stream(stream):
                count += differences(call(), want)
    torch.cuda.synchronize()
    assert [x.item() for x in found] == [0, 0]


@every_case
def test_two_graphs_at_once(case: Case) -> None:
    calls = [prepared(case, seed) for seed in range(2)]
    wants = [call() for call in calls]
    graphs = [captured(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, outputs), want in zip(graphs, wants, strict=True):
            found += differences(outputs, want)
    assert found.item() == 0


def test_a_replay_reads_what_its_inputs_hold_then() -> None:
    case = Case("fused", SMALL)
    arguments, others = (random_arguments(case, DEVICE, seed) for seed in range(2))
    graph, outputs = captured(lambda: outputs_of("fused", case.call(arguments, "triton")))
    want = outputs_of("fused", case.call(others, "triton"))
    arguments["inputs"].key.copy_(others["inputs"].key)
    arguments["inputs"].query.copy_(others["inputs"].query)
    for name in ("score", "values", "logprobs", "ref_logprobs"):
        arguments[name].copy_(others[name])
    for _ in range(1000):
        graph.replay()
    assert differences(outputs, want).item() == 0


@every_case
def test_after_a_capture_that_broke_off(case: Case) -> None:
    call = prepared(case)
    want = call()

    def broken_off() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    torch.cuda.synchronize()
    assert differences(call(), want).item() == 0
    graph, outputs = captured(call)
    graph.replay()
    assert differences(outputs, want).item() == 0


ESTIMATED = [case for case in CASES if case.what != "whiten"]


@pytest.mark.parametrize("case", ESTIMATED, ids=lambda case: case.name)
def test_launches_per_call(case: Case) -> None:
    call = prepared(case)
    call()
    torch.cuda.synchronize()
    for _ in range(2):  # the first time the profiler may begin too late
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    started = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(started) == estimate(case, Gpu()).launches, started


@every_case
def test_no_call_waits_for_the_gpu(case: Case) -> None:
    call = prepared(case)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_tensors_of_a_device_that_is_not_current(case: Case) -> None:
    want = prepared(case)()
    arguments = random_arguments(case, torch.device("cuda:1"), 0)
    got = outputs_of(case.what, case.call(arguments, "triton"))
    assert {x.device.index for x in got.values()} == {1}
    assert set(got) == set(want)


@pytest.mark.parametrize(
    "strides", [(1 << 31, 128, 8 * 128, 1), (0, 128, 1 << 23, 1)], ids=["rows", "tokens"]
)
def test_keys_beyond_2_to_the_31_elements(strides: tuple[int, ...]) -> None:
    batch = 2 if strides[0] else 1
    small = torch.randn(batch, 8, 300, 128, device=DEVICE).bfloat16()
    span = sum((n - 1) * stride for n, stride in zip(small.shape, strides, strict=True)) + 1
    assert span > 1 << 31
    key = torch.empty(span, dtype=torch.bfloat16, device=DEVICE).as_strided(small.shape, strides)
    key.copy_(small)
    inputs = AttentionInputs(torch.randn(batch, 32, 128, device=DEVICE).bfloat16(), small, 128**-0.5)
    want = attnshape.attention_row(inputs, backend="triton")
    got = attnshape.attention_row(dataclasses.replace(inputs, key=key), backend="triton")
    assert torch.equal(got, want)


def test_shapes_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda src, **_: compiled.append(src.hash()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch, response, prompt = (int(torch.randint(1, n, (), generator=generator)) for n in (20, 3000, 500))
        for what, keys in (("fused", response + prompt), ("sweep", 0), ("gae", 0)):
            prepared(Case(what, Shape(batch, response, keys)))()
    assert len(compiled) <= 12
