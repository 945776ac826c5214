"""Launches that read queries and keys, and of whatever else ``shape_kernel`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from csrc_triton.attention import prepare_kernel, shape_kernel
from csrc_triton.device.attention import FEW
from csrc_triton.launch import (
    COMPILER,
    COUNTERS,
    Launcher,
    ceil_div,
    contiguous,
    interpreted,
    padded,
    processors,
    registers,
    row_stride,
    stride_unit,
    tokens,
)

CHUNK = 512
"""Response tokens a program shapes at once."""
SCAN = 1024
"""Tokens a preparation program looks at at once."""
ONE_LAUNCH = 2048
"""Longest response, in tokens, that the last program of a row shapes within the launch that reads the keys.

A packed batch counts as one response: how its rows divide it is known on the device only. Each further CHUNK
is some 4 microseconds (a guess) in which one program works alone; a second launch takes as long as two.
"""


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
    shape = {"p_credit": out, "p_response_cu": cu, "n_rows": batch, "width": width} | positions_of(None)
    for i, layer in enumerate(layers):
        average(layer, len(layers), i, shape)
    return out


def positions_of(response: ResponseInputs | None) -> dict[str, Any]:
    """Arguments that say where the response tokens lie among the keys; None: a token per key."""
    index = None if response is None else tokens(response.index)
    return {
        "p_response_start": None if response is None else response.start,
        "p_response_index": index,
        "stride_index": row_stride(index),
    }


def average(layer: LayerInputs, n_layers: int, i: int, shape: dict[str, Any]) -> None:
    """Adds the ``i``-th layer's mean over heads to ``p_credit``."""
    fused = shape["width"] <= ONE_LAUNCH
    arguments = layer_arguments(layer, n_layers, shape, "mean" if fused else "terms") | {"ADD": i > 0}
    if fused:
        launch(arguments | {"MODE": "attend", "SOURCE": "groups"})
        return
    launch(arguments | {"MODE": "attend"})
    n_tasks, chunks_per_row = chunks_of(shape)
    leaders = 0 if shape["p_response_cu"] is None else shape["n_rows"]
    arguments |= {"n_tasks": n_tasks, "chunks_per_row": chunks_per_row, "n_leaders": leaders}
    launch(arguments | {"MODE": "mean", "FINISH": "mean", "SOURCE": "terms"})


def chunks_of(shape: dict[str, Any]) -> tuple[int, int]:
    """Chunks of response tokens in all, and per row of a padded batch."""
    if shape["p_response_cu"] is not None:
        return shape["width"] // CHUNK + shape["n_rows"], 0
    per_row = ceil_div(shape["width"], CHUNK)
    return shape["n_rows"] * per_row, per_row


def layer_arguments(layer: LayerInputs, n_layers: int, shape: dict[str, Any], finish: str) -> dict[str, Any]:
    """Arguments of the launch that reads a layer's keys; launches the preparation that it may need."""
    query, key, cu, mask, lse = layer.query, layer.key, layer.cu_seqlens, layer.attention_mask, layer.lse
    heads, kv_heads, width = query.shape[1], key.shape[1], key.shape[-1]
    group, chunk, batch = heads // kv_heads, chunk_size(key), shape["n_rows"]
    device = key.device
    if cu is None:
        keys = key.shape[2]
        slots_per_row = ceil_div(keys, chunk)
        slots = batch * slots_per_row
        stride_kb, stride_kh, stride_kt, stride_kd = key.stride()
    else:
        keys, slots_per_row, stride_kb = key.shape[0], 0, 0
        slots = keys // chunk + batch
        stride_kt, stride_kh, stride_kd = key.stride()
    query_strides = _position_strides(query, cu is not None, keys)
    query_unit = stride_unit(*query_strides)
    key_unit = stride_unit(stride_kb, stride_kh, stride_kt)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    head_mask = contiguous(layer.head_mask)
    if head_mask is not None and head_mask.dtype == torch.bool:
        head_mask = head_mask.view(torch.uint8)

    # Slots for the terms: one per chunk of keys, or only where a row's response can lie.
    response_cu = shape["p_response_cu"]
    term_cu, terms_per_row, term_slots, term_spare = cu, slots_per_row, slots, 1
    if shape["p_response_start"] is not None:
        term_cu = response_cu
        if response_cu is None:
            terms_per_row = ceil_div(shape["width"], chunk) + 1
            term_slots = batch * terms_per_row
        else:
            term_spare = 2
            term_slots = shape["width"] // chunk + 2 * batch
    split = chunks_per_program(slots * kv_heads, processors(device))
    splits_per_row = max(1, ceil_div(slots_per_row, split))
    if cu is None:
        n_tasks = batch * splits_per_row * kv_heads
    else:
        n_tasks = (keys // (chunk * split) + batch) * kv_heads
    position: Tensor | str | None = layer.query_position
    start = layer.key_start
    if mask is not None or isinstance(position, str):
        start, position = _prepare(layer, shape, mask)
    tokens_in_all = shape["width"] * (batch if response_cu is None else 1)
    few = slots * (chunk // FEW.value)
    groups = None
    if finish != "terms":
        groups = torch.empty(kv_heads, tokens_in_all, dtype=torch.float32, device=device)
    lse_strides = (0, 0, 0)
    if lse is not None:
        lse_strides = _position_strides(lse.unsqueeze(-1), cu is not None, keys)
    mask_row, mask_row_strides = layer.mask_row, (0, 0, 0)
    if mask_row is not None:
        mask_row_strides = _mask_row_strides(mask_row, cu is not None)
    half = key.element_size() < 4
    wide = key_unit > 1 and key.data_ptr() % 16 == 0
    # Parts of 16 fit registers where operands are wide, or loaded element by element. Tensor cores add 16 by
    # 16 all the same, so bits do not depend on alignment; the interpreter's products would.
    heavy = not half or max(16, padded(group)) * padded(width) > 4096
    return shape | {
        "p_query": query,
        "stride_qb": query_strides[0] // query_unit,
        "stride_qh": query_strides[1] // query_unit,
        "stride_qt": query_strides[2] // query_unit,
        "p_key": key,
        "stride_kb": stride_kb // key_unit,
        "stride_kh": stride_kh // key_unit,
        "stride_kt": stride_kt // key_unit,
        "p_cu": cu,
        "keys_width": keys,
        "p_key_start": start,
        "p_position": position,
        "p_attention_mask": mask,
        "stride_mb": 0 if mask is None else row_stride(mask),
        "stride_mt": 0 if mask is None else mask.stride(-1),
        "p_mask_row": mask_row,
        "stride_ab": mask_row_strides[0],
        "stride_ah": mask_row_strides[1],
        "stride_at": mask_row_strides[2],
        "window": None if layer.sliding_window is None else min(layer.sliding_window, keys),
        "scaling": float(layer.scaling),
        "softcap": None if layer.softcap is None else float(layer.softcap),
        "p_sinks": contiguous(layer.sinks),
        "p_lse": lse,
        "stride_lb": lse_strides[0],
        "stride_lh": lse_strides[1],
        "stride_lt": lse_strides[2],
        "p_head_mask": head_mask,
        "kv_heads": kv_heads,
        "n_layers": n_layers,
        "p_partials": torch.empty(few, heads, 2, dtype=torch.float32, device=device),
        "p_factor": torch.empty(few, heads, dtype=torch.float32, device=device),
        "p_terms": torch.empty(term_slots, heads, chunk, dtype=torch.float32, device=device),
        "p_groups": groups,
        "slots_per_row": slots_per_row,
        "p_term_cu": term_cu,
        "term_slots_per_row": terms_per_row,
        "split": split,
        "splits_per_row": splits_per_row,
        "p_counters": COUNTERS.take(device, batch * (kv_heads + 1)),
        "n_tasks": n_tasks,
        "n_leaders": 0 if cu is None else batch,
        "FINISH": finish,
        "TERM_SPARE": term_spare,
        "ONLY_KEPT": lse is not None and shape["p_response_start"] is not None,
        "G": group,
        "M": max(8, padded(group)),
        "D": width,
        "BLOCK_D": 16 if heavy or (not wide and not interpreted()) else max(16, padded(width)),
        "STRIDE_QD": query.stride(-1),
        "STRIDE_KD": stride_kd,
        "CAUSAL": layer.causal,
        "FAR": stride_kt * chunk >= 2**31,
        "QUERY_UNIT": query_unit,
        "KEY_UNIT": key_unit,
        "UPCAST": interpreted(),
        "KEYS": chunk,
        "FOLD": fold_size(group, width),
        "H": min(4, padded(group)),
        "STAGES": 4 if wide else 1,
    }


def fold_size(group: int, width: int) -> int:
    """Partials that are folded at once, for ``group`` heads each.

    Not the width of a key: a tile of partials of the query's shape takes the query's layout, which depends on
    how keys are aligned, and a layout is an order of additions.
    """
    fold = max(16, 1024 // max(8, padded(group)))
    if fold != padded(width):
        return fold
    return fold // 2 if fold > 32 else 2 * fold


def chunk_size(key: Tensor) -> int:
    """Keys per chunk, a constant of the layer: at most 16 KB in half precision; three are on their way.

    64 keys of width 128 in bfloat16 are 16 KB; 32 of width 256.
    """
    return 32 if padded(key.shape[-1]) * key.element_size() >= 512 else 64


def chunks_per_program(n_chunks: int, processors: int) -> int:
    """Chunks of keys that a program reads one after the other: few enough for 8 programs per multiprocessor.

    E.g. 4 of 8192 in all (32 sequences of 2048 keys, 8 key heads) on 132 multiprocessors; at most 16.
    """
    split = 1
    while split < 16 and n_chunks >= split * 2 * 8 * processors:
        split *= 2
    return split


def _prepare(layer: LayerInputs, shape: dict[str, Any], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """First visible key and position of each row's query, from a mask or the response."""
    cu, position, batch = layer.cu_seqlens, layer.query_position, shape["n_rows"]
    start_out, position_out = torch.empty(2, batch, dtype=torch.int64, device=layer.key.device)
    prepare_kernel[(batch,)](
        start_out,
        position_out,
        cu,
        batch,
        layer.key.shape[2] if cu is None else layer.key.shape[0],
        layer.key_start,
        position if isinstance(position, Tensor) else None,
        mask,
        0 if mask is None else row_stride(mask),
        0 if mask is None else mask.stride(-1),
        shape.get("p_mask"),
        shape.get("stride_mask", 0),
        shape["p_response_start"],
        shape["p_response_index"],
        shape["stride_index"],
        shape["p_response_cu"],
        shape["width"],
        LAST_RESPONSE=position == "last_response",
        SCAN=SCAN,
        **COMPILER,
    )
    return start_out, position_out


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


def launch(arguments: dict[str, Any]) -> None:
    programs = arguments["n_tasks"] * (1 + (arguments["MODE"] == "chunks" and arguments["FACTS"]))
    programs += arguments["n_leaders"]
    if arguments["p_response_cu"] is not None and arguments["FINISH"] != "terms":
        programs += 1
    if not programs:
        return
    try:
        LAUNCHER(programs, {"CHUNK": CHUNK} | arguments, COMPILER | _registers(arguments))
    except BaseException:
        COUNTERS.discard(next(x.device for x in arguments.values() if isinstance(x, Tensor)))
        raise


def _registers(arguments: dict[str, Any]) -> dict[str, int]:
    """Three programs on a multiprocessor; two where that would spill."""
    from_terms = arguments["MODE"] != "attend" and arguments.get("SOURCE") == "terms"
    in_parts = arguments.get("BLOCK_D", 0) < arguments.get("D", 0)
    return registers(255 if in_parts or from_terms or arguments.get("TWO_RECURRENCES") else 168)


def _default(name: str) -> Any:
    if name.startswith("p_") or name in ("window", "softcap", "SOURCE", "CREDIT", "KL_ESTIMATOR"):
        return None
    return 0.0 if name in FLOATS else 0


FLOATS = (
    *("scaling", "kl_coef", "dense_share", "min_mass", "gamma", "gl", "gl_value"),
    *("score_low", "score_high", "kl_input_clip", "kl_output_clip"),
)


DEFAULTS = {name: _default(name) for name in shape_kernel.arg_names} | {
    "NORMALIZATION": "none",
    "SCORE_INDEX": "last_unmasked",
}
"""Arguments of the kernel that a launch leaves out."""
LAUNCHER = Launcher(shape_kernel, DEFAULTS, ("p_query", "p_key"))
