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
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("driver")
    environment = {
        "CUDA_LOG": str(folder / "log"),
        # Nobody runs what is compiled: what is passed to it counts.
        "DISABLE_LLVM_OPT": "1",
        "DISABLE_PTXAS_OPT": "1",
    }
    printed = compiling("support.driver", str(folder), **environment)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def launches(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "kernel" in line]


@pytest.fixture(scope="module")
def repeats(lines: list[dict]) -> list[dict]:
    """The third call of each layout."""
    return [line for line in lines if "repeated" in line]


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


PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""Of ``CUlaunchAttributeID``."""


def test_dependent_launches_touch_no_memory_before_the_one_they_follow_has_ended(
    launches: list[dict],
) -> None:
    """Counters too: they are the same ones in every launch."""
    begin, wait = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
    found = [(x["kernel"], x["attributes"], x["ptx"]) for x in launches if x["call"] == "dependent"]
    assert found == [
        x
        for sweep in ("rows_kernel", "chunks_kernel")
        for x in [
            ("attend_kernel", [], [begin, "memory"]),
            ("means_kernel", [PROGRAMMATIC_STREAM_SERIALIZATION], [begin, wait, "memory"]),
            (sweep, [PROGRAMMATIC_STREAM_SERIALIZATION], [wait, "memory"]),
        ]
    ]
    others = [x for x in launches if x["call"] != "dependent"]
    assert {(*x["attributes"], *x["ptx"]) for x in others} <= {("memory",), ()}


def test_numbers_keep_their_kinds(launches: list[dict]) -> None:
    kinds = [launch["numbers"] for launch in launches if launch["kernel"] == "mixed_kernel"]
    assert kinds[0] == ["i32", "fp32"]
    assert ["i32", "i32", "fp32"] in kinds
    assert ["fp32", "i32", "fp32"] in kinds
    assert kinds[6] == ["i32", "i32"]
    assert kinds[7] == kinds[8] == ["i64", "fp32"]


def test_a_repeated_call_passes_what_the_same_call_made_anew_passes(repeats: list[dict]) -> None:
    """On every launch path; outputs and memory between launches lie elsewhere, apart from each other."""
    assert [call for call in repeats if call["wrong"]] == []
    assert {
        "attend",
        "reading on",
        "rows",
        "chunks",
        "dependent",
        "columns",
        "rollout",
        "whiten",
        "fused",
    } < {x["call"] for x in repeats}
    for call in repeats:
        assert call["repeated"] == [True], call
        assert call["launched"] >= 1


def test_a_repeated_call_makes_its_outputs_and_one_allocation_more(repeats: list[dict]) -> None:
    for call in repeats:
        made = [call["operators"].pop(f"aten::{name}") for name in ("empty_like", "empty_strided")]
        assert made == [call["outputs"] + (call["between"] > 0)] * 2, call
        zeroed = {"aten::slice", "aten::as_strided", "aten::zero_"} if call["call"] == "rollout" else set()
        taken_apart = {"aten::unsafe_split_with_sizes", "aten::as_strided"}
        alike = taken_apart if call["outputs"] < call["returned"] else set()
        assert call["operators"].keys() == zeroed | alike, call
    # Tokens; flags, moments and statistics of rows; what lies between.
    (fused,) = [call for call in repeats if call["call"] == "fused"]
    assert (fused["returned"], fused["outputs"], fused["between"] > 0) == (8, 4, True)


def test_a_repeated_call_enters_few_functions(repeats: list[dict]) -> None:
    """What it costs a thread, counted; Triton's launcher enters 7 of them."""
    entered = {call["call"]: call["functions"] for call in repeats}
    anew, again = entered["fused"]
    assert again < 30
    assert 6 * again < anew
