"""How a model tells its taps what it does: hooks on modules, and attention functions that are wrapped."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from attnshape.tap.find import AttentionFunction, Mask, lookups

_PROBES = "_attention_probes"
_HOOKS = "_attention_hooks"

_lock = threading.Lock()


Given: TypeAlias = tuple[Tensor, Tensor, Tensor, Mask, dict[str, Any]]
"""Of an attention function: query, key, value, mask and options."""


class Watcher(Protocol):
    """What is told; ``index`` is the module's place in it."""

    def on_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...
    def on_return(self, index: int) -> None: ...
    def on_attention(
        self,
        index: int,
        function: AttentionFunction,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        options: dict[str, Any],
    ) -> Given: ...
    def on_attended(self, index: int, value: Tensor, output: Any) -> None: ...


@dataclass
class Probe:
    """An open tap as its modules carry it; ``index`` is the module's place in the tap."""

    tap: Watcher
    index: int


def watch(models: Collection[nn.Module], layers: Collection[nn.Module], tap: Watcher) -> list[Entry]:
    """Have the modules tell the tap; ``unwatch`` undoes it."""
    with _lock:
        for level, model in enumerate(models):
            _attach(model, Probe(tap, level))
            _hook(model)
        for index, layer in enumerate(layers):
            _attach(layer, Probe(tap, index))
        return [_install(*lookup) for layer in layers for lookup in lookups(layer)]


def unwatch(
    models: Collection[nn.Module], layers: Collection[nn.Module], tap: Watcher, entries: list[Entry]
) -> None:
    with _lock:
        while entries:
            _uninstall(entries.pop())
        for layer in layers:
            _detach(layer, tap)
        for model in models:
            if not _detach(model, tap):
                _unhook(model)


def _attach(module: nn.Module, probe: Probe) -> None:
    setattr(module, _PROBES, (*getattr(module, _PROBES, ()), probe))


def _detach(module: nn.Module, tap: Watcher) -> bool:
    """Take the tap off the module; whether any other is left."""
    left = tuple(probe for probe in getattr(module, _PROBES, ()) if probe.tap is not tap)
    if left:
        setattr(module, _PROBES, left)
    elif hasattr(module, _PROBES):
        delattr(module, _PROBES)
    return bool(left)


def _on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not in_trial():
        for probe in getattr(module, _PROBES, ()):
            probe.tap.on_call(probe.index, args, kwargs)


def _on_return(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not in_trial():
        for probe in getattr(module, _PROBES, ()):
            probe.tap.on_return(probe.index)


def _hook(module: nn.Module) -> None:
    # The same functions for every tap: with a function of its own each tap would be compiled anew.
    if not hasattr(module, _HOOKS):
        before = module.register_forward_pre_hook(_on_call, with_kwargs=True)
        setattr(module, _HOOKS, (before, module.register_forward_hook(_on_return)))


def _unhook(module: nn.Module) -> None:
    for handle in vars(module).pop(_HOOKS):
        handle.remove()


def _watched(function: AttentionFunction) -> AttentionFunction:
    """``function`` that tells the taps on its module what it is called with."""

    @functools.wraps(function)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Any
    ) -> Any:
        if in_trial():
            if module in _trials[threading.get_ident()]:
                own = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
                return own.transpose(1, 2).contiguous(), None
            return function(module, query, key, value, attention_mask, **options)
        probes = getattr(module, _PROBES, ())
        for probe in probes:
            query, key, value, attention_mask, options = probe.tap.on_attention(
                probe.index, function, query, key, value, attention_mask, options
            )
        output = function(module, query, key, value, attention_mask, **options)
        for probe in probes:
            probe.tap.on_attended(probe.index, value, output)
        return output

    return attend


_tapped = functools.cache(_watched)
"""One object per function: with another each tap would be compiled anew."""


def _watched_method(method: MethodType) -> AttentionFunction:
    """The same of a module's own method: GPT-J's, which scales by a divisor and returns heads first."""
    module: Any = method.__self__

    def eager_attention_forward(
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        rest: tuple[Any, ...],
        **options: Any,
    ) -> Any:
        heads, weights = method(query, key, value, mask, *rest)
        return heads.transpose(1, 2), weights

    watched = _watched(eager_attention_forward)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask = None, *rest: Any) -> Any:
        told = {"rest": rest, "scaling": 1 / float(module.scale_attn), "dropout": module.attn_dropout.p}
        heads, weights = watched(module, query, key, value, mask, **told)
        return heads.transpose(1, 2), weights

    return attend


_trials: dict[int, frozenset[nn.Module]] = {}
"""Of each thread whose forward is a trial: the modules whose attention moves nothing in it."""


def in_trial() -> bool:
    """Whether this forward is a trial of the tap's own, of which no tap is told."""
    # A compiled graph cannot ask which thread runs it; trials do not run compiled.
    return not torch.compiler.is_compiling() and threading.get_ident() in _trials


@contextlib.contextmanager
def trial(still: Collection[nn.Module] = ()) -> Iterator[None]:
    """Forwards of this thread are trials; the attention of ``still`` gives each token its own value."""
    with _lock:
        entries = [_install(*lookup) for module in still for lookup in lookups(module)]
    _trials[threading.get_ident()] = frozenset(still)
    try:
        yield
    finally:
        del _trials[threading.get_ident()]
        with _lock:
            for entry in entries:
                _uninstall(entry)


@dataclass(eq=False)
class Entry:
    """A function that open taps have replaced in a table."""

    table: dict[str, Any]
    name: str
    replacement: AttentionFunction
    previous: AttentionFunction | None
    users: int = 0


_entries: list[Entry] = []


def _install(table: dict[str, Any], name: str, function: AttentionFunction) -> Entry:
    entry = next((e for e in _entries if e.table is table and e.name == name), None)
    if entry is None:
        replacement = _watched_method(function) if isinstance(function, MethodType) else _tapped(function)
        entry = Entry(table, name, replacement, table.get(name))
        _entries.append(entry)
        table[name] = replacement
    entry.users += 1
    return entry


def _uninstall(entry: Entry) -> None:
    entry.users -= 1
    if entry.users:
        return
    _entries.remove(entry)
    # What somebody else put there meanwhile stays.
    if entry.table.get(entry.name) is not entry.replacement:
        return
    if entry.previous is None:
        del entry.table[entry.name]
    else:
        entry.table[entry.name] = entry.previous
