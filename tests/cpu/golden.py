"""Golden vectors of the compiled loops: float64 results of the reference, rounded to float32.

``python -m cpu.golden`` in ``tests`` writes them anew. Inputs are fractions of a power of two, made by whole
numbers alone, so that they are the same on every machine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnshape import KL, AttentionInputs, Response, ShapingConfig, Whitening, reference

FILE = Path(__file__).with_name("golden.npz")
OUTPUTS = ("rewards", "advantages", "returns", "credit", "kl", "moments")
CONFIGS = {
    "undiscounted": ShapingConfig(),
    "gae": ShapingConfig(gamma=0.99, lam=0.95, kl_estimator="k2", kl_input_clip=0.25),
    "zero": ShapingConfig(lam=0.9, mask_semantics="zero", kl_estimator="abs", normalization="sum_to_length"),
    "decoupled": ShapingConfig(lam=0.9, lam_value=1.0, score_index="last_token", score_clip=0.5),
    "carried": ShapingConfig(gamma=0.98, lam=0.8, carry_masked=True, dense_share=0.25, kl_output_clip=0.125),
    "carried_zero": ShapingConfig(lam=0.8, carry_masked=True, mask_semantics="zero", normalization="none"),
}
WHITENINGS = {
    "added": Whitening(),
    "clamped": Whitening(bessel=False, eps=0.25, eps_mode="clamp", whiten_masked=True),
    "to_deviation": Whitening(eps=2**-10, eps_mode="add_to_std", shift_mean=False),
}
ROWS = ("plain", "window", "softcap", "sinks", "lse", "masks")
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


def attention(name: str, dtype: torch.dtype) -> AttentionInputs:
    """Elements of 6 bits: every dtype holds them, and no product of query and key is rounded."""
    rows, heads, key_heads, keys, width = 3, 4, 2, 150, 24
    few = lambda count, seed: (numbers(count, seed) * 32).round() / 32  # noqa: E731
    query = few(rows * heads * width, 7).view(rows, heads, width).to(dtype)
    key = few(rows * key_heads * keys * width, 8).view(rows, key_heads, keys, width).to(dtype)
    options: dict[str, Any] = {
        "plain": {},
        "window": {"sliding_window": 40, "query_position": torch.tensor([20, 149, 100])},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": few(heads, 9)},
        "lse": {"lse": 5 + few(rows * heads, 10).view(rows, heads)},
        "masks": {
            "attention_mask": few(rows * keys, 11).view(rows, keys) > -0.5,
            "mask_row": few(rows * keys, 12).view(rows, keys),
            "head_mask": torch.tensor([1, 0, 1, 1]),
            "key_start": torch.tensor([0, 3, 130]),
        },
    }
    return AttentionInputs(query, key, 0.25, **options[name])


def expected() -> Iterator[tuple[str, np.ndarray]]:
    for name, config in CONFIGS.items():
        out = reference.shape_rewards(**given(torch.float64), config=config)
        for output in OUTPUTS:
            yield f"{name}.{output}", getattr(out, output).float().numpy()
    x = given(torch.float64)
    for name, whitening in WHITENINGS.items():
        yield f"whiten.{name}", reference.whiten(x["values"], x["response"], whitening).float().numpy()
    for name in ROWS:
        yield f"row.{name}", reference.attention_row(attention(name, torch.float64)).float().numpy()


if __name__ == "__main__":
    np.savez_compressed(FILE, **dict(expected()))
