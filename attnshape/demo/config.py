"""What a demo is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from attnshape.demo.models import ModelConfig
from attnshape.demo.ppo import Method, PPOConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything that ``run_demo`` needs.

    Args:
        policy, reward_model, prompts: a folder or hub name of a causal model, of a sequence classifier, and a
            file of prompts (``.jsonl`` with a ``prompt`` per line, or one text per line). All three, or none:
            then the demo trains its own on reviews whose true reward is known.
        score_fn: the score as an expression over the reward model's logits, such as ``logit[1] - logit[0]``.
        methods: sources of credit to compare; the first is what the others are compared with.
        seeds: one run of every method for each.
        standardize: measure scores in standard deviations from the initial policy's mean.
        threshold: the score, in the unit that ``standardize`` sets, to which steps are counted.
        device: of the models in PPO; a GPU if there is one, unless named.
        workers: processes that share the runs on a CPU; 2 for the demo's own models, otherwise 1.
        cache_dir: where trained models are kept; by default ``~/.cache/attnshape``.
        out: folder for ``results.json``, ``learning_curves.png`` and ``credit.html``.
    """

    policy: str | None = None
    reward_model: str | None = None
    prompts: Path | None = None
    score_fn: str = "logit"
    methods: tuple[Method, ...] = ("sparse", "ABC")
    seeds: tuple[int, ...] = (0, 1, 2)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    models: ModelConfig = field(default_factory=ModelConfig)
    standardize: bool = True
    threshold: float = 1.0
    device: str | None = None
    workers: int | None = None
    cache_dir: Path | None = None
    out: Path = Path("demo-out")

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) is not None for name in ("policy", "reward_model", "prompts")}
        if any(given.values()) and not all(given.values()):
            missing = ", ".join(name for name, there in given.items() if not there)
            raise ValueError(f"policy, reward_model and prompts go together, got no {missing}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different and at least one, got {self.seeds}")
        unknown = set(self.methods) - set(get_args(Method))
        if unknown or not self.methods:
            raise ValueError(f"methods must be among {get_args(Method)}, got {self.methods}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    @property
    def own_models(self) -> bool:
        """Whether the demo trains the models, so that true rewards are known."""
        return self.policy is None
