"""The verl adapter in verl's own processes: real reward workers, agent loops and trainer functions, on a CPU.

Run in an environment that has verl: ``python -m pytest tests/parity/test_verl_adapter.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from toys import Offline, save_policy, save_reward_model
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils
from verl.utils.import_utils import load_class_from_fqn
from verl_loop import SCRIPT

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1", "TRANSFER_QUEUE_ENABLE": "1"}
MODULE = "attnshape.integrations.verl"
KL_COEF = 0.05
PROMPTS = [[{"role": "system", "content": "Judge films."}] * (i % 2) + [{"role": "user", "content": question}]
           for i, question in enumerate(SCRIPT)]  # fmt: skip
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
        (folder / "loops.yaml").write_text("- name: scripted\n  _target_: verl_loop.ScriptedLoop\n")
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


def in_trainer(function: Any, *args: Any, **environment: str) -> Any:
    """What ``function`` returns in a process of its own, as verl's trainer has one."""
    env = {"env_vars": {**ENVIRONMENT, **environment}}
    return ray.get(ray.remote(function).options(runtime_env=env, max_calls=1).remote(*args), timeout=300)


def agent_loops(config: DictConfig) -> Any:
    """As ``trainer.init()`` and ``TaskRunnerV1.init_agent_loop_manager`` make them, without a language model."""
    rewards = RewardLoopManager(config)
    manager = load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class)
    return manager.create(
        config=config,
        llm_client=None,
        teacher_client=None,
        reward_loop_worker_handles=rewards.reward_loop_worker_handles,
    )


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train_v1(config: DictConfig, prompts: list[Any]) -> dict[str, Any]:
    """One step of the V1 trainer up to its advantages; what it left in the TransferQueue, in order of prompts."""
    import transfer_queue as tq

    tq.init(config.transfer_queue)
    try:
        loops = agent_loops(config)
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
        deadline = time.monotonic() + 120
        while not all(tq.kv_list()["train"][uid]["status"] in ("finished", "failure") for uid in uids):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert {tq.kv_list()["train"][uid]["status"] for uid in uids} == {"finished"}
        keys = [f"{uid}_0_0" for uid in uids]
        lengths = [tq.kv_list()["train"][key]["response_len"] for key in keys]
        fields = {
            name: torch.nested.as_nested_tensor(
                [drawn((length,), 10 * i + seed) for i, length in enumerate(lengths)], layout=torch.jagged
            )
            for seed, name in enumerate(("old_log_probs", "ref_log_prob", "values"))
        }
        tq.kv_batch_put(keys=keys, partition_id="train", fields=tensordict_utils.get_tensordict(fields))
        trainer = type("Trainer", (), {"config": config})()
        trainer.kl_ctrl_in_reward = core_algos.get_kl_controller(config.algorithm.kl_ctrl)
        meta = tq.KVBatchMeta(partition_id="train", keys=keys, tags=[tq.kv_list()["train"][k] for k in keys])
        trainer_base.PPOTrainer._compute_advantage(trainer, meta, {})
        data = tq.kv_batch_get(keys=keys, partition_id="train")
        return {
            name: [row.clone() for row in data[name].unbind()]
            for name in (*fields, "rm_scores", "token_level_rewards", "advantages", "returns", "response_mask")
        } | {"extra_fields": list(data["extra_fields"])}
    finally:
        tq.close()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32 rounding of a whole forward: the offline model ran eager attention, the other sdpa."""
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_token_rewards_of_the_v1_trainer_are_the_offline_credit(setup: Setup) -> None:
    """Two agent loop workers with 3 prompts each; two reward workers."""
    config = setup.config()
    plain = in_trainer(train_v1, config, PROMPTS)
    for i in range(len(PROMPTS)):
        _, mask = setup.script(i)
        assert plain["response_mask"][i].tolist() == mask
        expected = setup.expected(i)
        close(plain["rm_scores"][i], expected)
        log_ratio = plain["old_log_probs"][i].double() - plain["ref_log_prob"][i].double()
        close(plain["token_level_rewards"][i], expected - KL_COEF * log_ratio * torch.tensor(mask))
