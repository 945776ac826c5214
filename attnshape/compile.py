"""The public functions as ``torch.library`` operators, for ``torch.compile``, ``make_fx`` and fake tensors.

An operator takes tensors, numbers, and a string that says how they make up the function's arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attnshape.config import GroupConfig, ShapingConfig, Whitening
from attnshape.plans import Repeating
from attnshape.types import (
    KL,
    Advantages,
    AttentionInputs,
    GroupAdvantages,
    Response,
    RowStats,
    ShapedRewards,
    TokenInputs,
    compute_dtype,
)

P = ParamSpec("P")
T = TypeVar("T")

SCHEMA = "(Tensor[] tensors, float[] floats, SymInt[] ints, str structure) -> Tensor[]"
FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(field.name for field in dataclasses.fields(cls))
    for cls in (AttentionInputs, Response, KL, ShapingConfig, GroupConfig, Whitening)
}
CLASSES = {cls.__name__: cls for cls in FIELDS}
TENSOR, FLOAT, INT = 0, 1, 2


class Leaves(NamedTuple):
    """What a structure holds, in order."""

    tensors: list[Tensor]
    floats: list[float]
    ints: list[int]


def flatten(x: object, leaves: Leaves) -> str:
    """Appends what ``x`` holds to ``leaves``; what is left, as JSON: a number stands for a leaf."""
    if x is None:
        return "null"
    if isinstance(x, Tensor):
        leaves.tensors.append(x)
        return str(TENSOR)
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, float):
        leaves.floats.append(x)
        return str(FLOAT)
    if isinstance(x, int):
        leaves.ints.append(x)
        return str(INT)
    if isinstance(x, str):
        return f'"{x}"'
    if isinstance(x, list | tuple):
        return "[" + ",".join([flatten(item, leaves) for item in x]) + "]"
    if isinstance(x, dict):
        return '{"dict":' + flatten([list(x), list(x.values())], leaves) + "}"
    if isinstance(x, dist.ProcessGroup):
        return '{"ProcessGroup":["' + x.group_name + '"]}'
    if type(x) not in FIELDS:
        raise TypeError(f"got {type(x).__name__}, which cannot be compiled")
    items = [flatten(getattr(x, name), leaves) for name in FIELDS[type(x)]]
    return '{"' + type(x).__name__ + '":[' + ",".join(items) + "]}"


def unflatten(structure: str, leaves: Leaves) -> Any:
    """The inverse of ``flatten``; lists become tuples."""
    return _built(json.loads(structure), [iter(kind) for kind in leaves])


def _built(x: Any, kinds: Sequence[Iterator[Any]]) -> Any:
    # No function within the other: one that calls itself keeps the tensors until garbage is collected.
    if x is None or isinstance(x, bool | str):
        return x
    if isinstance(x, int):
        return next(kinds[x])
    if isinstance(x, list):
        return tuple(_built(item, kinds) for item in x)
    [(name, items)] = x.items()
    if name == "dict":
        return dict(zip(*_built(items, kinds), strict=True))
    if name == "ProcessGroup":
        return dist.distributed_c10d._resolve_process_group(items[0])
    return CLASSES[name](**dict(zip(FIELDS[CLASSES[name]], _built(items, kinds), strict=True)))


class Output(NamedTuple):
    shape: Sequence[int]
    dtype: torch.dtype


def replaced(x: Any, output: Callable[[Output], Any]) -> Any:
    """The structure ``x`` with something else in place of each ``Output``."""
    if isinstance(x, Output):
        return output(x)
    return type(x)(*[replaced(item, output) for item in x]) if isinstance(x, tuple) else x


def owned(x: Tensor) -> Tensor:
    """``x``, contiguous and with memory of its own: an operator's outputs must not share any."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if whole else x.clone(memory_format=torch.contiguous_format)


in_full: Any = torch._C._DisableAutocast
"""Context in which products are of their operands' dtype, also where the caller has autocast on."""


def is_traced() -> bool:
    """Whether a compiler looks on, or a mode that replaces tensors by fake ones or records what is done."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def operator(
    outputs: Callable[[dict[str, Any]], Any],
    prepare: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Registers a function as ``attnshape::<its name>``, which is called instead where a compiler looks on.

    Either way no gradient is recorded, and autocast is off.

    Args:
        outputs: from the function's arguments to the structure it returns, of ``Output``.
        prepare: changes the arguments before they enter the operator.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}

        def arguments(*flat: Any) -> dict[str, Any]:
            *leaves, structure = flat
            return dict(zip(names, unflatten(structure, Leaves(*leaves)), strict=True))

        def compute(
            tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], structure: str
        ) -> list[Tensor]:
            leaves = Leaves([], [], [])
            with in_full():
                result: Any = function(**arguments(tensors, floats, ints, structure))  # type: ignore[call-arg]
            flatten(result, leaves)
            return [owned(x) for x in leaves.tensors]

        def fake(
            tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], structure: str
        ) -> list[Tensor]:
            made: list[Tensor] = []

            def make(x: Output) -> None:
                made.append(torch.empty(x.shape, dtype=x.dtype, device=tensors[0].device))

            replaced(outputs(arguments(tensors, floats, ints, structure)), make)
            return made

        registered: Any = torch.library.custom_op(
            f"attnshape::{function.__name__}", compute, mutates_args=(), schema=SCHEMA
        )
        registered.register_fake(fake)

        def without_gradient(*args: P.args, **kwargs: P.kwargs) -> T:
            grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)  # a tenth of what `torch.no_grad` costs
            try:
                if not torch._C._is_any_autocast_enabled():
                    return function(*args, **kwargs)
                with in_full():
                    return function(*args, **kwargs)
            finally:
                torch._C._set_grad_enabled(grad)

        repeating = Repeating(without_gradient)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not is_traced():
                return repeating.call(args, kwargs)  # type: ignore[no-any-return]
            given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            if prepare is not None:
                prepare(given)
            leaves = Leaves([], [], [])
            structure = flatten([given[name] for name in names], leaves)
            # Not under `torch.no_grad`, which compiled code does not leave when the operator raises.
            detached = [x.detach() for x in leaves.tensors]
            computed = iter(registered(detached, leaves.floats, leaves.ints, structure))
            return replaced(outputs(given), lambda _: next(computed))  # type: ignore[no-any-return]

        return call

    return decorate


# What the public functions return -----------------------------------------------------------------------


def _layers(x: Any) -> Sequence[AttentionInputs]:
    if isinstance(x, AttentionInputs):
        return (x,)
    return x if isinstance(x, list | tuple) else ()


def _operands(x: Any) -> list[Tensor]:
    return [tensor for layer in _layers(x) for tensor in (layer.query, layer.key)]


def attention_row(given: dict[str, Any]) -> Output:
    key = _layers(given["inputs"])[0].key
    packed = _layers(given["inputs"])[0].packed
    shape = key.shape[:1] if packed else (key.shape[0], key.shape[2])
    return Output(shape, compute_dtype(*_operands(given["inputs"])))


def credit_of(argument: str) -> Callable[[dict[str, Any]], Output]:
    """Credit of each response token from the layers given as ``argument``."""

    def credit(given: dict[str, Any]) -> Output:
        mask = Response.of(given["response"]).mask
        return Output(mask.shape, compute_dtype(*_operands(given[argument])))

    return credit


def shape_rewards(given: dict[str, Any]) -> ShapedRewards:
    tokens = TokenInputs(*[given[name] for name in TokenInputs._fields])
    dtype = compute_dtype(given["score"], given["credit"], *tokens.floating, *_operands(given["credit"]))
    response = Response.of(given["response"])
    batch, token = response.batch_size, Output(response.mask.shape, dtype)
    moments, status = Output((batch, 3), dtype), Output((batch,), torch.int32)
    stats: Any = Output((batch, 4), dtype)
    kl = None if tokens.kl is None else token
    row_stats = RowStats(stats, bool(_layers(given["credit"])))
    shaped: list[Any] = [token, token, token, token, kl, status, moments, row_stats]
    return ShapedRewards(*shaped)


def kl_coef_as_tensor(given: dict[str, Any]) -> None:
    """Its value changes from step to step, and compilers specialise on numbers that enter an operator."""
    kl, score = given["kl"], given["score"]
    if isinstance(kl, KL) and isinstance(kl.coef, int | float):
        # A sum, and not `torch.full`, is what they take a changing number in.
        coef = torch.zeros((), dtype=compute_dtype(score), device=score.device) + kl.coef
        given["kl"] = KL(kl.logprobs, kl.ref_logprobs, coef, kl.estimate)


def gae(given: dict[str, Any]) -> Advantages:
    dtype = compute_dtype(given["rewards"], given["values"], given["bootstrap"])
    response = Response.of(given["response"])
    token: Any = Output(response.mask.shape, dtype)
    moments: Any = Output((response.batch_size, 3), dtype)
    return Advantages(token, token, moments)


def group_advantages(given: dict[str, Any]) -> GroupAdvantages:
    credits = given["credit"] if given["score"].ndim == 2 else [given["credit"]]
    floats = [given["score"], *credits, *[x for credit in credits for x in _operands(credit)]]
    dtype = compute_dtype(*floats)
    response = Response.of(given["response"])
    token: Any = Output(response.mask.shape, dtype)
    row: Any = Output((response.batch_size,), dtype)
    status: Any = Output((response.batch_size,), torch.int32)
    moments: Any = Output((response.batch_size, 3), dtype)
    return GroupAdvantages(token, row, token, status, moments)


def whiten(given: dict[str, Any]) -> Output:
    return Output(given["x"].shape, compute_dtype(given["x"]))
