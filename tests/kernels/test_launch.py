"""The launcher that starts a kernel with what was compiled before, and the counters of a launch."""

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from csrc_triton import launch
from csrc_triton.launch import COUNTERS, Counters, Launcher

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class Inputs(NamedTuple):
    p_in: Any
    window: Any = None
    n: Any = 3
    scale: Any = 0.0


class Rules(NamedTuple):
    BLOCK: int = 128
    NAME: str | None = None


def named_kernel(p_out, inputs, rules: tl.constexpr) -> None:
    """Its parameters."""


class Compiled:
    """Keeps with what it was launched."""

    def __init__(self, source: Any, options: Any) -> None:
        self.source, self.options = source, options
        self.launches: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What is compiled, for a GPU that is not there."""
    made: list[Compiled] = []

    def compile(source: Any, target: Any, options: Any) -> Compiled:
        made.append(Compiled(source, options))
        return made[-1]

    active = SimpleNamespace(get_current_target=lambda: None)
    monkeypatch.setattr(triton, "compile", compile)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    return made


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    kernel = SimpleNamespace(fn=named_kernel, __name__="named_kernel", arg_names=["p_out", "inputs", "rules"])
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    return Launcher(kernel, "p_out", "inputs.p_in")


def base() -> dict[str, Any]:
    x = torch.empty(64)
    return {"p_out": x[:16], "inputs": Inputs(x[16:]), "rules": Rules()}


WARPS = {"num_warps": 4}


def test_the_like_is_compiled_once_and_gets_its_own_arguments(
    launcher: Launcher, compiled: list[Compiled]
) -> None:
    first = base()
    other = {
        "p_out": torch.empty(16),
        "inputs": Inputs(torch.empty(9), None, 2**31 - 1, 0.5),
        "rules": Rules(),
    }
    launcher(4, WARPS, **first)
    launcher(5, WARPS, **dict(reversed(other.items())))
    (only,) = compiled
    for (grid, passed), programs, given in zip(only.launches, (4, 5), (first, other), strict=True):
        assert grid == (programs, 1, 1)
        assert all(x is y for x, y in zip(passed, given.values(), strict=True))


def test_what_is_compiled_is_what_is_passed(launcher: Launcher, compiled: list[Compiled]) -> None:
    inputs = Inputs(torch.empty(64, dtype=torch.bfloat16)[1:], None, 2**40, 0.5)
    launcher(4, WARPS, p_out=torch.empty(16), inputs=inputs, rules=Rules(NAME="k3"))
    source = compiled[0].source
    assert source.signature == {
        "p_out": "*fp32",
        "inputs": Inputs("*bf16", "constexpr", "i64", "fp32"),
        "rules": "constexpr",
    }
    assert source.constants == {(1, 1): None, (2,): Rules(NAME="k3")}
    assert source.attrs == {(0,): [["tt.divisibility", 16]]}


@pytest.mark.parametrize(
    "other",
    [
        {"p_in": torch.empty(64, dtype=torch.float64)},
        {"p_in": torch.empty(64)[1:]},
        {"window": 7},
        {"window": 30.5},
        {"scale": 1},
        {"n": 2**31},
        {"BLOCK": 256},
        {"num_warps": 8},
    ],
    ids=["dtype", "misaligned", "present", "float", "int", "wide", "constant", "option"],
)
def test_what_differs_in_kind_is_compiled_anew(
    launcher: Launcher, compiled: list[Compiled], other: dict[str, Any]
) -> None:
    given = base()
    launcher(4, WARPS, **given)
    for name in ("inputs", "rules"):
        of_group = {field: x for field, x in other.items() if field in given[name]._fields}
        given[name] = given[name]._replace(**of_group)
    launcher(4, {"num_warps": other.get("num_warps", 4)}, **given)
    assert [len(x.launches) for x in compiled] == [1, 1]


def test_a_group_that_is_not_there_is_another_kind(launcher: Launcher, compiled: list[Compiled]) -> None:
    launcher = Launcher(launcher.kernel, "p_out")
    launcher(4, WARPS, **base())
    launcher(4, WARPS, **base() | {"inputs": None})
    assert compiled[1].source.signature["inputs"] == "constexpr"


def test_names_that_are_no_parameters_or_fields_are_refused(
    launcher: Launcher, compiled: list[Compiled]
) -> None:
    with pytest.raises(TypeError, match="named_kernel: p_outt: want a value for each of its parameters"):
        launcher(4, WARPS, **base(), p_outt=torch.empty(9))
    with pytest.raises(TypeError, match="named_kernel: rules: want"):
        launcher(4, WARPS, p_out=torch.empty(9), inputs=Inputs(torch.empty(9)))
    with pytest.raises(TypeError, match="widnow"):
        Inputs(torch.empty(9), widnow=3)
    assert not compiled


class Gpu:
    """Streams, capture and memory pools as torch has them on a GPU; a pool is a thread's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.capturing, self.pools = torch.device("cuda", 0), False, {}
        zeros = torch.zeros

        def made(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            x = zeros(n, dtype=dtype)
            self.pools[x.untyped_storage().data_ptr()] = threading.get_ident()
            return x

        stream = SimpleNamespace(synchronize=lambda: None)
        driver = SimpleNamespace(get_current_stream=lambda index: 7 + index)
        monkeypatch.setattr(torch, "zeros", made)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def in_pool_of_this_thread(self, x: torch.Tensor) -> bool:
        return self.pools[x.untyped_storage().data_ptr()] == threading.get_ident()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_counters_of_a_graph_are_its_own(gpu: Gpu) -> None:
    counters = Counters()
    eager = counters.take(gpu.device, 10)
    assert counters.take(gpu.device, 100).data_ptr() == eager.data_ptr()
    assert len(counters.take(gpu.device, 10_000)) >= 10_000
    gpu.capturing = True
    first, second = counters.take(gpu.device, 10), counters.take(gpu.device, 10)
    assert not {x.data_ptr() for x in (first, second)} & {eager.data_ptr()}
    assert first.data_ptr() != second.data_ptr()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert len(counters.take(gpu.device, 2 * Counters.SPARE)) == 2 * Counters.SPARE


def test_counters_are_not_in_the_pool_of_a_graph_that_warms_up(gpu: Gpu) -> None:
    """``torch.compile(mode="reduce-overhead")`` frees or overwrites what its first call allocates."""
    counters = Counters()
    assert not gpu.in_pool_of_this_thread(counters.take(gpu.device, 10))
    gpu.capturing = True
    assert not gpu.in_pool_of_this_thread(counters.take(gpu.device, 10))


def test_counters_are_forgotten() -> None:
    counters = Counters()
    counters.take(DEVICE, 10).fill_(1)
    counters.forget()
    assert not counters.take(DEVICE, 10).any()


def test_counters_grow_and_are_discarded() -> None:
    small = COUNTERS.take(DEVICE, 1)
    assert COUNTERS.take(DEVICE, 1).data_ptr() == small.data_ptr()
    COUNTERS.discard(DEVICE)
    assert COUNTERS.take(DEVICE, 1).data_ptr() != small.data_ptr() or len(small) == 0
