"""verl: dense token scores from a reward model's attention, and ``attnshape.gae`` in place of verl's loop.

Ran with verl 0.9.1 (torch 2.13, transformers 5.10, ray 2.60, TransferQueue 0.1.11). Others are refused
when training starts, and so is a verl whose functions take other parameters.

Reward side:

    reward.custom_reward_function.path=pkg://attnshape.integrations.verl
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000
    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://attnshape.integrations.verl
    reward.reward_manager.name=RewardManager
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=attnshape.integrations.verl.AgentLoopManager

``compute_score`` gets score and credit from the reward model, ``RewardManager`` makes token rewards of them,
and ``AgentLoopManager`` has these written to ``rm_scores``, where verl's own writes one number on the last
token.

With ``algorithm.adv_estimator=gae`` that is all. Without a critic it is one of
``verl_groups.ESTIMATORS``, such as ``attnshape_grpo``; verl's own that would lose the credit are refused.

verl's GAE loop is replaced where that is asked for in the trainer's process (see ``verl_plugin``):

    ATTNSHAPE_VERL_GAE=1
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

import attnshape
from attnshape.config import ShapingConfig
from attnshape.integrations import verl_groups
from attnshape.integrations.framework import require_parameters, require_version
from attnshape.integrations.reward import checked, reward_model, token_rewards
from attnshape.text.load import Layers, SourceName
from attnshape.text.turns import spans_of

if TYPE_CHECKING:
    from verl import DataProto

TESTED = ("0.9.1",)
MODULE = "attnshape.integrations.verl"

REQUEST = "attnshape"
"""Key of ``extra_info`` with what ``compute_score`` needs beyond verl's own arguments."""
MASK = "attnshape_response_mask"
"""Field that takes the response mask, which verl does not send, from an agent loop to its reward worker."""
REWARDS = ("credit", "token_rewards", "terminal_reward")
"""What a reward function may return that verl is not to log."""
TOKEN_REWARDS = "attnshape_token_rewards"
"""Extra field of an agent loop's output while it is scored but not yet padded."""
Reward: TypeAlias = float | list[float] | dict[str, Any]
"""Of a completion, from a reward worker to its agent loop."""


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any],
    *,
    url: str | None = None,
    model: str | None = None,
    score_fn: str = "logit",
    source: SourceName = "attention",
    layer: Layers | None = None,
    span: int = 1,
    query_position: str = "pooled",
    trust_remote_code: bool = False,
    device: str = "cpu",
    api_key: str | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, Any]:
    """The reward model's score of a completion, and its credit per token of the policy.

    A reward function for ``reward.custom_reward_function``; its keywords are set under ``reward_kwargs``.
    It works under ``RewardManager`` only. Call it from a function of your own to add to what it returns.

    Args:
        url: of ``attnshape serve``; or
        model: folder or hub name of a sequence classifier, loaded in every reward worker
            (``reward.num_workers``), one completion per forward.
        score_fn, source, layer, span, query_position, trust_remote_code, device: of ``model``: the score,
            such as ``"logit[1] - logit[0]"``; where credit is read from, see ``CreditSource``; whether Python
            files of the checkpoint are run; and where it runs. verl's reward workers see no GPU.
        api_key: of the server; by default ``ATTNSHAPE_API_KEY`` in the environment of the reward workers.
        reward_router_address, reward_model_tokenizer: of verl's own reward server, not used.

    Returns:
        ``score``, ``credit`` (floats per response token; or None, and ``token_rewards``, where the source has
        signs) and the credit's metrics, always the same keys.

    Raises:
        ValueError: the reward model has no score for this completion, and verl has no completion without one:
            its agent loop writes every reward into the batch.
    """
    if REQUEST not in extra_info:
        raise RuntimeError(f"reward.reward_manager: compute_score needs name=RewardManager of pkg://{MODULE}")
    judge = reward_model(
        url=url,
        api_key=api_key,
        model=model,
        score_fn=score_fn,
        source=source,
        layer=layer,
        span=span,
        query_position=query_position,
        trust_remote_code=trust_remote_code,
        device=device,
    )
    scored = await judge(**extra_info[REQUEST])
    return {"score": scored.score, **scored.values, **scored.metrics}


def reward_of(result: dict[str, Any], mask: Sequence[bool], dense_share: float, groups: bool) -> Reward:
    """What verl's agent loop is to have as the reward score.

    Args:
        result: of a reward function: ``score``; ``credit``, floats per response token, or signed
            ``token_rewards``; ``terminal_reward``, a second reward, which stays on the last unmasked token.
        mask: of the response's tokens.
        dense_share: share of the score that is redistributed.
        groups: for an estimator of ``verl_groups``.

    Returns:
        One float per token; for groups the float for verl to place, the score and its credit; without credit
        or with ``dense_share = 0`` the float alone.

    Raises:
        ValueError: ``credit`` and ``mask`` are not as many, or a weight is not finite, or negative.
    """
    score, terminal = float(result["score"]), float(result.get("terminal_reward", 0.0))
    credit, signed = result.get("credit"), result.get("token_rewards")
    values = credit if signed is None else signed
    if values is None or dense_share == 0:
        return score + terminal
    if groups:
        spread = {"credit": checked(values, len(mask), signed is not None), "signed": signed is not None}
        return {"reward": score + terminal, "score": score, **spread}
    rewards: list[float] = token_rewards(
        score, credit, mask, dense_share=dense_share, signed=signed, terminal_reward=terminal
    ).tolist()
    return rewards


@functools.cache
def _reward_manager() -> type:
    require_version("verl", TESTED)
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

    require_parameters(RewardManagerBase.__init__, "self", "config", "tokenizer", "compute_score")
    require_parameters(RewardManagerBase.run_single, "self", "data")
    require_parameters(RewardManagerBase.assemble_rm_scores, "data", "scores")

    class RewardManager(RewardManagerBase):  # type: ignore[misc]
        """Token rewards out of a reward function's score and credit.

        Any reward function of verl's signature can be used; one that returns no ``credit`` rewards as under
        verl's ``naive`` manager. ``+reward.reward_kwargs.dense_share`` is the share of the score that is
        redistributed, 0.8 if not given.
        """

        def __init__(
            self,
            config: Any,
            tokenizer: Any,
            compute_score: Any,
            reward_router_address: str | None = None,
            reward_model_tokenizer: Any = None,
        ) -> None:
            super().__init__(config, tokenizer, compute_score)
            check_config(config)
            self.dense_share = dense_share_of(config)
            self.groups = config.algorithm.adv_estimator in verl_groups.ESTIMATORS
            self.router: dict[str, Any] = {}
            if reward_router_address is not None:
                self.router = {
                    "reward_router_address": reward_router_address,
                    "reward_model_tokenizer": reward_model_tokenizer,
                }
            function = config.reward.get("custom_reward_function") or {}
            if function.get("path") == f"pkg://{MODULE}":
                reward_model(**(function.get("reward_kwargs") or {}))  # what it cannot load it says now

        async def run_single(self, data: DataProto) -> dict[str, Any]:
            item = data[-1:][0]  # of several outputs the last is judged, as everywhere in verl
            response_ids, mask = _response(item)
            text, offsets = await self.loop.run_in_executor(
                None, spans_of, self.tokenizer, response_ids, mask
            )
            fields = item.non_tensor_batch
            extra_info = {
                **(fields.get("extra_info") or {}),
                **(fields.get("tool_extra_fields") or {}),
                "num_turns": fields.get("__num_turns__"),
                "rollout_reward_scores": fields.get("reward_scores", {}),
                REQUEST: {
                    "prompt": list(fields["raw_prompt"]),
                    "response": text,
                    "offsets": offsets,
                },
            }
            call = functools.partial(
                self.compute_score,
                data_source=fields.get("data_source"),
                solution_str=text,
                ground_truth=(fields.get("reward_model") or {}).get("ground_truth"),
                extra_info=extra_info,
                **self.router,
            )
            if inspect.iscoroutinefunction(self.compute_score):
                result = await call()
            else:
                result = await self.loop.run_in_executor(None, call)
            result = result if isinstance(result, dict) else {"score": result, "acc": result}
            reward = reward_of(result, mask, self.dense_share, self.groups)
            return {
                "reward_score": reward,
                "reward_extra_info": {name: x for name, x in result.items() if name not in REWARDS},
            }

        @classmethod
        def assemble_rm_scores(cls, data: DataProto, scores: Sequence[float | list[float]]) -> Tensor:
            """``[B, R]`` of verl's colocated path."""
            sparse = [0.0 if isinstance(score, list) else score for score in scores]
            rm_scores: Tensor = super().assemble_rm_scores(data, sparse)
            _write_rows(rm_scores, scores)
            return rm_scores

    return RewardManager


def _write_rows(rm_scores: Tensor, rewards: Sequence[float | list[float] | None]) -> None:
    """Writes those of ``rewards`` that are one number per token."""
    for row, values in zip(rm_scores, rewards, strict=True):
        if isinstance(values, list):
            row.zero_()
            row[: len(values)] = row.new_tensor(values)


def _response(item: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of the item's response tokens, without padding."""
    responses = item.batch["responses"]
    length = item.non_tensor_batch.get("response_len")
    if length is None:
        length = item.batch["attention_mask"][-len(responses) :].sum()
    length = int(length)
    mask = item.non_tensor_batch.get(MASK)
    mask = item.batch["response_mask"] if mask is None else torch.tensor(mask)
    return responses[:length].tolist(), mask[:length].bool().tolist()


def dense_share_of(config: Any) -> float:
    """Raises ValueError for other names in ``reward.reward_kwargs``, which would say nothing to anybody."""
    settings = dict(config.reward.get("reward_kwargs") or {})
    dense_share = float(settings.pop("dense_share", ShapingConfig().dense_share))
    if settings:
        raise ValueError(f"reward.reward_kwargs: got {', '.join(settings)}, want dense_share and no other")
    return dense_share


def check_config(config: Any) -> None:
    """Raises ValueError where verl would not make of the credit what ``RewardManager`` gives it for."""
    if dense_share_of(config):
        verl_groups.check_estimator(config.algorithm)
        verl_groups.check_loss(config.actor_rollout_ref.actor)
    own_server = config.reward.reward_model.enable
    if own_server and config.reward.custom_reward_function.path is None:
        raise ValueError(
            "reward.custom_reward_function.path: got none, so with reward.reward_model.enable verl asks its "
            "own server for one number, and never the reward manager"
        )
    if own_server and not config.reward.reward_model.enable_resource_pool:
        if config.trainer.use_v1:
            raise ValueError(
                "reward.reward_model: colocated with the policy under trainer.use_v1, where verl does not "
                "say which tokens are the policy's; want enable=False or enable_resource_pool=True"
            )
        if config.algorithm.adv_estimator in verl_groups.ESTIMATORS:
            raise ValueError(
                "reward.reward_model: colocated with the policy, where no credit travels beside the score "
                f"for algorithm.adv_estimator={config.algorithm.adv_estimator}; want enable=False"
            )
        return
    found = config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
    if found != f"{MODULE}.AgentLoopManager":
        raise ValueError(
            f"actor_rollout_ref.rollout.agent.agent_loop_manager_class: got {found}, which puts the whole "
            f"score on the last token, want {MODULE}.AgentLoopManager"
        )


class AgentLoopManager:
    """verl's agent loop manager, for ``trainer.use_v1`` or without, with workers that keep token rewards."""

    @staticmethod
    def create(config: Any, *args: Any, reward_loop_worker_handles: Any = None, **kwargs: Any) -> Any:
        """What verl calls when training starts; waits for the reward workers, so that none fails later.

        Raises:
            RuntimeError: another version of verl.
            ValueError: settings that do not go together.
        """
        manager = (_manager_v1 if config.trainer.use_v1 else _manager_v0)()
        reward = config.reward.reward_manager
        if (reward.source, reward.name) != ("importlib", "RewardManager"):
            raise ValueError(
                f"reward.reward_manager: got {reward.source} {reward.name}, want source=importlib "
                f"name=RewardManager module.path=pkg://{MODULE}"
            )
        check_config(config)
        estimator = config.algorithm.adv_estimator
        if estimator in verl_groups.ESTIMATORS:
            verl_groups.install(config.trainer.use_v1, estimator, dense_share_of(config))
        if reward_loop_worker_handles is not None:
            import ray

            ray.get([worker.__ray_ready__.remote() for worker in reward_loop_worker_handles])
        return manager.create(config, *args, reward_loop_worker_handles=reward_loop_worker_handles, **kwargs)


def _require_agent_loop() -> Any:
    require_version("verl", TESTED)
    from verl.experimental.agent_loop import agent_loop

    require_parameters(agent_loop.AgentLoopWorker._compute_score, "self", "outputs", "kwargs")
    require_parameters(
        agent_loop.AgentLoopWorker._postprocess, "self", "inputs", "input_non_tensor_batch", "validate"
    )
    require_parameters(agent_loop.AgentLoopOutput.as_dict, "self")
    return agent_loop


def _move_credit(config: Any, outputs: list[Any]) -> None:
    """From the last output's reward score to where it travels; every output has such a field."""
    if config.algorithm.adv_estimator not in verl_groups.ESTIMATORS:
        return
    reward, credit = outputs[-1].reward_score, None
    if isinstance(reward, dict):
        credit = dict(reward)
        outputs[-1].reward_score = credit.pop("reward")
    for output in outputs:
        output.extra_fields[verl_groups.CREDIT] = credit if output is outputs[-1] else None


@functools.cache
def _manager_v1() -> Any:
    """For the trainer that keeps samples in a TransferQueue."""
    agent_loop = _require_agent_loop()
    import ray
    from verl.trainer.ppo.v1 import agent_loop_tq

    class Output(agent_loop.AgentLoopOutput):  # type: ignore[misc, name-defined]
        token_rewards: list[float]

        def as_dict(self) -> dict[str, Any]:
            out: dict[str, Any] = super().as_dict()
            out["rm_scores"] = torch.tensor(out.pop("token_rewards"))
            return out

    class Worker(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[misc]
        async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
            await super()._compute_score(outputs, {**kwargs, MASK: outputs[-1].response_mask})
            _move_credit(self.config, outputs)
            rewards = outputs[-1].reward_score
            if isinstance(rewards, list):
                fields = {**vars(outputs[-1]), "reward_score": sum(rewards), "token_rewards": rewards}
                known = outputs[-1].model_fields_set | {"reward_score", "token_rewards"}
                outputs[-1] = Output.model_construct(known, **fields)

    class Manager(agent_loop_tq.AgentLoopManagerTQ):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.agent_loop_workers_class = ray.remote(Worker)

    return Manager


@functools.cache
def _manager_v0() -> Any:
    """For the trainer that pads samples into a ``DataProto``."""
    agent_loop = _require_agent_loop()
    import ray

    class Worker(agent_loop.AgentLoopWorker):  # type: ignore[misc, name-defined]
        async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
            await super()._compute_score(outputs, {**kwargs, MASK: outputs[-1].response_mask})
            _move_credit(self.config, outputs)
            output = outputs[-1]
            if isinstance(output.reward_score, list):
                output.extra_fields[TOKEN_REWARDS] = output.reward_score
                output.reward_score = sum(output.reward_score)

        def _postprocess(self, inputs: list[Any], *args: Any, **kwargs: Any) -> DataProto:
            rewards = [x.extra_fields.pop(TOKEN_REWARDS, None) for x in inputs]
            data: DataProto = super()._postprocess(inputs, *args, **kwargs)
            if "rm_scores" in data.batch:
                _write_rows(data.batch["rm_scores"], rewards)
            return data

    class Manager(agent_loop.AgentLoopManager):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.agent_loop_workers_class = ray.remote(Worker)

    return Manager


def gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """What verl's ``core_algos.compute_gae_advantage_return`` computes: whitened advantages, and returns.

    All ``[B, R]``, float32. Where fewer than two tokens are unmasked verl raises, and this whitens to 0.
    """
    config = ShapingConfig.verl(gamma=float(gamma), lam=float(lam))
    advantages, returns, moments = attnshape.gae(token_level_rewards, values, response_mask, config)
    return attnshape.whiten(advantages, response_mask, config.whitening, moments=moments), returns


def install_gae() -> None:
    """Puts ``attnshape.gae`` and ``whiten`` in the place of ``core_algos.compute_gae_advantage_return``.

    verl looks it up at call time, in the trainer's process. Prints one line.

    Raises:
        RuntimeError: another version of verl.
    """
    found = require_version("verl", TESTED)
    from verl.trainer.ppo import core_algos

    theirs = core_algos.compute_gae_advantage_return
    require_parameters(theirs, "token_level_rewards", "values", "response_mask", "gamma", "lam")
    core_algos.compute_gae_advantage_return = gae_advantage_return
    print(
        f"attnshape {attnshape.__version__}: replaced verl {found}'s core_algos.compute_gae_advantage_return",
        flush=True,
    )


def __getattr__(name: str) -> object:
    if name == "RewardManager":
        return _reward_manager()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
