"""Which source of credit may be trusted with a reward model: measured on its own score, without labels."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnshape.credit import deletion_scores, top_overlap
from attnshape.deletion import FRACTIONS
from attnshape.ops import shape_rewards
from attnshape.text.file import page_item
from attnshape.text.html import CreditItem
from attnshape.text.load import in_one_line
from attnshape.text.model import CreditModel, Tokens
from attnshape.text.reader import Example
from attnshape.text.source import CreditSource

SOURCES = (
    CreditSource("attention"),
    CreditSource("attention", "all"),
    CreditSource("columns"),
    CreditSource("rollout"),
    CreditSource("signed_rollout"),
    CreditSource("gradient_value"),
    CreditSource("gradient_embedding"),
    CreditSource("relevance", 0),
    CreditSource("relevance"),
)
DRAWS = 4
"""Random deletions of each completion."""
DISPUTED = 5
CLOSE = 0.9
"""Of what the best source reaches: a cheaper one that reaches it, and is not clearly worse, will do."""
NO_SCORE = "the model's score is not finite"
ONE_TOKEN = "a response of one token has nothing to choose from"


class Estimate(NamedTuple):
    """A mean over completions, and two standard errors of it."""

    value: float
    error: float

    @classmethod
    def of(cls, x: Tensor) -> Estimate:
        return cls(x.mean().item(), 2 * x.std().item() / math.sqrt(len(x)))

    @classmethod
    def share(cls, x: Tensor, whole: Tensor) -> Estimate:
        """Of the means of ``x`` and ``whole``, to first order."""
        value = (x.mean() / whole.mean()).item()
        return cls(value, Estimate.of((x - value * whole) / whole.mean()).error)

    @property
    def is_positive(self) -> bool:
        return self.value > self.error

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class SourceAudit:
    """One source; moves are of the score, against its verdict, in its own units."""

    source: str
    signed: bool
    curve: tuple[float, ...]
    """The mean move at each fraction of the tokens."""
    move: Estimate
    """Mean of a completion's curve, random deletion's taken off."""
    quartiles: tuple[float, ...]
    """Of the same over completions."""
    beyond_random: float
    """Share of completions in which it is above 0."""
    of_ceiling: Estimate
    """``move`` as a share of leave-one-out's: 0 is random."""
    entropy: float
    """Mean of the weights' sizes, as a share of the largest there can be: 1 is even credit."""
    response_attention: float | None
    """Mean share of the attention that falls on the response; of other sources None."""
    cost: float
    """Time beside the time of scoring alone: in forwards."""
    overlap: Mapping[str, float]
    """With each other source: mean ``top_overlap``, about .1 by chance."""


@dataclass(frozen=True)
class Refused:
    """A source that cannot be had from this model."""

    source: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found."""

    model: str
    completions: int
    mean: float
    """Of the scores."""
    fractions: tuple[float, ...]
    random: tuple[float, ...]
    """The curve of random deletion."""
    ceiling: SourceAudit
    """Leave-one-out."""
    sources: list[SourceAudit]
    refused: list[Refused]
    advice: str
    disputed: list[int]
    """Numbers of the completions on whose tokens the sources agree least, the least first."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Found(NamedTuple):
    """A source's weights ``[N, R]`` of each completion's tokens, and the moves ``[N, F]`` that they make."""

    weights: Tensor
    moves: Tensor
    seconds: float


def audit(
    model: CreditModel,
    examples: Sequence[Example],
    *,
    sources: Sequence[CreditSource] = SOURCES,
    span: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    on_step: Callable[[], None] = lambda: None,
    on_skip: Callable[[int, str], None] = lambda number, reason: None,
) -> Audit:
    """Deletes the tokens that each source names, and looks how far the score moves.

    A completion's verdict is the side of the mean that its score is on. Deleted are the tokens of the
    largest weights (of a source in units of the score: those that speak most for the verdict), a fraction of
    them at a time; measured is how far the score moves against the verdict. Random deletion is the floor,
    leave-one-out the ceiling that costs a forward per token.

    Args:
        model: its own source is not looked at, its ``batch_tokens`` is.
        examples: completions as its reader makes them, of at least two scores.
        span: tokens that leave-one-out deletes together.
        on_step: called when a source is done, ``len(sources) + 3`` times.
        on_skip: called with the number of an example that is left out, and the reason.

    Raises:
        ValueError: fewer than two completions can be scored.

    Examples:
        judge = CreditModel("reward-model")
        found = audit(judge, [judge.reader().read(prompt, response) for prompt, response in pairs])
        print(found.advice)
    """
    run = _Run(model, examples, tuple(fractions))
    for i, reason in sorted(run.left_out.items()):
        on_skip(i, reason)
    if len(run.numbers) < 2:
        raise ValueError(f"want at least two completions that can be scored, got {len(run.numbers)}")
    on_step()
    floor = run.random()
    on_step()
    ceiling_source = CreditSource("leave_one_out", span=span)
    found: dict[CreditSource, _Found] = {}
    refused: list[Refused] = []
    for source in (ceiling_source, *sources):
        x = run.found(source)
        if not isinstance(x, str):
            found[source] = x
        elif source == ceiling_source:
            raise ValueError(f"{source}: {x}")
        else:
            refused.append(Refused(str(source), x))
        on_step()
    overlaps = run.overlaps(found)
    beyond = {source: (x.moves - floor).mean(1) for source, x in found.items()}
    rows = {
        source: run.row(source, x, beyond[source], beyond[ceiling_source], overlaps.get(source, {}))
        for source, x in found.items()
    }
    ceiling = rows.pop(ceiling_source)
    pairs = [x for by in overlaps.values() for x in by.values()]
    order = torch.stack(pairs).mean(0).argsort(stable=True).tolist() if pairs else []
    return Audit(
        model=model.name,
        completions=len(run.numbers),
        mean=run.score.mean().item(),
        fractions=tuple(fractions),
        random=tuple(floor.mean(0).tolist()),
        ceiling=ceiling,
        sources=list(rows.values()),
        refused=refused,
        advice=_advice(ceiling, rows, beyond, len(run.numbers)),
        disputed=[run.numbers[i] for i in order[:DISPUTED]],
    )


def disputed_items(
    model: CreditModel,
    examples: Sequence[Example],
    found: Audit,
    sources: Sequence[CreditSource] = SOURCES,
    span: int = 1,
) -> list[CreditItem]:
    """The most disputed completions as each source that ran sees them, for ``credit_section``."""
    refused = {row.source for row in found.refused}
    shown = [CreditSource("leave_one_out", span=span), *(s for s in sources if str(s) not in refused)]
    return [
        page_item(examples[i], {str(source): model.score([examples[i]], source)[0] for source in shown})
        for i in found.disputed
    ]


class _Run:
    """Completions of two tokens or more that have a score, in batches, and what is asked about them."""

    def __init__(self, model: CreditModel, examples: Sequence[Example], fractions: tuple[float, ...]) -> None:
        self.model, self.fractions = model, fractions
        on_gpu = model.device.type != "cpu"
        self.clock = time.perf_counter if on_gpu else time.process_time  # not another process's time
        self.seconds = 0.0
        self.left_out = {i: ONE_TOKEN for i, example in enumerate(examples) if len(example.positions) < 2}
        given = {i: example for i, example in enumerate(examples) if i not in self.left_out}
        scores: dict[int, float] = {}
        for numbers in model.batches(given):
            batch = [given[i] for i in numbers]
            if not scores:
                model.scores(batch)  # the first forward compiles, and is not timed
            start = self.clock()
            scores |= zip(numbers, model.scores(batch).tolist(), strict=True)
            self.seconds += self.clock() - start
        self.left_out |= {i: NO_SCORE for i, score in scores.items() if not math.isfinite(score)}
        self.numbers = [i for i in given if i not in self.left_out]
        self.examples = {row: given[i] for row, i in enumerate(self.numbers)}
        self.batches = list(model.batches(self.examples))
        self.score = torch.tensor([scores[i] for i in self.numbers], dtype=torch.float64)
        self.verdict = torch.where(self.score > self.score.mean(), 1.0, -1.0)
        lengths = torch.tensor([len(example.positions) for example in self.examples.values()])
        self.mask = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths[:, None]

    def random(self) -> Tensor:
        """Mean moves ``[N, F]`` of random deletion."""
        even = torch.zeros(self.mask.shape)
        return torch.stack([self._moves(even, seed) for seed in range(DRAWS)]).mean(0)

    def found(self, source: CreditSource) -> _Found | str:
        """Or why it cannot be had from this model."""
        weights, seconds = torch.zeros(self.mask.shape), 0.0
        try:
            for k, rows in enumerate(self.batches):
                examples = [self.examples[row] for row in rows]
                if k == 0:
                    self.model.weigh(examples[-1:], source)  # compiles
                start = self.clock()
                of_batch = self.model.weigh(examples, source).weights.cpu()
                seconds += self.clock() - start
                weights[rows, : of_batch.shape[1]] = of_batch.float()
        except (ValueError, TypeError, RuntimeError) as error:
            return in_one_line(error)
        if bad := int((~weights.isfinite()).any(1).sum()):
            return f"its weights of {bad} of {len(weights)} completions are not finite"
        speaks = weights * self.verdict[:, None].float() if source.of_score else weights
        return _Found(weights, self._moves(speaks), seconds)

    def _moves(self, weights: Tensor, seed: int = 0) -> Tensor:
        """How far scores move against verdicts when the tokens of the largest weights go, ``[N, F]``."""
        device = self.model.device
        left = torch.zeros(len(weights), len(self.fractions), dtype=torch.float64)
        for rows in self.batches:
            tokens = Tokens.of([self.examples[row] for row in rows], device)
            left[rows] = deletion_scores(
                self.model.score_of,
                tokens.input_ids,
                weights[rows, : tokens.response.mask.shape[1]].to(device),
                tokens.response,
                fractions=self.fractions,
                attention_mask=tokens.attention_mask,
                pad_token_id=0,
                batch_tokens=self.model.batch_tokens,
                seed=seed,
            ).to(left)
        if bad := (~left.isfinite()).any(1).nonzero().flatten().tolist():
            raise ValueError(
                f"completion {self.numbers[bad[0]]}: its score without some tokens is not finite"
            )
        return self.verdict[:, None] * (self.score[:, None] - left)

    def row(
        self,
        source: CreditSource,
        found: _Found,
        beyond: Tensor,
        ceiling: Tensor,
        overlaps: Mapping[CreditSource, Tensor],
    ) -> SourceAudit:
        stats = shape_rewards(torch.zeros(len(self.mask)), found.weights.abs(), self.mask).row_stats
        on_response = found.weights.sum(1).mean().item()
        return SourceAudit(
            source=str(source),
            signed=source.signed,
            curve=tuple(found.moves.mean(0).tolist()),
            move=Estimate.of(beyond),
            quartiles=tuple(beyond.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()),
            beyond_random=(beyond > 0).double().mean().item(),
            of_ceiling=Estimate.share(beyond, ceiling),
            entropy=(stats.entropy / self.mask.sum(1).log()).mean().item(),
            response_attention=on_response if source.name == "attention" else None,
            cost=found.seconds / max(self.seconds, 1e-9),
            overlap={str(other): x.mean().item() for other, x in overlaps.items()},
        )

    def overlaps(
        self, found: Mapping[CreditSource, _Found]
    ) -> dict[CreditSource, dict[CreditSource, Tensor]]:
        """``top_overlap`` of each source with each other, ``[N]``."""
        out: dict[CreditSource, dict[CreditSource, Tensor]] = {}
        for one, other in itertools.combinations(found, 2):
            shared = top_overlap(found[one].weights, found[other].weights, self.mask)
            out.setdefault(one, {})[other] = out.setdefault(other, {})[one] = shared
        return out


def _advice(
    ceiling: SourceAudit,
    rows: Mapping[CreditSource, SourceAudit],
    beyond: Mapping[CreditSource, Tensor],
    completions: int,
) -> str:
    """One sentence that quotes the numbers: the cheapest source that is as good as the best, or nearly."""
    if not ceiling.move.is_positive:
        return (
            f"These {completions} completions do not tell: what leave-one-out deletes moves the score by "
            f"{ceiling.move} more than random deletion does; give more of them."
        )
    best = max(rows, key=lambda source: rows[source].of_ceiling.value, default=None)
    if best is None or not rows[best].of_ceiling.is_positive:
        reached = "" if best is None else f": the best, {best}, reaches {rows[best].of_ceiling} of it"
        return (
            f"Trust no source with this model but leave_one_out, which costs {ceiling.cost:.0f} forwards, or "
            f"spread rewards evenly{reached} ({completions} completions)."
        )
    good = [
        source
        for source, row in rows.items()
        if row.of_ceiling.is_positive
        and row.of_ceiling.value >= CLOSE * rows[best].of_ceiling.value
        and not Estimate.of(beyond[best] - beyond[source]).is_positive
    ]
    chosen = min(good, key=lambda source: rows[source].cost)
    also = [best, *(source for source in rows if source.name == "attention")]
    more = "".join(
        f"; {source}: {rows[source].of_ceiling} at {rows[source].cost:.1f}"
        for source in dict.fromkeys(also)
        if source != chosen
    )
    row = rows[chosen]
    how = ", as token rewards" if chosen.signed else ""
    return (
        f"Take {chosen}{how}: deleting the tokens it names moves the score {row.of_ceiling} times as far as "
        f"leave-one-out's, beyond random deletion, for {row.cost:.1f} forwards against "
        f"{ceiling.cost:.0f}{more} ({completions} completions)."
    )
