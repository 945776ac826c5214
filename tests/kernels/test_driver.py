"""What reaches the driver: Triton's launcher over one that launches nothing, byte by byte."""

import json
import shutil
from pathlib import Path

import pytest
from support.kernels import compiling, kernels

triton_nvidia = pytest.importorskip("triton.backends.nvidia.driver")
INCLUDE = Path(triton_nvidia.__file__).parent / "include"
pytestmark = [
    pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc to compile the driver that launches nothing"),
    pytest.mark.skipif(not (INCLUDE / "cuda.h").exists(), reason="this Triton has no headers of CUDA"),
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("driver")
    environment = {
        "CUDA_LOG": str(folder / "log"),
        # Nobody runs what is compiled: what is passed to it counts.
        "DISABLE_LLVM_OPT": "1",
        "DISABLE_PTXAS_OPT": "1",
    }
    printed = compiling("support.driver", str(folder), **environment)
    return [json.loads(line) for line in printed.splitlines()]


def test_every_parameter_is_what_was_passed(launches: list[dict]) -> None:
    assert [launch for launch in launches if launch["wrong"]] == []


def test_every_kernel_was_launched(launches: list[dict]) -> None:
    assert {launch["kernel"] for launch in launches} == kernels() | {"mixed_kernel"}


def test_the_like_is_not_compiled_again(launches: list[dict]) -> None:
    how: dict[str, list[str]] = {}
    for launch in launches:
        if launch["kernel"] != "prepare_kernel":
            how.setdefault(launch["call"], []).append(launch["how"])
    assert how["attend"] == how["rows"] == how["chunks"] == ["compiled", "again"]
    mixed = [launch["how"] for launch in launches if launch["kernel"] == "mixed_kernel"]
    assert [i for i, x in enumerate(mixed) if x == "again"] == [1, 5, 8, 10]


def test_a_groups_advantages_are_one_launch(launches: list[dict]) -> None:
    """From queries and keys to the advantage of each token."""
    assert [launch["kernel"] for launch in launches if launch["call"] == "groups"] == ["attend_kernel"]


def test_numbers_keep_their_kinds(launches: list[dict]) -> None:
    kinds = [launch["numbers"] for launch in launches if launch["kernel"] == "mixed_kernel"]
    assert kinds[0] == ["i32", "fp32"]
    assert ["i32", "i32", "fp32"] in kinds
    assert ["fp32", "i32", "fp32"] in kinds
    assert kinds[6] == ["i32", "i32"]
    assert kinds[7] == kinds[8] == ["i64", "fp32"]
