"""A reward model, and where its credit is read from: what training loops are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnshape.text.align import align
from attnshape.text.reader import Example, Reader, batch_of, load_reward_model
from attnshape.text.score_fn import parse_score_fn
from attnshape.text.source import CreditSource, SourceName
from attnshape.text.turns import spans_of
from attnshape.types import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text, which the response continues, or messages, which the reward model's chat template renders with it."""


class Credited(NamedTuple):
    """What a reward model says of the policy's tokens; on the reward model's device."""

    score: Tensor
    """float32 ``[B]``."""
    weights: Tensor
    """float32 ``[B, R]``, not normalised; signed where the source is. 0 where masked."""
    mask: Tensor
    """bool ``[B, R]``: the policy's own tokens."""


class CreditModel:
    """A reward model whose forward gives a score and the weight of each of the policy's tokens in it.

    Args:
        model: a folder or hub name of a sequence classifier, or one that is loaded.
        tokenizer: of a loaded model, a fast one; found by the model's name if not given.
        source: what weighs the tokens, see ``CreditSource``.
        layer: which attention layer is read, negative from the last; the source's own if not given.
        score_fn: the score, such as ``"logit[1] - logit[0]"``.
        batch_tokens: the most that a forward takes, padding counted; a longer text goes alone.
        device: of a model that is loaded here.

    Raises:
        ValueError: no such source; a checkpoint that lacks weights of the score; a slow tokenizer; a score
            that does not fit the model.

    Example:
        judge = CreditModel("reward-model", source="rollout")
        out = judge(prompts, response_ids, policy_tokenizer)
        shaped = attnshape.shape_rewards(out.score, out.weights, out.mask, values=values)
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        source: SourceName = "attention",
        layer: int | Sequence[int] | None = None,
        score_fn: str = "logit",
        batch_tokens: int = 16384,
        device: str = "cpu",
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, want 1 or more")
        self.source = CreditSource(source, layer)
        self.score_fn, self.batch_tokens = parse_score_fn(score_fn), batch_tokens
        self.name: str = model if isinstance(model, str) else model.config.name_or_path
        if isinstance(model, str):
            self.model, found = load_reward_model(model, device)
        else:
            from transformers import AutoTokenizer

            self.model = model
            found = AutoTokenizer.from_pretrained(self.name) if tokenizer is None else tokenizer
        self.tokenizer = found if tokenizer is None else tokenizer
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: want a fast one, which gives offsets, got {type(self.tokenizer).__name__}"
            )
        self.score_fn.check(self.model.config.num_labels)
        with self.source.open(self.model):
            pass  # raises where the model cannot be read

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
        reader = Reader(self.tokenizer, self.model.config)
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
        device = self.model.device
        score = torch.zeros(len(rows), device=device)
        width = max(map(len, rows), default=0)
        weights = torch.zeros(len(rows), width, device=device)
        for batch in self._batches(examples):
            found, each = self._forward([examples[i] for i in batch])
            score[batch] = found
            for i, row in zip(batch, each, strict=True):
                weights[i, : len(row)] = row
        mask = pad_sequence([torch.zeros(width, dtype=torch.bool), *map(torch.tensor, own)], True)[1:]
        return Credited(score, weights, mask.bool().to(device))

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
        pads = self.model.config.get_text_config().pad_token_id is not None
        while order:
            longest = len(examples[order[0]].input_ids)
            count = max(self.batch_tokens // longest, 1) if pads else 1
            yield order[:count]
            order = order[count:]

    def _forward(self, examples: Sequence[Example]) -> tuple[Tensor, list[Tensor]]:
        """Scores, and the weights of each one's policy tokens."""
        inputs, index = batch_of(self.model, examples)
        with self.source.open(self.model) as tap:
            score = self.score_fn(self.model(**inputs).logits.float())
            weights = self.source.weights(tap.take(), score, Response(index >= 0, index=index))
        rows = []
        for example, row in zip(examples, weights, strict=True):
            assert example.policy_offsets is not None
            carry = align(example.offsets, example.policy_offsets)
            rows.append(carry(row[: len(example.positions)]))
        return score.detach(), rows
