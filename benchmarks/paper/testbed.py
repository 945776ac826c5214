"""The models of the experiments, and one cell's run on them."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from attnshape.bench.machine import run_facts
from attnshape.demo.corpus import build_tokenizer
from attnshape.demo.curves import rounded
from attnshape.demo.models import (
    METRICS,
    POLICY,
    REWARD_MODEL,
    ModelConfig,
    OnStep,
    PreferencePairs,
    TrainingMetrics,
    default_cache_dir,
    train_reward_model,
    trained_models,
)
from attnshape.demo.ppo import ActorCritic, PPOConfig, Record, Rollout, train
from attnshape.demo.run import REVIEWS_TRUTH, Reference, Setup, review_prompts
from benchmarks.paper.cells import LONG, LONGEST, TRAININGS, Cell
from benchmarks.paper.credits import source_for

MODELS = ModelConfig()
"""The demo's own models, whose reviews are long enough for 60 new tokens after a prompt."""
LONG_MODELS = ModelConfig(positions=144, review_words=(60, 118), pair_words=(4, 112), rm_steps=1500)
"""For 110 new tokens. Longer pairs take longer to learn from."""
LONGEST_MODELS = ModelConfig(positions=192, review_words=(100, 168), pair_words=(4, 164), rm_steps=2000)
"""For 160 new tokens."""
TRAINING_SEED_STEP = 10
"""Between the seeds of two trainings, each of which uses a few in a row."""
DEPTH, DPO = "depth", "dpo_policy"
DPO_STEPS, DPO_BATCH, DPO_LR, DPO_BETA = 200, 32, 3e-4, 0.1
CURVES = (
    "true_reward",
    "score",
    "kl",
    "end_mass",
    "length",
    "value_loss",
    "credit_entropy",
    "precision_at_k",
)
"""What is kept of every step of a run."""


@dataclass(frozen=True)
class Models:
    """Models and prompts; those of the testbed itself, or a user's.

    ``setups`` has one for each of a cell's ``models``. ``dpo`` gives the folder or hub name of the policy
    that ``RTO`` needs; it may train it. ``training`` says how well the testbed's own models learned.
    """

    setups: dict[str, Setup]
    dpo: Callable[[], str] | None = None
    training: dict[str, TrainingMetrics] = field(default_factory=dict)

    def setup(self, cell: Cell) -> Setup:
        if cell.models not in self.setups:
            raise ValueError(f"models: got {cell.models!r}, want one of {list(self.setups)}")
        return self.setups[cell.models]

    def dpo_policy(self, cell: Cell) -> ActorCritic | None:
        if self.dpo is None or cell.method != "RTO":
            return None
        name = self.dpo()
        policy = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return ActorCritic(policy.to(self.setup(cell).device), AutoTokenizer.from_pretrained(name))


def own_models(
    needed: Collection[str], cache_dir: Path | None = None, on_step: OnStep | None = None
) -> Models:
    """The testbed's own models, those of ``needed`` trained where they are not in the cache.

    Reward models of the depth study are taken where they are there: ``depth`` trains them.
    """
    cache_dir = cache_dir or default_cache_dir()
    setups, training = {}, {}
    for name, config in (("testbed", MODELS), (LONG, LONG_MODELS), (LONGEST, LONGEST_MODELS)):
        if name == "testbed" or name in needed:
            folder, training[name], _ = trained_models(config, cache_dir, on_step)
            setups[name] = _setup(folder)
    for seed, name in enumerate(TRAININGS, start=1):
        if name in needed:
            folder, training[name] = _trained_again(seed, Path(setups["testbed"].policy), on_step)
            setups[name] = replace(setups["testbed"], reward_model=str(folder))
    for other in sorted((cache_dir / DEPTH).glob("* layers, seed *")):
        setups[other.name] = replace(setups["testbed"], reward_model=str(other))
    policy = Path(setups["testbed"].policy)
    return Models(setups, functools.partial(own_dpo, policy.parent), training)


def _trained_again(seed: int, policy: Path, on_step: OnStep | None = None) -> tuple[Path, TrainingMetrics]:
    """The testbed's reward model trained from the same language model with other pairs, order and head."""
    folder = policy.parent / TRAININGS[seed - 1]
    if not folder.is_dir():
        config = replace(MODELS, seed=MODELS.seed + TRAINING_SEED_STEP * seed)
        language_model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        model, accuracy, true_accuracy = train_reward_model(config, language_model, on_step)
        lm_loss = json.loads((policy.parent / METRICS).read_text())["lm_loss"]
        metrics = TrainingMetrics(lm_loss, accuracy, true_accuracy)

        def save(new: Path) -> None:
            model.save_pretrained(new)
            build_tokenizer().save_pretrained(new)
            (new / METRICS).write_text(json.dumps(asdict(metrics)) + "\n")

        whole_folder(folder, save)
    return folder, TrainingMetrics(**json.loads((folder / METRICS).read_text()))


def _setup(folder: Path) -> Setup:
    prompts = review_prompts(MODELS.seed)
    return Setup(str(folder / POLICY), str(folder / REWARD_MODEL), prompts, "logit", "cpu", REVIEWS_TRUTH)


def own_dpo(folder: Path) -> str:
    """The testbed's policy after DPO, trained if it is not there."""
    new = folder / DPO
    if not new.is_dir():
        whole_folder(new, functools.partial(_save_dpo, folder / POLICY))
    return str(new)


def whole_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """A folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        new = Path(scratch) / folder.name
        save(new)
        if folder.is_dir():
            shutil.rmtree(folder)
        new.rename(folder)


def _save_dpo(policy: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    train_dpo(model, MODELS).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def train_dpo(policy: GPT2LMHeadModel, config: ModelConfig, steps: int = DPO_STEPS) -> GPT2LMHeadModel:
    """DPO (arXiv 2305.18290) on the reward model's preference pairs, for RTO."""
    torch.manual_seed(config.seed + 3)
    reference = copy.deepcopy(policy).requires_grad_(False)
    pairs = PreferencePairs(config, seed=config.seed + 3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=DPO_LR)
    for _ in range(steps):
        ids, _margin = pairs.draw(DPO_BATCH)
        with torch.no_grad():
            before = _sequence_logprobs(reference, ids)
        ratio = _sequence_logprobs(policy, ids) - before
        loss = -F.logsigmoid(DPO_BETA * (ratio[0] - ratio[1])).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy.eval()


def _sequence_logprobs(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Log-probabilities ``[2, count]`` of unpadded pairs ``[2, count, L]``."""
    flat = ids.flatten(0, 1)
    logits = model(flat[:, :-1], attention_mask=torch.ones_like(flat[:, :-1])).logits
    logprobs = -F.cross_entropy(logits.transpose(1, 2), flat[:, 1:], reduction="none")
    return logprobs.sum(1).view(2, -1)


@functools.lru_cache
def _reference(setup: Setup, low: int, high: int, batch_size: int) -> Reference:
    with torch.random.fork_rng():
        return setup.reference(PPOConfig(batch_size=batch_size, new_tokens=high, min_new_tokens=low))


class SeparateCritic(ActorCritic):
    """Values from a model of its own, which starts as a copy of the policy's trunk."""

    def __init__(self, actor: ActorCritic) -> None:
        super().__init__(actor.policy, actor.tokenizer)
        self.critic = copy.deepcopy(actor.policy.base_model)

    def forward(self, rollout: Rollout, min_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """As its base's, but for the values ``[B, R]``."""
        logprobs, _, end_mass = super().forward(rollout, min_new_tokens)
        states = self.critic(
            input_ids=rollout.ids,
            attention_mask=rollout.mask,
            position_ids=(rollout.mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        before = states[:, rollout.prompt_length - 1 : -1]
        return logprobs, self.value_head(before.float()).squeeze(-1), end_mass


def run_cell(cell: Cell, testbed: Models, on_step: Callable[[Record], None] | None = None) -> dict[str, Any]:
    """One PPO run; returns its record.

    Scores are standardised on the initial policy's completions of the same length; recorded ones leave
    ``shift`` out.
    """
    start = time.process_time()
    setup, config = testbed.setup(cell), cell.ppo()
    reference = _reference(setup, config.shortest, config.new_tokens, config.batch_size)
    zero = reference.mean - cell.shift * reference.std
    torch.manual_seed(cell.seed)
    actor, judge = replace(setup, mean=zero, std=reference.std).load()
    if cell.critic == "separate":
        actor = SeparateCritic(actor)
    source = source_for(cell.method, beta=cell.beta, seed=cell.seed, dpo=testbed.dpo_policy(cell))
    records, _ = train(
        actor,
        judge,
        setup.prompts,
        config,
        method=source,
        seed=cell.seed,
        truth=setup.truth,
        on_step=on_step,
    )
    curves = {name: [r[name] for r in records] for name in CURVES if name in records[0]}
    curves["score"] = [x - cell.shift for x in curves["score"]]
    return {
        "cell": asdict(cell),
        "initial": reference._asdict(),
        "cpu_seconds": round(time.process_time() - start, 1),
        **provenance(),
        "curves": {name: rounded(curve) for name, curve in curves.items()},
    }


@functools.lru_cache
def provenance() -> dict[str, Any]:
    """Commit, versions and machine of what was measured."""
    root = Path(__file__).parents[2]
    commit = os.environ.get("COMMIT")
    if commit is None:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = head.stdout.strip()
    return {"commit": commit, **run_facts()}
