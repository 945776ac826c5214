"""What is run: every cell of every experiment, and the marks that were set before the first run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from attnshape.demo.ppo import PPOConfig

Length: TypeAlias = Literal["8-16", "20-30", "40-60", "90-110", "140-160", "8-48", "8-256"]
"""New tokens, fewest and most; the last two are those of the paper's TL;DR and helpful-base runs."""
Critic: TypeAlias = Literal["shared", "separate"]
Method: TypeAlias = Literal[
    "sparse",
    "uniform",
    "ABC",
    "ABC-D mean",
    "ABC-D last",
    "ABC shuffled",
    "ABC profile",
    "ABC, random weights",
    "R3HF",
    "RTO",
    "norm-weighted rollout",
    "gradient x value",
    "gradient x value, signed",
    "relevance, signed",
]
"""The paper's five; three controls of ABC; two neighbouring methods; sources that read all layers.

``ABC shuffled``: ABC's credit in random order within the response. ``ABC profile``: the mean of ABC's credit
at a token's relative position, over the run so far. ``ABC, random weights``: the attention of a reward model
that was never trained; the score is the trained one's. ``relevance`` is taken a third of the layers up, as
``source="relevance"`` takes it: in a reward model of two layers at the first.
"""

# Set before the first run, and not moved since.
RISES = (1.0, 2.0)
"""Steps are counted to where the 5-step mean of the true reward has risen by so many standard deviations of
the initial policy's completions."""
COLLAPSE = 1.0
"""A run collapsed if its last 10 steps' mean true reward is this many of them below its best 10-step mean."""
KL_MARKS = (1.0, 2.0, 4.0, 8.0)
"""Rewards of methods are compared where a run's 5-step mean KL first reaches these."""
STEPS = 100
SEEDS = tuple(range(10))
FEW = SEEDS[:5]
LR = 3e-4
LRS = (3e-4, 6e-4, 1e-3)
LR_SEEDS = (1000, 1001)
"""Learning rates are chosen on these, which no table of results includes."""
SPARSE_BEST = {"lam": 1.0, "lr": 6e-4}
"""What that choice gave: ``summary`` makes it again from the runs."""
HEADLINE: Length = "40-60"
PAPER: Length = "8-16"
LAM, LAMS = 0.95, (0.95, 0.99, 1.0)
BETA, BETAS = 0.8, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SHIFTS = (5.0, -5.0)
DEPTHS = (1, 2, 4, 6)
MODEL_SEEDS = (0, 1, 2, 3)
DEEP, LONG, LONGEST = "4 layers, seed 0", "long", "longest"
TRAININGS = tuple(f"training {i}" for i in range(1, 6))
"""Reward models for the testbed's policy that differ in the seed of their training."""
TRAINING_SEEDS = SEEDS[:2]
"""Policy seeds of each training."""

# Added after others' runs had been seen.
RUNAWAY_KL = 100.0
"""A run ran away if its last 10 steps' mean KL is above this: runs end below 50 or above 200."""
RTO_BETAS = (0.8, 0.4, 0.2, 0.1)
"""Shares of RTO's log-ratios, from which one is chosen on ``LR_SEEDS``."""
RTO_BEST = 0.4
"""What that choice gave: ``summary`` makes it again from the runs."""
QUALITY_LAYERS, QUALITIES = 4, (100, 200, 1200)
"""Steps of training of further reward models of this depth."""

SIGNED_SOURCES: dict[Method, str] = {
    "gradient x value, signed": "gradient x value",
    "relevance, signed": "relevance a third up",
}
"""Which of ``sources.SOURCES`` is paid as signed token rewards; relevance was run with ``TRAININGS`` only."""
TRAINING_METHODS: tuple[Method, ...] = ("sparse", "ABC", *SIGNED_SOURCES)
DEEP_SOURCES: tuple[Method, ...] = (
    "norm-weighted rollout",
    "gradient x value",
    "gradient x value, signed",
)
SIGNED: tuple[Method, ...] = ("R3HF", "RTO", *SIGNED_SOURCES)
"""Methods whose token rewards stand in place of credit or beside a share of it that says nothing."""
DEEP_METHODS: tuple[Method, ...] = ("sparse", "ABC", *DEEP_SOURCES, "ABC shuffled")
LENGTHS: tuple[tuple[Length, dict[str, Any]], ...] = (
    ("8-16", {}),
    ("20-30", {}),
    ("40-60", {}),
    ("90-110", {"models": LONG}),
    ("140-160", {"models": LONGEST}),
)
"""Lengths that the testbed runs, and with whose models."""
ONE_MODEL: tuple[tuple[str, tuple[Length, ...]], ...] = (
    (LONG, ("8-16", "20-30", "40-60", "90-110")),
    (LONGEST, ("8-16", "20-30", "40-60", "90-110", "140-160")),
)
"""Whose models are run at every length they can: whether the lead grows where only the length changes."""


def bounds(length: Length) -> tuple[int, int]:
    """Fewest and most new tokens."""
    low, high = length.split("-")
    return int(low), int(high)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One PPO run.

    Args:
        beta: of ``R3HF``, whose token rewards replace the score, and of ``RTO`` and the signed source it is
            the share of the reward that is dense.
        shift: added to every standardised score, which no preference between completions depends on.
        models: ``"testbed"``, ``"long"`` and ``"longest"`` (trained on reviews long enough for 110 and 160
            tokens), or the testbed's policy with another training of its reward model, ``"training 1"``, or
            with one of the depth study, such as ``"4 layers, seed 1"``.
        critic: ``"shared"``, a value head on the policy's trunk as in the paper's code, or ``"separate"``, a
            model of its own as in verl, OpenRLHF and slime.
    """

    method: Method
    length: Length
    seed: int
    beta: float = BETA
    lam: float = LAM
    lr: float = LR
    shift: float = 0.0
    models: str = "testbed"
    critic: Critic = "shared"
    steps: int = STEPS

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("length", Length), ("critic", Critic)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want one of {get_args(kind)}")

    @property
    def setting(self) -> dict[str, Any]:
        """Everything but the seed: runs that differ in no setting are averaged."""
        return {name: value for name, value in asdict(self).items() if name != "seed"}

    @property
    def name(self) -> str:
        """Length and method, then what is not default, then the seed."""
        changed = [
            f"{f.name}={getattr(self, f.name):g}"
            if f.type == "float"
            else f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in ("method", "length", "seed") and getattr(self, f.name) != f.default
        ]
        return " ".join([self.length, self.method, *changed, f"seed={self.seed}"])

    @property
    def key(self) -> tuple[Any, ...]:
        """Orders cells by length, method and the other settings; seeds of a setting are neighbours."""
        return (*bounds(self.length), *self.setting.values(), self.seed)

    def ppo(self) -> PPOConfig:
        low, high = bounds(self.length)
        return PPOConfig(
            steps=self.steps,
            new_tokens=high,
            min_new_tokens=low,
            lr=self.lr,
            dense_share=self.beta,
            lam=self.lam,
        )


def _cells(seeds: tuple[int, ...], methods: tuple[Method, ...], **settings: Any) -> Iterator[Cell]:
    for seed in seeds:
        for method in methods:
            yield Cell(method=method, seed=seed, **settings)


MAIN: tuple[Method, ...] = ("sparse", "uniform", "ABC")
CONTROLS: tuple[Method, ...] = ("ABC shuffled", "ABC profile", "ABC, random weights")


def _experiments() -> dict[str, list[Cell]]:
    return {
        # Where the credit comes from, and what else ABC's gain could come from.
        "main": [
            *_cells(SEEDS, (*MAIN, *CONTROLS), length=HEADLINE),
            *_cells(SEEDS, ("sparse", "ABC"), length=HEADLINE, lam=1.0),
        ],
        "learning rates": [
            cell
            for lam in (1.0, LAM, 0.99)
            for lr in LRS
            for cell in _cells(LR_SEEDS, ("sparse",), length=HEADLINE, lam=lam, lr=lr)
        ],
        "headline": list(
            _cells(SEEDS, ("sparse", "ABC", "uniform", "ABC shuffled"), length=HEADLINE, **SPARSE_BEST)
        ),
        # Uniform also at beta 1, as the paper's code ran it.
        "methods": [
            *_cells(SEEDS, (*MAIN, "ABC-D mean", "ABC-D last", *CONTROLS), length=PAPER),
            *_cells(SEEDS, ("uniform",), length=PAPER, beta=1.0),
        ],
        "lengths": list(_cells(SEEDS, MAIN, length="20-30")),
        "neighbours": [
            *_cells(SEEDS, ("R3HF",), length=HEADLINE),
            *_cells(FEW, ("RTO",), length=HEADLINE),
            *_cells(SEEDS, ("RTO",), length=HEADLINE, beta=RTO_BEST),
            *_cells(SEEDS, ("R3HF",), length=HEADLINE, **SPARSE_BEST),
        ],
        "RTO's share": [
            cell for beta in RTO_BETAS for cell in _cells(LR_SEEDS, ("RTO",), length=HEADLINE, beta=beta)
        ],
        "beta": [cell for beta in BETAS for cell in _cells(SEEDS, ("ABC",), length=PAPER, beta=beta)],
        "shifted scores": [
            cell for shift in SHIFTS for cell in _cells(SEEDS, ("sparse", "ABC"), length=PAPER, shift=shift)
        ],
        # PPO with a deep reward model.
        "depth": [
            cell
            for lam in (LAM, 1.0)
            for cell in _cells(SEEDS, DEEP_METHODS, length=HEADLINE, models=DEEP, lam=lam)
        ],
        "depth at sparse's best": list(
            _cells(SEEDS, DEEP_METHODS, length=HEADLINE, models=DEEP, **SPARSE_BEST)
        ),
        "separate critic": [
            *_cells(FEW, ("sparse", "ABC", "ABC shuffled"), length=HEADLINE, critic="separate"),
            *_cells(FEW, ("sparse", "ABC"), length=HEADLINE, critic="separate", lam=1.0),
        ],
        "long responses": [
            cell
            for length, settings in LENGTHS
            if settings
            for cell in _cells(FEW, MAIN, length=length, **settings)
        ],
        "long responses at lambda 1": [
            cell
            for length, settings in LENGTHS
            if settings
            for cell in _cells(FEW, ("sparse", "ABC"), length=length, lam=1.0, **settings)
        ],
        "one reward model": [
            cell
            for models, lengths in ONE_MODEL
            for length in lengths
            for cell in _cells(FEW, ("sparse", "ABC"), length=length, models=models)
        ],
        "lambda": [cell for lam in LAMS for cell in _cells(SEEDS, MAIN, length=HEADLINE, lam=lam)],
        # The same over trainings of the reward model: the headline's error bar covers them here only.
        "trainings": [
            cell
            for models in TRAININGS
            for lam in (LAM, 1.0)
            for cell in _cells(TRAINING_SEEDS, TRAINING_METHODS, length=HEADLINE, models=models, lam=lam)
        ],
        "methods at 40-60": [
            *_cells(SEEDS, ("ABC-D mean", "ABC-D last"), length=HEADLINE),
            *_cells(SEEDS, ("uniform",), length=HEADLINE, beta=1.0),
        ],
    }


EXPERIMENTS: dict[str, list[Cell]] = {
    name: list(dict.fromkeys(cells)) for name, cells in _experiments().items()
}
"""In the order in which they are run; a cell that several share is run once."""


def chosen(names: list[str] | None = None) -> list[Cell]:
    """The cells of these experiments, all by default, each once; the seeds that all have come first."""
    unknown = set(names or ()) - EXPERIMENTS.keys()
    if unknown:
        raise ValueError(f"experiment: got {sorted(unknown)}, want some of {list(EXPERIMENTS)}")
    cells = dict.fromkeys(cell for name in names or EXPERIMENTS for cell in EXPERIMENTS[name])
    return sorted(cells, key=lambda cell: cell.seed in SEEDS and cell.seed not in FEW)
