"""Ranks of a process group on gloo: copies of the tests' process, which need not import anything."""

import datetime
import json
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

WAIT = datetime.timedelta(seconds=300)


def failures_of(
    cases: dict[str, Callable[[int, int], None]], world: int, folder: Path
) -> list[dict[str, str]]:
    """Of each rank, by case; every rank runs all cases, ``(rank, world)``, one after another."""
    given = (world, folder, cases)
    torch.multiprocessing.start_processes(_run_rank, given, nprocs=world, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _run_rank(rank: int, world: int, folder: Path, cases: dict[str, Callable[[int, int], None]]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=WAIT)
    failures = {}
    for name, function in cases.items():
        try:
            function(rank, world)
        except Exception:
            failures[name] = traceback.format_exc()
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
