"""The operations as compiled loops over a row's tokens: what a CPU runs.

Importing this imports numba. The first call ever of a loop compiles it, later processes read it from a
folder. Columns and rollouts are products of matrices, which PyTorch computes.
"""

from attnshape.cpu.attention import attention_row
from attnshape.cpu.shaping import attention_credit, gae, shape_rewards, spread
from attnshape.cpu.whiten import whiten
from attnshape.vectorized import attention_column_credit, attention_rollout

__all__ = [
    "attention_column_credit",
    "attention_credit",
    "attention_rollout",
    "attention_row",
    "gae",
    "shape_rewards",
    "spread",
    "whiten",
]
