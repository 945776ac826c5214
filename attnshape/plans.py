"""Calls that repeat: what follows from the layout of the arguments is found out once, launches included.

A call is known by its arguments' layout: sizes, strides, dtypes, devices and alignment of tensors, and the
values of all else. The second call of a layout is watched; from the third on its launches are started again
on the tensors given (``csrc_triton.plan``). A call that computes more, or raises, is made anew each time.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from attnshape.config import GroupConfig, ShapingConfig, Whitening
from attnshape.types import KL, AttentionInputs, Response

MOST = 256
"""Layouts of a function that are known at once; the oldest is forgotten first."""


class Layout:
    """What a call's arguments have in common with those of calls like it, and what is this call's own.

    Raises:
        TypeError, RuntimeError: an argument of another type, or a tensor without memory.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tensors: list[Tensor] = []
        self.kl_coef = 0.0  # changes from step to step
        self.parts: list[Any] = [len(args)]
        for x in args:
            self._add(x)
        for name, x in kwargs.items():
            self.parts.append(name)
            self._add(x)
        addresses = [x.data_ptr() for x in self.tensors]
        aligned = [address % 16 == 0 for address in addresses]
        if not all(aligned):
            self.parts += aligned
        if len(set(addresses)) < len(addresses):
            self.parts += map(addresses.index, addresses)
        self.own = [*addresses, self.kl_coef]
        self.key = tuple(self.parts)

    def _add(self, x: Any) -> None:
        kind, parts = type(x), self.parts
        if kind is Tensor or kind is Parameter:
            self.tensors.append(x)
            parts += (x.dtype, x.device, x.shape, x.is_contiguous() or x.stride())
        elif kind is AttentionInputs or kind is Response:
            parts.append(kind)
            for field in x.__dict__.values():
                if field is None:
                    parts.append(None)
                else:
                    self._add(field)
        elif kind is KL:
            parts.append(kind)
            self._add((x.logprobs, x.ref_logprobs, x.estimate))
            if type(x.coef) is float or type(x.coef) is int:
                self.kl_coef = float(x.coef)
                parts.append(math.isfinite(x.coef))
            else:
                self._add(x.coef)
        elif kind is list or kind is tuple:
            parts.append(len(x))
            for item in x:
                self._add(item)
        elif kind is ShapingConfig or kind is GroupConfig:
            parts.append(_settings(x))
        elif kind in PLAIN:
            parts += (kind, x)
        else:
            raise TypeError(f"got {kind.__name__}, which a key would keep alive")


PLAIN = {type(None), str, bool, int, float, Whitening}


@functools.lru_cache(MOST)
def _settings(config: ShapingConfig | GroupConfig) -> tuple[Any, ...]:
    values = tuple(vars(config).values())
    kinds = tuple(map(type, values))  # 1 is True is 1.0
    if any(isinstance(x, Tensor) for x in values):
        raise TypeError("got settings with a tensor, which no plan reads")
    return kinds + values


class Known(NamedTuple):
    """How the calls of a layout are repeated."""

    plan: Callable[[list[Any]], list[Tensor]]
    structure: Callable[[list[Tensor]], Any]
    """From the tensors that a plan fills to what the function returns."""


SEEN, NEVER = "seen once", "cannot be repeated"


class Repeating:
    """A function whose calls are repeated where they can be."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.known: dict[tuple[Any, ...], Known | str] = {}
        _ALL.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_on_current_gpu(*args, *kwargs.values()) or kwargs.get("validate"):
            return self.function(*args, **kwargs)
        if _kernels("launch").launches_are_replaced():
            return self.function(*args, **kwargs)
        try:
            layout = Layout(args, kwargs)
            known = self.known.get(layout.key)
        except (TypeError, RuntimeError):
            return self.function(*args, **kwargs)
        if isinstance(known, Known):
            return known.structure(known.plan(layout.own))
        if known is SEEN:
            result, self.known[layout.key] = self._watched(layout, args, kwargs)
            return result
        result = self.function(*args, **kwargs)
        if known is None:
            self.known[layout.key] = SEEN
            if len(self.known) > MOST:
                self.known.pop(next(iter(self.known)), None)
        return result

    def _watched(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Known | str]:
        kernels, filled = _kernels("plan"), list[Tensor]()
        with kernels.Watch(layout.own) as watch:
            result = self.function(*args, **kwargs)
        structure = structure_of(result, filled)
        try:
            return result, Known(kernels.Plan(watch, filled), structure)
        except ValueError:
            return result, NEVER


_ALL: list[Repeating] = []


def forget() -> None:
    """As if nothing had been called: for whoever changes constants of ``csrc_triton``."""
    for function in _ALL:
        function.known.clear()


def is_on_current_gpu(*given: Any) -> bool:
    """Whether the first tensor among the arguments lies there; on another device calls are made anew."""
    for argument in given:
        x = tensor_of(argument)
        if x is not None:
            return x.is_cuda and x.get_device() == torch.cuda.current_device()
    return False


def tensor_of(x: Any) -> Tensor | None:
    """One that an argument is or holds."""
    while isinstance(x, list | tuple) and x:
        x = x[0]
    if isinstance(x, AttentionInputs):
        return x.key
    if isinstance(x, Response):
        return x.mask
    return x if isinstance(x, Tensor) else None


@functools.cache
def _kernels(module: str) -> Any:
    return importlib.import_module(f"csrc_triton.{module}")  # triton is there on Linux only


def structure_of(x: Any, tensors: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """Appends a result's tensors; returns what makes the like of it from others."""
    if x is None:
        return lambda _: None
    if isinstance(x, Tensor):
        tensors.append(x)
        return operator.itemgetter(len(tensors) - 1)
    kind, parts = type(x), x if isinstance(x, tuple) else vars(x).values()
    made = [structure_of(part, tensors) for part in parts]
    return lambda filled: kind(*[make(filled) for make in made])
