"""OpenRLHF's own trainer and reward actors make experience of scripted rollouts.

    python openrlhf_loop.py FOLDER DENSE_SHARE|off

``test_openrlhf_adapter`` runs it. FOLDER holds ``policy``, ``reward``, ``prompts.jsonl``, ``rollouts.pt``;
``made-DENSE_SHARE.pt`` is left there. Real are ``PPOTrainer`` with its ``RemoteExperienceMaker``, and
``RewardModelActor``, each in its own Ray worker, and the reward model. Policy, reference and critic
answer from a script; DeepSpeed's engine is left out; flash attention and vLLM are ``openrlhf_stubs``, which
also say that the device is the CPU.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from torch import Tensor

ESTIMATORS = ("gae", "reinforce")
COMPARED = ("group_norm", "rloo", "reinforce_baseline", "dr_grpo", "flash_reinforce")
"""Estimators that compare completions: here all of them, as one group."""
KL = 0.1


class Strategy:
    """In the place of ``DeepspeedStrategy``: one process, float32."""

    ring_attn_group = None

    def __init__(self, args: SimpleNamespace) -> None:
        self.args = args

    def print(self, *args: object) -> None:
        pass

    def is_rank_0(self) -> bool:
        return False

    def setup_distributed(self) -> None:
        pass

    def get_ds_eval_config(self, offload: bool) -> None:
        return None

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.float()

    def setup_dataloader(self, dataset: Any, *args: object, **options: object) -> Any:
        return torch.utils.data.DataLoader(dataset, collate_fn=args[3])


@ray.remote
class Scripted:
    """Policy, reference or critic: numbers per action out of the token ids."""

    def __init__(self, world_size: int, rank: int, master_addr: None, master_port: None) -> None:
        self.kind = ""

    def set_kind(self, kind: str) -> None:
        self.kind = kind

    def execute_batch(self, method_name: str, data: dict[str, Any], start: int, end: int) -> list[Tensor]:
        return [numbers(self.kind, sequences) for sequences in data["sequences"][start:end]]


def numbers(kind: str, sequences: Tensor) -> Tensor:
    """``[B, S - 1]``: in (-1, 1) for the critic, log-probabilities else."""
    seed = {"policy": 1.0, "reference": 1.3, "critic": 2.1}[kind]
    x = torch.sin(seed * (sequences[:, 1:].float() + 1) * torch.arange(1, sequences.shape[1]))
    return x if kind == "critic" else 0.5 * x - 1


def arguments(folder: Path, packing: bool) -> SimpleNamespace:
    space = SimpleNamespace
    return space(
        actor=space(num_nodes=1, num_gpus_per_node=1, policy_loss_type="ppo"),
        algo=space(
            kl=space(init_coef=KL, target=None, horizon=1, use_loss=False, estimator="k1"),
            advantage=space(estimator="gae", gamma=1.0, lambd=0.95, no_std_norm=False),
        ),
        ckpt=space(save_steps=-1, best_metric_key="none"),
        data=space(
            disable_fast_tokenizer=False,
            prompt_dataset=str(folder / "prompts.jsonl"),
            prompt_probs=None,
            max_samples=2,
            prompt_split="train",
            input_template=None,
            input_key="input",
            label_key=None,
            apply_chat_template=False,
            image_key=None,
            max_images_per_prompt=0,
            dataloader_num_workers=0,
            max_len=128,
        ),
        ds=space(
            ring_attn_size=1,
            tensor_parallel_size=1,
            packing_samples=packing,
            attn_implementation="sdpa",
            experts_implementation=None,
            param_dtype="bf16",
            load_in_4bit=False,
            value_head_prefix="score",
        ),
        eval=space(steps=-1, dataset=None),
        logger=space(wandb=space(key=None), tensorboard_dir=None),
        reward=space(clip_range=(-4.2, 10.0), remote_url=None, normalize_enable=False, offload=False),
        rollout=space(micro_batch_size=3, n_samples_per_prompt=1, batch_size=2, max_new_tokens=None),
        train=space(
            agent_func_path=None,
            colocate_all=False,
            colocate_actor_ref=False,
            colocate_critic_reward=False,
            dynamic_batch_enable=False,
            seed=0,
            batch_size=2,
            num_episodes=1,
            max_epochs=1,
        ),
    )


def make(
    trainer: Any,
    rollouts: list[dict[str, Tensor]],
    estimator: str,
    settings: tuple[float, str] | None = None,
) -> dict[str, Any]:
    """Runs in the trainer's worker: experience, and the token rewards on their way to advantages.

    ``settings``: another dense_share, and where credit enters, than ``install`` was told.
    """
    from openrlhf.trainer.ppo_utils import experience_maker
    from openrlhf.trainer.ppo_utils.experience import Experience

    maker = trainer.experience_maker
    if settings is not None:
        from attnshape.integrations.openrlhf import shaped_maker

        maker.__class__ = shaped_maker(experience_maker, *settings)
    maker.advantage_estimator = maker.args.algo.advantage.estimator = estimator
    maker.args.rollout.n_samples_per_prompt = len(rollouts) if estimator in COMPARED else 1
    samples = []
    for rollout in rollouts:
        fields = {name: x[None] for name, x in rollout.items()}
        length = fields["attention_mask"].sum(1)
        one = torch.ones(1)
        samples.append(
            Experience(**fields, total_length=length, response_length=one, truncated=one * 0, info={})
        )
    name = "get_advantages_and_returns" if estimator == "gae" else "get_cumulative_returns"
    position = 1 if estimator == "gae" else 0
    method, token_rewards = getattr(type(maker), name), []

    def watched(*args: Any) -> Any:
        token_rewards.append(args[position].clone())
        return method(maker, *args)

    setattr(maker, name, watched)
    experiences = maker.make_experience_batch(samples)
    delattr(maker, name)
    return {
        "process": os.getpid(),
        "maker": type(maker).__name__,
        "token_rewards": token_rewards,
        "experiences": [
            {key: x for key, x in vars(e).items() if isinstance(x, Tensor) or key in ("info", "index")}
            for e in experiences
        ],
    }


def is_ours(function: Any) -> bool:
    """Whether a function, or one that it wraps (Ray wraps the methods of actors), is the adapter's."""
    while function is not None:
        if function.__code__.co_filename.endswith(os.path.join("integrations", "openrlhf.py")):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def asynchronous(sent: bytes) -> list[bool]:
    """Whether the ``__init__`` of the asynchronous trainer's classes is the adapter's, as Ray sends them."""
    outer = ray.cloudpickle.loads(sent).__init__
    training = inspect.unwrap(outer).__globals__["TrainingActor"].__ray_metadata__.modified_class
    return [is_ours(outer), is_ours(training.__init__)]


def main(folder: Path, dense_share: str) -> None:
    rollouts = torch.load(folder / "rollouts.pt")
    ray.init(num_cpus=8, num_gpus=8, include_dashboard=False, log_to_driver=False)
    if dense_share != "off":
        from attnshape.integrations.openrlhf import install

        install(float(dense_share))
    from openrlhf.trainer import ppo_trainer_async
    from openrlhf.trainer.ppo_trainer import PPOTrainer
    from openrlhf.trainer.ray.launcher import RayActorGroup, RewardModelActor

    kinds = {kind: RayActorGroup(1, 1, Scripted) for kind in ("policy", "critic", "reference")}
    for kind, group in kinds.items():
        ray.get(group.async_run_method("set_kind", kind))
    reward = RayActorGroup(1, 1, RewardModelActor)
    strategy = Strategy(arguments(folder, packing=False))
    trainer = PPOTrainer.remote(
        str(folder / "policy"), strategy, kinds["policy"], kinds["critic"], reward, kinds["reference"], None
    )
    assert ray.get(trainer.get_max_steps.remote()) == 1
    made = {}
    for packing in (False, True):
        strategy = Strategy(arguments(folder, packing))
        ray.get(reward.async_init_model_from_pretrained(strategy, str(folder / "reward")))
        for estimator in ESTIMATORS:
            made[packing, estimator] = ray.get(trainer.__ray_call__.remote(make, rollouts, estimator))
    strategy = Strategy(arguments(folder, packing=False))
    ray.get(reward.async_init_model_from_pretrained(strategy, str(folder / "reward")))
    shares = [None]
    if dense_share != "off":
        share = float(dense_share)
        shares += [(0.0, "advantages"), (share, "rewards"), (share, "advantages")]
    for estimator in COMPARED:
        for settings in shares:
            made[estimator, settings] = ray.get(
                trainer.__ray_call__.remote(make, rollouts, estimator, settings)
            )
    blob = ray.cloudpickle.dumps(ppo_trainer_async.PPOTrainerAsync.__ray_metadata__.modified_class)
    made["asynchronous"] = ray.get(trainer.__ray_call__.remote(lambda self, sent: asynchronous(sent), blob))
    made["driver"] = os.getpid()
    if dense_share != "off":
        made |= refusals(folder, reward, strategy)
    torch.save(made, folder / f"made-{dense_share}.pt")


def refusals(folder: Path, reward: Any, strategy: Strategy) -> dict[str, str]:
    """What is said of arguments that leave no attention row, and of a second ``install``."""
    from attnshape.integrations.openrlhf import install

    found = {}
    for group, name, value in (
        ("ds", "ring_attn_size", 2),
        ("ds", "tensor_parallel_size", 2),
        ("reward", "remote_url", ["http://127.0.0.1"]),
        ("train", "agent_func_path", "agent.py"),
    ):
        args = arguments(folder, packing=False)
        setattr(getattr(args, group), name, value)
        try:
            ray.get(reward.async_init_model_from_pretrained(Strategy(args), str(folder / "reward")))
        except ValueError as error:
            found[name] = str(error)
    try:
        install()
    except RuntimeError as error:
        found["late"] = str(error)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
