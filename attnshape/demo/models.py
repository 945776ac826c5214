"""The demo's two models: a small language model of the reviews, and a reward model started from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from attnshape.demo.corpus import BOS, EOS, PAD, build_tokenizer, true_reward, vocabulary, write_review

Stage: TypeAlias = Literal["language model", "reward model"]
Reward: TypeAlias = Callable[[Sequence[str]], float]
OnStep: TypeAlias = Callable[[Stage, int, float], None]
"""Called after every optimiser step with the stage, the number of steps done and the loss."""

CACHE_VERSION = 1
"""Part of the cache key; raise it when the grammar or the training code changes what is trained."""

POLICY, REWARD_MODEL, METRICS = "policy", "reward_model", "metrics.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and training of both models; everything that a cached pair depends on.

    Args:
        review_words: a review has at least this many words (shortest, longest), drawn per review.
        temperature: the truly better review is preferred with probability ``sigmoid(margin / temperature)``.
        pair_words: both reviews of a preference pair are cut to one length from this range.
        growth: share of the reward model's steps over which the longest pairs grow to full length; long
            pairs alone give it little to start from.
        frozen_layers: lowest layers that the reward model keeps as the language model had them, so that its
            last layer has to find the words that matter.
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    positions: int = 128
    reviews: int = 8000
    review_words: tuple[int, int] = (40, 64)
    lm_steps: int = 600
    lm_batch_size: int = 32
    lm_lr: float = 2e-3
    temperature: float = 0.25
    pair_words: tuple[int, int] = (4, 64)
    growth: float = 0.6
    frozen_layers: int = 1
    rm_steps: int = 500
    rm_batch_size: int = 64
    rm_lr: float = 2e-3
    held_out_pairs: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class TrainingMetrics:
    """How well the two models learned.

    ``accuracy`` is the reward model's on held-out preference pairs, ``true_accuracy`` the same pairs against
    the noiseless order of their true rewards.
    """

    lm_loss: float
    accuracy: float
    true_accuracy: float


def train_language_model(config: ModelConfig, on_step: OnStep | None = None) -> tuple[GPT2LMHeadModel, float]:
    """A GPT-2-shaped model trained from scratch on reviews; returns it with its last 50 steps' mean loss."""
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    index = {word: i for i, word in enumerate(vocabulary())}
    reviews = [write_review(rng, rng.randint(*config.review_words)) for _ in range(config.reviews)]
    rows = [torch.tensor([index[BOS], *(index[w] for w in words), index[EOS]]) for words in reviews]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=index[PAD])

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(index),
            n_positions=config.positions,
            n_embd=config.hidden_size,
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=index[BOS],
            eos_token_id=index[EOS],
            pad_token_id=index[PAD],
        )
    )
    optimizer, schedule = _optimizer(model, config.lm_lr, config.lm_steps)
    losses: list[float] = []
    for step in range(config.lm_steps):
        batch = ids[torch.randint(len(ids), (config.lm_batch_size,))]
        inputs = batch[:, :-1]
        # Padding is on the right, where no real token sees it.
        logits = model(inputs, attention_mask=torch.ones_like(inputs)).logits
        loss = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], ignore_index=index[PAD])
        losses.append(_update(model, optimizer, schedule, loss))
        if on_step:
            on_step("language model", step + 1, losses[-1])
    recent = losses[-50:]
    return model.eval(), sum(recent) / len(recent)


class PreferencePairs:
    """Pairs of reviews of equal length with a noisy Bradley-Terry preference between them.

    ``reward`` is what the preferences are about, the true reward if not given.
    """

    def __init__(self, config: ModelConfig, *, seed: int, reward: Reward = true_reward) -> None:
        self.config, self.reward = config, reward
        self.rng = random.Random(seed)
        self.index = {word: i for i, word in enumerate(vocabulary())}
        longest = config.pair_words[1]
        self.reviews = [write_review(self.rng, longest)[:longest] for _ in range(config.reviews // 2)]

    def draw(self, count: int, longest: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids ``[2, count, L]``, preferred ones first, and their true margin ``[count]``.

        All are cut to one length, at most ``longest``; half of the draws end in ``</s>``.
        """
        length = self.rng.randint(self.config.pair_words[0], longest or self.config.pair_words[1])
        end = [EOS] if self.rng.random() < 0.5 else []
        preferred: list[list[int]] = []
        rejected: list[list[int]] = []
        margins: list[float] = []
        while len(margins) < count:
            first, second = (words[:length] for words in self.rng.sample(self.reviews, 2))
            margin = self.reward(first) - self.reward(second)
            if margin == 0:
                continue
            if self.rng.random() >= 1 / (1 + math.exp(-margin / self.config.temperature)):
                first, second, margin = second, first, -margin
            for out, words in ((preferred, first), (rejected, second)):
                out.append([self.index[w] for w in (BOS, *words, *end)])
            margins.append(margin)
        return torch.tensor([preferred, rejected]), torch.tensor(margins)


def train_reward_model(
    config: ModelConfig,
    language_model: GPT2LMHeadModel,
    on_step: OnStep | None = None,
    reward: Reward = true_reward,
) -> tuple[GPT2ForSequenceClassification, float, float]:
    """A one-label sequence classifier on the language model's trunk, trained on Bradley-Terry's likelihood.

    Returns it with its accuracy on held-out pairs, against the noisy preferences and against the true order.
    """
    torch.manual_seed(config.seed + 1)
    model = GPT2ForSequenceClassification(
        GPT2Config(**{**language_model.config.to_dict(), "id2label": {0: "reward"}, "architectures": None})
    )
    model.transformer.load_state_dict(language_model.transformer.state_dict())
    for block in model.transformer.h[: config.frozen_layers]:
        block.requires_grad_(False)
    pairs = PreferencePairs(config, seed=config.seed + 1, reward=reward)
    optimizer, schedule = _optimizer(model, config.rm_lr, config.rm_steps)
    for step in range(config.rm_steps):
        growth = min(1.0, step / (config.rm_steps * config.growth))
        shortest, longest = config.pair_words
        ids, _ = pairs.draw(config.rm_batch_size, shortest + round(growth * (longest - shortest)))
        preferred, rejected = _scores(model, ids)
        loss = _update(model, optimizer, schedule, -F.logsigmoid(preferred - rejected).mean())
        if on_step:
            on_step("reward model", step + 1, loss)
    model.eval()
    return model, *held_out_accuracy(model, config, reward)


@torch.no_grad()
def held_out_accuracy(
    model: GPT2ForSequenceClassification, config: ModelConfig, reward: Reward = true_reward
) -> tuple[float, float]:
    """Share of unseen pairs whose preferred review scores higher, and whose truly better one does."""
    pairs = PreferencePairs(config, seed=config.seed + 2, reward=reward)
    batches = math.ceil(config.held_out_pairs / config.rm_batch_size)
    right, truly_right = [], []
    for _ in range(batches):
        ids, margin = pairs.draw(config.rm_batch_size)
        preferred, rejected = _scores(model, ids)
        right.append(preferred > rejected)
        truly_right.append((preferred > rejected) == (margin > 0))
    return torch.cat(right).float().mean().item(), torch.cat(truly_right).float().mean().item()


def _scores(model: GPT2ForSequenceClassification, ids: Tensor) -> Tensor:
    """Scores ``[2, count]`` of unpadded pairs ``[2, count, L]``."""
    flat = ids.flatten(0, 1)
    scores: Tensor = model(flat, attention_mask=torch.ones_like(flat)).logits
    return scores.view(2, -1)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/attnshape``, by default ``~/.cache/attnshape``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnshape"


def trained_models(
    config: ModelConfig, cache_dir: Path, on_step: OnStep | None = None
) -> tuple[Path, TrainingMetrics, bool]:
    """The folder that holds this configuration's ``policy`` and ``reward_model``, trained if it is not there.

    Returns the folder, the metrics of its training, and whether it was found rather than trained. The folder
    appears whole or not at all, whatever interrupts the training.
    """
    key = json.dumps([CACHE_VERSION, asdict(config)], sort_keys=True)
    folder = cache_dir / f"demo-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder, TrainingMetrics(**json.loads((folder / METRICS).read_text())), True

    policy, lm_loss = train_language_model(config, on_step)
    reward_model, accuracy, true_accuracy = train_reward_model(config, policy, on_step)
    metrics = TrainingMetrics(lm_loss, accuracy, true_accuracy)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".demo-") as scratch:
        new = Path(scratch) / folder.name
        tokenizer = build_tokenizer()
        for model, name in ((policy, POLICY), (reward_model, REWARD_MODEL)):
            model.save_pretrained(new / name)
            tokenizer.save_pretrained(new / name)
        (new / METRICS).write_text(json.dumps(asdict(metrics), indent=1) + "\n")
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder, metrics, False


def _optimizer(
    model: torch.nn.Module, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, warmed up over a twentieth of the steps and annealed to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)


def _update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: Tensor,
) -> float:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()
