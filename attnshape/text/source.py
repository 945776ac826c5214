"""Where a reward model's credit is read from: one name for how it is tapped and what is made of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnshape import credit
from attnshape.ops import attention_column_credit, attention_credit, attention_rollout
from attnshape.tap import AttentionTap
from attnshape.tap.find import attention_layers, models_of, outermost
from attnshape.tap.tap import GRADIENTS, ONE_LAYER
from attnshape.tap.trial import evaluating
from attnshape.text.load import Layers, QueryPosition, SourceName
from attnshape.text.score_fn import ScoreFn
from attnshape.types import Response

FIRST_LOGIT = ScoreFn(((1.0, 0),))
_LAYERED = ("attention", "columns", *ONE_LAYER)
_WHOLE = ("attention", "columns")


@dataclass(frozen=True)
class CreditSource:
    """What weighs the tokens of a response, out of the one forward that scores it.

    Args:
        name: ``"attention"``: the row of the token that is scored; ``"columns"``: the attention among the
            response's own tokens; ``"rollout"``: attention carried down through all layers; and with signs
            ``"signed_rollout"``, ``"gradient_value"``, ``"gradient_embedding"``, ``"relevance"``, and
            ``"leave_one_out"``, which scores the text again without each token. The documentation's page on
            sources compares them.
        layer: which attention layer, negative from the last, as for ``AttentionTap``; several, or ``"all"``,
            are averaged (``"attention"`` and ``"columns"``).
        span: of ``"leave_one_out"``: how many tokens are deleted together; each gets an equal share.

    Raises:
        ValueError: no such source; a layer or span that it does not take.
    """

    name: SourceName = "attention"
    layer: Layers | None = None
    span: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(SourceName):
            raise ValueError(f"source: got {self.name!r}, want one of {get_args(SourceName)}")
        if self.layer is not None and not isinstance(self.layer, int | str):
            object.__setattr__(self, "layer", tuple(self.layer))
        if self.layer is not None and self.name not in _LAYERED:
            raise ValueError(f"layer: got {self.layer!r}, want none for source={self.name!r}")
        if self.layer is not None and not isinstance(self.layer, int) and self.name not in _WHOLE:
            raise ValueError(f"layer: got {self.layer!r}, want one layer for source={self.name!r}")
        if isinstance(self.layer, str) and self.layer != "all":
            raise ValueError(f"layer: got {self.layer!r}, want an int, several, or 'all'")
        if self.span != 1 and self.name != "leave_one_out":
            raise ValueError(f"span: got {self.span}, want 1 for source={self.name!r}")
        if not isinstance(self.span, int) or self.span < 1:
            raise ValueError(f"span: got {self.span!r}, want 1 or more")

    def __str__(self) -> str:
        if self.span != 1:
            return f"{self.name}, {self.span} tokens"
        if self.layer is None:
            return self.name
        if isinstance(self.layer, int):
            return f"{self.name}, layer {self.layer}"
        return f"{self.name}, {'all' if self.layer == 'all' else ' '.join(map(str, self.layer))} layers"

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        return self.name == "signed_rollout" or self.of_score

    @property
    def of_score(self) -> bool:
        """Whether weights say how far a token moved the score up or down, not which share of it is its."""
        return self.differentiates or self.name == "leave_one_out"

    @property
    def differentiates(self) -> bool:
        """Whether the forward is one with gradients."""
        return self.name in GRADIENTS

    def tap(
        self,
        model: nn.Module,
        query_position: QueryPosition = "pooled",
        *,
        score_fn: ScoreFn = FIRST_LOGIT,
        batch_tokens: int = 16384,
    ) -> SourceTap:
        """Of a model, not yet open; an integer position is to be set for each forward.

        Args:
            score_fn, batch_tokens: of the forwards of ``"leave_one_out"``.

        Raises:
            TypeError, ValueError: as for ``AttentionTap``: the model cannot be read so.
        """
        if self.name == "leave_one_out":
            return Rescoring(model, score_fn, batch_tokens)
        position: Any = "last_visible" if isinstance(query_position, int) else query_position
        layer: Any = self.layer
        if layer == "all":
            layer = range(len(attention_layers(model, models_of(model))))
        if self.name == "columns":
            return AttentionTap(model, layer, query_position="all")
        return AttentionTap(model, layer, source=self.name, query_position=position)

    @contextmanager
    def opened(self, tap: SourceTap) -> Iterator[None]:
        """For one forward, with gradients where the source needs them, whatever the caller's mode is."""
        with torch.inference_mode(not self.differentiates), torch.set_grad_enabled(self.differentiates), tap:
            yield

    def weights(self, taken: Any, score: Tensor, response: Response) -> Tensor:
        """Of each response token.

        Args:
            taken: by the tap, of the forward that gave ``score [B]``; a gradient frees its graph.

        Returns:
            float32 of the mask's shape, 0 where masked, not normalised.
        """
        if self.name == "attention":
            return attention_credit(taken, response, normalization="none")
        if self.name == "columns":
            return attention_column_credit(taken, response, normalization="none")
        if self.name == "rollout":
            return attention_rollout(taken, response, normalization="none")
        if self.name == "signed_rollout":
            return credit.signed_rollout(taken, response)
        if self.name == "leave_one_out":
            rank = (response.mask != 0).cumsum(-1) - 1
            asked: Asked = taken
            return asked.weights(score, response, rank // self.span)
        return credit.gradient_weights(score, taken, response)


class Rescoring:
    """A model's tap for leave-one-out: remembers what a forward read, which is then read again without parts.

    Args:
        score_fn, batch_tokens: of the forwards that follow.
    """

    def __init__(self, model: nn.Module, score_fn: ScoreFn = FIRST_LOGIT, batch_tokens: int = 16384) -> None:
        self.model, self.score_fn, self.batch_tokens = model, score_fn, batch_tokens
        self.query_position: Any = "pooled"  # no row is read
        self._calls: list[dict[str, Any]] = []
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Rescoring:
        self._calls = []
        self._hook = self.model.register_forward_pre_hook(self._on_call, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hook is not None
        self._hook.remove()

    def _on_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs)

    def take(self) -> Asked:
        """What the one forward since the last ``take`` read.

        Raises:
            RuntimeError: no forward ran, or more than one.
            ValueError: it read more than ids and their mask.
        """
        calls, self._calls = self._calls, []
        if len(calls) != 1:
            raise RuntimeError(f"take() wants exactly one forward since the last take(), got {len(calls)}")
        (given,) = calls
        more = [name for name, x in given.items() if isinstance(x, Tensor) and x.any()]
        more = [name for name in more if name not in ("input_ids", "attention_mask")]
        if more or given.get("input_ids") is None:
            raise ValueError(
                "source: 'leave_one_out' wants a forward of input_ids and attention_mask, got "
                f"{', '.join(more) or 'no input_ids'}"
            )
        return Asked(self, given["input_ids"], given.get("attention_mask"))


class Asked(NamedTuple):
    """What a forward read."""

    tap: Rescoring
    input_ids: Tensor
    attention_mask: Tensor | None

    def weights(self, score: Tensor, response: Response, spans: Tensor) -> Tensor:
        return credit.leave_one_out(
            lambda ids, mask: score_texts(self.tap.model, ids, mask, self.tap.score_fn),
            self.input_ids,
            response,
            score=score,
            attention_mask=self.attention_mask,
            spans=spans,
            pad_token_id=0,
            batch_tokens=self.tap.batch_tokens,
        )


SourceTap: TypeAlias = AttentionTap | Rescoring


def score_texts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, score_fn: ScoreFn) -> Tensor:
    """One forward's scores ``[N]`` of ids ``[N, S]``, padded on the right with whatever; without dropout.

    Raises:
        ValueError: what the model gives is no logits per text.
    """
    last = input_ids.gather(1, attention_mask.sum(1, keepdim=True).clamp(min=1) - 1)
    with evaluating(model), _padding(model, set(last[:, 0].tolist())) as pad:
        ids = input_ids.masked_fill(attention_mask == 0, pad)
        logits = getattr(model(input_ids=ids, attention_mask=attention_mask), "logits", None)
    if logits is None or logits.ndim != 2 or len(logits) != len(input_ids):
        shape = None if logits is None else list(logits.shape)
        raise ValueError(f"{type(model).__name__}: got logits {shape}, want [{len(input_ids)}, labels]")
    return score_fn(logits.float())


@contextmanager
def _padding(model: nn.Module, last: set[int]) -> Iterator[int]:
    """The model's padding token; where it has none, one for this batch that leaves the scores as they are."""
    config: Any = getattr(model, "config", None)
    if config is None:
        with suppress(ValueError):  # a wrapper has none of its own
            config = outermost(model).config
    if config is None:
        yield 0
        return
    config = config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        yield pad
        return
    # Heads take the last token that is not padding: any will do that is the last of none of the texts.
    try:
        config.pad_token_id = next(i for i in itertools.count() if i not in last)
        yield config.pad_token_id
    finally:
        config.pad_token_id = None
