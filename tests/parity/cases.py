"""Drawn inputs in each framework's own layout: what its functions, the formulas and the presets are given.

Needs PyTorch alone, so that every framework's environment can import it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DISCOUNTS = [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.9, 0.0)]
CHOICES: dict[str, dict[str, list[Any]]] = {
    "verl": {"kl_estimator": ["kl", "abs", "mse", "low_var_kl", "k3+"], "mask": ["int64", "float32"]},
    "trl-0.9.6": {"kl_estimator": ["kl", "abs", "mse"], "whiten_rewards": [False, True]},
    "trl-1.12.0": {"kl_estimator": ["k1", "k3"], "whiten_rewards": [False, True]},
    "openrlhf": {"kl_estimator": ["k1", "k2", "k3"], "mask": ["bool", "int64"]},
    "slime": {"kl_estimator": ["k1", "k2", "k3", "low_var_kl"]},
    "nemo_rl": {"kl_estimator": ["k1", "k2", "k3"], "lam_value": [None, 0.7], "alpha": [0.0, 0.4]},
    "areal": {"kl_estimator": ["k1", "k2", "k3"]},
    "torchrl": {},
    "verl-groups": {
        "estimator": ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
    },
    "openrlhf-groups": {"estimator": ["group_norm", "dr_grpo", "rloo", "reinforce_baseline"]},
    "slime-groups": {"estimator": ["grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]},
    "trl-groups": {"scale_rewards": ["group", "batch", "none"]},
}
"""What is varied, by framework; the names are the framework's."""

WEIGHTS = (1.0, -0.5)
"""Of TRL's two rewards."""

WHOLE_SEQUENCE = ("trl-0.9.6", "openrlhf", "nemo_rl", "areal")
"""Frameworks whose token tensors cover the prompt too."""


@dataclass
class Case:
    settings: dict[str, Any]
    """``gamma``, ``lam``, ``kl_coef`` and what ``CHOICES`` varies."""
    inputs: dict[str, Tensor]
    """Float32 tokens ``[B, R]``; ``score [B]``; bool ``mask``, and ``attended``: what is not padding."""


def draw(framework: str, seed: int, batch: int = 5, width: int = 16) -> Case:
    """Rows of all lengths, the shortest and the longest among them; holes; every second case extreme KL."""
    if framework.endswith("-groups"):
        return draw_groups(framework, seed, batch, width)
    choices = CHOICES[framework]
    discounts = [each for each in DISCOUNTS if each[1] or framework != "torchrl"]  # which fails at 0
    combinations = list(itertools.product(discounts, *choices.values()))
    (gamma, lam), *chosen = combinations[seed * 7 % len(combinations)]
    settings = {"gamma": gamma, "lam": lam, "kl_coef": 0.1, **dict(zip(choices, chosen, strict=True))}

    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def chance(p: float) -> Tensor:
        return torch.rand(batch, width, generator=g) < p

    ratio = 0.2 * normal(batch, width)
    if seed % 2:
        # Without a clamp k3 grows as the exponential, and what float32 makes of the sums is noise.
        unclamped = settings.get("kl_estimator") == "k3" and framework in ("trl-1.12.0", "slime")
        ratio = torch.where(chance(0.2), (3 if unclamped else 15) * normal(batch, width), ratio)
    logprobs = -normal(batch, width).abs()
    inputs = {
        "score": 8 * normal(batch),
        "values": normal(batch, width),
        "logprobs": logprobs,
        "ref_logprobs": logprobs - ratio,
    }
    t = torch.arange(width)
    shortest, longest = (2, width) if framework in WHOLE_SEQUENCE else (1, width)
    total = torch.randint(shortest, width + 1, (batch,), generator=g)
    total[0], total[1] = shortest, longest
    prompt = torch.zeros(batch, dtype=torch.long)
    if framework in WHOLE_SEQUENCE:
        prompt = (torch.rand(batch, generator=g) * (total - 1)).long() + 1
        prompt[0] = 1  # one token of response
    padding = torch.zeros_like(total)
    if framework in ("trl-0.9.6", "openrlhf", "nemo_rl") and seed % 3 == 0:
        padding = width - total  # on the left
    first, end = padding + prompt, padding + total
    inputs["attended"] = (t >= padding[:, None]) & (t < end[:, None])
    response = (t >= first[:, None]) & (t < end[:, None])
    holes = chance(0.25) & (t > first[:, None])  # a tool's tokens; the policy speaks first
    if framework in ("trl-1.12.0", "torchrl"):
        holes[:] = False
    elif framework not in ("verl", "slime", "areal"):
        holes &= t < end[:, None] - 1
    inputs["mask"] = response & ~holes
    if framework == "torchrl":
        inputs = {"values": inputs["values"], "rewards": normal(batch, width)}
    return Case(settings, inputs)


def draw_groups(framework: str, seed: int, batch: int, width: int) -> Case:
    """Completions of several prompts: of verl's of any number each, one too; else as many of each."""
    base = "verl" if framework == "trl-groups" else framework.removesuffix("-groups")
    whole = draw(base, 2 * seed, 2 * batch, width)  # without extreme KL
    g = torch.Generator().manual_seed(seed)
    group = torch.arange(2 * batch) // batch
    if framework == "verl-groups":
        group = torch.randint(0, batch, (2 * batch,), generator=g)
    (name, values), inputs = next(iter(CHOICES[framework].items())), whole.inputs
    inputs = {key: x for key, x in inputs.items() if key != "values"} | {"group": group}
    if framework == "trl-groups":
        score = torch.randn(2 * batch, 2, generator=g)
        lost = torch.rand(score.shape, generator=g) < 0.2
        inputs = {"score": score.masked_fill(lost, math.nan), "mask": inputs["mask"], "group": group}
    return Case({name: values[seed % len(values)], "kl_coef": 0.1}, inputs)
