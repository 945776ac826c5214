"""What bad input gets: an error that names the argument, what it got and what it wants.

Shapes, dtypes and devices cost no synchronisation and are always checked. Values of index tensors are
checked only where the caller asks for it with ``validate=True``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from attnshape.config import GroupConfig, MaskLayout, Normalization, ShapingConfig, Whitening
from attnshape.config import check_choice as _check_choice
from attnshape.types import (
    KL,
    AttentionInputs,
    AttentionLayers,
    Backend,
    CreditName,
    Response,
    SignedInputs,
    TokenInputs,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
NUMBERS, WHOLE = (int, float, Tensor), (int, torch.SymInt)

CHOICES = {
    "backend": get_args(Backend),
    "normalization": get_args(Normalization),
    "variant": ("mean", "last"),
    "shift": (0, 1),
}


def check_choice(name: str, got: object) -> None:
    _check_choice(name, got, CHOICES[name])


def _is_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, want a torch.Tensor")
    return x


def _has_shape(name: str, x: Tensor, shape: Sequence[int], of: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want {tuple(shape)} = {of}")


def _is_on(name: str, x: Tensor, device: torch.device, of: str) -> None:
    if x.device != device:
        raise ValueError(f"{name}: got a tensor on {x.device}, want {device}, where {of} is")


def _has_dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got {x.dtype}, want one of {', '.join(map(str, dtypes))}")


def _fits(
    dtypes: Sequence[torch.dtype],
    name: str,
    x: object,
    shape: Sequence[int],
    of: str,
    like: Tensor,
    like_name: str,
) -> None:
    # A right argument costs one condition: every call makes a dozen of these checks.
    if isinstance(x, Tensor) and x.dtype in dtypes and x.shape == shape and x.device == like.device:
        return
    tensor = _is_tensor(name, x)
    _has_dtype(name, tensor, dtypes)
    _has_shape(name, tensor, shape, of)
    _is_on(name, tensor, like.device, like_name)


_floats = functools.partial(_fits, FLOATS)
_ints = functools.partial(_fits, INTEGERS)


def layers_of(inputs: AttentionLayers) -> Sequence[AttentionInputs]:
    """One layer or several as a sequence, checked to be that."""
    layers = [inputs] if isinstance(inputs, AttentionInputs) else inputs
    if not isinstance(layers, list | tuple) or not layers:
        raise TypeError(f"inputs: got {type(inputs).__name__}, want AttentionInputs or a list of them")
    for layer in layers:
        if not isinstance(layer, AttentionInputs):
            raise TypeError(f"inputs: got a list with {type(layer).__name__}, want AttentionInputs")
    first = layers[0]
    for i, layer in enumerate(layers):
        _check_layer(layer)
        here, there = _token_axes(layer), _token_axes(first)
        if here != there or layer.packed != first.packed:
            raise ValueError(f"inputs[{i}].key: got token axes {here}, want those of inputs[0], {there}")
    return layers


def _token_axes(layer: AttentionInputs) -> tuple[int, ...]:
    return (layer.key.shape[0],) if layer.packed else (layer.key.shape[0], layer.key.shape[2])


def _check_layer(x: AttentionInputs) -> None:
    query, key = _is_tensor("query", x.query), _is_tensor("key", x.key)
    for name, tensor in (("query", query), ("key", key)):
        _has_dtype(name, tensor, FLOATS)
    if query.dtype != key.dtype:
        raise TypeError(f"query: got {query.dtype}, want {key.dtype}, the dtype of key")
    _is_on("query", query, key.device, "key")
    if x.cu_seqlens is not None:
        _has_dtype("cu_seqlens", _is_tensor("cu_seqlens", x.cu_seqlens), (torch.int32,))
        if x.cu_seqlens.ndim != 1 or len(x.cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens: got shape {tuple(x.cu_seqlens.shape)}, want [B + 1]")
        _is_on("cu_seqlens", x.cu_seqlens, key.device, "key")
        if key.ndim != 3:
            raise ValueError(f"key: got shape {tuple(key.shape)}, want [N, Hkv, D] with cu_seqlens")
        tokens, kv_heads, width = key.shape
        wanted: tuple[int, ...] = (tokens,)
        of = "[N]"
        if query.ndim != 3 or query.shape[0] not in (x.batch_size, tokens):
            raise ValueError(
                f"query: got shape {tuple(query.shape)}, want [B, Hq, D] or [N, Hq, D] "
                f"with B = {x.batch_size}, N = {tokens}"
            )
    else:
        if key.ndim != 4:
            raise ValueError(f"key: got shape {tuple(key.shape)}, want [B, Hkv, S, D], or cu_seqlens too")
        batch, kv_heads, length, width = key.shape
        wanted, of = (batch, length), "[B, S]"
        if query.ndim not in (3, 4) or query.shape[0] != batch:
            raise ValueError(
                f"query: got shape {tuple(query.shape)}, want [B, Hq, D] or [B, Hq, S, D] with B = {batch}"
            )
        if query.ndim == 4 and query.shape[2] != length:
            raise ValueError(f"query: got {query.shape[2]} positions, want {length}, as many as key")
    heads = query.shape[1]
    if query.shape[-1] != width:
        raise ValueError(f"query: got head width {query.shape[-1]}, want {width}, that of key")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"query: got {heads} heads, want a multiple of key's {kv_heads}")
    # A tensor takes long to say that it is no string.
    position = x.query_position if isinstance(x.query_position, str) else None
    if position == "last_response" and not x.has_all_queries:
        raise ValueError(
            'query_position: got "last_response" with one query row per sequence, want every query'
        )
    batch = x.batch_size
    if x.key_start is not None:
        _ints("key_start", x.key_start, (batch,), "[B]", key, "key")
    if isinstance(x.query_position, Tensor):
        _ints("query_position", x.query_position, (batch,), "[B]", key, "key")
    elif x.query_position is not None and position != "last_response":
        raise ValueError(f'query_position: got {x.query_position!r}, want int [B], "last_response" or None')
    if x.attention_mask is not None:
        _has_shape("attention_mask", _is_tensor("attention_mask", x.attention_mask), wanted, of)
        _is_on("attention_mask", x.attention_mask, key.device, "key")
    if x.mask_row is not None:
        per_head = (*wanted, heads) if x.packed else (batch, heads, wanted[1])
        shape = per_head if _is_tensor("mask_row", x.mask_row).ndim > len(wanted) else wanted
        _floats("mask_row", x.mask_row, shape, f"{of}, or per head", key, "key")
    if x.sinks is not None:
        _floats("sinks", x.sinks, (heads,), "[Hq]", key, "key")
    if x.lse is not None:
        if x.has_all_queries:
            shape, of = (
                ((*wanted, heads), "[N, Hq]") if x.packed else ((batch, heads, wanted[1]), "[B, Hq, S]")
            )
        else:
            shape, of = (batch, heads), "[B, Hq]"
        _floats("lse", x.lse, shape, of, key, "key")
    if x.head_mask is not None:
        _has_shape("head_mask", _is_tensor("head_mask", x.head_mask), (heads,), "[Hq]")
        _is_on("head_mask", x.head_mask, key.device, "key")
    if not isinstance(x.scaling, NUMBERS):
        raise TypeError(f"scaling: got {type(x.scaling).__name__}, want a number")
    if x.softcap is not None and not isinstance(x.softcap, NUMBERS):
        raise TypeError(f"softcap: got {type(x.softcap).__name__}, want a number or None")
    if x.sliding_window is not None and not isinstance(x.sliding_window, WHOLE):
        raise TypeError(f"sliding_window: got {type(x.sliding_window).__name__}, want an int or None")
    if not math.isfinite(x.scaling):
        raise ValueError(f"scaling: got {x.scaling}, want a finite number")
    if x.softcap is not None and not x.softcap > 0:
        raise ValueError(f"softcap: got {x.softcap}, want a positive number or None")
    if x.sliding_window is not None and x.sliding_window < 1:
        raise ValueError(f"sliding_window: got {x.sliding_window}, want at least 1 or None")


def check_response(response: Response, batch: int | None, keys: Tensor | None) -> int:
    """Checks the response's layout, and its place among ``keys`` where they are given; returns the batch."""
    mask = _is_tensor("response.mask", response.mask)
    if response.cu_seqlens is None:
        if mask.ndim != 2:
            raise ValueError(
                f"response.mask: got shape {tuple(mask.shape)}, want [B, R], or [M] with response.cu_seqlens"
            )
        rows = mask.shape[0]
    else:
        cu_seqlens = _is_tensor("response.cu_seqlens", response.cu_seqlens)
        _has_dtype("response.cu_seqlens", cu_seqlens, (torch.int32,))
        _is_on("response.cu_seqlens", cu_seqlens, mask.device, "response.mask")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"response.cu_seqlens: got shape {tuple(cu_seqlens.shape)}, want [B + 1]")
        if mask.ndim != 1:
            raise ValueError(
                f"response.mask: got shape {tuple(mask.shape)}, want [M] with response.cu_seqlens"
            )
        rows = cu_seqlens.shape[0] - 1
    if batch is not None and rows != batch:
        raise ValueError(f"response.mask: got {rows} rows, want {batch}, as many as the attention inputs")
    if keys is None:
        return rows
    _is_on("response.mask", mask, keys.device, "key")
    if (response.start is None) == (response.index is None):
        given = "neither" if response.start is None else "both"
        raise ValueError(f"response.start, response.index: got {given}, want one of them")
    if response.start is not None:
        _ints("response.start", response.start, (rows,), "[B]", mask, "response.mask")
    if response.index is not None:
        of = "that of response.mask"
        _ints("response.index", response.index, mask.shape, of, mask, "response.mask")
    return rows


def check_credit(credit: Tensor | CreditName, mask: Tensor) -> None:
    if isinstance(credit, str):
        if credit not in ("uniform", "sparse"):
            raise ValueError(f'credit: got {credit!r}, want "uniform", "sparse", a tensor or AttentionInputs')
        return
    _floats("credit", credit, mask.shape, "that of response.mask", mask, "response.mask")


def check_score(score: object, batch: int, mask: Tensor) -> None:
    _floats("score", score, (batch,), "[B], one score for each row of response.mask", mask, "response.mask")


def check_tokens(tokens: TokenInputs, batch: int, mask: Tensor) -> None:
    for name in ("values", "token_rewards"):
        x = getattr(tokens, name)
        if x is not None:
            check_like_mask(name, x, mask)
    for name in ("terminal_reward", "bootstrap"):
        x = getattr(tokens, name)
        if x is not None:
            check_per_row(name, x, batch, mask)
    if tokens.kl is not None:
        _check_kl(tokens.kl, mask)


def _check_kl(kl: object, mask: Tensor) -> None:
    if not isinstance(kl, KL):
        raise TypeError(
            f"kl: got {type(kl).__name__}, want KL(logprobs, ref_logprobs, coef) or KL.given(kl, coef)"
        )
    if kl.estimate is None:
        check_like_mask("kl.logprobs", kl.logprobs, mask)
        check_like_mask("kl.ref_logprobs", kl.ref_logprobs, mask)
    elif kl.logprobs is not None or kl.ref_logprobs is not None:
        raise ValueError("kl: got an estimate beside logprobs, want one or the other")
    else:
        check_like_mask("kl.estimate", kl.estimate, mask)
    if isinstance(kl.coef, Tensor):
        _floats("kl.coef", kl.coef, (), "a 0-d tensor", mask, "response.mask")
    else:
        check_number("kl.coef", kl.coef)


def check_config(config: object, batch: int, response: Response) -> None:
    """What depends on the batch; values were checked when the config was made."""
    if not isinstance(config, ShapingConfig):
        raise TypeError(f"config: got {type(config).__name__}, want ShapingConfig")
    for name in ("lam", "lam_value"):
        x = getattr(config, name)
        if isinstance(x, Tensor):
            check_per_row(name, x, batch, response.mask)
    if config.carry_masked and response.cu_seqlens is not None:
        raise ValueError(
            "carry_masked: got True with packed tokens, want padded ones, [B, R], as verl, TRL, OpenRLHF, "
            "NeMo-RL and AReaL lay them out, whose presets set it"
        )
    if isinstance(config.score_index, Tensor):
        _ints("score_index", config.score_index, (batch,), "[B]", response.mask, "response.mask")


def check_groups(
    score: object, credit: object, group: object, weights: object, config: object, response: Response
) -> list[Any]:
    """Checks what ``group_advantages`` is given; returns one source of credit for each reward."""
    mask, batch = response.mask, response.batch_size
    if not isinstance(config, GroupConfig):
        raise TypeError(f"config: got {type(config).__name__}, want GroupConfig")
    score = _is_tensor("score", score)
    if score.ndim == 2:
        rewards = score.shape[1]
        if not isinstance(credit, list | tuple) or len(credit) != rewards:
            got = len(credit) if isinstance(credit, list | tuple) else type(credit).__name__
            raise ValueError(f"credit: got {got}, want a list of {rewards}, one for each column of score")
        _floats("score", score, (batch, rewards), "[B, K]", mask, "response.mask")
        sources = list(credit)
    else:
        check_score(score, batch, mask)
        sources = [credit]
    for k, source in enumerate(sources):
        name = f"credit[{k}]" if score.ndim == 2 else "credit"
        if isinstance(source, Tensor):
            check_like_mask(name, source, mask)
        elif source is None or (isinstance(source, str) and source == "uniform"):
            sources[k] = None
        elif isinstance(source, str):
            raise ValueError(
                f'{name}: got {source!r}, want "uniform", a tensor or AttentionInputs; the advantage '
                "of a whole completion has no token of its own"
            )
        else:
            sources[k] = layers_of(source)
            check_response(response, sources[k][0].batch_size, sources[k][0].key)
    if weights is not None:
        if score.ndim != 2:
            raise ValueError("weights: got some for one score per completion, want a score of [B, K]")
        _floats("weights", weights, (score.shape[1],), "[K], as score has columns", mask, "response.mask")
    if isinstance(group, Tensor):
        _ints("group", group, (batch,), "[B]", mask, "response.mask")
    elif not isinstance(group, int) or isinstance(group, bool):
        raise TypeError(f"group: got {type(group).__name__}, want completions per prompt, or int ids [B]")
    elif group < 1:
        raise ValueError(f"group: got {group}, want at least one completion per prompt")
    return sources


def check_process_group(process_group: object) -> None:
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: got {type(process_group).__name__}, want a ProcessGroup that this rank is in"
        )


def check_whiten(x: object, mask: object, config: object, moments: object) -> None:
    x, mask = _is_tensor("x", x), _is_tensor("response.mask", mask)
    _has_dtype("x", x, FLOATS)
    _has_shape("response.mask", mask, x.shape, "that of x")
    _is_on("response.mask", mask, x.device, "x")
    if not isinstance(config, Whitening):
        raise TypeError(
            f"config: got {type(config).__name__}, want Whitening, such as ShapingConfig().whitening"
        )
    if moments is not None:
        moments = _is_tensor("moments", moments)
        _has_dtype("moments", moments, FLOATS)
        if moments.ndim == 0 or moments.shape[-1] != 3:
            raise ValueError(f"moments: got shape {tuple(moments.shape)}, want [..., 3]")
        _is_on("moments", moments, x.device, "x")


def check_rollout_norms(layers: Sequence[AttentionInputs]) -> tuple[list[Tensor], list[Tensor]] | None:
    """The value norms and the residual norms of all layers; None where no layer has any."""
    found: dict[str, list[Tensor]] = {"value_norm": [], "residual_norm": []}
    for i, layer in enumerate(layers):
        axes, heads = _token_axes(layer), layer.query.shape[1]
        shape, of = ((*axes, heads), "[N, Hq]") if layer.packed else ((axes[0], heads, axes[1]), "[B, Hq, S]")
        wanted = {"value_norm": (shape, of), "residual_norm": (axes, "[N]" if layer.packed else "[B, S]")}
        for name, (shape, of) in wanted.items():
            norm = getattr(layer, name)
            if norm is not None:
                _floats(f"layers[{i}].{name}", norm, shape, of, layer.key, "key")
                found[name].append(norm)
    counts = {name: len(norms) for name, norms in found.items()}
    if set(counts.values()) == {0}:
        return None
    for name, count in counts.items():
        if count != len(layers):
            raise ValueError(
                f"layers: got {count} with {name}, want it for each of the {len(layers)}, or no norms"
            )
    return found["value_norm"], found["residual_norm"]


# Token tensors of `attnshape.credit` ------------------------------------------------------------------


def check_like_mask(name: str, x: object, mask: Tensor) -> None:
    _floats(name, x, _is_tensor("response.mask", mask).shape, "that of response.mask", mask, "response.mask")


def check_per_row(name: str, x: object, rows: int, mask: Tensor) -> None:
    _floats(name, x, (rows,), "[B]", mask, "response.mask")


def check_number(name: str, x: object) -> None:
    if not isinstance(x, int | float) or isinstance(x, bool):
        raise TypeError(f"{name}: got {type(x).__name__}, want a number")
    if not math.isfinite(x):
        raise ValueError(f"{name}: got {x}, want a finite number")


def check_differentiable(name: str, x: object) -> None:
    """What ``credit.gradient_weights`` differentiates by: values or embeddings."""
    x = _is_tensor(name, x)
    _has_dtype(name, x, FLOATS)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want [B, S, hidden] or [B, Hkv, S, D]")
    if not x.requires_grad:
        raise ValueError(
            f"{name}: got a tensor without gradient, want what a tap with a gradient source took"
        )


def check_signed_layers(layers: object) -> None:
    if not isinstance(layers, list | tuple) or not all(isinstance(x, SignedInputs) for x in layers):
        raise TypeError(f"layers: got {type(layers).__name__}, want a list or tuple of SignedInputs")
    if not layers:
        raise ValueError("layers: got none, want one or more")
    for i, (inputs, value, pull) in enumerate(layers):
        [layer] = layers_of(inputs)
        if not layer.has_all_queries:
            raise ValueError(f"layers[{i}].inputs: got one query row per sequence, want every query")
        heads, kv_heads = layer.query.shape[1], layer.key.shape[1]
        width = _is_tensor(f"layers[{i}].value", value).shape[-1]
        axes = _token_axes(layer)
        for name, x, n, of in (("value", value, kv_heads, "Hkv"), ("pull", pull, heads, "Hq")):
            shape = (*axes, n, width) if layer.packed else (axes[0], n, axes[1], width)
            of = f"[N, {of}, Dv]" if layer.packed else f"[B, {of}, S, Dv]"
            _floats(f"layers[{i}].{name}", x, shape, of, layer.key, "key")


# Values, with a synchronisation ----------------------------------------------------------------------


def _cu_seqlens_in_range(name: str, cu_seqlens: Tensor, total: int) -> None:
    bounds = cu_seqlens.tolist()
    for b, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        if not 0 <= lo <= hi <= total:
            raise ValueError(f"{name}: row {b} is {lo}:{hi}, want rising bounds within 0:{total}")


def _values_in_range(name: str, x: Tensor, low: int, high: Sequence[int]) -> None:
    for b, value in enumerate(x.tolist()):
        if not low <= value < high[b]:
            raise ValueError(f"{name}: row {b} is {value}, want {low} <= {name} < {high[b]}")


def validate_attention(layers: Sequence[AttentionInputs]) -> list[int]:
    """Raises where an index of the keys is out of range; returns the number of keys of each sequence."""
    lengths: list[int] = []
    for x in layers:
        if x.cu_seqlens is None:
            lengths = [x.key.shape[2]] * x.batch_size
        else:
            _cu_seqlens_in_range("cu_seqlens", x.cu_seqlens, x.key.shape[0])
            lengths = x.cu_seqlens.diff().tolist()
        if x.key_start is not None:
            _values_in_range("key_start", x.key_start, 0, [n + 1 for n in lengths])
        if isinstance(x.query_position, Tensor):
            _values_in_range("query_position", x.query_position, 0, [max(n, 1) for n in lengths])
    return lengths


def validate_response(response: Response, lengths: Sequence[int] | None, score_index: object = None) -> None:
    """Raises where a response token's key position, or ``score_index``, is out of range."""
    mask = response.mask.cpu()
    index = None if response.index is None else response.index.cpu()
    rows: Sequence[int | slice] = range(len(mask))
    if response.cu_seqlens is not None:
        _cu_seqlens_in_range("response.cu_seqlens", response.cu_seqlens, len(mask))
        rows = [slice(lo, hi) for lo, hi in itertools.pairwise(response.cu_seqlens.tolist())]
    for b, row in enumerate(rows):
        live = mask[row] != 0
        if not live.any():
            continue
        if isinstance(score_index, Tensor) and not 0 <= int(score_index[b]) < len(live):
            raise ValueError(
                f"score_index: row {b} is {int(score_index[b])}, want 0 <= score_index < {len(live)}"
            )
        if lengths is None:
            continue
        if index is not None:
            low, high = int(index[row][live].min()), int(index[row][live].max())
            if low < -1 or high >= lengths[b]:
                raise ValueError(
                    f"response.index: row {b} spans {low} to {high}, want -1 <= response.index < {lengths[b]}"
                )
        elif response.start is not None:
            start, last = int(response.start[b]), int(live.nonzero().max())
            if start < 0 or start + last >= lengths[b]:
                raise ValueError(
                    f"response.start: row {b} starts at {start} and its last unmasked token lies at "
                    f"{start + last}, want positions within 0:{lengths[b]}"
                )


def validate_config(config: ShapingConfig) -> None:
    """Raises where a lambda of a row is no share."""
    for name in ("lam", "lam_value"):
        x = getattr(config, name)
        if isinstance(x, Tensor) and not ((x >= 0) & (x <= 1)).all():
            row = int((~((x >= 0) & (x <= 1))).nonzero()[0])
            raise ValueError(f"{name}: row {row} is {x[row].item():.4g}, want numbers from 0 to 1")


def validate_credit(credit: Tensor, response: Response) -> None:
    """Raises where a weight of an unmasked token is negative."""
    negative = (credit < 0) & (response.mask != 0)
    if negative.any():
        at = tuple(negative.nonzero()[0].tolist())
        raise ValueError(
            f"credit: got {credit[at].item():.4g} at {list(at)}, want weights of 0 or more; signed ones are "
            "token_rewards, best made by attnshape.credit.centered"
        )


LAYOUTS = {
    "response": (
        "is masked",
        "the response alone, as in verl; tensors of the whole sequence are those of TRL 0.11, OpenRLHF, "
        "NeMo-RL and AReaL",
    ),
    "prefix": (
        "is masked and a later one is not",
        "every token of the response unmasked, as in slime and TRL 1.12, with the loss mask for whiten alone",
    ),
    "rolled": (
        "is unmasked",
        "masks rolled by -1, so that the last token is nobody's, as in AReaL's _compute_advantages",
    ),
}
"""What is wrong with a token, and what each ``mask_layout`` wants."""


def validate_layout(response: Response, layout: MaskLayout) -> None:
    """Raises where a row's mask belongs to another framework's layout."""
    if layout == "any":
        return
    got, want = LAYOUTS[layout]
    for b, live in enumerate(_rows_of(response)):
        if not live.any():
            continue
        if layout == "rolled":
            wrong = [len(live) - 1] if live[-1] else []
        else:
            holes = (~live).nonzero().flatten().tolist()
            wrong = [t for t in holes[:1] if (t == 0 if layout == "response" else live[t:].any())]
        if wrong:
            raise ValueError(f"response.mask: token {wrong[0]} of row {b} {got}, want {want}")


def _rows_of(response: Response) -> Iterator[Tensor]:
    """Whether each token of a row is unmasked, row after row, on the CPU."""
    live = response.mask.cpu() != 0
    if response.cu_seqlens is None:
        yield from live
    else:
        for lo, hi in itertools.pairwise(response.cu_seqlens.tolist()):
            yield live[lo:hi]
