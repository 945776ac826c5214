"""The presets on drawn cases, and what they and the frameworks owe the formulas in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from parity import groups
from parity.cases import Case
from parity.formulas import FORMULAS, Outputs, to_float64
from torch import Tensor

import attnshape
from attnshape import KL, Response, ShapingConfig
from attnshape.problems import mapped

FLOAT32 = 2.0**-24
"""Half a unit in the last place: what rounding a result to float32 costs."""
SAME_FUNCTION = 1e-4
"""Of the largest output: beyond this a framework does not compute the formula at all."""


def preset(framework: str, case: Case) -> tuple[ShapingConfig, dict[str, Any], Tensor]:
    """A framework's settings as a user writes them: the config, arguments, and the mask for ``whiten``."""
    s, x = case.settings, case.inputs
    options = {name: s[name] for name in ("gamma", "lam", "kl_estimator") if name in s}
    logprobs, ref_logprobs = x["logprobs"], x["ref_logprobs"]
    arguments: dict[str, Any] = {"score": x["score"], "values": x["values"]}
    mask = whiten_mask = x["mask"]
    if framework == "verl":
        config = ShapingConfig.verl(score_index=x["attended"].sum(1) - 1, **options)
    elif framework == "trl-0.9.6":
        config = ShapingConfig.trl(**options)
    elif framework == "trl-1.12.0":
        config = ShapingConfig.trl(version="1.12", **options)
        length = mask.sum(1, keepdim=True)
        mask = torch.arange(mask.shape[1]) <= length
        logprobs, ref_logprobs = (torch.where(whiten_mask, each, 1.0) for each in (logprobs, ref_logprobs))
    elif framework == "openrlhf":
        config = ShapingConfig.openrlhf(**options)
    elif framework == "slime":
        config = ShapingConfig.slime(**options)
        mask = x["attended"]
    elif framework == "nemo_rl":
        if s["alpha"]:
            options["lam"] = (1 - 1 / (s["alpha"] * mask.sum(1)).clamp(min=1)).clamp(0, 1)
        lam_value = s["lam"] if s["lam_value"] is None else s["lam_value"]
        config = ShapingConfig.nemo_rl(lam_value=lam_value, **options)
    else:
        length, width = x["attended"].sum(1), mask.shape[1]
        config = ShapingConfig.areal(score_index=(length - 2).clamp(min=0), **options)
        mask = whiten_mask = mask.roll(-1, 1)
        logprobs = logprobs.roll(-1, 1)
        arguments["bootstrap"] = torch.where(length == width, x["values"][:, -1], 0.0)
    arguments |= {"response": Response(mask), "kl": KL(logprobs, ref_logprobs, s["kl_coef"])}
    return config, arguments, whiten_mask


def ours(framework: str, case: Case, **options: Any) -> Outputs:
    """What attnshape gives with ABC off. ``options``: of every call, such as ``backend``."""
    s, x = case.settings, case.inputs
    if framework in groups.FORMULAS:
        return groups.ours(framework, case, **options)
    if framework == "torchrl":
        whole = torch.ones_like(x["values"])
        config = ShapingConfig(gamma=s["gamma"], lam=s["lam"], mask_semantics="zero")
        advantages, returns, _ = attnshape.gae(x["rewards"], x["values"], whole, config, **options)
        return {"advantages": advantages, "returns": returns}
    config, arguments, whiten_mask = preset(framework, case)
    score = arguments.pop("score")
    if framework == "slime":  # its tokens are a list of rows: packed, there is no padding
        inside = arguments["response"].mask
        lengths = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0)).int()
        arguments = mapped(arguments, lambda x: x[inside])
        arguments["response"] = dataclasses.replace(arguments["response"], cu_seqlens=lengths)
        whiten_mask = whiten_mask[inside]
    out = attnshape.shape_rewards(score, "sparse", **arguments, config=config, validate=True, **options)
    rewards, advantages, returns = out.rewards, out.advantages, out.returns
    if s.get("whiten_rewards"):
        mask, values = arguments["response"].mask, arguments["values"]
        keeping_mean = dataclasses.replace(config.whitening, shift_mean=False)
        white = attnshape.whiten(rewards, mask, keeping_mean, **options)
        if framework == "trl-0.9.6":  # masked tokens are steps with the whitened reward
            mask, values = torch.ones_like(mask), torch.where(mask, values, 0.0)
        advantages, returns, _ = attnshape.gae(white, values, mask, config, **options)
        rewards = white if framework == "trl-1.12.0" else rewards  # which one TRL keeps
    whitened = attnshape.whiten(advantages, whiten_mask, config.whitening, **options)
    outputs = {"rewards": rewards, "advantages": advantages, "returns": returns, "whitened": whitened}
    if framework == "slime":
        outputs = {
            name: torch.zeros(inside.shape).masked_scatter(inside, x.cpu()) for name, x in outputs.items()
        }
    return outputs


Errors = dict[str, tuple[float, float]]


def errors(framework: str, case: Case, theirs: Outputs, **options: Any) -> Errors:
    """Per output, of its largest value: the framework's largest error against the formula, and ours.

    Rewards count at unmasked tokens. Raises where the framework does not compute the formula at all.
    """
    exact = (groups.FORMULAS.get(framework) or FORMULAS[framework])(case.settings, to_float64(case.inputs))
    mine = ours(framework, case, **options)
    out = {}
    for name, other in theirs.items():
        want, got, other = exact[name], mine[name].double().cpu(), other.double()
        if name == "rewards":
            live = preset(framework, case)[1]["response"].mask != 0
            want, got, other = want[live], got[live], other[live]
        size = want.abs().max()
        error, our_error = ((x - want).abs().max().item() / size.item() for x in (other, got))
        if not error <= SAME_FUNCTION:
            raise AssertionError(f"{framework}, {name}: off by {error:.3g}, not the formula: {case.settings}")
        out[name] = (error, our_error if math.isfinite(our_error) else math.inf)
    return out


def worst(found: Sequence[Errors]) -> Errors:
    """The largest over cases."""
    return {name: tuple(max(x[name][i] for x in found) for i in (0, 1)) for name in found[0]}


def excess(errors: Errors) -> list[str]:
    """Outputs where ours is more than twice the framework's, or than the rounding of the result."""
    return [name for name, (theirs, ours) in errors.items() if not ours <= 2 * max(theirs, FLOAT32)]
