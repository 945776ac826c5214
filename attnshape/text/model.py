"""A reward model's score and credit of completions: what the commands, the server and the adapters share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnshape.ops import shape_rewards
from attnshape.tap import AttentionTap
from attnshape.text.align import align
from attnshape.text.load import QueryPosition, RewardModelConfig, check_pooling, load_reward_model
from attnshape.text.reader import Example, Reader
from attnshape.text.score_fn import ScoreFn
from attnshape.types import Response, Status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


class CreditModel:
    """A reward model that gives score and credit of what its reader reads.

    Args:
        model, tokenizer: as ``load_reward_model`` gives them.
        config: how score and attention are read; its ``model`` is only a name.

    Raises:
        ValueError: a score function, layer or query position that does not fit the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RewardModelConfig
    ) -> None:
        check_pooling(model, config.query_position)
        if not config.trust_remote_code:  # code of its own may give other logits than its configuration says
            config.score_fn.check(model.config.num_labels)
        position = config.query_position
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.tap = AttentionTap(
            model, config.layer, query_position="last_visible" if isinstance(position, int) else position
        )

    @classmethod
    def load(cls, config: RewardModelConfig, device: str) -> CreditModel:
        """Raises ValueError also for a checkpoint that is refused, see ``load_reward_model``."""
        found = load_reward_model(config.model, device, trust_remote_code=config.trust_remote_code)
        return cls(*found, config)

    def reader(self, max_length: int | None = None) -> Reader:
        """Makes examples of completions, of at most so many tokens."""
        return Reader(self.tokenizer, self.model.config, max_length)

    def probe(self) -> None:
        """A first forward, which compiles kernels; raises ValueError if the model cannot be read."""
        token = int(self.model.config.get_text_config().pad_token_id == 0)
        position = self.config.query_position
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
        """One forward.

        Raises:
            ValueError: the model's output is no logits per completion, or a position is outside a text.
        """
        with self.tap:  # opened anew: a forward that failed has left its traces in it
            return score_examples(
                self.model, self.tap, examples, self.config.score_fn, self.config.query_position
            )


@torch.inference_mode()
def score_examples(
    model: PreTrainedModel,
    tap: AttentionTap,
    examples: Sequence[Example],
    score_fn: ScoreFn,
    query_position: QueryPosition = "pooled",
) -> list[Scored]:
    """One forward of the model, which the tap is open on."""
    with _padding(model, examples) as pad:
        return _score_examples(model, tap, examples, score_fn, query_position, pad)


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


def _score_examples(
    model: PreTrainedModel,
    tap: AttentionTap,
    examples: Sequence[Example],
    score_fn: ScoreFn,
    query_position: QueryPosition,
    pad: int,
) -> list[Scored]:
    input_ids = _padded([example.input_ids for example in examples], pad).to(model.device)
    lengths = torch.tensor([len(example.input_ids) for example in examples], device=model.device)
    attention_mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
    index = _padded([example.positions for example in examples], -1).to(model.device)
    if isinstance(query_position, int):
        tap.query_position = _positions(query_position, lengths)
    logits = getattr(model(input_ids=input_ids, attention_mask=attention_mask.long()), "logits", None)
    if logits is None or logits.ndim != 2 or len(logits) != len(examples):
        shape = None if logits is None else list(logits.shape)
        raise ValueError(f"{type(model).__name__}: got logits {shape}, want [{len(examples)}, labels]")
    score = score_fn(logits.float())
    shaped = shape_rewards(score, tap.take(), Response(index >= 0, index=index))
    stats = shaped.row_stats
    columns = {
        "entropy": stats.entropy,
        "last_share": stats.last_share,
        "response_attention": stats.response_share,
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
