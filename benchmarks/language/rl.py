"""PPO and group estimators on real language, through the package's own calls."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import attnshape
from attnshape import GroupConfig, credit
from attnshape.demo.curves import rounded
from attnshape.demo.ppo import ActorCritic, Judgement, PPOConfig, Record, Rollout, train
from attnshape.text.texts import align_texts, decoded_spans
from benchmarks.language.cells import Cell
from benchmarks.language.data import Review
from benchmarks.language.rewards import Gold, Scorer, gold_models
from benchmarks.language.sources import leave_one_out, sources_of
from benchmarks.paper.credits import shuffle

POLICY = "lm-2"
PROMPT_WORDS, PROMPTS = (4, 8), 400
NEW_TOKENS, MIN_NEW_TOKENS = 40, 24
EPOCHS = 2
GROUP, GROUPS = 8, 3
GROUP_KL = 0.04
"""Weight of GRPO's own KL estimate (k3) in its loss."""
REFERENCE = 128
BLOCK = 4
"""Neighbouring tokens that leave-one-out deletes together, for a quarter of its cost."""
GOLD_EVERY = 5
CURVES = ("score", "kl", "end_mass", "length")
SAMPLES = 2


@dataclass(frozen=True)
class Judge:
    """A reward model that scores the policy's completions and weighs their tokens.

    It reads the policy's tokens if it has the policy's vocabulary; otherwise the text, and weights come back
    by the characters that tokens share. An end of text is not read and gets no weight.
    """

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    mean: float = 0.0
    std: float = 1.0

    @functools.cached_property
    def same_tokens(self) -> bool:
        return bool(self.scorer.tokenizer.get_vocab() == self.tokenizer.get_vocab())

    def texts(self, rollout: Rollout) -> list[str]:
        """Prompts with their completions."""
        return [
            str(self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))
            for ids, mask in zip(rollout.ids, rollout.mask, strict=True)
        ]

    def read(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Ids, mask, which tokens are the response's, ``[B, S]``; and what takes weights to ``[B, R]``."""
        if not self.same_tokens:
            return self._read_text(rollout)
        spoken = rollout.response_mask & (rollout.responses != self.tokenizer.eos_token_id)
        prompt = rollout.mask[:, : rollout.prompt_length].bool()
        live = torch.cat([prompt, spoken], 1)
        order = (~live).long().argsort(dim=1, stable=True)
        place = live.cumsum(1) - 1  # of a live token among the read ones
        ids = rollout.ids.gather(1, order)
        mask = live.gather(1, order)
        inside = torch.cat([torch.zeros_like(prompt), spoken], 1).gather(1, order)

        def carry(weights: Tensor) -> Tensor:
            at = place[:, rollout.prompt_length :].clamp(min=0)
            return weights.gather(1, at).masked_fill(~spoken, 0.0)

        return ids.masked_fill(~mask, self.scorer.tokenizer.pad_token_id), mask.long(), inside, carry

    def _read_text(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        texts = self.texts(rollout)
        responses = [ids[m] for ids, m in zip(rollout.responses, rollout.response_mask, strict=True)]
        starts = [
            len(text) - len(decoded_spans(self.tokenizer, ids)[0])
            for text, ids in zip(texts, responses, strict=True)
        ]
        found = align_texts(self.scorer.tokenizer, texts, self.tokenizer, responses, start=starts)
        width = rollout.response_mask.shape[1]

        def carry(weights: Tensor) -> Tensor:
            carried = found(weights)
            return nn.functional.pad(carried, (0, width - carried.shape[1]))

        return found.input_ids, found.attention_mask, found.source_mask, carry

    def weigh(self, rollout: Rollout, source: str | None) -> tuple[Tensor, Tensor | None]:
        """Standardised scores ``[B]``, and weights ``[B, R]`` in their unit where the source is signed."""
        ids, mask, inside, carry = self.read(rollout)
        model = self.scorer.model
        if source is None:
            with torch.no_grad():
                score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
            return (score - self.mean) / self.std, None
        if source == "leave-one-out":
            units = torch.where(inside, (inside.cumsum(1) - 1).clamp(min=0) // BLOCK, -1)
            score, weights = leave_one_out(
                model, ids, mask, inside, self.scorer.tokenizer.pad_token_id, units
            )
        else:
            score, weights = sources_of(model)[source](model, ids, mask, inside)
        return (score - self.mean) / self.std, carry(weights) / self.std


def reader_of(source: str) -> tuple[str | None, bool]:
    """The source of ``sources`` that a cell's source reads, and whether it uses the signs."""
    if source in ("plain", "uniform"):
        return None, False
    if source.startswith("ABC"):
        return "last row", False
    name, _, signs = source.partition(", ")
    return name, signs == "signed"


@dataclass
class Watch:
    """What is kept of a run beside the trainer's own record: the gold judge's mean score, and repetition."""

    judge: Judge
    gold: Gold | None
    steps: int
    step: int = 0

    def __post_init__(self) -> None:
        self.gold_at: list[tuple[int, float | None, float]] = []
        self.samples: list[str] = []

    def see(self, rollout: Rollout) -> None:
        if self.step % GOLD_EVERY == 0 or self.step == self.steps - 1:
            texts = self.judge.texts(rollout)
            gold = round(self.gold.score_all(texts).mean().item(), 4) if self.gold else None
            self.gold_at.append((self.step, gold, round(repetition(rollout), 4)))
            self.samples = texts[:SAMPLES]
        self.step += 1


def repetition(rollout: Rollout) -> float:
    """Share of a completion's pairs of neighbouring tokens that it has had before, mean over the batch."""
    shares = []
    for ids, mask in zip(rollout.responses, rollout.response_mask, strict=True):
        tokens = ids[mask].tolist()
        pairs = list(itertools.pairwise(tokens))
        shares.append(1 - len(set(pairs)) / max(1, len(pairs)))
    return sum(shares) / len(shares)


def prompts_of(reviews: Sequence[Review]) -> tuple[str, ...]:
    """The first words of held-out reviews."""
    rng = random.Random(0)
    return tuple(
        " ".join(rng.choice(reviews).text.split()[: rng.randint(*PROMPT_WORDS)]) for _ in range(PROMPTS)
    )


def ppo_source(cell: Cell, watch: Watch) -> Callable[[ActorCritic, Any, Rollout], Judgement]:
    """How a PPO cell judges a batch; signed weights stand, centred, beside an even share of the score."""
    reads, signed = reader_of(cell.source)
    generator = torch.Generator().manual_seed(cell.seed)

    def judged(_actor: ActorCritic, judge: Any, rollout: Rollout) -> Judgement:
        watch.see(rollout)
        score, weights = judge.weigh(rollout, reads)
        if weights is None:
            return Judgement(score, "sparse" if cell.source == "plain" else "uniform")
        if signed:
            rewards = credit.centered(weights, rollout.response_mask)
            return Judgement(score, "uniform", token_rewards=rewards)
        if cell.source == "ABC shuffled":
            weights = shuffle(weights, rollout.response_mask, generator)
        return Judgement(score, weights.abs())

    return judged


def group_config(cell: Cell, signed: bool) -> GroupConfig:
    share = 0.0 if cell.source == "plain" else cell.dense_share
    make = GroupConfig.rloo if cell.loop == "rloo" else GroupConfig.grpo
    return make(dense_share=share, signed="score" if signed else None)


def train_groups(
    actor: ActorCritic, judge: Judge, prompts: Sequence[str], cell: Cell, watch: Watch
) -> list[Record]:
    """GRPO (arXiv 2402.03300) or RLOO (2402.14740) on the actor, in place; a record for each step."""
    rng = random.Random(cell.seed)
    torch.manual_seed(cell.seed)
    reads, signed = reader_of(cell.source)
    config = group_config(cell, signed)
    generator = torch.Generator().manual_seed(cell.seed)
    reference = copy.deepcopy(actor).requires_grad_(False)
    optimizer = torch.optim.Adam(actor.policy.parameters(), lr=cell.lr, betas=(0.9, 0.95))
    records = []
    for _ in range(cell.steps):
        batch = [prompt for prompt in (rng.choice(prompts) for _ in range(GROUPS)) for _ in range(GROUP)]
        rollout = actor.sample(batch, NEW_TOKENS, MIN_NEW_TOKENS)
        watch.see(rollout)
        mask = rollout.response_mask
        with torch.no_grad():
            ref_logprobs, _, _ = reference(rollout, MIN_NEW_TOKENS)
        score, weights = judge.weigh(rollout, reads)
        if weights is not None and not signed:
            weights = weights.abs()
            if cell.source == "ABC shuffled":
                weights = shuffle(weights, mask, generator)
        advantages = attnshape.group_advantages(
            score, credit.uniform(mask) if weights is None else weights, mask, group=GROUP, config=config
        ).advantages
        record = {"score": score.mean().item(), "length": mask.sum(1).float().mean().item()}
        old: Tensor | None = None
        for _ in range(EPOCHS):
            logprobs, _, end_mass = actor(rollout, MIN_NEW_TOKENS)
            if old is None:
                old = logprobs.detach()
                record["kl"] = ((old - ref_logprobs) * mask).sum(1).mean().item()
                record["end_mass"] = end_mass[mask].mean().item()
            ratio = torch.where(mask, logprobs - old, 0.0).exp()
            gain = torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.2))
            apart = torch.where(mask, ref_logprobs - logprobs, 0.0)
            loss = (GROUP_KL * (apart.exp() - apart - 1) - gain)[mask].mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(actor.policy.parameters(), 1.0)
            optimizer.step()
        records.append(record)
    return records


@dataclass(frozen=True)
class Setup:
    """Folders or hub names, and prompts; ``gold`` is None where nobody else judges."""

    policy: str
    reward_model: str
    prompts: tuple[str, ...]
    gold: tuple[Path, ...] = ()

    def load(self) -> tuple[ActorCritic, Judge, Gold | None]:
        model = AutoModelForCausalLM.from_pretrained(self.policy, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        judge = Judge(Scorer.load(self.reward_model), tokenizer)
        return ActorCritic(model, tokenizer), judge, Gold.load(self.gold) if self.gold else None


@functools.lru_cache
def initial(setup: Setup) -> dict[str, float]:
    """Mean and spread of the initial policy's scores, and what the gold judge says of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor, judge, gold = setup.load()
        rng = random.Random(0)
        scores, golds = [], []
        for _ in range(REFERENCE // 32):
            batch = [rng.choice(setup.prompts) for _ in range(32)]
            rollout = actor.sample(batch, NEW_TOKENS, MIN_NEW_TOKENS)
            scores.append(judge.weigh(rollout, None)[0])
            if gold:
                golds.append(gold.score_all(judge.texts(rollout)))
    score = torch.cat(scores)
    found = {"mean": score.mean().item(), "std": score.std().item()}
    if golds:
        found["gold"] = torch.cat(golds).mean().item()
        found["gold_correlation"] = torch.corrcoef(torch.stack([score, torch.cat(golds)]))[0, 1].item()
    return found


def run_cell(cell: Cell, setup: Setup) -> dict[str, Any]:
    """One run; returns its record."""
    begun = time.process_time()
    start = initial(setup)
    torch.manual_seed(cell.seed)
    actor, raw, gold = setup.load()
    judge = Judge(raw.scorer, raw.tokenizer, start["mean"], start["std"])
    watch = Watch(judge, gold, cell.steps)
    if cell.loop == "ppo":
        config = PPOConfig(
            steps=cell.steps,
            new_tokens=NEW_TOKENS,
            min_new_tokens=MIN_NEW_TOKENS,
            epochs=EPOCHS,
            lr=cell.lr,
            lam=cell.lam,
            dense_share=cell.dense_share,
        )
        source: Any = ppo_source(cell, watch)
        records, _ = train(actor, judge, setup.prompts, config, method=source, seed=cell.seed)  # type: ignore[arg-type]
    else:
        records = train_groups(actor, judge, setup.prompts, cell, watch)
    return {
        "name": cell.name,
        "cell": asdict(cell),
        "policy": Path(setup.policy).name,
        "initial": {name: round(x, 4) for name, x in start.items()},
        "curves": {name: rounded([r[name] for r in records]) for name in CURVES},
        "gold": watch.gold_at,
        "samples": watch.samples,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def setup_of(
    cell: Cell,
    cache: Path,
    prompts: tuple[str, ...],
    policy: str | None = None,
    reward_model: str | None = None,
) -> Setup | None:
    """The study's own models, if the cache has those that the cell needs; or a user's."""
    gold = tuple(cache / m.name for m in gold_models())
    has_gold = all(path.exists() for path in (*gold, cache / "gold.json"))
    if policy is not None and reward_model is not None:
        return Setup(policy, reward_model, prompts, gold if has_gold else ())
    own, judge = cache / POLICY, cache / cell.reward_model
    if not (has_gold and own.is_dir() and judge.is_dir()):
        return None
    return Setup(str(own), str(judge), prompts, gold)
