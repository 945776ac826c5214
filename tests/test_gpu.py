"""What only a GPU can show: races, graphs, streams, launches, synchronisation."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

import attnshape
from attnshape import AttentionInputs
from attnshape.bench.cases import Case, Shape, outputs_of, random_arguments
from benchmarks.cases import launches
from benchmarks.on_gpu import races
from benchmarks.on_gpu.machine import Cuda
from benchmarks.on_gpu.races import CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")


@pytest.fixture
def poisoned_empty() -> None:
    """Filling what is allocated would be a launch, and launches are counted here."""


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def prepared(case: Case, seed: int = 0) -> Callable[[], dict[str, Tensor]]:
    return races.prepared(Cuda(), case, seed)


ASKED = [
    (ask, case)
    for ask in (
        races.repeats_under_load,
        races.rows_in_any_batch,
        races.replays,
        races.two_streams,
        races.two_graphs,
    )
    for case in CASES
    if ask is not races.rows_in_any_batch or races.divisible(case)
] + [(races.compiled, case) for case in races.COMPILED]


@pytest.mark.parametrize(("ask", "case"), ASKED, ids=[f"{ask.__name__}-{case.name}" for ask, case in ASKED])
def test_bits(ask: Callable[[Cuda, Case], Tensor], case: Case) -> None:
    """The same call under load, beside others, replayed, compiled; and a row in another batch."""
    assert int(ask(Cuda(), case).sum()) == 0


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
    machine = Cuda()
    assert machine.differ(call(), want).item() == 0
    replay, outputs = machine.capture(call)
    replay()
    assert machine.differ(outputs, want).item() == 0


ESTIMATED = [case for case in CASES if case.what != "whiten"]


@pytest.mark.parametrize("case", ESTIMATED, ids=lambda case: case.name)
def test_launches_per_call(case: Case) -> None:
    started = Cuda().launches(prepared(case))
    assert len(started) == launches(case), started


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
