"""The frameworks' own functions on drawn cases: ``python drivers.py FRAMEWORK CASES OUTPUTS [CHECKOUT]``.

Runs in the framework's environment (``requirements.toml``), without attnshape. Where a function's
parameters are not those it had when this was written, that is said before anything runs. A framework
without a package comes from a checkout: its functions are cut out of their files, as they stand, with what
they need of Megatron and Ray left out.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity.cases import Case

Outputs = dict[str, Tensor]
Function = Callable[..., Any]


class Changed(Exception):
    """A framework's function is not the one the presets were written for."""


def expect(function: Function, parameters: str) -> None:
    """Raises ``Changed`` where a function's parameters have other names, or another order."""
    got = " ".join(inspect.signature(function).parameters)
    if got != parameters:
        raise Changed(f"{function.__module__}.{function.__qualname__}({got}), want ({parameters})")


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that are imported and never used here: any name in them is a class."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        class Stub(types.ModuleType):
            def __getattr__(self, name: str) -> type:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (), {})

        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def cut(checkout: Path, files: Mapping[str, list[str]], namespace: dict[str, Any]) -> SimpleNamespace:
    """The named functions and classes out of a checkout's files, run in one ``namespace``."""
    for file, names in files.items():
        path = checkout / file
        nodes = {getattr(node, "name", ""): node for node in ast.parse(path.read_text()).body}
        if missing := set(names) - set(nodes):
            raise Changed(f"{path} has no {', '.join(sorted(missing))}")
        annotations = ast.parse("from __future__ import annotations").body
        module = ast.Module([*annotations, *(nodes[name] for name in names)], type_ignores=[])
        exec(compile(module, str(path), "exec"), namespace)
    return SimpleNamespace(**namespace)


def between(source: str, first: str, last: str) -> types.CodeType:
    """The lines of a function from the one that has ``first`` in it to the one that has ``last``."""
    lines = source.splitlines()
    places = [[i for i, line in enumerate(lines) if part in line] for part in (first, last)]
    if any(len(found) != 1 for found in places):
        raise Changed(f"no such lines in {lines[0].strip()}: {first} … {last}")
    begin, end = places[0][0], places[1][0]
    return compile(textwrap.dedent("\n".join(lines[begin : end + 1])), lines[0].strip(), "exec")


# Packages ---------------------------------------------------------------------------------------------


def verl() -> Callable[[Case], Outputs]:
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.core_algos import (
        AdvantageEstimator,
        FixedKLController,
        compute_gae_advantage_return,
    )

    expect(compute_gae_advantage_return, "token_level_rewards values response_mask gamma lam")
    expect(ray_trainer.apply_kl_penalty, "data kl_ctrl kl_penalty")
    expect(
        ray_trainer.compute_advantage,
        "data adv_estimator gamma lam num_repeat norm_adv_by_std_in_grpo config",
    )
    expect(RewardManagerBase.assemble_rm_scores, "data scores")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        prompt = torch.zeros(len(x["score"]), 3, dtype=torch.long)
        attention = torch.cat([prompt + 1, x["attended"].long()], 1)
        responses = torch.zeros_like(x["mask"], dtype=torch.long)
        data = DataProto.from_dict(
            {
                "prompts": prompt,
                "responses": responses,
                "attention_mask": attention,
                "response_mask": x["mask"].to(getattr(torch, s["mask"])),
                "old_log_probs": x["logprobs"],
                "ref_log_prob": x["ref_logprobs"],
                "values": x["values"],
            }
        )
        data.batch["token_level_scores"] = RewardManagerBase.assemble_rm_scores(data, x["score"].tolist())
        control = FixedKLController(s["kl_coef"])
        data, _ = ray_trainer.apply_kl_penalty(data, control, s["kl_estimator"])
        config = OmegaConf.create({"use_pf_ppo": False})
        data = ray_trainer.compute_advantage(
            data, AdvantageEstimator.GAE, gamma=s["gamma"], lam=s["lam"], config=config
        )
        names = {"rewards": "token_level_rewards", "returns": "returns", "whitened": "advantages"}
        return {ours: data.batch[theirs] for ours, theirs in names.items()}

    return run


def trl_classic() -> Callable[[Case], Outputs]:
    from trl.trainer.ppo_trainer import PPOTrainer

    expect(PPOTrainer.compute_rewards, "self scores logprobs ref_logprobs masks")
    expect(PPOTrainer.compute_advantages, "self values rewards mask")
    expect(PPOTrainer._kl_penalty, "self logprob ref_logprob")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        config = SimpleNamespace(
            gamma=s["gamma"], lam=s["lam"], kl_penalty=s["kl_estimator"], whiten_rewards=s["whiten_rewards"]
        )
        trainer = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=s["kl_coef"]))
        trainer._kl_penalty = types.MethodType(PPOTrainer._kl_penalty, trainer)
        mask = x["mask"].long()
        rewards = PPOTrainer.compute_rewards(trainer, x["score"], x["logprobs"], x["ref_logprobs"], mask)[0]
        _, whitened, returns = PPOTrainer.compute_advantages(trainer, x["values"], rewards, mask)
        return {"rewards": rewards, "returns": returns, "whitened": whitened}

    return run


def trl_inline() -> Callable[[Case], Outputs]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl.experimental.ppo.ppo_trainer as module

    source = inspect.getsource(module.PPOTrainer.train)
    block = between(source, "response_idxs = torch.arange", "masked_fill(advantages, padding_mask, 0)")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        args = {name: s[name] for name in ("gamma", "lam", "kl_coef", "kl_estimator", "whiten_rewards")}
        names = {
            "args": SimpleNamespace(**args),
            "responses": torch.zeros_like(x["mask"], dtype=torch.long),
            "sequence_lengths": x["mask"].sum(1) - 1,
            "scores": x["score"],
            **{name: x[name] for name in ("values", "logprobs", "ref_logprobs")},
        }
        exec(block, {**vars(module), **names}, names)
        return {"rewards": names["rewards"], "returns": names["returns"], "whitened": names["advantages"]}

    return run


def openrlhf() -> Callable[[Case], Outputs]:
    sys.meta_path.append(Stubs(("flash_attn", "vllm")))
    from openrlhf.models.utils import compute_approx_kl, compute_reward
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    expect(compute_approx_kl, "log_probs log_probs_base log_probs_old kl_estimator unbiased_gradient")
    expect(compute_reward, "r kl_coef kl action_mask reward_clip_range")
    expect(RemoteExperienceMaker.compute_advantages_and_returns, "self experiences")
    expect(RemoteExperienceMaker.get_advantages_and_returns, "self values rewards action_mask gamma lambd")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        mask = x["mask"].to(getattr(torch, s["mask"]))
        kl = compute_approx_kl(x["logprobs"], x["ref_logprobs"], kl_estimator=s["kl_estimator"])
        clip = (-10.0, 10.0)
        rewards = compute_reward(x["score"], s["kl_coef"], kl, mask, clip)
        args = SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=1),
            reward=SimpleNamespace(
                clip_range=clip, overlong_buffer_len=None, stop_properly_penalty_coef=None
            ),
            algo=SimpleNamespace(
                advantage=SimpleNamespace(
                    estimator="gae", gamma=s["gamma"], lambd=s["lam"], no_std_norm=False
                )
            ),
        )
        maker = SimpleNamespace(
            strategy=SimpleNamespace(args=args),
            advantage_estimator="gae",
            kl_ctl=SimpleNamespace(value=s["kl_coef"]),
        )
        gae = RemoteExperienceMaker.get_advantages_and_returns
        maker.get_advantages_and_returns = types.MethodType(gae, maker)
        parts = [slice(0, 2), slice(2, None)]  # two unequal micro-batches
        experiences = [
            SimpleNamespace(
                index=list(range(len(mask)))[part],
                rewards=x["score"][part],
                kl=kl[part],
                action_mask=mask[part],
                values=x["values"][part],
                info={},
            )
            for part in parts
        ]
        advantages, _ = gae(maker, x["values"], rewards, mask, s["gamma"], s["lam"])
        RemoteExperienceMaker.compute_advantages_and_returns(maker, experiences)
        return {
            "rewards": rewards,
            "advantages": advantages,
            "returns": torch.cat([e.returns for e in experiences]),
            "whitened": torch.cat([e.advantages for e in experiences]),
        }

    return run


def torchrl() -> Callable[[Case], Outputs]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    expect(
        inspect.unwrap(vec_generalized_advantage_estimate),
        "gamma lmbda state_value next_state_value reward done terminated time_dim",
    )

    def run(case: Case) -> Outputs:
        s = case.settings
        rewards, values = (case.inputs[name][..., None] for name in ("rewards", "values"))
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        advantages, returns = vec_generalized_advantage_estimate(
            s["gamma"], s["lam"], values, after, rewards, done, done
        )
        return {"advantages": advantages[..., 0], "returns": returns[..., 0]}

    return run


# Checkouts --------------------------------------------------------------------------------------------


def slime_functions(checkout: Path) -> SimpleNamespace:
    """Those that make its advantages, without Megatron and Ray."""
    torch.compiler.set_stance("force_eager")  # its KL estimate is compiled
    reduced = SimpleNamespace(all_reduce=lambda *args, **kwargs: None, ProcessGroup=None)
    megatron = SimpleNamespace(
        is_pipeline_last_stage=lambda: True,
        get_context_parallel_rank=lambda: 0,
        get_context_parallel_world_size=lambda: 1,
        get_data_parallel_group=lambda **kwargs: None,
    )
    sys.modules["megatron"] = types.ModuleType("megatron")
    sys.modules["megatron.core"] = types.ModuleType("megatron.core")
    sys.modules["megatron.core"].mpu = megatron
    files = {
        "slime/utils/ppo_utils.py": [
            "compute_approx_kl",
            "chunked_discounted_returns",
            "chunked_gae",
            "vanilla_gae",
            "get_advantages_and_returns_batch",
            "get_grpo_returns",
            "get_reinforce_plus_plus_returns",
            "get_reinforce_plus_plus_baseline_advantages",
        ],
        "slime/utils/distributed_utils.py": ["distributed_masked_whiten"],
        "slime/backends/megatron_utils/loss.py": ["compute_advantages_and_returns"],
        "slime/ray/rollout.py": ["RolloutManager"],
    }
    namespace = {"torch": torch, "F": torch.nn.functional, "dist": reduced, "mpu": megatron}
    found = cut(checkout, files, namespace | {"ray": SimpleNamespace(remote=lambda cls: cls)})
    expect(found.compute_advantages_and_returns, "args rollout_data")
    expect(found.compute_approx_kl, "log_probs log_probs_base kl_loss_type importance_ratio")
    return found


def slime(checkout: Path) -> Callable[[Case], Outputs]:
    found = slime_functions(checkout)

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        lengths = x["attended"].sum(1).tolist()

        def rows(name: str) -> list[Tensor]:
            return [row[:length] for row, length in zip(x[name], lengths, strict=True)]

        def computed(normalize: bool) -> dict[str, Any]:
            data = {
                "log_probs": rows("logprobs"),
                "ref_log_probs": rows("ref_logprobs"),
                "rewards": x["score"].tolist(),
                "values": rows("values"),
                "response_lengths": lengths,
                "loss_masks": [row.float() for row in rows("mask")],
                "total_lengths": [length + 3 for length in lengths],
            }
            args = SimpleNamespace(
                use_rollout_logprobs=False,
                kl_coef=s["kl_coef"],
                kl_loss_type=s["kl_estimator"],
                custom_advantage_function_path=None,
                advantage_estimator="ppo",
                gamma=s["gamma"],
                lambd=s["lam"],
                use_opd=False,
                normalize_advantages=normalize,
            )
            found.compute_advantages_and_returns(args, data)
            return data

        def padded(rows: list[Tensor]) -> Tensor:
            out = torch.zeros_like(x["values"])
            for b, row in enumerate(rows):
                out[b, : len(row)] = row
            return out

        plain, normalized = computed(False), computed(True)
        return {
            "advantages": padded(plain["advantages"]),
            "returns": padded(plain["returns"]),
            "whitened": padded(normalized["advantages"]),
        }

    return run


def nemo_rl(checkout: Path) -> Callable[[Case], Outputs]:
    files = {
        "nemo_rl/algorithms/utils.py": ["calculate_kl", "masked_mean", "masked_var"],
        "nemo_rl/algorithms/advantage_estimator.py": ["GeneralizedAdvantageEstimator"],
    }
    found = cut(checkout, files, {"torch": torch})
    estimator = found.GeneralizedAdvantageEstimator
    expect(
        estimator.compute_advantage, "self prompt_ids rewards mask values reference_logprobs logprobs kwargs"
    )

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        config = {
            "gae_lambda": s["lam"],
            "gae_gamma": s["gamma"],
            "normalize_advantages": True,
            "gae_lambda_value": s["lam_value"],
            "gae_lambda_policy": None,
            "length_adaptive_alpha": s["alpha"],
        }
        loss = SimpleNamespace(
            use_kl_in_reward=True,
            reference_policy_kl_penalty=s["kl_coef"],
            reference_policy_kl_type=s["kl_estimator"],
        )
        gae, mask = estimator(config, loss), x["mask"].float()
        logprobs = {"logprobs": x["logprobs"], "reference_logprobs": x["ref_logprobs"]}
        rewards = gae._build_token_level_rewards(x["score"], mask, **logprobs)
        whitened, returns = gae.compute_advantage(None, x["score"], mask, x["values"], **logprobs)
        return {"rewards": rewards, "returns": returns, "whitened": whitened}

    return run


def areal(checkout: Path) -> Callable[[Case], Outputs]:
    import numpy as np

    off = SimpleNamespace(is_initialized=lambda: False, ReduceOp=None)
    files = {
        "areal/utils/data.py": ["KLEstimator", "Normalization"],
        "areal/trainer/ppo/actor.py": ["PPOActor"],
    }
    ignored = SimpleNamespace(scope_func_wrapper=lambda name: lambda function: function)
    namespace = {
        "torch": torch,
        "np": np,
        "dist": off,
        "functools": functools,
        "stats_tracker": ignored,
        "trace_perf": lambda *args, **kwargs: lambda function: function,
    }
    found = cut(checkout, files, namespace)
    expect(found.PPOActor._compute_advantages, "self data")

    def run(case: Case) -> Outputs:
        x, s = case.inputs, case.settings
        norm = SimpleNamespace(
            mean_level="batch",
            mean_leave1out=False,
            std_level="batch",
            std_unbiased=True,
            group_size=1,
            eps=1e-5,
        )
        actor = SimpleNamespace(
            config=SimpleNamespace(
                overlong_reward_penalty=False, use_decoupled_loss=False, recompute_logprob=False
            ),
            reward_bias=0.0,
            reward_scaling=1.0,
            reward_clip=20.0,
            reward_norm=None,
            mask_no_eos_with_zero=False,
            kl_ctl=s["kl_coef"],
            kl_estimator=found.KLEstimator(s["kl_estimator"]),
            discount=s["gamma"],
            gae_lambda=s["lam"],
            adv_norm=found.Normalization(norm),
        )
        data = {
            "input_ids": torch.zeros_like(x["mask"], dtype=torch.long),
            "attention_mask": x["attended"].long(),
            "loss_mask": x["mask"].long(),
            "rewards": x["score"],
            "logprobs": x["logprobs"],
            "ref_logp": x["ref_logprobs"].clone(),
            "values": x["values"],
        }
        out = found.PPOActor._compute_advantages(actor, data)
        return {"rewards": out["tot_rewards"], "returns": out["returns"], "whitened": out["advantages"]}

    return run


def of_groups(name: str) -> Callable[..., Callable[[Case], Outputs]]:
    def prepare(*checkout: Path) -> Callable[[Case], Outputs]:
        from parity import group_drivers

        run: Callable[[Case], Outputs] = getattr(group_drivers, name)(*checkout)
        return run

    return prepare


PACKAGES = {
    "verl": (verl, "verl"),
    **{f"{name}-groups": (of_groups(name), name) for name in ("verl", "openrlhf", "trl")},
    "trl-0.9.6": (trl_classic, "trl"),
    "trl-1.12.0": (trl_inline, "trl"),
    "openrlhf": (openrlhf, "openrlhf"),
    "torchrl": (torchrl, "torchrl"),
}
"""What runs a framework, and the package its version is read from."""
CHECKOUTS = {"slime": slime, "slime-groups": of_groups("slime"), "nemo_rl": nemo_rl, "areal": areal}


def main() -> None:
    framework, cases, outputs, *checkout = sys.argv[1:]
    if framework in PACKAGES:
        prepare, package = PACKAGES[framework]
        run, ran = prepare(), f"{package} {version(package)}"
    else:
        run, ran = CHECKOUTS[framework](Path(checkout[0])), framework.removesuffix("-groups")
    drawn = torch.load(cases, weights_only=True)
    torch.save({"ran": ran, "outputs": [run(Case(**case)) for case in drawn]}, outputs)


if __name__ == "__main__":
    main()
