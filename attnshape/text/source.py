"""Where a reward model's credit is read from: one name for how it is tapped and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from attnshape import credit
from attnshape.ops import attention_column_credit, attention_credit, attention_rollout
from attnshape.tap import AttentionTap
from attnshape.text.load import QueryPosition
from attnshape.types import Response

SourceName: TypeAlias = Literal[
    "attention", "columns", "rollout", "signed_rollout", "gradient_value", "gradient_embedding"
]


@dataclass(frozen=True)
class CreditSource:
    """What weighs the tokens of a response, out of the one forward that scores it.

    Args:
        name: ``"attention"``: the row of the token that is scored; ``"columns"``: the attention among the
            response's own tokens; ``"rollout"``: attention carried down through all layers; and with signs
            ``"signed_rollout"``, ``"gradient_value"`` and ``"gradient_embedding"``. See ``docs/sources.md``.
        layer: which attention layer, negative from the last, as for ``AttentionTap``.

    Raises:
        ValueError: no such source.
    """

    name: SourceName = "attention"
    layer: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(SourceName):
            raise ValueError(f"source: got {self.name!r}, want one of {get_args(SourceName)}")

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        return self.name == "signed_rollout" or self.of_score

    @property
    def of_score(self) -> bool:
        """Whether weights say how far a token moved the score up or down, not which share of it is its."""
        return self.name in ("gradient_value", "gradient_embedding")

    def tap(self, model: nn.Module, query_position: QueryPosition = "pooled") -> AttentionTap:
        """Of a model, not yet open; an integer position is to be set for each forward.

        Raises:
            TypeError, ValueError: as for ``AttentionTap``: the model cannot be read so.
        """
        position: Any = "last_visible" if isinstance(query_position, int) else query_position
        if self.name == "columns":
            return AttentionTap(model, self.layer, query_position="all")
        return AttentionTap(model, self.layer, source=self.name, query_position=position)

    @contextmanager
    def opened(self, tap: AttentionTap) -> Iterator[None]:
        """For one forward, with gradients where the source needs them, whatever the caller's mode is."""
        with torch.inference_mode(not self.of_score), torch.set_grad_enabled(self.of_score), tap:
            yield

    def weights(self, taken: Any, score: Tensor, response: Response) -> Tensor:
        """Of each response token.

        Args:
            taken: by the tap, of the forward that gave ``score [B]``; a gradient frees its graph.

        Returns:
            float32 of the mask's shape, 0 where masked, not normalised.
        """
        if self.name == "attention":
            return attention_credit(taken, response, normalization="none")
        if self.name == "columns":
            return attention_column_credit(taken, response, normalization="none")
        if self.name == "rollout":
            return attention_rollout(taken, response, normalization="none")
        if self.name == "signed_rollout":
            return credit.signed_rollout(taken, response)
        return credit.gradient_weights(score, taken, response)


ATTENTION = CreditSource()
