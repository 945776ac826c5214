"""Sources of credit that only the experiments use: controls, neighbouring methods, and deeper looks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import attnshape
from attnshape import credit
from attnshape.demo.ppo import ActorCritic, Judge, Judgement, Rollout, Source, source_of
from attnshape.demo.ppo import Method as DemoMethod
from benchmarks.paper.cells import SIGNED_SOURCES, Method
from benchmarks.paper.sources import SOURCES

PROFILE_BINS = 20


def source_for(method: Method, *, beta: float, seed: int, dpo: ActorCritic | None = None) -> Source:
    """How a cell's method judges a batch.

    Args:
        beta: the dense share, for those that are no redistribution of the score.
        seed: of what a control draws at random, apart from the sampling's own stream.
        dpo: the DPO-trained policy that ``RTO`` needs.
    """
    match method:
        case "ABC shuffled":
            return shuffled(torch.Generator().manual_seed(seed))
        case "ABC profile":
            return Profile()
        case "ABC, random weights":
            return random_weights(seed)
        case "R3HF":
            return incremental
        case "RTO":
            if dpo is None:
                raise ValueError("method: RTO needs a DPO-trained policy, got none")
            return LogRatio(dpo, beta)
        case _ if method in SIGNED_SOURCES:
            return signed(SIGNED_SOURCES[method])
        case _ if method in get_args(DemoMethod):
            return source_of(method)
        case _:
            return from_reward_model(method)


def abc_credit(judge: Judge, rollout: Rollout) -> Judgement:
    """ABC's judgement with its credit as weights ``[B, R]``."""
    judged = judge(rollout, "ABC")
    if isinstance(judged.credit, Tensor):
        return judged
    response = attnshape.Response(rollout.response_mask, start=judged.response_start)
    return Judgement(judged.score, attnshape.attention_credit(judged.credit, response))


def shuffled(generator: torch.Generator) -> Source:
    """ABC's weights in random order within each response."""

    def judged(_actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        judgement = abc_credit(judge, rollout)
        return replace(judgement, credit=shuffle(judgement.credit, rollout.response_mask, generator))

    return judged


def shuffle(weights: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The unmasked weights of each row of ``[B, R]`` in random order; masked ones stay."""
    draws = torch.rand(weights.shape, generator=generator).to(weights.device)
    places = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    # Ranks of the live tokens, first in order of place, then at random.
    into = torch.where(mask, places, weights.shape[1]).argsort(1)
    out_of = torch.where(mask, draws, 2.0).argsort(1)
    live = mask.gather(1, into)
    moved = torch.where(live, weights.gather(1, out_of), weights.gather(1, into))
    return weights.scatter(1, into, moved)


class Profile:
    """The mean of ABC's credit at a token's relative position, over all completions of the run so far."""

    def __init__(self) -> None:
        self.total = torch.zeros(PROFILE_BINS, dtype=torch.float64)
        self.count = torch.zeros(PROFILE_BINS, dtype=torch.float64)

    def __call__(self, _actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        judgement = abc_credit(judge, rollout)
        return replace(judgement, credit=self.of(judgement.credit, rollout.response_mask))

    def of(self, weights: Tensor, mask: Tensor) -> Tensor:
        """Takes in weights ``[B, R]`` and returns the profile at their tokens, in sum 1 per row."""
        length = mask.sum(1, keepdim=True)
        place = mask.cumsum(1) - 1
        bins = (place.clamp(min=0) * PROFILE_BINS // length.clamp(min=1)).clamp(max=PROFILE_BINS - 1).cpu()
        density = (weights * length).double().cpu()
        live = mask.cpu()
        self.total.index_add_(0, bins[live], density[live])
        self.count.index_add_(0, bins[live], torch.ones_like(density[live]))
        mean = (self.total / self.count.clamp(min=1)).float()[bins].to(weights.device) * mask
        return mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)


def random_weights(seed: int) -> Source:
    """The trained model's score, and the attention of one of its shape that was never trained."""
    untrained: list[Judge] = []

    def judged(_actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        if not untrained:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = AutoModelForSequenceClassification.from_config(judge.model.config)
            model = model.to(judge.model.device)
            untrained.append(
                Judge(model, judge.tokenizer, judge.policy_tokenizer, lambda logits: logits[:, 0])
            )
        return replace(abc_credit(untrained[0], rollout), score=judge(rollout, "sparse").score)

    return judged


def _weights(name: str, judge: Judge, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Standardised scores, and weights in their unit where the source is signed."""
    if not judge.same_tokens:
        raise ValueError(f"method: {name} needs a reward model with the policy's tokenizer")
    ids, mask, start = judge.read(rollout)
    return SOURCES[name].compute(judge.model, ids, mask, rollout.response_mask, start, judge.standardized)


def from_reward_model(name: str) -> Source:
    """Non-negative credit of one of ``SOURCES``; of signed weights their size."""

    def judged(_actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        score, weights = _weights(name, judge, rollout)
        return Judgement(score, weights.abs())

    return judged


def signed(name: str) -> Source:
    """One of ``SOURCES`` as signed token rewards beside an even share of the score, which stays whole."""

    def judged(_actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        score, weights = _weights(name, judge, rollout)
        return Judgement(score, "uniform", token_rewards=credit.centered(weights, rollout.response_mask))

    return judged


def incremental(_actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
    """R3HF: what each token adds to the score stands in place of the score."""
    score, weights = _weights("incremental (R3HF)", judge, rollout)
    return Judgement(score, "sparse", token_rewards=weights, redistributed=torch.zeros_like(score))


class LogRatio:
    """RTO: a DPO-trained policy's log-ratios beside the score.

    Their sum over a completion is brought to the score's unit by its standard deviation over the first batch,
    which the initial policy wrote; ``beta`` of it stands beside ``1 - beta`` of the score.
    """

    def __init__(self, dpo: ActorCritic, beta: float) -> None:
        self.dpo, self.beta = dpo, beta
        self.reference: ActorCritic | None = None
        self.scale: float | None = None

    @torch.no_grad()
    def __call__(self, actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        if self.reference is None:
            self.reference = copy.deepcopy(actor)
        score = judge(rollout, "sparse").score
        logprobs, ref_logprobs = (model(rollout, 0)[0] for model in (self.dpo, self.reference))
        ratio = credit.log_ratio_rewards(logprobs, ref_logprobs, rollout.response_mask, scale=1.0)
        if self.scale is None:
            spread = ratio.sum(1).std().item()
            if not spread > 0:
                raise ValueError("dpo: its log-ratios to the policy are all alike, want a policy after DPO")
            self.scale = self.beta / spread
        return Judgement(
            score, "sparse", token_rewards=self.scale * ratio, redistributed=(1 - self.beta) * score
        )
