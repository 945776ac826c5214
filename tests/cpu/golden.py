"""Golden vectors of the loop over rows: float64 results of the reference, rounded to float32.

``python -m cpu.golden`` in ``tests`` writes them anew. Inputs are fractions of a power of two, made by whole
numbers alone, so that they are the same on every machine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnshape import KL, Response, ShapingConfig, reference

FILE = Path(__file__).with_name("golden.npz")
OUTPUTS = ("rewards", "advantages", "returns", "credit", "kl")
CONFIGS = {
    "undiscounted": ShapingConfig(),
    "gae": ShapingConfig(gamma=0.99, lam=0.95, kl_estimator="k2", kl_input_clip=0.25),
    "zero": ShapingConfig(lam=0.9, mask_semantics="zero", kl_estimator="abs", normalization="sum_to_length"),
    "decoupled": ShapingConfig(lam=0.9, lam_value=1.0, score_index="last_token", score_clip=0.5),
    "carried": ShapingConfig(gamma=0.98, lam=0.8, carry_masked=True, dense_share=0.25, kl_output_clip=0.125),
    "carried_zero": ShapingConfig(lam=0.8, carry_masked=True, mask_semantics="zero", normalization="none"),
}
LENGTHS = (1, 127, 128, 129, 300, 300)


def numbers(count: int, seed: int) -> Tensor:
    """From -1 to 1, of 16 bits."""
    state, found = seed, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((state >> 48) / 2**15 - 1)
    return torch.tensor(found)


def given(dtype: torch.dtype) -> dict[str, Any]:
    rows, width = len(LENGTHS), max(LENGTHS)
    x = numbers(7 * rows * width, 1).view(7, rows, width).to(dtype)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]) & (x[0] > -0.8)
    mask[:, 0] = True
    mask[-1, :40] = False  # as where tensors are of the whole sequence
    return {
        "score": 3 * numbers(rows, 2).to(dtype),
        "credit": x[1].abs() / 8,
        "response": Response(mask),
        "values": x[2],
        "kl": KL(x[3], x[4], 0.125),
        "token_rewards": x[5] / 4,
        "terminal_reward": numbers(rows, 3).to(dtype),
        "bootstrap": numbers(rows, 4).to(dtype),
    }


def expected() -> Iterator[tuple[str, np.ndarray]]:
    for name, config in CONFIGS.items():
        out = reference.shape_rewards(**given(torch.float64), config=config)
        for output in OUTPUTS:
            yield f"{name}.{output}", getattr(out, output).float().numpy()


if __name__ == "__main__":
    np.savez_compressed(FILE, **dict(expected()))
