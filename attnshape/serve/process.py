"""A worker's process: loads the reward model and scores what comes through its pipe."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from attnshape.files import states
from attnshape.text.load import RewardModelConfig
from attnshape.text.model import CreditModel


@dataclass(frozen=True)
class Job:
    """What a worker process loads."""

    config: RewardModelConfig
    device: str
    threads: int
    """Of PyTorch on a CPU."""
    batch_tokens: int = 16384
    """The most that a forward of the process's own takes: those of leave-one-out."""
    files: list[tuple[str, int, int]] = field(init=False)
    """Of the model's folder when the server started, see ``states``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", states(Path(self.config.model)))


def work(job: Job, pipe: Connection) -> None:
    """The process: says None when it is ready, or why it will not be; then a list of answers per batch.

    It ends with its pipe, or by saying, in the place of answers, why it cannot go on. Signals that end the
    server are the server's, which lets its workers finish.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    try:
        folder = job.config.model
        if states(Path(folder)) != job.files:  # other workers hold the old model
            raise ValueError(f"{folder} has changed since the server started; start the server anew")
        model = CreditModel.load(job.config, job.device, job.batch_tokens)
        model.probe()
    except Exception as error:
        pipe.send(f"{job.device}: {error}")
        return
    pipe.send(None)
    while True:
        try:
            examples = pipe.recv()
        except EOFError:
            return
        try:
            answers = model.score_each(examples)
        except Exception as error:  # of the device: what it held may be broken, so another process goes on
            pipe.send(f"{type(error).__name__}: {error}")
            return
        pipe.send(answers)
