"""The operations as compiled loops over a row's tokens: what a CPU runs.

Importing this imports numba. The first call ever of a loop compiles it; later processes read it from a folder.
"""

from attnshape.cpu.attention import attention_row
from attnshape.cpu.shaping import attention_credit, gae, shape_rewards
from attnshape.cpu.whiten import whiten

__all__ = ["attention_credit", "attention_row", "gae", "shape_rewards", "whiten"]
