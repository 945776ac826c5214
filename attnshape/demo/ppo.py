"""PPO on a Hugging Face causal model, with its rewards and advantages from ``attnshape``.

It avoids the traps of published implementations: log-probabilities are those of the distribution that was
sampled from (end-of-text suppressed where sampling suppressed it), nothing runs in train mode, and positions
are counted in the tokens of the model that reads them.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import attnshape
from attnshape.demo.agreement import mean_agreement
from attnshape.demo.sampling import can_sample, sample_gpt2
from attnshape.tap import AttentionTap
from attnshape.text.texts import align_texts, decoded_spans

Method: TypeAlias = Literal["sparse", "ABC", "uniform", "ABC-D mean", "ABC-D last"]
ScoreFunction: TypeAlias = Callable[[Tensor], Tensor]
"""Logits ``[B, labels]`` to scores ``[B]``."""
Record: TypeAlias = dict[str, float]
"""Means over one batch, by name."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One run's settings.

    Args:
        batch_size: completions sampled per step; every epoch is one optimiser step on all of them.
        new_tokens: longest completion.
        min_new_tokens: shortest completion; two thirds of the longest if not given.
        lr: of Adam with betas .9 and .95. Of 3e-4, 6e-4 and 1e-3 the default had the highest
            score less ``kl_coef`` times KL under sparse reward, on seeds of its own.
        dense_share: share of the score that the credit redistributes.
        kl_coef: weight of the per-token KL estimate (k1) against the initial policy.
    """

    steps: int = 100
    batch_size: int = 16
    new_tokens: int = 60
    min_new_tokens: int | None = None
    epochs: int = 4
    lr: float = 3e-4
    clip: float = 0.2
    value_coef: float = 0.1
    max_grad_norm: float = 1.0
    dense_share: float = 0.8
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "new_tokens", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.shortest <= self.new_tokens:
            raise ValueError(
                f"min_new_tokens must lie between 0 and new_tokens, got {self.shortest} and {self.new_tokens}"
            )

    @property
    def shortest(self) -> int:
        """Tokens before which no completion ends."""
        return 2 * self.new_tokens // 3 if self.min_new_tokens is None else self.min_new_tokens


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled completions: prompts padded on the left, responses on the right.

    ``ids`` and ``mask`` are ``[B, P + R]``; ``response_mask``, ``[B, R]``, includes the end-of-text token.
    """

    ids: Tensor
    mask: Tensor
    response_mask: Tensor

    @property
    def prompt_length(self) -> int:
        return self.ids.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        return self.ids[:, self.prompt_length :]


class ActorCritic(nn.Module):
    """A causal model with a value head on the states that its output embedding reads."""

    def __init__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.policy = policy.eval()
        self.tokenizer = tokenizer
        output = policy.get_output_embeddings()
        self.value_head = nn.Linear(output.weight.shape[1], 1, device=output.weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        end = policy.generation_config.eos_token_id
        end = tokenizer.eos_token_id if end is None else end
        self.end_ids: list[int] = end if isinstance(end, list) else [end]
        # generate() would fill in the model's own temperature and the like, also where it is told otherwise.
        policy.generation_config = GenerationConfig(
            eos_token_id=self.end_ids, pad_token_id=tokenizer.pad_token_id
        )

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], new_tokens: int, min_new_tokens: int) -> Rollout:
        """Completions drawn at temperature 1 from the whole vocabulary."""
        encoded = self.tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
        prompt_ids = encoded["input_ids"].to(self.policy.device)
        prompt_mask = encoded["attention_mask"].to(self.policy.device)
        if can_sample(self.policy):
            ids = sample_gpt2(
                self.policy,
                prompt_ids,
                prompt_mask,
                new_tokens=new_tokens,
                min_new_tokens=min_new_tokens,
                end_ids=self.end_ids,
                pad_id=self.tokenizer.pad_token_id,
            ).clone()  # a tensor made in inference mode cannot enter a graph
        else:
            ids = self.policy.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                do_sample=True,
                top_k=0,
                min_new_tokens=min_new_tokens,
                max_new_tokens=new_tokens,
            )
        end_ids = torch.tensor(self.end_ids, device=ids.device)
        ended = torch.isin(ids[:, prompt_ids.shape[1] :], end_ids).long()
        response_mask = ended.cumsum(1) - ended == 0
        return Rollout(ids, torch.cat([prompt_mask.bool(), response_mask], dim=1).long(), response_mask)

    def run(self, rollout: Rollout) -> Tensor:
        """Logits before each response token and after the last, ``[B, R + 1, vocabulary]``."""
        logits: Tensor = self.policy(
            input_ids=rollout.ids,
            attention_mask=rollout.mask,
            position_ids=(rollout.mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=rollout.response_mask.shape[1] + 1,
            use_cache=False,
        ).logits
        return logits

    def forward(self, rollout: Rollout, min_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the sampled tokens, values before them, and end-of-text mass, each ``[B, R]``.

        Log-probabilities are under the sampling distribution, so end-of-text is impossible before
        ``min_new_tokens``; its mass is what the policy would give it otherwise.
        """
        states: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            states.append(args[0])

        hook = self.policy.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            logits = self.run(rollout)[:, :-1].float()
        finally:
            hook.remove()
        end_mass = logits.detach().softmax(-1)[..., self.end_ids].sum(-1)
        suppressed = torch.zeros_like(logits, dtype=torch.bool)
        suppressed[:, :min_new_tokens, self.end_ids] = True
        logprobs = logits.masked_fill(suppressed, -torch.inf).log_softmax(-1)
        chosen = logprobs.gather(-1, rollout.responses.unsqueeze(-1)).squeeze(-1)
        values = self.value_head(states[0][:, :-1].float()).squeeze(-1)
        return chosen, values, end_mass


@dataclass(frozen=True)
class Judgement:
    """Scores ``[B]`` with what ``shape_rewards`` needs to redistribute them.

    ``redistributed``, the scores if not given, is what ``credit`` shares out, and ``token_rewards`` are added
    to it: a source whose token rewards stand in place of the score leaves less of it.
    """

    score: Tensor
    credit: Any
    response_start: Tensor | None = None
    token_rewards: Tensor | None = None
    redistributed: Tensor | None = None


class Judge:
    """A sequence classifier that scores completions and, on request, says where it looked.

    With the policy's vocabulary it reads the policy's tokens. Otherwise it reads the decoded text, and its
    credit is carried back to the policy's tokens by the characters they share.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        score_function: ScoreFunction,
        *,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        self.model, self.tokenizer, self.policy_tokenizer = model.eval(), tokenizer, policy_tokenizer
        self.score_function, self.mean, self.std = score_function, mean, std
        self.same_tokens = tokenizer.get_vocab() == policy_tokenizer.get_vocab()

    def read(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's tokens as the judge reads them, without padding on the left.

        Returns ids and mask, ``[B, P + R]``, and where each response starts, int32 ``[B]``.
        """
        return _left_aligned(rollout, self.model.config.pad_token_id)

    def standardized(self, logits: Tensor) -> Tensor:
        """Logits ``[B, labels]`` to scores ``[B]``, less ``mean`` and over ``std``."""
        return (self.score_function(logits.float()) - self.mean) / self.std

    @torch.no_grad()
    def __call__(self, rollout: Rollout, method: Method) -> Judgement:
        """Scores, and the credit that ``method`` names where the judge knows it: not the policy's own."""
        if self.same_tokens:
            ids, mask, response_start = self.read(rollout)
        else:
            texts = [self._text(ids, mask) for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]
            encoded = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            ids, mask, response_start = encoded["input_ids"], encoded["attention_mask"], None
        credit: Any = method.lower()
        if method != "ABC":
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        else:
            with AttentionTap(self.model) as tap:
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            credit = tap.take()
            if not self.same_tokens:
                credit = self._carried(credit, texts, ids, rollout)
        return Judgement(self.standardized(logits), credit, response_start)

    def _text(self, ids: Tensor, mask: Tensor) -> str:
        return str(self.policy_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))

    def _carried(self, attention: Any, texts: list[str], read: Tensor, rollout: Rollout) -> Tensor:
        responses = [
            ids[mask] for ids, mask in zip(rollout.responses.cpu(), rollout.response_mask.cpu(), strict=True)
        ]
        spoken = [decoded_spans(self.policy_tokenizer, ids)[0] for ids in responses]
        starts = [len(text) - len(end) for text, end in zip(texts, spoken, strict=True)]
        alignment = align_texts(
            self.tokenizer, texts, self.policy_tokenizer, responses, start=starts, input_ids=read
        )
        mask = alignment.source_mask.to(self.model.device)
        start = torch.zeros(len(texts), dtype=torch.int32, device=self.model.device)
        carried = alignment(attnshape.attention_credit(attention, attnshape.Response(mask, start=start)))
        return nn.functional.pad(carried, (0, rollout.response_mask.shape[1] - carried.shape[1]))


def _left_aligned(rollout: Rollout, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens without padding on the left, their mask, and where responses start, int32 ``[B]``."""
    padding = rollout.prompt_length - rollout.mask[:, : rollout.prompt_length].sum(1)
    columns = torch.arange(rollout.ids.shape[1], device=rollout.ids.device) + padding[:, None]
    inside = columns < rollout.ids.shape[1]
    columns = columns.clamp(max=rollout.ids.shape[1] - 1)
    mask = rollout.mask.gather(1, columns) * inside
    # The classifier's head takes the last token that is no padding, whatever the mask says.
    ids = torch.where(mask.bool(), rollout.ids.gather(1, columns), pad_id)
    return ids, mask, (rollout.prompt_length - padding).int()


Source: TypeAlias = Callable[["ActorCritic", Judge, Rollout], Judgement]
"""Judges a batch of the actor's completions; ``source_of`` has one for each method."""


def source_of(method: Method) -> Source:
    """How ``method`` judges a batch."""

    def judged(_actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        return judge(rollout, method)

    def from_policy(actor: ActorCritic, judge: Judge, rollout: Rollout) -> Judgement:
        judgement = judge(rollout, "sparse")
        return replace(
            judgement,
            credit=own_attention(actor, rollout, "last" if method == "ABC-D last" else "mean"),
            response_start=None,
        )

    return from_policy if method.startswith("ABC-D") else judged


@torch.no_grad()
def own_attention(actor: ActorCritic, rollout: Rollout, variant: Literal["mean", "last"]) -> Tensor:
    """ABC-D: credit ``[B, R]`` from the attention of the policy's last layer among the response's tokens."""
    with AttentionTap(actor.policy, query_position="all") as tap:
        actor.run(rollout)
    start = torch.full(
        (len(rollout.ids),), rollout.prompt_length, dtype=torch.int32, device=rollout.ids.device
    )
    response = attnshape.Response(rollout.response_mask, start=start)
    return attnshape.attention_column_credit(tap.take(), response, variant=variant)


@dataclass(frozen=True)
class Completion:
    """One sampled completion with its credit per token."""

    prompt: str
    tokens: list[str]
    credit: list[float]
    score: float
    true_reward: float | None


@dataclass(frozen=True)
class Truth:
    """A corpus's true reward of a text's words, and each word's effect on it."""

    reward: Callable[[Sequence[str]], float]
    effects: Callable[[Sequence[str]], list[float]]

    def rewards(self, actor: ActorCritic, rollout: Rollout) -> list[float]:
        return [self.reward(words) for words, _ in _words(actor, rollout)]

    def response_effects(self, actor: ActorCritic, rollout: Rollout) -> Tensor:
        """Effect of each response token, ``[B, R]``; 0 for tokens that are not words."""
        out = torch.zeros(rollout.response_mask.shape)
        for b, (words, columns) in enumerate(_words(actor, rollout)):
            for effect, column in zip(self.effects(words), columns, strict=True):
                if column >= rollout.prompt_length:
                    out[b, column - rollout.prompt_length] = effect
        return out


def _words(actor: ActorCritic, rollout: Rollout) -> list[tuple[list[str], list[int]]]:
    """Each row's tokens that are no special ones, and their columns."""
    special = set(actor.tokenizer.all_special_ids)
    out = []
    for ids, mask in zip(rollout.ids.tolist(), rollout.mask.tolist(), strict=True):
        columns = [i for i, token in enumerate(ids) if mask[i] and token not in special]
        out.append((actor.tokenizer.convert_ids_to_tokens([ids[i] for i in columns]), columns))
    return out


def train(
    actor: ActorCritic,
    judge: Judge,
    prompts: Sequence[str],
    config: PPOConfig,
    *,
    method: Method | Source,
    seed: int,
    truth: Truth | None = None,
    on_step: Callable[[Record], None] | None = None,
) -> tuple[list[Record], list[Completion]]:
    """PPO on the actor, in place; returns a record per step and the last step's completions.

    The same seed gives the same prompts whatever the method.
    """
    source = source_of(method) if isinstance(method, str) else method
    rng = random.Random(seed)
    torch.manual_seed(seed)
    reference = copy.deepcopy(actor).requires_grad_(False)
    optimizer = torch.optim.Adam(actor.parameters(), lr=config.lr, betas=(0.9, 0.95))
    shaping = attnshape.ShapingConfig(dense_share=config.dense_share, gamma=config.gamma, lam=config.lam)
    records: list[Record] = []
    for _ in range(config.steps):
        batch = [rng.choice(prompts) for _ in range(config.batch_size)]
        rollout = actor.sample(batch, config.new_tokens, config.shortest)
        mask = rollout.response_mask
        with torch.no_grad():
            logprobs, values, end_mass = actor(rollout, config.shortest)
            ref_logprobs, _, _ = reference(rollout, config.shortest)
        judgement = source(actor, judge, rollout)
        shaped = attnshape.shape_rewards(
            judgement.score if judgement.redistributed is None else judgement.redistributed,
            judgement.credit,
            attnshape.Response(mask, start=judgement.response_start),
            values=values,
            kl=attnshape.KL(logprobs, ref_logprobs, config.kl_coef),
            token_rewards=judgement.token_rewards,
            config=shaping,
        )
        losses = _optimize(actor, optimizer, rollout, logprobs, values, shaped, config)
        assert shaped.kl is not None
        record = {
            "score": judgement.score.mean().item(),
            "kl": shaped.kl.sum(1).mean().item(),
            "end_mass": _mean(end_mass, mask).item(),
            "length": mask.sum(1).float().mean().item(),
            **losses,
            **{name: value.item() for name, value in shaped.metrics.items()},
        }
        if truth:
            effects = truth.response_effects(actor, rollout)
            rewards = truth.rewards(actor, rollout)
            record["true_reward"] = sum(rewards) / len(rewards)
            dense = shaped.credit if judgement.token_rewards is None else judgement.token_rewards.abs()
            record.update(mean_agreement(dense.cpu(), effects, mask.cpu()))
        records.append(record)
        if on_step:
            on_step(record)
    return records, _completions(actor, rollout, judgement.score, shaped.credit, truth)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].mean()


def _optimize(
    actor: ActorCritic,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    logprobs: Tensor,
    values: Tensor,
    shaped: attnshape.ShapedRewards,
    config: PPOConfig,
) -> Record:
    """PPO's clipped objective (arXiv 1707.06347) and clipped value loss; returns means over the epochs."""
    mask = rollout.response_mask
    advantages = attnshape.whiten(shaped.advantages, mask)
    totals = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0}
    for _ in range(config.epochs):
        new_logprobs, new_values, _ = actor(rollout, config.shortest)
        ratio = torch.where(mask, new_logprobs - logprobs, 0.0).exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        policy_loss = _mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)
        near = values + (new_values - values).clamp(-config.clip, config.clip)
        errors = torch.maximum((new_values - shaped.returns) ** 2, (near - shaped.returns) ** 2)
        value_loss = 0.5 * _mean(errors, mask)
        optimizer.zero_grad()
        torch.autograd.backward(policy_loss + config.value_coef * value_loss)
        nn.utils.clip_grad_norm_(actor.parameters(), config.max_grad_norm)
        optimizer.step()
        totals["policy_loss"] += policy_loss.item()
        totals["value_loss"] += value_loss.item()
        totals["clip_fraction"] += _mean((ratio != clipped).float(), mask).item()
    return {name: total / config.epochs for name, total in totals.items()}


def _completions(
    actor: ActorCritic, rollout: Rollout, score: Tensor, credit: Tensor, truth: Truth | None
) -> list[Completion]:
    rewards = truth.rewards(actor, rollout) if truth else [None] * len(rollout.ids)
    out = []
    for b, reward in enumerate(rewards):
        prompt_mask = rollout.mask[b, : rollout.prompt_length].bool()
        prompt = rollout.ids[b, : rollout.prompt_length][prompt_mask].tolist()
        live = rollout.response_mask[b]
        pieces = _pieces(actor.tokenizer, prompt, rollout.responses[b, live].tolist())
        out.append(Completion(pieces[0], pieces[1:], credit[b, live].tolist(), score[b].item(), reward))
    return out


def _pieces(tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int]) -> list[str]:
    """The prompt's text, then what each response token adds to the text."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in prompt if i not in special]
    texts = ["", tokenizer.decode(ids)]
    for token in response:
        ids = [*ids, token]
        texts.append(tokenizer.decode(ids))
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]
