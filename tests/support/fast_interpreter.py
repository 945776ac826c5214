"""Triton's interpreter in a fraction of its time, for the tests.

Left alone, it patches ``triton.language`` anew at every call of a device function, scans one element at a
time, computes every sum of integers once more in 64 bits for an assertion that is switched off, and makes a
table of all dtypes to look one up. ``install`` patches the language once, at the first launch, scans by
doubling, and leaves out the rest. What a kernel computes stays the same, but for the order in which a scan
with a ``combine_fn`` of its own adds: ``original_scan`` gives the first order back.

Only code that is known here is replaced: with any other, Triton's interpreter stays as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

KNOWN = {"ba53d66c50209203"}
"""Digests of the code that is replaced, and of what calls it: triton 3.7.1."""


def install() -> str:
    """Replaces what is slow; a line that says whether it did."""
    import triton
    from triton.runtime import interpreter

    found, by = digest(interpreter), f"interpreted by triton {triton.__version__}"
    if found not in KNOWN:
        return f"{by} as it is, slowly: its interpreter ({found}) is not known"
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # without which the assertion is never made
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = looked_up_once(interpreter._get_np_dtype)
    interpreter._patch_lang = PatchedOnce(interpreter)
    interpreter.ScanOps.one_by_one = interpreter.ScanOps.generic_scan
    interpreter.ScanOps.generic_scan = scan_by_doubling
    return f"{by}, made faster by tests/support/fast_interpreter.py"


def digest(interpreter: Any) -> str:
    """Of the source of everything that ``install`` replaces, and of what calls it."""
    code = (
        interpreter._get_np_dtype,
        interpreter._patch_attr,
        interpreter._patch_builtin,
        interpreter._patch_lang_tensor,
        interpreter._patch_reduce_scan,
        interpreter._patch_lang_core,
        interpreter._patch_lang,
        interpreter._LangPatchScope,
        interpreter.InterpreterOptions,
        interpreter.ReduceScanOpInterface,
        interpreter.ScanOps,
        interpreter.GridExecutor,
        interpreter.InterpretedFunction,
        interpreter.TritonSemantic.binary_op_sanitize_overflow_impl,
        interpreter.TritonSemantic.device_assert,
    )
    return hashlib.sha256("".join(map(inspect.getsource, code)).encode()).hexdigest()[:16]


class PatchedOnce:
    """In place of ``_patch_lang``: the whole language at the first call, for good."""

    def __init__(self, interpreter: Any) -> None:
        self.patch, self.scope, self.done = interpreter._patch_lang, interpreter._LangPatchScope, False

    def __call__(self, fn: Any) -> Any:
        if not self.done:
            import triton.language as tl

            self.patch(types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
            self.done = True
        return self.scope()


def looked_up_once(np_dtype: Any) -> Any:
    """``_get_np_dtype`` of an element's dtype, by its name; those of blocks and pointers are not hashable."""
    known: dict[str, np.dtype] = {}

    def looked_up(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        found = known.get(name)
        if found is None:
            found = known[name] = np_dtype(dtype.scalar)
        return found

    return looked_up


def scan_by_doubling(scan: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """``ScanOps.generic_scan``: every element combined with the one 1, then 2, 4, 8 ... before it."""
    axis, dtypes = scan.axis, [x.dtype for x in inputs]
    values = [x.handle.data for x in inputs]
    size, distance = values[0].shape[axis], 1
    first: list[slice] = [slice(None)] * values[0].ndim
    while distance < size:
        # A block's size is a power of two: so the first elements take part, and are put back.
        before = [np.roll(x, distance, axis) for x in values]
        combined = scan.combine_fn.fn(
            *map(scan.to_tensor, before, dtypes), *map(scan.to_tensor, values, dtypes)
        )
        first[axis] = slice(distance)
        for i, x in enumerate(combined if isinstance(combined, tuple) else (combined,)):
            scanned = x.handle.data.astype(values[i].dtype)  # a copy
            scanned[tuple(first)] = values[i][tuple(first)]
            values[i] = scanned
        distance *= 2
    return list(map(scan.to_tensor, values, dtypes))


@contextmanager
def original_scan() -> Iterator[None]:
    """Scans one element after another, as Triton's interpreter does."""
    from triton.runtime.interpreter import ScanOps

    replaced = ScanOps.generic_scan
    ScanOps.generic_scan = getattr(ScanOps, "one_by_one", replaced)
    try:
        yield
    finally:
        ScanOps.generic_scan = replaced
