"""Runs many cells, each into a file of its own; what has a file is not run again."""

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
from benchmarks.paper.testbed import Models, run_cell

RUNS, TRAINING = "runs", "testbed.json"


def todo(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """Cells that have no file yet, in order."""
    return [cell for cell in cells if not (folder / RUNS / cell.name).is_file()]


def write_run(result: dict[str, Any], cell: Cell, folder: Path) -> Path:
    """The cell's file, whole or not at all: compact, a curve per line."""
    path = folder / RUNS / cell.name
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in result.items() if name != "curves"}
    curves = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(curve, separators=(',', ':'))}"
        for name, curve in result["curves"].items()
    )
    with whole_file(path) as file:
        file.write(json.dumps(head, indent=1)[:-2] + ',\n "curves": {\n' + curves + "\n}}\n")
    return path


def write_training(testbed: Models, folder: Path) -> None:
    """How well the testbed's own models learned, beside what the folder has of others."""
    if testbed.training:
        path = folder / TRAINING
        known = json.loads(path.read_text()) if path.is_file() else {}
        known |= {name: asdict(metrics) for name, metrics in testbed.training.items()}
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
    """Runs the cells that have no file, in ``workers`` processes; interrupted, it leaves only whole files.

    ``on_step`` is called after each PPO step of a single worker, ``on_done`` after each cell.
    """
    if workers < 1:
        raise ValueError(f"workers: got {workers}, want at least 1")
    left = todo(cells, folder)
    if workers == 1:
        start_worker()
        for cell in left:
            write_run(run_cell(cell, testbed, on_step), cell, folder)
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


def _work(cell: Cell, testbed: Models, folder: Path) -> None:
    write_run(run_cell(cell, testbed), cell, folder)
