"""A reward model from a folder or the hub: what its checkpoint holds is used, or it is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import nn

from attnshape.text.score_fn import LOGIT, ScoreFn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Pooled: TypeAlias = Literal["pooled", "last_visible", "last_response"]
QueryPosition: TypeAlias = Pooled | int
"""The token whose hidden state gives the score: the head's own choice, the last of the text, the last of the
response, or one counted from the text's first token (0) or from its last (-1)."""

SourceName: TypeAlias = Literal[
    "attention",
    "columns",
    "rollout",
    "signed_rollout",
    "gradient_value",
    "gradient_embedding",
    "relevance",
    "leave_one_out",
]
"""Where credit is read from, see ``CreditSource``."""
Layers: TypeAlias = int | tuple[int, ...] | Literal["all"]
"""Attention layers, negative from the last."""

Sizes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a weight in the checkpoint, and in the model."""

SHOWN_NAMES, SHOWN_CHARACTERS = 4, 300
CLASSIFIER, BASE = "AutoModelForSequenceClassification", "AutoModel"


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Which reward model, and how score and credit are read from it.

    Args:
        model: a folder or hub name of a sequence classifier with a trained head, or of an adapter to one.
        score_fn: the score, of the model's logits.
        source, layer, span: of the credit, as for ``CreditSource``.
        query_position: the token whose hidden state gives the score.
        trust_remote_code: whether Python files that the checkpoint brings are run.
    """

    model: str
    score_fn: ScoreFn = LOGIT
    source: SourceName = "attention"
    layer: Layers | None = None
    span: int = 1
    query_position: QueryPosition = "pooled"
    trust_remote_code: bool = False


def parse_query_position(text: str) -> QueryPosition:
    """Raises ValueError for what is neither a name nor an integer."""
    if text in get_args(Pooled):
        return text  # type: ignore[return-value]
    try:
        return int(text)
    except ValueError:
        names = ", ".join(get_args(Pooled))
        raise ValueError(f"query_position: got {text!r}, want {names}, or an integer such as 0") from None


def parse_layers(text: str | None) -> Layers | None:
    """``"-1"``, ``"0,1"`` or ``"all"``; raises ValueError for what is none of them."""
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"layer: got {text!r}, want an integer, several with commas, or 'all'") from None
    return layers[0] if len(layers) == 1 else layers


def check_device(device: str) -> torch.device:
    """The device; raises ValueError where PyTorch cannot compute on it."""
    try:
        where = torch.device(device)
        torch.ones(1, device=where).item()
    except Exception as error:  # by the backend: RuntimeError, AssertionError, NotImplementedError, …
        raise ValueError(
            f"device: got {device!r}, want cpu, cuda, cuda:1, … ({in_one_line(error)})"
        ) from error
    return where


def in_one_line(error: BaseException) -> str:
    """What an error says, without its line breaks and its length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A reward model's tokenizer, from a folder or the hub.

    Raises:
        ValueError: there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    _check_folder(name)
    with _told(name, "has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: want a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}"
        )
    if not len(tokenizer):
        raise ValueError(f"{name}: its tokenizer has no tokens; are the tokenizer's files there?")
    return tokenizer


def load_reading(
    name: str, *, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig, int | None]:
    """A reward model's tokenizer, configuration and ``most_tokens``, without its weights.

    An adapter's are those of its base model. A padding token outside the vocabulary is none: then the last
    token of a text is scored.

    Raises:
        ValueError: there is no such model or tokenizer, or its score is computed by code that is not
            transformers'.
    """
    adapter = _adapter(name)
    tokenizer, found = _reading(name, adapter, trust_remote_code)
    return tokenizer, found.config, _most_tokens_of(found.config)


def most_tokens(model: PreTrainedModel) -> int | None:
    """Of a text, where a model keeps positions for padding, as RoBERTa does; None: it keeps none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words: Any = model.get_input_embeddings()
    tables = {m for m in model.modules() if isinstance(m, nn.Embedding)} - set(words.modules())
    kept = [
        table.padding_idx + 1
        for table in tables
        if table.padding_idx is not None and table.num_embeddings == positions
    ]
    return positions - max(kept) if positions is not None and kept else None


def _most_tokens_of(config: PretrainedConfig) -> int | None:
    """The same by the configuration: of a model without weights."""
    from transformers import AutoModelForSequenceClassification

    kinds = AutoModelForSequenceClassification._model_mapping
    if type(config) not in kinds:  # code of its own
        return None
    with torch.device("meta"):
        return most_tokens(kinds[type(config)](config))


def load_reward_model(
    name: str, device: str, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer, from a folder or the hub, ready to score.

    A head's biases are loaded, its number of labels is read off its weight where the configuration does not
    give it, and an adapter is put on its base model.

    Args:
        trust_remote_code: run the Python files that the checkpoint brings, with the caller's rights.

    Raises:
        ValueError: there is no such model; the checkpoint lacks weights of the model, holds some of another
            shape, or some that may change the score and have no place in it; its score is computed by code
            that is not transformers'; the tokenizer is missing or not a fast one; there is no such device.
    """
    check_device(device)
    adapter = _adapter(name)
    tokenizer, found = _reading(name, adapter, trust_remote_code)
    model = _load_whole(found, trust_remote_code, adapter)
    if adapter is not None:
        model = adapter.put_on(model)
    with _told(name, f"cannot be moved to {device}"):
        return model.to(device).eval(), tokenizer


def check_pooling(model: nn.Module, query_position: QueryPosition) -> None:
    """Raises ValueError where nobody knows which token a model of its own code scores."""
    from attnshape.tap.find import classifier, outermost

    own = outermost(model)
    kinds = [kind for kind in type(own).__mro__ if "forward" in vars(kind)]
    is_known = kinds[0].__module__.startswith("transformers.")
    # What is around a classifier hands its logits on; around anything else it makes the score.
    is_known = is_known and (own is model or classifier([own]) is not None)
    if query_position == "pooled" and not is_known:
        raise ValueError(
            f"query_position='pooled': which token {type(model).__name__} scores is in its own code; want "
            "'last_visible', 'last_response' or an integer such as 0 (--query-position)"
        )


def _check_folder(name: str) -> None:
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file, want a model's folder")
    # What is no name of the hub ("name" or "owner/name") can only be a folder that is not there.
    if not os.path.isdir(name) and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"{name}: there is no such folder")


@contextlib.contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Anything that is raised inside becomes a sentence; what transformers logs meanwhile is left out."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    hub = getLogger("huggingface_hub")
    hub_level, shows_progress = hub.level, logging.is_progress_bar_enabled()
    hub.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        if not os.path.isdir(name) and isinstance(error, OSError):
            what = "is no folder, and no model of the hub that can be had"
        raise ValueError(f"{name} {what}: {in_one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if shows_progress:
            logging.enable_progress_bar()


class _Found(NamedTuple):
    """A model that may be loaded."""

    name: str
    config: PretrainedConfig
    labels_given: bool
    """Whether the configuration says how many labels there are."""
    loader: str
    """The auto class."""


def _reading(
    name: str, adapter: Adapter | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, _Found]:
    base = name if adapter is None else adapter.base
    found = _find(base, trust_remote_code)
    if adapter is not None:
        with contextlib.suppress(ValueError):  # then it is the base model's
            return load_tokenizer(name, trust_remote_code=trust_remote_code), found
    return load_tokenizer(base, trust_remote_code=trust_remote_code), found


def _find(name: str, trust_remote_code: bool) -> _Found:
    import transformers

    _check_folder(name)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} is no model: it holds no config.json")
    with _told(name, "has no configuration that can be read"):
        raw, _ = transformers.PretrainedConfig.get_config_dict(name)
    saved_by = list(raw.get("architectures") or [])
    auto_map = raw.get("auto_map") or {}
    foreign = [kind for kind in saved_by if not hasattr(transformers, kind)]
    loader = BASE if foreign and CLASSIFIER not in auto_map and BASE in auto_map else CLASSIFIER
    code = auto_map.get(loader) if loader == CLASSIFIER or foreign else None
    if code and not trust_remote_code:
        raise ValueError(
            f"{name}: its score is computed by code of its own ({code}); want --trust-remote-code "
            "(trust_remote_code=True), which runs that code with your rights"
        )
    if foreign and not code:
        raise ValueError(
            f"{name} was saved by {foreign[0]}, which transformers does not have, so how it makes its score "
            'is not known; want a ...ForSequenceClassification, named in its config.json as "architectures"'
        )
    with _told(name, "has no configuration that can be read"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    kinds = transformers.AutoModelForSequenceClassification._model_mapping
    if not code and type(config) not in kinds:
        raise ValueError(
            f"{name}: transformers has no sequence classifier of model_type {config.model_type!r}, want one "
            "that has, or --trust-remote-code for one of its own"
        )
    text = config.get_text_config()
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and not 0 <= pad < (pad + 1 if size is None else size):
        text.pad_token_id = None
    return _Found(name, config, "num_labels" in raw or "id2label" in raw, loader)


def _load_whole(found: _Found, trust_remote_code: bool, adapter: Adapter | None) -> PreTrainedModel:
    """Loads again where what was found says how: with the labels that the head has, and with its biases."""
    import transformers

    name, config, labels_given, loader = found
    kind: Any = getattr(transformers, loader)
    while True:
        with _told(name, "cannot be loaded"):
            model, info = kind.from_pretrained(
                name,
                config=config,
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
        other_sizes = _other_sizes(model, info["mismatched_keys"])
        missing = set(info["missing_keys"]) - set(other_sizes)
        left_over = _left_over(model, set(info["unexpected_keys"]))
        if adapter is not None:
            supplied = adapter.whole_weights(model)
            missing -= supplied.keys()
            for key, tensor in supplied.items():
                there, here = tuple(tensor.shape), tuple(model.get_parameter(key).shape)
                other_sizes.pop(key, None)
                if there != here:
                    other_sizes[key], labels_given = (there, here), False
        if missing:
            raise ValueError(f"{name} is no reward model: it lacks {_names(missing)}")
        biases = [key for key in left_over if _is_bias(model, key)]
        rows = _rows_of_head(model, other_sizes)
        if other_sizes and (labels_given or rows is None):
            key, (there, here) = next(iter(sorted(other_sizes.items())))
            raise ValueError(
                f"{name}: {key} is {list(there)} in the checkpoint and {list(here)} in the "
                f"{type(model).__name__} of its config.json"
            )
        if len(biases) < len(left_over):
            raise ValueError(
                f"{name} holds weights that {type(model).__name__} has no place for, so its score would not "
                f"be the model's: {_names(set(left_over) - set(biases))}"
            )
        if not biases and not other_sizes:
            return model
        if rows is not None and other_sizes:
            config.num_labels, labels_given = rows, True
        kind = _with_biases(type(model), biases) if biases else type(model)


def _names(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:SHOWN_NAMES])
    return shown if len(keys) <= SHOWN_NAMES else f"{shown} and {len(keys) - SHOWN_NAMES} more"


def _left_over(model: PreTrainedModel, keys: set[str]) -> list[str]:
    """Those tensors of a checkpoint without a place in the model that may change its score.

    Others are what the model computes itself (buffers that it does not save), parts of masks, and what
    another class of its family has outside the modules of this one: the head of a causal language model, an
    unused pooler.
    """
    modules = dict(model.named_modules())
    keys = keys - {name for name, _ in model.named_buffers()}
    inside = {key for key in keys if key.rpartition(".")[0] in modules}
    outside = keys - inside
    in_base = {key for key in inside if _is_in_base(model, key)}
    if in_base:
        inside -= {key for key, tensor in _read(model.name_or_path, in_base) if _is_mask(tensor)}
    if outside:
        for other in _family(model):
            names = {name for name, _ in [*other.named_parameters(), *other.named_buffers()]}
            ignored = [re.compile(pattern) for pattern in other._keys_to_ignore_on_load_unexpected or ()]
            prefix = f"{model.base_model_prefix}."
            outside = {
                key
                for key in outside
                if key not in names
                and key.removeprefix(prefix) not in names
                and not any(pattern.search(key) for pattern in ignored)
            }
            if not outside:
                break
    return sorted(inside | outside)


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a base model is no weight: booleans, integers, or the number of a hidden score."""
    return not tensor.is_floating_point() or (tensor.numel() == 1 and tensor.item() <= -1e4)


def _read(name: str, keys: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the tensors that lie in the checkpoint under just these names."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    for file in ("model.safetensors", "pytorch_model.bin"):
        where = dict.fromkeys(keys, file)
        index = cached_file(name, f"{file}.index.json", _raise_exceptions_for_missing_entries=False)
        if index is not None:
            where = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        for part in sorted({where[key] for key in keys if key in where}):
            path = cached_file(name, part, _raise_exceptions_for_missing_entries=False)
            if path is None:
                continue
            if path.endswith(".safetensors"):
                with safe_open(path, framework="pt") as tensors:
                    yield from ((key, tensors.get_tensor(key)) for key in keys & set(tensors.keys()))
            else:
                weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                yield from ((key, weights[key]) for key in keys & weights.keys())


def _family(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A model of every other class that transformers has for the same configuration, without weights."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    seen: set[type] = set()
    for mapping in vars(modeling_auto).values():
        if not isinstance(mapping, _LazyAutoMapping) or type(model.config) not in mapping:
            continue
        found = mapping[type(model.config)]
        for kind in found if isinstance(found, tuple) else (found,):
            if kind in seen or isinstance(model, kind):
                continue
            seen.add(kind)
            try:
                with torch.device("meta"):
                    other = kind(model.config)
            except Exception:  # it wants settings that this configuration does not have
                continue
            yield other


def _is_in_base(model: PreTrainedModel, key: str) -> bool:
    return model.base_model is model or key.startswith(f"{model.base_model_prefix}.")


def _is_bias(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is the bias that a linear layer of the head was made without."""
    path, _, name = key.rpartition(".")
    module = dict(model.named_modules()).get(path)
    is_free = isinstance(module, nn.Linear) and module.bias is None
    return name == "bias" and is_free and not _is_in_base(model, key)


def _with_biases(kind: type[PreTrainedModel], keys: Sequence[str]) -> type[PreTrainedModel]:
    """The class, whose head has these biases; the checkpoint is loaded into it as into any other."""

    class WithBiases(kind):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for key in keys:
                linear = self.get_submodule(key.rpartition(".")[0])
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(WithBiases, name, getattr(kind, name))
    return WithBiases


def _other_sizes(model: PreTrainedModel, found: Iterable[Any]) -> dict[str, Sizes]:
    """Weights that have another shape in the checkpoint than in the model, and both shapes."""
    # transformers 5 tells the shapes too, 4 the names alone.
    there = {item[0]: tuple(item[1]) for item in found if not isinstance(item, str)}
    names = {item for item in found if isinstance(item, str)}
    there |= dict.fromkeys(names, ())
    there |= {key: tuple(tensor.shape) for key, tensor in _read(model.name_or_path, names)}
    here = model.state_dict()
    return {key: (shape, tuple(here[key].shape)) for key, shape in there.items()}


def _rows_of_head(model: PreTrainedModel, other_sizes: dict[str, Sizes]) -> int | None:
    """The number of labels that the head's weights have, if that is all that differs."""
    rows = set()
    for key, (there, here) in other_sizes.items():
        is_head = not _is_in_base(model, key) and here[0] == model.config.num_labels
        if not is_head or not there or there[1:] != here[1:]:
            return None
        rows.add(there[0])
    return rows.pop() if len(rows) == 1 else None


@dataclass(frozen=True)
class Adapter:
    """Weights that change a base model: LoRA and its kin, made by PEFT."""

    name: str
    base: str
    tensors: dict[str, torch.Tensor]

    def whole_weights(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Weights of the base model that the adapter brings whole: its head."""
        names = {name for name, _ in model.named_parameters()}
        brought = {key.removeprefix("base_model.model."): tensor for key, tensor in self.tensors.items()}
        return {key: tensor for key, tensor in brought.items() if key in names}

    def put_on(self, model: PreTrainedModel) -> PreTrainedModel:
        """The base model with the adapter in its layers; raises ValueError if not all of it has a place."""
        from peft import PeftModel, get_peft_model_state_dict

        with _told(self.name, "cannot be put on its base model"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is told below
            adapted = PeftModel.from_pretrained(model, self.name)
            put = get_peft_model_state_dict(adapted)
        lost = {
            key
            for key, tensor in self.tensors.items()
            if key not in put or not torch.equal(put[key].cpu(), tensor.to(put[key].dtype))
        }
        if lost:
            raise ValueError(f"{self.name}: {self.base} has no place for its {_names(lost)}")
        if lacking := put.keys() - self.tensors.keys():
            raise ValueError(f"{self.name} is no reward model: it lacks {_names(lacking)}")
        found: PreTrainedModel = adapted.get_base_model()
        return found


def _adapter(name: str) -> Adapter | None:
    """The adapter that a folder or a repository of the hub holds, if it does."""
    from transformers.utils import cached_file, find_adapter_config_file

    _check_folder(name)
    with _told(name, "cannot be read"):
        if not os.path.isdir(name):  # raises where the hub cannot be asked, or does not know the name
            cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
        path = find_adapter_config_file(name)
        if path is None:
            return None
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if any(Path(name).glob("model*.safetensors")) or any(Path(name).glob("pytorch_model*.bin")):
        raise ValueError(f"{name} holds a model and an adapter of one; want either in a folder of its own")
    if not base:
        raise ValueError(f"{name}: its adapter_config.json does not name the base model")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"{name} is an adapter of {base}: want peft (pip install peft), or the model that its "
            "merge_and_unload gives, saved"
        )
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    with _told(name, "is an adapter that peft cannot load"):
        if PeftConfig.from_pretrained(name).is_prompt_learning:
            raise ValueError(f"{settings.get('peft_type')} puts tokens of its own before the text's")
        return Adapter(name, base, load_peft_weights(name, device="cpu"))
