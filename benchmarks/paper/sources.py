"""Every source of credit that looks into a reward model, in one calling shape, for comparing them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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


def _rows(all_layers: bool) -> Compute:
    @torch.no_grad()
    def compute(
        model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor, score_of: ScoreFunction
    ) -> Weights:
        layers = range(model.config.num_hidden_layers) if all_layers else -1
        with AttentionTap(model, layers) as tap:
            score = score_of(model(ids, attention_mask=mask).logits)
        return score, credit.attention_credit(tap.take(), Response(response_mask, start=start))

    return compute


def _rollout(norms: bool) -> Compute:
    @torch.no_grad()
    def compute(
        model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor, score_of: ScoreFunction
    ) -> Weights:
        with AttentionTap(model, source="rollout") as tap:
            score = score_of(model(ids, attention_mask=mask).logits)
        layers = tap.take()
        if not norms:
            layers = [dataclasses.replace(x, value_norm=None, residual_norm=None) for x in layers]
        return score, credit.attention_rollout(layers, Response(response_mask, start=start))

    return compute


@torch.no_grad()
def _signed_rollout(
    model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor, score_of: ScoreFunction
) -> Weights:
    with AttentionTap(model, source="signed_rollout") as tap:
        score = score_of(model(ids, attention_mask=mask).logits)
    shares = credit.signed_rollout(tap.take(), Response(response_mask, start=start))
    return score, score[:, None] * shares


def _gradient(**of: Any) -> Compute:
    @torch.enable_grad()
    def compute(
        model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor, score_of: ScoreFunction
    ) -> Weights:
        with AttentionTap(model, **of) as tap:
            score = score_of(model(ids, attention_mask=mask).logits)
        weights = credit.gradient_weights(score, tap.take(), Response(response_mask, start=start))
        return score.detach(), weights

    return compute


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


SOURCES: dict[str, Source] = {
    "last row": Source(_rows(all_layers=False)),
    "mean over layers": Source(_rows(all_layers=True)),
    "value-weighted last row": Source(
        _gradient(layer=-1, source="gradient_value"), signed=True, backward="last layer"
    ),
    "plain rollout": Source(_rollout(norms=False), forward="attention of every layer"),
    "norm-weighted rollout": Source(_rollout(norms=True), forward="attention of every layer"),
    "signed rollout": Source(_signed_rollout, signed=True, forward="attention of every layer, twice"),
    "gradient x embedding": Source(
        _gradient(source="gradient_embedding"), signed=True, backward="every layer"
    ),
    "gradient x value": Source(_gradient(source="gradient_value"), signed=True, backward="every layer"),
    "incremental (R3HF)": Source(_incremental, signed=True),
}
