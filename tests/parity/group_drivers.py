"""The frameworks' own functions that make advantages without a critic; ``drivers.py`` runs them."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from parity.cases import WEIGHTS, Case
from parity.drivers import Outputs, Stubs, between, expect, slime_functions


def verl() -> Callable[[Case], Outputs]:
    import numpy as np
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.core_algos import FixedKLController

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        prompt = torch.zeros(len(x["score"]), 3, dtype=torch.long)
        data = DataProto.from_dict(
            {
                "prompts": prompt,
                "responses": torch.zeros_like(x["mask"], dtype=torch.long),
                "attention_mask": torch.cat([prompt + 1, x["attended"].long()], 1),
                "response_mask": x["mask"].long(),
                "old_log_probs": x["logprobs"],
                "ref_log_prob": x["ref_logprobs"],
            }
        )
        data.non_tensor_batch["uid"] = np.array([str(i) for i in x["group"].tolist()], dtype=object)
        data.batch["token_level_scores"] = RewardManagerBase.assemble_rm_scores(data, x["score"].tolist())
        data, _ = ray_trainer.apply_kl_penalty(data, FixedKLController(s["kl_coef"]), "kl")
        data = ray_trainer.compute_advantage(
            data,
            s["estimator"].replace("dr_grpo", "grpo"),
            norm_adv_by_std_in_grpo=s["estimator"] != "dr_grpo",
            config=OmegaConf.create({"gamma": 1.0}),
        )
        return {"advantages": data.batch["advantages"]}

    return run


def trl() -> Callable[[Case], Outputs]:
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    block = between(source, "unscorable_mask = torch.isnan", "advantages = torch.nan_to_num(")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        trainer = SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.tensor(WEIGHTS),
            scale_rewards=s["scale_rewards"],
        )
        names = {
            "self": trainer,
            "rewards_per_func": x["score"],
            "device": "cpu",
            "num_generations": int((x["group"] == 0).sum()),
        }
        exec(block, {**vars(grpo_trainer), **names}, names)
        return {"advantages": names["advantages"][:, None] * x["mask"]}

    return run


def openrlhf() -> Callable[[Case], Outputs]:
    sys.meta_path.append(Stubs(("flash_attn", "vllm")))
    from openrlhf.models.utils import compute_approx_kl
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    expect(RemoteExperienceMaker.compute_advantages_and_returns, "self experiences")
    expect(RemoteExperienceMaker.get_cumulative_returns, "self rewards action_mask gamma")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        penalties = {"overlong_buffer_len": None, "stop_properly_penalty_coef": None}
        advantage = SimpleNamespace(estimator=s["estimator"], gamma=1.0, lambd=1.0, no_std_norm=False)
        args = SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=int((x["group"] == 0).sum())),
            reward=SimpleNamespace(clip_range=(-10.0, 10.0), **penalties),
            algo=SimpleNamespace(advantage=advantage),
        )
        maker = SimpleNamespace(
            strategy=SimpleNamespace(args=args),
            advantage_estimator=s["estimator"],
            kl_ctl=SimpleNamespace(value=s["kl_coef"]),
        )
        to_go = RemoteExperienceMaker.get_cumulative_returns
        maker.get_cumulative_returns = types.MethodType(to_go, maker)
        kl = compute_approx_kl(x["logprobs"], x["ref_logprobs"], kl_estimator="k1")
        experiences = [
            SimpleNamespace(
                index=list(range(len(x["score"])))[part],
                rewards=x["score"][part],
                kl=kl[part],
                action_mask=x["mask"][part].long(),
                info={},
            )
            for part in (slice(0, 3), slice(3, None))  # two unequal micro-batches
        ]
        RemoteExperienceMaker.compute_advantages_and_returns(maker, experiences)
        return {"advantages": torch.cat([e.advantages for e in experiences])}

    return run


def slime(checkout: Path) -> Callable[[Case], Outputs]:
    found = slime_functions(checkout)

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        of_reinforce = s["estimator"].startswith("reinforce")
        args = SimpleNamespace(
            advantage_estimator=s["estimator"],
            rewards_normalization=True,
            grpo_std_normalization=True,
            n_samples_per_prompt=int((x["group"] == 0).sum()),
            rollout_batch_size=2,
            use_rollout_logprobs=False,
            kl_coef=s["kl_coef"] if s["estimator"] == "reinforce_plus_plus" else 0.0,
            kl_loss_type="k1",
            custom_advantage_function_path=None,
            gamma=1.0,
            use_opd=False,
            normalize_advantages=of_reinforce,
        )
        samples = [SimpleNamespace(get_reward_value=lambda args, x=x: x) for x in x["score"].tolist()]
        manager = SimpleNamespace(args=args, custom_reward_post_process_func=None)
        _, rewards = found.RolloutManager._post_process_rewards(manager, samples)
        lengths = x["attended"].sum(1).tolist()
        names = {"log_probs": "logprobs", "ref_log_probs": "ref_logprobs", "loss_masks": "mask"}
        data = {
            name: [row[:n].float() for row, n in zip(x[ours], lengths, strict=True)]
            for name, ours in names.items()
        }
        data |= {"rewards": rewards, "response_lengths": lengths, "total_lengths": [n + 3 for n in lengths]}
        found.compute_advantages_and_returns(args, data)
        out = torch.zeros(x["mask"].shape)
        for row, advantages in zip(out, data["advantages"], strict=True):
            row[: len(advantages)] = advantages
        return {"advantages": out * x["mask"]}

    return run
