"""Which modules of a model can be tapped, and where their attention functions are looked up."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
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
_CROSS = ("encoder_attn", "cross")
"""Names of attention to an encoder, which a decoder on its own has and does not call."""
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
    interface = _interface(type(module).forward)
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    found = []
    if interface is not None and name in interface:
        found.append((interface._local_mapping, name, interface[name]))
    # Eager attention is a function of the layer's own file, whose name is the only convention.
    forward = inspect.unwrap(type(module).forward)
    names = [n for n in forward.__code__.co_names if n.endswith(EAGER)]
    return found + [(forward.__globals__, n, forward.__globals__[n]) for n in names]


def models_of(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The transformers models that are behind a score, by name, the outermost first.

    Of models beside each other it is the one that reads tokens, and what is inside of it.

    Raises:
        ValueError: there is none, or there are several.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind}")
    models = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    beside = [n for n in models if not any(is_inside(n, other) for other in models if other != n)]
    reading = [n for n in beside if models[n].main_input_name == "input_ids"] or beside
    if not reading:
        raise ValueError(f"model: {kind} holds no transformers.PreTrainedModel")
    if len(reading) > 1:
        raise ValueError(
            f"model: {kind} holds {len(reading)} models that read text ({', '.join(reading)}), and the score "
            "may be of any or all; want a tap on one of them, or one on each"
        )
    return {n: m for n, m in models.items() if n == reading[0] or is_inside(n, reading[0])}


def outermost(model: nn.Module) -> PreTrainedModel:
    """The first of ``models_of(model)``: the classifier itself, whatever is around it."""
    return next(iter(models_of(model).values()))


def embeddings(models: Sequence[PreTrainedModel]) -> list[nn.Module]:
    """The modules that embed the models' tokens: one, or several with the same weight."""
    for model in models:
        try:
            embedding: Any = model.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module):
            own = set(embedding.modules())  # an adapter's has the embedding that it changes inside
            same = (m for m in models[0].modules() if isinstance(m, nn.Embedding) and m not in own)
            return [embedding, *(m for m in same if m.weight is getattr(embedding, "weight", None))]
    return []


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens it has embeddings for."""
    embedding: Any = model.get_input_embeddings()
    sizes = (m.num_embeddings for m in embedding.modules() if isinstance(m, nn.Embedding))
    return next(sizes, model.config.get_text_config().vocab_size)


def attention_layers(model: nn.Module, models: Mapping[str, PreTrainedModel]) -> list[str]:
    """The names of the attention layers that read the text and can be tapped, the lowest first.

    Of a model that also sees or hears, those of the model that has the token embeddings. Where some are
    causal the others attend to something else (cross attention); where none is the model is an encoder.

    Args:
        models: ``models_of(model)``.
    """
    kind = type(model).__name__
    outermost = next(iter(models.values()))
    if outermost.config.is_encoder_decoder:
        raise ValueError(
            f"model: {type(outermost).__name__} reads the text in an encoder and a decoder, so that no one "
            "row of attention is behind its score; want source='gradient_embedding'"
        )
    modules = dict(model.named_modules())
    found = [n for n, m in modules.items() if can_tap(type(m)) and any(is_inside(n, p) for p in models)]
    text = embeddings(list(models.values()))
    if text:
        reads_text = {name: any(m is text[0] for m in inner.modules()) for name, inner in models.items()}
        found = [n for n in found if reads_text[max((p for p in models if is_inside(n, p)), key=len)]]
    found = [n for n in found if not any(cross in n.rpartition(".")[2] for cross in _CROSS)]
    names = [n for n in found if getattr(modules[n], "is_causal", True)] or found
    if not names:
        raise ValueError(
            f"model: {kind} has no attention layer that takes its function from transformers' "
            "AttentionInterface, so its queries and keys cannot be tapped; want source='gradient_embedding'"
        )
    return names


def layers_around(model: nn.Module, attention: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The list of layers that an attention module stands in, and the one of them that has it."""
    parts = next(name for name, module in model.named_modules() if module is attention).split(".")
    for depth in range(len(parts) - 1, 0, -1):
        layers = model.get_submodule(".".join(parts[:depth]))
        if isinstance(layers, nn.ModuleList):
            return layers, layers[int(parts[depth])]
    raise ValueError(f"{type(attention).__name__} is in no list of layers")


def is_compiled(module: nn.Module) -> bool:
    if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
        return True
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # forward = torch.compile(…)


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
    """``ValueError`` for attention that shards its keys."""
    for _, _, function in lookups(module):
        if inspect.unwrap(function).__module__.split(".")[0] in _SHARDS_KEYS:
            raise ValueError(
                f"model: {name} calls {function.__module__}, which shards the keys over devices (ring)"
            )


def is_inside(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(f"{parent}.")


def classifier(models: Sequence[PreTrainedModel]) -> tuple[PreTrainedModel, bool] | None:
    """The sequence classifier among the models, and whether it scores the last token that is no pad token.

    None where there is none; that of any other is not known from its code.
    """
    for model in models:
        kinds = [kind for kind in type(model).__mro__ if "forward" in vars(kind)]
        for kind in kinds:
            code = inspect.unwrap(vars(kind)["forward"]).__code__
            # The one name that all heads of transformers give to the last token that is not padding.
            if "last_non_pad_token" in code.co_varnames:
                return model, True
            if "super" not in code.co_names:
                break
        if any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__):
            return model, False
    return None
