"""A file over Ray Data: blocks that are credited apart are the whole, to the byte.

What needs Ray is left out where it is not installed; ``make vllm CELLS='"Ray Data"'`` runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.reward_models import save
from typer.testing import CliRunner, Result

from attnshape.cli import app
from attnshape.text.file import BLOCK_BATCHES, Credited, credited
from attnshape.text.load import RewardModelConfig
from attnshape.text.model import CreditModel
from attnshape.text.over_ray import Block, Creditor, blocks

ROOT = Path(__file__).parents[2]
MARK = "ATTNSHAPE_TEST_OF_RAY"
ACTORS, BATCH = 2, 2
LINES = 30 * BATCH * BLOCK_BATCHES
TIMEOUT = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "llama")


def lines_of(count: int) -> list[bytes]:
    """Completions of many lengths; some lines are empty, or cannot be read or scored."""
    found = []
    for i in range(count):
        record: dict[str, Any] = {"prompt": f"Was film {i} good? ", "response": "not bad. " * (1 + i % 7)}
        if i % 11 == 3:
            record["id"] = i
        if i % 17 == 5:
            record["response"] = "weak " * 400
        found.append(json.dumps(record) + "\n" if i % 13 != 7 else "\n" if i % 2 else "{\n")
    return [line.encode() for line in found]


def test_blocks_apart_are_the_whole(model: Path, tmp_path: Path) -> None:
    lines = lines_of(2 * BLOCK_BATCHES + 9)
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b"".join(lines))
    config = RewardModelConfig(model=str(model))
    whole = Credited.joined([*credited(CreditModel.load(config, "cpu"), lines, with_page=True, batch_size=1)])
    actor = Creditor(path, path.stat().st_size, config, "cpu", (), True, 1)

    def over_actors(done: list[int]) -> Credited:
        found = [*blocks(lines, iter(done), 1)]
        rows = [actor({"item": json.dumps(vars(block))})["credited"] for block in reversed(found)]
        return Credited.joined([Credited(*json.loads(row)) for row in reversed(rows)])

    found = over_actors([])
    assert found.skipped == [list(x) for x in whole.skipped]
    assert found[:4] == whole[:4]
    assert found.size == whole.size == path.stat().st_size
    done = [json.loads(row)["line"] for row in whole.rows.splitlines()][:20]
    rest = over_actors(done)
    assert rest.rows == "".join(whole.rows.splitlines(keepends=True)[20:])
    assert rest.skipped == found.skipped


def test_blocks_that_are_done_are_left_out() -> None:
    lines = [b"a\n"] * BLOCK_BATCHES + [b"\n", b"bb\n"] * (BLOCK_BATCHES // 2) + [b"c"]
    end, size = 2 * BLOCK_BATCHES, 2 * BLOCK_BATCHES
    first, second = [*range(1, BLOCK_BATCHES + 1)], [*range(BLOCK_BATCHES + 2, end + 1, 2)]
    last = Block(end + 1, end + size, 1, [])
    for done, want in (
        ([], [Block(1, 0, end, []), Block(BLOCK_BATCHES + 1, end, size, []), last]),
        (first[:-1], [Block(1, 0, end, first[:-1]), Block(BLOCK_BATCHES + 1, end, size, []), last]),
        (first + second[:3], [Block(BLOCK_BATCHES + 1, end, size, second[:3]), last]),
        (first + second, [last]),
        (second, [Block(1, 0, end, []), last]),
        (first + second + [end + 1], []),
    ):
        assert [*blocks(lines, iter(done), 1)] == want


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["credit", *map(str, arguments)])


def test_what_cannot_work_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b"".join(lines_of(3)))
    monkeypatch.setitem(sys.modules, "ray", None)
    for arguments, message in (
        ((model, "-", "--ray", 2), "--ray: want a file, of which each actor reads its part"),
        ((model, path, "--ray", 0), "'--ray'"),
        ((model, path, "--ray", 2, "--device", "cpu"), "want pip install 'ray[data]'"),
        ((model, path, "--ray", 2, "--device", "cuda:1"), "device: got 'cuda:1', but Ray says which GPU"),
    ):
        result = invoke(*arguments)
        assert result.exit_code in (1, 2)
        assert message in " ".join(result.stderr.split())
    with pytest.raises(ValueError, match=r"got \d+ bytes on a node of Ray's, want 7"):
        Creditor(path, 7, RewardModelConfig(model=str(model)), "cpu", (), False, 1)
    assert [*tmp_path.iterdir()] == [path]


class Cluster:
    """Ray on this machine with a file of completions, and what one process writes of it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.path = folder / "completions.jsonl"
        self.path.write_bytes(b"".join(lines_of(LINES)))
        self.options = ["--html", folder / "page.html", "--batch-size", BATCH, "--device", "cpu"]
        self.whole = self.run()

    def run(self, *arguments: object) -> tuple[bytes, bytes, str]:
        """What is written, and what is said of it."""
        result = invoke(self.model, self.path, *self.options, *arguments)
        assert result.exit_code == 1, result.output  # of the lines that are skipped
        out, page = self.folder / "completions.credit.jsonl", self.folder / "page.html"
        written = out.read_bytes(), page.read_bytes(), result.stderr
        out.unlink()
        page.unlink()
        return written

    def partial(self) -> int:
        """Lines that are written so far."""
        found = [*self.folder.glob("completions.credit.jsonl.*.partial")]
        return found[0].read_bytes().count(b"\n") if found else 0

    def actors(self) -> list[int]:
        """Processes of this cluster's actors that have a model."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = MARK.encode() in (process / "environ").read_bytes()
                if mine and b"Creditor" in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    os.environ[MARK] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Cluster(model, tmp_path_factory.mktemp("cluster"))
    started = ray.init(
        num_cpus=ACTORS, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
    )
    os.environ["RAY_ADDRESS"] = started.address_info["address"]
    yield made
    ray.shutdown()
    for name in (MARK, "RAY_ADDRESS"):
        del os.environ[name]


def test_two_actors_write_what_one_process_writes(cluster: Cluster) -> None:
    assert cluster.run("--ray", ACTORS) == cluster.whole


def test_what_an_actor_cannot_load_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    result = invoke(tmp_path, cluster.path, "--ray", ACTORS, "--device", "cpu")
    assert result.exit_code == 1
    assert f"{tmp_path} is no model: it holds no config.json" in result.stderr.splitlines()[-1]
    assert not cluster.partial()


def test_an_actor_that_is_killed_costs_nothing(cluster: Cluster) -> None:
    killed: list[int] = []

    def kill() -> None:
        until(cluster.partial)
        killed.extend(cluster.actors()[:1])
        os.kill(killed[0], signal.SIGKILL)

    with ThreadPoolExecutor(1) as other:
        done = other.submit(kill)
        assert cluster.run("--ray", ACTORS) == cluster.whole
        done.result()
    assert killed


def test_a_run_that_is_killed_is_gone_on_with(cluster: Cluster) -> None:
    """By actors, whose blocks are those that are missing; or by one process."""
    command = [sys.executable, "-m", "attnshape", "credit", cluster.model, cluster.path, *cluster.options]
    command += ["--ray", ACTORS]
    out, page, said = cluster.whole
    with subprocess.Popen(map(str, command), env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        until(cluster.partial)
        process.kill()
    missing = out.count(b"\n") - cluster.partial()
    assert 0 < missing < out.count(b"\n")
    left = {path: path.read_bytes() for path in cluster.folder.glob("*.partial")}
    for more in (("--ray", ACTORS), ()):
        for path, content in left.items():
            path.write_bytes(content)
        *written, now = cluster.run("--resume", *more)
        assert written == [out, page]
        assert f"{missing} completions written" in now
        assert now.count("skipped: ") == said.count("skipped: ")
