"""``sweep`` as the public functions call it, and the same by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from attnshape import reference
from attnshape.config import ShapingConfig
from attnshape.tolerance import credit_bound, error_fraction, gae_bound, kl_bound, reward_bound
from attnshape.types import KL, MIN_MASS, Response, ShapedRewards, Status, float32_rounded
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


def expected(score, credit, mask, config=None, cu=None, **inputs) -> ShapedRewards:
    def exact(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    given = {name: exact(x) for name, x in inputs.items()}
    coef, estimate = given.pop("kl_coef", 0.0), given.pop("kl", None)
    kl = KL(given.pop("logprobs", None), given.pop("ref_logprobs", None), coef, estimate)
    has_kl = estimate is not None or kl.logprobs is not None
    return reference.shape_rewards(
        exact(score),
        exact(credit),
        Response(mask, cu_seqlens=cu),
        kl=kl if has_kl else None,
        config=config,
        **given,
    )


def padded(x: Tensor, cu: Tensor | None) -> Tensor:
    """Rows of a packed tensor, as the bounds want them."""
    if cu is None:
        return x
    return torch.nn.utils.rnn.pad_sequence(x.split(cu.diff().tolist()), batch_first=True)


def assert_close(actual: Shaped, truth: ShapedRewards, config: ShapingConfig, inputs: dict, cu=None) -> None:
    def check(name: str, bound: Tensor) -> None:
        x, y = padded(getattr(actual, name), cu), padded(getattr(truth, name), cu)
        fraction = error_fraction(x, y, bound)
        assert fraction.numel() == 0 or fraction.max() <= 1, name

    def at(x: Tensor) -> Tensor:
        return padded(x.double().nan_to_num(0, 0, 0), cu)

    credit, kl = at(truth.credit), None
    if truth.kl is not None:
        kl = at(truth.kl)
        ratio = kl
        if "logprobs" in inputs:
            ratio = at(inputs["logprobs"].double() - inputs["ref_logprobs"].double())
        check("kl", kl_bound(kl, ratio))
    check("credit", credit_bound(credit))
    terms = [credit * 10, *(at(x) for n, x in inputs.items() if n == "token_rewards")]
    terms += [] if kl is None else [kl]
    check("rewards", reward_bound(at(truth.rewards), *terms))
    for name, lam in (("advantages", config.lam), ("returns", config.lam_value)):
        gap = config.lam if lam is None else lam
        if "values" not in inputs:
            gap = 1.0
        rows = at(getattr(truth, name))
        # What cancels in a reward is no smaller in its sums.
        noise = sum(error.abs().sum(-1, keepdim=True) for error in terms) * 1e-6
        check(name, gae_bound(rows, config.gamma, gap) + noise)
    assert actual.status.tolist() == truth.status.tolist()
    sound = truth.status & int(Status.NONFINITE) == 0
    entropy, last_share, _, error = actual.stats.double()[sound].T
    stats = truth.row_stats
    torch.testing.assert_close(entropy, stats.entropy.double()[sound], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last_share, stats.last_share.double()[sound], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(error, stats.score_error.double()[sound], atol=1e-5, rtol=1e-5)


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
