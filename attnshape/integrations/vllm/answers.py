"""From what the engine answers to score and credit; for the HTTP routes and for the IO processor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attnshape.integrations.vllm.support import ASKED, REFUSED
from attnshape.text.model import Scored, Weighed, scored_by
from attnshape.text.reader import Example, Reader
from attnshape.text.score_fn import LOGIT, ScoreFn
from attnshape.text.source import CreditSource
from attnshape.types import Response

ATTENTION = CreditSource()
NO_ROW = "the engine gave no attention row: credit is off, and the engine's log says why"


def asking() -> Any:
    """``PoolingParams`` of a request that wants its row."""
    from vllm import PoolingParams

    return PoolingParams(task="classify", use_activation=False, extra_kwargs={ASKED: True})


def reader_of(model_config: Any, tokenizer: Any) -> Reader:
    """Reads completions as the engine's model does, with a tokenizer of its own: threads must not share one.

    Raises:
        ValueError: the tokenizer is not a fast one, which gives offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: want a fast one, which gives offsets, got {type(tokenizer).__name__} "
            "(--tokenizer-mode hf)"
        )
    return Reader(copy.deepcopy(tokenizer), model_config.hf_config, model_config.max_model_len)


def scored(example: Example, data: Tensor, score_fn: ScoreFn) -> Scored | str:
    """What the engine's answer says of a completion, or why it says nothing.

    Args:
        data: logits, then the row over the completion's tokens, ``[labels + S]`` float32.
    """
    labels = len(data) - len(example.input_ids)
    if labels < 1 or bool((data[labels:] == REFUSED).any()):
        return NO_ROW
    score_fn.check(labels)
    row = data[labels:][example.positions][None]
    weighed = Weighed(score_fn(data[None, :labels]), row, Response(torch.ones_like(row)))
    return scored_by(ATTENTION, weighed, [example])[0]


def warm_up() -> None:
    """Compiles what makes credit of a row, before a request waits for it."""
    scored(Example("", "a", [0], [0], [(0, 1)]), torch.ones(2), LOGIT)
