"""Every operation in plain PyTorch, to be read beside the formulas: the truth for the fast paths.

Loops over sequences, full ``[T, T]`` attention, no kernels. All arithmetic is in float32, or in float64 where
every floating input is float64. Arguments and shapes are those of the functions of the same name in
``attnshape``; inputs are taken to be checked.
"""

from attnshape.reference.advantages import gae, group_advantages
from attnshape.reference.align import align
from attnshape.reference.attention import attention_credit, attention_row
from attnshape.reference.columns import attention_column_credit
from attnshape.reference.rewards import kl_estimate, redistribute, shape_rewards
from attnshape.reference.rollout import attention_rollout, signed_rollout
from attnshape.reference.whiten import whiten

__all__ = [
    "align",
    "attention_column_credit",
    "attention_credit",
    "attention_rollout",
    "attention_row",
    "gae",
    "group_advantages",
    "kl_estimate",
    "redistribute",
    "shape_rewards",
    "signed_rollout",
    "whiten",
]
