"""Triton's interpreter in a fraction of its time, for the tests.

Left alone, it patches ``triton.language`` anew at every call of a device function, scans one element at a
time, computes every sum of integers once more in 64 bits for an assertion that is switched off, and makes a
table of all dtypes to look one up. For each tensor it works out anew what follows from its type, and for each
operation whether its operands are of one type and what tensor a number beside one becomes.

``install`` patches the language once, at the first launch, scans by doubling, remembers what belongs to a
type, and leaves out the rest. What a kernel computes stays the same, but for the order in which a scan with a
``combine_fn`` of its own adds: ``original_scan`` gives the first order back.

Only code that is known here is replaced: with any other, Triton's interpreter stays as it is. With all of
them a mask of numbers is refused, as 3.9 does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

KNOWN = {"1df8b5e1ca8ada57"}
"""Digests of the code that is replaced, and of what calls it: triton 3.7.1."""
MASKS = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}
"""Operations, and which of their arguments is a mask."""


def install() -> str:
    """Replaces what is slow; a line that says whether it did."""
    import triton
    from triton.language import core
    from triton.runtime import interpreter

    for name, place in MASKS.items():
        method = getattr(interpreter.InterpreterBuilder, name)
        setattr(interpreter.InterpreterBuilder, name, with_a_mask(method, place))
    found, by = digest(), f"interpreted by triton {triton.__version__}"
    if found not in KNOWN:
        return f"{by} as it is, slowly: its interpreter ({found}) is not known"
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # without which the assertion is never made
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = looked_up_once(interpreter._get_np_dtype)
    interpreter.TensorHandle.__init__ = handle_of_data
    interpreter._patch_attr = bound_to(interpreter.interpreter_semantic)
    core.dtype.__eq__ = equal_at_a_glance(core.dtype.__eq__)
    core.block_type.__init__ = shared_by_type(core.block_type.__init__)
    core.block_type.with_element_ty = remembered(core.block_type.with_element_ty)
    core.tensor.__init__ = tensor_of_type
    semantics = type(interpreter.interpreter_semantic)
    semantics.binary_op_type_checking_impl = alike_already(semantics.binary_op_type_checking_impl, core)
    semantics.broadcast_impl_value = of_one_shape(semantics.broadcast_impl_value)
    interpreter._patch_lang = PatchedOnce(interpreter)
    interpreter.ScanOps.one_by_one = interpreter.ScanOps.generic_scan
    interpreter.ScanOps.generic_scan = scan_by_doubling
    return f"{by}, made faster by tests/support/fast_interpreter.py"


def digest() -> str:
    """Of the files of everything that ``install`` replaces, and of what calls it."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    files = (Path(module.__file__).read_bytes() for module in (interpreter, core, semantic))
    return hashlib.sha256(b"".join(files)).hexdigest()[:16]


def with_a_mask(method: Any, place: int) -> Any:
    """An operation that takes no numbers for a mask: Triton before 3.9 makes conditions of them."""

    def checked(builder: Any, *arguments: Any) -> Any:
        given = arguments[place].data.dtype
        if given != np.bool_:
            raise TypeError(f"the mask is {given}; want conditions: csrc_triton.device.layout.as_mask")
        return method(builder, *arguments)

    return checked


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


def handle_of_data(handle: Any, data: np.ndarray, dtype: Any, attr: dict[str, Any] | None = None) -> None:
    """``TensorHandle``, whose size is not looked at."""
    handle.data, handle.dtype, handle.attr = data, dtype, {} if attr is None else attr


def bound_to(semantic: Any) -> Any:
    """``_patch_attr``, whose functions call what the decorator ``builtin`` decorated."""

    def patch_attr(obj: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
        plain = getattr(member, "__wrapped__", member)

        def bound(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return plain(*args, **kwargs)

        scope.set_attr(obj, name, bound)

    return patch_attr


def equal_at_a_glance(equal: Any) -> Any:
    """``dtype.__eq__``; there is one object of each dtype, nearly always."""
    return lambda dtype, other: dtype is other or equal(dtype, other)


def shared_by_type(make: Any) -> Any:
    """``block_type.__init__``, once for all blocks of a type; not of pointers, whose names hide some."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def shared(block: Any, element: Any, shape: Any) -> None:
        if element.is_ptr():
            return make(block, element, shape)
        key = element.name, *shape
        if key not in known:
            make(block, element, shape)
            known[key] = vars(block)
        block.__dict__ = known[key]
        return None

    return shared


def alike_already(check: Any, core: Any) -> Any:
    """``binary_op_type_checking_impl``: tensors of one type stay, numbers are made constants once.

    Not of unsigned types: a shift makes their arrays signed in place.
    """
    signed = {x.name for x in (core.int1, core.int32, core.int64, core.float16, core.float32, core.float64)}
    most = 64  # constants of a type

    def checked(semantic: Any, lhs: Any, rhs: Any, *flags: bool, **of_inline_assembly: bool) -> Any:
        if of_inline_assembly:
            return check(semantic, lhs, rhs, *flags, **of_inline_assembly)
        left, right = type(lhs) is core.tensor, type(rhs) is core.tensor
        division = len(flags) == 4 and flags[3]
        if division or not (left or right):
            return check(semantic, lhs, rhs, *flags)
        if left and right:
            if lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr():
                return semantic.broadcast_impl_value(lhs, rhs)
            return check(semantic, lhs, rhs, *flags)
        given, number = (lhs, rhs) if left else (rhs, lhs)
        if type(number) not in (int, float, bool) or given.type.scalar.name not in signed:
            return check(semantic, lhs, rhs, *flags)
        constants = vars(given.type).setdefault("_constants", {})
        key = type(number), number, flags
        if key not in constants:
            both = check(semantic, lhs, rhs, *flags)
            same, constant = both if left else both[::-1]
            if same is not given or constant.dtype.name not in signed or len(constants) == most:
                return both
            constant.handle.data.flags.writeable = False
            constants[key] = constant
        return (lhs, constants[key]) if left else (constants[key], rhs)

    return checked


def of_one_shape(broadcast: Any) -> Any:
    """``broadcast_impl_value``: tensors of one shape stay as they are."""

    def values(semantic: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if vars(a) is vars(b) or (a.is_block() and b.is_block() and a.shape.values == b.shape.values):
            return lhs, rhs
        return broadcast(semantic, lhs, rhs)

    return values


def remembered(with_element_ty: Any) -> Any:
    """``block_type.with_element_ty``, which makes a type once; not pointers, whose names do not tell all."""

    def known_or_made(block: Any, element: Any) -> Any:
        if element.is_ptr():
            return with_element_ty(block, element)
        known = vars(block).setdefault("_with_element", {})
        if element.name not in known:
            known[element.name] = with_element_ty(block, element)
        return known[element.name]

    return known_or_made


def tensor_of_type(tensor: Any, handle: Any, type: Any) -> None:
    """``tensor.__init__``, with what belongs to the type made once."""
    known = vars(type).get("_of_tensor")
    if known is None:
        from triton.language import core

        shape = type.shape if type.is_block() else ()
        parts = core.constexpr(math.prod(shape)), type.scalar, core.tuple([core.constexpr(n) for n in shape])
        known = type._of_tensor = parts
    tensor.handle, tensor.type = handle, type
    tensor.numel, tensor.dtype, tensor.shape = known


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
