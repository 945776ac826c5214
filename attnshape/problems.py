"""Random shaping problems: what every path is compared on, by the tests and by ``attnshape compare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnshape.config import ShapingConfig
from attnshape.reference.layout import response_rows
from attnshape.types import KL, AttentionInputs, CreditName, Response, ShapedRewards

KL_COEF = 0.125
SCALING = 0.3


def mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument, or what holds arguments, with its tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = [f for f in dataclasses.fields(x) if f.init]
        return dataclasses.replace(x, **{f.name: mapped(getattr(x, f.name), change) for f in fields})
    if isinstance(x, dict):
        return {name: mapped(value, change) for name, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*[mapped(value, change) for value in x])
    if isinstance(x, list):
        return [mapped(value, change) for value in x]
    return x


def to_float64(x: Any) -> Any:
    return mapped(x, lambda t: t.double() if t.is_floating_point() else t)


def finite(x: Tensor) -> Tensor:
    """Float64, 0 where not finite: for bounds, which a NaN must not lift."""
    return torch.nan_to_num(x.double(), 0.0, 0.0, 0.0)


@dataclass
class Problem:
    """One call of ``shape_rewards``."""

    score: Tensor
    credit: AttentionInputs | Tensor | CreditName
    response: Response
    given: dict[str, Any] = field(default_factory=dict)
    """``values``, ``kl``, ``token_rewards``, ``terminal_reward``, ``bootstrap``, as far as there are any."""
    config: ShapingConfig = field(default_factory=ShapingConfig)

    def shaped(self, shape_rewards: Callable[..., ShapedRewards], **options: Any) -> ShapedRewards:
        given = self.given | options
        return shape_rewards(self.score, self.credit, self.response, config=self.config, **given)

    def rows(self, x: Tensor) -> list[Tensor]:
        """The rows of a response tensor, padded or packed."""
        return [x[row] for row in response_rows(self.response)[0]]

    def padded(self, x: Tensor) -> Tensor:
        """The same as ``[B, R]``, 0 past a row's end."""
        if self.response.cu_seqlens is None:
            return x
        rows = self.rows(x)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else x.new_zeros(0, 0)

    @property
    def inputs(self) -> AttentionInputs:
        assert isinstance(self.credit, AttentionInputs)
        return self.credit

    @property
    def max_score(self) -> float:
        """Bound on ``|s|``, the attention scores; 0 without attention."""
        if not isinstance(self.credit, AttentionInputs):
            return 0.0
        of_queries, of_keys = (
            finite(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)).amax()
            for x in (self.inputs.query, self.inputs.key)
        )
        return float(of_queries * of_keys * abs(self.inputs.scaling))


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
    """Padded inputs drawn from ``seed``, with rows of every length; what stands in padding is NaN."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=g)

    key = normal(batch, keys, kv_heads, head_dim).transpose(1, 2)
    query = normal(batch, heads, keys if whole_query else 1, head_dim) * 2
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

    response = Response(mask.int(), start=start.int())
    if use_index:
        index = start[:, None] + j
        index = torch.where(torch.rand(batch, width, generator=g) > 0.2, index, -1)
        index[~mask] = 10**6  # never looked at
        response = Response(mask.int(), index=index)
    given: dict[str, Any] = {}
    if values:
        given["values"] = token(normal(batch, width))
    if kl == "logprobs":
        logprobs = normal(batch, width) - 2
        given["kl"] = KL(token(logprobs), token(logprobs + normal(batch, width) / 4), KL_COEF)
    elif kl == "kl":
        given["kl"] = KL.given(token(normal(batch, width).abs()), KL_COEF)
    if extras:
        given |= {
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
    if not whole_query:
        query = query[:, :, 0]
    elif attention_mask:
        layer["query_position"] = position
    if layer.pop("lse", False):
        layer["lse"] = log_sum_exp(query, key, attended, layer)
    inputs = AttentionInputs(query.to(dtype), key.to(dtype), SCALING, **layer)
    return Problem(normal(batch), inputs, response, given, config or ShapingConfig())


def log_sum_exp(query: Tensor, key: Tensor, attended: Tensor, layer: dict[str, Any]) -> Tensor:
    """Of the scores of every query, or of the last, with what it sees: ``[B, Hq, S]`` or ``[B, Hq]``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).nan_to_num(0.0)
    last = attended * torch.arange(attended.shape[1])
    position = last.amax(1, keepdim=True) if query.ndim == 3 else torch.arange(attended.shape[1])[None]
    queries = query[:, :, None] if query.ndim == 3 else query
    scores = SCALING * queries.double() @ key.double().transpose(-1, -2)
    if layer.get("softcap"):
        scores = layer["softcap"] * torch.tanh(scores / layer["softcap"])
    distance = position[:, :, None] - torch.arange(attended.shape[1])
    visible = attended[:, None] & (distance >= 0) & (distance < (layer.get("sliding_window") or 10**6))
    lse = scores.masked_fill(~visible[:, None], float("-inf")).logsumexp(-1).float()
    return lse[:, :, 0] if query.ndim == 3 else lse


def pack(problem: Problem) -> Problem:
    """The same problem with keys, queries and responses laid end to end."""
    inputs = problem.inputs
    batch, _, keys, _ = inputs.key.shape
    cu_seqlens = (torch.arange(batch + 1) * keys).int()
    width = problem.response.mask.shape[1]

    def flat(x: Tensor) -> Tensor:
        return x.flatten() if x.ndim == 2 else x

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
    response = dataclasses.replace(
        mapped(problem.response, flat), cu_seqlens=(torch.arange(batch + 1) * width).int()
    )
    return Problem(problem.score, packed, response, mapped(problem.given, flat), problem.config)
