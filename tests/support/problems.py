"""Drawn shaping problems, and how an output is held against the float64 reference."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnshape import AttentionInputs, Response, ShapingConfig, reference, shape_rewards
from attnshape.compare import errors
from attnshape.problems import Problem, finite, make_problem, mapped, pack, to_float64

__all__ = [
    "Problem",
    "assert_within",
    "check_shaped",
    "distant_response",
    "finite",
    "make_problem",
    "mapped",
    "pack",
    "problems",
    "to_float64",
]


def distant_response(distance: float) -> Problem:
    """A prompt key outscores the response's keys by ``distance``: their weights are ``exp(-distance)``."""
    key = torch.zeros(1, 1, 5, 8)
    key[0, 0, 0, 0] = distance
    key[0, 0, 2:, 0] = torch.tensor([0.0, 0.5, -0.5])
    query = torch.zeros(1, 1, 8)
    query[..., 0] = 1.0
    response = Response(torch.ones(1, 3), start=torch.tensor([2]))
    return Problem(torch.ones(1), AttentionInputs(query, key, 1.0), response)


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Problems over the grid of layouts, layers and settings that ``shape_rewards`` takes."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    kv_heads, group = pick(1, 2, 3), pick(1, 2, 5)
    lam = pick(1.0, 0.95, 0.3, 0.0)
    batch = draw(st.integers(1, 4))
    config = ShapingConfig(
        dense_share=pick(1.0, 0.8, 0.0),
        gamma=pick(1.0, 0.99, 0.5),
        lam=torch.linspace(0.5, 1.0, batch) if draw(st.booleans()) else lam,
        lam_value=pick(None, 1.0, 0.9),
        mask_semantics=pick("skip", "zero"),
        carry_masked=pick(False, False, True),
        normalization=pick("sum_to_one", "sum_to_one", "sum_to_length", "none"),
        score_index=pick("last_unmasked", "last_unmasked", "last_token"),
        score_clip=pick(None, 0.5, (-0.25, 1.0)),
        kl_estimator=pick("k1", "abs", "k2", "k3"),
        kl_input_clip=pick(None, 0.25),
        kl_output_clip=pick(None, 0.125),
    )
    keys = draw(st.integers(2, 40))
    arguments: dict[str, Any] = {
        "batch": batch,
        "keys": keys,
        "width": draw(st.integers(1, keys)),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": pick(8, 16, 24, 80),
        "whole_query": draw(st.booleans()),
        "left_padding": draw(st.booleans()),
        "holes": draw(st.booleans()),
        "values": draw(st.booleans()),
        "kl": pick("logprobs", "kl", ""),
        "extras": draw(st.booleans()),
        "use_index": draw(st.booleans()),
        "attention_mask": draw(st.booleans()),
        "softcap": pick(None, 5.0),
        "sliding_window": pick(None, None, 1, 7),
        "sinks": draw(st.booleans()),
        "lse": draw(st.booleans()),
        "head_mask": pick(False, False, True),
        "dtype": pick(torch.float32, torch.bfloat16, torch.float16),
        "config": config,
    }
    problem = make_problem(draw(st.integers(0, 2**20)), **(arguments | fixed))
    return pack(problem) if not config.carry_masked and draw(st.booleans()) else problem


def assert_within(name: str, got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Same non-finite pattern, and finite errors within ``bound``."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(got), pattern(want)), f"{name}: other {pattern.__name__}: {got} != {want}"
    error = finite(got - want).abs()
    excess = (error - bound.expand_as(error)).masked_fill(~want.isfinite(), -1.0)
    assert not excess.numel() or excess.max() <= 0, (
        f"{name}: off by {error.flatten()[excess.argmax()]:.3g}, "
        f"bound {bound.expand_as(error).flatten()[excess.argmax()]:.3g}"
    )


def check_shaped(problem: Problem, backend: str, device: torch.device | str = "cpu") -> None:
    """Every output of ``shape_rewards`` on a backend within the bounds of the float64 reference."""
    there = mapped(problem, lambda x: x.to(device))
    got = mapped(there.shaped(shape_rewards, backend=backend), lambda x: x.cpu())
    want = to_float64(problem).shaped(reference.shape_rewards)
    wrong = {name: worst for name, worst in errors(problem, got, want).items() if not worst.ok}
    assert not wrong, f"{wrong}: got {got}, want {want}"
