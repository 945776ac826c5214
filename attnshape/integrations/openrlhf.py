"""OpenRLHF with credit: its reward workers send a row of attention along with each score.

In the place of ``python -m openrlhf.cli.train_ppo_ray``, with the same arguments:

    python -m attnshape.integrations.openrlhf --abc.dense_share 0.8 --reward.model_name_or_path ...

In a script of your own, before any of OpenRLHF's Ray actors is made:

    from attnshape.integrations.openrlhf import install
    install(dense_share=0.8)

``gae`` and ``reinforce`` get token rewards; ``gae``'s recurrence is ``attnshape.gae``, on the CPU, where
OpenRLHF computes it. Where completions are compared (``group_norm``, ``rloo``, ``reinforce_baseline``,
``dr_grpo``, ``flash_reinforce``) OpenRLHF's advantage of each is spread by its credit, and its mean over the
actions stays; ``--abc.enters rewards`` gives them token rewards too, see ``install``. Length penalties,
baselines, reward clipping, KL penalty and normalisation stay OpenRLHF's; what a penalty adds has no credit
and stays where OpenRLHF has it. Without ``install`` nothing is touched. Sequences may be packed
(``--ds.packing_samples``). Each sample's ``info``, which OpenRLHF logs, gains ``credit_entropy``,
``credit_last_share``, ``credit_fallback`` and ``response_attention``.

Refused before training starts: another version of OpenRLHF; rewards from ``--reward.remote_url`` or an agent,
which come without attention; ``--ds.ring_attn_size`` and ``--ds.tensor_parallel_size`` above 1, which shard
keys and heads; ``--actor.policy_loss_type gspo`` without a critic, whose loss has one ratio per completion.

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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

import attnshape
from attnshape.config import GroupConfig, ShapingConfig, check_choice
from attnshape.integrations.framework import require_parameters, require_version
from attnshape.integrations.groups import added
from attnshape.ops import DEFAULT_CONFIG, attention_rollout, attention_row, gae, shape_rewards
from attnshape.text.load import Layers, SourceName, parse_layers
from attnshape.types import Response, Status
from attnshape.vectorized.groups import completion_advantages

if TYPE_CHECKING:
    from attnshape.text.source import CreditSource

VERSIONS = ("0.11.2",)
SOURCES = ("attention", "rollout")
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_TRAINER = "openrlhf.trainer.ppo_trainer"
ESTIMATORS = {
    "gae": GroupConfig(baseline="none", scale="none"),
    "reinforce": GroupConfig(baseline="none", scale="none"),
    "rloo": GroupConfig.rloo(),
    "reinforce_baseline": GroupConfig.reinforce_plus_plus(baseline=True),
    "group_norm": GroupConfig.grpo(framework="openrlhf"),
    "dr_grpo": GroupConfig.dr_grpo(),
    "flash_reinforce": GroupConfig(baseline="batch", scale="none"),
}
"""What OpenRLHF makes of a completion's rewards before they go to its actions."""
Enters: TypeAlias = Literal["advantages", "rewards"]
_PARAMETERS = {
    "make_experience": ("self", "samples_list"),
    "compute_advantages_and_returns": ("self", "experiences"),
    "get_advantages_and_returns": ("self", "values", "rewards", "action_mask", "gamma", "lambd"),
    "get_cumulative_returns": ("self", "rewards", "action_mask", "gamma"),
}


def install(
    dense_share: float = DEFAULT_CONFIG.dense_share,
    layer: Layers | None = None,
    enters: Enters = "advantages",
    source: SourceName = "attention",
) -> None:
    """Gives OpenRLHF's actor classes credit, in the process that makes the actors; prints what it changed.

    Args:
        dense_share: share of each score, or of its part of the advantage, that its credit spreads.
        layer: the attention layer of the reward model that is read, negative from the last; see
            ``CreditSource``.
        enters: where credit enters if completions are compared (``rloo``, ``reinforce_baseline``,
            ``group_norm``, ``dr_grpo``, ``flash_reinforce``). ``"advantages"``: as in ``group_advantages``,
            actions with much credit get much, and the mean over a completion's actions stays OpenRLHF's.
            ``"rewards"``: as token rewards, of which each action gets its own and all later ones; the first
            keeps the whole advantage, later ones what has not been paid yet, and the mean shrinks. ``gae``
            and ``reinforce`` take token rewards either way.
        source: ``"attention"`` or ``"rollout"``: what a worker can read that scores without gradients, is not
            told which tokens are the response's, and sends numbers without signs.

    Raises:
        ValueError: ``enters`` or ``source`` is none of these, or ``layer`` is not the source's.
        RuntimeError: OpenRLHF is not there, of another version, has methods with other parameters than that
            version, or has made its actors already.
    """
    from attnshape.text.source import CreditSource

    check_choice("enters", enters, get_args(Enters))
    check_choice("source", source, SOURCES)
    credit_source = CreditSource(source, layer)
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

    reward_actor.init_model_from_pretrained = _with_tap(
        reward_actor.init_model_from_pretrained, credit_source
    )
    reward_actor.forward = _with_row(reward_actor.forward)
    for cls in trainer_actors:
        cls.__init__ = _with_shaped_rewards(cls.__init__, dense_share, enters)
    print(
        f"attnshape {attnshape.__version__}: OpenRLHF {found}'s {', '.join(actors)} spread {dense_share:g} "
        f"of each score by the reward model's {credit_source}",
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


def _with_tap(init: Callable[..., Any], source: CreditSource) -> Callable[..., Any]:
    @functools.wraps(init)
    def init_model_from_pretrained(self: Any, strategy: Any, *args: Any, **options: Any) -> None:
        from transformers import PreTrainedModel

        check_arguments(strategy.args)
        init(self, strategy, *args, **options)
        reward_model = next(m for m in self.model.modules() if isinstance(m, PreTrainedModel))
        # It packs its input before its base model sees it, and scores the last attended token.
        self.credit_tap = source.tap(reward_model.base_model, "last_visible")

    return init_model_from_pretrained


def _with_row(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def forward_with_row(self: Any, sequences: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """``[B, 1 + S]`` float32: the score, and the weights of the sequence's tokens."""
        with self.credit_tap as tap:
            score = forward(self, sequences, attention_mask, **options)
        row = _row(tap.take(), attention_mask).cpu()
        if row.shape != sequences.shape:  # packed
            row = row.new_zeros(sequences.shape).masked_scatter_(attention_mask.cpu() != 0, row)
        return torch.cat([score.float()[:, None], row], dim=1)

    return forward_with_row


def _row(taken: Any, attention_mask: Tensor) -> Tensor:
    """Weights over the keys, ``[B, S]``, or packed ``[N]``: of attention, or of a rollout's layers."""
    layers = taken if isinstance(taken, tuple) else (taken,)
    if layers[0].value_norm is None:
        return attention_row(taken)
    bounds = layers[0].cu_seqlens
    if bounds is None:
        everywhere = Response(attention_mask, start=torch.zeros_like(attention_mask[:, 0]))
    else:
        counts = (bounds[1:] - bounds[:-1]).long()
        places = torch.arange(int(bounds[-1]), device=bounds.device)
        index = places - bounds[:-1].long().repeat_interleave(counts)
        everywhere = Response(torch.ones_like(index), index=index, cu_seqlens=bounds)
    return attention_rollout(taken, everywhere, normalization="none")


# The trainer's process.


def _with_shaped_rewards(
    init: Callable[..., None], dense_share: float, enters: Enters
) -> Callable[..., None]:
    @functools.wraps(init)
    def init_with_maker(self: Any, pretrain: str, strategy: Any, *groups: Any, **options: Any) -> None:
        check_arguments(strategy.args)
        trainer: Any = importlib.import_module(_TRAINER)
        maker = importlib.import_module(_MAKER)
        trainer.RemoteExperienceMaker = shaped_maker(maker, dense_share, enters)
        init(self, pretrain, strategy, *groups, **options)

    return init_with_maker


def check_arguments(args: Any) -> None:
    """Raises ValueError where OpenRLHF's arguments leave no attention row to take, or no use for it."""
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
    if args.actor.policy_loss_type == "gspo" and args.algo.advantage.estimator != "gae":
        raise ValueError(
            "actor.policy_loss_type: got gspo, whose loss has one ratio per completion, so that an advantage "
            "per token means nothing there; want ppo"
        )


def shaped_maker(module: Any, dense_share: float, enters: Enters = "advantages") -> type[Any]:
    """``module.RemoteExperienceMaker``, with credit out of scores and attention rows."""
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
            """OpenRLHF's, where credit spreads a reward, or an advantage, over its experience's actions."""
            config = ESTIMATORS[self.strategy.args.algo.advantage.estimator]
            spread = enters == "advantages" and config.baseline != "none"
            scores = [experience.rewards.clone() for experience in experiences]  # before length penalties
            by_mask = {id(e.action_mask): i for i, e in enumerate(experiences)}
            of_penalties: list[Tensor] = []
            theirs = module.compute_reward
            self._added: dict[int, Tensor] = {}

            def compute_reward(
                r: Tensor,
                kl_coef: float,
                kl: Tensor,
                action_mask: Tensor,
                reward_clip_range: tuple[float, float] | None = None,
            ) -> Tensor:
                i = by_mask[id(action_mask)]
                experience = experiences[i]
                row = experience.__dict__.pop("attention_row")
                if reward_clip_range:
                    r = r.clamp(reward_clip_range[0], reward_clip_range[1])
                if not of_penalties:  # they are in the rewards by now
                    of_penalties.extend(self._of_penalties(config, experiences, scores))
                of_penalty = of_penalties[i].to(r.dtype)
                part, shaping = r - of_penalty, ShapingConfig(dense_share=dense_share)
                shaped = shape_rewards(part, row, action_mask, terminal_reward=of_penalty, config=shaping)
                experience.info |= {
                    "credit_entropy": shaped.row_stats.entropy,
                    "credit_last_share": shaped.row_stats.last_share,
                    "credit_fallback": (shaped.status & int(Status.FALLBACK) != 0).float(),
                    "response_attention": torch.where(action_mask != 0, row, 0).sum(1),
                }
                if spread:
                    if dense_share:
                        self._added[id(action_mask)] = added(part, row, action_mask, dense_share)
                    own: Tensor = theirs(r, kl_coef, kl, action_mask)
                    return own
                penalty: Tensor = theirs(torch.zeros_like(r), kl_coef, kl, action_mask)
                return penalty + shaped.rewards

            module.compute_reward = compute_reward
            try:
                return super().compute_advantages_and_returns(experiences)  # type: ignore[no-any-return]
            finally:
                module.compute_reward = theirs

        def _of_penalties(
            self, config: GroupConfig, experiences: list[Any], scores: list[Tensor]
        ) -> list[Tensor]:
            """What length penalties have in each experience's rewards, of which credit says nothing."""
            score, whole = torch.cat(scores).double(), torch.cat([e.rewards for e in experiences]).double()
            if torch.equal(score, whole):
                return [torch.zeros_like(x) for x in scores]
            place = torch.tensor([i for e in experiences for i in e.index])
            groups = place // self.strategy.args.rollout.n_samples_per_prompt
            both = torch.stack([score, whole - score], 1)
            parts = completion_advantages(both, groups, config, None)
            return list(torch.split(parts[:, 1], [len(x) for x in scores]))

        def get_cumulative_returns(self, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
            returns: Tensor = super().get_cumulative_returns(rewards, action_mask, gamma)
            change = self._added.pop(id(action_mask), None)
            return returns if change is None else returns + change

        def get_advantages_and_returns(
            self, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
        ) -> tuple[Tensor, Tensor]:
            config = ShapingConfig(gamma=gamma, lam=lambd, mask_semantics="zero")
            return gae(rewards, values, action_mask, config)[:2]

    return ShapedExperienceMaker


def main() -> None:
    """OpenRLHF's own command line, and ``--abc.dense_share``, ``.source``, ``.layer``, ``.enters``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--abc.dense_share", dest="dense_share", type=float, default=DEFAULT_CONFIG.dense_share
    )
    parser.add_argument("--abc.source", dest="source", choices=SOURCES, default="attention")
    parser.add_argument("--abc.layer", dest="layer", type=parse_layers)
    parser.add_argument("--abc.enters", dest="enters", choices=get_args(Enters), default="advantages")
    options, theirs = parser.parse_known_args()
    install(options.dense_share, options.layer, options.enters, options.source)
    sys.argv[1:] = theirs
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
