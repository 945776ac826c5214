"""Advantages without a critic: the frameworks' formulas in float64, and attnshape's presets with ABC off.

A framework's name ends in ``-groups`` here; its environment is the one without that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from parity import formulas
from parity.cases import WEIGHTS, Case
from parity.formulas import Outputs
from torch import Tensor

import attnshape
from attnshape import KL, GroupConfig, ShapingConfig, Whitening


def compared(scores: Tensor, group: Tensor, by: str, eps: float = 0.0) -> Tensor:
    """``[B]``: each score less the ``"mean"`` of its group or of the ``"others"``, or over the ``"std"`` too.

    A group of one keeps its score.
    """
    out = scores.clone()
    for i, mine in enumerate(group.tolist()):
        members = [j for j, other in enumerate(group.tolist()) if other == mine]
        others = [j for j in members if j != i]
        if others:
            out[i] = scores[i] - scores[others if by == "others" else members].mean()
        if by == "std":
            out[i] /= (scores[members].std() if others else 1.0) + eps
    return out


def to_go(rewards: Tensor) -> Tensor:
    return rewards.flip(1).cumsum(1).flip(1)


def verl(s: dict[str, Any], x: Outputs) -> Outputs:
    m = x["mask"]
    rewards = -s["kl_coef"] * torch.where(m, x["logprobs"] - x["ref_logprobs"], 0.0)
    rewards = rewards + formulas.placed(x["score"], x["attended"].sum(1) - 1, rewards)
    if s["estimator"] == "reinforce_plus_plus":
        advantages = to_go(torch.where(m, rewards, 0.0))
    else:
        by = {"grpo": "std", "rloo": "others"}.get(s["estimator"], "mean")
        advantages = compared(rewards.sum(1), x["group"], by, 1e-6)[:, None].expand_as(rewards)
    if s["estimator"].startswith("reinforce"):
        advantages = formulas.whitened(advantages, m)
    return {"advantages": torch.where(m, advantages, 0.0)}


def openrlhf(s: dict[str, Any], x: Outputs) -> Outputs:
    m, by = x["mask"], {"group_norm": "std", "rloo": "others"}.get(s["estimator"], "mean")
    own = compared(x["score"], x["group"], by, 1e-9).clamp(-10, 10)
    rewards = -s["kl_coef"] * formulas.kl(x["logprobs"] - x["ref_logprobs"], "k1", -10, 10)
    rewards = rewards + formulas.placed(own, formulas.last_of(m), rewards)
    advantages = to_go(torch.where(m, rewards, 0.0))
    if s["estimator"] == "reinforce_baseline":
        mean, var = formulas.moments(advantages, m, 0)
        advantages = (advantages - mean) / var.clamp(min=1e-8).sqrt()
    return {"advantages": advantages}


def slime(s: dict[str, Any], x: Outputs) -> Outputs:
    """At tokens that the loss counts; KL is in the reward of REINFORCE++ alone."""
    m = x["mask"]
    by = "std" if s["estimator"] == "grpo" else "mean"
    own = compared(x["score"], x["group"], by, 1e-6)
    advantages = own[:, None].expand(m.shape)
    if s["estimator"] == "reinforce_plus_plus":
        rewards = -s["kl_coef"] * torch.where(m, x["logprobs"] - x["ref_logprobs"], 0.0)
        advantages = to_go(rewards + formulas.placed(x["score"], formulas.last_of(m), rewards))
    if s["estimator"].startswith("reinforce"):
        advantages = formulas.whitened(advantages, m)
    return {"advantages": torch.where(m, advantages, 0.0)}


def trl(s: dict[str, Any], x: Outputs) -> Outputs:
    """A completion's rewards that are NaN were not given; without any it counts in no mean."""
    given = ~x["score"].isnan().all(1)
    total = (x["score"].nan_to_num() * torch.tensor(WEIGHTS).double()).sum(1)
    out = torch.zeros_like(total)
    for i in given.nonzero().flatten().tolist():
        members = given & (x["group"] == x["group"][i])
        out[i] = total[i] - total[members].mean()
        over = total[members] if s["scale_rewards"] == "group" else total[given]
        if s["scale_rewards"] != "none":
            out[i] /= (over.std() if len(over) > 1 else 0.0) + 1e-4
    return {"advantages": out[:, None] * x["mask"]}


FORMULAS = {"verl-groups": verl, "openrlhf-groups": openrlhf, "slime-groups": slime, "trl-groups": trl}


def ours(framework: str, case: Case, **options: Any) -> Outputs:
    """As a user writes it who has the framework's tensors."""
    s, x = case.settings, case.inputs
    mask, estimator = x["mask"], s.get("estimator")
    groups: dict[str, Any] = {"group": x["group"], **options}
    if framework == "trl-groups":
        config = GroupConfig.grpo(scale=s["scale_rewards"])
        weights = torch.tensor(WEIGHTS, device=mask.device)
        out = attnshape.group_advantages(
            x["score"], [None, None], mask, weights=weights, config=config, **groups
        )
        return {"advantages": out.advantages}
    kl = KL(x["logprobs"], x["ref_logprobs"], s["kl_coef"])
    if framework == "openrlhf-groups":
        preset = {
            "group_norm": GroupConfig.grpo(framework="openrlhf"),
            "dr_grpo": GroupConfig.dr_grpo(),
            "rloo": GroupConfig.rloo(),
            "reinforce_baseline": GroupConfig.reinforce_plus_plus(baseline=True),
        }[estimator]
        own = attnshape.group_advantages(x["score"], None, mask, config=preset, **groups).completion
        shaping = ShapingConfig.openrlhf()
        advantages = attnshape.shape_rewards(own, "sparse", mask, kl=kl, config=shaping, **options).advantages
        if estimator == "reinforce_baseline":
            advantages = attnshape.whiten(advantages, mask, shaping.whitening, **options)
        return {"advantages": advantages}
    shaping = ShapingConfig.verl() if framework == "verl-groups" else ShapingConfig.slime()
    if estimator == "reinforce_plus_plus":
        if framework == "verl-groups":
            shaping = dataclasses.replace(shaping, score_index=x["attended"].sum(1) - 1)
        advantages = attnshape.shape_rewards(
            x["score"], "sparse", mask, kl=kl, config=shaping, **options
        ).advantages
    else:
        preset = {
            "grpo": GroupConfig.grpo(framework="verl"),
            "dr_grpo": GroupConfig.dr_grpo(lone="score"),
            "rloo": GroupConfig.rloo(),
            "reinforce_plus_plus_baseline": GroupConfig.reinforce_plus_plus(baseline=True, lone="score"),
        }[estimator]
        score = x["score"]
        if framework == "verl-groups":  # which has a completion's KL in what it compares
            score = attnshape.shape_rewards(score, "sparse", mask, kl=kl, config=shaping, **options).rewards
            score = score.sum(1)
        advantages = attnshape.group_advantages(score, None, mask, config=preset, **groups).advantages
    if estimator.startswith("reinforce"):
        advantages = attnshape.whiten(advantages, mask, Whitening(), **options)
    return {"advantages": advantages}
