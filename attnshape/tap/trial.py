"""What a model does, found by trying it: a tiny forward of its own, once per model.

Trials run inside a forward of the caller's, where sharded models have their weights at hand, and call
``forward`` itself, so that no hook of the model's own runs twice.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnshape.tap.capture import Pooling
from attnshape.tap.find import layers_around, vocabulary
from attnshape.tap.hooks import trial

Scored: TypeAlias = Pooling | Literal["last_non_pad"]
"""Which tokens a head scores; ``"last_non_pad"``: the last whose id is not the pad token's."""

LENGTH, LIVE = 6, 4
"""Tokens of a trial's rows, and of its padded rows."""

SCORED: dict[Scored, tuple[int, ...]] = {
    "first": (0, 0, 0, 0),
    "first_visible": (0, 0, LENGTH - LIVE, 0),
    "last": (LENGTH - 1,) * 4,
    "last_visible": (LENGTH - 1, LIVE - 1, LENGTH - 1, LENGTH - 1),
    "last_non_pad": (LENGTH - 1, LIVE - 1, LENGTH - 1, LIVE - 1),
    "mean": (),
}
"""What is read of rows: full, padded right, padded left, and ending in pad tokens that are not masked."""

_mixing: WeakKeyDictionary[nn.Module, bool | str] = WeakKeyDictionary()
_sized: WeakKeyDictionary[nn.Module, bool | str] = WeakKeyDictionary()
_scored: WeakKeyDictionary[nn.Module, Scored | str | None] = WeakKeyDictionary()


def mixes_elsewhere(
    model: PreTrainedModel, attention: Sequence[nn.Module], device: torch.device
) -> bool | str:
    """Whether tokens reach each other when the attention of these modules moves nothing.

    A sentence where the model cannot be tried.

    Args:
        device: of the caller's input: that of the trial's where the weights are offloaded and on none.
    """

    def try_it() -> bool:
        tokens = _tokens(model, device, LENGTH + 1)
        ids = tokens[:LENGTH].repeat(2, 1)
        ids[1, 1] = tokens[-1]
        with trial(attention):
            one, other = _first(_call(model, input_ids=ids)).float()
        moved = (one - other).abs().amax(-1)
        moved[1] = 0
        return float(moved.max()) > _noise(model) * float(one.abs().max())

    mixes: bool | str = _once(_mixing, model, try_it)
    return mixes


def sees_size(model: PreTrainedModel, embeddings: Sequence[nn.Module], device: torch.device) -> bool | str:
    """Whether the size of token embeddings shows in what a model makes of them, beyond rounding.

    It does not where a norm comes first: then no gradient has a part along them. A sentence where the model
    cannot be tried.
    """

    def try_it() -> bool:
        factor, seen = 1.0, False

        def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal seen
            seen = True
            return output * factor

        tokens = _tokens(model, device, LENGTH + 1)
        handles = [module.register_forward_hook(scale) for module in embeddings]
        try:
            with trial():
                one = _first(_call(model, input_ids=tokens[None, :-1])).float()
                other = _first(_call(model, input_ids=tokens[None, 1:])).float()
                factor = 4.0
                larger = _first(_call(model, input_ids=tokens[None, :-1])).float()
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise ValueError("its embeddings did not run")
        # What a gradient is rounded by, relative to its length, and some more.
        least = {torch.float64: 1e-13, torch.float32: 1e-5}.get(model.dtype, 1e-3)
        return float((larger - one).norm()) > least * float((other - one).norm())

    sized: bool | str = _once(_sized, model, try_it)
    return sized


def scored_tokens(head: PreTrainedModel, attention: nn.Module, device: torch.device) -> Scored | str | None:
    """Which tokens of what the last layer gives a head scores; None for none of ``Scored``.

    In the place of the layer's output every token is the same but one, and that one shows in the score if it
    is read. A sentence where the model cannot be tried.
    """
    scored: Scored | str | None = _once(
        _scored, head, lambda: _scored_tokens(head, layers_around(head, attention)[0][-1], device)
    )
    return scored


def _scored_tokens(head: PreTrainedModel, layer: nn.Module, device: torch.device) -> Scored | None:
    full, padded_right, padded_left = slice(0, LENGTH), slice(0, LIVE), slice(LENGTH - LIVE, LENGTH)
    pad = head.config.get_text_config().pad_token_id
    groups = {"full": (full, full), "right": (padded_right, padded_right), "left": (padded_left, padded_left)}
    if pad is not None:
        groups["pad ids"] = (padded_right, full)  # which the mask shows
    scores, noise = functools.partial(_scores, head, layer, pad, device), _noise(head)
    read = {name: _read(scores, noise, *spans) for name, spans in groups.items()}
    for scored, positions in SCORED.items():
        if list(read.values()) == [{p} for p in positions[: len(read)]]:
            return scored
    every = [set(range(*mask.indices(LENGTH))) for _, mask in groups.values()]
    return "mean" if list(read.values()) == every and _is_mean(scores, noise) else None


def _read(scores_of: Callable[..., Tensor], noise: float, ids: slice, mask: slice) -> set[int]:
    """The positions that show in the score, of rows with these tokens and this mask."""
    other = torch.cat([torch.zeros(1, LENGTH, device="cpu"), torch.eye(LENGTH, device="cpu")]).bool()
    scores = scores_of(other, [(ids, mask)] * len(other))
    moved = (scores[1:] - scores[0]).abs().amax(-1) > noise * scores.abs().max().clamp(min=1e-3)
    return set(moved.nonzero().flatten().tolist())


def _is_mean(scores_of: Callable[..., Tensor], noise: float) -> bool:
    """Of a head that reads all that is visible: whether the share of other tokens is all it goes by."""
    spans = [slice(0, 2), slice(0, 4), slice(0, 4), slice(0, 4)]
    other = torch.zeros(4, LENGTH, dtype=torch.bool, device="cpu")
    other[0, 0] = other[1, :2] = other[2, 1:3] = other[3, 0] = True  # 1 of 2, 2 of 4, 2 of 4, 1 of 4
    scores = scores_of(other, [(span, span) for span in spans])
    gap = (scores[1:] - scores[0]).abs().amax(-1) / scores.abs().max()
    return bool((gap[:2] < noise).all() and gap[2] > noise)


def _scores(
    head: PreTrainedModel,
    layer: nn.Module,
    pad: int | None,
    device: torch.device,
    other: Tensor,
    spans: Sequence[tuple[slice, slice]],
) -> Tensor:
    """float32 ``[rows, labels]``; bool ``other [rows, S]`` says which tokens are the other one."""
    ids = _tokens(head, device).repeat(len(other), 1)
    mask = torch.zeros(other.shape, dtype=torch.long, device="cpu")
    for row, (tokens, visible) in enumerate(spans):
        kept = ids[row, tokens].clone()
        if pad is not None:
            ids[row] = pad
        ids[row, tokens] = kept
        mask[row, visible] = 1

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        stream = _first(output)
        generator = torch.Generator("cpu").manual_seed(0)
        pair = torch.randn(2, stream.shape[-1], generator=generator, device="cpu").to(stream)
        new = torch.where(other.to(stream.device)[..., None], pair[1], pair[0])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = layer.register_forward_hook(replace)
    try:
        with trial():
            scores = _first(_call(head, input_ids=ids, attention_mask=mask.to(ids.device))).float()
    finally:
        handle.remove()
    if scores.ndim != 2:
        raise ValueError(f"its scores are {list(scores.shape)}, want one row per sequence")
    return scores


def _call(model: PreTrainedModel, **inputs: Tensor) -> Any:
    # What was compiled would be traced by what is tried, and could not tell that it is.
    with torch.no_grad(), evaluating(model), torch.compiler.set_stance("force_eager"):
        return model.forward(**inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of it in the mode of ``eval()``, and then in its own again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor)
    return first


def _tokens(model: PreTrainedModel, device: torch.device, count: int = LENGTH) -> Tensor:
    """``count`` token ids, all different, to which the config gives no meaning."""
    embedding: Any = model.get_input_embeddings()
    own = next(embedding.parameters()).device
    device = device if own.type == "meta" else own
    configs = model.config, model.config.get_text_config()
    special = {
        x for config in configs for name, x in vars(config).items() if "token" in name and type(x) is int
    }
    free = (i for i in range(vocabulary(model)) if i not in special)
    return torch.tensor([i for i, _ in zip(free, range(count), strict=False)], device=device)


def _noise(model: PreTrainedModel) -> float:
    """What differs between rows that are the same, relative to the largest number."""
    return max(1e-4, 8 * torch.finfo(model.dtype).eps)


def _once(known: WeakKeyDictionary[nn.Module, Any], model: PreTrainedModel, find: Callable[[], Any]) -> Any:
    if model not in known:
        try:
            known[model] = find()
        except Exception as error:
            return f"{type(model).__name__} could not be tried ({type(error).__name__}: {error})"
    return known[model]
