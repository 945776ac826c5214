"""``group_advantages`` against the frameworks' formulas and, by every backend, the float64 reference."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support.backends import drawn, each_backend, here, there
from support.problems import Problem, assert_within, problems, to_float64
from torch import Tensor

import attnshape
from attnshape import GroupConfig, Status, group_advantages, reference
from attnshape.reference.advantages import completion_advantages
from attnshape.tolerance import credit_bound

SCORES = torch.tensor([1.0, 0.0, 0.5, -2.0, 3.0, 3.0, 3.0, 3.0, 0.25])
IDS = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2, 5])
MASK = torch.ones(9, 4)


def completion(scores: Tensor, group: Any, config: GroupConfig, **options: Any) -> Tensor:
    return group_advantages(
        scores, None, torch.ones(len(scores), 4), group=group, config=config, **options
    ).completion


def test_grpo_is_trls() -> None:
    groups = SCORES[:8].view(2, 4)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(completion(SCORES[:8], 4, GroupConfig.grpo()), want.flatten())
    torch.testing.assert_close(completion(SCORES[:8], IDS[:8], GroupConfig.grpo()), want.flatten())
    batch = (groups - groups.mean(1, keepdim=True)) / (SCORES[:8].std() + 1e-4)
    torch.testing.assert_close(completion(SCORES[:8], 4, GroupConfig.grpo(scale="batch")), batch.flatten())


def test_a_group_of_one() -> None:
    alone = SCORES[8:]
    assert completion(alone, 1, GroupConfig.grpo()) == 0
    torch.testing.assert_close(completion(alone, 1, GroupConfig.grpo(framework="verl")), alone / (1 + 1e-6))
    assert completion(alone, 1, GroupConfig.rloo()) == alone
    assert completion(alone, 1, GroupConfig.dr_grpo()) == 0


def test_the_others_baselines() -> None:
    groups = SCORES[:8].view(2, 4)
    others = (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(completion(SCORES[:8], 4, GroupConfig.rloo()), (groups - others).flatten())
    mean = groups - groups.mean(1, keepdim=True)
    torch.testing.assert_close(completion(SCORES[:8], 4, GroupConfig.dr_grpo()), mean.flatten())
    plain = GroupConfig.reinforce_plus_plus()
    torch.testing.assert_close(completion(SCORES, IDS, plain), SCORES)
    based = GroupConfig.reinforce_plus_plus(baseline=True)
    torch.testing.assert_close(completion(SCORES[:8], 4, based), mean.flatten())


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("lone", ["score", "zero"])
@pytest.mark.parametrize("bessel", [True, False])
@pytest.mark.parametrize("rewards", [1, 3])
def test_statistics_of_unequal_groups_and_missing_rewards(
    baseline: Any, scale: Any, lone: Any, bessel: bool, rewards: int
) -> None:
    generator = torch.Generator().manual_seed(rewards)
    scores = torch.randn(9, rewards, generator=generator)
    scores[1, 0] = scores[8, 0] = torch.nan
    scores[5] = torch.nan
    weights = torch.tensor([1.0, 0.5, -2.0])[:rewards]
    config = GroupConfig(baseline=baseline, scale=scale, lone=lone, bessel=bessel)
    out = group_advantages(scores, [None] * rewards, MASK, group=IDS, weights=weights, config=config)
    want = completion_advantages(scores.double(), IDS, config, weights)
    torch.testing.assert_close(out.completion.double(), want.sum(1), rtol=1e-6, atol=1e-6)
    assert out.completion[5] == 0
    assert (out.status & int(Status.NONFINITE) != 0).tolist() == (~scores.isfinite().any(1)).tolist()
    torch.testing.assert_close(out.advantages, out.completion[:, None].expand(9, 4))


@drawn(problems(), st.integers(0, 2), st.sampled_from([None, "shares", "score"]), cpu=30, torch=60, triton=10)
def test_spread(backend: str, problem: Problem, kind: int, signed: Any) -> None:
    """By attention, by weights, by two rewards at once."""
    batch, mask = len(problem.score), problem.response.mask
    torch.manual_seed(batch)
    given = torch.where(mask != 0, torch.randn(mask.shape) if signed else torch.rand(mask.shape), torch.nan)
    score: Tensor = problem.score
    credit: Any = (problem.inputs, given, [problem.inputs, given])[kind]
    if kind == 2:
        score = torch.randn(batch, 2)
    config = GroupConfig(dense_share=0.7, scale="none", signed=signed)
    options = {"group": torch.arange(batch) // 2, "config": config}
    got = here(
        group_advantages(
            there(score), there(credit), there(problem.response), backend=backend, **there(options)
        )
    )
    exact = [to_float64(x) for x in (score, credit, problem.response)]
    want = reference.group_advantages(*exact, **options)
    assert torch.equal(got.status, want.status)
    size = float(want.completion.abs().max()) + 1
    for b in range(batch):
        row, expected = (problem.rows(x.advantages)[b] for x in (got, want))
        bound = 10 * size * credit_bound(expected, problem.max_score) + 1e-6 * size * len(expected)
        assert_within("advantages", row, expected, bound)
    torch.testing.assert_close(got.completion.double(), want.completion, rtol=1e-5, atol=1e-6)
    sound = want.status & int(Status.EMPTY | Status.OUT_OF_RANGE | Status.NONFINITE) == 0
    for b in sound.nonzero().flatten().tolist():
        live = problem.rows(mask)[b] != 0
        mean = problem.rows(got.advantages)[b][live].double().mean()
        torch.testing.assert_close(mean, want.completion[b], rtol=1e-4, atol=1e-4 * size)
    torch.testing.assert_close(
        got.moments[sound].double(), want.moments[sound], rtol=1e-3, atol=1e-3 * size**2
    )


@each_backend
def test_without_dense_share_it_is_the_frameworks_run(backend: str) -> None:
    credit = torch.rand(9, 4)
    config = GroupConfig.grpo(dense_share=0.0)
    out = here(
        group_advantages(*there([SCORES, credit, MASK]), group=there(IDS), config=config, backend=backend)
    )
    assert torch.equal(out.advantages, out.completion[:, None].expand(9, 4))


@each_backend
def test_a_row_that_falls_back_is_uniform(backend: str) -> None:
    credit = torch.rand(4, 5)
    credit[1, 2], credit[2] = -0.1, 0.0
    mask = torch.ones(4, 5)
    mask[3] = 0
    config = GroupConfig(scale="none")
    out = here(group_advantages(*there([SCORES[:4], credit, mask]), group=4, config=config, backend=backend))
    assert out.status.tolist() == [
        0,
        int(Status.FALLBACK | Status.NEGATIVE),
        int(Status.FALLBACK),
        int(Status.EMPTY),
    ]
    for b in (1, 2):
        torch.testing.assert_close(out.advantages[b], out.completion[b].expand(5))
    assert not out.advantages[3].any()


@each_backend
def test_a_row_out_of_range_is_flagged_as_that(backend: str) -> None:
    inputs = attnshape.AttentionInputs(torch.ones(2, 2, 8), torch.ones(2, 1, 5, 8), 1.0)
    response = attnshape.Response(torch.ones(2, 3), start=torch.tensor([1, 4]))
    given = there([SCORES[:2], inputs, response])
    out = here(group_advantages(*given, group=2, backend=backend))
    assert out.status.tolist() == [0, int(Status.OUT_OF_RANGE)]
    assert out.advantages.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize("signed", ["shares", "score"])
def test_signed_weights_keep_the_mean(signed: Any) -> None:
    """What lowered a score is punished in a completion below the mean too, if weights are of the score."""
    weights = torch.tensor([[0.5, -0.25, 0.25], [-1.0, -1.0, 2.0]])
    config = GroupConfig(scale="none", signed=signed, dense_share=0.5)
    out = group_advantages(torch.tensor([1.0, 0.0]), weights, torch.ones(2, 3), group=2, config=config)
    torch.testing.assert_close(out.advantages.mean(1), out.completion)
    w = weights / weights.abs().sum(1, keepdim=True)
    a = torch.tensor([0.5, -0.5])[:, None]
    of = a.abs() if signed == "score" else a
    torch.testing.assert_close(out.advantages, a + 0.5 * of * 3 * (w - w.mean(1, keepdim=True)))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"group": 2}, "group: got 2 completions per prompt for 9, want a divisor of that"),
        ({"group": 0}, "group: got 0, want at least one"),
        ({"group": 1.5}, "group: got float"),
        ({"group": torch.arange(8)}, r"group: got shape \(8,\)"),
        ({"credit": torch.rand(8, 4)}, r"credit: got shape \(8, 4\)"),
        ({"credit": "sparse"}, "credit: got 'sparse', want \"uniform\""),
        ({"score": torch.rand(9, 2)}, "credit: got Tensor, want a list of 2"),
        ({"score": torch.rand(9, 2), "credit": [None]}, "credit: got 1, want a list of 2"),
        ({"weights": torch.ones(1)}, "weights: got some for one score"),
        ({"config": attnshape.ShapingConfig()}, "config: got ShapingConfig, want GroupConfig"),
        ({"credit": torch.rand(9, 4) - 0.5, "validate": True}, "credit: got -0"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], error: str) -> None:
    given = {"score": SCORES, "credit": torch.rand(9, 4), "response": MASK, "group": IDS} | changed
    with pytest.raises((ValueError, TypeError), match=error):
        group_advantages(**given)


@pytest.mark.parametrize("field", ["baseline", "scale", "lone", "eps", "dense_share", "whitening"])
def test_a_config_is_checked_when_it_is_made(field: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{field}: got"):
        GroupConfig(**{field: "nothing"})


def test_under_the_compiler() -> None:
    compiled = torch.compile(
        lambda s, c: group_advantages(s, c, MASK, group=IDS), fullgraph=True, backend="eager"
    )
    credit = torch.rand(9, 4)
    for got, want in zip(
        compiled(SCORES, credit), group_advantages(SCORES, credit, MASK, group=IDS), strict=True
    ):
        torch.testing.assert_close(got, want)
