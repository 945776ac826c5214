"""The verl adapter without verl: rewards, settings, GAE. In verl's own processes: tests/parity."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.processes import run
from torch import Tensor

from attnshape import ShapingConfig, reference
from attnshape.integrations import framework, verl, verl_groups

MODULE = "attnshape.integrations.verl"
MASK = [True, True, False, True]


def installed(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(framework, "version", version)


@pytest.mark.parametrize(
    ("found", "message"), [(None, "is not installed"), ("0.8.0", "0.8.0 is not supported")]
)
def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch, found: str | None, message: str) -> None:
    installed(monkeypatch, found)
    config = SimpleNamespace(trainer=SimpleNamespace(use_v1=True))
    for use in (
        lambda: verl.RewardManager,
        lambda: verl.AgentLoopManager.create(config),
        verl.install_gae,
    ):
        with pytest.raises(RuntimeError, match=f"verl {message}, want verl 0.9.1"):
            use()


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Rewards'"):
        _ = verl.Rewards


@pytest.mark.parametrize(("value", "status"), [("0", 0), ("1", 1)])
def test_the_plugin_where_there_is_no_verl(value: str, status: int) -> None:
    """On, it ends the process; off, it does not even import the adapter."""
    done = run(import_plugin, value, forget=("attnshape.integrations",))
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert ("ATTNSHAPE_VERL_GAE: verl 0.8.0 is not supported, want verl 0.9.1" in done.stderr) == bool(status)


def import_plugin(value: str) -> None:
    os.environ["ATTNSHAPE_VERL_GAE"] = value
    importlib.import_module("attnshape.integrations.framework").version = lambda name: "0.8.0"
    importlib.import_module("attnshape.integrations.verl_plugin")
    assert "attnshape.integrations.verl" not in sys.modules


def test_a_score_with_credit_is_one_reward_per_token() -> None:
    result = {"score": 2.0, "credit": [0.5, 0.3, 0.1, 0.1], "terminal_reward": 3.0}
    rewards = verl.reward_of(result, MASK, 0.75, groups=False)
    expected = [1.5 * 0.5 / 0.9, 1.5 * 0.3 / 0.9, 0.0, 1.5 * 0.1 / 0.9 + 0.5 + 3.0]
    assert rewards == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("result", "dense_share"),
    [({"score": 2.0, "terminal_reward": 3.0}, 0.75), ({"score": 5.0, "credit": [0.5, 0.3, 0.1, 0.1]}, 0.0)],
)
def test_a_score_without_credit_is_verls_to_place(result: dict[str, Any], dense_share: float) -> None:
    for groups in (False, True):
        assert verl.reward_of(result, MASK, dense_share, groups) == 5.0


def test_for_groups_the_credit_travels_beside_the_score() -> None:
    result = {"score": 2.0, "credit": [0.5, 0.3, 0.1, 0.1], "terminal_reward": 3.0}
    found = verl.reward_of(result, MASK, 0.75, groups=True)
    assert found == {"reward": 5.0, "score": 2.0, "credit": [0.5, 0.3, 0.1, 0.1], "signed": False}
    of_signs = {"score": 2.0, "credit": None, "token_rewards": [0.5, -0.3, 0.1, -0.3]}
    carried = verl.reward_of(of_signs, MASK, 0.75, groups=True)
    assert carried == {"reward": 2.0, "score": 2.0, "credit": [0.5, -0.3, 0.1, -0.3], "signed": True}
    with pytest.raises(ValueError, match="credit: got 4 weights for a response of 3 tokens"):
        verl.reward_of(result, MASK[:3], 0.75, groups=True)


@pytest.mark.parametrize("groups", [False, True])
def test_weights_of_a_users_function_are_checked(groups: bool) -> None:
    """``shape_rewards`` would put the whole score on the last token, and say so where nobody looks."""
    for credit in ([1.0, -0.5, 0.0, 0.5], [float("nan"), 0.0, 0.0, 1.0], [float("inf"), 0.0, 0.0, 1.0]):
        with pytest.raises(ValueError, match=r"credit: got (-0.5|nan|inf), want finite weights, 0 or more"):
            verl.reward_of({"score": 1.0, "credit": credit}, MASK, 0.5, groups)
    signed = {"score": 1.0, "credit": None, "token_rewards": [float("nan"), 0.0, 0.0, 0.0]}
    with pytest.raises(ValueError, match="token_rewards: got nan, want finite ones"):
        verl.reward_of(signed, MASK, 0.5, groups)
    weights = [0.5, 0.25, 0.0, 0.25]
    result = {"score": 1.0, "credit": torch.tensor(weights)}
    as_list = {**result, "credit": weights}
    assert verl.reward_of(result, MASK, 0.5, groups) == verl.reward_of(as_list, MASK, 0.5, groups)


def test_the_last_output_carries_the_credit() -> None:
    config = Config(algorithm={"adv_estimator": "attnshape_grpo"})
    reward = {"reward": 5.0, "score": 2.0, "credit": [0.5, 0.5], "signed": False}
    outputs = [SimpleNamespace(reward_score=x, extra_fields={}) for x in (None, reward)]
    verl._move_credit(config, outputs)
    assert [x.reward_score for x in outputs] == [None, 5.0]
    carried = [x.extra_fields[verl_groups.CREDIT] for x in outputs]
    assert carried == [None, {"score": 2.0, "credit": [0.5, 0.5], "signed": False}]
    verl._move_credit(config, [plain := SimpleNamespace(reward_score=1.0, extra_fields={})])
    assert plain.extra_fields == {verl_groups.CREDIT: None}
    other = Config(algorithm={"adv_estimator": "gae"})
    verl._move_credit(other, [dense := SimpleNamespace(reward_score=[1.0], extra_fields={})])
    assert dense == SimpleNamespace(reward_score=[1.0], extra_fields={})


def test_an_estimator_without_its_batch() -> None:
    with pytest.raises(RuntimeError, match="attnshape_rloo needs the credit that agent_loop_manager_class="):
        verl_groups.estimate("attnshape_rloo", 0.8, torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("found", ["beta", "overlong_buffer_cfg"])
def test_other_reward_settings_are_refused(found: str) -> None:
    """``beta`` is what ``dense_share`` was called."""
    with pytest.raises(
        ValueError, match=rf"reward.reward_kwargs: got {found}, want dense_share and no other"
    ):
        verl.check_config(config(reward_kwargs={found: 0.5}))
    verl.check_config(config(reward_kwargs={"dense_share": 0.5}))


def test_the_reward_function_needs_its_manager() -> None:
    with pytest.raises(RuntimeError, match=r"reward.reward_manager: compute_score needs name=RewardManager"):
        asyncio.run(verl.compute_score("toy", "Yes", "", {}, url="http://127.0.0.1:9"))


class Config(dict[str, Any]):
    """Attributes and ``get``, as far as verl's configuration is read."""

    def __getattr__(self, name: str) -> Any:
        return Config(self[name]) if isinstance(self[name], dict) else self[name]


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "enable": False,
        "enable_resource_pool": False,
        "path": f"pkg://{MODULE}",
        "use_v1": True,
        "agent_loop_manager_class": f"{MODULE}.AgentLoopManager",
        "adv_estimator": "gae",
        "reward_kwargs": None,
    } | changes
    agent = {"agent_loop_manager_class": settings["agent_loop_manager_class"]}
    return Config(
        reward={
            "reward_model": {name: settings[name] for name in ("enable", "enable_resource_pool")},
            "custom_reward_function": {"path": settings["path"]},
            "reward_kwargs": settings["reward_kwargs"],
        },
        algorithm={"adv_estimator": settings["adv_estimator"]},
        trainer={"use_v1": settings["use_v1"]},
        actor_rollout_ref={"actor": {"policy_loss": {}}, "rollout": {"agent": agent}},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_v1": False},
        {"path": None},
        {"enable": True, "enable_resource_pool": True},
        {"enable": True, "use_v1": False, "agent_loop_manager_class": None},
        {"adv_estimator": "attnshape_rloo"},
    ],
)
def test_settings_that_keep_token_rewards(changes: dict[str, Any]) -> None:
    verl.check_config(config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"agent_loop_manager_class": None},
            "agent_loop_manager_class: got None, which puts the whole score",
        ),
        ({"agent_loop_manager_class": "a.B", "use_v1": False}, "agent_loop_manager_class: got a.B"),
        (
            {"enable": True, "enable_resource_pool": True, "agent_loop_manager_class": None},
            "agent_loop_manager_class: got None",
        ),
        ({"enable": True}, "reward.reward_model: colocated with the policy under trainer.use_v1"),
        ({"enable": True, "use_v1": False, "path": None}, "reward.custom_reward_function.path: got none"),
        (
            {"enable": True, "use_v1": False, "adv_estimator": "attnshape_rloo"},
            "colocated with the policy, where no credit travels beside the score",
        ),
    ],
)
def test_settings_that_lose_token_rewards(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verl.check_config(config(**changes))


def test_a_loss_of_one_advantage_per_completion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def per_token(log_prob: Tensor, advantages: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        return -(log_prob * advantages).mean(), {}

    def of_means(log_prob: Tensor, advantages: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        return -(log_prob.mean(1) * advantages.mean(1)).mean(), {}

    def needs_more(**_: Any) -> tuple[Tensor, dict[str, Any]]:
        raise KeyError("rollout_correction")

    losses = {"mine": per_token, "geo_mean": of_means, "another": needs_more}
    made = SimpleNamespace(ActorConfig=SimpleNamespace, PolicyLossConfig=SimpleNamespace)
    core_algos = SimpleNamespace(get_policy_loss_fn=losses.__getitem__)
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo", SimpleNamespace(core_algos=core_algos))
    monkeypatch.setitem(sys.modules, "verl.workers.config", made)

    def with_loss(name: str, **changes: Any) -> Config:
        found = config(adv_estimator="attnshape_grpo", **changes)
        found["actor_rollout_ref"]["actor"]["policy_loss"] = {"loss_mode": name}
        return found

    for name in ("vanilla", "mine", "another"):
        verl.check_config(with_loss(name))
    with pytest.raises(ValueError, match="loss_mode: got geo_mean, which takes the mean of a completion's"):
        verl.check_config(with_loss("geo_mean"))
    verl.check_config(with_loss("geo_mean", reward_kwargs={"dense_share": 0}))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
def test_gae_is_verls(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator).unbind()
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    advantages, returns = verl.gae_advantage_return(rewards, values, mask, gamma, lam)
    expected, expected_returns = loop(rewards.double(), values.double(), mask.double(), gamma, lam)
    assert torch.allclose(advantages.double(), expected, rtol=0, atol=1e-5)
    assert torch.allclose(returns.double(), expected_returns, rtol=0, atol=1e-5)
    settings = ShapingConfig.verl(gamma=gamma, lam=lam)
    plain = reference.gae(rewards.double(), values.double(), mask, settings).advantages
    whitened = reference.whiten(plain, mask, settings.whitening)
    live = mask.bool()
    assert torch.allclose(advantages.double()[live], whitened[live], rtol=0, atol=1e-5)


def loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Token by token: a masked one passes on the next value and the advantage."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        value, advantage = 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[b, t]:
                delta = rewards[b, t] + gamma * value - values[b, t]
                value, advantage = values[b, t], delta + gamma * lam * advantage
            advantages[b, t] = advantage
    live = advantages[mask.bool()]
    return (advantages - live.mean()) / (live.var() + 1e-8).sqrt(), advantages + values
