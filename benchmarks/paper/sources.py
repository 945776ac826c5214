"""Every source of credit that looks into a reward model, in one calling shape, for comparing them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnshape import Response, credit
from attnshape.demo.ppo import ScoreFunction
from attnshape.tap import AttentionTap

Weights: TypeAlias = tuple[Tensor, Tensor]
"""Scores ``[B]`` and weights over the response tokens ``[B, R]``, both detached; 0 where masked."""
Compute: TypeAlias = Callable[[Any, Tensor, Tensor, Tensor, Tensor, ScoreFunction], Weights]
"""Of a sequence classifier, ``input_ids`` and ``attention_mask`` ``[B, S]``, ``response_mask`` ``[B, R]``,
``start`` ``[B]``, the first response token's position, and what makes scores of its logits."""
Weigh: TypeAlias = Callable[[Tensor, Any, Response], Tensor]
"""Of scores ``[B]``, what a tap saw and where the response is: weights ``[B, R]``."""


def first_label(logits: Tensor) -> Tensor:
    return logits[:, 0]


class Source(NamedTuple):
    """``forward`` and ``backward`` are passes through the reward model beyond the one that scores."""

    read: Compute
    signed: bool = False
    forward: str = "none"
    backward: str = "none"

    def compute(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        response_mask: Tensor,
        start: Tensor,
        score_of: ScoreFunction = first_label,
    ) -> Weights:
        """Scores and weights; the score is the first label's logit unless ``score_of`` says otherwise."""
        return self.read(model, ids, mask, response_mask, start, score_of)


def _tapped(tap: Callable[[Any], AttentionTap], weigh: Weigh, *, gradients: bool = False) -> Compute:
    """Weights of what a tap on the model saw of the forward that scores."""

    def compute(
        model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor, score_of: ScoreFunction
    ) -> Weights:
        with torch.set_grad_enabled(gradients):
            with tap(model) as tapped:
                score = score_of(model(ids, attention_mask=mask).logits)
            weights = weigh(score, tapped.take(), Response(response_mask, start=start))
        return score.detach(), weights

    return compute


def _all_layers(model: Any) -> AttentionTap:
    return AttentionTap(model, range(model.config.num_hidden_layers))


def _row(_score: Tensor, seen: Any, response: Response) -> Tensor:
    return credit.attention_credit(seen, response)


def _rollout(_score: Tensor, seen: Any, response: Response) -> Tensor:
    return credit.attention_rollout(seen, response)


def _plain_rollout(score: Tensor, seen: Any, response: Response) -> Tensor:
    layers = [dataclasses.replace(x, value_norm=None, residual_norm=None) for x in seen]
    return _rollout(score, layers, response)


def _signed_rollout(score: Tensor, seen: Any, response: Response) -> Tensor:
    return score[:, None] * credit.signed_rollout(seen, response)


@torch.no_grad()
def _incremental(
    model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor, score_of: ScoreFunction
) -> Weights:
    states = model.base_model(ids, attention_mask=mask).last_hidden_state
    logits = model.score(states)
    scores = score_of(logits.flatten(0, 1)).view(logits.shape[:2])
    rows = torch.arange(len(ids), device=ids.device)
    places = start[:, None] + torch.arange(response_mask.shape[1], device=ids.device)
    last = torch.where(response_mask != 0, places, -1).amax(1)
    rewards = credit.incremental_rewards(
        scores[rows[:, None], places.clamp(max=ids.shape[1] - 1)], scores[rows, start - 1], response_mask
    )
    return scores[rows, last], rewards


def _gradient(**of: Any) -> Compute:
    return _tapped(partial(AttentionTap, **of), credit.gradient_weights, gradients=True)


_norms = partial(AttentionTap, source="rollout")
_signs = partial(AttentionTap, source="signed_rollout")

SOURCES: dict[str, Source] = {
    "last row": Source(_tapped(AttentionTap, _row)),
    "mean over layers": Source(_tapped(_all_layers, _row)),
    "value-weighted last row": Source(
        _gradient(layer=-1, source="gradient_value"), signed=True, backward="last layer"
    ),
    "plain rollout": Source(_tapped(_norms, _plain_rollout), forward="attention of every layer"),
    "norm-weighted rollout": Source(_tapped(_norms, _rollout), forward="attention of every layer"),
    "signed rollout": Source(
        _tapped(_signs, _signed_rollout), signed=True, forward="attention of every layer, twice"
    ),
    "gradient x embedding": Source(
        _gradient(source="gradient_embedding"), signed=True, backward="every layer"
    ),
    "gradient x value": Source(_gradient(source="gradient_value"), signed=True, backward="every layer"),
    "relevance": Source(_gradient(source="relevance", layer=0), signed=True, backward="every layer"),
    "relevance a third up": Source(
        _gradient(source="relevance"), signed=True, backward="the upper two thirds"
    ),
    "incremental (R3HF)": Source(_incremental, signed=True),
}
