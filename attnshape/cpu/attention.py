"""Section 2.1 of the specification: one row of attention, read from the keys where they lie.

A thread takes whole rows. Everything is counted from a row's own first visible key: the bits of a row do not
depend on its batch or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from attnshape.cpu import lanes, memory
from attnshape.cpu.arithmetic import exp, fold, log
from attnshape.cpu.blocks import fill, load, load_index, load_mask, start_of, store
from attnshape.cpu.jit import called, entry, inner
from attnshape.cpu.lanes import WIDTH, get, put, splat, where
from attnshape.cpu.layout import BLOCK, NO_BOUNDS, bounds_of, extent
from attnshape.cpu.memory import ADDRESS, ELEMENT, HEAD, KIND, TOKEN, integers_at, places_at, scratch_at
from attnshape.cpu.threads import over_rows
from attnshape.types import AttentionInputs, Response, compute_dtype

# Rows of a layer's table of places; then of the response's.
QUERY, KEY, KEY_MASK, MASK_ROW, LSE, KEY_START, POSITION = range(7)
MASK, INDEX, START, OUT = range(4)
# What a layer is, in integers and in numbers.
HEADS, KEY_HEADS, HEAD_WIDTH, LENGTH, WINDOW, CAUSAL, AT = range(7)
SCALING, SOFTCAP = range(2)
LAST_VISIBLE, GIVEN, LAST_RESPONSE = range(3)  # AT

TILE = 64
"""Keys that all queries of their head are multiplied with before the next: as many as a near cache holds."""
NONE_VISIBLE, LOST = -1, -2
WORK = 1 << 6
"""Products of a query's and a key's element that take about as long as a token of the loop over rows."""
Array: TypeAlias = Any
NO_SINKS, NO_INDICES = np.empty(0), np.empty(0, np.int64)


# A row --------------------------------------------------------------------------------------------------


@inner
def head_of(places: Any, name: int, row: int, head: int, token: int) -> Any:
    """Index of a token's first element of a head."""
    return start_of(places, name, row, token) + head * places[name, HEAD]


@called
def visible_keys(
    places: Any, layer: Any, b: int, base: int, length: int, last_response: int, s: Any
) -> tuple[int, int, int]:
    """Position of the query, first visible key and the one after the last; ``s[t]`` is 1 where it is visible.

    The position is ``LOST`` where an index is out of range, ``NONE_VISIBLE`` where there is nothing to see.
    """
    start = 0 if places[KEY_START, ADDRESS] == 0 else load_index(places, KEY_START, 0, b)
    if not 0 <= start <= length:
        return LOST, 0, 0
    if places[KEY_MASK, ADDRESS] != 0:
        load_mask(places, KEY_MASK, start_of(places, KEY_MASK, b, base), length, s, 0)
    else:
        for t in range(length):
            s[t] = 1.0
    if layer[AT] == GIVEN:
        p = load_index(places, POSITION, 0, b)
    elif layer[AT] == LAST_RESPONSE:
        p = last_response
    else:
        p = length - 1
        while p > 0 and (s[p] == 0.0 or p < start):
            p -= 1
        p = max(p, 0)
    if length == 0:
        return NONE_VISIBLE, 0, 0
    if not 0 <= p < length:
        return LOST, 0, 0
    first, end = start, length
    if layer[CAUSAL] != 0:
        end = p + 1
    if layer[WINDOW] > 0:
        first, end = max(first, p - layer[WINDOW] + 1), min(end, p + layer[WINDOW])
    while first < end and s[first] == 0.0:
        first += 1
    while first < end and s[end - 1] == 0.0:
        end -= 1
    return (p if first < end else NONE_VISIBLE), first, end


@called
def dots_of(
    places: Any, count: int, width: int, key: int, scaling: float, first: int, end: int, queries: int,
    tile: int, s: Any, o: int, apart: int,
) -> None:  # fmt: skip
    """``s[o + h * apart + t]``: scaled products of ``count`` queries with the keys ``first:end``.

    Args:
        width: of a head, made up to whole lanes where the queries stand.
        key: index of the element where the head's keys begin.
        tile: memory for ``TILE`` keys.
    """
    keys, kind, step = places[KEY, ADDRESS], places[KEY, KIND], places[KEY, TOKEN]
    padded = width + -width % lanes.LANES
    copied = width != padded or places[KEY, ELEMENT] != 1
    size = padded * (8 if kind == memory.F64 else 4)
    if copied and kind != memory.F64:
        kind = memory.F32
    for t in range(first, end, TILE):
        n, k = min(TILE, end - t), key + t * step
        if copied:
            for j in range(n):
                memory.widened(places, KEY, k + j * step, width, padded, tile + j * size)
        at, i, between = (tile, 0, padded) if copied else (keys, k, step)
        to = o + t
        if kind == memory.BF16:
            lanes.products_bf16(queries, padded, count, at, i, between, n, padded, scaling, s, to, apart)
        elif kind == memory.F32:
            lanes.products_f32(queries, padded, count, at, i, between, n, padded, scaling, s, to, apart)
        elif kind == memory.F16:
            lanes.products_f16(queries, padded, count, at, i, between, n, padded, scaling, s, to, apart)
        else:
            lanes.products_f64(queries, padded, count, at, i, between, n, padded, scaling, s, to, apart)


@called
def softcapped(cap: float, first: int, end: int, s: Any, o: int) -> None:
    """``cap * tanh(x / cap)``."""
    for t in range(first, end):
        s[o + t] = cap - 2.0 * cap / (exp(2.0 * (s[o + t] / cap)) + 1.0)


@inner
def exponentials(shift: float, first: int, end: int, s: Any, x: int) -> None:
    for t in range(first, end + -(end - first) % WIDTH):
        s[x + t] = exp(s[x + t] - shift)


@inner
def highest_score(first: int, end: int, s: Any, seen: int, x: int, sums: int) -> Any:
    """The highest score that is seen, NaN left out; the others become ``-inf``."""
    none, lowest = splat(0.0), splat(-np.inf)
    best = lowest
    for t in range(first, end, WIDTH):
        score = where(get(s, seen + t) != none, get(s, x + t), lowest)
        put(s, x + t, score)
        best = where(best < score, score, best)
    put(s, sums, best)
    top = -np.inf
    for j in range(WIDTH):
        top = max(top, s[sums + j])
    return top


@inner
def total_of(first: int, end: int, s: Any, x: int, sums: int) -> Any:
    total = splat(0.0)
    for t in range(first, end, WIDTH):
        total = total + get(s, x + t)
    put(s, sums, total)
    return fold(WIDTH, s, sums)


@inner
def add_weights(factor: float, first: int, end: int, s: Any, seen: int, x: int, out: Any, o: int) -> None:
    none, share = splat(0.0), splat(factor)
    for t in range(first, end, WIDTH):
        weight = where(get(s, seen + t) != none, get(s, x + t) * share, none)
        put(out, o + t, get(out, o + t) + weight)


@called
def log_add_exp(x: float, y: float) -> float:
    top = x if x > y else y
    if top == -np.inf or x != x or y != y:
        return x + y
    return top + log(exp(x - top) + exp(y - top))


@called
def attend_row(
    places: Any, layer: Any, numbers: Any, heads: Any, sinks: Any, b: int, base: int, p: int, first: int,
    end: int, queries: int, tile: int, s: Any, out: Any, o: int, share: float,
) -> None:  # fmt: skip
    """Adds ``share`` times the mean over heads of the attention row to ``out[o + t]``."""
    apart, width = layer[LENGTH] + WIDTH, layer[HEAD_WIDTH]  # eight numbers at once may go past the end
    padded, size = width + -width % lanes.LANES, 8 if places[KEY, KIND] == memory.F64 else 4
    seen_by_head, sums, scores = apart, 2 * apart, 2 * apart + BLOCK
    group, done = layer[HEADS] // layer[KEY_HEADS], 0
    mask_kind = places[MASK_ROW, ADDRESS] != 0
    share = share / max(len(heads), 1)
    while done < len(heads):
        g = heads[done] // group
        count = 0
        while done + count < len(heads) and heads[done + count] // group == g:
            h = heads[done + count]
            q = head_of(places, QUERY, b, h, base + p)
            memory.widened(places, QUERY, q, width, padded, queries + count * padded * size)
            count += 1
        key = head_of(places, KEY, b, g, base)
        dots_of(places, count, width, key, numbers[SCALING], first, end, queries, tile, s, scores, apart)
        for i in range(count):
            h, x, seen = heads[done + i], scores + i * apart, 0
            if numbers[SOFTCAP] > 0.0:
                softcapped(numbers[SOFTCAP], first, end, s, x)
            if mask_kind:
                seen = seen_by_head
                at = head_of(places, MASK_ROW, b, h, base + first)
                load(places, MASK_ROW, at, end - first, s, seen + first)
                for t in range(first, end):
                    hidden = s[seen + t] == -np.inf
                    s[x + t] += s[seen + t]
                    s[seen + t] = 0.0 if hidden else s[t]
                for t in range(end, end + WIDTH):
                    s[seen + t] = 0.0
            factor = share
            if places[LSE, ADDRESS] != 0:
                load(places, LSE, head_of(places, LSE, b, h, base + p), 1, s, sums)
                lse = s[sums] if len(sinks) == 0 else log_add_exp(s[sums], sinks[h])
                exponentials(lse, first, end, s, x)
            else:
                sink = -np.inf if len(sinks) == 0 else sinks[h]
                top = max(sink, highest_score(first, end, s, seen, x, sums))
                exponentials(top, first, end, s, x)
                total = total_of(first, end, s, x, sums)
                factor = share / (total if sink == -np.inf else total + exp(sink - top))
            add_weights(factor, first, end, s, seen, x, out, o)
        done += count


@entry
def attend(
    places: Any, bounds: Any, lost: Any, layer: Any, numbers: Any, heads: Any, sinks: Any, last: Any,
    share: float, scratch: Any, typed: Any, means: Any, low: int, high: int,
) -> None:  # fmt: skip
    """Adds ``share`` times a layer's head mean of rows ``low:high`` to ``means``; notes rows that are lost.

    Args:
        places: int64 ``[7, 6]``, by the names above.
        bounds, lost: see ``rows.sweep``; ``lost`` of all rows.
        heads: those that count, int64. sinks: float64 ``[Hq]``, or ``[0]``. last: int64 ``[B]``, or ``[0]``.
        scratch: room for ``[2 + group, S + WIDTH] + BLOCK`` numbers. typed: bytes for ``group + TILE`` heads.
        means: float64 ``[high - low, S]``, flat, and ``WIDTH`` more.
    """
    s, out, places = scratch_at(scratch, 0), scratch_at(means, 0), places_at(places, 0)
    layer, numbers = integers_at(layer, 0), scratch_at(numbers, 0)
    tile = typed.ctypes.data
    queries = tile + 8 * TILE * (layer[HEAD_WIDTH] + lanes.LANES)
    for b in range(low, high):
        base, length = extent(bounds, b, layer[LENGTH])
        p, first, end = visible_keys(places, layer, b, base, length, last[b] if len(last) > 0 else -1, s)
        if p == LOST:
            lost[b] = 1
        if p >= 0 and lost[b] == 0:
            for t in range(end, end + WIDTH):
                s[t] = 0.0
            attend_row(
                places, layer, numbers, heads, sinks, b, base, p, first, end, queries, tile, s, out,
                (b - low) * layer[LENGTH], share,
            )  # fmt: skip


# What becomes of the rows -------------------------------------------------------------------------------


@entry
def write_rows(places: Any, bounds: Any, lost: Any, length: int, means: Any, low: int, high: int) -> None:
    """Rows ``low:high`` to the output; NaN where lost."""
    s, places = scratch_at(means, 0), places_at(places, 0)
    for b in range(low, high):
        base, n = extent(bounds, b, length)
        at = start_of(places, OUT, b, base)
        if lost[b] != 0:
            fill(places, OUT, at, n, np.nan)
        else:
            store(places, OUT, at, n, s, (b - low) * length)


@inner
def key_of(places: Any, b: int, base: int, t: int) -> Any:
    """Key position of a response token."""
    if places[INDEX, ADDRESS] != 0:
        return load_index(places, INDEX, b, base + t)
    return load_index(places, START, 0, b) + t


@entry
def write_responses(
    places: Any, bounds: Any, of_keys: Any, lost: Any, length: int, keys: int, means: Any, scratch: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """Weights of response tokens, 0 where masked or without a key; notes rows that point outside their keys.

    Args:
        bounds: of the packed response; of_keys: of the packed keys.
        length: tokens of a padded response; keys: padded ones.
    """
    s, out, places = scratch_at(scratch, 0), scratch_at(means, 0), places_at(places, 0)
    lowest = -1 if places[INDEX, ADDRESS] != 0 else 0
    for b in range(low, high):
        base, n = extent(bounds, b, length)
        _, limit = extent(of_keys, b, keys)
        outside, any_live = False, False
        for t in range(0, n, BLOCK):
            m = min(BLOCK, n - t)
            load_mask(places, MASK, start_of(places, MASK, b, base + t), m, s, 0)
            for j in range(m):
                x = 0.0
                if s[j] != 0.0:
                    any_live = True
                    k = key_of(places, b, base, t + j)
                    outside |= k < lowest or k >= limit
                    if 0 <= k < limit:
                        x = out[(b - low) * keys + k]
                s[BLOCK + j] = x
            store(places, OUT, start_of(places, OUT, b, base + t), m, s, BLOCK)
        lost[b] = any_live and (outside or lost[b] != 0)


@entry
def last_keys(places: Any, bounds: Any, length: int, scratch: Any, out: Any) -> None:
    """Key position of each row's last unmasked response token, -1 where there is none."""
    s, places = scratch_at(scratch, 0), places_at(places, 0)
    for b in range(len(out)):
        base, n = extent(bounds, b, length)
        out[b] = -1
        for i in range(n):
            t = n - 1 - i
            if load_mask(places, MASK, start_of(places, MASK, b, base + t), 1, s, 0) != 0:
                out[b] = key_of(places, b, base, t)
                break


# What the loops are told --------------------------------------------------------------------------------


class Layer:
    """One layer as the loop takes it."""

    def __init__(self, x: AttentionInputs) -> None:
        mask = None if x.attention_mask is None else memory.counted(x.attention_mask)
        given = x.query_position if isinstance(x.query_position, Tensor) else None
        self.held = (x, mask)
        tokens, whole, masked = ("T", "THD", "TH") if x.packed else ("BT", "BHTD", "BHT")
        query = whole if x.has_all_queries else "BHD"
        row = x.mask_row
        self.places = np.array(
            [
                memory.place_along(x.query, query),
                memory.place_along(x.key, whole),
                memory.place_along(mask, tokens),
                memory.place_along(row, tokens if row is None or row.ndim == len(tokens) else masked),
                memory.place_along(x.lse, query[:-1]),
                memory.place_along(x.key_start, "T"),
                memory.place_along(given, "T"),
            ],
            np.int64,
        )
        heads, self.width = x.query.shape[1], x.key.shape[-1]
        self.keys = x.key.shape[whole.index("T")]
        self.group = heads // x.key.shape[1]
        at = GIVEN if given is not None else LAST_VISIBLE if x.query_position is None else LAST_RESPONSE
        self.choices = np.array(
            [heads, x.key.shape[1], self.width, self.keys, x.sliding_window or 0, x.causal, at], np.int64
        )
        self.numbers = np.array([x.scaling, x.softcap or 0.0])
        self.heads = np.arange(heads) if x.head_mask is None else (x.head_mask != 0).numpy().nonzero()[0]
        self.sinks = NO_SINKS if x.sinks is None else x.sinks.detach().double().numpy()
        self.bounds, self.lost = NO_BOUNDS, np.zeros(x.batch_size, np.uint8)
        if x.cu_seqlens is not None:
            self.bounds, self.lost = bounds_of(x.cu_seqlens, self.keys)
            self.keys = int(self.bounds[:, 1].max(initial=0))
            self.choices[LENGTH] = self.keys

    def attend(self, lost: Array, last: Array, share: float, means: Array, low: int, high: int) -> None:
        scratch = np.empty((2 + self.group) * (self.keys + lanes.WIDTH) + BLOCK)
        typed = np.empty(8 * (self.group + TILE) * (self.width + lanes.LANES), np.uint8)
        attend(
            self.places, self.bounds, lost, self.choices, self.numbers, self.heads, self.sinks, last, share,
            scratch, typed, means, low, high,
        )  # fmt: skip


def _over_rows(layers: Sequence[Layer], last: Array, finish: Any) -> Array:
    """``finish(lost, means, low, high)`` of all rows; the rows that are lost."""
    first = layers[0]
    batch, keys = len(first.lost), first.keys
    lost = np.bitwise_or.reduce([layer.lost for layer in layers])

    def compute(low: int, high: int) -> None:
        means = np.zeros((high - low) * keys + lanes.WIDTH)
        for layer in layers:
            layer.attend(lost, last, 1.0 / len(layers), means, low, high)
        finish(lost, means, low, high)

    work = sum(keys * layer.choices[HEADS] * layer.width for layer in layers) // WORK
    over_rows(compute, batch, work)
    return lost


def attention_row(inputs: Sequence[AttentionInputs]) -> Tensor:
    first = inputs[0]
    dtype, layers = compute_dtype(*[x.key for x in inputs]), [Layer(x) for x in inputs]
    shape = first.key.shape[:1] if first.packed else (first.key.shape[0], first.key.shape[2])
    out = (torch.zeros if first.packed else torch.empty)(shape, dtype=dtype, device="cpu")
    places = np.array([memory.place_of(out)] * (OUT + 1), np.int64)  # the others are not looked at

    def finish(lost: Array, means: Array, low: int, high: int, held: object = out) -> None:
        write_rows(places, layers[0].bounds, lost, layers[0].keys, means, low, high)

    _over_rows(layers, NO_INDICES, finish)
    return out


def raw_credit(inputs: Sequence[AttentionInputs], response: Response, bounds: Array, out: Tensor) -> Array:
    """Writes the attention row at the response tokens to ``out``; rows out of range, uint8 ``[B]``."""
    layers = [Layer(x) for x in inputs]
    mask = memory.counted(response.mask)
    held = (mask, response.index, response.start, out)
    tokens = "BT" if mask.ndim == 2 else "T"
    axes = (tokens, tokens, "T", tokens)
    places = np.array([memory.place_along(x, of) for x, of in zip(held, axes, strict=True)], np.int64)
    width = mask.shape[-1]
    last = NO_INDICES
    if any(isinstance(x.query_position, str) for x in inputs):
        last = np.empty(inputs[0].batch_size, np.int64)
        last_keys(places, bounds, width, np.empty(1), last)

    def finish(lost: Array, means: Array, low: int, high: int, held: object = held) -> None:
        scratch = np.empty(2 * BLOCK)
        write_responses(
            places, bounds, layers[0].bounds, lost, width, layers[0].keys, means, scratch, low, high
        )

    return _over_rows(layers, last, finish)
