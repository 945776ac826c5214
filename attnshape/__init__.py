"""Dense rewards for PPO on language models, from the reward model's own attention."""

from typing import TYPE_CHECKING

from attnshape import credit, reference
from attnshape.config import GroupConfig, ShapingConfig, Whitening
from attnshape.metrics import log_metrics
from attnshape.ops import (
    attention_column_credit,
    attention_credit,
    attention_rollout,
    attention_row,
    gae,
    group_advantages,
    redistribute,
    shape_rewards,
    whiten,
)
from attnshape.text.align import Alignment, align
from attnshape.text.texts import TextAlignment, align_texts, decoded_spans
from attnshape.types import (
    KL,
    Advantages,
    AttentionInputs,
    GroupAdvantages,
    Response,
    ShapedRewards,
    SignedInputs,
    Status,
)

if TYPE_CHECKING:
    from attnshape.tap import AttentionTap
    from attnshape.text.model import CreditModel

__version__ = "0.2.0"

__all__ = [
    "KL",
    "Advantages",
    "Alignment",
    "AttentionInputs",
    "AttentionTap",
    "CreditModel",
    "GroupAdvantages",
    "GroupConfig",
    "Response",
    "ShapedRewards",
    "ShapingConfig",
    "SignedInputs",
    "Status",
    "TextAlignment",
    "Whitening",
    "align",
    "align_texts",
    "attention_column_credit",
    "attention_credit",
    "attention_rollout",
    "attention_row",
    "credit",
    "decoded_spans",
    "gae",
    "group_advantages",
    "log_metrics",
    "redistribute",
    "reference",
    "shape_rewards",
    "whiten",
]


def __getattr__(name: str) -> object:
    # transformers takes seconds to import, and a trainer without the reward model does not need it.
    if name == "AttentionTap":
        from attnshape.tap import AttentionTap

        return AttentionTap
    if name == "CreditModel":
        from attnshape.text.model import CreditModel

        return CreditModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
