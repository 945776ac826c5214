"""The compiled loops in real processes: their cache, threads, forks, interrupts."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.parallel_sum import total
from support.processes import run_together

import attnshape
from attnshape.cpu import jit, threads
from attnshape.cpu.whiten import merge

ROOT = Path(__file__).parents[2]
PARTS = [[2.0, 1.0, 0.0], [1.0, 4.0, 0.0]]  # two tokens at 1 and one at 4
MERGED = "[3. 2. 6.]"


def merge_in_a_new_process(folder: str) -> None:
    """By the loop that compiles fastest, as a process does that has not used it."""
    os.environ["NUMBA_CACHE_DIR"] = folder
    for known in (jit.kept_in, jit._announce):
        known.cache_clear()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    compiled, out = jit.entry(merge.py_func), np.empty(3)
    compiled(np.array(PARTS), out)
    print(out, sum(compiled.stats.cache_hits.values()))


def merged(folder: Path, processes: int = 1) -> list[tuple[str, str]]:
    """What each prints of the result and of how often it was loaded, and what it logs."""
    ended = run_together(processes, merge_in_a_new_process, str(folder))
    assert [x.returncode for x in ended] == [0] * processes, ended
    return [(x.stdout.strip(), x.stderr) for x in ended]


def run(program: str, cache: Path | str | None = None, paths: str = f"{ROOT}") -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    if cache is not None:
        env["NUMBA_CACHE_DIR"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )


def finished(process: "subprocess.Popen[str]") -> tuple[str, str]:
    with process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


def test_two_processes_compile_at_once_and_later_ones_load(tmp_path: Path) -> None:
    for out, err in merged(tmp_path, processes=2):
        assert out == f"{MERGED} 0"
        assert "compiling the loops for this CPU" in err
    [(out, err)] = merged(tmp_path)
    assert out == f"{MERGED} 1"
    assert "compiling" not in err
    for kept in tmp_path.rglob("*.nbc"):
        kept.write_bytes(kept.read_bytes()[:100])
    [(out, err)] = merged(tmp_path)
    assert out == f"{MERGED} 0"
    assert "compiling" in err


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [(out, err)] = merged(tmp_path / "file" / "below")
    assert out == f"{MERGED} 0"
    assert "set NUMBA_CACHE_DIR" in err


def test_an_installed_package_is_not_written_to(tmp_path: Path) -> None:
    """And importing it neither imports nor compiles what is not used yet."""
    subprocess.run(["cp", "-r", ROOT / "attnshape", ROOT / "csrc_triton", tmp_path], check=True)
    before = sorted(tmp_path.rglob("*"))
    cache = tmp_path.parent / f"{tmp_path.name}-cache"
    program = f"""
import sys
import numpy as np
import attnshape
early = {{"numba", "attnshape.cpu"}} & {{*sys.modules}}
from attnshape.cpu.whiten import merge
out = np.empty(3)
merge(np.array({PARTS}), out)
print(early, out)
"""
    out, _ = finished(run(program, cache, f"{tmp_path}"))
    assert out == f"set() {MERGED}"
    assert sorted(tmp_path.rglob("*")) == before
    assert list(cache.rglob("*.nbi"))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(method: str, three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child has none of the threads that its parent used."""
    monkeypatch.undo()  # PyTorch would fill what is poisoned by threads that do not outlive a fork
    here = total()
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map_async(total, range(4)).get(timeout=120) == [here] * 4
    assert total() == here


def meet() -> int:
    """How many threads take rows, each of which waits for the others."""
    met, here = threading.Barrier(3), set()

    def compute(low: int, high: int) -> None:
        here.add(threading.get_ident())
        met.wait(60)

    threads.over_rows(compute, 3, 16 * threads.TOKENS)
    return len(here)


def test_a_forked_child_has_threads_of_its_own(three_threads: None) -> None:
    """Without them it would compute alone, the parent's threads being counted as idle."""
    assert meet() == 3
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(meet).get(timeout=120) == 3


def test_an_interrupt_ends_a_call_and_spoils_nothing() -> None:
    """Nor does the end of the process."""
    program = """
import atexit, os, signal
from support.parallel_sum import total
parent = os.getppid()  # whose end ends this one
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born without it
atexit.register(lambda: print(total() == want))
want = total()
print("ready", flush=True)
try:
    while os.getppid() == parent:
        total()
except KeyboardInterrupt:
    pass
assert total() == want
"""
    process = run(program, paths=os.pathsep.join([f"{ROOT}", f"{ROOT / 'tests'}"]))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = finished(process)
    assert out == "True"


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_sixteen_threads_at_once(three_threads: None) -> None:
    g = torch.Generator().manual_seed(0)
    problems = [torch.randn(2, 24, 8192, generator=g) for _ in range(16)]
    want = [attnshape.gae(r, v, torch.ones_like(r)) for r, v in problems]
    got: list[list[attnshape.Advantages]] = [[] for _ in problems]

    def work(i: int) -> None:
        r, v = problems[i]
        for _ in range(3):
            got[i].append(attnshape.gae(r, v, torch.ones_like(r)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for wanted, outs in zip(want, got, strict=True):
        assert len(outs) == 3
        assert all(torch.equal(x, y) for out in outs for x, y in zip(out, wanted, strict=True))


def test_an_exception_in_a_thread_reaches_the_caller(three_threads: None) -> None:
    caller, begun = threading.get_ident(), threading.Event()

    def compute(low: int, high: int) -> None:
        if threading.get_ident() != caller:
            begun.set()
            raise ZeroDivisionError
        begun.wait(60)

    with pytest.raises(ZeroDivisionError):
        threads.over_rows(compute, 8, threads.TOKENS)
    done: list[int] = []
    threads.over_rows(lambda low, high: done.extend(range(low, high)), 8, threads.TOKENS)
    assert sorted(done) == list(range(8))


def test_threads_are_those_that_torch_was_given(three_threads: None) -> None:
    def used(count: int) -> int:
        torch.set_num_threads(count)
        seen, together = set(), threading.Barrier(count)

        def compute(low: int, high: int) -> None:
            if threading.get_ident() not in seen:
                seen.add(threading.get_ident())
                together.wait(60)

        threads.over_rows(compute, 64, threads.TOKENS)
        return len(seen)

    assert [used(count) for count in (1, 2, 3)] == [1, 2, 3]


def test_bits_do_not_depend_on_threads_or_on_rows_taken_at_once(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    x, score = torch.rand(4, 37, 1000, generator=g), torch.randn(37, generator=g)
    inputs = attnshape.AttentionInputs(torch.randn(37, 4, 24), torch.randn(37, 2, 1000, 24), 0.2)
    response = attnshape.Response(x[0] > 0.1, start=torch.zeros(37, dtype=torch.int32))

    def shaped() -> list[torch.Tensor]:
        out = attnshape.shape_rewards(score, inputs, response, values=x[1], kl=attnshape.KL(x[2], x[3], 0.1))
        return [
            out.rewards,
            out.advantages,
            out.returns,
            out.credit,
            out.moments,
            attnshape.attention_row(inputs),
        ]

    want = shaped()
    for count, tokens in ((1, 1 << 16), (2, 1), (3, 5000), (2, 1 << 30)):
        torch.set_num_threads(count)
        monkeypatch.setattr(threads, "TOKENS", tokens)
        assert all(torch.equal(a, b) for a, b in zip(shaped(), want, strict=True))
