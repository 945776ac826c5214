"""Runs many cells; what has been run is not run again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from attnshape.demo.ppo import Record
from attnshape.demo.run import end_with_parent
from attnshape.files import whole_file
from benchmarks.paper.cells import Cell
from benchmarks.paper.store import Table
from benchmarks.paper.testbed import Models, run_cell

TRAINING = "testbed.json"


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return Cell(**record["cell"]).key


RUNS = Table("runs", _key)


def write_training(testbed: Models, folder: Path) -> None:
    """How well the testbed's own models learned. What the folder has stays: its runs are of those models."""
    if testbed.training:
        path = folder / TRAINING
        known = json.loads(path.read_text()) if path.is_file() else {}
        known = {name: asdict(metrics) for name, metrics in testbed.training.items()} | known
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")


def sweep(
    cells: Sequence[Cell],
    testbed: Models,
    folder: Path,
    *,
    workers: int = 1,
    on_step: Callable[[Record], None] | None = None,
    on_done: Callable[[Cell], None] | None = None,
) -> None:
    """Runs the cells that have not been run, in ``workers`` processes; cut off, it leaves only whole runs.

    ``on_step`` is called after each PPO step of a single worker, ``on_done`` after each cell.
    """
    if workers < 1:
        raise ValueError(f"workers: got {workers}, want at least 1")
    left = RUNS.missing(cells, folder)
    if workers == 1:
        start_worker()
        for cell in left:
            _work(cell, testbed, folder, on_step)
            if on_done:
                on_done(cell)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_child) as pool:
        try:
            futures = {pool.submit(_work, cell, testbed, folder): cell for cell in left}
            for future in as_completed(futures):
                future.result()
                if on_done:
                    on_done(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def start_worker() -> None:
    """Small models gain nothing from more threads, and keep their bits with one."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def _start_child() -> None:
    end_with_parent()
    start_worker()


def _work(cell: Cell, testbed: Models, folder: Path, on_step: Callable[[Record], None] | None = None) -> None:
    if RUNS.missing([cell], folder):  # not run by another process meanwhile
        RUNS.add(run_cell(cell, testbed, on_step), folder, cell.name)
