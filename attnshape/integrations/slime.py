"""slime: dense token rewards from a reward model's attention, through slime's three hooks.

Ran with slime 0.3.1 at commit 624b824 (torch 2.13; Megatron and SGLang stubbed). Other versions are refused
with the first sample that is scored, and so is a slime whose functions take other parameters.

    --advantage-estimator ppo        or grpo, cispo, reinforce_plus_plus, reinforce_plus_plus_baseline
    --rm-url http://127.0.0.1:8000
    --custom-rm-path attnshape.integrations.slime.custom_rm
    --custom-reward-post-process-path attnshape.integrations.slime.post_process_rewards
    --custom-advantage-function-path attnshape.integrations.slime.compute_advantages

In a file for ``--custom-config-path``, all optional:

    attnshape: {dense_share: 0.8, model: PATH, score_fn: logit, source: attention, device: cpu}

``model``, in place of ``--rm-url``, is a sequence classifier that the rollout process loads; ``dense_share:
0`` gives slime's own rewards and advantages.

Under ``ppo`` the score becomes token rewards. Without a critic slime's own advantage of a sample is spread by
its credit, and its mean over the tokens that count stays; slime's KL, discount and whitening stay its own.
"""

from __future__ import annotations

import asyncio
import functools
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnshape.config import GroupConfig, ShapingConfig
from attnshape.integrations.framework import require_parameters, require_version
from attnshape.integrations.groups import added
from attnshape.integrations.reward import RewardModel, Unscored, reward_model, token_rewards
from attnshape.ops import gae, group_advantages
from attnshape.text.turns import spans_of
from attnshape.types import Response

if TYPE_CHECKING:
    from slime.utils.types import Sample
    from transformers import PreTrainedTokenizerBase

TESTED = ("0.3.1",)
ESTIMATORS = ("ppo", "grpo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
MODULE = "attnshape.integrations.slime"
CREDIT = "attnshape_credit"
"""Key of ``Sample.metadata``, which stays in the rollout process."""
SIGNED = "attnshape_token_rewards"
"""Another: what a source with signs gives in its place."""
METRICS = "attnshape_metrics"
"""Another: where the reward model looked, and whether its chat template changed the response; or why it has
no score (``unscored``)."""


async def custom_rm(args: Namespace, sample: Any, **_: Any) -> Any:
    """``--custom-rm-path``: the reward model's score of a sample, or of each of a list (``--group-rm``).

    Credit per response token is kept in ``sample.metadata`` for ``post_process_rewards``. A sample that the
    reward model cannot score (too long, not finite) is taken out of the loss, as slime does it. A prompt of
    messages is read through the reward model's chat template, one of text (``--apply-chat-template``) as it
    stands.

    Raises:
        RuntimeError: another version of slime, or nothing answers at ``--rm-url``.
        ValueError: settings that do not go together.
    """
    check_args(args)
    judge, tokenizer = _judge(args), _tokenizer(args.hf_checkpoint)
    if isinstance(sample, list):
        return await asyncio.gather(*(_scored(judge, tokenizer, x) for x in sample))
    return await _scored(judge, tokenizer, sample)


async def _scored(judge: RewardModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> float:
    ids = sample.tokens[len(sample.tokens) - sample.response_length :]
    response, offsets = await asyncio.to_thread(spans_of, tokenizer, ids, _mask(sample))
    try:
        scored = await judge(sample.prompt, response, offsets)
    except Unscored as error:  # slime gives it a mask of zeros, so that nothing is learned from the number
        sample.remove_sample = True
        sample.metadata = {**(sample.metadata or {}), METRICS: {"unscored": str(error)}}
        return 0.0
    credit = {CREDIT: scored.credit} if scored.token_rewards is None else {SIGNED: scored.token_rewards}
    sample.metadata = {**(sample.metadata or {}), **credit, METRICS: scored.metrics}
    return scored.score


def post_process_rewards(args: Namespace, samples: Sequence[Sample]) -> tuple[list[float], list[Any]]:
    """``--custom-reward-post-process-path``: scores as they are, and token rewards, or spread ones.

    Returns:
        A float per sample; and a float32 tensor ``[response_length]`` per sample: token rewards, which sum to
        the score, or without a critic what slime makes of the score (normalised in its group), spread:
        that is their mean. Without any credit, or with ``dense_share: 0``, floats, as slime's own has them.
    """
    check_args(args)
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    own = raw if args.advantage_estimator == "ppo" else _slimes_rewards(args, samples)
    known = [sample.metadata or {} for sample in samples]
    credit = [(of.get(CREDIT), of.get(SIGNED)) for of in known]
    dense_share = _dense_share(args)
    if dense_share == 0 or all(c is None and s is None for c, s in credit):
        return raw, own
    rewards = []
    for sample, score, (weights, signed) in zip(samples, own, credit, strict=True):
        if args.advantage_estimator != "ppo":
            rewards.append(_spread(score, weights, signed, _mask(sample), dense_share))
        elif weights is None and signed is None:
            rewards.append(_on_last_token(score, torch.zeros(sample.response_length)))
        else:
            mask = _mask(sample)
            rewards.append(token_rewards(score, weights, mask, dense_share=dense_share, signed=signed))
    return raw, rewards


def _slimes_rewards(args: Namespace, samples: Sequence[Sample]) -> list[float]:
    """What slime does with scores without this hook: for ``grpo`` they are normalised in their groups.

    Samples that the reward model has no score for, which slime would count as 0, are left out of their group.
    """
    from slime.ray.rollout import RolloutManager

    theirs = RolloutManager.__ray_metadata__.modified_class._post_process_rewards
    require_parameters(theirs, "self", "samples")
    manager = SimpleNamespace(args=args, custom_reward_post_process_func=None)
    rewards: list[float] = theirs(manager, samples)[1]
    unscored = ["unscored" in (sample.metadata or {}).get(METRICS, {}) for sample in samples]
    compares = args.advantage_estimator != "reinforce_plus_plus" and args.rewards_normalization
    if not (any(unscored) and compares):
        return rewards
    scores = torch.tensor([float(sample.get_reward_value(args)) for sample in samples])
    whole = len(samples) == args.n_samples_per_prompt * args.rollout_batch_size
    scaled = args.advantage_estimator != "reinforce_plus_plus_baseline" and args.grpo_std_normalization
    config = GroupConfig(baseline="mean", scale="group" if scaled else "none", eps=1e-6)
    compared: list[float] = group_advantages(
        scores.masked_fill(torch.tensor(unscored), math.nan),
        None,
        torch.ones(len(samples), 1),
        group=args.n_samples_per_prompt if whole else len(samples),
        config=config,
    ).completion.tolist()
    return compared


def _spread(
    own: float,
    weights: Sequence[float] | None,
    signed: Sequence[float] | None,
    mask: Sequence[int],
    dense_share: float,
) -> Tensor:
    """``[R]``: ``own`` of all tokens, and what credit adds to it."""
    flat = torch.full((len(mask),), own, dtype=torch.float32)
    values = weights if signed is None else signed
    if values is None or not mask:
        return flat
    row = torch.tensor([values], dtype=torch.float32), torch.tensor([mask]) != 0
    return flat + added(flat[:1], *row, dense_share, signed=signed is not None)[0]


def compute_advantages(args: Namespace, rollout_data: dict[str, Any]) -> None:
    """``--custom-advantage-function-path``: GAE over token rewards, or spread advantages.

    Reads ``rewards`` (one per token, or floats), ``kl``, the lengths and, under ``ppo``, ``values``, and sets
    ``advantages`` and ``returns``, lists of float32 ``[response_length]``, for slime to whiten. As in slime,
    masked tokens are steps of GAE like others. Under context parallelism ``kl`` and ``values`` are gathered
    with slime's own functions, and the results are the rank's shards again.

    Raises:
        RuntimeError: another version of slime.
        ValueError: settings that do not go together, or a reward that is not as long as its response.
    """
    check_args(args)
    with torch.no_grad():
        compute = _gae if args.advantage_estimator == "ppo" else _without_critic
        rollout_data["advantages"], rollout_data["returns"] = compute(args, rollout_data)


def _gae(args: Namespace, data: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    gather, shard = _context_parallel()
    lengths = list(zip(data["total_lengths"], data["response_lengths"], strict=True))
    kl = [gather(x, *at) for x, at in zip(data["kl"], lengths, strict=True)]
    values = [gather(x, *at) for x, at in zip(data["values"], lengths, strict=True)]
    rewards = [
        _placed(reward, (-args.kl_coef * x).float()) for reward, x in zip(data["rewards"], kl, strict=True)
    ]
    sizes = [x.shape[0] for x in rewards]
    flat = torch.cat(rewards)
    ends = torch.tensor([0, *sizes], device=flat.device).cumsum(0, dtype=torch.int32)
    config = ShapingConfig.slime(gamma=args.gamma, lam=args.lambd)
    response = Response(torch.ones_like(flat, dtype=torch.bool), cu_seqlens=ends)
    advantages, returns, _ = gae(flat, torch.cat(values).float(), response, config)
    shards = [
        [shard(row, *at) for row, at in zip(torch.split(x, sizes), lengths, strict=True)]
        for x in (advantages, returns)
    ]
    return shards[0], shards[1]


def _without_critic(args: Namespace, data: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """slime's own estimator on one number per sample, and what credit adds to it."""
    from slime.backends.megatron_utils import loss

    require_parameters(loss.compute_advantages_and_returns, "args", "rollout_data")
    _, shard = _context_parallel()
    own: list[float] = []
    change: list[Tensor] = []
    for reward, mask in zip(data["rewards"], data["loss_masks"], strict=True):
        mean = _mean(reward, mask) if isinstance(reward, Tensor) else reward
        own.append(mean)
        row = reward.to(mask.device) - mean if isinstance(reward, Tensor) else torch.zeros_like(mask).float()
        change.append(row.masked_fill(mask == 0, 0.0))
    theirs = {**data, "rewards": own}
    plain = {"custom_advantage_function_path": None, "normalize_advantages": False, "use_opd": False}
    loss.compute_advantages_and_returns(Namespace(**{**vars(args), **plain}), theirs)
    lengths = zip(data["total_lengths"], data["response_lengths"], strict=True)
    shards = [shard(x, *at) for x, at in zip(change, lengths, strict=True)]
    advantages, returns = (
        [row + x.to(row) for row, x in zip(theirs[name], shards, strict=True)]
        for name in ("advantages", "returns")
    )
    return advantages, returns


def _mean(reward: Tensor, mask: Tensor) -> float:
    """Over the tokens that count, or all of them if none does."""
    if reward.shape != mask.shape:
        raise ValueError(f"rewards: got {tuple(reward.shape)} for a response of {len(mask)} tokens")
    counted = reward[mask.to(reward.device) != 0]
    return float((counted if len(counted) else reward).double().mean()) if len(reward) else 0.0


def check_args(args: Namespace) -> None:
    """Raises ValueError where the credit would not go all the way in slime; RuntimeError of its version."""
    _check_slime()
    if args.advantage_estimator not in ESTIMATORS:
        raise ValueError(
            f"--advantage-estimator: got {args.advantage_estimator}, want one of {', '.join(ESTIMATORS)} "
            "(the loss of gspo has one ratio per sample: an advantage per token means nothing there)"
        )
    wanted = {
        "custom_reward_post_process_path": f"{MODULE}.post_process_rewards",
        "custom_advantage_function_path": f"{MODULE}.compute_advantages",
        "custom_convert_samples_to_train_data_path": None,
        "reward_key": None,
        # With it slime takes the advantage function away from the critic.
        "megatron_config_path": None,
    }
    for name, value in wanted.items():
        if getattr(args, name, None) != value:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: got {getattr(args, name, None)}, want {value or 'none'}")

    if getattr(args, "use_opsm", False) and args.advantage_estimator != "ppo" and _dense_share(args):
        raise ValueError(
            "--use-opsm: drops what is off policy and has an advantage below zero, token by token; credit "
            "gives tokens of one sample different signs, and the good ones of a bad sample would stay; want "
            "it off, or attnshape: {dense_share: 0}"
        )


@functools.cache
def _check_slime() -> None:
    require_version("slime", TESTED)
    from slime.utils.types import Sample

    require_parameters(Sample.get_reward_value, "self", "args")


@functools.cache
def _context_parallel() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """slime's functions that gather a rank's shards of a response, and that take them out of it."""
    from slime.backends.megatron_utils import cp_utils

    require_parameters(cp_utils.all_gather_with_cp, "tensor", "total_length", "response_length")
    require_parameters(cp_utils.slice_log_prob_with_cp, "log_prob", "total_length", "response_length")
    return cp_utils.all_gather_with_cp, cp_utils.slice_log_prob_with_cp


def _dense_share(args: Namespace) -> float:
    return float(_settings(args).get("dense_share", ShapingConfig().dense_share))


def _settings(args: Namespace) -> dict[str, Any]:
    return dict(getattr(args, "attnshape", None) or {})


def _judge(args: Namespace) -> RewardModel:
    settings = _settings(args)
    settings.pop("dense_share", None)
    return reward_model(url=args.rm_url, **settings)


@functools.cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from slime.utils.processing_utils import load_tokenizer

    tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, trust_remote_code=True)
    return tokenizer


def _mask(sample: Sample) -> list[int]:
    return [1] * sample.response_length if sample.loss_mask is None else list(sample.loss_mask)


def _placed(reward: float | Tensor, token_rewards: Tensor) -> Tensor:
    """``token_rewards`` and the sample's reward: a number for its last token, or one per token."""
    if not isinstance(reward, Tensor):
        return _on_last_token(reward, token_rewards)
    if reward.shape != token_rewards.shape:
        raise ValueError(
            f"rewards: got {tuple(reward.shape)} for a response of {token_rewards.shape[0]} tokens"
        )
    return token_rewards + reward.to(token_rewards)


def _on_last_token(reward: float, token_rewards: Tensor) -> Tensor:
    token_rewards = token_rewards.clone()
    token_rewards[-1:] += reward
    return token_rewards
