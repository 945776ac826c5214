"""A worker's process: loads the reward model and scores what comes through its pipe."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from transformers.utils.logging import disable_progress_bar

from attnshape.tap import AttentionTap
from attnshape.text.reader import Example, Scored, load_reward_model, score_examples
from attnshape.text.score_fn import ScoreFn


@dataclass(frozen=True)
class Job:
    """What a worker process loads; ``threads`` are those of PyTorch on a CPU."""

    model: str
    device: str
    score_fn: ScoreFn
    layer: int
    threads: int


def work(job: Job, pipe: Connection) -> None:
    """The process: says None when it is ready, or why it will not be; then a list of answers per batch.

    It ends with its pipe. Signals that end the server are the server's, which lets its workers finish.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    disable_progress_bar()
    try:
        model, _ = load_reward_model(job.model, job.device)
        job.score_fn.check(model.config.num_labels)
        tap = AttentionTap(model, job.layer)

        def score(examples: Sequence[Example]) -> list[Scored]:
            with tap:  # opened anew: a forward that failed has left its traces in it
                return score_examples(model, tap, examples, job.score_fn)

        # The first forward compiles kernels, and shows whether this model can be tapped at all.
        token = int(model.config.get_text_config().pad_token_id == 0)
        score([Example("", "a", [token, token], [1], [(0, 1)])])
    except Exception as error:
        pipe.send(f"{job.device}: {error}")
        return
    pipe.send(None)
    while True:
        try:
            examples = pipe.recv()
        except EOFError:
            return
        pipe.send(score_in_parts(examples, score))


def score_in_parts(
    examples: Sequence[Example], score: Callable[[Sequence[Example]], list[Scored]]
) -> list[Scored | str]:
    """In halves where the memory of the device does not hold them together."""
    try:
        return [*score(examples)]
    except torch.OutOfMemoryError as error:
        if len(examples) == 1:
            return [f"out of memory: {error}"]
    # Outside the handler, whose error keeps the tensors of the forward.
    torch.cuda.empty_cache()
    half = len(examples) // 2
    return [*score_in_parts(examples[:half], score), *score_in_parts(examples[half:], score)]
