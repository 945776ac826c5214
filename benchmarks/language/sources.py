"""Sources of credit in one calling shape, with deletions and integrated gradients to hold them against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnshape import AttentionTap, Response, credit
from benchmarks.paper.sources import SOURCES as DEEP

Weigh: TypeAlias = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a sequence classifier, ``input_ids``, ``attention_mask`` and ``inside``, ``[B, S]``: scores ``[B]`` and
weights ``[B, S]``, 0 where not ``inside``."""

TOKENS = 3072
"""Most tokens of a batch of texts with something left out."""
STEPS = 8
"""Points of the path of integrated gradients, in the middle of as many pieces."""


def _deep(name: str, model: Any, ids: Tensor, mask: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    start = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    return DEEP[name].compute(model, ids, mask, inside, start)


@torch.no_grad()
def _row(layer: int, model: Any, ids: Tensor, mask: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    with AttentionTap(model, layer) as tap:
        score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    start = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    return score, credit.attention_credit(tap.take(), Response(inside, start=start))


@torch.no_grad()
def _plain_rollout(model: Any, ids: Tensor, mask: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """From the row of the token that is scored, down."""
    layers = range(model.config.num_hidden_layers)
    with AttentionTap(model, layers, query_position="all") as every, AttentionTap(model) as top:
        score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    read = top.take().query_position
    taken = [dataclasses.replace(x, query_position=read) for x in every.take()]
    start = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    return score, credit.attention_rollout(taken, Response(inside, start=start))


@torch.no_grad()
def _columns(layer: int, model: Any, ids: Tensor, mask: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    with AttentionTap(model, layer, query_position="all") as tap:
        score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    start = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    return score, credit.attention_column_credit(tap.take(), Response(inside, start=start))


@torch.no_grad()
def _incremental(model: Any, ids: Tensor, mask: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """What each token adds to a score that is read at every position; a causal model's."""
    states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    scores = model.score(states)[..., 0]
    added = credit.incremental_rewards(scores[:, 1:], scores[:, 0], inside[:, 1:])
    last = mask.cumsum(1).argmax(1)
    rows = torch.arange(len(ids), device=ids.device)
    return scores[rows, last], torch.nn.functional.pad(added, (1, 0))


SIGNED = (
    "signed rollout",
    "gradient x embedding",
    "gradient x value",
    "value-weighted last row",
    "relevance",
    "relevance a third up",
    "incremental",
    "leave-one-out",
    "integrated gradients",
    "lexicon",
)
COSTLY = ("leave-one-out", "integrated gradients")


def sources_of(model: Any) -> dict[str, Weigh]:
    """The sources that this model has, by name: those of one forward, or of one and its backward."""
    layers = model.config.num_hidden_layers
    causal = hasattr(model, "score")
    found: dict[str, Weigh] = {name: partial(_deep, name) for name in ("last row", "mean over layers")}
    found |= {f"row of layer {layer}": partial(_row, layer) for layer in range(layers - 2)}
    if layers > 1:
        found["row below the last"] = partial(_row, layers - 2)
    found |= {"columns of layer 0": partial(_columns, 0), "plain rollout": _plain_rollout}
    deep = ["value-weighted last row", "gradient x embedding", "gradient x value"]
    deep += ["relevance", "relevance a third up"]
    deep += ["norm-weighted rollout", "signed rollout"] * causal
    found |= {name: partial(_deep, name) for name in deep}
    return found | {"incremental": _incremental} if causal else found


def scoring(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The first label's logit ``[B]`` of texts and their mask."""

    def score_of(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits[:, 0]

    return score_of


def leave_one_out(
    model: Any, ids: Tensor, mask: Tensor, inside: Tensor, pad_id: int, units: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of each token; or of each of a text's ``units``, whose tokens share it in equal parts."""
    score_of = scoring(model)
    with torch.no_grad():
        score = score_of(ids, mask)
    start = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    weights = credit.leave_one_out(
        score_of,
        ids,
        Response(inside, start=start),
        score=score,
        attention_mask=mask,
        spans=units,
        pad_token_id=pad_id,
        batch_tokens=TOKENS,
    )
    return score, weights


def integrated_gradients(model: Any, ids: Tensor, mask: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Sundararajan et al. 2017 (arXiv 1703.01365), from the vocabulary's mean embedding inside.

    Not from zeros: behind a norm without a mean, a token's direction is the same however near it is to zero.
    """
    embed = model.get_input_embeddings()
    base = embed.weight.detach().mean(0)
    taken: list[Tensor] = []
    share = [0.0]

    def scale(_module: Any, _args: Any, output: Tensor) -> Tensor:
        given = output.detach().requires_grad_()
        taken.append(given)
        return torch.where(inside[..., None], base + share[0] * (given - base), given)

    total = torch.zeros(ids.shape)
    hook = embed.register_forward_hook(scale)
    try:
        for step in range(STEPS):
            share[0] = (step + 0.5) / STEPS
            score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
            (gradient,) = torch.autograd.grad(score.sum(), taken[-1])
            # The gradient by the embedding has the share as a factor, which the path's derivative has not.
            total += (gradient / share[0] * (taken[-1] - base)).sum(-1).detach() / STEPS
    finally:
        hook.remove()
    with torch.no_grad():
        score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return score, total.masked_fill(~inside, 0.0)
