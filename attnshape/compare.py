"""The fast backends against the float64 reference over a grid of shapes: what ``attnshape compare`` runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnshape import reference
from attnshape.ops import shape_rewards
from attnshape.tolerance import CREDIT_SUM, credit_bound, error_fraction, gae_bound, kl_bound, reward_bound
from attnshape.types import AttentionInputs, Backend, KLEstimator, MaskSemantics, ShapingConfig, Status

KL_COEF = 0.1


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
    """Each output of ``shape_rewards`` against the reference on the same inputs, upcast to float64.

    ``status`` is compared exactly: its bound is 0.
    """
    arguments = _draw(case)
    got = shape_rewards(**mapped(arguments, lambda x: x.to(device)), backend=backend)
    arguments = mapped(arguments, lambda x: x.double() if x.is_floating_point() else x)
    want = reference.shape_rewards(**arguments)
    assert want.kl is not None
    assert got.kl is not None

    mask = arguments["response_mask"] != 0
    log_ratio = torch.where(mask, arguments["logprobs"] - arguments["ref_logprobs"], 0.0)
    score = arguments["score"][:, None]
    max_logit = _max_logit(arguments["credit"])
    terms = [score * want.credit, KL_COEF * log_ratio, KL_COEF * want.kl]
    setting = case.setting
    summed = (want.status & int(Status.EMPTY)) == 0
    outputs = {
        "credit": (got.credit, want.credit, credit_bound(want.credit, max_logit)),
        "credit sum": (got.credit.double().sum(1), summed.double(), torch.full(summed.shape, CREDIT_SUM)),
        "rewards": (got.rewards, want.rewards, reward_bound(want.rewards, *terms, max_logit=max_logit)),
        "advantages": (
            got.advantages,
            want.advantages,
            gae_bound(want.advantages, setting.gamma, setting.lam),
        ),
        "returns": (got.returns, want.returns, gae_bound(want.returns, setting.gamma, setting.lam)),
        "kl": (got.kl, want.kl, kl_bound(want.kl, log_ratio)),
        "status": (got.status, want.status, torch.zeros(want.status.shape)),
    }
    return {name: _worst(*tensors) for name, tensors in outputs.items()}


def _worst(actual: Tensor, expected: Tensor, bound: Tensor) -> Worst:
    fraction = error_fraction(actual, expected, bound).flatten()
    at = int(fraction.argmax())
    error = (actual.cpu().double() - expected.cpu().double()).abs().flatten()[at]
    return Worst(error.item(), bound.flatten()[at].item(), fraction[at].item())


def _max_logit(inputs: AttentionInputs) -> Tensor:
    """``max |s|`` of each row over its visible keys, before a softcap."""
    assert inputs.attention_mask is not None
    key = inputs.key.repeat_interleave(inputs.query.shape[1] // inputs.key.shape[1], 1)
    s = torch.einsum("bhd,bhsd->bhs", inputs.query, key).abs() * inputs.scaling
    return torch.where(inputs.attention_mask[:, None] != 0, s, 0.0).amax((1, 2))


def _draw(case: Case) -> dict[str, Any]:
    """Arguments of ``shape_rewards`` on the CPU, the same for every backend; NaN stands in all padding."""
    (B, S, R, Hq, Hkv, D), dtype, setting = case
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    length = torch.randint((R + 1) // 2, R + 1, (B,), generator=generator)
    if setting.holes and B > 1:
        length[0] = 0
    pad = (
        torch.randint(0, S - R + 1, (B,), generator=generator)
        if setting.left_padding
        else torch.zeros(B).long()
    )
    start = pad if R == S else pad + (S - R - pad) // 2
    end = torch.maximum(start + length, pad + 1)
    keys, tokens = torch.arange(S), torch.arange(R)
    attended = (keys >= pad[:, None]) & (keys < end[:, None])
    mask = tokens < length[:, None]
    if setting.holes:
        mask &= torch.rand(B, R, generator=generator) > 0.2

    def token(x: Tensor) -> Tensor:
        return torch.where(mask, x, torch.nan)

    inputs = AttentionInputs(
        (2 * normal(B, Hq, D)).to(dtype),
        torch.where(attended[:, None, :, None], normal(B, Hkv, S, D), torch.nan).to(dtype),
        D**-0.5,
        query_position=end - 1,
        attention_mask=attended,
        softcap=setting.softcap,
        sliding_window=setting.sliding_window,
        sinks=normal(Hq) if setting.sinks else None,
    )
    logprobs = normal(B, R) - 2
    return {
        "score": normal(B),
        "credit": inputs,
        "values": token(normal(B, R)),
        "logprobs": token(logprobs),
        "ref_logprobs": token(logprobs + normal(B, R) / 4),
        "kl_coef": KL_COEF,
        "response_mask": mask,
        "response_start": start,
        "config": ShapingConfig(
            gamma=setting.gamma,
            lam=setting.lam,
            mask_semantics=setting.mask_semantics,
            kl_estimator=setting.kl_estimator,
        ),
    }


def mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument, or what holds arguments, with its tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(
            x, **{f.name: mapped(getattr(x, f.name), change) for f in dataclasses.fields(x)}
        )
    if isinstance(x, dict):
        return {name: mapped(value, change) for name, value in x.items()}
    if isinstance(x, list):
        return [mapped(value, change) for value in x]
    return x
