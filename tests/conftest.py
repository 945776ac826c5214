import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Triton reads this when it is imported; on a machine with a GPU the kernels are compiled instead.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The first gradient starts a thread for each device, and no copy of a process with such threads computes
    # one. A build of torch with CUDA counts eight devices once its compiler has run: so this comes before.
    torch.ones((), requires_grad=True).backward()

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from support import bounds, fast_interpreter

INTERPRETER = "none: compiled"
if os.environ.get("TRITON_INTERPRET") == "1":
    bounds.install()
    INTERPRETER = fast_interpreter.install()

settings.register_profile(
    "attnshape", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("attnshape")
COMPILED_EXAMPLES = 12
"""At most, on a GPU: nearly each example needs another specialisation, which takes seconds to compile."""


TESTS = Path(__file__).parent
SHARING = [
    TESTS / file
    for file in (
        "demo/test_demo.py",
        "serve/test_command.py",
        "kernels/test_compile.py",
        "bench/test_benchmarks.py",
        "bench/test_on_gpu.py",
        "kernels/test_driver.py",
        "test_distributed.py",
    )
]
"""Files whose tests share what takes long to make."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="i/n: every n-th test, from the i-th on")


def pytest_report_header() -> str:
    return f"kernels: {INTERPRETER}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]
    lead_halves(items)
    for test in {item.obj for item in items if isinstance(item, pytest.Function)}:
        if torch.cuda.is_available() and is_hypothesis_test(test):
            asked = test._hypothesis_internal_use_settings
            examples = min(asked.max_examples, COMPILED_EXAMPLES)
            test._hypothesis_internal_use_settings = settings(asked, max_examples=examples)


def lead_halves(items: list[pytest.Item]) -> None:
    """Tests that share much first in each half of the run.

    Each of two workers begins with a half, and then steals from the tail of what the other has left, where
    what tests share would be made twice.
    """
    places = [SHARING.index(item.path) if item.path in SHARING else None for item in items]
    left = len(items) // 2 - sum(place is not None and place % 2 == 0 for place in places)
    others = itertools.count()
    keys = [(next(others) >= left, 1, 0) if place is None else (place % 2 == 1, 0, place) for place in places]
    items[:] = [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody wrote is NaN, or a large number, so that reading it shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                x.detach().fill_(
                    float("nan") if x.is_floating_point() else 77 if x.dtype != torch.bool else True
                )
            return x

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
    with warnings.catch_warnings():
        yield


@pytest.fixture
def crossing_rows() -> Iterator[None]:
    """For packed rows that cross each other: several programs store their tokens, NaN in the end."""
    with bounds.in_any_order():
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
