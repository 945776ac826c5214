"""verl's estimators without a critic, with credit: ``algorithm.adv_estimator=attnshape_grpo`` and others.

``attnshape_grpo`` (Dr. GRPO with verl's ``norm_adv_by_std_in_grpo=False``), ``attnshape_rloo``,
``attnshape_reinforce_plus_plus`` and ``attnshape_reinforce_plus_plus_baseline``: verl's own function makes
the advantage of each completion, and ``dense_share`` of what the reward model's score has in it is spread
by the credit, so that the mean over the completion's tokens stays. ``token_level_scores`` are verl's own, one
number on the last token; the credit travels beside them, in the agent loop's ``extra_fields``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnshape.config import GroupConfig
from attnshape.integrations.framework import require_parameters
from attnshape.integrations.groups import added
from attnshape.vectorized.groups import completion_advantages

CREDIT = "attnshape_credit"
"""Extra field of an agent loop's output: ``score``; ``credit`` per response token, ``signed`` or not."""


class _Estimator(NamedTuple):
    theirs: str
    """verl's name."""
    config: Callable[[Any], GroupConfig]
    """Of ``algorithm``: what verl's own computes, before whitening."""
    whitened: bool


def _grpo(algorithm: Any) -> GroupConfig:
    if algorithm.get("norm_adv_by_std_in_grpo", True):
        return GroupConfig.grpo(framework="verl")
    return GroupConfig.dr_grpo(lone="score")


def _baseline(algorithm: Any) -> GroupConfig:
    return GroupConfig.reinforce_plus_plus(baseline=True, lone="score")


ESTIMATORS = {
    "attnshape_grpo": _Estimator("grpo", _grpo, whitened=False),
    "attnshape_rloo": _Estimator("rloo", lambda algorithm: GroupConfig.rloo(), whitened=False),
    "attnshape_reinforce_plus_plus": _Estimator(
        "reinforce_plus_plus", lambda algorithm: GroupConfig.reinforce_plus_plus(), whitened=True
    ),
    "attnshape_reinforce_plus_plus_baseline": _Estimator(
        "reinforce_plus_plus_baseline", _baseline, whitened=True
    ),
}
"""By the name for ``algorithm.adv_estimator``."""


class _Batch(NamedTuple):
    """What verl does not hand to an estimator."""

    credit: Sequence[dict[str, Any] | None]
    """Of each row; None where there is none."""
    sessions: Sequence[tuple[str, int]] | None
    """Of each row: its session, and which of the session's outputs it is; None where each has one."""


_BATCH: ContextVar[_Batch | None] = ContextVar("attnshape_batch", default=None)


@contextmanager
def given(credit: Sequence[Any], sessions: Sequence[tuple[str, int]] | None = None) -> Iterator[None]:
    """The batch that estimators are about to be called for."""
    token = _BATCH.set(_Batch(credit, sessions))
    try:
        yield
    finally:
        _BATCH.reset(token)


def check_estimator(algorithm: Any) -> None:
    """Raises ValueError for an estimator of verl's that has no use for one reward per token.

    It is tried: one that gives the same advantages wherever in a completion the reward stands adds it up.
    """
    name = algorithm.adv_estimator
    if name == "gae" or name in ESTIMATORS:
        return
    from verl.trainer.ppo import core_algos

    ours = [key for key, each in ESTIMATORS.items() if each.theirs == str(name).removesuffix("_vectorized")]
    want = " or ".join(ours or ["one of " + ", ".join(ESTIMATORS)])
    if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
        raise ValueError(f"algorithm.adv_estimator: got {name}, which verl does not know, want {want}")
    if not _keeps_tokens_apart(core_algos.get_adv_estimator_fn(name), algorithm):
        raise ValueError(
            f"algorithm.adv_estimator: got {name}, which adds a completion's token rewards up, so that the "
            f"credit is lost; want {want}, or +reward.reward_kwargs.dense_share=0"
        )


def _keeps_tokens_apart(estimator: Callable[..., tuple[Tensor, Tensor]], algorithm: Any) -> bool:
    first, last = torch.zeros(3, 4), torch.zeros(3, 4)
    first[:, 0] = last[:, -1] = torch.tensor([1.0, 2.0, 4.0])
    known = {
        "response_mask": torch.ones(3, 4),
        "config": algorithm,
        "index": np.array(["a"] * 3, dtype=object),
        "reward_baselines": torch.zeros(3),
        "old_log_probs": torch.full((3, 4), -1.0),
        "sum_pi_squared": torch.full((3, 4), 0.5),
    }
    parameters = inspect.signature(estimator).parameters
    if not any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        known = {key: x for key, x in known.items() if key in parameters}
    found = [estimator(token_level_rewards=rewards.clone(), **known)[0] for rewards in (first, last)]
    return not torch.equal(*found)


def check_loss(actor: Any) -> None:
    """Raises ValueError for a loss of verl's policy that takes one advantage per completion.

    It is tried: one whose gradient is the same wherever in a completion the advantage stands has only its
    mean. A loss that needs more around it than a trial has is not known to lose anything.
    """
    name = actor.policy_loss.get("loss_mode", "vanilla")
    if name == "vanilla":
        return
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig, PolicyLossConfig

    given = PolicyLossConfig(loss_mode=name, dro_beta=actor.policy_loss.get("dro_beta"))
    config = ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, policy_loss=given)
    loss = core_algos.get_policy_loss_fn(name)
    gradients = []
    for row in ([3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0]):
        log_prob = torch.full((2, 4), -1.0, requires_grad=True)
        try:
            value, _ = loss(
                old_log_prob=log_prob.detach().clone(),
                log_prob=log_prob,
                advantages=torch.tensor([row, row]),
                response_mask=torch.ones(2, 4),
                config=config,
            )
        except Exception:
            return
        gradients.append(torch.autograd.grad(value, log_prob)[0])
    if torch.equal(*gradients):
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode: got {name}, which takes the mean of a "
            "completion's advantages, so that the credit is lost; want vanilla or another that has one per "
            "token, or +reward.reward_kwargs.dense_share=0"
        )


def estimate(
    name: str,
    dense_share: float,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What ``algorithm.adv_estimator=name`` calls: ``name`` of ``ESTIMATORS``, the rest as verl has it.

    Returns:
        ``[B, R]`` twice, as verl's own has them. Without any credit they are verl's own, to the bit.

    Raises:
        RuntimeError: the batch did not come through ``AgentLoopManager``.
    """
    batch = _BATCH.get()
    if batch is None:
        raise RuntimeError(
            f"algorithm.adv_estimator: {name} needs the credit that "
            "agent_loop_manager_class=attnshape.integrations.verl.AgentLoopManager sends along"
        )
    from verl.trainer.ppo import core_algos

    estimator, index = ESTIMATORS[name], np.asarray(index)
    own, returns, rows = _theirs(estimator.theirs, token_level_rewards, response_mask, index, config, batch)
    score = torch.tensor([0.0 if x is None else x["score"] for x in batch.credit], dtype=torch.float64)
    weights = torch.zeros(response_mask.shape)
    for row, found in zip(weights, batch.credit, strict=True):
        if found is not None:
            n = min(len(found["credit"]), len(row))  # rows that verl adds as padding are shorter
            row[:n] = torch.tensor(found["credit"])[:n]
    if not dense_share or not weights.any():
        return own, returns
    total = token_level_rewards.double().sum(1)
    both = torch.stack([score, total - score], 1)[rows]  # of a rule or a KL penalty each token has its share
    groups = torch.as_tensor(np.unique(index[rows.numpy()], return_inverse=True)[1])
    parts = torch.zeros(len(total), 2, dtype=torch.float64)
    parts[rows] = completion_advantages(both, groups, estimator.config(config), None)
    signed = any(x is not None and x["signed"] for x in batch.credit)
    change = added(parts[:, 0], weights, response_mask, dense_share, signed=signed)
    to_go = estimator.theirs == "reinforce_plus_plus"
    if estimator.whitened:  # after the spread, so before it comes what verl whitened
        own = returns if to_go else parts.sum(1).to(own.dtype)[:, None] * response_mask
    advantages = raw = own + change
    if estimator.whitened:
        advantages = core_algos.verl_F.masked_whiten(raw, response_mask) * response_mask
    return advantages, raw if to_go else advantages


def _theirs(
    name: str, rewards: Tensor, mask: Tensor, index: np.ndarray, config: Any, batch: _Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """verl's own advantages and returns, and which rows its groups are made of."""
    from verl.trainer.ppo import core_algos

    compute = core_algos.get_adv_estimator_fn(name)
    rows = torch.arange(len(rewards))
    if name != "grpo":
        return *compute(token_level_rewards=rewards, response_mask=mask, config=config, index=index), rows
    options = {"norm_adv_by_std_in_grpo": config.get("norm_adv_by_std_in_grpo", True)}
    if batch.sessions is not None:
        # As verl's compute_advantage_for_multi_trajectories: the last output of a session speaks for all.
        last = {session: i for i, (session, _) in sorted(enumerate(batch.sessions), key=lambda x: x[1][1])}
        rows = torch.tensor(list(last.values()))
        place = {session: i for i, session in enumerate(last)}
        of_row = torch.tensor([place[session] for session, _ in batch.sessions])
    own, _ = compute(
        token_level_rewards=rewards[rows], response_mask=mask[rows], index=index[rows.numpy()], **options
    )
    if batch.sessions is not None:
        one = own[torch.arange(len(rows)), mask[rows].argmax(1)]
        own = one[of_row][:, None] * mask
    return own, own, rows


def install(use_v1: bool, name: str, dense_share: float) -> None:
    """Registers the estimator in the trainer's process, and has the trainer hand it the credit.

    Raises:
        RuntimeError: verl's functions take other parameters.
    """
    from verl.trainer.ppo import core_algos

    core_algos.ADV_ESTIMATOR_REGISTRY[name] = functools.partial(estimate, name, dense_share)
    if use_v1:
        _give_credit_v1()
    else:
        _give_credit_v0()


@functools.cache
def _give_credit_v1() -> None:
    import transfer_queue as tq
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    theirs = PPOTrainer._compute_advantage
    require_parameters(theirs, "self", "batch", "metrics")

    @functools.wraps(theirs)
    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        fields = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
        )
        credit = [(x or {}).get(CREDIT) for x in fields["extra_fields"]]
        sessions = [(session, int(i)) for session, _, i in (key.rpartition("_") for key in batch.keys)]
        with given(credit, sessions):
            return theirs(self, batch, metrics)

    PPOTrainer._compute_advantage = _compute_advantage


@functools.cache
def _give_credit_v0() -> None:
    from verl.trainer.ppo import ray_trainer

    theirs = ray_trainer.compute_advantage
    require_parameters(
        theirs, "data", "adv_estimator", "gamma", "lam", "num_repeat", "norm_adv_by_std_in_grpo", "config"
    )

    @functools.wraps(theirs)
    def compute_advantage(data: Any, *args: Any, **options: Any) -> Any:
        with given(data.non_tensor_batch[CREDIT]):
            return theirs(data, *args, **options)

    ray_trainer.compute_advantage = compute_advantage
