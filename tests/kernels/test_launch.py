"""The launcher that starts a kernel with what was compiled before, and the counters of a launch."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl

from csrc_triton.launch import COUNTERS, Counters, Launcher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {"p_out": None, "p_in": None, "window": None, "n": 0, "scale": 0.0, "BLOCK": 128}


def parameters(p_out, p_in, window, n, scale, BLOCK: tl.constexpr) -> None:
    """Those of the kernel."""


class Compiled:
    """Keeps with what it was launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """Compiles at every launch, as Triton would where it had seen nothing alike."""

    fn = staticmethod(parameters)

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.compiled.append(Compiled())
            self.compiled[-1][grid](*arguments)
            return self.compiled[-1]

        return launch


@pytest.fixture
def launcher() -> Launcher:
    return Launcher(Kernel(), DEFAULTS, ("p_in", "p_out"))


def base() -> dict[str, Any]:
    x = torch.empty(64)
    return {"p_out": x[:16], "p_in": x[16:], "n": 3}


def test_the_like_is_compiled_once_and_gets_its_own_arguments(launcher: Launcher) -> None:
    first = base()
    other = {"p_out": torch.empty(9), "p_in": torch.empty(9), "n": 2**31 - 1, "scale": 0.5}
    launcher(4, first, {"num_warps": 4})
    launcher(5, other, {"num_warps": 4})
    (compiled,) = launcher.kernel.compiled
    for (grid, passed), programs, given in zip(compiled.launches, (4, 5), (first, other), strict=True):
        assert grid == (programs, 1, 1)
        assert all(x is y for x, y in zip(passed, (DEFAULTS | given).values(), strict=True))


@pytest.mark.parametrize(
    "other",
    [
        {"p_in": torch.empty(64, dtype=torch.float64)},
        {"p_in": None},
        {"p_in": torch.empty(64)[1:]},
        {"p_in": torch.empty(2**29, device="meta")},
        {"window": 7},
        {"window": 30.5},
        {"scale": 1},
        {"n": 2**31},
        {"BLOCK": 256},
        {"num_warps": 8},
    ],
    ids=["dtype", "absent", "misaligned", "far", "present", "float", "int", "wide", "constant", "option"],
)
def test_what_differs_in_kind_is_compiled_anew(launcher: Launcher, other: dict[str, Any]) -> None:
    launcher(4, base(), {"num_warps": 4})
    options = {"num_warps": other.get("num_warps", 4)}
    launcher(4, base() | {name: x for name, x in other.items() if name in DEFAULTS}, options)
    assert [len(compiled.launches) for compiled in launcher.kernel.compiled] == [1, 1]


def test_wide_integers_are_left_to_triton(launcher: Launcher) -> None:
    for n in (2**31, 2**63):
        launcher(4, base() | {"n": n}, {"num_warps": 4})
    assert len(launcher.kernel.compiled) == 2


def test_a_name_that_is_no_parameters_is_refused(launcher: Launcher) -> None:
    with pytest.raises(TypeError, match="parameters: got p_inn, widnow, want names of its parameters"):
        launcher(4, base() | {"p_inn": torch.empty(9), "widnow": 3}, {"num_warps": 4})
    assert not launcher.kernel.compiled


class Gpu:
    """Streams, capture and memory pools as torch has them on a GPU; a pool is a thread's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.capturing, self.pools = torch.device("cuda", 0), False, {}
        zeros = torch.zeros

        def made(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            x = zeros(n, dtype=dtype)
            self.pools[x.untyped_storage().data_ptr()] = threading.get_ident()
            return x

        stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
        monkeypatch.setattr(torch, "zeros", made)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
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


def test_counters_grow_and_are_discarded() -> None:
    small = COUNTERS.take(DEVICE, 1)
    assert COUNTERS.take(DEVICE, 1).data_ptr() == small.data_ptr()
    COUNTERS.discard(DEVICE)
    assert COUNTERS.take(DEVICE, 1).data_ptr() != small.data_ptr() or len(small) == 0
