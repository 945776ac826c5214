"""``make gpu``, as far as a machine without a GPU can tell: it goes on whatever happens, and says what."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.kernels import kernels

from benchmarks.cases import budget_cases
from benchmarks.on_gpu import budgets, carried, parts, shards, summary, tuning
from benchmarks.on_gpu.__main__ import chosen
from benchmarks.on_gpu.runner import Part, Runner
from benchmarks.results import ROOT

pytest.importorskip("triton.backends.nvidia.driver")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def by_item(lines: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    return {line["item"]: line for line in lines if line["part"] == part and "item" in line}


# The whole program, over the driver that launches nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("no gcc to compile the driver that launches nothing")
    out = tmp_path_factory.mktemp("stub")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment["TMPDIR"] = str(out)  # Triton's cache too
    command = [sys.executable, "-m", "support.gpu_stub", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out


def test_every_part_runs_to_its_end(folder: Path) -> None:
    lines = lines_of(folder / "whole")
    ended = {line["part"]: line["ended"] for line in lines if "ended" in line}
    assert ended == dict.fromkeys([*parts.SECONDS, "ahead"], "ok")
    statuses = Counter(line["status"] for line in lines if "status" in line and line["part"] != "tests")
    assert set(statuses) == {"ok"}
    assert statuses["ok"] > 300


def test_parts_can_be_named(folder: Path) -> None:
    ended = {line["part"] for line in lines_of(folder / "some") if "ended" in line}
    assert ended == {"facts", "ahead"}


def test_smoke_starts_every_kernel(folder: Path) -> None:
    smoke = by_item(lines_of(folder / "whole"), "smoke")
    assert {name for line in smoke.values() for name in line["kernels"]} == kernels()
    attend = smoke["scores, then programs share a row"]["kernels"]
    assert attend == ["attend_kernel", "means_kernel", "chunks_kernel"]
    assert smoke["the last program of a row shapes it"]["kernels"] == ["attend_kernel"]
    assert smoke["programs share a row, in groups"]["kernels"] == ["chunks_kernel"]
    assert smoke["a row of attention, long"]["kernels"] == ["attend_kernel", "means_kernel"]


def test_launches_reach_the_driver(folder: Path) -> None:
    started = Counter(json.loads(line)["name"] for line in (folder / "launches").read_text().splitlines())
    assert set(started) == {"moments_kernel", "whiten_kernel", "fold_kernel"}
    assert started["whiten_kernel"] > 200  # a race's repeats among them


def test_tables_say_what_was_found(folder: Path) -> None:
    found = json.loads((folder / "whole" / "summary.json").read_text())
    assert len(found["budgets"]) == len(list(budget_cases())) + len(budgets.HOST)
    fused = found["budgets"][0]
    assert fused["share_of_copy"]["value"] == pytest.approx(10 / 12)
    assert fused["met"]
    assert not found["budgets"][1]["met"]  # 83%, where 90 are promised
    text = (folder / "whole" / "summary.md").read_text()
    assert (
        "| fused, B 32 S 2048 R 1024 | 12.0 (12.0 to 12.0) | 83% | 83% | 80% of a copy | 12.5 | met |" in text
    )
    assert "csrc_triton/host/attention.py: KEYS = 32" in text  # what the faked times favour
    assert "| tests | a::bad | failed |  |  | it broke here |" in text
    machine = found["machine"]
    assert machine["source"] == carried.source_digest()


def test_what_is_broken_stops_what_needs_it(folder: Path) -> None:
    lines = lines_of(folder / "faults")
    smoke = by_item(lines, "smoke")
    assert {name: line["status"] for name, line in smoke.items() if line["status"] != "ok"} == {
        "a program sweeps a row": "wrong",
        "rows that begin where they may": "wrong",
        "the recurrence alone": "wrong",
        "turns, masked tokens skipped": "wrong",
        "turns, masked tokens steps": "wrong",
        "programs share a row": "hung",
        "programs share a row, in groups": "skipped",
        "programs share a row, recurrence alone": "skipped",
        "packed rows": "wrong",
        "packed rows, long": "skipped",
        "a row of attention, long": "died",
        "scores, then programs share a row": "skipped",
        "scores, then a program sweeps a row": "skipped",
        "columns": "failed",
        "rollout": "failed",
    }
    hung = smoke["programs share a row"]["launch"]
    assert hung["tag"] == "chunks_kernel weights"
    assert hung["given"]["inputs"]["p_weights"] == "float32[1, 5200]"
    assert hung["given"]["grid"]["n_tasks"] == 11
    assert smoke["a row of attention, long"]["launch"]["tag"] == "means_kernel bfloat16"
    assert smoke["columns"]["launch"]["tag"].startswith("column_kernel")
    # Of a wrong number those are to blame that no other item has proved.
    assert smoke["packed rows"]["broken"] == ["rows_kernel weights packed"]
    asked = by_item(lines, "budgets")
    assert asked["fused, B 32 S 2048 R 1024"]["status"] == "ok"
    assert asked["whiten, 4096x512"]["status"] == "ok"
    assert asked["sweep, 1x131072"]["status"] == "skipped"
    assert "hung in smoke, programs share a row" in asked["sweep, 1x131072"]["error"]
    assert asked["gae, 4096x512"]["status"] == "skipped"
    text = (folder / "faults" / "summary.md").read_text()
    assert "| smoke | programs share a row | hung | chunks_kernel weights | 22 |" in text


def test_out_of_time(folder: Path) -> None:
    lines = lines_of(folder / "late")
    assert [line["status"] for line in lines if "status" in line][-2:] == ["out of time", "skipped"]
    assert lines[-1]["ended"] == "out of time"
    assert (folder / "late" / "summary.md").exists()


# The runner


def says(*events: dict[str, Any], then: str = "") -> list[str]:
    """A worker that says this, and then does that."""
    code = f"""import os, json, time, sys
out = os.fdopen(int(os.environ["ON_GPU_EVENTS"]), "w")
told = json.loads(os.environ["ON_GPU_TOLD"])
for event in {list(events)!r}:
    if event.get("name", event.get("item")) not in told["done"]:
        print(json.dumps(event), file=out, flush=True)
{then}"""
    return [sys.executable, "-c", code]


def test_a_process_is_watched(tmp_path: Path) -> None:
    item = {"event": "item", "name": "first", "limit": 60}
    line = {"event": "line", "item": "first", "status": "ok", "x": 1}
    hangs = {"event": "item", "name": "second", "limit": 0.3}
    finished = 'print(\'{"event": "finished"}\', file=out, flush=True)'
    stuck = f"if 'second' not in told['done']: time.sleep(60)\n{finished}"
    runner = Runner(tmp_path)
    runner.run(
        [
            Part("good", 60, says(item, line, then=finished)),
            Part("hangs once", 60, says(item, line, hangs, then=stuck)),
            Part("cannot begin", 60, says(then="print('no such thing'); sys.exit(3)")),
            Part("a command", 60, [sys.executable, "-c", "print('said this')"], watched=False),
            Part("fails", 60, [sys.executable, "-c", "raise SystemExit('broke')"], watched=False),
        ]
    )
    ended = {x["part"]: x["ended"] for x in runner.lines if "ended" in x}
    assert ended == {
        "good": "ok",
        "hangs once": "ok",
        "cannot begin": "died: exit status 3",
        "a command": "ok",
        "fails": "failed: exit status 1",
    }
    assert by_item(runner.lines, "hangs once")["second"]["status"] == "hung"
    assert len([x for x in runner.lines if x["part"] == "cannot begin" and "item" in x]) == 2
    assert "no such thing" in by_item(runner.lines, "cannot begin")["between items"]["error"]
    assert by_item(runner.lines, "a command")["a command"]["said"] == "said this\n"
    assert "broke" in by_item(runner.lines, "fails")["fails"]["error"]
    assert lines_of(tmp_path) == json.loads(json.dumps(runner.lines))


# Tables


def tried(name: str, case: str, value: float, **constants: Any) -> dict[str, Any]:
    return {"part": "tuning", "round": name, "case": case, "constants": constants, "us": {"value": value}}


def test_the_best_constants_lose_least_over_all_cases() -> None:
    lines = [
        tried("keys", "a", 10.0, KEYS=64), tried("keys", "b", 100.0, KEYS=64),
        tried("keys", "a", 9.0, KEYS=32), tried("keys", "b", 80.0, KEYS=32),
        tried("keys", "a", 5.0, KEYS=128),  # refused for the other
    ]  # fmt: skip
    [found] = summary.tuned(lines)
    assert [row["constants"] for row in found["settings"]] == [{"KEYS": 32}, {"KEYS": 64}]
    assert found["settings"][0]["loss"] == 1.0
    assert found["now"]["loss"] == pytest.approx((10 / 9 * 100 / 80) ** 0.5)


def test_what_is_within_noise_stays() -> None:
    lines = [
        tried("keys", "a", 10.0, **{"attention.KEYS": 64}),
        tried("keys", "a", 9.9, **{"attention.KEYS": 32}),
    ]
    assert summary.to_commit(summary.tuned(lines)) == [
        "# keys: what stands there is best, or within 2% of it"
    ]
    lines[1]["us"]["value"] = 9.0
    assert summary.to_commit(summary.tuned(lines)) == ["csrc_triton/host/attention.py: KEYS = 32"]


def test_the_longest_response_of_one_launch() -> None:
    one, two = {"attention.ONE_LAUNCH": 1 << 30}, {"attention.ONE_LAUNCH": 0}
    lines = []
    for width, of_one, of_two in ((512, 5, 8), (1024, 7, 9), (2048, 12, 11), (4096, 20, 30)):
        case = f"fused, B 8 S {2 * width} R {width}"
        lines += [tried("one launch", case, of_one, **one), tried("one launch", case, of_two, **two)]
    assert summary.to_commit(summary.tuned(lines)) == ["csrc_triton/host/attention.py: ONE_LAUNCH = 1024"]


def test_what_is_tried_first_is_what_stands() -> None:
    """With which the others are compared; ``one launch`` and ``steps`` are of ways, not of constants."""
    for each in tuning.rounds():
        if each.name != "one launch":
            for name, x in each.settings[0].items():
                module, constant = name.split(".")
                standing = getattr(importlib.import_module(tuning.ROOM + module), constant)
                assert standing is x or standing == x, (each.name, name)


def test_what_the_choice_between_two_ways_loses() -> None:
    times = {"1x4096": (9.0, 9.0, 18.0), "512x4096": (45.0, 30.0, 45.0)}
    lines = [
        tried("steps", f"sweep, {shape}", us, **{"rewards.in_chunks": way})
        for shape, of_ways in times.items()
        for way, us in zip(("in_chunks", "always", "never"), of_ways, strict=True)
    ]
    [advice] = summary.to_commit(summary.tuned(lines))
    assert advice == "# steps: what stands there loses 25.0% on average, most at sweep, 512x4096: 50%"


# What is carried, and what is asked of pytest


def test_some_parts_are_asked_and_given_their_seconds() -> None:
    parts = [Part("facts", 45.0, []), Part("smoke", 105.0, []), Part("tests", 90.0, [])]
    assert chosen(parts, ()) == parts
    assert chosen(parts, ("tests=50", "fact")) == [parts[0], parts[2]._replace(seconds=50.0)]


def test_a_cache_is_used_only_where_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "CACHE", tmp_path / "cache")
    packed = tmp_path / "packed"
    assert carried.unpacked(packed) == "no cache was carried: kernels are compiled here"
    (tmp_path / "cache" / "entry").mkdir(parents=True)
    for name in ("a.cubin", "a.json", "a.llir"):
        (tmp_path / "cache" / "entry" / name).write_text(name)
    assert carried.pack(packed) > 0
    shutil.rmtree(tmp_path / "cache")
    assert carried.unpacked(packed) == "a cache of 1 entries was carried"
    assert {path.name for path in (tmp_path / "cache" / "entry").iterdir()} == {"a.cubin", "a.json"}
    made_for = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(made_for | {"source": "other"}))
    assert carried.unpacked(packed) == (
        "a cache of 1 entries was carried, of other kernels: what changed is compiled here"
    )
    (packed / "manifest.json").write_text(json.dumps(made_for | {"triton": "3.6.0", "python": "other"}))
    said = carried.unpacked(packed)
    assert said.startswith("the carried cache is not used: triton is ")
    assert f"python is {made_for['python']}, of the cache other" in said


def test_tests_on_a_gpu_are_those_that_use_it(tmp_path: Path) -> None:
    files = [str(path.relative_to(ROOT / "tests")) for path in shards.files()]
    assert {"test_backends.py", "test_whiten.py", "kernels/test_rewards.py"} <= set(files)
    assert not {"test_gpu.py", "demo/test_demo.py", "kernels/test_compile.py", "bench/test_on_gpu.py"} & set(
        files
    )
    first = [name.startswith("kernels/") for name in files]
    assert first == sorted(first, reverse=True)
    commands = shards.commands(tmp_path, 3)
    assert [command[-len(files) - 1] for command in list(commands.values())[1:]] == [
        "--shard=0/2",
        "--shard=1/2",
    ]


def test_a_shard_that_never_reported_is_told_by_its_last_word(tmp_path: Path) -> None:
    (tmp_path / "shard 00.log").write_text("a::b PASSED\na::c ")
    [line] = parts.shards_of(tmp_path)
    assert line["status"] == "out of time"
    assert line["error"].endswith("a::c")


def test_parts_fit_their_minutes() -> None:
    assert sum(parts.SECONDS.values()) <= 540
    asked, missing = parts.more(Path("out"))
    names = {part.name for part in asked} | set(missing)
    assert {"more: memcheck", "more: racecheck", "more: forward and memory", "more: vllm"} <= names
