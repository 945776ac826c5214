"""A reward model's score and credit of completions: what the commands, the server and the adapters share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnshape.ops import shape_rewards
from attnshape.tap import AttentionTap
from attnshape.text.align import align
from attnshape.text.load import (
    QueryPosition,
    RewardModelConfig,
    check_pooling,
    load_reward_model,
    load_tokenizer,
)
from attnshape.text.reader import Example, Reader
from attnshape.text.score_fn import ScoreFn, parse_score_fn
from attnshape.text.source import ATTENTION, CreditSource, SourceName
from attnshape.text.turns import spans_of
from attnshape.types import Response, ShapedRewards, Status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text, which the response continues, or messages, which the reward model's chat template renders with it."""


@dataclass(frozen=True)
class Scored:
    """What the reward model says of one completion."""

    score: float
    credit: list[float]
    """Per token of the policy where its offsets were given, else per token of the reward model; sums to 1, or
    is all 0 where none of the policy's tokens has text."""
    metrics: dict[str, float | bool]
    """``entropy`` (nats) and ``last_share`` of the credit on the reward model's tokens;
    ``response_attention``, the share of the attention that falls on them; ``fallback``, whether it was
    nothing, and all credit is on the last token; ``changed``, whether the chat template changed the response,
    whose lost characters have no credit."""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.score, *self.credit, *self.metrics.values())))


class Credited(NamedTuple):
    """What a reward model says of the policy's tokens; on the reward model's device."""

    score: Tensor
    """float32 ``[B]``."""
    weights: Tensor
    """float32 ``[B, R]``, not normalised; signed where the source is. 0 where masked."""
    mask: Tensor
    """bool ``[B, R]``: the policy's own tokens."""


class CreditModel:
    """A reward model whose forward gives a score, and the weight of each of the policy's tokens in it.

        judge = CreditModel("reward-model", source="rollout")
        out = judge(prompts, response_ids, policy_tokenizer)
        shaped = attnshape.shape_rewards(out.score, out.weights, out.mask, values=values)

    Args:
        model: a folder or hub name of a sequence classifier, or one that is loaded.
        tokenizer: of a loaded model, a fast one; found by the model's name if not given.
        source: what weighs the tokens, see ``CreditSource``.
        layer: which attention layer is read, negative from the last; the source's own if not given.
        score_fn: the score, such as ``"logit[1] - logit[0]"``.
        query_position: the token whose hidden state gives the score.
        batch_tokens: the most that a forward takes when called, padding counted; a longer text goes alone.
        device: of a model that is loaded here.
        trust_remote_code: whether Python files that the checkpoint brings are run.

    Raises:
        ValueError: no such source; a checkpoint that is refused, see ``load_reward_model``; a slow tokenizer;
            a score function, layer or query position that does not fit the model.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        source: SourceName = "attention",
        layer: int | Sequence[int] | None = None,
        score_fn: str | ScoreFn = "logit",
        query_position: QueryPosition = "pooled",
        batch_tokens: int = 16384,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, want 1 or more")
        self.source = CreditSource(source, layer)
        self.score_fn = parse_score_fn(score_fn) if isinstance(score_fn, str) else score_fn
        self.query_position, self.batch_tokens = query_position, batch_tokens
        self.name: str = model if isinstance(model, str) else model.config.name_or_path
        if isinstance(model, str):
            model, found = load_reward_model(model, device, trust_remote_code=trust_remote_code)
        elif tokenizer is None:
            found = load_tokenizer(self.name, trust_remote_code=trust_remote_code)
        self.model, self.tokenizer = model, found if tokenizer is None else tokenizer
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: want a fast one, which gives offsets, got {type(self.tokenizer).__name__}"
            )
        check_pooling(model, query_position)
        if not trust_remote_code:  # code of its own may give other logits than its configuration says
            self.score_fn.check(model.config.num_labels)
        self.tap = self.source.tap(model, query_position)

    @classmethod
    def load(cls, config: RewardModelConfig, device: str) -> CreditModel:
        """The attention of ``config``'s model."""
        return cls(
            config.model,
            layer=config.layer,
            score_fn=config.score_fn,
            query_position=config.query_position,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )

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

        Args:
            prompts: text, or messages.
            responses: the policy's sampled token ids, one row per prompt, without padding.
            tokenizer: the policy's.
            masks: non-zero where a token is the policy's own: a tool's gets no weight.

        Raises:
            ValueError: not as many of each; a completion that the reward model does not take, by its number.
        """
        rows = [[int(i) for i in ids] for ids in responses]
        given = [[1] * len(ids) for ids in rows] if masks is None else masks
        own = [[bool(m) for m in mask] for mask in given]
        if not len(prompts) == len(rows) == len(own):
            raise ValueError(f"got {len(prompts)} prompts, {len(rows)} responses and {len(own)} masks")
        reader = self.reader()
        examples = []
        for i, (prompt, ids, live) in enumerate(zip(prompts, rows, own, strict=True)):
            if len(ids) != len(live):
                raise ValueError(f"masks[{i}]: got {len(live)} for a response of {len(ids)} tokens")
            text, offsets = spans_of(tokenizer, ids, live)
            try:
                if isinstance(prompt, str):
                    examples.append(reader.read(prompt, text, offsets))
                else:
                    messages = [*prompt, {"role": "assistant", "content": text}]
                    examples.append(reader.read_messages(messages, offsets))
            except ValueError as error:
                raise ValueError(f"completion {i}: {error}") from error
        device, width = self.model.device, max(map(len, rows), default=0)
        score, weights = torch.zeros(len(rows), device=device), torch.zeros(len(rows), width, device=device)
        for batch in self._batches(examples):
            chosen = [examples[i] for i in batch]
            with self.source.opened(self.tap):
                found, index = _forward(self.model, self.tap, chosen, self.score_fn, self.query_position)
                of_reader = self.source.weights(self.tap.take(), found, Response(index >= 0, index=index))
            score[batch] = found.detach()
            for i, example, row in zip(batch, chosen, of_reader, strict=True):
                carry = align(example.spans, example.policy_spans)
                weights[i, : len(rows[i])] = carry(row[: len(example.positions)])
        mask = torch.tensor([live + [False] * (width - len(live)) for live in own], dtype=torch.bool)
        return Credited(score, weights, mask.view(len(rows), width).to(device))

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
        while order:
            count = max(self.batch_tokens // len(examples[order[0]].input_ids), 1)
            yield order[:count]
            order = order[count:]

    def reader(self, max_length: int | None = None) -> Reader:
        """Makes examples of completions, of at most so many tokens."""
        return Reader(self.tokenizer, self.model.config, max_length)

    def probe(self) -> None:
        """A first forward, which compiles kernels; raises ValueError if the model cannot be read."""
        token = int(self.model.config.get_text_config().pad_token_id == 0)
        position = self.query_position
        length = 2 + abs(position) if isinstance(position, int) else 2
        self.score([Example("", "a", [token] * length, [1], [(0, 1)])])

    def score_each(self, examples: Sequence[Example]) -> list[Scored | str]:
        """Scores, or why one has none; in halves where the device does not hold them together."""
        try:
            return [*self.score(examples)]
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(examples) == 1:
                return [("out of memory: " if isinstance(error, torch.OutOfMemoryError) else "") + str(error)]
        # Outside the handler, whose error keeps the tensors of the forward.
        torch.cuda.empty_cache()
        half = len(examples) // 2
        return [*self.score_each(examples[:half]), *self.score_each(examples[half:])]

    def score(self, examples: Sequence[Example]) -> list[Scored]:
        """One forward, by a source without signs.

        Raises:
            ValueError: the model's output is no logits per completion, or a position is outside a text; the
                source is signed.
        """
        if self.signed:
            raise ValueError(f"source: {self.source.name!r} has signs, and credit has none")
        with self.source.opened(self.tap):  # opened anew: a forward that failed has left its traces in it
            return score_examples(
                self.model, self.tap, examples, self.score_fn, self.query_position, self.source
            )


@torch.inference_mode()
def score_examples(
    model: PreTrainedModel,
    tap: AttentionTap,
    examples: Sequence[Example],
    score_fn: ScoreFn,
    query_position: QueryPosition = "pooled",
    source: CreditSource = ATTENTION,
) -> list[Scored]:
    """One forward of the model, which the tap is open on."""
    score, index = _forward(model, tap, examples, score_fn, query_position)
    response, credit = Response(index >= 0, index=index), tap.take()
    if source.name != "attention":
        credit = source.weights(credit, score, response)
    shaped = shape_rewards(score, credit, response)
    return told(examples, score, shaped, shaped.row_stats.response_share)


def told(
    examples: Sequence[Example], score: Tensor, shaped: ShapedRewards, response_attention: Tensor | None
) -> list[Scored]:
    """What is said of completions whose scores were shaped.

    Args:
        score: ``[B]``.
        shaped: of the reward model's tokens, ``[B, R]``.
        response_attention: ``[B]``, where the credit is attention.
    """
    columns = {
        "entropy": shaped.row_stats.entropy,
        "last_share": shaped.row_stats.last_share,
        "response_attention": response_attention,
    }
    metrics = {name: column.tolist() for name, column in columns.items() if column is not None}
    fallback = (shaped.status & int(Status.FALLBACK | Status.EMPTY) != 0).tolist()
    scored = []
    for b, example in enumerate(examples):
        credit = shaped.credit[b, : len(example.positions)].cpu()
        if example.policy_offsets is not None:
            credit = align(example.spans, example.policy_spans)(credit)
        scored.append(
            Scored(
                score=_rounded(score[b].item()),
                credit=[_rounded(c) for c in credit.tolist()],
                metrics={
                    **{name: _rounded(column[b]) for name, column in metrics.items()},
                    "fallback": fallback[b],
                    "changed": example.changed,
                },
            )
        )
    return scored


@contextmanager
def _padding(model: PreTrainedModel, examples: Sequence[Example]) -> Iterator[int]:
    """The model's padding token; where it has none, one for this batch that leaves the scores as they are."""
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        yield pad
        return
    # Heads take the last token that is not padding: any will do that is the last of none of the texts.
    last = {example.input_ids[-1] for example in examples}
    try:
        config.pad_token_id = next(i for i in itertools.count() if i not in last)
        yield config.pad_token_id
    finally:
        config.pad_token_id = None


def _forward(
    model: PreTrainedModel,
    tap: AttentionTap,
    examples: Sequence[Example],
    score_fn: ScoreFn,
    query_position: QueryPosition,
) -> tuple[Tensor, Tensor]:
    """Scores ``[B]``, and int64 ``[B, R]`` positions of the response's tokens, -1 in padding."""
    with _padding(model, examples) as pad:
        input_ids = _padded([example.input_ids for example in examples], pad).to(model.device)
        lengths = torch.tensor([len(example.input_ids) for example in examples], device=model.device)
        attention_mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
        if isinstance(query_position, int) and str(tap.query_position) != "all":
            tap.query_position = _positions(query_position, lengths)
        logits = getattr(model(input_ids=input_ids, attention_mask=attention_mask.long()), "logits", None)
    if logits is None or logits.ndim != 2 or len(logits) != len(examples):
        shape = None if logits is None else list(logits.shape)
        raise ValueError(f"{type(model).__name__}: got logits {shape}, want [{len(examples)}, labels]")
    index = _padded([example.positions for example in examples], -1).to(model.device)
    return score_fn(logits.float()), index


def _positions(position: int, lengths: Tensor) -> Tensor:
    """Counted from each text's first token, or from its last where it is negative."""
    positions = lengths + position if position < 0 else torch.full_like(lengths, position)
    if bool(((positions < 0) | (positions >= lengths)).any()):
        raise ValueError(f"query_position: got {position} for a text of {int(lengths.min())} tokens")
    return positions.int()


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=value
    )


def _rounded(x: float) -> float:
    """To the digits that float32 has."""
    return float(f"{x:.8g}")
