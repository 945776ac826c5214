"""The same results as a PPO code writes them without this library: eager attention, a loop over tokens.

Batched over rows, in float32 where transformers' eager attention is; for padded layouts only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnshape.bench.cases import Case
from attnshape.config import ShapingConfig
from attnshape.types import AttentionInputs


def plain_call(case: Case, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What ``case`` computes, by the names of ``outputs_of``; not a sweep's ``credit`` and ``kl``."""
    rest = dict(arguments)
    if case.what == "row":
        return {"row": _row(rest["inputs"])}
    if case.what == "whiten":
        return {"whiten": _whitened(rest["x"], rest["response"].mask)}
    mask = rest["response"].mask
    if case.what == "column":
        return {"column": _columns(rest["inputs"], mask)}
    if case.what == "gae":
        return _loop(case, rest["rewards"], rest["values"], mask)
    credit = rest.get("credit")
    if credit is None:
        credit = _row(rest["inputs"])[:, -mask.shape[1] :]
    credit = credit * mask
    credit = credit / credit.sum(1, keepdim=True)
    if case.what == "credit":
        return {"credit": credit}
    dense = ShapingConfig().dense_share
    score, width = rest["score"][:, None], mask.shape[1]
    last = (mask * torch.arange(width, device=mask.device)).argmax(1, keepdim=True)
    rewards = dense * score * credit - rest["kl"].coef * (rest["kl"].logprobs - rest["kl"].ref_logprobs)
    rewards = rewards.scatter_add(1, last, (1 - dense) * score) * mask
    return {"rewards": rewards, **_loop(case, rewards, rest["values"], mask)}


def _weights(inputs: AttentionInputs, query: Tensor) -> Tensor:
    """Scores of ``query [B, Hq, n, D]`` on keys that are repeated for it, float32 ``[B, Hq, n, S]``."""
    key = inputs.key.repeat_interleave(query.shape[1] // inputs.key.shape[1], 1)
    return (query @ key.transpose(-1, -2) * inputs.scaling).float()


def _row(inputs: AttentionInputs) -> Tensor:
    """The last query's attention, averaged over heads, ``[B, S]``."""
    return _weights(inputs, inputs.query[:, :, None]).softmax(-1).mean(1)[:, 0]


def _columns(inputs: AttentionInputs, mask: Tensor) -> Tensor:
    """Mean attention of response tokens ``s >= j`` to response token ``j``, normalised; holds ``[R, S]``."""
    width, keys = mask.shape[1], inputs.key.shape[2]
    scores = _weights(inputs, inputs.query[:, :, -width:])
    at = torch.arange(keys, device=mask.device)
    scores.masked_fill_(at > at[-width:, None], float("-inf"))
    block = scores.softmax(-1).mean(1)[:, :, -width:]
    raw = block.sum(1) / torch.arange(width, 0, -1, device=mask.device)
    return raw / raw.sum(1, keepdim=True)


def _loop(case: Case, rewards: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The textbook recurrence, all rows at once, one token after another."""
    gamma, lam, live = case.gamma, case.lam, mask.to(rewards.dtype)
    skip = case.mask_semantics == "skip"
    if not skip:
        rewards, values = rewards * live, values * live
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        if skip:
            m = live[:, t]
            next_value = m * values[:, t] + (1 - m) * next_value
            advantage = m * step + (1 - m) * advantage
        else:
            next_value, advantage = values[:, t], step
        advantages[:, t] = advantage
    return {"advantages": advantages * live, "returns": (advantages + values) * live}


def _whitened(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    var = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask
