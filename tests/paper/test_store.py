import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import start

from benchmarks.paper import store
from benchmarks.paper.store import MACHINES, NEW, Table, collect

SQUARES = Table("squares", lambda record: record["of"])
TABLES = (SQUARES, Table("cubes", lambda record: record["of"]))
HERE, THERE = {"cpus": 2, "gpu": None}, {"cpus": 8, "gpu": "H100"}


class Number:
    def __init__(self, key: int) -> None:
        self.key, self.name = key, f"number, {key}"


def record(of: int, machine: dict[str, Any] = HERE, **more: Any) -> dict[str, Any]:
    return {"of": of, "commit": "abc1234", "versions": {"python": "3.11"}, "machine": machine, **more}


def keep(folder: Path, *records: dict[str, Any]) -> None:
    for one in records:
        SQUARES.add(one, folder, Number(one["of"]).name)


def collected(folder: Path, *records: dict[str, Any]) -> list[str]:
    """The lines after these records came in."""
    keep(folder, *records)
    collect(folder, TABLES)
    return SQUARES.path(folder).read_text().splitlines()


def test_new_records_become_sorted_lines_and_lose_nothing(tmp_path: Path) -> None:
    made = [record(9, curve=[1.5, math.inf]), record(10, THERE), record(3)]
    lines = collected(tmp_path, *made)
    assert [json.loads(line)["of"] for line in lines] == [3, 9, 10]
    assert SQUARES.read(tmp_path) == {one["of"]: one for one in made}
    machines = json.loads((tmp_path / MACHINES).read_text())
    assert sorted(x["machine"]["cpus"] for x in machines.values()) == [2, 8]
    assert not list((tmp_path / NEW).rglob("*.json"))
    more = collected(tmp_path, record(4, THERE))
    assert [more[0], *more[2:]] == lines  # what stood there stands there still
    assert json.loads((tmp_path / MACHINES).read_text()) == machines


def test_missing_is_what_neither_a_line_nor_a_file_has(tmp_path: Path) -> None:
    numbers = [Number(i) for i in (5, 1, 4, 2)]
    assert SQUARES.missing(numbers, tmp_path) == numbers
    collected(tmp_path, record(1))
    keep(tmp_path, record(4))
    assert [number.key for number in SQUARES.missing(numbers, tmp_path)] == [5, 2]


def test_a_fold_cut_off_before_it_took_the_files_away_is_done_again(tmp_path: Path) -> None:
    made = record(1, curve=[math.nan, 2.0])
    before = collected(tmp_path, made)
    assert collected(tmp_path, made) == before
    assert not SQUARES.new(tmp_path, Number(1).name).is_file()


def test_a_fold_cut_off_before_the_lines_stood_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = collected(tmp_path, record(1))

    def full(_value: object) -> str:
        raise OSError("no space left on device")

    keep(tmp_path, record(2, THERE))
    with monkeypatch.context() as patch:
        patch.setattr(store, "json_rows", full)
        with pytest.raises(OSError, match="no space"):
            collect(tmp_path, TABLES)
    assert SQUARES.path(tmp_path).read_text().splitlines() == before
    collect(tmp_path, TABLES)
    assert sorted(SQUARES.read(tmp_path)) == [1, 2]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"of":2,"commit":"abc12', "a record of squares"),
        ("<<<<<<< HEAD", "a record of squares"),
        ("", "a record of squares"),
        ('{"commit":"abc1234","machine":"x"}', "'of'"),
        ('{"of":2,"machine":"x"}', "no commit"),
        ('{"of":2,"commit":"abc1234","machine":"elsewhere"}', "no machine 'elsewhere'"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_folded(tmp_path: Path, broken: str, said: str) -> None:
    lines = collected(tmp_path, record(1), record(3))
    text = "\n".join([lines[0], broken, lines[1]]) + "\n"
    SQUARES.path(tmp_path).write_text(text)
    keep(tmp_path, record(4))
    for use in (SQUARES.read, lambda folder: SQUARES.missing([], folder), lambda f: collect(f, TABLES)):
        with pytest.raises(ValueError, match=r"squares\.jsonl, line 2: ") as error:
            use(tmp_path)
        assert said in str(error.value)
    assert SQUARES.path(tmp_path).read_text() == text
    assert SQUARES.new(tmp_path, Number(4).name).is_file()


def test_a_line_that_comes_twice_is_named(tmp_path: Path) -> None:
    lines = collected(tmp_path, record(1), record(3))
    SQUARES.path(tmp_path).write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(ValueError, match="line 3: got a second record of 1"):
        SQUARES.read(tmp_path)


def test_a_second_and_other_record_is_refused(tmp_path: Path) -> None:
    before = collected(tmp_path, record(1, curve=[1.0]))
    with pytest.raises(ValueError, match=r"number_1\.json: .*squares\.jsonl has another record of the same"):
        collected(tmp_path, record(1, curve=[2.0]))
    assert SQUARES.path(tmp_path).read_text().splitlines() == before
    assert SQUARES.new(tmp_path, Number(1).name).is_file()


@pytest.mark.parametrize("broken", ["{}", '{"of":1', '{"of":1,"commit":"abc1234","machine":{}}'])
def test_a_broken_new_file_is_named(tmp_path: Path, broken: str) -> None:
    keep(tmp_path, record(1))
    SQUARES.new(tmp_path, Number(1).name).write_text(broken)
    with pytest.raises(ValueError, match=r"number_1\.json: got"):
        collect(tmp_path, TABLES)


def test_a_broken_machine_file_is_named(tmp_path: Path) -> None:
    collected(tmp_path, record(1))
    (tmp_path / MACHINES).write_text("{")
    with pytest.raises(ValueError, match=r"machine\.json: "):
        SQUARES.read(tmp_path)


def write(first: int, folder: Path) -> None:
    for of in range(first, first + 2000):
        keep(folder, record(of))
        if of % 5 == 0:
            collect(folder, TABLES)


def test_processes_that_write_and_fold_at_once_lose_nothing(tmp_path: Path) -> None:
    """Two that are killed in the middle, while this one folds too."""
    processes = [start(write, first, tmp_path) for first in (0, 2000)]
    try:
        deadline = time.monotonic() + 120
        seen: set[int] = set()
        while min(sum(of < 2000 for of in seen), sum(of >= 2000 for of in seen)) < 50:
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in processes)
            if tmp_path.is_dir():
                collect(tmp_path, TABLES)
                now = set(SQUARES.read(tmp_path))
                assert seen <= now
                seen = now
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    collect(tmp_path, TABLES)
    kept = set(SQUARES.read(tmp_path))
    assert seen <= kept
    for first in (0, 2000):  # each wrote one after another, so a hole is a record that was lost
        mine = {of for of in kept if first <= of < first + 2000}
        assert mine == set(range(first, first + len(mine)))
