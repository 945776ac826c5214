"""Launches that read queries and keys."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from csrc_triton.arguments import (
    Axis,
    Grid,
    Inputs,
    Layer,
    Left,
    Mean,
    Outputs,
    Product,
    Response,
    Rules,
    Settings,
)
from csrc_triton.attention import attend_kernel, means_kernel, prepare_kernel
from csrc_triton.device.attention import FEW
from csrc_triton.launch import (
    COMPILER,
    COUNTERS,
    Launcher,
    ceil_div,
    contiguous,
    has_ptx,
    interpreted,
    padded,
    processors,
    registers,
    row_stride,
    stride_unit,
    tokens,
)

# What an H200 measured: `make gpu` times others too, and prints those that should stand here.
CHUNK = 512
"""Response tokens a program shapes at once."""
KEYS = 64
"""Keys of a chunk, half as many where a key has 512 bytes: 16 KB of width 128 in bfloat16."""
STAGES = 3
"""Chunks of keys that may be on their way at once, and one; so many buffers of shared memory, less one."""
WARPS = 4
"""Of a program that reads keys, and sweeps the row after them."""
PROGRAMS = 2
"""Per multiprocessor, where so few can read all keys at a time: more of them wait for each other."""
SPLIT = 6
"""Chunks of keys that a program reads where not all programs run at a time."""
MOST = 32
"""And at most, where they do."""
READ_ON: tuple[str, ...] = ()
"""How rows are finished for whose keys only as many programs are started as run at a time, each of which
reads on where a row ends: no last wave then, and few that wait for their first keys. Not measured.
"""
REGISTERS = {"shape": 168, "mean": 128, "scores": 80, "means": 64}
"""Of a thread, at most, by how a row is finished, and of who averages scores: nothing spills. With 128 where
a row is swept, so four programs on a multiprocessor and not three, it is not faster. Who only reads keys has
80, so that six fit, as when it was measured: with 128 it would take 94. Who averages has 64: eight fit."""
MANY = {"shape": 168, "mean": 168, "scores": 168, "means": 80}
"""The same of more than eight query heads a key head."""
REGISTERS_OF_PROCESSOR = 65536
"""Of all threads of a multiprocessor, of NVIDIA's GPUs."""
SCAN = 1024
"""Tokens a preparation program looks at at once."""
ONE_LAUNCH = 2048
"""Longest response, in tokens, that the last program of a row shapes within the launch that reads the keys.

A packed batch counts as one response: how its rows divide it is known on the device only. In each further
CHUNK one program works alone; two more launches take as long as some two of them.
"""
DEPENDENT = False
"""Whether of the launches of a long response each may begin before the one before it has ended, where the GPU
can (programmatic dependent launch): it then waits for that one's end before it reads or writes. Not measured.
"""

ATTEND = Launcher(attend_kernel, "layer.p_query", "layer.p_key")
MEANS = Launcher(means_kernel)
PREPARE = Launcher(prepare_kernel)


class LayerInputs(Protocol):
    """What is read of a layer, as ``attnshape.AttentionInputs`` has it."""

    @property
    def query(self) -> Tensor: ...

    @property
    def key(self) -> Tensor: ...

    @property
    def scaling(self) -> float: ...

    @property
    def key_start(self) -> Tensor | None: ...

    @property
    def query_position(self) -> Tensor | Literal["last_response"] | None: ...

    @property
    def attention_mask(self) -> Tensor | None: ...

    @property
    def mask_row(self) -> Tensor | None: ...

    @property
    def causal(self) -> bool: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...

    @property
    def softcap(self) -> float | None: ...

    @property
    def sliding_window(self) -> int | None: ...

    @property
    def sinks(self) -> Tensor | None: ...

    @property
    def lse(self) -> Tensor | None: ...

    @property
    def head_mask(self) -> Tensor | None: ...


class ResponseInputs(Protocol):
    """Where the response tokens are, as ``attnshape.Response`` has it."""

    @property
    def mask(self) -> Tensor: ...

    @property
    def start(self) -> Tensor | None: ...

    @property
    def index(self) -> Tensor | None: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...


def attention_row(layers: Sequence[LayerInputs]) -> Tensor:
    """Mean over heads and layers of one attention row per sequence.

    Args:
        layers: as ``attnshape.AttentionInputs``, with the same tokens. ``query`` ``[B, Hq, D]`` or
            ``[B, Hq, S, D]``, packed ``[B, Hq, D]`` or ``[N, Hq, D]``; ``key`` ``[B, Hkv, S, D]``, packed
            ``[N, Hkv, D]``; any strides.

    Returns:
        ``[B, S]`` (packed ``[N]``) float32; NaN in a row with an index out of range.
    """
    key, cu = layers[0].key, layers[0].cu_seqlens
    batch = key.shape[0] if cu is None else cu.shape[0] - 1
    width = key.shape[2] if cu is None else key.shape[0]
    out = torch.empty((batch, width) if cu is None else (width,), dtype=torch.float32, device=key.device)
    if batch == 0:
        return out.zero_()  # keys of no row
    keys = Response(cu, batch, width)  # a token per key
    for i, layer in enumerate(layers):
        average(layer, len(layers), keys, Inputs(), Outputs(p_credit=out), add=i > 0)
    return out


def response_of(response: ResponseInputs) -> Response:
    """The response tokens and their place among the keys."""
    mask, index, cu = tokens(response.mask), tokens(response.index), response.cu_seqlens
    assert mask is not None
    batch, width = mask.shape if cu is None else (cu.shape[0] - 1, mask.shape[0])
    start = contiguous(response.start)
    return Response(cu, batch, width, mask, row_stride(mask), start, index, row_stride(index))


def average(
    layer: LayerInputs, n_layers: int, response: Response, inputs: Inputs, out: Outputs, add: bool
) -> None:
    """A layer's mean over heads to ``p_credit``, or on top of what is there."""
    if response.width <= ONE_LAUNCH:
        attend(layer, n_layers, response, "mean", inputs=inputs, out=out, add=add)
        return
    rules = Rules(CHUNK, DEPENDENT=are_dependent(layer.key.device))
    read = attend(layer, n_layers, response, "scores", inputs=inputs, out=out, rules=rules, add=add)
    n_tasks, chunks_per_row = chunks_of(response)
    leaders = 0 if response.p_cu is None else response.n_rows
    launch(
        MEANS,
        n_tasks + leaders,
        most_registers(read["mean"].G, "means") | dependent(rules),
        **read,
        response=response,
        inputs=inputs,
        out=out,
        grid=Grid(None, n_tasks, leaders, chunks_per_row=chunks_per_row),
        rules=rules,
    )


def most_registers(group: int, what: str) -> dict[str, int]:
    """Of programs that finish a row so, or average, with so many query heads a key head."""
    return registers((REGISTERS if group <= 8 else MANY)[what])


def are_dependent(device: torch.device) -> bool:
    """Whether launches begin before the ones that they follow have ended."""
    if not DEPENDENT or not has_ptx():
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(rules: Rules) -> dict[str, bool]:
    """With which such a launch is compiled."""
    return {"launch_pdl": True} if rules.DEPENDENT else {}


def chunks_of(response: Response) -> tuple[int, int]:
    """Chunks of response tokens in all, and per row of a padded batch."""
    if response.p_cu is not None:
        return response.width // CHUNK + response.n_rows, 0
    per_row = ceil_div(response.width, CHUNK)
    return response.n_rows * per_row, per_row


def attend(
    layer: LayerInputs,
    n_layers: int,
    response: Response,
    finish: Literal["scores", "mean", "shape"],
    *,
    inputs: Inputs,
    settings: Settings | None = None,
    out: Outputs,
    rules: Rules | None = None,
    add: bool = False,
) -> dict[str, Any]:
    """The launch that reads a layer's keys; after the preparation that it may need.

    Returns:
        Arguments of the launch that may follow: what was left, and of which keys.
    """
    query, key, cu = layer.query, layer.key, layer.cu_seqlens
    group, chunk, batch = query.shape[1] // key.shape[1], chunk_size(key), response.n_rows
    axis = prepared_axis(layer, response)
    kv_heads, width, device = key.shape[1], key.shape[-1], key.device
    slots_per_row = 0 if cu is not None else ceil_div(axis.width, chunk)
    slots = batch * slots_per_row if cu is None else axis.width // chunk + batch
    chunks = ceil_div(slots, max(batch, 1))
    split, step = chunks_per_program(batch * kv_heads, chunks, processors(device), finish)
    of_slot = step or 1
    steps_per_row = max(1, ceil_div(slots_per_row, of_slot))
    steps = batch * steps_per_row if cu is None else axis.width // (chunk * of_slot) + batch
    n_tasks = ceil_div(steps * of_slot * kv_heads, split)
    leaders = 0 if cu is None else batch
    counters = COUNTERS.take(device, batch * (kv_heads + 1))
    grid = Grid(counters, n_tasks, leaders, split=split, step=step, slots_per_row=steps_per_row)
    left, spare = workspace(key, query.shape[1], cu, slots_per_row, slots, response, finish != "scores")
    kept = layer.lse is not None and response.p_start is not None
    operands, product = operands_of(layer, n_layers, kept)
    mean = Mean(layer.causal, group, min(4, padded(group)), chunk, spare, add)
    heavy = width > product.BLOCK_D or (rules is not None and rules.TWO_RECURRENCES)
    most = registers(255) if heavy else most_registers(group, finish)
    if step is None:  # what is the same for all rows stays in registers
        most = registers(min(255, REGISTERS_OF_PROCESSOR // (32 * WARPS * PROGRAMS) // 8 * 8))
    launch(
        ATTEND,
        grid.n_tasks + leaders,
        most,
        axis=axis,
        layer=operands,
        left=left,
        response=response,
        inputs=inputs,
        settings=settings,
        out=out,
        grid=grid,
        product=product,
        mean=mean,
        rules=rules or Rules(CHUNK),
        FINISH=finish,
    )
    return {"axis": axis, "layer": operands, "left": left, "mean": mean}


def key_axis(layer: LayerInputs) -> Axis:
    """Where a layer's keys lie, and which of them it says are seen."""
    key, cu, mask, window = layer.key, layer.cu_seqlens, layer.attention_mask, layer.sliding_window
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    batch, width = (key.shape[0], key.shape[2]) if cu is None else (cu.shape[0] - 1, key.shape[0])
    return Axis(
        cu,
        batch,
        width,
        contiguous(layer.key_start),
        contiguous(layer.query_position),
        mask,
        row_stride(mask),
        0 if mask is None else mask.stride(-1),
        None if window is None else min(window, width),
    )


def prepared_axis(layer: LayerInputs, response: Response) -> Axis:
    """The same, with first visible keys and positions where a mask or the response says them."""
    axis, position = key_axis(layer), layer.query_position
    if axis.p_mask is None and not isinstance(position, str):
        return axis
    start, found = torch.empty(2, axis.n_rows, dtype=torch.int64, device=layer.key.device)
    launch(
        PREPARE,
        axis.n_rows,
        axis=axis,
        response=response,
        p_start=start,
        p_position=found,
        LAST_RESPONSE=position == "last_response",
        SCAN=SCAN,
    )
    return axis._replace(p_start=start, p_position=found)


def workspace(
    key: Tensor,
    heads: int,
    cu: Tensor | None,
    slots_per_row: int,
    slots: int,
    response: Response,
    groups: bool,
) -> tuple[Left, int]:
    """What programs leave to each other; and slots of scores that each packed row has to spare.

    Slots for the scores: one per chunk of keys, or only where a row's response can lie.
    """
    chunk, kv_heads, batch = chunk_size(key), key.shape[1], response.n_rows
    score_cu, scores_per_row, score_slots, spare = cu, slots_per_row, slots, 1
    if response.p_start is not None:
        score_cu = response.p_cu
        if score_cu is None:
            scores_per_row = ceil_div(response.width, chunk) + 1
            score_slots = batch * scores_per_row
        else:
            spare = 2
            score_slots = response.width // chunk + 2 * batch
    few = slots * (chunk // FEW.value)
    n_tokens = response.width * (batch if response.p_cu is None else 1)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=key.device)

    left = Left(
        new(heads, few, 2),
        few,
        new(batch, heads, 2),
        new(max(score_slots, 1), heads, chunk),  # what is not seen reads the first
        new(kv_heads, n_tokens) if groups else None,
        slots_per_row,
        score_cu,
        scores_per_row,
    )
    return left, spare


def operands_of(layer: LayerInputs, n_layers: int = 1, only_kept: bool = False) -> tuple[Layer, Product]:
    """Queries, keys and what changes their scores; and how one row's are multiplied."""
    query, key, packed = layer.query, layer.key, layer.cu_seqlens is not None
    keys = key.shape[0] if packed else key.shape[2]
    group, width, chunk = query.shape[1] // key.shape[1], key.shape[-1], chunk_size(key)
    query_strides = _position_strides(query, packed, keys)
    key_strides = (0, key.stride(1), key.stride(0)) if packed else key.stride()[:3]
    query_unit, key_unit = stride_unit(*query_strides), stride_unit(*key_strides)
    head_mask, lse, mask_row = contiguous(layer.head_mask), layer.lse, layer.mask_row
    if head_mask is not None and head_mask.dtype == torch.bool:
        head_mask = head_mask.view(torch.uint8)
    lse_strides = (0, 0, 0) if lse is None else _position_strides(lse.unsqueeze(-1), packed, keys)
    query_b, query_h, query_t = (x // query_unit for x in query_strides)
    key_b, key_h, key_t = (x // key_unit for x in key_strides)
    lse_b, lse_h, lse_t = lse_strides
    added_b, added_h, added_t = (0, 0, 0) if mask_row is None else _mask_row_strides(mask_row, packed)
    operands = Layer(
        p_query=query,
        stride_qb=query_b,
        stride_qh=query_h,
        stride_qt=query_t,
        p_key=key,
        stride_kb=key_b,
        stride_kh=key_h,
        stride_kt=key_t,
        kv_heads=key.shape[1],
        scaling=float(layer.scaling),
        softcap=None if layer.softcap is None else float(layer.softcap),
        n_layers=n_layers,
        p_sinks=contiguous(layer.sinks),
        p_head_mask=head_mask,
        p_lse=lse,
        stride_lb=lse_b,
        stride_lh=lse_h,
        stride_lt=lse_t,
        p_mask_row=mask_row,
        stride_ab=added_b,
        stride_ah=added_h,
        stride_at=added_t,
    )
    product = _product(
        group,
        width,
        key.element_size(),
        key_unit > 1 and key.data_ptr() % 16 == 0,
        (query.stride(-1), key.stride(-1), query_unit, key_unit),
        STAGES,
        key_strides[2] * chunk >= 2**31,
        only_kept,
        interpreted(),
        torch.version.hip is not None,
        has_ptx(),
    )
    return operands, product


@functools.cache
def _product(
    group: int,
    width: int,
    itemsize: int,
    wide: bool,
    strides: tuple[int, int, int, int],
    stages: int,
    far: bool,
    only_kept: bool,
    interpreted: bool,
    amd: bool,
    ptx: bool,
) -> Product:
    # Parts of 16 fit registers where operands are wide, or loaded element by element. Tensor cores add 16 by
    # 16 all the same, so bits do not depend on alignment; the interpreter's products would.
    heavy = itemsize >= 4 or max(16, padded(group)) * padded(width) > 4096
    stride_qd, stride_kd, query_unit, key_unit = strides
    return Product(
        G=group,
        M=max(16 if amd else 8, padded(group)),
        D=width,
        BLOCK_D=16 if heavy or (not wide and not interpreted) else max(16, padded(width)),
        STRIDE_QD=stride_qd,
        STRIDE_KD=stride_kd,
        QUERY_UNIT=query_unit,
        KEY_UNIT=key_unit,
        FAR=far,
        UPCAST=interpreted,
        STAGES=stages if wide else 1,
        FOLD=max(16, 1024 // max(8, padded(group))),
        ONLY_KEPT=only_kept,
        PTX=ptx,
    )


def chunk_size(key: Tensor) -> int:
    """Keys per chunk, a constant of the layer."""
    return KEYS // 2 if padded(key.shape[-1]) * key.element_size() >= 512 else KEYS


def chunks_per_program(rows: int, chunks: int, processors: int, finish: str) -> tuple[int, int | None]:
    """Chunks of keys that a program reads one after the other, of the ``chunks`` of each of so many rows.

    The fewest with which all programs run at a time, ``PROGRAMS`` on a multiprocessor. And of how many a row
    has a whole number: of as many, or of one where a program reads on in the next row.
    """
    programs = PROGRAMS * processors
    fitting = (n for n in range(1, MOST + 1) if rows * ceil_div(chunks, n) <= programs)
    split = next(fitting, None)
    if split is None and finish in READ_ON:
        return ceil_div(rows * chunks, programs), None
    return (split or SPLIT,) * 2


def _position_strides(x: Tensor, packed: bool, keys: int) -> tuple[int, int, int]:
    """Strides per row, head and position; 0 per position if ``x`` holds one row per sequence."""
    if not packed:
        return (x.stride(0), x.stride(1), x.stride(2) if x.ndim == 4 else 0)
    return (0, x.stride(1), x.stride(0)) if x.shape[0] == keys else (x.stride(0), x.stride(1), 0)


def _mask_row_strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides per row, head and key; 0 per head if ``x`` is the same for all."""
    if packed:
        return 0, x.stride(1) if x.ndim == 2 else 0, x.stride(0)
    return x.stride(0), x.stride(1) if x.ndim == 3 else 0, x.stride(-1)


def launch(launcher: Launcher, programs: int, *options: dict[str, Any], **arguments: Any) -> None:
    """Programs of a kernel, and one more where packed tokens may belong to no row."""
    response, out = arguments["response"], arguments.get("out")
    if response.p_cu is not None and out is not None and arguments.get("FINISH") != "scores":
        programs += 1
    if not programs:
        return
    try:
        launcher(programs, COMPILER | {"num_warps": WARPS} | dict(*options), **arguments)
    except BaseException:
        grid = arguments.get("grid")
        if grid is not None and grid.p_counters is not None:
            COUNTERS.discard(grid.p_counters.device)
        raise
