"""A reward model's score and credit of completions: what the commands, the server and the adapters share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attnshape.credit import centered
from attnshape.ops import shape_rewards
from attnshape.tap.find import outermost
from attnshape.text.align import align
from attnshape.text.load import (
    Layers,
    QueryPosition,
    RewardModelConfig,
    SourceName,
    check_pooling,
    load_reward_model,
    load_tokenizer,
    most_tokens,
)
from attnshape.text.reader import Example, Reader
from attnshape.text.score_fn import ScoreFn, parse_score_fn
from attnshape.text.source import CreditSource, SourceTap, score_texts
from attnshape.text.turns import spans_of
from attnshape.types import Response, Status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
NOT_FINITE = "the model's score or attention is not finite"
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text, which the response continues, or messages, which the reward model's chat template renders with it."""


@dataclass(frozen=True)
class Scored:
    """What the reward model says of one completion."""

    score: float
    credit: list[float] | None
    """Per token of the policy where its offsets were given, else per token of the reward model; sums to 1, or
    is all 0 where none of the policy's tokens has text. None where the source is signed."""
    metrics: dict[str, float | bool]
    """``entropy`` (nats) and ``last_share`` of the credit, or of the weights' sizes, on the reward model's
    tokens; ``response_attention``, the share of the attention that falls on them, of source
    ``"attention"``; ``fallback``, whether it was nothing, and all credit is on the last token; ``changed``,
    whether the chat template changed the response, whose lost characters have no credit."""
    token_rewards: list[float] | None = None
    """Of a signed source, per token as ``credit``: in units of the score, centred, so that they sum to 0 and
    can be added beside a score that is spread evenly."""

    @property
    def finite(self) -> bool:
        values = (self.credit or []) + (self.token_rewards or [])
        return all(map(math.isfinite, (self.score, *values, *self.metrics.values())))

    @property
    def values(self) -> dict[str, list[float] | None]:
        """``credit``, and ``token_rewards`` where the source has signs: as files and answers have them."""
        rewards = {} if self.token_rewards is None else {"token_rewards": self.token_rewards}
        return {"credit": self.credit, **rewards}

    @property
    def rewards(self) -> list[float]:
        """What each token is paid where the whole score is spread: they sum to it where any has text."""
        if self.token_rewards is None:
            return [self.score * weight for weight in self.credit or ()]
        return [self.score / len(self.token_rewards) + reward for reward in self.token_rewards]


class Credited(NamedTuple):
    """What a reward model says of the policy's tokens; on the reward model's device."""

    score: Tensor
    """float32 ``[B]``; NaN where there is none. ``group_advantages`` takes that as missing; with
    ``ShapingConfig(on_nan="zero_row")`` nothing is learned from that row of ``shape_rewards``."""
    weights: Tensor
    """float32 ``[B, R]``, not normalised; signed where the source is. 0 where masked, or without a score."""
    mask: Tensor
    """bool ``[B, R]``: the policy's own tokens."""
    errors: list[str | None]
    """Why a completion has no score: too long, no text, not finite, …"""


class Tokens(NamedTuple):
    """Completions as one forward reads them, padded on the right with whatever."""

    input_ids: Tensor
    """int64 ``[B, S]``."""
    attention_mask: Tensor
    """The same."""
    response: Response
    """``[B, R]``, with the position of each of its tokens."""

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> Tokens:
        lengths = torch.tensor([len(example.input_ids) for example in examples], device=device)
        input_ids = _padded([example.input_ids for example in examples], 0).to(device)
        attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        index = _padded([example.positions for example in examples], -1).to(device)
        return cls(input_ids, attention_mask, Response(index >= 0, index=index))


class Weighed(NamedTuple):
    """One forward's scores and weights, on the reward model's tokens."""

    score: Tensor
    """``[B]``, detached."""
    weights: Tensor
    """``[B, R]``, not normalised."""
    response: Response


class CreditModel:
    """A reward model whose forward gives a score, and the weight of each of the policy's tokens in it.

        judge = CreditModel("reward-model", source="rollout")
        out = judge(prompts, response_ids, policy_tokenizer)
        shaped = attnshape.shape_rewards(out.score, out.weights, out.mask, values=values)

    Args:
        model: a folder or hub name of a sequence classifier, or one that is loaded, in a wrapper too (PEFT,
            data parallel, ``torch.compile``).
        tokenizer: of a loaded model, a fast one; found by the model's name if not given.
        source, layer, span: what weighs the tokens, see ``CreditSource``.
        score_fn: the score, such as ``"logit[1] - logit[0]"``.
        query_position: the token whose hidden state gives the score.
        batch_tokens: the most that a forward takes when called, padding counted; a longer text goes alone.
        device: of a model that is loaded here.
        trust_remote_code: whether Python files that the checkpoint brings are run.

    Raises:
        ValueError: no such source; a checkpoint that is refused, see ``load_reward_model``; a slow tokenizer;
            a score function, source, layer or query position that does not fit the model.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        source: SourceName = "attention",
        layer: Layers | Sequence[int] | None = None,
        span: int = 1,
        score_fn: str | ScoreFn = "logit",
        query_position: QueryPosition = "pooled",
        batch_tokens: int = 16384,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, want 1 or more")
        self.source = CreditSource(source, layer, span)  # type: ignore[arg-type]
        self.score_fn = parse_score_fn(score_fn) if isinstance(score_fn, str) else score_fn
        self.query_position, self.batch_tokens = query_position, batch_tokens
        self.model: nn.Module
        if isinstance(model, str):
            self.name = model
            self.model, found = load_reward_model(model, device, trust_remote_code=trust_remote_code)
            tokenizer = found if tokenizer is None else tokenizer
        else:
            self.model, self.name = model, outermost(model).config.name_or_path
        if tokenizer is None:
            tokenizer = load_tokenizer(self.name, trust_remote_code=trust_remote_code)
        self.tokenizer = tokenizer
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: want a fast one, which gives offsets, got {type(self.tokenizer).__name__}"
            )
        check_pooling(self.model, query_position)
        if not trust_remote_code:  # code of its own may give other logits than its configuration says
            self.score_fn.check(self._own.config.num_labels)
        self.tap = self._tap(self.source)

    def _tap(self, source: CreditSource) -> SourceTap:
        return source.tap(
            self.model, self.query_position, score_fn=self.score_fn, batch_tokens=self.batch_tokens
        )

    @classmethod
    def load(cls, config: RewardModelConfig, device: str, batch_tokens: int = 16384) -> CreditModel:
        """``config``'s model and source."""
        return cls(
            config.model,
            source=config.source,
            layer=config.layer,
            span=config.span,
            score_fn=config.score_fn,
            query_position=config.query_position,
            batch_tokens=batch_tokens,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )

    @functools.cached_property
    def _own(self) -> PreTrainedModel:
        """The classifier itself, whatever is around it."""
        return outermost(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model takes its input; one whose weights are offloaded moves it itself."""
        own: torch.device = self._own.device
        return torch.device("cpu") if own.type == "meta" else own

    @property
    def signed(self) -> bool:
        """Whether weights may be negative: token rewards, by way of ``credit.centered``, and no credit."""
        return self.source.signed

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int] | Tensor],
        tokenizer: PreTrainedTokenizerBase,
        *,
        masks: Sequence[Sequence[int | bool] | Tensor] | None = None,
    ) -> Credited:
        """Scores completions, longest first, in as few forwards as ``batch_tokens`` allows.

        One that the reward model does not take (too long, no text, an answer that is not finite) has no
        score, no weights, and its error said beside it: a run goes on.

        Args:
            prompts: text, or messages.
            responses: the policy's sampled token ids, one row per prompt, without padding.
            tokenizer: the policy's.
            masks: non-zero where a token is the policy's own: a tool's gets no weight.

        Raises:
            ValueError: not as many of each; the model can be read for none of them.
        """
        rows = [[int(i) for i in ids] for ids in responses]
        given = [[1] * len(ids) for ids in rows] if masks is None else masks
        own = [[bool(m) for m in mask] for mask in given]
        if not len(prompts) == len(rows) == len(own):
            raise ValueError(f"got {len(prompts)} prompts, {len(rows)} responses and {len(own)} masks")
        reader = self.reader()
        examples: dict[int, Example] = {}
        errors: list[str | None] = [None] * len(rows)
        for i, (prompt, ids, live) in enumerate(zip(prompts, rows, own, strict=True)):
            if len(ids) != len(live):
                raise ValueError(f"masks[{i}]: got {len(live)} for a response of {len(ids)} tokens")
            text, offsets = spans_of(tokenizer, ids, live)
            try:
                examples[i] = reader.read_reply(prompt, text, offsets)
            except ValueError as error:
                errors[i] = str(error)
        device, width = self.device, max(map(len, rows), default=0)
        score = torch.full((len(rows),), math.nan, dtype=torch.float32, device=device)
        weights = torch.zeros(len(rows), width, dtype=torch.float32, device=device)
        failed = 0
        for batch in self.batches(examples):
            weighed = self._each(self._weigh_policy, [examples[i] for i in batch])
            for i, found in zip(batch, weighed, strict=True):
                if isinstance(found, str):
                    errors[i], failed = found, failed + 1
                    if failed == len(examples):  # so it is the model
                        raise ValueError(found)
                elif not (found[0].isfinite() & found[1].isfinite().all()):
                    errors[i] = NOT_FINITE
                else:
                    score[i], weights[i, : len(rows[i])] = found
        padded = [live + [False] * (width - len(live)) for live in own]
        mask = torch.tensor(padded, dtype=torch.bool, device=device)
        return Credited(score, weights, mask.view(len(rows), width), errors)

    def _weigh_policy(self, examples: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
        """Score and weights of each, carried to the policy's tokens."""
        found = self.weigh(examples)
        return [
            (score, align(example.spans, example.policy_spans)(row[: len(example.positions)]))
            for example, score, row in zip(examples, found.score, found.weights, strict=True)
        ]

    def weigh(self, examples: Sequence[Example], source: CreditSource | None = None) -> Weighed:
        """One forward, and what the source takes beyond it.

        Args:
            source: another than the model's own.

        Raises:
            ValueError: the model's output is no logits per completion, or a position is outside a text; the
                source cannot be had from this model.
        """
        source, tap = (self.source, self.tap) if source is None else (source, self._tap(source))
        with source.opened(tap):  # opened anew: a forward that failed has left its traces in it
            score, response = self._forward(examples, tap)
            taken = tap.take()
        return Weighed(score.detach(), source.weights(taken, score, response), response)

    @torch.inference_mode()
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """One forward, for the scores ``[B]`` alone."""
        return self._forward(examples)[0]

    def _forward(self, examples: Sequence[Example], tap: SourceTap | None = None) -> tuple[Tensor, Response]:
        tokens, position = Tokens.of(examples, self.device), self.query_position
        if tap is not None and isinstance(position, int) and str(tap.query_position) != "all":
            tap.query_position = _positions(position, tokens.attention_mask.sum(1))
        return score_texts(
            self.model, tokens.input_ids, tokens.attention_mask, self.score_fn
        ), tokens.response

    @torch.no_grad()
    def score_of(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores ``[N]`` of ids ``[N, S]``: what ``credit.leave_one_out`` and ``deletion_scores`` call."""
        return score_texts(self.model, input_ids, attention_mask, self.score_fn)

    def batches(self, examples: Mapping[int, Example]) -> Iterator[list[int]]:
        """Their keys, the longest first, as many as ``batch_tokens`` allows."""
        order = sorted(examples, key=lambda i: -len(examples[i].input_ids))
        while order:
            count = max(self.batch_tokens // len(examples[order[0]].input_ids), 1)
            yield order[:count]
            order = order[count:]

    def reader(self, max_length: int | None = None) -> Reader:
        """Makes examples of completions, of at most so many tokens."""
        limits = [limit for limit in (max_length, most_tokens(self._own)) if limit is not None]
        return Reader(self.tokenizer, self._own.config, min(limits, default=None))

    def probe(self, source: CreditSource | None = None) -> None:
        """A first forward, which compiles kernels; raises ValueError if the model cannot be read."""
        token = int(self._own.config.get_text_config().pad_token_id == 0)
        position = self.query_position
        length = 2 + abs(position) if isinstance(position, int) else 2
        self.score([Example("", "a", [token] * length, [1], [(0, 1)])], *([] if source is None else [source]))

    def score_each(
        self, examples: Sequence[Example], source: CreditSource | None = None
    ) -> list[Scored | str]:
        """Scores, or why one has none; in halves where the device does not hold them together."""
        score = self.score if source is None else functools.partial(self.score, source=source)
        return self._each(score, examples)

    def _each(
        self, read: Callable[[Sequence[Example]], list[T]], examples: Sequence[Example]
    ) -> list[T | str]:
        try:
            return [*read(examples)]
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(examples) == 1:
                return [("out of memory: " if isinstance(error, torch.OutOfMemoryError) else "") + str(error)]
        # Outside the handler, whose error keeps the tensors of the forward.
        torch.cuda.empty_cache()
        half = len(examples) // 2
        return [*self._each(read, examples[:half]), *self._each(read, examples[half:])]

    def score(self, examples: Sequence[Example], source: CreditSource | None = None) -> list[Scored]:
        """The same as ``weigh``, in numbers: what files, pages and the server hold."""
        weighed = self.weigh(examples, source)
        return scored_by(self.source if source is None else source, weighed, examples)


@torch.no_grad()
def scored_by(source: CreditSource, weighed: Weighed, examples: Sequence[Example]) -> list[Scored]:
    """What ``source`` says of each completion."""
    score, weights, response = weighed
    shaped = shape_rewards(score, weights.abs(), response)
    columns = {"entropy": shaped.row_stats.entropy, "last_share": shaped.row_stats.last_share}
    if source.name == "attention":
        columns["response_attention"] = weights.sum(1)
    metrics = {name: column.tolist() for name, column in columns.items()}
    fallback = (shaped.status & int(Status.FALLBACK | Status.EMPTY) != 0).tolist()
    if source.signed and not source.of_score:
        weights = score[:, None] * weights
    values = (weights if source.signed else shaped.credit).cpu()
    scored = []
    for b, example in enumerate(examples):
        row = values[b, : len(example.positions)]
        has_text = [True] * len(row)
        if example.policy_offsets is not None:
            row = align(example.spans, example.policy_spans)(row)
            has_text = [start < end for start, end in example.policy_spans]
        if source.signed:
            row = centered(row[None], torch.tensor([has_text], device="cpu"))[0]
        numbers = [_rounded(x) for x in row.tolist()]
        scored.append(
            Scored(
                score=_rounded(score[b].item()),
                credit=None if source.signed else numbers,
                metrics={
                    **{name: _rounded(column[b]) for name, column in metrics.items()},
                    "fallback": fallback[b],
                    "changed": example.changed,
                },
                token_rewards=numbers if source.signed else None,
            )
        )
    return scored


def _positions(position: int, lengths: Tensor) -> Tensor:
    """Counted from each text's first token, or from its last where it is negative."""
    positions = lengths + position if position < 0 else torch.full_like(lengths, position)
    if bool(((positions < 0) | (positions >= lengths)).any()):
        raise ValueError(f"query_position: got {position} for a text of {int(lengths.min())} tokens")
    return positions.int()


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence(
        [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows],
        batch_first=True,
        padding_value=value,
    )


def _rounded(x: float) -> float:
    """To the digits that float32 has."""
    return float(f"{x:.8g}")
