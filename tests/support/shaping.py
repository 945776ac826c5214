"""``sweep`` as the public functions call it, and the same by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from attnshape import reference
from attnshape.compare import errors
from attnshape.config import ShapingConfig
from attnshape.problems import Problem, mapped, to_float64
from attnshape.types import KL, MIN_MASS, Response, RowStats, ShapedRewards, float32_rounded
from csrc_triton import Shaped, sweep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING = ("rewards", "advantages", "returns", "credit", "kl", "status", "stats")
TOKENS = EVERYTHING[:5]


def decay(gamma: float, lam: float | Tensor) -> float | Tensor:
    if isinstance(lam, Tensor):
        return (gamma * lam.double()).float()
    return float32_rounded(gamma * lam)


def shape(score, credit, mask, config=None, outputs=EVERYTHING, cu=None, **inputs) -> Shaped:
    """``sweep`` as ``shape_rewards`` is called."""
    config = config or ShapingConfig()
    lam_value = config.lam_value
    return sweep(
        Response(mask, cu_seqlens=cu),
        outputs,
        score=score,
        credit=credit,
        normalization=config.normalization,
        score_index=config.score_index,
        dense_share=config.dense_share,
        score_bounds=config.score_bounds,
        kl_estimator=config.kl_estimator,
        kl_input_clip=config.kl_input_clip,
        kl_output_clip=config.kl_output_clip if "kl" not in inputs else None,
        gamma=float32_rounded(config.gamma),
        gl=decay(config.gamma, config.lam),
        gl_value=None if lam_value is None else decay(config.gamma, lam_value),
        skip_masked=config.mask_semantics == "skip",
        zero_nonfinite=config.on_nan == "zero_row",
        min_mass=MIN_MASS,
        **inputs,
    )


def problem_of(score, credit, mask, config=None, cu=None, **inputs) -> Problem:
    given = dict(inputs)
    coef, estimate = given.pop("kl_coef", 0.0), given.pop("kl", None)
    kl = KL(given.pop("logprobs", None), given.pop("ref_logprobs", None), coef, estimate)
    if estimate is not None or kl.logprobs is not None:
        given["kl"] = kl
    return Problem(score, credit, Response(mask, cu_seqlens=cu), given, config or ShapingConfig())


def expected(score, credit, mask, config=None, cu=None, **inputs) -> ShapedRewards:
    exact = to_float64(problem_of(score, credit, mask, config, cu, **inputs))
    return exact.shaped(reference.shape_rewards)


def check_shape(score, credit, mask, config=None, cu=None, **inputs) -> Shaped:
    """Every output within the bounds of the float64 reference; returns them."""
    got = shape(score, credit, mask, config, (*EVERYTHING, "moments"), cu, **inputs)
    shaped = ShapedRewards(*got[:6], got.moments, RowStats(got.stats, of_attention=False))
    drawn = mapped(problem_of(score, credit, mask, config, cu, **inputs), lambda x: x.cpu())
    want = to_float64(drawn).shaped(reference.shape_rewards)
    found = errors(drawn, mapped(shaped, lambda x: x.cpu()), want)
    wrong = {name: worst for name, worst in found.items() if not worst.ok}
    assert not wrong, f"{wrong}: got {shaped}, want {want}"
    return got


def problem(width: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    names = ("values", "logprobs", "ref_logprobs", "token_rewards")
    inputs = {name: torch.randn(batch, width, generator=generator).to(DEVICE) for name in names}
    inputs["kl_coef"] = 0.1
    score = torch.randn(batch, generator=generator).to(DEVICE)
    credit = torch.rand(batch, width, generator=generator).to(DEVICE) ** 4
    mask = (torch.rand(batch, width, generator=generator) < 0.8).to(DEVICE)
    return score, credit, mask, inputs


def assert_same_pattern(actual: Tensor, truth: Tensor) -> None:
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    assert (same | (actual.isfinite() & truth.isfinite())).all()


def gae(rewards: Tensor, values: Tensor | None, mask: Tensor, gamma: float, lam: float) -> Shaped:
    return sweep(
        Response(mask),
        ("advantages", "returns"),
        token_rewards=rewards,
        values=values,
        gamma=gamma,
        gl=decay(gamma, lam),
        min_mass=MIN_MASS,
    )
