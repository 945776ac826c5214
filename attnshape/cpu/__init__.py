"""The operations as compiled loops over a row's tokens: what a CPU runs.

Columns and rollouts are products of matrices, which PyTorch computes.

**Why numba, and no C++ extension.** The loops are Python as the rest is: they can be held beside
``attnshape.reference`` line by line, and nobody needs a compiler to change or to install them. numba has
wheels for CPython 3.11 to 3.14, and vLLM brings it along; an extension would be built for each Python, system
and version of PyTorch, or by the user. numba compiles by LLVM, as Clang does, and what the loops do is
written as vectors (``lanes``), so that little is left for another compiler to win. What is paid: importing
this imports numba, and the first call ever compiles its loop; later processes read it from a folder
(``benchmarks/test_loops.py`` times all three).
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
