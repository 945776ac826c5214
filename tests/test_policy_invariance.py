"""What redistribution leaves alone, and what not, where every completion can be written down.

Completions over two words and an end, of at most four tokens, from two prompts: a tabular softmax policy,
whose expected return and gradients are exact sums. A source that keeps the sum of a row keeps the return of
every completion from its beginning, at ``gamma = 1``, and so the optimal policy. It does not keep the
return from the middle: credit looks at the finished completion, and what an earlier token gets depends on
later ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attnshape import AttentionInputs, Response, ShapingConfig, credit, gae, shape_rewards

F64 = torch.float64
END, WORDS, LONGEST, PROMPTS = 0, (1, 2), 4, 2
COMPLETIONS = [
    (prompt, tokens)
    for prompt in range(PROMPTS)
    for n in range(1, LONGEST + 1)
    for tokens in itertools.product((END, *WORDS), repeat=n)
    if END not in tokens[:-1] and (tokens[-1] == END or n == LONGEST)
]
PREFIXES = sorted({(p, tokens[:j]) for p, tokens in COMPLETIONS for j in range(LONGEST + 1)})
"""Prompts, completions, and all in between."""
B = len(COMPLETIONS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[list[Any]]) -> Tensor:
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])


MASK = padded([[1] * len(tokens) for _, tokens in COMPLETIONS])
ACTION = padded([list(tokens) for _, tokens in COMPLETIONS])
STATE = padded([[PREFIXES.index((p, tokens[:j])) for j in range(len(tokens))] for p, tokens in COMPLETIONS])
NEXT = padded(
    [[PREFIXES.index((p, tokens[: j + 1])) for j in range(len(tokens))] for p, tokens in COMPLETIONS]
)
HEAD = normal(len(PREFIXES), seed=1)
"""A reward head read after every prefix; its last reading is the score."""
SCORE = HEAD[[PREFIXES.index(completion) for completion in COMPLETIONS]]
PROMPT = torch.tensor([p for p, _ in COMPLETIONS])
PROMPT_SCORE = HEAD[[PREFIXES.index((p, ())) for p, _ in COMPLETIONS]]


def attention() -> AttentionInputs:
    """Of a reward model that looks at whole completions: another row for each."""
    return AttentionInputs(
        normal(B, 2, 8, seed=2), normal(B, 2, LONGEST, 8, seed=3), 1.0, attention_mask=MASK
    )


def rewards(name: str, gamma: float = 1.0, **options: Any) -> Tensor:
    config = ShapingConfig(gamma=gamma, **options)
    if name in ("sparse", "uniform"):
        return shape_rewards(SCORE, name, MASK, config=config).rewards
    if name == "attention":
        response = Response(MASK, start=torch.zeros(B, dtype=torch.int32))
        return shape_rewards(SCORE, attention(), response, config=config).rewards
    if name == "signed":
        signed = credit.centered(normal(B, LONGEST, seed=4), MASK)
        return shape_rewards(SCORE, "uniform", MASK, token_rewards=signed, config=config).rewards
    replacing = {
        "incremental": lambda: credit.incremental_rewards(HEAD[NEXT], PROMPT_SCORE, MASK),
        "log ratio": lambda: credit.log_ratio_rewards(HEAD[NEXT], HEAD[NEXT] / 3, MASK, scale=1.0),
        "segments": lambda: credit.segment_rewards(HEAD[NEXT], HEAD[STATE].abs(), MASK, cutoff=0.5),
        "discriminator": lambda: credit.discriminator_rewards(HEAD[NEXT].sigmoid(), MASK),
    }[name]
    zeros = torch.zeros_like(SCORE)
    return shape_rewards(zeros, "sparse", MASK, token_rewards=replacing(), config=config).rewards


def returns(token_rewards: Tensor, gamma: float = 1.0) -> Tensor:
    return (token_rewards * gamma ** torch.arange(LONGEST)).sum(1)


def best(completion_returns: Tensor) -> list[int]:
    """The completion that an optimal policy writes for each prompt."""
    return [
        int(torch.where(prompt == PROMPT, completion_returns, -torch.inf).argmax())
        for prompt in range(PROMPTS)
    ]


SUM_PRESERVING = ["sparse", "uniform", "attention", "signed", "incremental"]


def kept(name: str) -> Tensor:
    """What the return is: the score, or, from increments, the score less a constant of the prompt."""
    return SCORE - PROMPT_SCORE if name == "incremental" else SCORE


@pytest.mark.parametrize("name", SUM_PRESERVING)
def test_the_return_of_every_completion_is_its_score(name: str) -> None:
    torch.testing.assert_close(returns(rewards(name)), kept(name))
    assert best(returns(rewards(name))) == best(SCORE)


def logprobs(policy: Tensor) -> Tensor:
    return policy.log_softmax(1)[STATE, ACTION].masked_fill(MASK == 0, 0.0)


def gradient(token_weights: Tensor) -> Tensor:
    """``sum over y of pi(y) sum over j of weight[y, j] grad log pi(y_j)``, with a policy drawn at random."""
    policy = normal(len(PREFIXES), 3, seed=5).requires_grad_()
    log = logprobs(policy)
    probability = log.sum(1).exp().detach()
    torch.testing.assert_close(probability.sum(), torch.tensor(float(PROMPTS), dtype=F64))
    (g,) = torch.autograd.grad((probability[:, None] * token_weights * log).sum(), policy)
    return g


@pytest.mark.parametrize("name", SUM_PRESERVING)
def test_the_gradient_by_whole_returns_is_that_of_the_score(name: str) -> None:
    whole = returns(rewards(name))[:, None].expand(-1, LONGEST)
    torch.testing.assert_close(gradient(whole), gradient(SCORE[:, None].expand(-1, LONGEST)))


# Where it does not hold


@pytest.mark.parametrize("name", ["log ratio", "segments", "discriminator"])
def test_rewards_that_replace_the_score_have_another_optimum(name: str) -> None:
    assert best(returns(rewards(name))) != best(SCORE)


@pytest.mark.parametrize("name", ["uniform", "attention", "signed", "incremental"])
def test_discounting_undoes_it(name: str) -> None:
    gamma = 0.5
    sparse = returns(rewards("sparse", gamma), gamma)
    assert not torch.allclose(returns(rewards(name, gamma), gamma), sparse)


def test_discounting_changes_the_optimum() -> None:
    gamma = 0.2
    assert best(returns(rewards("uniform", gamma), gamma)) != best(returns(rewards("sparse", gamma), gamma))


def test_credit_that_sums_to_the_length_pays_for_length() -> None:
    config = ShapingConfig(dense_share=1.0, normalization="sum_to_length")
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    paid = shape_rewards(torch.tensor([1.0, 0.5]), "uniform", mask, config=config).rewards
    torch.testing.assert_close(paid.sum(1), torch.tensor([1.0, 1.5]))


def to_go(name: str) -> Tensor:
    return gae(rewards(name), None, MASK, ShapingConfig(gamma=1.0, lam=1.0)).advantages


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("sparse", True),
        ("incremental", True),
        ("uniform", False),
        ("attention", False),
        ("signed", False),
    ],
)
def test_the_gradient_by_rewards_to_go_asks_for_rewards_that_know_only_the_past(
    name: str, same: bool
) -> None:
    """What PPO follows at ``lam = 1`` drops earlier rewards, as if the token could not change them."""
    exact = gradient(SCORE[:, None].expand(-1, LONGEST))
    assert torch.allclose(gradient(to_go(name)), exact) == same


def test_credit_on_the_wrong_side_of_a_choice_hides_it() -> None:
    """Sums kept, and yet whoever follows rewards-to-go writes the worse completion."""
    score = torch.tensor([1.0, 0.5])  # of "a b" and "a c"
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the first is all laid to "a"
    mask = torch.ones(2, 2)
    shaped = shape_rewards(score, weights, mask, config=ShapingConfig(dense_share=1.0, lam=1.0))
    torch.testing.assert_close(shaped.rewards.sum(1), score)
    assert shaped.advantages[:, 1].argmax() == 1
    half = shape_rewards(score, weights, mask, config=ShapingConfig(dense_share=0.4, lam=1.0))
    assert half.advantages[:, 1].argmax() == 0  # the share that stays on the last token outweighs it


@pytest.mark.parametrize("name", ["uniform", "attention", "signed"])
def test_the_implied_potential_needs_the_finished_completion(name: str) -> None:
    """Rewards of one token at one prefix differ with what follows; those of a potential do not."""

    def spread(token_rewards: Tensor) -> float:
        groups: dict[int, list[float]] = {}
        for state, reward, live in zip(NEXT.flatten(), token_rewards.flatten(), MASK.flatten(), strict=True):
            if live:
                groups.setdefault(int(state), []).append(float(reward))
        return max(max(group) - min(group) for group in groups.values())

    assert spread(rewards("incremental")) < 1e-12
    assert spread(rewards(name)) > 0.1


@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_gae_with_lambda_below_one_changes_the_estimator(lam: float) -> None:
    """With whole-completion credit, a value for each prefix and the first token's advantage."""
    values = HEAD[STATE]
    first = []
    for name in ("sparse", "attention"):
        advantages = gae(rewards(name), values, MASK, ShapingConfig(gamma=1.0, lam=lam)).advantages
        first.append(advantages[:, 0])
    assert torch.allclose(*first) == (lam == 1.0)
