"""That the benchmarks measure what they say, as far as a machine without a GPU can tell."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnshape
from attnshape.compare import mapped
from benchmarks import budgets, cost_model, on_gpu
from benchmarks.cases import Budget, Case, Shape, outputs_of, random_arguments
from benchmarks.kernel_table import programs_per_multiprocessor
from benchmarks.timing import copy_calls, host_seconds, read_calls, time_calls

CPU = torch.device("cpu")
SMALL = Shape(3, 40, 64, heads=4, kv_heads=2, width=16)
TOKENS = SMALL._replace(keys=0)
LENGTHS = {"lengths": (5, 40, 1)}


def bytes_of(x: Any) -> int:
    sizes = []
    mapped(x, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()) or tensor)
    return sum(sizes)


@pytest.mark.parametrize(
    "case",
    [
        *(Case(what, SMALL) for what in ("fused", "credit", "row", "column")),
        *(Case(what, TOKENS) for what in ("sweep", "gae", "whiten")),
        Case("sweep", TOKENS._replace(**LENGTHS, packed=True)),
        Case("fused", SMALL, torch.float32),
    ],
    ids=lambda case: case.name,
)
def test_bytes_are_those_of_the_tensors(case: Case) -> None:
    arguments = random_arguments(case, CPU, 0)
    for of_rows in ("score", "response_start", "response_cu_seqlens"):
        arguments.pop(of_rows, None)
    assert bytes_of(arguments) == case.read
    result = outputs_of(case.what, case.call(random_arguments(case, CPU, 0)))
    assert bytes_of(result) == case.written


def test_padding_is_read_in_the_mask_alone() -> None:
    padded, packed = (Case("gae", TOKENS._replace(**LENGTHS, packed=packed)) for packed in (False, True))
    assert padded.read - packed.read == 3 * 40 - 46
    assert padded.written == 2 * 4 * 3 * 40


def test_limits() -> None:
    assert Budget(of_copy=0.8).limit(8.0) == 10.0
    assert Budget(times_copy=1.3).limit(10.0) == 13.0
    assert Budget(seconds=7e-6).limit(1.0) == 7e-6
    assert Budget().limit(1.0) is None


def test_the_cost_model_by_hand() -> None:
    """32 rows of 1024 tokens on 2048 keys, one launch: 134.2 MB of keys and little else at 4 TB/s."""
    e = cost_model.estimate(Case("fused", Shape(32, 1024, 2048)), cost_model.Gpu(4e12))
    keys, queries = 32 * 2048 * 8 * 128 * 2, 32 * 32 * 128 * 2
    tokens = 32 * 1024 * (3 * 4 + 1 + 5 * 4)
    assert e.launches == 1
    assert e.transfer == pytest.approx((keys + queries + tokens) / 4e12)
    # Two hand-offs of two trips, then two chunks of 512 tokens, one after the other.
    assert e.tail == pytest.approx(2 * 2 * 0.6e-6 + 2 * 3e-6)
    assert e.seconds == pytest.approx(2e-6 + 33.9e-6 + 8.4e-6, rel=0.01)


def test_what_moves_hides_what_waits() -> None:
    slow, fast = (cost_model.estimate(Case("gae", Shape(4096, 512)), cost_model.Gpu(b)) for b in (1e12, 1e15))
    assert slow.seconds == pytest.approx(2e-6 + slow.transfer)
    # 4096 rows of one chunk, three at once on each of 132 multiprocessors.
    assert fast.seconds == pytest.approx(2e-6 + 11 * 3e-6)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "programs"),
    [
        ("sm_90", 168, 0, 3),  # 5376 registers a warp: 3 in a quarter of 16384
        ("sm_90", 128, 0, 4),
        ("sm_90", 32, 0, 16),  # 64 warps
        ("sm_89", 32, 0, 12),  # 48 warps
        ("sm_90", 32, 45056, 5),  # 228 KB of memory
        ("sm_120", 32, 45056, 2),
        ("gfx942", 128, 0, 4),
    ],
)
def test_programs_per_multiprocessor(target: str, registers: int, shared: int, programs: int) -> None:
    assert programs_per_multiprocessor(target, registers, shared, warps=4) == programs


def test_timing_on_a_cpu() -> None:
    x = torch.ones(1000)
    timing = time_calls([lambda: x.add(1), lambda: x.add(2)], CPU, 0.01)
    assert 0 < timing.seconds < 0.1
    assert timing.how == "clock"
    assert 0 < host_seconds(lambda: x.add(1), CPU, 3, 3) < 0.1
    source = copy_calls(4096, 2, CPU)[0]()
    assert source.numel() == 4096 // 8
    assert read_calls(8192, 2, CPU)[0]().item() == 8192 / 4


def run_budgets(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[bool, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["budgets", str(out), "--device", "cpu", "--quick"])
    with pytest.raises(SystemExit) as ended:
        budgets.main()
    return bool(ended.value.code), json.loads((out / "budgets.json").read_text())["rows"]


def test_budgets_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed, rows = run_budgets(monkeypatch, tmp_path)
    assert not failed
    assert len(rows) > 10
    for row in rows:
        assert row.get("seconds", 1) > 0
        if "of_copy" in row:
            assert row["error"] <= 1
            assert row["of_copy"] == pytest.approx(row["copy_seconds"] / row["seconds"])
    text = (tmp_path / "budgets.md").read_text()
    assert all(row["case"] in text for row in rows)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(*arguments: Any, backend: str, **options: Any) -> Any:
        advantages, returns = right(*arguments, backend=backend, **options)
        return advantages * (1 if backend == "torch" else 1.001), returns

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel")

    right = attnshape.gae
    monkeypatch.setattr(attnshape, "gae", wrong)
    monkeypatch.setattr(attnshape, "whiten", broken)
    failed, rows = run_budgets(monkeypatch, tmp_path)
    assert failed
    of = {row["case"].split(",")[0]: row for row in rows}
    assert "wrong" in of["gae"]["failed"]
    assert "seconds" not in of["gae"]
    assert "no kernel" in of["whiten"]["failed"]
    assert of["sweep"]["seconds"] > 0


def test_parts_do_not_lose_each_other(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    python = [sys.executable, "-c"]
    parts = [
        on_gpu.pytest_part("tests 0", 60, tmp_path, str(tmp_path), "--rootdir", str(tmp_path)),
        on_gpu.Part("ends", [*python, "print('done')"], 60),
        on_gpu.Part("fails", [*python, "raise SystemExit(3)"], 60),
        on_gpu.Part("hangs", [*python, "import time; print('begun', flush=True); time.sleep(60)"], 2),
    ]
    parts[0].command.remove("filterwarnings=default")
    parts[0].command.remove("-o")
    ended = on_gpu.run(parts, tmp_path)
    assert {x.name: x.status for x in ended} == {"tests 0": 1, "ends": 0, "fails": 3, "hangs": "out of time"}
    assert ended[1].output == "done\n"
    assert ended[3].output.startswith("begun")
    text = on_gpu.summary(ended, on_gpu.merged([tmp_path / "tests-0.xml"]))
    assert "2 tests, 1 failures" in text
    assert "| hangs | out of time |" in text


def test_tests_on_a_gpu_are_those_that_use_it(tmp_path: Path) -> None:
    parts = on_gpu.parts_together(tmp_path, 2, 1.0)
    files = {Path(x).name for x in parts[0].command if x.endswith(".py")}
    assert {"test_triton_backend.py", "test_csrc_triton_sweep.py"} <= files
    assert not {"test_gpu.py", "test_demo.py", "test_kernels_compile.py"} & files
    assert [part.command[-len(files) - 1] for part in parts[:2]] == ["--shard=0/2", "--shard=1/2"]
