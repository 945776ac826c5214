"""The operations without loops over tokens, in PyTorch: for any device and for float64.

Arguments are checked by ``attnshape.ops``. Packed layouts are padded first and packed again last.
"""

from attnshape.vectorized.advantages import gae
from attnshape.vectorized.attention import attention_credit, attention_row
from attnshape.vectorized.columns import attention_column_credit
from attnshape.vectorized.groups import completion_advantages, spread, turned
from attnshape.vectorized.rewards import shape_rewards
from attnshape.vectorized.rollout import attention_rollout, signed_rollout
from attnshape.vectorized.whiten import whiten

__all__ = [
    "attention_column_credit",
    "attention_credit",
    "attention_rollout",
    "attention_row",
    "completion_advantages",
    "gae",
    "shape_rewards",
    "signed_rollout",
    "spread",
    "turned",
    "whiten",
]
