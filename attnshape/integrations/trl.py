"""TRL with credit: ``GRPOTrainer`` of TRL 1.0 and later, see ``trl_grpo``, and the classic ``PPOTrainer``.

The classic one makes token rewards out of the scores that ``step`` takes:

    from attnshape.integrations.trl import PPOTrainer

    trainer = PPOTrainer(config, model, ref_model, tokenizer, dense_share=0.8)
    stats = trainer.step(queries, responses, scores, credits=credits)

Without ``credits`` a step is TRL's own, to the bit. TRL keeps its models, its KL penalty (all four kinds),
its score scaling and clipping, its losses and its statistics.

Ran with every release from 0.7.4 to 0.11.4: from 0.8.0 on with transformers 4.57.6, so that ``AttentionTap``
works in the same process; 0.7.4 to 0.7.11 with transformers 4.38.2, which the tap does not know: there the
reward model runs elsewhere (``attnshape serve``). ``response_masks`` beside credit need TRL 0.9.6. TRL 0.12
and later have another PPO trainer, without these methods, or none, and are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.integrations.framework import require_least, require_parameters, require_version
from attnshape.metrics import log_metrics
from attnshape.ops import DEFAULT_CONFIG, gae, shape_rewards, whiten

if TYPE_CHECKING:
    PPOTrainer: Any
    """``trl.PPOTrainer`` and two arguments: ``dense_share`` of the constructor, ``credits`` of ``step``."""
    GRPOTrainer: Any
    """``trl.GRPOTrainer`` and three arguments: ``credit``, ``dense_share`` and ``baseline``."""

Credits: TypeAlias = Sequence[Tensor] | Tensor

VERSIONS = (
    *(f"0.7.{patch}" for patch in range(4, 12)),
    *(f"0.8.{patch}" for patch in range(7)),
    *("0.9.2", "0.9.3", "0.9.4", "0.9.6", "0.10.1"),
    *(f"0.11.{patch}" for patch in range(5)),
)
GRPO_LEAST = (1, 0)
_METHODS = {
    "step": ("queries", "responses", "scores", "response_masks"),
    "compute_rewards": ("scores", "logprobs", "ref_logprobs", "masks"),
    "compute_advantages": ("values", "rewards", "mask"),
}


def __getattr__(name: str) -> object:
    # TRL is imported when its trainer is asked for.
    if name == "PPOTrainer":
        return _ppo_trainer()
    if name == "GRPOTrainer":
        return _grpo_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _ppo_trainer() -> type[Any]:
    found = require_version("trl", VERSIONS).partition("+")[0]
    from trl import PPOTrainer

    return shaped_trainer(PPOTrainer, VERSIONS.index(found) >= VERSIONS.index("0.9.6"))


@functools.cache
def _grpo_trainer() -> type[Any]:
    require_least("trl", GRPO_LEAST)
    from trl import GRPOTrainer

    from attnshape.integrations.trl_grpo import shaped_grpo_trainer

    return shaped_grpo_trainer(GRPOTrainer)


def shaped_trainer(base: type[Any], takes_masks: bool = True) -> type[Any]:
    """``base``, which is TRL's ``PPOTrainer`` or a subclass of it, with credit.

    Args:
        takes_masks: whether ``base`` places ``response_masks`` right, which TRL does from 0.9.6 on.

    Raises:
        RuntimeError: a method that is extended takes other arguments than in the releases that were tested.
    """
    for name, parameters in _METHODS.items():
        require_parameters(getattr(base, name), "self", *parameters)

    class PPOTrainer(base):  # type: ignore[misc]
        """TRL's ``PPOTrainer`` whose ``step`` takes credit.

        Args:
            dense_share: share of each score that its credit spreads; the rest stays on the last token.

        Other arguments are TRL's. Encoder-decoder models are refused.
        """

        def __init__(
            self, *args: Any, dense_share: float = DEFAULT_CONFIG.dense_share, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            if self.is_encoder_decoder:
                raise ValueError(
                    "model: got an encoder-decoder, whose tokens TRL masks otherwise, want a decoder"
                )
            self._shaping = ShapingConfig(dense_share=dense_share)
            self._credit: Tensor | None = None
            self._metrics: dict[str, float] = {}

        def step(
            self,
            queries: list[Tensor],
            responses: list[Tensor],
            scores: list[Tensor],
            response_masks: list[Tensor] | None = None,
            *,
            credits: Credits | None = None,
        ) -> dict[str, Any]:
            """One PPO step of TRL's.

            Args:
                credits: non-negative weights per response token, one tensor ``[len(response)]`` per response,
                    or all as one ``[B, R]``, read up to each response's length. They are normalised over the
                    tokens that ``response_masks`` leaves.

            Returns:
                TRL's statistics; where credit was given also ``attnshape/...``, ``ShapedRewards.metrics``.

            Raises:
                ValueError, TypeError: the credits do not fit the responses; nothing was trained.
            """
            if credits is None:
                return super().step(queries, responses, scores, response_masks)  # type: ignore[no-any-return]
            if response_masks is not None and not takes_masks:
                raise ValueError("response_masks: before 0.9.6 TRL reads them one token late, want TRL 0.9.6")
            self._credit = _live_credit(credits, responses, response_masks)
            try:
                stats: dict[str, Any] = super().step(queries, responses, scores, response_masks)
            finally:
                self._credit = None
            return stats | self._metrics

        def compute_rewards(
            self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
        ) -> tuple[Tensor, ...]:
            """TRL's KL penalty, and the scores spread by the credit: ``[B, S - 1]``, as TRL's."""
            if self._credit is None:
                return super().compute_rewards(scores, logprobs, ref_logprobs, masks)  # type: ignore[no-any-return]
            # From 0.7.9 on the KL comes third.
            rewards, *rest = super().compute_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, masks)
            credit = self._credit.to(masks.device)
            live = masks != 0
            if int(live.sum()) != len(credit):
                raise ValueError(
                    f"credits: got {len(credit)} unmasked response tokens, TRL's masks have {int(live.sum())}"
                )
            # A row's unmasked positions are its response's unmasked tokens in order, on either padding side.
            placed = credit.new_zeros(masks.shape).masked_scatter_(live, credit)
            shaped = shape_rewards(scores.to(credit.dtype), placed, masks, config=self._shaping)
            self._metrics = log_metrics(shaped)
            return rewards + shaped.rewards, *rest

        def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            """TRL's ``(values, advantages, returns)``, without its loop over tokens; 0 where masked."""
            # TRL's whitened rewards are not 0 in padding, which only its own loop carries into the response.
            if self._credit is None or self.config.whiten_rewards:
                return super().compute_advantages(values, rewards, mask)  # type: ignore[no-any-return]
            config = ShapingConfig(gamma=self.config.gamma, lam=self.config.lam, mask_semantics="zero")
            advantages, returns, moments = gae(rewards, values, mask, config)
            return values * mask, whiten(advantages, mask, moments=moments), returns

    PPOTrainer.__qualname__ = "PPOTrainer"
    return PPOTrainer


def _live_credit(
    credits: Credits, responses: Sequence[Tensor], response_masks: Sequence[Tensor] | None
) -> Tensor:
    """The credit of all unmasked response tokens, one row after the other."""
    if len(credits) != len(responses):
        raise ValueError(f"credits: got {len(credits)}, want one per response, {len(responses)}")
    masks = (
        [torch.ones_like(response) for response in responses] if response_masks is None else response_masks
    )
    padded = isinstance(credits, Tensor)
    rows = []
    for i, (credit, response, mask) in enumerate(zip(credits, responses, masks, strict=True)):
        if not isinstance(credit, Tensor) or not credit.is_floating_point():
            kind = credit.dtype if isinstance(credit, Tensor) else type(credit).__name__
            raise TypeError(f"credits[{i}] must be a floating tensor, got {kind}")
        length = len(response)
        if credit.ndim != 1 or (len(credit) < length if padded else len(credit) != length):
            raise ValueError(
                f"credits[{i}]: got shape {list(credit.shape)} for a response of {length} tokens"
            )
        row = credit.detach()[:length].float()[mask.to(credit.device) != 0]
        if not bool((row.isfinite() & (row >= 0)).all()):
            raise ValueError(f"credits[{i}]: got a weight that is negative or not finite")
        rows.append(row)
    return torch.cat(rows)
