"""Attention rows of requests that are done, in one call per step, and whether they are the engine's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnshape.integrations.vllm.pages import as_bytes, keys_and_values, tokens_of
from attnshape.ops import attention_row
from attnshape.tap import check
from attnshape.tolerance import credit_bound, error_fraction, output_bound
from attnshape.types import AttentionInputs
from attnshape.vectorized.attention import attend, padded_layer

MOST_TOKENS = 1 << 16
"""Gathered at once, so that memory stays bounded however much of the prompts was cached."""


class Layer(NamedTuple):
    """The attention layer that is read, as the engine computes it."""

    name: str
    scaling: float
    softcap: float | None = None
    window: int | None = None
    """Keys that a query sees, itself included."""
    sinks: Tensor | None = None
    """``[Hq]``."""
    transposed: bool = False
    """As in ``keys_and_values``."""
    quantised: torch.dtype | None = None
    """Of keys and values in the cache, which then are to be multiplied by their scales."""
    key_scale: float = 1.0
    value_scale: float = 1.0
    query_scale: float = 1.0


@dataclass
class Step:
    """What the layer was called with in one forward, at the last token of each request."""

    query: Tensor
    """``[requests, Hq, D]``."""
    output: Tensor
    """The attention's, ``[requests, Hq, D]``."""
    cache: Tensor
    """``[blocks, Hkv, tokens, 2 D]``."""
    table: Tensor
    """Blocks of each request, int ``[requests, blocks]``."""


@torch.no_grad()
def rows_of(
    layer: Layer, step: Step, requests: Sequence[int], lengths: Sequence[int], checked: Sequence[int]
) -> tuple[Tensor, str | None]:
    """Mean over this process' heads of what the last token of each request attends to.

    Args:
        requests: of ``step``; with the tokens of each, ``lengths``.
        checked: indices in ``requests`` of those that are held against the engine's output.

    Returns:
        float32 ``[sum(lengths)]``; and what is wrong with the first row that is wrong, as a sentence.
    """
    parts, wrong = [], None
    start = 0
    while start < len(requests):
        end, tokens = start, 0
        while end < len(requests) and (end == start or tokens + lengths[end] <= MOST_TOKENS):
            tokens += lengths[end]
            end += 1
        due = [i - start for i in checked if start <= i < end]
        rows, found = _batch(layer, step, requests[start:end], lengths[start:end], due)
        parts.append(rows)
        wrong, start = wrong or found, end
    return torch.cat(parts), wrong


def _batch(
    layer: Layer, step: Step, requests: Sequence[int], lengths: Sequence[int], checked: Sequence[int]
) -> tuple[Tensor, str | None]:
    # Blocks that left the window may hold another request's keys by now.
    first = [0 if layer.window is None else max(0, n - layer.window) for n in lengths]
    keys, values = keys_and_values(step.cache, transposed=layer.transposed)
    tokens = tokens_of(step.table, requests, first, lengths, keys.shape[2])
    index = torch.tensor(requests).to(step.query.device, non_blocking=True)
    query = as_bytes(step.query)[index].view(step.query.dtype)
    if query.element_size() == 1:
        query = query.float() * layer.query_scale
    key = tokens.of(keys)
    if layer.quantised is not None:
        key = key.view(layer.quantised)
    inputs = AttentionInputs(
        query,
        key.to(query.dtype),
        layer.scaling * (1.0 if layer.quantised is None else layer.key_scale),
        softcap=layer.softcap,
        sinks=layer.sinks,
        cu_seqlens=tokens.cu_seqlens,
    )
    seen = attention_row(inputs)
    wrong = None
    for i in checked:
        low = sum(n - f for n, f in zip(lengths[:i], first[:i], strict=True))
        own = slice(low, low + lengths[i] - first[i])
        value = tokens._replace(block=tokens.block[own], offset=tokens.offset[own]).of(values)
        wrong = wrong or _failure(layer, inputs, i, own, value, seen[own], step.output[requests[i]])
    if not any(first):
        return seen, wrong
    parts = torch.split(seen, [n - f for n, f in zip(lengths, first, strict=True)])
    return torch.cat([x for f, row in zip(first, parts, strict=True) for x in (row.new_zeros(f), row)]), wrong


def _failure(
    layer: Layer, inputs: AttentionInputs, i: int, own: slice, value: Tensor, row: Tensor, output: Tensor
) -> str | None:
    """What is wrong with the row of request ``i``, by the engine's output and by its own heads."""
    length = own.stop - own.start
    alone = AttentionInputs(
        inputs.query[i : i + 1],
        inputs.key[own].transpose(0, 1)[None],
        inputs.scaling,
        softcap=inputs.softcap,
        sinks=inputs.sinks,
    )
    last = torch.tensor([[length - 1]], device=row.device)
    weights = attend(padded_layer(alone), last)  # [1, Hq, 1, S]
    output = output[None, :, None]
    if layer.quantised is not None:
        value, output = value.view(layer.quantised), output / layer.value_scale
    wrong = check.failure(layer.name, weights, value.transpose(0, 1)[None], output)
    if wrong:
        return wrong
    mean = weights[0, :, 0].mean(0)
    longest_query, longest_key = (x.float().norm(dim=-1).max() for x in (inputs.query[i], inputs.key[own]))
    bound = credit_bound(mean, inputs.scaling * float(longest_query * longest_key))
    # The heads are torch's products, of fewer bits where it was told so.
    bound = bound + output_bound(row.device, row.dtype) * mean.to(bound)
    apart = error_fraction(row, mean, bound).max()
    if apart <= 1:
        return None
    return f"{layer.name}: the row is {apart:.2g} times the bound off the mean of its heads"
