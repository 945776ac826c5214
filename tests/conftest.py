import os
import warnings
from collections.abc import Iterator

# Triton reads this when it is imported; on a machine with a GPU the kernels are compiled instead.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from support import fast_interpreter

INTERPRETER = fast_interpreter.install() if os.environ.get("TRITON_INTERPRET") == "1" else "none: compiled"

settings.register_profile(
    "attnshape", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("attnshape")
COMPILED_EXAMPLES = 12
"""At most, on a GPU: nearly each example needs another specialisation, which takes seconds to compile."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="i/n: every n-th test, from the i-th on")


def pytest_report_header() -> str:
    return f"kernels: {INTERPRETER}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]
    for test in {item.obj for item in items if isinstance(item, pytest.Function)}:
        if torch.cuda.is_available() and is_hypothesis_test(test):
            asked = test._hypothesis_internal_use_settings
            examples = min(asked.max_examples, COMPILED_EXAMPLES)
            test._hypothesis_internal_use_settings = settings(asked, max_examples=examples)


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
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
