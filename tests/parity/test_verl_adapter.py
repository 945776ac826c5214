"""The verl adapter in verl's own processes: real reward workers, agent loops and trainer functions, on a CPU.

Run in an environment that has verl: ``python -m pytest tests/parity/test_verl_adapter.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from parity.toys import SPECIAL, Offline, another_server, save_policy, save_reward_model
from parity.verl_loop import SCRIPT
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.reward import extract_reward, load_reward_manager
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, trainer_base
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils
from verl.utils.import_utils import load_class_from_fqn

from attnshape.integrations import verl_groups
from attnshape.integrations.verl import TOKEN_REWARDS, AgentLoopManager, install_gae

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{HERE.parent}", "OMP_NUM_THREADS": "1", "TRANSFER_QUEUE_ENABLE": "1"}
MODULE = "attnshape.integrations.verl"
KL_COEF = 0.05
SHARE = 0.8
PROMPTS = [[{"role": "system", "content": "Judge films."}] * (i % 2) + [{"role": "user", "content": question}]
           for i, question in enumerate(SCRIPT)]  # fmt: skip
RESULTS = ("rm_scores", "token_level_rewards", "advantages", "returns")
SETTINGS = {
    "reward.num_workers": 2,
    "reward.custom_reward_function.path": f"pkg://{MODULE}",
    "reward.reward_manager.source": "importlib",
    "reward.reward_manager.module.path": f"pkg://{MODULE}",
    "reward.reward_manager.name": "RewardManager",
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": f"{MODULE}.AgentLoopManager",
    "actor_rollout_ref.rollout.agent.num_workers": 2,
    "actor_rollout_ref.rollout.agent.default_agent_loop": "scripted",
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.prompt_length": 80,
    "actor_rollout_ref.rollout.response_length": 96,
    "transfer_queue.enable": True,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "algorithm.use_kl_in_reward": True,
    "algorithm.kl_ctrl.kl_coef": KL_COEF,
    "algorithm.lam": 0.95,
}


class Setup:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = save_policy(folder / "policy")
        save_reward_model(folder / "reward_model")
        (folder / "loops.yaml").write_text("- name: scripted\n  _target_: parity.verl_loop.ScriptedLoop\n")
        self.offline = Offline(folder / "reward_model", self.policy)

    def config(self, **changes: Any) -> DictConfig:
        """verl's own configuration with the settings of the README, and ``changes``; None leaves one out."""
        settings = {
            **SETTINGS,
            "actor_rollout_ref.model.path": self.folder / "policy",
            "actor_rollout_ref.rollout.agent.agent_loop_config_path": self.folder / "loops.yaml",
            "+reward.custom_reward_function.reward_kwargs.model": self.folder / "reward_model",
            **changes,
        }
        with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
            return compose("ppo_trainer", [f"{k}={v}" for k, v in settings.items() if v is not None])

    def script(self, i: int) -> tuple[list[int], list[int]]:
        """Ids of the ``i``-th response, and its mask."""
        parts = [
            (self.policy(text, add_special_tokens=False)["input_ids"], mask)
            for text, mask in SCRIPT[PROMPTS[i][-1]["content"]]
        ]
        return [t for ids, _ in parts for t in ids], [mask for ids, mask in parts for _ in ids]

    def expected(self, i: int) -> torch.Tensor:
        """Token rewards of the ``i``-th response from eager attention."""
        ids, mask = self.script(i)
        if not self.policy.decode(ids, skip_special_tokens=True):
            score, _ = self.offline(PROMPTS[i], ids, mask)
            return torch.eye(len(ids))[-1].double() * score
        return self.offline.rewards(PROMPTS[i], ids, mask)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    ray.init(
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    yield Setup(tmp_path_factory.mktemp("verl"))
    ray.shutdown()


# By value: where pytest finds this file, Ray's workers may not.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def in_trainer(function: Any, *args: Any, **environment: str) -> Any:
    """What ``function`` returns in a process of its own, as verl's trainer has one."""
    remote = ray.remote(max_calls=1, runtime_env={"env_vars": {**ENVIRONMENT, **environment}})(function)
    return ray.get(remote.remote(*args), timeout=600)


def started(config: DictConfig) -> tuple[RewardLoopManager, Any]:
    """Reward workers and agent loops as verl's trainer and task runner start them, without a policy."""
    rewards = RewardLoopManager(config)
    name = config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
    manager = load_class_from_fqn(name) if name else AgentLoopManagerTQ
    loops = manager.create(
        config=config,
        llm_client=None,
        teacher_client=None,
        reward_loop_worker_handles=rewards.reward_loop_worker_handles,
    )
    return rewards, loops


def drawn(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def v1_step(config: DictConfig, prompts: list[Any]) -> tuple[list[str], Any]:
    """A step of the V1 trainer up to its advantages: keys of the samples, and what computes them."""
    _, loops = started(config)
    n = len(prompts)
    uids = [str(uuid.uuid4()) for _ in prompts]
    batch = tensordict_utils.get_tensordict(
        {
            "uid": uids,
            "raw_prompt": prompts,
            "index": torch.arange(n),
            "data_source": ["toy"] * n,
            "reward_model": [{"ground_truth": ""}] * n,
            "global_steps": torch.zeros(n, dtype=torch.long),
        }
    )
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 0}] * n
    tq.kv_batch_put(keys=uids, partition_id="train", tags=tags)
    loops.generate_sequences(batch)
    deadline = time.monotonic() + 300
    while {tq.kv_list()["train"][uid]["status"] for uid in uids} & {"pending", "running"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert {tq.kv_list()["train"][uid]["status"] for uid in uids} == {"finished"}
    keys = [f"{uid}_0_0" for uid in uids]
    fields = {
        name: torch.nested.as_nested_tensor(
            [drawn(tq.kv_list()["train"][key]["response_len"], 10 * i + j) for i, key in enumerate(keys)],
            layout=torch.jagged,
        )
        for j, name in enumerate(("old_log_probs", "ref_log_prob", "values"))
    }
    tq.kv_batch_put(keys=keys, partition_id="train", fields=tensordict_utils.get_tensordict(fields))
    return keys, SimpleNamespace(
        config=config, kl_ctrl_in_reward=core_algos.get_kl_controller(config.algorithm.kl_ctrl)
    )


def v1_results(keys: list[str], trainer: Any) -> dict[str, Any]:
    """What the V1 trainer's own ``_compute_advantage`` leaves in the TransferQueue, per sample."""
    metas = [tq.kv_list()["train"][key] for key in keys]
    trainer_base.PPOTrainer._compute_advantage(
        trainer, KVBatchMeta(partition_id="train", keys=keys, tags=metas), {}
    )
    data = tq.kv_batch_get(keys=keys, partition_id="train")
    names = (*RESULTS, "response_mask", "old_log_probs", "ref_log_prob")
    return {name: [row.clone() for row in data[name].unbind()] for name in names} | {
        "extra_fields": list(data["extra_fields"])
    }


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of a float32 forward: the offline model ran eager attention, the other sdpa."""
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


def dense_v1(config: DictConfig, prompts: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results with verl's GAE, and with ours in its place."""
    tq.init(config.transfer_queue)
    step = v1_step(config, prompts)
    theirs = v1_results(*step)
    install_gae()
    return theirs, v1_results(*step)


def test_the_v1_trainers_token_rewards_are_the_offline_credit(setup: Setup) -> None:
    """Two agent loop workers with three prompts each, two reward workers."""
    theirs, ours = in_trainer(dense_v1, setup.config(), PROMPTS)
    for i in range(len(PROMPTS)):
        _, mask = setup.script(i)
        assert theirs["response_mask"][i].tolist() == mask
        expected = setup.expected(i)
        close(theirs["rm_scores"][i], expected)
        log_ratio = theirs["old_log_probs"][i].double() - theirs["ref_log_prob"][i].double()
        close(theirs["token_level_rewards"][i], expected - KL_COEF * log_ratio * torch.tensor(mask))
        logged = theirs["extra_fields"][i]["reward_extra_info"]
        assert set(logged) == {"score", "entropy", "last_share", "response_attention", "fallback"}
        assert logged["score"] == pytest.approx(expected.sum().item(), rel=1e-5)
        for name in ("advantages", "returns"):
            close(ours[name][i], theirs[name][i].double())
        assert torch.equal(ours["rm_scores"][i], theirs["rm_scores"][i])


def sparse_v1(configs: list[DictConfig], prompts: list[Any]) -> list[dict[str, Any]]:
    tq.init(configs[0].transfer_queue)
    return [v1_results(*v1_step(config, prompts)) for config in configs]


def test_without_credit_the_v1_trainer_has_its_own_bits(setup: Setup) -> None:
    rule: dict[str, Any] = {
        "reward.custom_reward_function.path": HERE / "verl_rule.py",
        "+reward.custom_reward_function.reward_kwargs.model": None,
        "reward.num_workers": 1,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
    }
    stock = rule | {
        "reward.reward_manager.source": "register",
        "reward.reward_manager.module.path": None,
        "reward.reward_manager.name": "naive",
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": None,
    }
    configs = [setup.config(**rule), setup.config(**stock)]
    ours, theirs = in_trainer(sparse_v1, configs, PROMPTS)
    for name in RESULTS:
        for i in range(len(PROMPTS)):
            assert torch.equal(ours[name][i], theirs[name][i])
    for i, prompt in enumerate(PROMPTS):
        text = "".join(part for part, _ in SCRIPT[prompt[-1]["content"]])
        for special in SPECIAL:
            text = text.replace(special, "")
        assert ours["rm_scores"][i][-1] == torch.tensor(len(text) / 7)


def batch_v0(config: DictConfig, prompts: list[Any]) -> tuple[RewardLoopManager, DataProto]:
    """The V0 trainer's padded batch, from two calls of two and four prompts, up to its rewards."""
    rewards, loops = started(config)
    parts = []
    for part in (prompts[:2], prompts[2:]):
        fields = {"raw_prompt": np.empty(len(part), dtype=object)}
        fields["raw_prompt"][:] = part
        fields["data_source"] = np.array(["toy"] * len(part), dtype=object)
        fields["reward_model"] = np.array([{"ground_truth": ""}] * len(part), dtype=object)
        batch = DataProto.from_single_dict({"dummy": torch.zeros(len(part), 1), **fields})
        parts.append(loops.generate_sequences(batch))
        parts[-1].meta_info = {"reward_extra_keys": parts[-1].meta_info["reward_extra_keys"]}
    data = DataProto.concat(parts)
    assert not any(TOKEN_REWARDS in fields for fields in data.non_tensor_batch)
    shape = data.batch["responses"].shape
    for j, name in enumerate(("old_log_probs", "ref_log_prob", "values")):
        data.batch[name] = drawn(shape.numel(), j).view(shape)
    data.batch["token_level_scores"], _ = extract_reward(data)
    data, _ = ray_trainer.apply_kl_penalty(data, core_algos.get_kl_controller(config.algorithm.kl_ctrl))
    return rewards, data


def padded_v0(config: DictConfig, prompts: list[Any]) -> dict[str, torch.Tensor]:
    rewards, data = batch_v0(config, prompts)
    algorithm = config.algorithm
    data = ray_trainer.compute_advantage(
        data, algorithm.adv_estimator, gamma=algorithm.gamma, lam=algorithm.lam, config=algorithm
    )
    out = dict(data.batch)
    # The path of a colocated reward model, which the reward manager assembles itself.
    out["colocated"] = rewards.compute_rm_score(data).batch["rm_scores"]
    install_gae()
    data = ray_trainer.compute_advantage(
        data, algorithm.adv_estimator, gamma=algorithm.gamma, lam=algorithm.lam, config=algorithm
    )
    return out | {"our_advantages": data.batch["advantages"], "our_returns": data.batch["returns"]}


def test_the_v0_trainers_token_rewards_are_the_offline_credit(setup: Setup, served: str) -> None:
    """With the reward model behind HTTP."""
    changes: dict[str, Any] = {
        "trainer.use_v1": False,
        "+reward.custom_reward_function.reward_kwargs.model": None,
        "+reward.custom_reward_function.reward_kwargs.url": served,
    }
    out = in_trainer(padded_v0, setup.config(**changes), PROMPTS)
    assert out["attention_mask"][:, 0].sum() == 0  # prompts are padded on the left
    width = out["responses"].shape[1]
    expected = torch.zeros(len(PROMPTS), width, dtype=torch.float64)
    for i in range(len(PROMPTS)):
        ids, mask = setup.script(i)
        assert out["response_mask"][i].tolist() == mask + [0] * (width - len(ids))
        expected[i, : len(ids)] = setup.expected(i)
    close(out["rm_scores"], expected)
    kl = (out["old_log_probs"] - out["ref_log_prob"]).double() * out["response_mask"]
    close(out["token_level_rewards"], expected - KL_COEF * kl)
    close(out["colocated"], expected)  # scored again, in other batches of the server
    for name in ("advantages", "returns"):
        close(out[f"our_{name}"], out[name].double())


GROUPS = ["a", "b", "a", "b", "c", "a"]
"""Of the prompts: of three, of two, of one."""


def groups_v1(config: DictConfig, prompts: list[Any]) -> dict[Any, Any]:
    """Of each estimator verl's own results, those without a share and those with one."""
    tq.init(config.transfer_queue)
    keys, trainer = v1_step(config, prompts)
    tq.kv_batch_put(keys=keys, partition_id="train", fields=tensordict_utils.get_tensordict({"uid": GROUPS}))
    out = {}
    for name, each in verl_groups.ESTIMATORS.items():
        for estimator, share in ((each.theirs, 0.0), (name, 0.0), (name, SHARE)):
            if estimator == name:
                verl_groups.install(True, name, share)
            trainer.config.algorithm.adv_estimator = estimator
            out[estimator, share] = v1_results(keys, trainer)
    return out


def spread_in_float64(
    setup: Setup, name: str, rewards: list[torch.Tensor], own: list[torch.Tensor], share: float
) -> list[torch.Tensor]:
    """Advantages ``[R]`` of each response: ``own`` as verl had it before whitening, spread, and whitened."""
    scores, totals = [], torch.stack([row.double().sum() for row in rewards])
    credits, masks = [], []
    for i in range(len(PROMPTS)):
        ids, mask = setup.script(i)
        score, credit = setup.offline(PROMPTS[i], ids, mask)
        empty = not setup.policy.decode(ids, skip_special_tokens=True)
        live = torch.tensor(mask).double()
        credits.append(live / live.sum() if empty else credit)
        masks.append(live)
        scores.append(score)
    out = []
    for i, group in enumerate(GROUPS):
        of_group = torch.tensor([j for j, other in enumerate(GROUPS) if other == group])
        each, total = torch.tensor(scores).double()[of_group], totals[of_group]
        n, part = len(of_group), torch.tensor(scores[i]).double()
        if n > 1 and name != "reinforce_plus_plus":
            part = part - each.mean()
        if n > 1 and name == "rloo":
            part = part * n / (n - 1)
        if name == "grpo":
            part = part / ((total.std() if n > 1 else torch.tensor(1.0)) + 1e-6)
        live = masks[i]
        out.append((own[i].double() + share * part * (live.sum() * credits[i] - 1)) * live)
    if name.startswith("reinforce"):
        every = torch.cat([row[live != 0] for row, live in zip(out, masks, strict=True)])
        out = [(row - every.mean()) / every.std() * live for row, live in zip(out, masks, strict=True)]
    return out


def groups_v0(config: DictConfig, prompts: list[Any]) -> dict[Any, Any]:
    _, data = batch_v0(config, prompts)
    data.non_tensor_batch["uid"] = np.array(GROUPS, dtype=object)
    lengths = data.batch["attention_mask"][:, -data.batch["responses"].shape[1] :].sum(1).tolist()
    out = {}
    for name, each in verl_groups.ESTIMATORS.items():
        for estimator, share in ((each.theirs, 0.0), (name, 0.0), (name, SHARE)):
            if estimator == name:
                verl_groups.install(False, name, share)
            data = ray_trainer.compute_advantage(data, estimator, config=config.algorithm)
            rows = {field: zip(data.batch[field], lengths, strict=True) for field in RESULTS}
            out[estimator, share] = {k: [row[:n].clone() for row, n in x] for k, x in rows.items()}
    return out


@pytest.mark.parametrize("v1", [True, False])
def test_groups(setup: Setup, v1: bool) -> None:
    """KL in the reward, which stays where verl has it; an empty response, whose advantage stays even."""
    config = setup.config(**{"algorithm.adv_estimator": "attnshape_grpo", "trainer.use_v1": v1})
    found = in_trainer(groups_v1 if v1 else groups_v0, config, PROMPTS)
    for name, each in verl_groups.ESTIMATORS.items():
        theirs, none, ours = found[each.theirs, 0.0], found[name, 0.0], found[name, SHARE]
        own = theirs["returns" if each.theirs == "reinforce_plus_plus" else "advantages"]
        if each.theirs == "reinforce_plus_plus_baseline":
            totals = [row.double().sum() for row in theirs["token_level_rewards"]]
            own = []
            for i, group in enumerate(GROUPS):
                others = [t for t, other in zip(totals, GROUPS, strict=True) if other == group]
                mean = sum(others) / len(others) if len(others) > 1 else 0.0
                own.append((totals[i] - mean) * torch.ones(len(theirs["advantages"][i])))
        want = spread_in_float64(setup, each.theirs, theirs["token_level_rewards"], own, SHARE)
        for i in range(len(PROMPTS)):
            assert theirs["rm_scores"][i].count_nonzero() == 1  # verl's own
            for field in RESULTS:
                assert torch.equal(theirs[field][i], none[field][i])
            torch.testing.assert_close(ours["advantages"][i].double(), want[i], rtol=2e-5, atol=2e-5)
        changed = [not torch.equal(*x) for x in zip(ours["advantages"], none["advantages"], strict=True)]
        assert sum(changed) >= 4


def test_the_last_output_of_a_session_speaks_for_its_others() -> None:
    """As verl's ``compute_advantage_for_multi_trajectories``, on its own data."""
    rewards, mask = torch.zeros(5, 4), torch.ones(5, 4, dtype=torch.long)
    mask[1, 2:], mask[3, 0] = 0, 0
    rewards[:, 3] = torch.tensor([1.0, 0.0, 2.0, 4.0, 3.0])
    keys = ["a_0_0", "a_0_1", "a_1_0", "b_0_0", "b_1_0"]
    data = DataProto.from_dict({"token_level_rewards": rewards, "response_mask": mask})
    data.non_tensor_batch["uid"] = np.array([key[0] for key in keys], dtype=object)
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True})
    sessions = [(key[:3], int(key[-1])) for key in keys]
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    credit = [None] + [{"score": rewards[i].sum().item(), "credit": weights[i].tolist()} for i in range(1, 5)]
    theirs = compute_advantage_for_multi_trajectories(data, keys, "grpo", config=config)
    own = theirs.batch["advantages"].clone()
    found = {}
    for share in (0.0, SHARE):
        verl_groups.install(True, "attnshape_grpo", share)
        with verl_groups.given(credit, sessions):
            out = compute_advantage_for_multi_trajectories(data, keys, "attnshape_grpo", config=config)
        found[share] = out.batch["advantages"].clone()
    assert torch.equal(found[0.0], own)
    live = mask * weights * torch.tensor([0, 1, 1, 1, 1])[:, None]
    n = mask.sum(1, keepdim=True)
    spread = SHARE * n * live / live.sum(1, keepdim=True).clamp(min=1e-9) + 1 - SHARE
    spread[0] = 1
    torch.testing.assert_close(found[SHARE], own * spread * mask)


@pytest.mark.parametrize("name", sorted(core_algos.ADV_ESTIMATOR_REGISTRY))
def test_estimators_that_lose_the_credit(setup: Setup, name: str) -> None:
    """Those of verl that keep token rewards apart run with them, as under ``gae``."""
    apart = {"gae", "reinforce_plus_plus", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"}
    config = setup.config(**{"algorithm.adv_estimator": name})
    if name in apart | set(verl_groups.ESTIMATORS):
        load_reward_manager(config, setup.policy)
        return
    want = {"grpo_vectorized": "grpo", "rloo_vectorized": "rloo"}.get(name, name)
    want = f"attnshape_{want}" if f"attnshape_{want}" in verl_groups.ESTIMATORS else "one of attnshape_grpo"
    with pytest.raises(ValueError, match=f"got {name}, which adds .* up, so that .* lost; want {want}"):
        load_reward_manager(config, setup.policy)
    load_reward_manager(
        setup.config(
            **{"algorithm.adv_estimator": name, "+reward.reward_kwargs.dense_share": 0},
        ),
        setup.policy,
    )


@pytest.mark.parametrize("name", sorted(core_algos.POLICY_LOSS_REGISTRY))
def test_losses_that_lose_the_credit(setup: Setup, name: str) -> None:
    """Of verl's own only GMPO's takes one advantage per completion."""
    changes: dict[str, Any] = {
        "algorithm.adv_estimator": "attnshape_grpo",
        "actor_rollout_ref.actor.policy_loss.loss_mode": name,
        "actor_rollout_ref.actor.policy_loss.dro_beta": 0.1,
    }
    if name == "geo_mean":
        with pytest.raises(ValueError, match="loss_mode: got geo_mean, which takes the mean"):
            load_reward_manager(setup.config(**changes), setup.policy)
        changes["+reward.reward_kwargs.dense_share"] = 0
    load_reward_manager(setup.config(**changes), setup.policy)


SERVE = """
import sys
from attnshape.text.score_fn import parse_score_fn
from attnshape.serve.app import ServeConfig, run
config = ServeConfig(model=sys.argv[1], score_fn=parse_score_fn("logit"))
run(config, "127.0.0.1", 0, lambda url: print(url, flush=True))
"""


@pytest.fixture
def served(setup: Setup) -> Iterator[str]:
    """``attnshape serve``, without its command line; or another server of its protocol."""
    with another_server(setup.folder / "reward_model") as url:
        if url is not None:
            yield url
            return
    env = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-W", "ignore", "-c", SERVE, str(setup.folder / "reward_model")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def failing_start(config: DictConfig) -> str:
    try:
        started(config)
    except Exception as error:
        return str(error)
    return ""


def test_what_a_reward_worker_cannot_load_stops_the_start(setup: Setup) -> None:
    changes: dict[str, Any] = {
        "reward.num_workers": 1,
        "+reward.custom_reward_function.reward_kwargs.model": None,
        "+reward.custom_reward_function.reward_kwargs.url": "http://127.0.0.1:9",
    }
    found = in_trainer(failing_start, setup.config(**changes))
    assert "http://127.0.0.1:9/health" in found
    assert "is `attnshape serve` running there?" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"+actor_rollout_ref.rollout.agent.agent_loop_manager_class": None},
            "agent_loop_manager_class: got None, which puts the whole score on the last token",
        ),
        (
            {"reward.reward_model.enable": True},
            "reward.reward_model: colocated with the policy under trainer.use_v1",
        ),
        (
            {"reward.reward_model.enable": True, "reward.custom_reward_function.path": None},
            "custom_reward_function.path: got none",
        ),
        (
            {"+reward.custom_reward_function.reward_kwargs.modle": "x"},
            "unexpected keyword argument 'modle'",
        ),
        (
            {"+reward.custom_reward_function.reward_kwargs.url": "http://127.0.0.1:9"},
            "want either url or model",
        ),
        ({"+reward.reward_kwargs.beta": 0.8}, "reward.reward_kwargs: got beta, want dense_share"),
        ({"algorithm.adv_estimator": "attnshape_opo"}, "got attnshape_opo, which verl does not know"),
    ],
)
def test_a_reward_manager_is_not_made_where_its_rewards_would_be_lost(
    setup: Setup, changes: dict[str, Any], message: str
) -> None:
    config = setup.config(**changes)
    with pytest.raises((ValueError, TypeError), match=message):
        load_reward_manager(config, setup.policy)


@pytest.mark.parametrize("v1", [True, False])
def test_agent_loops_are_not_made_for_another_reward_manager(setup: Setup, v1: bool) -> None:
    config = setup.config(
        **{"reward.reward_manager.source": "register", "reward.reward_manager.name": "naive"}
    )
    config.trainer.use_v1 = v1
    with pytest.raises(ValueError, match="reward_manager: got register naive, want source=importlib"):
        AgentLoopManager.create(config=config)


def with_plugin(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``import verl`` where attnshape is installed, as far as its entry points go."""
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "attnshape-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attnshape\nVersion: 0.1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in x.items()) for group, x in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    code = "import verl; from verl.trainer.ppo import core_algos as c; print(c.compute_gae_advantage_return)"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "VERL_USE_EXTERNAL_PLUGINS": "none",
            "VERL_USE_EXTERNAL_MODULES": "attnshape.integrations.verl_plugin",
        },
    ],
    ids=["entry point", "external module"],
)
def test_the_plugin_replaces_gae_when_asked(tmp_path: Path, environment: dict[str, str]) -> None:
    done = with_plugin(tmp_path, ATTNSHAPE_VERL_GAE="1", **environment)
    assert done.returncode == 0, done.stderr
    line, function = done.stdout.splitlines()[-2:]
    assert line == "attnshape 0.1.0: replaced verl 0.9.1's core_algos.compute_gae_advantage_return"
    assert "gae_advantage_return at" in function
    assert "compute_gae" not in function


def test_the_plugin_is_off_unless_asked(tmp_path: Path) -> None:
    done = with_plugin(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compute_gae_advantage_return at" in done.stdout
    assert "attnshape" not in done.stdout


def test_the_plugin_ends_a_process_with_another_gae(tmp_path: Path) -> None:
    """Where the function changed shape, at the import, although verl swallows what plugins raise."""
    (tmp_path / "changed.py").write_text(
        "from verl.trainer.ppo import core_algos\n"
        "def compute_gae_advantage_return(token_level_rewards, values, mask): ...\n"
        "core_algos.compute_gae_advantage_return = compute_gae_advantage_return\n"
    )
    done = with_plugin(tmp_path, ATTNSHAPE_VERL_GAE="1", VERL_USE_EXTERNAL_MODULES="changed")
    assert done.returncode == 1
    assert "ATTNSHAPE_VERL_GAE: changed.compute_gae_advantage_return takes" in done.stderr
