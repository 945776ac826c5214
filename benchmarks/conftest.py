"""pytest-benchmark as the harness of what the project's own clock measures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from attnshape.bench.machine import machine_facts
from benchmarks.record import Recorder, clock

MISSING = pytest.StashKey[dict[str, str]]()


@pytest.fixture
def record(benchmark: BenchmarkFixture) -> Recorder:
    return Recorder(benchmark)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def small(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--small"))


@pytest.fixture(scope="session")
def seconds(small: bool, device: torch.device) -> float:
    """How long one timing may take, about."""
    return 0.005 if small else 0.2 if device.type == "cuda" else 0.4


@pytest.fixture(scope="session")
def missing(pytestconfig: pytest.Config) -> dict[str, str]:
    """Peers that are not there, and why; they stand in the results."""
    return pytestconfig.stash[MISSING]


@pytest.fixture(autouse=True)
def memory_returned(device: torch.device) -> Iterator[None]:
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help="where the benchmarks compute")
    parser.addoption("--small", action="store_true", help="small shapes, to exercise the benchmarks")
    parser.addoption("--peers", type=Path, default=Path(".peers"), help="folder of the peers' environments")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MISSING] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine_facts(torch.device(config.getoption("--device")))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["missing"] = config.stash[MISSING]
    commit = output_json.pop("commit_info")
    output_json["commit"] = {name: commit.get(name) for name in ("id", "dirty")}
    for result in output_json["benchmarks"]:  # its figures stand in extra_info
        for name in ("options", "params", "param"):
            del result[name]
        del result["stats"]["data"]
