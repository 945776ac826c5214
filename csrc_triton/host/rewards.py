"""From credit, or queries and keys, to rewards, advantages and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from csrc_triton.arguments import Grid, Inputs, Outputs, Response, Rules, Settings
from csrc_triton.device.advantages import DOUBLES, FLAGS, INTS
from csrc_triton.host import attention
from csrc_triton.host.attention import (
    LayerInputs,
    ResponseInputs,
    are_dependent,
    attend,
    average,
    chunks_of,
    dependent,
    launch,
    response_of,
)
from csrc_triton.launch import (
    COUNTERS,
    Launcher,
    ceil_div,
    contiguous,
    has_ptx,
    processors,
    registers,
    row_stride,
    tokens,
)
from csrc_triton.sweep import chunks_kernel, rows_kernel

REGISTERS = {1: 168, 2: 144, 4: 128}
"""Of a thread, at most, by the warps that share a row: nothing spills."""
NARROW = 168
"""Where rows do not begin at multiples of four tokens."""
LIGHT = 128
"""Where nothing is redistributed."""


class Steps(NamedTuple):
    """Microseconds of a chunk, as an H200 measured them."""

    of_row: tuple[tuple[int, float], ...] = ((1, 6), (2, 3.1), (4, 2.2))
    """By a program of so many warps that has the row to itself."""
    shared: float = 7.6  # of both its tasks, where programs share a row
    last: float = 6  # more at the end of a shared row


STEPS = Steps()

ROWS = Launcher(rows_kernel)
CHUNKS = Launcher(chunks_kernel)

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

    One launch; three where credit is attention and responses are longer than ``ONE_LAUNCH``: two to each
    layer, and the sweep. One more for each further layer of shorter ones, and for a layer whose visible keys
    follow from a mask.

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
    where = response_of(response)
    weights = credit if isinstance(credit, Tensor) else None
    layers = None if credit is None or isinstance(credit, Tensor | str) else credit
    estimator: str | None = None if logprobs is None else kl_estimator
    if kl is not None:
        estimator = "given"
    names = [x for x in outputs if x != "kl" or estimator is not None]
    if (layers is not None or "stats" in names) and "credit" not in names:
        names.append("credit")  # which statistics are read from, as it was stored
    shaped = _new(names, response.mask, where.n_rows)
    if where.n_rows == 0:
        # Tokens of no row.
        return Shaped(*(None if x is None else x.zero_() for x in shaped))
    if values is None:
        gl, gl_value = gamma, None
    second = gl_value is not None
    if gl_value is None:
        gl_value = gl
    inputs = Inputs(
        *_tokens(weights if layers is None else shaped.credit),
        *_tokens(values),
        *_tokens(logprobs),
        *_tokens(ref_logprobs),
        *_tokens(kl),
        *_tokens(token_rewards),
        contiguous(score),
        contiguous(score_index),
        contiguous(terminal_reward),
        contiguous(bootstrap),
        row_status,
    )
    settings = Settings(
        *_number(kl_coef),
        float(dense_share),
        float(score_bounds[0]),
        float(score_bounds[1]),
        math.inf if kl_input_clip is None else float(kl_input_clip),
        math.inf if kl_output_clip is None else float(kl_output_clip),
        float(min_mass),
        float(gamma),
        *_number(gl),
        *_number(gl_value),
    )
    rules = Rules(
        attention.CHUNK,
        WIDE=_is_wide(where, inputs),
        CREDIT=credit if isinstance(credit, str | None) else "given",
        EVEN=even,
        NORMALIZATION=normalization,
        SCORE_INDEX=score_index if isinstance(score_index, str) else "explicit",
        KL_ESTIMATOR=estimator,
        KL_CLIPPED=kl_input_clip is not None or kl_output_clip is not None,
        SKIP=skip_masked,
        UNIT=all(isinstance(x, float | int) and x == 1 for x in (gl, gl_value)),
        TWO_RECURRENCES=second and "returns" in outputs,
        ZERO_NONFINITE=zero_nonfinite,
        PTX=has_ptx(),
    )
    job = {"response": where, "inputs": inputs, "settings": settings, "out": Outputs(*shaped), "rules": rules}
    if layers is None:
        _sweep(job, None if weights is None else "weights")
    else:
        _attend(layers, job)
    return shaped


PER_ROW = {"status": 1, "stats": 4, "moments": 3}
"""Numbers per row of the outputs that are per row."""


def _new(names: Sequence[str], mask: Tensor, batch: int) -> Shaped:
    """Outputs, to be filled."""
    out = {}
    for name in names:
        size = mask.shape if name not in PER_ROW else (batch, PER_ROW[name]) if name != "status" else (batch,)
        dtype = torch.int32 if name == "status" else torch.float32
        out[name] = torch.empty(size, dtype=dtype, device=mask.device)
    return Shaped(**out)


def _attend(layers: Sequence[LayerInputs], job: dict[str, Any]) -> None:
    """Everything from queries and keys to advantages."""
    response, inputs, out = job["response"], job["inputs"], job["out"]
    fused = response.width <= attention.ONE_LAUNCH
    apart = layers[:-1] if fused else layers
    if apart:
        status = torch.empty(response.n_rows, dtype=torch.int32, device=layers[0].key.device)
        inputs = job["inputs"] = inputs._replace(p_row_status=status)
    for i, layer in enumerate(apart):
        found = Inputs(p_row_status=inputs.p_row_status)
        average(layer, len(layers), response, found, Outputs(p_credit=out.p_credit), add=i > 0)
    if fused:
        attend(layers[-1], len(layers), **job, finish="shape", add=bool(apart))
    else:
        job["rules"] = job["rules"]._replace(DEPENDENT=are_dependent(layers[0].key.device))
        _sweep(job, "weights")


def _sweep(job: dict[str, Any], source: Literal["weights"] | None) -> None:
    """From given credit, or none."""
    response, rules = job["response"], job["rules"]
    batch, packed, device = response.n_rows, response.p_cu is not None, response.p_mask.device
    n_tasks, chunks_per_row = chunks_of(response)
    longest = ceil_div(response.width, attention.CHUNK)
    alone, count = rules.WIDE and not rules.TWO_RECURRENCES, processors(device)
    chunked = in_chunks(batch, longest, n_tasks, count, alone)
    warps = warps_of(batch, count, alone, rules.CREDIT is not None and longest > 1)
    if chunked:
        warps = 1 if alone else 4  # nobody waits for other warps of a chunk
    most = LIGHT if rules.CREDIT is None else REGISTERS[warps] if alone else NARROW
    options = registers(255 if rules.TWO_RECURRENCES else most) | {"num_warps": warps} | dependent(rules)
    # Two warps wait for each other then, and have the registers for it; four would spill.
    rules = job["rules"] = rules._replace(TOGETHER=warps == 2)
    if longest == 1:  # nothing to read ahead
        job["rules"] = rules._replace(STAGES=1)
    if not chunked:
        launch(ROWS, batch, options, **job, SOURCE=source)
        return
    leaders = batch if packed else 0
    grid = Grid(
        COUNTERS.take(device, 1 + 2 * batch + FLAGS.value * n_tasks),
        n_tasks,
        leaders,
        chunks_per_row=chunks_per_row,
        p_doubles=torch.empty(DOUBLES, n_tasks, dtype=torch.float64, device=device),
        p_ints=torch.empty(INTS, n_tasks, dtype=torch.int32, device=device),
    )
    launch(CHUNKS, 2 * n_tasks + leaders, options, **job, grid=grid, SOURCE=source)


def in_chunks(batch: int, longest: int, n_chunks: int, processors: int, alone: bool = True) -> bool:
    """Whether rows are swept by a program per chunk, not per row.

    ``longest`` is the most chunks that a row may have. By ``STEPS``; ``alone`` is as of ``warps_of``.
    """

    def at_a_time(warps: int) -> int:  # of 65536 registers a multiprocessor
        return 65536 // (32 * warps * (REGISTERS[warps] if alone else NARROW)) * processors

    warps = warps_of(batch, processors, alone, several=True)
    rows = dict(STEPS.of_row)[warps] * longest * ceil_div(batch, at_a_time(warps))
    chunks = STEPS.last + STEPS.shared * max(1.0, 2 * n_chunks / at_a_time(1 if alone else 4))
    return longest > 1 and chunks < rows


def warps_of(rows: int, processors: int, alone: bool, several: bool) -> int:
    """Of a program that has a row to itself. Bits are the same.

    ``alone``: whether one warp has registers enough for 512 tokens; ``several``: whether there is something
    to redistribute, and more than one chunk of it.
    """
    if not alone or rows <= 3 * processors:
        return 4
    return 2 if several or rows <= 6 * processors else 1


def _tokens(x: Tensor | None) -> tuple[Tensor | None, int]:
    """An input per token, and its stride between rows."""
    x = tokens(x)
    return x, row_stride(x)


def _number(x: float | Tensor) -> tuple[Tensor | None, float]:
    """A tensor to be read on the device, or a number."""
    return (x.contiguous(), 0.0) if isinstance(x, Tensor) else (None, float(x))


def _is_wide(response: Response, inputs: Inputs) -> bool:
    """Whether four neighbours in every row of tokens lie where one load finds them."""
    if response.p_cu is not None or response.width % 4:
        return False
    # Tensors of tokens and their strides follow each other.
    of_tokens = (response.p_mask, response.stride_mask, *inputs[: Inputs._fields.index("p_score")])
    for x, stride in zip(of_tokens[::2], of_tokens[1::2], strict=True):
        if x is not None and (stride % 4 or x.data_ptr() % 16):
            return False
    return True
