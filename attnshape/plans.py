"""Calls that repeat: what follows from the layout of the arguments is found out once, launches included.

A call is known by its arguments' layout: sizes, strides, dtypes, devices and alignment of tensors, and the
values of all else. The second call of a layout is watched; from the third on its launches are started again
on the tensors given (``csrc_triton.plan``). A call that computes more, or raises, is made anew each time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from attnshape.config import GroupConfig, ShapingConfig, Whitening
from attnshape.types import KL, AttentionInputs, Response

MOST = 256
"""Layouts of a function that are known at once; the oldest is forgotten first."""


Key: TypeAlias = tuple[Any, ...]


class Layouts:
    """Reads what a call's arguments have in common with those of calls like it, and what is this call's own.

    The latter are addresses, and the coefficient of a KL penalty, which changes from step to step. What reads
    is written for each structure of arguments.
    """

    def __init__(self) -> None:
        self.readers: dict[Key, list[Callable[..., Any]]] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, tuple[Any, ...]]:
        """The key of the layout, and what is the call's own.

        Raises:
            TypeError, RuntimeError: an argument of another type, or a tensor without memory.
        """
        named = (len(args), *kwargs)
        for read in self.readers.get(named, ()):
            found = read(args, kwargs)
            if found:
                return found  # type: ignore[no-any-return]
        read = Reader(args, kwargs).function()
        readers = self.readers.setdefault(named, [])
        readers.append(read)
        del readers[:-MOST]
        return read(args, kwargs)  # type: ignore[no-any-return]


class Reader:
    """Writes what reads the layout of arguments of one structure, and finds nothing in those of another."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        written = _kernels("written")
        self.text = written.Written("read(args, kwargs)")
        self.conditions = ["True"]
        self.tensors: list[str] = []
        self.key = [self.text.constant(object())]
        self.number = "0.0"
        line, tuple_of = self.text.line, written.tuple_of
        names = [f"given{i}" for i in range(len(args) + len(kwargs))]
        line(f"{tuple_of(names)} = (*args, *kwargs.values())")
        for name, x in zip(names, (*args, *kwargs.values()), strict=True):
            self.add(name, x)
        addresses = [f"{x}.data_ptr()" for x in self.tensors]
        own = [f"at{i}" for i in range(len(addresses))]
        line(f"if not ({' and '.join(self.conditions)}):")
        line("    return None")
        line(f"{tuple_of(own)} = addresses = {tuple_of(addresses)}")
        line(f"key = {tuple_of([*self.key, *(f'{x}.{part}' for x in self.tensors for part in OF_TENSOR)])}")
        line(f"if not ({' and '.join(['True', *(f'{x}.is_contiguous()' for x in self.tensors)])}):")
        line(f"    key += {tuple_of(f'{x}.stride()' for x in self.tensors)}")
        line(f"if ({' | '.join(own or ['0'])}) % 16:")
        line("    key += ('aligned', *[x % 16 == 0 for x in addresses])")
        line(f"if len({{*addresses}}) < {len(own)}:")
        line("    key += ('the same', *map(addresses.index, addresses))")
        line(f"return key, {tuple_of([*own, self.number])}")

    def add(self, at: str, x: Any) -> None:
        """What lies ``at`` this place."""
        kind = type(x)
        if x is None:
            self.conditions.append(f"{at} is None")
            return
        name = f"part{len(self.conditions)}"
        self.conditions.append(f"type({name} := {at}) is {self.text.constant(kind)}")
        if kind is Tensor or kind is Parameter:
            self.tensors.append(name)
        elif kind is KL and type(x.coef) in (float, int):
            for field in ("logprobs", "ref_logprobs", "estimate"):
                self.add(f"{name}.{field}", getattr(x, field))
            self.conditions.append(f"type({name}.coef) in {self.text.constant((float, int))}")
            self.key.append(f"{self.text.constant(math.isfinite)}({name}.coef)")
            self.number = f"float({name}.coef)"
        elif kind in (AttentionInputs, Response, KL):
            for held in dataclasses.fields(x):
                self.add(f"{name}.{held.name}", getattr(x, held.name))
        elif kind in (list, tuple):
            self.conditions.append(f"len({name}) == {len(x)}")
            for i, item in enumerate(x):
                self.add(f"{name}[{i}]", item)
        elif kind in (ShapingConfig, GroupConfig):
            self.key.append(f"{self.text.constant(_settings)}({name})")
        elif kind in PLAIN:
            self.key.append(name)
        else:
            raise TypeError(f"got {kind.__name__}, which a key would keep alive")

    def function(self) -> Callable[..., Any]:
        """From arguments to the key of their layout and what is the call's own; or None."""
        return self.text.function()  # type: ignore[no-any-return]


OF_TENSOR = "dtype", "device", "shape"
PLAIN = str, bool, int, float, Whitening


class Settings:
    """Stands for settings of the same values."""


@functools.lru_cache(MOST)
def _settings(config: ShapingConfig | GroupConfig) -> Settings:
    values = tuple(vars(config).values())
    kinds = tuple(map(type, values))  # 1 is True is 1.0
    if any(isinstance(x, Tensor) for x in values):
        raise TypeError("got settings with a tensor, which no plan reads")
    return _of_values(kinds + values)


@functools.lru_cache(MOST)
def _of_values(_: tuple[Any, ...]) -> Settings:
    return Settings()


SEEN, NEVER = "seen once", "cannot be repeated"


class Repeating:
    """A function whose calls are repeated where they can be."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.layout_of = Layouts()
        self.known: dict[Key, Callable[..., Any] | str] = {}
        _ALL.append(self)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function of these arguments."""
        if not is_on_current_gpu(args, kwargs) or kwargs.get("validate"):
            return self.function(*args, **kwargs)
        if _kernels("launch").launches_are_replaced():
            return self.function(*args, **kwargs)
        try:
            key, own = self.layout_of(args, kwargs)
            known = self.known.get(key)
        except (TypeError, RuntimeError):
            return self.function(*args, **kwargs)
        if callable(known):
            return known(own)
        if known is SEEN:
            result, self.known[key] = self._watched(own, args, kwargs)
            return result
        result = self.function(*args, **kwargs)
        if known is None:
            self.known[key] = SEEN
            if len(self.known) > MOST:
                self.known.pop(next(iter(self.known)), None)
        return result

    def _watched(
        self, own: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Callable[..., Any] | str]:
        kernels = _kernels("plan")
        with kernels.Watch(own) as watch:
            result = self.function(*args, **kwargs)
        try:
            return result, kernels.Plan(watch, result).function()
        except ValueError:
            return result, NEVER


_ALL: list[Repeating] = []


def forget() -> None:
    """As if nothing had been called: for whoever changes constants of ``csrc_triton``."""
    for function in _ALL:
        function.known.clear()


def is_on_current_gpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first tensor among the arguments lies there; on another device calls are made anew."""
    for given in (*args, *kwargs.values()):
        x = given if type(given) is Tensor else tensor_of(given)
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
