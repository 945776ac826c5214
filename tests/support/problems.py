"""Random shaping problems: what the reference, the backends and the kernels are compared on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnshape import AttentionInputs, ShapingConfig, Status, reference, shape_rewards
from attnshape.compare import mapped
from attnshape.tolerance import credit_bound, gae_bound, kl_bound, reward_bound


def to_float64(x: Any) -> Any:
    return mapped(x, lambda t: t.double() if t.is_floating_point() else t)


def finite(x: Tensor) -> Tensor:
    """Float64, 0 where not finite: for bounds, which a NaN must not lift."""
    return torch.nan_to_num(x.double(), 0.0, 0.0, 0.0)


def log_sum_exp(query: Tensor, key: Tensor, attended: Tensor, layer: dict[str, Any]) -> Tensor:
    """Of the scores of every query, or of the last, with what it sees: ``[B, Hq, S]`` or ``[B, Hq]``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).nan_to_num(0.0)
    last = attended * torch.arange(attended.shape[1])
    position = last.amax(1, keepdim=True) if query.ndim == 3 else torch.arange(attended.shape[1])[None]
    queries = query[:, :, None] if query.ndim == 3 else query
    scores = 0.3 * queries.double() @ key.double().transpose(-1, -2)
    if layer.get("softcap"):
        scores = layer["softcap"] * torch.tanh(scores / layer["softcap"])
    distance = position[:, :, None] - torch.arange(attended.shape[1])
    visible = attended[:, None] & (distance >= 0) & (distance < (layer.get("sliding_window") or 10**6))
    lse = scores.masked_fill(~visible[:, None], float("-inf")).logsumexp(-1).float()
    return lse[:, :, 0] if query.ndim == 3 else lse


@dataclass
class Problem:
    """One call of ``shape_rewards``, as padded inputs."""

    score: Tensor
    inputs: AttentionInputs
    kwargs: dict[str, Any]
    config: ShapingConfig = field(default_factory=ShapingConfig)

    @property
    def max_score(self) -> float:
        """Bound on ``|s|``, the attention scores."""
        q, k = finite(self.inputs.query), finite(self.inputs.key)
        return float(q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * abs(self.inputs.scaling))


def make_problem(
    seed: int,
    *,
    batch: int = 3,
    keys: int = 24,
    width: int = 9,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    whole_query: bool = False,
    left_padding: bool = False,
    holes: bool = True,
    values: bool = True,
    kl: str = "logprobs",
    extras: bool = True,
    use_index: bool = False,
    attention_mask: bool = True,
    config: ShapingConfig | None = None,
    **layer: Any,
) -> Problem:
    """Padded inputs drawn from ``seed``; what stands in padding is NaN."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=g)

    key = normal(batch, keys, kv_heads, head_dim).transpose(1, 2)
    query = normal(batch, heads, keys, head_dim) * 2
    lengths = below(width + 1, batch)
    slack = keys - width
    pad = below(slack // 2 + 1, batch) if left_padding else torch.zeros(batch, dtype=torch.long)
    start = pad + below(slack // 2 + 1, batch)
    end = torch.where(lengths > 0, start + lengths, start + 1)  # keys in all
    t = torch.arange(keys)
    attended = (t >= pad[:, None]) & (t < end[:, None])
    key = key.masked_fill(~attended[:, None, :, None], float("nan"))
    j = torch.arange(width)
    mask = j < lengths[:, None]
    if holes:
        mask &= torch.rand(batch, width, generator=g) > 0.25
    position = end - 1

    def token(x: Tensor) -> Tensor:
        return torch.where(mask, x, float("nan"))

    kwargs: dict[str, Any] = {"response_mask": mask.int()}
    if use_index:
        index = start[:, None] + j
        kwargs["response_index"] = torch.where(torch.rand(batch, width, generator=g) > 0.2, index, -1)
        kwargs["response_index"][~mask] = 10**6  # never looked at
    else:
        kwargs["response_start"] = start.int()
    if values:
        kwargs["values"] = token(normal(batch, width))
    if kl == "logprobs":
        logprobs = normal(batch, width) - 2
        kwargs |= {"logprobs": token(logprobs), "ref_logprobs": token(logprobs + normal(batch, width) / 4)}
    elif kl == "kl":
        kwargs["kl"] = token(normal(batch, width).abs())
    if kl:
        kwargs["kl_coef"] = 0.125
    if extras:
        kwargs |= {
            "token_rewards": token(normal(batch, width) / 8),
            "terminal_reward": normal(batch),
            "bootstrap": normal(batch),
        }
    if layer.pop("sinks", False):
        layer["sinks"] = normal(heads)
    if layer.pop("head_mask", False):
        layer["head_mask"] = torch.rand(heads, generator=g) > 0.4
        query = query.masked_fill(~layer["head_mask"][:, None, None], float("nan"))
    if not attention_mask:
        layer |= {"key_start": pad.int(), "query_position": position.int()}
    else:
        layer["attention_mask"] = attended.long()
    row = query.transpose(1, 2)[torch.arange(batch), position]
    if whole_query and attention_mask:
        layer["query_position"] = position
    if layer.pop("lse", False):
        layer["lse"] = log_sum_exp(query if whole_query else row, key, attended, layer)
    inputs = AttentionInputs((query if whole_query else row).to(dtype), key.to(dtype), 0.3, **layer)
    return Problem(normal(batch), inputs, kwargs, config or ShapingConfig())


def distant_response(distance: float) -> Problem:
    """A prompt key outscores the response's keys by ``distance``: their weights are ``exp(-distance)``."""
    key = torch.zeros(1, 1, 5, 8)
    key[0, 0, 0, 0] = distance
    key[0, 0, 2:, 0] = torch.tensor([0.0, 0.5, -0.5])
    query = torch.zeros(1, 1, 8)
    query[..., 0] = 1.0
    kwargs = {"response_mask": torch.ones(1, 3), "response_start": torch.tensor([2])}
    return Problem(torch.ones(1), AttentionInputs(query, key, 1.0), kwargs)


def pack(problem: Problem) -> Problem:
    """The same problem with keys, queries and responses laid end to end."""
    inputs, kwargs = problem.inputs, dict(problem.kwargs)
    batch, _, keys, _ = inputs.key.shape
    cu_seqlens = (torch.arange(batch + 1) * keys).int()
    width = kwargs["response_mask"].shape[1]
    kwargs["response_cu_seqlens"] = (torch.arange(batch + 1) * width).int()
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.ndim == 2:
            kwargs[name] = x.flatten()
    query = inputs.query
    if query.ndim == 4:
        query = query.transpose(1, 2).flatten(0, 1)
    mask, lse = inputs.attention_mask, inputs.lse
    if lse is not None and lse.ndim == 3:
        lse = lse.transpose(1, 2).flatten(0, 1)
    packed = dataclasses.replace(
        inputs,
        query=query,
        key=inputs.key.transpose(1, 2).flatten(0, 1),
        attention_mask=None if mask is None else mask.flatten(),
        cu_seqlens=cu_seqlens,
        lse=lse,
    )
    return Problem(problem.score, packed, kwargs, problem.config)


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Problems over the grid of layouts, layers and settings that ``shape_rewards`` takes."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    kv_heads, group = pick(1, 2, 3), pick(1, 2, 5)
    lam = pick(1.0, 0.95, 0.3, 0.0)
    batch = draw(st.integers(1, 4))
    config = ShapingConfig(
        beta=pick(1.0, 0.8, 0.0),
        gamma=pick(1.0, 0.99, 0.5),
        lam=torch.linspace(0.5, 1.0, batch) if draw(st.booleans()) else lam,
        lam_value=pick(None, 1.0, 0.9),
        mask_semantics=pick("skip", "zero"),
        zero_masked=pick(True, True, False),
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
    return pack(problem) if config.zero_masked and draw(st.booleans()) else problem


def rows_of(x: Tensor, kwargs: dict[str, Any]) -> list[Tensor]:
    """The rows of a response tensor, padded or packed."""
    rows, _ = reference.response_rows(kwargs["response_mask"], kwargs.get("response_cu_seqlens"))
    return [x[row] for row in rows]


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
    score, inputs, kwargs, config = problem.score, problem.inputs, problem.kwargs, problem.config
    there = mapped(problem, lambda x: x.to(device))
    got = shape_rewards(there.score, there.inputs, config=there.config, backend=backend, **there.kwargs)
    got = mapped(got, lambda x: x.cpu())
    want = reference.shape_rewards(
        to_float64(score), to_float64(inputs), config=to_float64(config), **to_float64(kwargs)
    )
    assert torch.equal(got.status, want.status), f"status: {got.status} != {want.status}"
    live = kwargs["response_mask"] != 0
    log_ratio = torch.zeros(live.shape, dtype=torch.float64)
    if "logprobs" in kwargs:
        log_ratio = (kwargs["logprobs"].double() - kwargs["ref_logprobs"].double()).masked_fill(~live, 0.0)

    def rows(x: Tensor) -> list[Tensor]:
        return rows_of(x, kwargs)

    for b in range(len(score)):
        if not rows(live)[b].numel():
            continue
        credit = rows(want.credit)[b]
        weight_bound = credit_bound(credit, problem.max_score)
        assert_within("credit", rows(got.credit)[b], credit, weight_bound)
        reward = rows(want.rewards)[b]
        bound = finite(score[b]).abs() * weight_bound + reward_bound(reward, score[b])
        if want.kl is not None:
            ratio, kl = rows(log_ratio)[b], rows(want.kl)[b]
            assert_within("kl", rows(got.kl)[b], kl, kl_bound(kl, ratio))
            bound = bound + 0.125 * kl_bound(kl, ratio) + 1e-6 * finite(kl).abs()
        assert_within("rewards", rows(got.rewards)[b], reward, bound)
        for name, lam in (("advantages", config.lam), ("returns", config.lam_value)):
            lam = config.lam if lam is None else lam
            lam = lam[b].item() if isinstance(lam, Tensor) else lam
            expected = rows(getattr(want, name))[b]
            gae_error = gae_bound(expected, config.gamma, lam) + bound.sum()
            assert_within(name, rows(getattr(got, name))[b], expected, gae_error)
    for name, value in vars(want.row_stats).items():
        if value is not None:
            stat = getattr(got.row_stats, name)
            usable = want.status & int(Status.NONFINITE) == 0
            torch.testing.assert_close(
                stat[usable].double(), value[usable], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
