"""The fast backends against the float64 reference over a grid of shapes: what ``attnshape compare`` runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnshape import reference
from attnshape.config import KLEstimator, MaskSemantics, ShapingConfig
from attnshape.ops import shape_rewards
from attnshape.problems import Problem, finite, make_problem, mapped, to_float64
from attnshape.tolerance import CREDIT_SUM, credit_bound, error_fraction, gae_bound, kl_bound, reward_bound
from attnshape.types import Backend, ShapedRewards, Status

STATISTIC = 1e-4
"""Bound on a row statistic's error, relative and absolute."""


class Shape(NamedTuple):
    """Batch, keys, response tokens, query heads, key heads, head width."""

    B: int
    S: int
    R: int
    Hq: int
    Hkv: int
    D: int


class Setting(NamedTuple):
    """What is drawn and how it is shaped."""

    left_padding: bool
    holes: bool
    mask_semantics: MaskSemantics
    gamma: float
    lam: float
    kl_estimator: KLEstimator
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: bool = False


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    setting: Setting

    def problem(self) -> Problem:
        """The same for every backend, on the CPU."""
        (B, S, R, Hq, Hkv, D), setting = self.shape, self.setting
        return make_problem(
            0,
            batch=B,
            keys=S,
            width=R,
            heads=Hq,
            kv_heads=Hkv,
            head_dim=D,
            dtype=self.dtype,
            left_padding=setting.left_padding,
            holes=setting.holes,
            extras=False,
            softcap=setting.softcap,
            sliding_window=setting.sliding_window,
            sinks=setting.sinks,
            config=ShapingConfig(
                gamma=setting.gamma,
                lam=setting.lam,
                mask_semantics=setting.mask_semantics,
                kl_estimator=setting.kl_estimator,
            ),
        )


@dataclass(frozen=True)
class Worst:
    """The element of an output that comes nearest to its bound, or exceeds it most."""

    error: float
    bound: float
    fraction: float
    """``error / bound``; infinite where a value should not be finite and is, or the other way round."""

    @property
    def ok(self) -> bool:
        return self.fraction <= 1

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor, bound: Tensor) -> Worst:
        fraction = error_fraction(actual, expected, bound.expand_as(expected)).flatten()
        if not fraction.numel():
            return cls(0.0, 0.0, 0.0)
        at = int(fraction.argmax())
        error = (actual.cpu().double() - expected.cpu().double()).abs().flatten()[at]
        return cls(error.item(), bound.expand_as(expected).flatten()[at].item(), fraction[at].item())


SMALL = (Shape(1, 1, 1, 1, 1, 16), Shape(3, 40, 17, 4, 4, 24), Shape(2, 128, 64, 8, 2, 64))
LARGE = (Shape(4, 300, 200, 6, 2, 80), Shape(2, 1024, 512, 32, 8, 128), Shape(1, 8192, 4096, 8, 8, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = (
    Setting(False, False, "skip", 1.0, 1.0, "k1"),
    Setting(True, True, "skip", 1.0, 0.95, "k3", sliding_window=7, softcap=20.0),
    Setting(True, True, "zero", 0.99, 0.95, "k2", sinks=True),
    Setting(False, True, "zero", 1.0, 1.0, "abs"),
)


def grid(quick: bool) -> Iterator[Case]:
    """Every shape with every dtype and setting; ``quick`` leaves out the large shapes."""
    for shape, dtype, setting in itertools.product(SMALL if quick else SMALL + LARGE, DTYPES, SETTINGS):
        yield Case(shape, dtype, setting)


def compare(case: Case, backend: Backend, device: str) -> dict[str, Worst]:
    """Each output of ``shape_rewards`` against the reference on the same inputs, upcast to float64."""
    problem = case.problem()
    got = mapped(problem, lambda x: x.to(device)).shaped(shape_rewards, backend=backend)
    return errors(problem, got, to_float64(problem).shaped(reference.shape_rewards))


def errors(problem: Problem, got: ShapedRewards, want: ShapedRewards) -> dict[str, Worst]:
    """The worst element of each output, ``got`` against the float64 reference.

    ``status`` is compared exactly: its bound is 0.
    """
    config, largest, kl = problem.config, problem.max_score, problem.given.get("kl")
    padded, score = problem.padded, problem.score[:, None].double()
    live = padded(problem.response.mask) != 0
    log_ratio = torch.zeros(live.shape, dtype=torch.float64)
    if kl is not None and kl.logprobs is not None:
        log_ratio = (padded(kl.logprobs).double() - padded(kl.ref_logprobs).double()).masked_fill(~live, 0.0)
    found: dict[str, Worst] = {}

    def add(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
        found[name] = Worst.of(actual, expected, bound)

    credit = padded(want.credit)
    actual = padded(got.credit)
    add("credit", actual, credit, credit_bound(credit, largest))
    if config.normalization == "sum_to_one":
        other = Status.EMPTY | Status.OUT_OF_RANGE | Status.NONFINITE | Status.SCORE_MASKED
        sums = actual.double().sum(1)[want.status & int(other) == 0]
        one = torch.ones_like(sums)
        add("credit sum", sums, one, CREDIT_SUM * one)
    terms = [score * credit, *_summands(problem, live)]
    if kl is not None:
        assert want.kl is not None
        assert got.kl is not None
        estimate, coef = padded(want.kl), float(kl.coef)
        add("kl", padded(got.kl), estimate, kl_bound(estimate, log_ratio))
        terms += [coef * log_ratio, coef * estimate]
    expected = padded(want.rewards)
    add("rewards", padded(got.rewards), expected, reward_bound(expected, *terms, max_logit=largest))
    for name, lam in (("advantages", config.lam), ("returns", config.lam_value)):
        expected = padded(getattr(want, name))
        bound = gae_bound(expected, config.gamma, config.lam if lam is None else lam)
        add(name, padded(getattr(got, name)), expected, bound)
    usable = want.status & int(Status.NONFINITE) == 0
    for name in ("entropy", "last_share", "response_share", "score_error"):
        statistic = getattr(want.row_stats, name)
        if statistic is not None:
            expected = statistic[usable]
            actual = getattr(got.row_stats, name).cpu()[usable]
            add(name, actual, expected, STATISTIC * (1 + expected.abs()))
    usable &= want.status & int(Status.OUT_OF_RANGE) == 0
    moments = want.moments[usable]
    add("moments", got.moments.cpu()[usable], moments, STATISTIC * (1 + moments.abs()))
    add("status", got.status, want.status, torch.zeros(want.status.shape))
    return found


def _summands(problem: Problem, live: Tensor) -> list[Tensor]:
    """What a reward is a sum of, beside its credit and its KL: each ``[B, R]``."""
    index, given, t = problem.config.score_index, problem.given, torch.arange(live.shape[1])
    if not isinstance(index, Tensor):
        last = live if index == "last_unmasked" else problem.padded(torch.ones_like(problem.response.mask))
        index = (last * t).amax(1) if len(t) else t.new_zeros(len(live))
    on_score = finite(problem.score).abs()
    if "terminal_reward" in given:
        on_score = on_score + finite(given["terminal_reward"]).abs()
    terms = [torch.where(t == index[:, None], on_score[:, None], 0.0)]
    return terms + [problem.padded(given[name]) for name in ("token_rewards",) if name in given]
