"""Moments of unmasked tokens over a whole batch, and whitening by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnshape.config import Whitening
from attnshape.cpu import memory
from attnshape.cpu.advantages import add_moments, moments_of
from attnshape.cpu.arithmetic import least
from attnshape.cpu.blocks import count_live, fill, load, load_mask, start_of, store
from attnshape.cpu.jit import entry, inner
from attnshape.cpu.lanes import WIDTH, fence, get, put, splat, where
from attnshape.cpu.layout import BLOCK, HELD, LIVE, REWARDS, SUM, SUM_2
from attnshape.cpu.memory import F32_PAST, KIND, counted, place_of, places_at, scratch_at
from attnshape.cpu.threads import over_rows, scratch
from attnshape.types import compute_dtype

MASK, X, OUT = range(3)
CHUNK = 1 << 14
"""Tokens that are measured together, whatever the number of threads."""
ADD, CLAMP, ADD_TO_STD = 0, 1, 2
EPS_MODES = {"add": ADD, "clamp": CLAMP, "add_to_std": ADD_TO_STD}


@inner
def chunk_of(unit: int, width: int) -> tuple[int, int, int]:
    """Row, first token and number of tokens of a chunk."""
    chunks = (width + CHUNK - 1) // CHUNK
    first = unit % chunks * CHUNK
    return unit // chunks, first, least(CHUNK, width - first)


@entry
def measure(places: Any, width: int, scratch: Any, moments: Any, low: int, high: int) -> None:
    """Count, mean and sum of squared deviations of the unmasked tokens of chunks ``low:high``."""
    places, s = places_at(places, 0), scratch_at(scratch, 0)
    put(s, SUM, splat(0.0))
    put(s, SUM_2, splat(0.0))
    for unit in range(low, high):
        row, first, length = chunk_of(unit, width)
        count, near = 0, 0.0
        for t in range(first, first + length, BLOCK):
            n = least(BLOCK, first + length - t)
            live = load_mask(places, MASK, start_of(places, MASK, row, t), n, s, LIVE)
            for j in range(n, BLOCK):
                s[LIVE + j] = 0.0
            load(places, X, start_of(places, X, row, t), n, s, REWARDS)
            if live > 0 and count == 0:
                j = 0
                while s[LIVE + j] == 0.0:
                    j += 1
                near = s[REWARDS + j]
            count += live
            add_moments(near, s, 0)
        mean, m2 = moments_of(count, near, s, 0)
        moments[unit, 0], moments[unit, 1], moments[unit, 2] = count, mean, m2


@entry
def merge(moments: Any, out: Any) -> None:
    """The moments of what ``moments``, float64 ``[n, 3]``, are moments of parts of: ``[3]``."""
    count, total, m2 = 0.0, 0.0, 0.0
    for i in range(len(moments)):
        if moments[i, 0] != 0.0:
            count += moments[i, 0]
            total += moments[i, 0] * moments[i, 1]
    mean = total / max(count, 1.0)
    for i in range(len(moments)):
        if moments[i, 0] != 0.0:
            d = moments[i, 1] - mean
            m2 += moments[i, 2] + moments[i, 0] * (d * d)
    out[0], out[1], out[2] = count, mean, m2


@entry
def apply(
    places: Any, width: int, moments: Any, bessel: bool, eps: float, eps_mode: int, shift_mean: bool,
    whiten_masked: bool, scratch: Any, low: int, high: int,
) -> None:  # fmt: skip
    """``(x - mean) * scale`` of chunks ``low:high``."""
    places, s = places_at(places, 0), scratch_at(scratch, 0)
    mean = moments[1]
    variance = moments[2] / max(moments[0] - 1.0 if bessel else moments[0], 1.0)
    if eps_mode == ADD_TO_STD:
        scale = 1.0 / (np.sqrt(variance) + eps)
    elif eps_mode == ADD:
        scale = 1.0 / np.sqrt(variance + eps)
    else:
        scale = 1.0 / np.sqrt(eps if variance < eps else variance)
    none, centre, factor, kept = splat(0.0), splat(mean), splat(scale), splat(0.0 if shift_mean else mean)
    for unit in range(low, high):
        row, first, length = chunk_of(unit, width)
        for t in range(first, first + length, BLOCK):
            n = least(BLOCK, first + length - t)
            mask, live = start_of(places, MASK, row, t), n
            if not whiten_masked:
                live = count_live(places, MASK, mask, n, s, LIVE)
            if live == 0:
                fill(places, OUT, start_of(places, OUT, row, t), n, 0.0)
                continue
            if live < n:
                load_mask(places, MASK, mask, n, s, LIVE)
            load(places, X, start_of(places, X, row, t), n, s, REWARDS)
            for j in range(0, BLOCK, WIDTH):
                x = (get(s, REWARDS + j) - centre) * factor + kept
                if live < n:
                    x = where(get(s, LIVE + j) != none, x, none)
                put(s, REWARDS + j, x)
            store(places, OUT, start_of(places, OUT, row, t), n, s, REWARDS)
    fence()


def whiten(
    x: Tensor,
    mask: Tensor,
    config: Whitening,
    moments: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    shape = (1, x.numel()) if x.ndim < 2 or not x.numel() else (-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=compute_dtype(x), device="cpu")
    tensors = [counted(mask).reshape(shape), x.reshape(shape), out.view(shape)]
    places = np.array([place_of(x) for x in tensors], np.int64)
    if out.dtype == torch.float32 and out.nbytes >= memory.PAST:
        places[OUT, KIND] = F32_PAST
    rows, width = tensors[1].shape
    units = rows * -(-width // CHUNK)
    work = min(width, CHUNK)
    folded = np.empty(3)
    if moments is None:
        of_chunks = np.empty((units, 3))

        def measured(low: int, high: int, held: object = tensors) -> None:
            measure(places, width, scratch(HELD), of_chunks, low, high)

        over_rows(measured, units, work)
    else:
        of_chunks = moments.detach().double().reshape(-1, 3).numpy()
    merge(of_chunks, folded)
    if gather is not None:
        merge(gather(torch.from_numpy(folded)).numpy(), folded)

    mode = EPS_MODES[config.eps_mode]

    def applied(low: int, high: int, held: object = tensors) -> None:
        apply(
            places, width, folded, config.bessel, config.eps, mode, config.shift_mean,
            config.whiten_masked, scratch(HELD), low, high,
        )  # fmt: skip

    over_rows(applied, units, work)
    return out
