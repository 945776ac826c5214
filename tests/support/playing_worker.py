"""A worker process that does what the completions ask, without a model: imports little, so starts soon."""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path


class Act(IntEnum):
    """A completion's first token."""

    ANSWER = 0
    DIE = 1
    HANG_ONCE = 2
    DIE_AND_LOAD_NO_MORE = 3


DIES_LOADING = "dies loading"
LOADS_NO_MORE = "loads no more"
HUNG = "hung"
HANGS = 300.0


def play(notes: Path, pipe: Connection) -> None:
    """``notes`` is a folder for what a worker's successors must know. Answers are strings, as errors are."""
    if (notes / DIES_LOADING).exists():
        os._exit(3)
    if (notes / LOADS_NO_MORE).exists():
        pipe.send(LOADS_NO_MORE)
        return
    pipe.send(None)
    while True:
        try:
            completions = pipe.recv()
        except EOFError:
            return
        for act in (completion.input_ids[0] for completion in completions):
            if act == Act.DIE_AND_LOAD_NO_MORE:
                (notes / LOADS_NO_MORE).touch()
            if act in (Act.DIE, Act.DIE_AND_LOAD_NO_MORE):
                os.kill(os.getpid(), signal.SIGKILL)
            if act == Act.HANG_ONCE and not (notes / HUNG).exists():
                (notes / HUNG).touch()
                time.sleep(HANGS)
        pipe.send(["answered"] * len(completions))
