"""OpenRLHF with credit: its reward workers send a row of attention along with each score.

In the place of ``python -m openrlhf.cli.train_ppo_ray``, with the same arguments:

    python -m attnshape.integrations.openrlhf --abc.dense_share 0.8 --reward.model_name_or_path ...

In a script of your own, before any of OpenRLHF's Ray actors is made:

    from attnshape.integrations.openrlhf import install
    install(dense_share=0.8)

Every estimator of OpenRLHF's gets token rewards; ``gae``'s recurrence is ``attnshape.gae``, on the CPU, where
OpenRLHF computes it. Its length penalties, baselines, reward clipping, KL penalty and normalisation stay its
own, and without ``install`` nothing is touched. Sequences may be packed (``--ds.packing_samples``). Each
sample's ``info``, which OpenRLHF logs, gains ``credit_entropy``, ``credit_last_share``, ``credit_fallback``
and ``response_attention``.

Refused before training starts: another version of OpenRLHF; rewards from ``--reward.remote_url`` or an agent,
which come without attention; ``--ds.ring_attn_size`` and ``--ds.tensor_parallel_size`` above 1, which shard
keys and heads.

Ran with OpenRLHF 0.11.2 (ray 2.60, transformers 5.24), on the CPU: its reward actor, its trainer and its
experience maker. Not run: a GPU, DeepSpeed's engine, flash attention, vLLM, the asynchronous trainer.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnshape
from attnshape.config import ShapingConfig
from attnshape.integrations.framework import require_parameters, require_version
from attnshape.ops import DEFAULT_CONFIG, attention_row, gae, shape_rewards
from attnshape.types import Status

VERSIONS = ("0.11.2",)
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_TRAINER = "openrlhf.trainer.ppo_trainer"
_PARAMETERS = {
    "make_experience": ("self", "samples_list"),
    "compute_advantages_and_returns": ("self", "experiences"),
    "get_advantages_and_returns": ("self", "values", "rewards", "action_mask", "gamma", "lambd"),
}


def install(dense_share: float = DEFAULT_CONFIG.dense_share, layer: int = -1) -> None:
    """Gives OpenRLHF's actor classes credit, in the process that makes the actors; prints what it changed.

    Args:
        dense_share: share of each score that its credit spreads; the rest stays on the last action.
        layer: the attention layer of the reward model that is read, negative from the last.

    Raises:
        RuntimeError: OpenRLHF is not there, of another version, has methods with other parameters than that
            version, or has made its actors already.
    """
    found = require_version("openrlhf", VERSIONS)
    launcher = importlib.import_module("openrlhf.trainer.ray.launcher")
    maker = importlib.import_module(_MAKER)
    trainers = {
        name: getattr(importlib.import_module(module), name)
        for name, module in {"PPOTrainer": _TRAINER, "TrainingActor": f"{_TRAINER}_async"}.items()
    }
    actors = {"RewardModelActor": launcher.RewardModelActor, **trainers}
    for name, parameters in _PARAMETERS.items():
        require_parameters(getattr(maker.RemoteExperienceMaker, name), *parameters)
    require_parameters(maker.compute_reward, "r", "kl_coef", "kl", "action_mask", "reward_clip_range")
    reward_actor = _sent("RewardModelActor", actors["RewardModelActor"])
    require_parameters(reward_actor.init_model_from_pretrained, "self", "strategy", "pretrain")
    require_parameters(
        reward_actor.forward, "self", "sequences", "attention_mask", "packed_seq_lens", "pad_sequence"
    )
    trainer_actors = [_sent(name, actor) for name, actor in trainers.items()]

    reward_actor.init_model_from_pretrained = _with_tap(reward_actor.init_model_from_pretrained, layer)
    reward_actor.forward = _with_row(reward_actor.forward)
    for cls in trainer_actors:
        cls.__init__ = _with_shaped_rewards(cls.__init__, dense_share)
    print(
        f"attnshape {attnshape.__version__}: OpenRLHF {found}'s {', '.join(actors)} spread {dense_share:g} "
        f"of each score by the attention of the reward model's layer {layer}",
        flush=True,
    )


def _sent(name: str, actor: Any) -> Any:
    """The class that Ray sends to its workers; what is set on it now goes with it."""
    metadata = getattr(actor, "__ray_metadata__", None)
    if metadata is None:
        raise RuntimeError(f"{name} is no actor class of Ray's: another version of the framework?")
    if metadata.last_export_cluster_and_job is not None:
        raise RuntimeError(f"{name}: Ray has sent this class to its workers, want install() before that")
    return metadata.modified_class


# The reward model's workers.


def _with_tap(init: Callable[..., Any], layer: int) -> Callable[..., Any]:
    @functools.wraps(init)
    def init_model_from_pretrained(self: Any, strategy: Any, *args: Any, **options: Any) -> None:
        from transformers import PreTrainedModel

        from attnshape.tap import AttentionTap

        check_arguments(strategy.args)
        init(self, strategy, *args, **options)
        reward_model = next(m for m in self.model.modules() if isinstance(m, PreTrainedModel))
        # It packs its input before its base model sees it, and scores the last attended token.
        self.attention_tap = AttentionTap(reward_model.base_model, layer, query_position="last_visible")

    return init_model_from_pretrained


def _with_row(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def forward_with_row(self: Any, sequences: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """``[B, 1 + S]`` float32: the score, and the attention over the sequence's tokens."""
        with self.attention_tap as tap:
            score = forward(self, sequences, attention_mask, **options)
        row = attention_row(tap.take()).cpu()
        if row.shape != sequences.shape:  # packed
            row = row.new_zeros(sequences.shape).masked_scatter_(attention_mask.cpu() != 0, row)
        return torch.cat([score.float()[:, None], row], dim=1)

    return forward_with_row


# The trainer's process.


def _with_shaped_rewards(init: Callable[..., None], dense_share: float) -> Callable[..., None]:
    @functools.wraps(init)
    def init_with_maker(self: Any, pretrain: str, strategy: Any, *groups: Any, **options: Any) -> None:
        check_arguments(strategy.args)
        trainer: Any = importlib.import_module(_TRAINER)
        trainer.RemoteExperienceMaker = shaped_maker(importlib.import_module(_MAKER), dense_share)
        init(self, pretrain, strategy, *groups, **options)

    return init_with_maker


def check_arguments(args: Any) -> None:
    """Raises ValueError where OpenRLHF's arguments leave no attention row to take."""
    if args.reward.remote_url or args.train.agent_func_path:
        raise ValueError(
            "reward.remote_url, train.agent_func_path: rewards from elsewhere come without attention, want "
            "reward.model_name_or_path"
        )
    if args.ds.ring_attn_size > 1:
        raise ValueError(
            f"ds.ring_attn_size: got {args.ds.ring_attn_size}, which shards the keys over ranks, want 1"
        )
    if args.ds.tensor_parallel_size > 1:
        raise ValueError(
            f"ds.tensor_parallel_size: got {args.ds.tensor_parallel_size}, which shards the heads, want 1"
        )


def shaped_maker(module: Any, dense_share: float) -> type[Any]:
    """``module.RemoteExperienceMaker``, with token rewards made of scores and attention rows."""
    base: Any = module.RemoteExperienceMaker

    class ShapedExperienceMaker(base):  # type: ignore[misc]
        def make_experience(self, samples_list: list[Any]) -> list[Any]:
            if samples_list[0].rewards is not None:
                raise ValueError("rewards: the samples bring their own, which come without attention")
            samples_list = super().make_experience(samples_list)
            for samples in samples_list:
                scored = samples.rewards
                samples.rewards = scored[:, 0].clone()
                samples.info["reward"] = samples.rewards.clone()
                # Action j is token j + 1; OpenRLHF cuts values and log-probabilities from the end too.
                samples.attention_row = scored[:, -samples.action_mask.shape[1] :]
            return samples_list

        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            """OpenRLHF's, where a reward is spread over its experience's actions."""
            by_mask = {id(experience.action_mask): experience for experience in experiences}
            theirs = module.compute_reward

            def compute_reward(
                r: Tensor,
                kl_coef: float,
                kl: Tensor,
                action_mask: Tensor,
                reward_clip_range: tuple[float, float] | None = None,
            ) -> Tensor:
                experience = by_mask[id(action_mask)]
                row = experience.__dict__.pop("attention_row")
                clip = None if reward_clip_range is None else (reward_clip_range[0], reward_clip_range[1])
                config = ShapingConfig(dense_share=dense_share, score_clip=clip)
                shaped = shape_rewards(r, row, action_mask, config=config)
                experience.info |= {
                    "credit_entropy": shaped.row_stats.entropy,
                    "credit_last_share": shaped.row_stats.last_share,
                    "credit_fallback": (shaped.status & int(Status.FALLBACK) != 0).float(),
                    "response_attention": torch.where(action_mask != 0, row, 0).sum(1),
                }
                penalty: Tensor = theirs(torch.zeros_like(r), kl_coef, kl, action_mask)
                return penalty + shaped.rewards

            module.compute_reward = compute_reward
            try:
                return super().compute_advantages_and_returns(experiences)  # type: ignore[no-any-return]
            finally:
                module.compute_reward = theirs

        def get_advantages_and_returns(
            self, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
        ) -> tuple[Tensor, Tensor]:
            config = ShapingConfig(gamma=gamma, lam=lambd, mask_semantics="zero")
            return gae(rewards, values, action_mask, config)[:2]

    return ShapedExperienceMaker


def main() -> None:
    """OpenRLHF's own command line, and ``--abc.dense_share`` and ``--abc.layer``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--abc.dense_share", dest="dense_share", type=float, default=DEFAULT_CONFIG.dense_share
    )
    parser.add_argument("--abc.layer", dest="layer", type=int, default=-1)
    options, theirs = parser.parse_known_args()
    install(options.dense_share, options.layer)
    sys.argv[1:] = theirs
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
