"""What each framework computes, written down from its source as plain loops, to be run in float64.

Each takes a case and gives, of ``rewards``, ``advantages`` (before whitening), ``returns`` and ``whitened``,
what the framework hands out, masked tokens included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def kl(log_ratio: Tensor, estimator: str, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """http://joschu.net/blog/kl-approx.html; the estimate clamped to ``low``, ``high``."""
    if estimator == "k1":
        out = log_ratio
    elif estimator == "abs":
        out = log_ratio.abs()
    elif estimator == "k2":
        out = log_ratio**2 / 2
    else:
        out = torch.exp(-log_ratio) - 1 + log_ratio
    return out.clamp(low, high)


def gae(r: Tensor, v: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """The textbook: every token is a step, nothing after the last."""
    return carried_gae(r, v, torch.ones_like(r), gamma, lam, 0.0)


def carried_gae(
    r: Tensor, v: Tensor, m: Tensor, gamma: float, lam: float | Tensor, last: float | Tensor
) -> Tensor:
    """Only unmasked tokens are steps; the others repeat what comes after. ``last``: value past the end."""
    lam, last = (torch.as_tensor(x, dtype=torch.float64).expand(len(r)).tolist() for x in (lam, last))
    out = torch.zeros_like(r)
    for b in range(r.shape[0]):
        after_v, after_a = last[b], 0.0
        for t in reversed(range(r.shape[1])):
            if m[b, t]:
                after_a = float(r[b, t]) + gamma * after_v - float(v[b, t]) + gamma * lam[b] * after_a
                after_v = float(v[b, t])
            out[b, t] = after_a
    return out


def moments(x: Tensor, m: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    live = x[m]
    mean = live.mean()
    return mean, ((live - mean) ** 2).sum() / max(len(live) - ddof, 1)


def whitened(x: Tensor, m: Tensor, keep_mean: bool = False) -> Tensor:
    """Masked tokens too."""
    mean, var = moments(x, m, 1)
    return (x - mean) / (var + 1e-8).sqrt() + (mean if keep_mean else 0.0)


def last_of(m: Tensor) -> Tensor:
    """Index of each row's last unmasked token."""
    return torch.tensor([int(row.nonzero().max()) for row in m])


def placed(score: Tensor, at: Tensor, like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    out[torch.arange(len(at)), at] = score
    return out


def verl(s: dict[str, Any], x: Outputs) -> Outputs:
    m, names = x["mask"], {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3", "k3+": "k3"}
    ratio, estimator = x["logprobs"] - x["ref_logprobs"], names[s["kl_estimator"]]
    penalty = kl(ratio.clamp(-20, 20), "k3", -10, 10) if estimator == "k3" else kl(ratio, estimator)
    scores = placed(x["score"], x["attended"].sum(1) - 1, ratio)
    rewards = scores - s["kl_coef"] * torch.where(m, penalty, 0.0)
    advantages = carried_gae(rewards, x["values"], m, s["gamma"], s["lam"], 0.0)
    return {
        "rewards": rewards,
        "returns": advantages + x["values"],
        "whitened": whitened(advantages, m),
    }


def trl_classic(s: dict[str, Any], x: Outputs) -> Outputs:
    m, estimator = x["mask"], {"kl": "k1", "abs": "abs", "mse": "k2"}[s["kl_estimator"]]
    rewards = -s["kl_coef"] * kl(x["logprobs"] - x["ref_logprobs"], estimator)
    rewards = rewards + placed(x["score"], last_of(m), rewards)
    steps, values = torch.where(m, rewards, 0.0), torch.where(m, x["values"], 0.0)
    if s["whiten_rewards"]:
        steps = whitened(steps, m, keep_mean=True)
    advantages = gae(steps, values, s["gamma"], s["lam"])
    return {"rewards": rewards, "returns": advantages + values, "whitened": whitened(advantages, m)}


def trl_inline(s: dict[str, Any], x: Outputs) -> Outputs:
    m = x["mask"]
    length, width = m.sum(1), m.shape[1]
    known = torch.arange(width) <= length[:, None]  # the response and one token more
    ratio = torch.where(m, x["logprobs"] - x["ref_logprobs"], 0.0)
    rewards = -s["kl_coef"] * kl(ratio, s["kl_estimator"])
    rewards = rewards + placed(x["score"], length.clamp(max=width - 1), rewards)
    steps, values = rewards, torch.where(known, x["values"], 0.0)
    if s["whiten_rewards"]:
        steps = torch.where(known, whitened(rewards, known, keep_mean=True), 0.0)
    advantages = gae(steps, values, s["gamma"], s["lam"])
    return {
        "rewards": steps,
        "returns": advantages + values,
        "whitened": torch.where(m, whitened(advantages, m), 0.0),
    }


def openrlhf(s: dict[str, Any], x: Outputs) -> Outputs:
    m, ratio = x["mask"], x["logprobs"] - x["ref_logprobs"]
    if s["kl_estimator"] == "k3":
        ratio = ratio.clamp(min=-10)
    rewards = -s["kl_coef"] * kl(ratio, s["kl_estimator"], -10, 10)
    rewards = rewards + placed(x["score"].clamp(-10, 10), last_of(m), rewards)
    values = torch.where(m, x["values"], 0.0)
    advantages = gae(torch.where(m, rewards, 0.0), values, s["gamma"], s["lam"])
    mean, var = moments(advantages, m, 0)
    return {
        "rewards": rewards,
        "advantages": advantages,
        "returns": advantages + values,
        "whitened": (advantages - mean) / var.clamp(min=1e-8).sqrt(),
    }


def slime(s: dict[str, Any], x: Outputs) -> Outputs:
    """Tokens past a row's end are 0 here; slime has none."""
    inside, name = x["attended"], s["kl_estimator"]
    ratio = x["logprobs"] - x["ref_logprobs"]
    penalty = kl(ratio, "k3", -10, 10) if name == "low_var_kl" else kl(ratio, name)
    rewards = -s["kl_coef"] * penalty + placed(x["score"], inside.sum(1) - 1, ratio)
    rewards, values = torch.where(inside, rewards, 0.0), torch.where(inside, x["values"], 0.0)
    advantages = gae(rewards, values, s["gamma"], s["lam"])
    return {
        "rewards": rewards,
        "advantages": torch.where(inside, advantages, 0.0),
        "returns": torch.where(inside, advantages + values, 0.0),
        "whitened": torch.where(inside, whitened(advantages, x["mask"]), 0.0),
    }


def nemo_rl(s: dict[str, Any], x: Outputs) -> Outputs:
    m = x["mask"]
    ratio = (x["logprobs"] - x["ref_logprobs"]).clamp(-20, 20)
    rewards = -s["kl_coef"] * kl(ratio, s["kl_estimator"], -10, 10)
    rewards = torch.where(m, rewards + placed(x["score"], last_of(m), rewards), 0.0)
    lam = s["lam"]
    lam_value = lam if s["lam_value"] is None else s["lam_value"]
    if s["alpha"]:
        lam = (1 - 1 / (s["alpha"] * m.sum(1).double()).clamp(min=1)).clamp(0, 1)
    advantages, for_returns = (
        carried_gae(rewards, x["values"], m, s["gamma"], each, 0.0) for each in (lam, lam_value)
    )
    return {
        "rewards": rewards,
        "returns": for_returns + x["values"],
        "whitened": torch.where(m, whitened(advantages, m), 0.0),
    }


def areal(s: dict[str, Any], x: Outputs) -> Outputs:
    m, length, width = x["mask"].roll(-1, 1), x["attended"].sum(1), x["mask"].shape[1]
    ratio = torch.where(m, x["logprobs"].roll(-1, 1) - x["ref_logprobs"], 0.0)
    rewards = -s["kl_coef"] * kl(ratio, s["kl_estimator"], -10, 10)
    rewards = rewards + placed(x["score"].clamp(-20, 20), (length - 2).clamp(min=0), rewards)
    last = torch.where(length == width, x["values"][:, -1], 0.0)
    advantages = carried_gae(rewards, x["values"], m, s["gamma"], s["lam"], last)
    mean, var = moments(advantages, m, 1)
    return {
        "rewards": rewards,
        "returns": advantages + x["values"],
        "whitened": torch.where(m, (advantages - mean) / (var.sqrt() + 1e-5), 0.0),
    }


def torchrl(s: dict[str, Any], x: Outputs) -> Outputs:
    advantages = gae(x["rewards"], x["values"], s["gamma"], s["lam"])
    return {"advantages": advantages, "returns": advantages + x["values"]}


FORMULAS: dict[str, Callable[[dict[str, Any], Outputs], Outputs]] = {
    "verl": verl,
    "trl-0.9.6": trl_classic,
    "trl-1.12.0": trl_inline,
    "openrlhf": openrlhf,
    "slime": slime,
    "nemo_rl": nemo_rl,
    "areal": areal,
    "torchrl": torchrl,
}


def to_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
