"""Which modules of a model can be tapped, and where their attention functions are looked up."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

AttentionFunction: TypeAlias = Callable[..., Any]
Mask: TypeAlias = Tensor | BlockMask | None

EAGER = "eager_attention_forward"
_METHOD, _METHOD_CLASSES = "_attn", ("GPTJAttention",)
"""Attention that is a method of its module, and goes through no interface."""
_SHARDS_KEYS = ("ring_flash_attn", "deepspeed")


@functools.cache
def _interface(forward: Callable[..., Any]) -> AttentionInterface | None:
    """The table where modules with this ``forward`` look their attention function up, if they do."""
    forward = inspect.unwrap(forward)
    names = forward.__code__.co_names if inspect.isfunction(forward) else ()
    values = (forward.__globals__.get(name) for name in names)
    return next((value for value in values if isinstance(value, AttentionInterface)), None)


def has_method(kind: type[nn.Module]) -> bool:
    return kind.__name__ in _METHOD_CLASSES


def can_tap(kind: type[nn.Module]) -> bool:
    return has_method(kind) or _interface(kind.forward) is not None


def lookups(module: Any) -> list[tuple[dict[str, Any], str, AttentionFunction]]:
    """The entries, as (table, name, function), one of which an attention layer calls."""
    if has_method(type(module)):
        return [(vars(module), _METHOD, getattr(module, _METHOD))]
    interface, name = _interface(type(module).forward), module.config._attn_implementation
    found = []
    if interface is not None and name in interface:
        found.append((interface._local_mapping, name, interface[name]))
    # Eager attention is a function of the layer's own file, whose name is the only convention.
    forward = inspect.unwrap(type(module).forward)
    names = [n for n in forward.__code__.co_names if n.endswith(EAGER)]
    return found + [(forward.__globals__, n, forward.__globals__[n]) for n in names]


def is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def choose(names: Sequence[str], layer: int | Sequence[int]) -> list[str]:
    """The names of the attention layers that ``layer`` asks for."""
    chosen = []
    for index in layer if isinstance(layer, Sequence) else [layer]:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"layer: got {layer!r}, want int or a sequence of int")
        if not -len(names) <= index < len(names):
            raise ValueError(f"layer: got {index}, the model has {len(names)} attention layers")
        chosen.append(names[index])
    if not chosen:
        raise ValueError("layer: got an empty sequence, want one index or more")
    return chosen


def check_layer(name: str, module: Any) -> None:
    """``ValueError`` for attention that no ``AttentionInputs`` can express."""
    kinds, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = "" if kinds is None or index is None else kinds[index]
    if hasattr(module, "indexer") or any(word in kind for word in ("chunked", "sparse", "compressed")):
        raise ValueError(f"layer: {name!r} attends to chosen keys only ({kind or 'indexer'})")
    for _, _, function in lookups(module):
        if inspect.unwrap(function).__module__.split(".")[0] in _SHARDS_KEYS:
            raise ValueError(f"model: {function.__module__} shards the keys over devices (ring attention)")


def is_inside(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(f"{parent}.")


def pooling_head(models: Sequence[PreTrainedModel]) -> PreTrainedModel | str | None:
    """The model whose head scores what ``_pooled`` says; the class of one that differs; None for no head."""
    for model in models:
        kinds = [kind for kind in type(model).__mro__ if "forward" in vars(kind)]
        for kind in kinds:
            code = inspect.unwrap(vars(kind)["forward"]).__code__
            # The one name that all heads of transformers give to the last token that is not padding.
            if "last_non_pad_token" in code.co_varnames:
                return type(model).__name__ if model.config.is_encoder_decoder else model
            if "super" not in code.co_names:
                break
        if any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__):
            return type(model).__name__
    return None
