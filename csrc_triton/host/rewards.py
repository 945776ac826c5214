"""From credit, or queries and keys, to rewards, advantages and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from csrc_triton.advantages import DOUBLES, FLAGS, INTS
from csrc_triton.host import attention
from csrc_triton.host.attention import (
    LayerInputs,
    ResponseInputs,
    average,
    chunks_of,
    layer_arguments,
    positions_of,
)
from csrc_triton.launch import COUNTERS, ceil_div, contiguous, processors, row_stride, tokens

Output = Literal["rewards", "advantages", "returns", "credit", "kl", "status", "stats", "moments"]


class Shaped(NamedTuple):
    """What was asked for; the rest is None. ``[B, R]`` (packed ``[M]``) float32."""

    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    credit: Tensor | None = None
    kl: Tensor | None = None
    status: Tensor | None = None
    """int32 ``[B]``, bits as in ``csrc_triton.device.layout``."""
    stats: Tensor | None = None
    """float32 ``[B, 4]``: entropy of the credit (nats), its share on the last unmasked token, raw mass, and
    ``|sum of the redistributed score - score|``."""
    moments: Tensor | None = None
    """float32 ``[B, 3]``: unmasked tokens, mean and sum of squared deviations of their advantages; of their
    rewards where no advantages are asked for."""


def sweep(
    response: ResponseInputs,
    outputs: Sequence[Output],
    *,
    score: Tensor | None = None,
    credit: Tensor | Sequence[LayerInputs] | Literal["uniform", "sparse"] | None = None,
    normalization: Literal["sum_to_one", "sum_to_length", "none"] = "sum_to_one",
    row_status: Tensor | None = None,
    score_index: Tensor | Literal["last_unmasked", "last_token"] = "last_unmasked",
    dense_share: float = 1.0,
    even: bool = False,
    score_bounds: tuple[float, float] = (-math.inf, math.inf),
    terminal_reward: Tensor | None = None,
    token_rewards: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1",
    kl_input_clip: float | None = None,
    kl_output_clip: float | None = None,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    gl: float | Tensor = 1.0,
    gl_value: float | Tensor | None = None,
    skip_masked: bool = True,
    zero_nonfinite: bool = False,
    min_mass: float,
) -> Shaped:
    """From credit to rewards, advantages and returns; ``outputs`` names what is wanted (KL: if there is any).

    One launch; two where credit is attention and responses are longer than ``ONE_LAUNCH``. As many again for
    each further layer, and one for a layer whose visible keys follow from a mask.

    Args:
        response: its tokens. Other inputs per token have the shape of its mask, inputs per row are ``[B]``;
            any floating dtype. ``start`` or ``index`` where credit is attention.
        credit: raw weights, or layers: the attention at the response tokens, averaged over heads and layers.
            None where nothing is redistributed; it must be given where ``score`` is.
        even: the score is each token's, ``score * (dense_share * n * credit + 1 - dense_share)`` of ``n``
            unmasked tokens, with credit that sums to one; a row that falls back is uniform, not sparse.
        row_status: int32 ``[B]``; a row that has one is out of range, unless all its tokens are masked.
        gl: ``gamma * lam``, a float or float32 ``[B]``; ignored without ``values``.
        gl_value: the same for the returns, where it differs.
        skip_masked: a masked token is the identity, not a step with reward and value 0.
        zero_nonfinite: a row with a non-finite output becomes 0.
        min_mass: credit that sums to less falls back to one-hot at the score's token.
    """
    mask, cu = response.mask, response.cu_seqlens
    batch, width = mask.shape if cu is None else (cu.shape[0] - 1, mask.shape[0])
    device = mask.device
    weights = credit if isinstance(credit, Tensor) else None
    layers = None if credit is None or isinstance(credit, Tensor | str) else credit
    estimator: str | None = None if logprobs is None else kl_estimator
    if kl is not None:
        estimator = "given"
    out: dict[str, Tensor] = {}
    for name in outputs if layers is None else ("credit", *outputs):
        if name == "kl" and estimator is None:
            continue
        if name == "status":
            out[name] = torch.empty(batch, dtype=torch.int32, device=device)
        elif name in PER_ROW:
            out[name] = torch.empty(batch, PER_ROW[name], dtype=torch.float32, device=device)
        else:
            out[name] = torch.empty(mask.shape, dtype=torch.float32, device=device)
    shaped = Shaped(**out)
    if batch == 0:
        # Tokens of no row.
        return Shaped(*(None if x is None else x.zero_() for x in shaped))
    if values is None:
        gl, gl_value = gamma, None
    second = gl_value is not None
    if gl_value is None:
        gl_value = gl
    shape = {
        **{f"p_{name}": x for name, x in out.items()},
        **_tokens(
            mask=mask,
            weights=weights if layers is None else shaped.credit,
            values=values,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            kl_in=kl,
            token_rewards=token_rewards,
        ),
        "p_score": contiguous(score),
        "p_score_index": contiguous(score_index),
        "p_terminal": contiguous(terminal_reward),
        "p_bootstrap": contiguous(bootstrap),
        "p_row_status": row_status,
        "p_response_cu": cu,
        "n_rows": batch,
        "width": width,
        **_number("kl_coef", kl_coef),
        "dense_share": float(dense_share),
        "score_low": float(score_bounds[0]),
        "score_high": float(score_bounds[1]),
        "kl_input_clip": math.inf if kl_input_clip is None else float(kl_input_clip),
        "kl_output_clip": math.inf if kl_output_clip is None else float(kl_output_clip),
        "min_mass": float(min_mass),
        "gamma": float(gamma),
        **_number("gl", gl),
        **_number("gl_value", gl_value),
        "CREDIT": credit if isinstance(credit, str | None) else "given",
        "EVEN": even,
        "NORMALIZATION": normalization,
        "SCORE_INDEX": score_index if isinstance(score_index, str) else "explicit",
        "KL_ESTIMATOR": estimator,
        "SKIP": skip_masked,
        "UNIT": all(isinstance(x, float | int) and x == 1 for x in (gl, gl_value)),
        "TWO_RECURRENCES": second and "returns" in outputs,
        "ZERO_NONFINITE": zero_nonfinite,
        "FACTS": credit is not None or bootstrap is not None or not PER_ROW.keys().isdisjoint(out),
        "FINISH": "shape",
    }
    if layers is not None:
        _attend(layers, shape | positions_of(response))
    else:
        shape["SOURCE"] = None if weights is None else "weights"
        _sweep(shape, device)
    return shaped


PER_ROW = {"status": 1, "stats": 4, "moments": 3}
"""Numbers per row of the outputs that are per row."""


def _attend(layers: Sequence[LayerInputs], shape: dict[str, Any]) -> None:
    """Everything from queries and keys to advantages."""
    *others, last = layers
    if others:
        shape["p_row_status"] = torch.zeros(shape["n_rows"], dtype=torch.int32, device=last.key.device)
    for i, layer in enumerate(others):
        average(layer, len(layers), i, shape)
    fused = shape["width"] <= attention.ONE_LAUNCH
    arguments = layer_arguments(last, len(layers), shape, "shape" if fused else "terms")
    arguments["ADD"] = bool(others)
    if fused:
        attention.launch(arguments | {"MODE": "attend", "SOURCE": "groups"})
        return
    attention.launch(arguments | {"MODE": "attend"})
    _sweep(arguments | {"SOURCE": "terms", "FINISH": "shape"}, last.key.device)


def _sweep(shape: dict[str, Any], device: torch.device) -> None:
    batch, packed = shape["n_rows"], shape["p_response_cu"] is not None
    n_tasks, chunks_per_row = chunks_of(shape)
    longest, averaging = ceil_div(shape["width"], attention.CHUNK), shape["SOURCE"] == "terms"
    if not in_chunks(batch, longest, n_tasks, processors(device), averaging):
        attention.launch(shape | {"MODE": "rows", "n_tasks": batch, "n_leaders": 0})
        return
    workspace = {
        "p_doubles": torch.empty(DOUBLES, n_tasks, dtype=torch.float64, device=device),
        "p_ints": torch.empty(INTS, n_tasks, dtype=torch.int32, device=device),
        "p_counters": COUNTERS.take(device, 1 + 2 * batch + FLAGS.value * n_tasks),
        "chunks_per_row": chunks_per_row,
        "n_tasks": n_tasks,
        "n_leaders": batch if packed else 0,
    }
    attention.launch(shape | workspace | {"MODE": "chunks"})


def in_chunks(batch: int, longest: int, n_chunks: int, processors: int, averaging: bool = False) -> bool:
    """Whether rows are swept by a program per chunk, not per row.

    ``longest`` is the most chunks that a row may have. Guessed from the loads that wait for each other: alone
    with its row, a program takes 3 microseconds a chunk; sharing it, 4 for each of a chunk's two tasks, and 4
    more at the end; ``averaging`` heads takes either 6 more a chunk. Three programs fit a multiprocessor.
    """
    at_once = 3 * processors
    alone = (9 if averaging else 3) * longest * max(1.0, batch / at_once)
    shared = 4 + (7 if averaging else 4) * max(1.0, 2 * n_chunks / at_once)
    return longest > 1 and shared < alone


def _tokens(**given: Tensor | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, x in given.items():
        x = tokens(x)
        if x is not None:
            out[f"p_{name}"], out[f"stride_{name}"] = x, row_stride(x)
    return out


def _number(name: str, x: float | Tensor) -> dict[str, Any]:
    """A tensor to be read on the device, or a number."""
    return {f"p_{name}": x.contiguous()} if isinstance(x, Tensor) else {name: float(x)}
